# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversations as LLaVA's and LongLLaVA's authors keep them, as rows that `datasets`, TRL and this package read."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..files_longllava import atomic_write
from ..image_processing_longllava import picture_size
from ..processing_longllava import MARKERS
from ..video_longllava import check_num_frames
from .collator import check_turns, named_sample


_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Of the published tokenizer; what else is special in another one, the collator tells.
_SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<|pad|>")
# As the authors' code writes what this package's processor writes around a placeholder by itself.
_PICTURE = "<img><image></img>"
_FILM = re.compile(r"<vid>((?:<img><image></img>(?:<t>)?)+)</vid>")


@dataclass
class ConvertedData:
    """
    What a conversion of data came to.

    rows, images, videos (`int`): how many were written.
    skipped (`list[str]`): what was wrong with each sample that was left out.
    """

    rows: int = 0
    images: int = 0
    videos: int = 0
    skipped: list[str] = field(default_factory=list)


def video_row(video: str, question: str, answer: str, num_frames: int | None = None, **columns) -> dict[str, Any]:
    """
    A row in which a video is asked about.

    Args:
        video (`str`): path or URL.
        question, answer (`str`).
        num_frames (`int`, *optional*): that it is sampled by; by default as many as the processor takes.
        columns: more of the row, such as `id`.
    """
    messages = [{"role": "user", "content": f"<video>\n{question}"}, {"role": "assistant", "content": answer}]
    row = {**columns, "messages": messages, "images": [], "videos": [video]}
    return row if num_frames is None else {**row, "processor_kwargs": {"num_frames": num_frames}}


def with_sub_images(row: dict, image_grid_pinpoints: list[list[int]] | None = None) -> dict:
    """
    The same row, whose pictures are seen whole and then cut into sub-images in the order of the protocol (arXiv
    2409.02889, section 3.2).

    Args:
        row (`dict`).
        image_grid_pinpoints (`list[list[int]]`, *optional*): `(rows, columns)` to choose from; all up to 6 x 6 by default.
    """
    settings: dict[str, Any] = {"patch_strategy": "best_fit"}
    if image_grid_pinpoints is not None:
        settings["image_grid_pinpoints"] = image_grid_pinpoints
    return {**row, "processor_kwargs": {**(row.get("processor_kwargs") or {}), **settings}}


def _files(names: Any, folder: str, what: str) -> list[str]:
    """Paths of files that are there."""
    if (
        names is not None
        and not isinstance(names, str)
        and not (isinstance(names, list) and all(isinstance(name, str) for name in names))
    ):
        raise ValueError(f"`{what}` must be a name or a list of names, but is {str(names)[:200]}.")
    paths = [
        os.path.abspath(os.path.join(folder, name)) for name in ([names] if isinstance(names, str) else names or [])
    ]
    for path in paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"There is no {what} `{path}`.")
        if what == "image":
            picture_size(path, f"The image `{path}`")
    return paths


def convert_sample(sample: dict, images: str = "", videos: str | None = None, number: int = 0) -> dict[str, Any]:
    """
    One sample of LLaVA-style JSON as a row.

    Args:
        sample (`dict`): with `conversations`, a list of `{"from": "human" or "gpt", "value": ...}`; `image` and `video`, a
            name or a list of names; and, maybe, an `id`. `<image>` and `<video>` in a `value` stand for the next of
            them, with or without the authors' tags around.
        images, videos (`str`): the folders of the files; that of videos is by default that of images.
        number (`int`): names a sample without an `id`.

    Returns:
        `dict`: `id`, `messages`, `images` and `videos`, for [`LongLLaVADataCollator`].

    Raises:
        ValueError: for a file that is not there or is no picture, turns that do not alternate, and placeholders that
            are more or fewer than files. It names the sample.
    """
    with named_sample(sample, number):
        if not isinstance(sample, dict) or not isinstance(sample.get("conversations"), list):
            raise ValueError(f"it must be an object with a list `conversations`, but is {str(sample)[:200]}.")
        messages, films = [], []
        for turn in sample["conversations"]:
            if (
                not isinstance(turn, dict)
                or turn.get("from") not in list(_ROLES)
                or not isinstance(turn.get("value"), str)
            ):
                raise ValueError(
                    f"a turn must have a `from`, one of {list(_ROLES)}, and a string as `value`, but it is {str(turn)[:200]}."
                )
            messages.append({"role": _ROLES[turn["from"]], "content": turn["value"]})
        check_turns(messages)
        files = _files(sample.get("image"), images, "image")
        film_files: list[Any] = _files(sample.get("video"), images if videos is None else videos, "video")
        text = "".join(message["content"] for message in messages)
        if film_files and not files and "<video>" not in text and text.count("<image>") == len(film_files):
            for message in messages:  # data for videos often has the placeholder of pictures
                message["content"] = message["content"].replace("<image>", "<video>")
        # A film that is written as its frames: those are among the images, in reading order.
        position = 0
        for message in messages:
            parts = _FILM.split(message["content"])
            for i, part in enumerate(parts):
                count = part.count("<image>")
                if i % 2:
                    films.append(files[position : position + count])
                    del files[position : position + count]
                    parts[i] = "<video>"
                else:
                    parts[i] = part.replace(_PICTURE, "<image>")
                    position += count
            message["content"] = "".join(parts)
        for message in messages:
            text, places = message["content"], ("<image>", "<video>")
            refused = [*MARKERS, *_SPECIAL, *(() if message["role"] == "user" else places)]
            if message["role"] == "user":
                text = text.replace("<image>", "").replace("<video>", "")
            if found_markers := [token for token in refused if token in text]:
                raise ValueError(
                    f"the text of its {message['role']} has {', '.join(found_markers)}, which would be no text."
                )
        if films and film_files:
            raise ValueError("it has videos as files and as frames; only one of both can be told apart.")
        found = {"image": files, "video": films or film_files}
        for kind, items in found.items():
            wanted = sum(message["content"].count(f"<{kind}>") for message in messages)
            if wanted != len(items):
                raise ValueError(f"its turns have {wanted} `<{kind}>`, but there are {len(items)} {kind}s.")
        name = str(number if sample.get("id") is None else sample["id"])
        return {"id": name, "messages": messages, "images": found["image"], "videos": found["video"]}


def _samples(source: str | os.PathLike) -> Iterator[Any]:
    """The samples of a JSON file that holds a list, or of one with a sample in each line."""
    with open(source, encoding="utf-8") as stream:
        try:
            if Path(source).suffix != ".jsonl":
                samples = json.load(stream)
                if not isinstance(samples, list):
                    raise ValueError(f"`{source}` must hold a list of samples, but holds a {type(samples).__name__}.")
                yield from samples
                return
            for number, line in enumerate(stream, 1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"`{source}`, line {number}, is no JSON: {error}") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"`{source}` is no JSON: {error}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"`{source}` is not UTF-8: {error}") from None


def convert_data(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    images: str | os.PathLike | None = None,
    videos: str | os.PathLike | None = None,
    num_frames: int | None = None,
    sub_images: bool = False,
    skip_bad: bool = False,
) -> ConvertedData:
    """
    LLaVA-style JSON to rows, one a line, which `datasets.load_dataset("json", data_files=...)` and `longllava train` read.
    No picture is decoded, nor copied: rows have absolute paths.

    Args:
        source (`str`): a JSON file with a list, or a `.jsonl`; see [`convert_sample`] for what a sample is.
        destination (`str`): the file to write, `.jsonl`. It is there when all of it is.
        images, videos (`str`, *optional*): folders of the files, by default that of `source`.
        num_frames (`int`, *optional*): that videos are sampled by.
        sub_images (`bool`, defaults to `False`): whether pictures are also cut into sub-images, see [`with_sub_images`].
        skip_bad (`bool`, defaults to `False`): leave out what is wrong, and say so in what is returned.

    Raises:
        ValueError: for a sample that is wrong, unless it is skipped; if nothing is left; for a file that is no JSON.
        OSError: for files that cannot be read or written.
    """
    check_num_frames(num_frames)
    folder = str(images if images is not None else os.path.dirname(os.path.abspath(source)))
    result = ConvertedData()
    if not os.path.isfile(source):
        raise FileNotFoundError(f"There is no file `{source}`.")
    with atomic_write(destination) as partial:
        with open(partial, "w", encoding="utf-8") as stream:
            for number, sample in enumerate(
                logging.tqdm(_samples(source), desc="Converting", unit=" samples", delay=1.0)
            ):
                try:
                    row = convert_sample(sample, folder, None if videos is None else str(videos), number)
                except ValueError as error:
                    if not skip_bad:
                        raise
                    result.skipped.append(str(error))
                    continue
                settings = {"num_frames": num_frames} if num_frames is not None and row["videos"] else {}
                if settings:
                    row["processor_kwargs"] = settings
                if sub_images and row["images"]:
                    row = with_sub_images(row)
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                result.rows += 1
                result.images += len(row["images"])
                result.videos += len(row["videos"])
        if not result.rows:
            skipped = (
                f", and {len(result.skipped)} were left out, first: {result.skipped[0]}" if result.skipped else ""
            )
            raise ValueError(f"`{source}` has no samples to write{skipped}.")
    return result


__all__ = ["ConvertedData", "convert_data", "convert_sample", "video_row", "with_sub_images"]
