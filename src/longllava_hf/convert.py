# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""Rewriting a checkpoint from one layout to the other, a shard at a time."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from transformers import AutoModel
from transformers.utils import CHAT_TEMPLATE_DIR, logging

from .checkpoint_longllava import (
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
from .files_longllava import atomic_write, finish_save, hash_file, locked, settle, sync, write_errors, write_json
from .modeling_longllava import LongLLaVAForConditionalGeneration
from .processing_longllava import LongLLaVAProcessor


logger = logging.get_logger(__name__)

_PROGRESS_FILE = "conversion.json"
_TOWER_FOLDER = "vision_tower"
# Weights, whether they are those that are converted or an earlier state's.
_WEIGHTS_FILE = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)|.+\.index\.json")


def check_source(source: str, files: list[str], config: LongLLaVAConfig, names: list[tuple[str, str]]) -> bool:
    """Whether the vision tower is there; everything else must be. Reads no more than the files' headers."""
    if not files:
        raise OSError(f"`{source}` has no weights: no model.safetensors or pytorch_model.bin, nor an index of either.")
    found = {to_native_name(name, names): tensor for name, tensor in read_headers(files, source).items()}
    with torch.device("meta"):
        model = LongLLaVAForConditionalGeneration(config)
    if unexpected := sorted(check_weights(model, found, source)):
        logger.warning(f"{len(unexpected)} weights have no place in the model, and are kept as they are: {unexpected}")
    return has_vision_tower(found)


def _check_folders(folder: Path, target: Path, partial: Path) -> None:
    """Source and destination lie beside each other, and no link leads elsewhere, but those of a Hub cache to its files."""
    root = Path(os.path.realpath(folder))
    for path in (Path(os.path.realpath(path)) for path in (target, partial)):
        if path.is_relative_to(root) or root.is_relative_to(path):
            raise OSError(f"The destination `{target}` and the source `{folder}` must not be inside each other.")
    allowed = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        allowed.append(Path(os.path.realpath(root.parent.parent / "blobs")))
    for file in sorted([*folder.iterdir(), *(folder / CHAT_TEMPLATE_DIR).glob("*")]):
        found = Path(os.path.realpath(file))
        if (
            not file.name.startswith(".")
            and not file.is_dir()
            and not any(found.is_relative_to(place) for place in allowed)
        ):
            raise OSError(f"`{file}` leads to `{found}`, outside of the source `{folder}`. Put the file itself there.")


@contextlib.contextmanager
def _work_folder(partial: Path, target: Path) -> Iterator[None]:
    """Make a folder, for one process at a time, that stays if there is something in it."""
    partial.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(partial))
        except BlockingIOError as error:
            raise OSError(f"Another conversion to `{target}` is at work, in `{partial}`.") from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                partial.rmdir()


def _hash_files(files: Iterable[Path]) -> dict[Path, str]:
    files = list(files)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(files, logging.tqdm(pool.map(hash_file, files), desc="Hashing", total=len(files))))


def _describe_source(folder: Path, files: list[Path], config: LongLLaVAConfig, has_tower: bool) -> dict[str, str]:
    """SHA-256 of all that weights come from and are renamed by, by name."""
    tower = [] if has_tower else checkpoint_files(locate_vision_tower(config.vision_tower, folder))
    names = {folder / "config.json": "config.json", **{file: file.name for file in files}}
    names.update({Path(file): f"{_TOWER_FOLDER}/{os.path.basename(file)}" for file in tower})
    return {names[file]: found for file, found in _hash_files(names).items()}


def _is_whole(file: Path, expected: dict[str, Any] | None) -> bool:
    """Whether a shard is what it was when it was written."""
    if expected is None or not file.is_file() or file.stat().st_size != expected["size"]:
        return False
    return hash_file(file) == expected["sha256"]


def _is_published(target: Path, job: dict[str, Any]) -> bool:
    """Whether a conversion was killed when it had nothing left to do but remove its progress file."""
    try:
        return _read_progress(target / _PROGRESS_FILE)[0] == job
    except OSError:
        return False


def _resume(partial: Path, job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """
    Size and hash of each shard that an earlier run of the same conversion has finished. Whatever else it left is removed,
    as files beside the weights may have changed meanwhile.

    Raises:
        ValueError: if what is in the folder is of another conversion, or of none.
        OSError: if its progress file is damaged.
    """
    progress = partial / _PROGRESS_FILE
    if not progress.is_file():
        if foreign := sorted(
            file.name for file in partial.iterdir() if not file.name.startswith(f".{_PROGRESS_FILE}.")
        ):
            raise ValueError(
                f"`{partial}` is of no conversion: it has no {_PROGRESS_FILE}, but {foreign}. Remove it first."
            )
        return {}
    earlier, finished = _read_progress(progress)
    if differing := sorted(name for name in earlier.keys() | job.keys() if earlier.get(name) != job.get(name)):
        raise ValueError(
            f"`{partial}` is left from another conversion: its {', '.join(differing)} was"
            f" {[earlier.get(name) for name in differing]}, not {[job.get(name) for name in differing]}. Remove it first."
        )
    for file in partial.iterdir():
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        elif file.name not in finished and file != progress:
            file.unlink()
    return finished


def _read_progress(progress: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What was to be converted, and its finished shards."""
    try:
        content = json.loads(progress.read_text(encoding="utf-8"))
        return content["job"], content["finished"]
    except (ValueError, LookupError, TypeError) as error:
        message = f"`{progress}` is damaged, or of another version: {error!r}. Remove `{progress.parent}` first."
        raise OSError(message) from error


def local_folder(source: str) -> Path:
    """A checkpoint's folder, any save of it that was interrupted finished first; of a Hub id, what is fetched."""
    if not os.path.isdir(source):
        return Path(snapshot_download(source))
    finish_save(source)
    return Path(source)


def shard_name(number: int, total: int) -> str:
    """Of the `number`-th of `total` files of weights, from 1 on."""
    return "model.safetensors" if total == 1 else f"model-{number:05}-of-{total:05}.safetensors"


def write_index(folder: Path, weight_map: dict[str, str], total_size: int) -> None:
    """Which file of a folder holds each weight, where there are several."""
    if set(weight_map.values()) != {shard_name(1, 1)}:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def convert_checkpoint(source: str, destination: str, to: Literal["native", "published"] = "native") -> Path:
    """
    Rewrite a checkpoint in another layout. Only names change, never a value.

    Peak memory is one shard. Work is done in `destination + ".partial"`, which is renamed at the end. If it is there
    already from a run that was interrupted, finished shards are kept, as far as SHA-256 tells that neither they nor what
    they were made from have changed.

    Args:
        source (`str`): a folder or Hub id, in either layout, safetensors or `.bin`.
        destination (`str`): a folder that does not exist yet.
        to (`"native"` or `"published"`, defaults to `"native"`): the layout to write.

    Returns:
        `Path`: the new folder.

    Raises:
        ValueError: if a weight is missing or has another shape, or the partial folder is of another conversion.
        OSError: if the destination exists, or is in the source; if another process is at the same conversion; if the source
            has no weights, damaged ones, or links that lead out of it; or if a shard was damaged after it was written.
    """
    if to not in ("native", "published"):
        raise ValueError(f"`to` must be 'native' or 'published', but it is {to!r}.")
    target = Path(destination)
    if os.path.lexists(target) and not (target / _PROGRESS_FILE).is_file():
        raise FileExistsError(f"The destination `{target}` exists already.")
    partial = target.with_name(target.name + ".partial")
    folder = local_folder(source)
    _check_folders(folder, target, partial)
    config = LongLLaVAConfig.from_pretrained(folder)
    paths = checkpoint_files(folder)
    has_tower = check_source(source, paths, config, published_names(config))
    files = [Path(path) for path in paths]
    with _work_folder(partial, target):
        job = {"to": to, **_describe_source(folder, files, config, has_tower)}
        if os.path.lexists(target):
            if not _is_published(target, job):
                raise FileExistsError(f"The destination `{target}` exists already.")
        else:
            finished = _convert_shards(files, partial, folder, config, job, has_tower)
            write_settings(folder, partial, config, to, keep={file.name for file in files})
            settle(partial)
            hashes = _hash_files(partial / shard for shard in finished)
            if damaged := [f"`{file}`" for file, found in hashes.items() if found != finished[file.name]["sha256"]]:
                raise OSError(f"Shards are not what was written: {', '.join(damaged)}. Convert again to replace them.")
            os.replace(partial, target)
            sync(target.parent)
        (target / _PROGRESS_FILE).unlink(missing_ok=True)
        sync(target)
    return target


def _convert_shards(
    files: list[Path], partial: Path, folder: Path, config: LongLLaVAConfig, job: dict[str, Any], has_tower: bool
) -> dict[str, dict[str, Any]]:
    """Weights and their index. Returns the size and hash of each shard."""
    names = published_names(config)

    def rename(name: str) -> str:
        native = to_native_name(name, names)
        return to_published_name(native, config) if job["to"] == "published" else native

    finished, progress = _resume(partial, job), partial / _PROGRESS_FILE
    write_json(progress, {"job": job, "finished": finished})
    total = len(files) + (not has_tower)
    weight_map, total_size = {}, 0
    shards: list[Path | None] = [*files] if has_tower else [*files, None]
    for number, file in enumerate(logging.tqdm(shards, desc="Converting", unit=" shards"), 1):
        shard = shard_name(number, total)
        tensors = load_vision_tower(config, folder) if file is None else read_lazily([str(file)])
        weight_map.update({rename(name): shard for name in tensors})
        if not _is_whole(partial / shard, finished.get(shard)):
            contents = {rename(name): tensor[...].contiguous() for name, tensor in tensors.items()}
            with atomic_write(partial / shard) as temporary:
                save_file(contents, temporary, metadata={"format": "pt"})
            del contents
            finished[shard] = {"size": (partial / shard).stat().st_size, "sha256": hash_file(partial / shard)}
            write_json(progress, {"job": job, "finished": finished})
        total_size += finished[shard]["size"]
    write_index(partial, weight_map, total_size)
    return finished


def write_settings(folder: Path, partial: Path, config: LongLLaVAConfig, to: str, keep: set[str]) -> None:
    """Everything beside the weights: the configuration, the processor, and files that need no change."""
    written = {"config.json", _PROGRESS_FILE, *keep}
    for file in folder.iterdir():
        is_written = file.name in written or _WEIGHTS_FILE.fullmatch(file.name)
        if file.is_file() and not is_written and not file.name.startswith("."):
            shutil.copyfile(file, partial / file.name)
    if to == "published":
        tower = config.vision_tower or ""
        if not tower or tower != locate_vision_tower(tower, None) or os.path.isdir(tower):
            # Only a Hub id means the same everywhere: put the tower beside the weights.
            tower = f"./{_TOWER_FOLDER}"
            _write_tower(partial, config)
        write_json(partial / "config.json", native_to_published(config, tower))
        for name in ("processor_config.json", "preprocessor_config.json"):
            (partial / name).unlink(missing_ok=True)
        return
    config.architectures = [LongLLaVAForConditionalGeneration.__name__]
    with write_errors(partial):
        config.save_pretrained(partial)
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        processor = LongLLaVAProcessor.from_pretrained(folder)
        with write_errors(partial):
            processor.save_pretrained(partial)


def _write_tower(partial: Path, config: LongLLaVAConfig) -> None:
    names = published_names(config)
    prefix = "model.vision_tower."
    tensors = {to_native_name(n, names): t for n, t in read_lazily(checkpoint_files(partial)).items()}
    tower = AutoModel.from_config(config.vision_config)
    weights = {n.removeprefix(prefix): t[...] for n, t in tensors.items() if n.startswith(prefix)}
    tower.load_state_dict(weights)
    with write_errors(partial / _TOWER_FOLDER):
        tower.to(next(iter(weights.values())).dtype).save_pretrained(partial / _TOWER_FOLDER)


__all__ = ["check_source", "convert_checkpoint", "local_folder", "shard_name", "write_index", "write_settings"]
