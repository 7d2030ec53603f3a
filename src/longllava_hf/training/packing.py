# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""Several conversations in one row, to a budget of tokens: planned from their lengths, filled where they are read."""

import os
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

from ..files_longllava import atomic_write
from .collator import LongLLaVADataCollator


def plan_bins(lengths: Sequence[int], max_length: int, window: int | None = None) -> list[list[int]]:
    """
    Which rows share a bin: the longest first, each where it fits best.

    Args:
        lengths (`list[int]`): tokens of each row.
        max_length (`int`): tokens of a bin.
        window (`int`, *optional*): where rows are to keep their order, such as that of a curriculum: only so many rows that
            follow one another are packed together, then the next ones.

    Returns:
        `list[list[int]]`: the rows of each bin, by number. All are there, once, and the same whenever this is called.

    Raises:
        ValueError: for rows that are longer than a bin.
    """
    too_long = [row for row, length in enumerate(lengths) if length > max_length]
    if too_long:
        longest = max(too_long, key=lambda row: lengths[row])
        raise ValueError(
            f"{len(too_long)} of {len(lengths)} rows have more than `max_length` ({max_length}) tokens: rows"
            f" {too_long[:10]}{'...' if len(too_long) > 10 else ''}, the longest of them ({longest}) {lengths[longest]}."
        )
    if window is not None:
        if window < 1:
            raise ValueError(f"`window` must be a number of rows, but is {window}.")
        starts = range(0, len(lengths), window)
        parts = ((start, plan_bins(lengths[start : start + window], max_length)) for start in starts)
        return [[start + row for row in rows] for start, part in parts for rows in part]
    bins: list[list[int]] = []
    with_free: dict[int, list[int]] = defaultdict(list)  # bins with so many tokens left
    free: list[int] = []  # those numbers, each once
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        length = lengths[row]
        if (place := bisect_left(free, length)) < len(free):
            left = free[place]
            target = with_free[left].pop()
            if not with_free[left]:
                free.pop(place)
            bins[target].append(row)
        else:
            left, target = max_length, len(bins)
            bins.append([row])
        if not with_free[left - length]:
            insort(free, left - length)
        with_free[left - length].append(target)
    return sorted(map(sorted, bins))


class _Measures(Dataset):
    def __init__(self, dataset: Any, collator: LongLLaVADataCollator):
        self.dataset, self.collator = dataset, collator

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.collator.measure(self.dataset[index], index)


def measure_rows(dataset: Any, collator: LongLLaVADataCollator, num_workers: int = 0) -> tuple[list[int], list[int]]:
    """As [`token_lengths`], and a checksum of what is said in each row."""
    measured = DataLoader(_Measures(dataset, collator), batch_size=64, num_workers=num_workers, collate_fn=list)
    progress = logging.tqdm(total=len(dataset), desc="Counting tokens", unit=" rows", delay=1.0)
    measures: list[tuple[int, int]] = []
    for batch in measured:
        measures += batch
        progress.update(len(batch))
    progress.close()
    return [length for length, _ in measures], [checksum for _, checksum in measures]


def token_lengths(dataset: Any, collator: LongLLaVADataCollator, num_workers: int = 0) -> list[int]:
    """
    Tokens of each row, counted without decoding a picture, unless the dataset does so itself. As a column `length` they
    serve `Trainer`'s `group_by_length`.

    Args:
        dataset (`Dataset`): with a length and rows by number.
        collator ([`LongLLaVADataCollator`]): that will make batches of them.
        num_workers (`int`, defaults to 0): processes.

    Raises:
        ValueError: for what the collator would refuse before it decodes, with the sample's name.
    """
    return measure_rows(dataset, collator, num_workers)[0]


class PackedDataset(Dataset):
    """
    A dataset whose items are lists of rows, to be packed by [`LongLLaVADataCollator`].

    Args:
        dataset (`Dataset`): with a length and rows by number.
        lengths (`list[int]`): tokens of each row, see [`token_lengths`].
        max_length (`int`): tokens of a bin.
        window (`int`, *optional*): see [`plan_bins`].

    Attributes:
        bins (`list[list[int]]`): rows of each item, see [`plan_bins`].
    """

    def __init__(self, dataset: Any, lengths: Sequence[int], max_length: int, window: int | None = None):
        if not len(lengths):
            raise ValueError("There are no rows to pack.")
        if len(dataset) != len(lengths):
            raise ValueError(
                f"There must be a length for each row, but there are {len(lengths)} for {len(dataset)} rows."
            )
        self.dataset, self.lengths, self.max_length = dataset, list(lengths), max_length
        self.bins = plan_bins(self.lengths, max_length, window)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> list[dict]:
        return [self.dataset[row] for row in self.bins[index]]

    @property
    def waste(self) -> float:
        """The part of all bins that is empty."""
        return 1 - sum(self.lengths) / (len(self.bins) * self.max_length)


def draw_lengths(lengths: Sequence[int], file: str | os.PathLike, max_length: int | None = None) -> None:
    """A histogram of how many tokens rows have, as a PNG. Needs `matplotlib`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("A histogram needs `matplotlib`: pip install longllava_hf[plot]") from None
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.hist(torch.tensor(lengths).numpy(), bins=50)
    if max_length is not None:
        axes.axvline(max_length, color="grey", linestyle="--", label=f"{max_length:,} tokens")
        axes.legend()
    axes.set(xlabel="tokens of a row", ylabel="rows", yscale="log")
    with atomic_write(file) as partial:
        figure.savefig(partial, format="png")


__all__ = ["PackedDataset", "draw_lengths", "measure_rows", "plan_bins", "token_lengths"]
