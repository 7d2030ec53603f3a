# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""Whether a kept context or a checkpoint is whole, and what is wrong with it if not."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .checkpoint_longllava import (
    check_weights,
    checkpoint_files,
    has_vision_tower,
    load_vision_tower,
    published_names,
    read_headers,
    to_native_name,
)
from .configuration_longllava import LongLLaVAConfig
from .context_longllava import context_metadata, read_context
from .files_longllava import hash_file
from .identity_longllava import is_finite
from .modeling_longllava import LongLLaVAForConditionalGeneration
from .processing_longllava import LongLLaVAProcessor


# What the Hub's cache calls a large file: by its SHA-256.
_SHA256 = re.compile(r"[0-9a-f]{64}")


def verify(path: str | os.PathLike) -> dict[str, Any]:
    """
    Check a file of a context, or a folder of a checkpoint in either layout: structure, names and shapes, finite values,
    and hashes where they are known.

    Returns:
        `dict`: what it is; of `"problems"` a list, empty if it is whole.

    Raises:
        ValueError: if it is neither.
        OSError: if it does not exist.
    """
    if os.path.isdir(path):
        return _verify_checkpoint(Path(path))
    if context_metadata(path) is None:
        raise ValueError(f"`{path}` is neither a kept context nor the folder of a checkpoint.")
    try:
        facts, tensors = read_context(path)
    except (OSError, ValueError) as error:
        return {"kind": "context", "problems": [str(error)]}
    rows, tokens = tensors["input_ids"].shape
    images = sum(map(len, facts["image_hashes"]))
    return {"kind": "context", "rows": rows, "tokens": tokens, "images": images, "problems": []}


def _verify_checkpoint(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = {"kind": "checkpoint", "files": 0, "tensors": 0, "hashes": 0, "problems": []}
    problems = report["problems"]
    try:
        config = LongLLaVAConfig.from_pretrained(folder)
        files = checkpoint_files(folder)
        if not files:
            raise OSError(
                f"`{folder}` has no weights: no model.safetensors or pytorch_model.bin, nor an index of either."
            )
        stored = read_headers(files, folder)
    except Exception as error:
        problems.append(f"{error}")
        return report
    report.update(files=len(files), tensors=len(stored))
    names = published_names(config)
    native = {to_native_name(name, names): tensor for name, tensor in stored.items()}
    with torch.device("meta"):
        model = LongLLaVAForConditionalGeneration(config)
    try:
        unexpected = check_weights(model, native, folder)
        report["without a place"] = sorted(unexpected)
        if not has_vision_tower(native):
            load_vision_tower(config, folder)
    except (OSError, ValueError) as error:
        problems.append(str(error))
    problems += _problems_of_index(folder, files)
    for file in map(os.path.realpath, files):
        if _SHA256.fullmatch(name := os.path.basename(file)):
            report["hashes"] += 1
            if (found := hash_file(file)) != name:
                problems.append(f"`{file}` has the SHA-256 {found}, and is called after another.")
    problems += _problems_of_values(stored)
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        problems += _problems_of_processor(folder, config)
    return report


def _problems_of_index(folder: Path, files: list[str]) -> Iterator[str]:
    """Weights that an index promises in another file than the one that has them."""
    for index in folder.glob("*.index.json"):
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            is_used = set(weight_map.values()) == {os.path.basename(file) for file in files}
        except Exception as error:
            yield f"The index `{index}` is damaged: {error!r}."
            continue
        if not is_used:
            continue
        for file in files:
            promised = {name for name, shard in weight_map.items() if shard == os.path.basename(file)}
            found = set(read_headers([file], folder))
            if missing := sorted(promised - found):
                yield f"`{index}` promises {len(missing)} weights in `{file}` that are not there, such as `{missing[0]}`."
            if extra := sorted(found - promised):
                yield f"`{file}` has {len(extra)} weights that `{index}` does not know there, such as `{extra[0]}`."


def _problems_of_values(stored: dict[str, Any]) -> Iterator[str]:
    """Weights that are not finite, read one at a time."""
    for name, tensor in logging.tqdm(stored.items(), desc="Verifying", unit=" tensors", delay=1.0, leave=False):
        values = tensor[...]
        if values.is_floating_point() and not is_finite(values):
            wrong = int((~values.isfinite()).sum())
            yield f"The weight `{name}` has {wrong} values that are not finite, of {values.numel()}."


def _problems_of_processor(folder: Path, config: LongLLaVAConfig) -> Iterator[str]:
    try:
        processor = LongLLaVAProcessor.from_pretrained(folder)
    except Exception as error:
        yield f"The processor of `{folder}` cannot be loaded: {error}"
        return
    if processor.image_token_id != config.image_token_id:
        yield (
            f"In `{folder}` the image token of the configuration is {config.image_token_id}, and that of the processor"
            f" {processor.image_token_id}."
        )


__all__ = ["verify"]
