# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint that carries its code, for those who have Transformers and not this package."""

import json
import os
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from .convert import convert_checkpoint
from .files_longllava import settle, sync, temporary_folder, write_errors, write_json


# What the Auto classes find under their names.
AUTO_MAP = {
    "AutoConfig": "configuration_longllava.LongLLaVAConfig",
    "AutoModel": "modeling_longllava.LongLLaVAModel",
    "AutoModelForImageTextToText": "modeling_longllava.LongLLaVAForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_longllava.LongLLaVAForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_longllava.LongLLaVAForConditionalGeneration",
    "AutoProcessor": "processing_longllava.LongLLaVAProcessor",
    "AutoImageProcessor": "image_processing_longllava.LongLLaVAImageProcessor",
}


def code_files() -> list[Path]:
    """The files of this package that the classes of [`AUTO_MAP`] need."""
    folder = Path(__file__).parent
    entries = {folder / f"{reference.partition('.')[0]}.py" for reference in AUTO_MAP.values()}
    needed = {Path(file) for entry in entries for file in get_relative_import_files(entry)}
    return sorted(entries | needed)


def _add_auto_maps(folder: Path) -> None:
    """To the configuration and the processors, each of which is asked for what it is itself."""
    file = folder / "config.json"
    write_json(file, {**json.loads(file.read_text(encoding="utf-8")), "auto_map": AUTO_MAP})
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["auto_map"] = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    settings["image_processor"]["auto_map"] = {"AutoImageProcessor": AUTO_MAP["AutoImageProcessor"]}
    write_json(file, settings)


def export_checkpoint(source: str, destination: str) -> Path:
    """
    A folder to be put on the Hub: the checkpoint in the native layout, and the code that runs it, the same files that are
    installed. The Auto classes load it with `trust_remote_code=True`, and without it wherever this package is imported.

    Args:
        source (`str`): a folder or Hub id, in either layout.
        destination (`str`): a folder that does not exist yet, and appears when it is complete.

    Returns:
        `Path`: the new folder.

    Raises:
        ValueError, OSError: as [`convert_checkpoint`].
    """
    target = Path(destination)
    if os.path.lexists(target):
        raise FileExistsError(f"The destination `{target}` exists already.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target.parent, target.name) as work, write_errors(target):
        folder = convert_checkpoint(source, str(work / "checkpoint"))
        for file in code_files():
            shutil.copyfile(file, folder / file.name)
        _add_auto_maps(folder)
        settle(folder)
        os.replace(folder, target)
        sync(target.parent)
    return target


__all__ = ["AUTO_MAP", "code_files", "export_checkpoint"]
