# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""Rewriting a checkpoint from one layout to the other, a shard at a time."""

import json
import os
import shutil
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from transformers import AutoModel
from transformers.utils import logging

from .checkpoint_longllava import (
    atomic_write,
    check_weights,
    checkpoint_files,
    has_vision_tower,
    load_vision_tower,
    published_names,
    read_headers,
    read_lazily,
    to_native_name,
    to_published_name,
)
from .configuration_longllava import LongLLaVAConfig, locate_vision_tower, native_to_published
from .modeling_longllava import LongLLaVAForConditionalGeneration
from .processing_longllava import LongLLaVAProcessor


logger = logging.get_logger(__name__)

_PROGRESS_FILE = "conversion.json"
_TOWER_FOLDER = "vision_tower"


def _write_json(file: Path, content: dict) -> None:
    with atomic_write(file) as temporary:
        Path(temporary).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check(source: str, files: list[str], config: LongLLaVAConfig, names: list[tuple[str, str]]) -> bool:
    """Whether the vision tower is there; everything else must be. Reads no more than the files' headers."""
    if not files:
        raise OSError(f"`{source}` has no weights: no model.safetensors or pytorch_model.bin, nor an index of either.")
    found = {to_native_name(name, names): tensor for name, tensor in read_headers(files, source).items()}
    with torch.device("meta"):
        model = LongLLaVAForConditionalGeneration(config)
    if unexpected := sorted(check_weights(model, found, source)):
        logger.warning(f"{len(unexpected)} weights have no place in the model, and are kept as they are: {unexpected}")
    return has_vision_tower(found)


def convert_checkpoint(source: str, destination: str, to: Literal["native", "published"] = "native") -> Path:
    """
    Rewrite a checkpoint in another layout. Only names change, never a value.

    Peak memory is one shard. Work is done in `destination + ".partial"`, which is renamed at the end; if it is there
    already from a run that was interrupted, its finished shards are kept.

    Args:
        source (`str`): a folder or Hub id, in either layout, safetensors or `.bin`.
        destination (`str`): a folder that does not exist yet.
        to (`"native"` or `"published"`, defaults to `"native"`): the layout to write.

    Returns:
        `Path`: the new folder.

    Raises:
        ValueError: if a weight is missing or has another shape, or the partial folder is of another conversion.
        OSError: if the destination exists, or the source has no weights or damaged ones.
    """
    if to not in ("native", "published"):
        raise ValueError(f"`to` must be 'native' or 'published', but it is {to!r}.")
    target = Path(destination)
    if target.exists():
        raise FileExistsError(f"The destination `{target}` exists already.")
    folder = Path(source) if os.path.isdir(source) else Path(snapshot_download(source))
    config = LongLLaVAConfig.from_pretrained(folder)
    names, paths = published_names(config), checkpoint_files(folder)
    has_tower = _check(source, paths, config, names)
    files = [Path(path) for path in paths]

    partial = target.with_name(target.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    job, progress = {"to": to, "files": {file.name: file.stat().st_size for file in files}}, partial / _PROGRESS_FILE
    if progress.is_file() and (earlier := json.loads(progress.read_text(encoding="utf-8"))) != job:
        raise ValueError(f"`{partial}` is left from another conversion, {earlier}, not {job}. Remove it first.")
    _write_json(progress, job)

    def rename(name: str) -> str:
        native = to_native_name(name, names)
        return to_published_name(native, config) if to == "published" else native

    total = len(files) + (not has_tower)
    weight_map, total_size = {}, 0
    shards: list[Path | None] = [*files] if has_tower else [*files, None]
    for number, file in enumerate(logging.tqdm(shards, desc="Converting", unit=" shards"), 1):
        shard = "model.safetensors" if total == 1 else f"model-{number:05}-of-{total:05}.safetensors"
        tensors = load_vision_tower(config, folder) if file is None else read_lazily([str(file)])
        weight_map.update({rename(name): shard for name in tensors})
        if not (partial / shard).is_file():
            contents = {rename(name): tensor[...].contiguous() for name, tensor in tensors.items()}
            with atomic_write(partial / shard) as temporary:
                save_file(contents, temporary, metadata={"format": "pt"})
            del contents
        total_size += (partial / shard).stat().st_size
    if total > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        _write_json(partial / "model.safetensors.index.json", index)

    _write_settings(folder, partial, config, to, keep={file.name for file in files})
    progress.unlink()
    os.replace(partial, target)
    return target


def _write_settings(folder: Path, partial: Path, config: LongLLaVAConfig, to: str, keep: set[str]) -> None:
    """Everything beside the weights: the configuration, the processor, and files that need no change."""
    written = {"config.json", "conversion.json", *keep}
    for file in folder.iterdir():
        is_index = file.name.endswith(".index.json")
        if file.is_file() and not is_index and file.name not in written and not file.name.startswith("."):
            shutil.copyfile(file, partial / file.name)
    if to == "published":
        tower = config.vision_tower or ""
        if not tower or tower != locate_vision_tower(tower, None) or os.path.isdir(tower):
            # Only a Hub id means the same everywhere: put the tower beside the weights.
            tower = f"./{_TOWER_FOLDER}"
            _write_tower(partial, config)
        _write_json(partial / "config.json", native_to_published(config, tower))
        for name in ("processor_config.json", "preprocessor_config.json"):
            (partial / name).unlink(missing_ok=True)
        return
    config.architectures = [LongLLaVAForConditionalGeneration.__name__]
    config.save_pretrained(partial)
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        LongLLaVAProcessor.from_pretrained(folder).save_pretrained(partial)


def _write_tower(partial: Path, config: LongLLaVAConfig) -> None:
    names = published_names(config)
    prefix = "model.vision_tower."
    tensors = {to_native_name(n, names): t for n, t in read_lazily(checkpoint_files(partial)).items()}
    tower = AutoModel.from_config(config.vision_config)
    weights = {n.removeprefix(prefix): t[...] for n, t in tensors.items() if n.startswith(prefix)}
    tower.load_state_dict(weights)
    tower.to(next(iter(weights.values())).dtype).save_pretrained(partial / _TOWER_FOLDER)


__all__ = ["convert_checkpoint"]
