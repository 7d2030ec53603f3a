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
    damaged_files,
    expert_names,
    load_vision_tower,
    published_names,
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


def weight_files(folder: Path) -> list[Path]:
    """
    The files that hold a checkpoint's weights.

    Raises:
        OSError: if there are none, or one that an index names is not there.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            absent = [shard for shard in names if not (folder / shard).is_file()]
            if absent:
                raise OSError(
                    f"`{index}` names {len(names)} files, of which {len(absent)} are missing: {', '.join(absent)}"
                )
            return [folder / shard for shard in names]
        if (folder / name).is_file():
            return [folder / name]
    raise OSError(
        f"`{folder}` has no weights: neither model.safetensors nor pytorch_model.bin, nor an index of either."
    )


def expected_shapes(config: LongLLaVAConfig) -> dict[str, tuple[int, ...]]:
    """Native name and shape of every tensor that a complete checkpoint has on disk."""
    with torch.device("meta"):
        model = LongLLaVAForConditionalGeneration(config)
    tied = set(model.all_tied_weights_keys)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        if ".experts." in name:
            parts = expert_names(name, config.get_text_config().num_experts)
            shapes.update(dict.fromkeys(parts, (tensor.shape[0] // len(parts), tensor.shape[1])))
        else:
            shapes[name] = tuple(tensor.shape)
    return shapes


def _write_json(file: Path, content: dict) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def _check(source: str, files: list[Path], config: LongLLaVAConfig, names: list[tuple[str, str]]) -> bool:
    """Whether the vision tower is there; everything else must be. Reads no more than the files' headers."""
    try:
        tensors = read_lazily(map(str, files))
    except Exception as error:
        raise OSError(f"The weights of `{source}` are damaged: {damaged_files(files[0].parent) or error}") from error
    found = {}
    for name, tensor in tensors.items():
        shape = tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape
        found[to_native_name(name, names)] = tuple(shape)
    expected = expected_shapes(config)
    has_tower = any("vision_tower." in name for name in found)
    missing = [n for n in expected if n not in found and (has_tower or "vision_tower." not in n)]
    wrong = [
        f"{n} is {found[n]} in the checkpoint but {shape} in the model"
        for n, shape in expected.items()
        if n in found and found[n] != shape
    ]
    if missing:
        raise ValueError(f"The checkpoint `{source}` lacks {len(missing)} weights: {', '.join(sorted(missing))}")
    if wrong:
        raise ValueError(f"The checkpoint `{source}` has {len(wrong)} weights of another shape: {'; '.join(wrong)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        logger.warning(f"{len(unexpected)} weights have no place in the model, and are kept as they are: {unexpected}")
    return has_tower


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
    files = weight_files(folder)
    names = published_names(config)
    has_tower = _check(source, files, config, names)

    partial = target.with_name(target.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    job = {"to": to, "files": {file.name: file.stat().st_size for file in files}}
    if (partial / _PROGRESS_FILE).is_file():
        earlier = json.loads((partial / _PROGRESS_FILE).read_text(encoding="utf-8"))
        if earlier != job:
            raise ValueError(
                f"`{partial}` is left from another conversion, {earlier}, and this one is {job}. Remove it first."
            )
    _write_json(partial / _PROGRESS_FILE, job)

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
            # Slices of a safetensors file are mapped, not read, until they are written.
            contents = {
                rename(n): (t if isinstance(t, torch.Tensor) else t[...]).contiguous() for n, t in tensors.items()
            }
            save_file(contents, partial / f"{shard}.tmp", metadata={"format": "pt"})
            os.replace(partial / f"{shard}.tmp", partial / shard)
            del contents
        total_size += (partial / shard).stat().st_size
    if total > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        _write_json(partial / "model.safetensors.index.json", index)

    _write_settings(folder, partial, config, to, keep={file.name for file in files})
    (partial / _PROGRESS_FILE).unlink()
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
    tensors = {to_native_name(n, names): t for n, t in read_lazily(map(str, weight_files(partial))).items()}
    tower = AutoModel.from_config(config.vision_config)
    weights = {n.removeprefix(prefix): t[...] for n, t in tensors.items() if n.startswith(prefix)}
    tower.load_state_dict(weights)
    tower.to(next(iter(weights.values())).dtype).save_pretrained(partial / _TOWER_FOLDER)


__all__ = ["convert_checkpoint"]
