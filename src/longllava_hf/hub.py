# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""The Hub: a checkpoint that carries its code and a card, for those who have Transformers and not this package."""

import json
import os
import re
import shutil
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, EvalResult, HfApi, ModelCard, ModelCardData
from packaging.requirements import Requirement
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from . import __version__
from .configuration_longllava import LongLLaVAConfig, has_own_decoder
from .convert import convert_checkpoint
from .files_longllava import settle, sync, temporary_folder, write_errors, write_json
from .int8_longllava import BITS, bits_of, stored_quantization
from .modeling_longllava import LongLLaVAForConditionalGeneration
from .plan import MemoryPlan, MemoryPlanner
from .verify import verify


logger = logging.get_logger(__name__)

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

_CARDS = Path(__file__).parent / "hub_card"
# The line of a card's quick start that a push replaces, as only then there are a repository and a commit.
_QUICK_START = 'checkpoint, revision = "path/to/this/folder", None'
_ANY_QUICK_START = re.compile(r"^checkpoint, revision = .+$", re.MULTILINE)
# What another push, of other weights or another version, may have left in a repository.
_REPLACED = ["*.safetensors", "*.bin", "*.index.json", "*.py"]
# What lies beside weights that were trained and is not for others: code of other versions, states of optimizers, pickles.
_LEFT_OUT = ("*.py", "*.pt", "*.pth", "*.pkl", "*.bin", "trainer_state.json")
# What a card says beside what is computed, and where nothing is said. Values are of these types.
_CARD_DEFAULTS: dict[str, Any] = {
    "name": "",
    "description": "",
    "question": "What is in this picture?",
    "license": "",
    "license_name": "",
    "license_link": "",
    "language": "",
    "base_model": "",
    "tags": ["longllava"],
    "datasets": [],
    "metric": "accuracy",
    "results": {},
    "results_note": "",
    "results_source": {},
    "limits": [],
}
# What memory is planned for.
_CARD_IMAGES = 1000
_CARD_MEMORY = int(80e9)
# Of what this package requires, what the code of an exported checkpoint does.
_NEEDED = ("torch", "transformers", "pillow", "safetensors", "huggingface_hub")


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


def cards() -> list[str]:
    """Checkpoints whose cards come with this package."""
    return sorted(file.stem for file in _CARDS.glob("*.json"))


def _read_object(file: Path) -> dict[str, Any]:
    """Raises `ValueError` for a file that is no JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`{file}` is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"`{file}` must be a JSON object, but is a {type(content).__name__}.")
    return content


def _check_results(results: dict[str, Any], file: Path) -> dict[str, Any]:
    """Raises `ValueError` for results that are no numbers."""
    for name, value in results.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"The result {name!r} in `{file}` must be a number, but is {value!r}.")
    return results


def _read_card(card: str | None, folder: str | os.PathLike | None = None) -> dict[str, Any]:
    """What a card says, and the results of a folder's `results.json` unless it has its own."""
    facts: dict[str, Any] = {}
    if card is not None:
        file = _CARDS / f"{card}.json" if card in cards() else Path(card)
        if not file.is_file():
            raise FileNotFoundError(
                f"There is no card `{card}`: expected one of {', '.join(cards())}, or a JSON file."
            )
        facts = _read_object(file)
        for key, value in facts.items():
            if key not in _CARD_DEFAULTS:
                raise ValueError(f"`{file}` has the key {key!r}: expected those of {list(_CARD_DEFAULTS)}.")
            kind, parts = type(_CARD_DEFAULTS[key]), value if isinstance(value, list) else []
            if not isinstance(value, kind) or not all(isinstance(part, str) for part in parts):
                raise ValueError(f"{key!r} in `{file}` must be like {_CARD_DEFAULTS[key]!r}, but is {value!r}.")
        _check_results(facts.get("results", {}), file)
    if folder is not None and "results" not in facts and (file := Path(folder) / "results.json").is_file():
        facts["results"] = _check_results(_read_object(file), file)
    return {**_CARD_DEFAULTS, **facts}


def _plan_memory(config: LongLLaVAConfig, dtype: torch.dtype) -> dict[str, MemoryPlan]:
    """By how the weights are quantised: all ways, or that of a checkpoint that is quantised already."""
    stored = bits_of(stored_quantization(config))
    planners = {
        quantization: MemoryPlanner(config, quantization, dtype=dtype, memory=_CARD_MEMORY)
        for quantization in (BITS if stored == "none" else [stored])
    }
    return {quantization: planner.plan(_CARD_IMAGES) for quantization, planner in planners.items()}


def render_card(folder: str | os.PathLike, card: str | None = None) -> ModelCard:
    """
    The model card of a checkpoint: front matter, a quick start, memory from [`MemoryPlanner`], parity, results, limits.

    Args:
        folder (`str` or `os.PathLike`): the checkpoint. Results, if the card has none, are those of its `results.json`, which
            are a number for each name.
        card (`str`, *optional*): what cannot be computed: one of [`cards`], or a JSON file like those in `hub_card`.

    Raises:
        ValueError: for a card or `results.json` that is no JSON object, or has keys or values that make no sense.
        OSError: without such a card.
    """
    facts, folder = _read_card(card, folder), Path(folder)
    config = LongLLaVAConfig.from_pretrained(folder)
    name, results = facts["name"] or folder.name, facts["results"]
    task, source = "image-text-to-text", facts["results_source"]
    evaluations = [
        EvalResult(
            task_type=task,
            dataset_type="".join(c if c.isalnum() else "-" for c in dataset.lower()).strip("-"),
            dataset_name=dataset,
            metric_type=facts["metric"],
            metric_value=value,
            source_name=source.get("name"),
            source_url=source.get("url"),
        )
        for dataset, value in results.items()
    ]
    front_matter = ("license", "license_name", "license_link", "language", "base_model", "datasets", "tags")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        metrics=[facts["metric"]] if results else None,
        model_name=name,
        eval_results=evaluations or None,
        **{key: facts[key] for key in front_matter if facts[key]},
    )
    text_config, is_own = config.get_text_config(), has_own_decoder(config)
    with torch.device("meta"):
        parameters = LongLLaVAForConditionalGeneration(config).num_parameters()
    dtype = torch.float32 if config.dtype in (torch.float32, "float32") else torch.bfloat16
    return ModelCard.from_template(
        data,
        template_path=str(_CARDS / "model_card.md"),
        name=name,
        config=config,
        text_config=text_config,
        own_decoder=is_own,
        attention_layers=text_config.layer_types.count("full_attention") if is_own else 0,
        mamba_layers=text_config.layer_types.count("linear_attention") if is_own else 0,
        parameters=parameters,
        quick_start=_QUICK_START,
        version=__version__,
        requirements=[str(r) for r in map(Requirement, requires("longllava_hf") or []) if r.name in _NEEDED],
        dtype=str(dtype).removeprefix("torch."),
        memory=_CARD_MEMORY,
        plans=_plan_memory(config, dtype),
        evaluations=results,
        **{k: facts[k] for k in ("description", "question", "metric", "results_note", "limits")},
    )


def export_checkpoint(source: str, destination: str, card: str | None = None) -> Path:
    """
    A folder to be put on the Hub: the checkpoint in the native layout, the code that runs it, which are the files that are
    installed, and a model card. The Auto classes load it with `trust_remote_code=True`, and without it wherever this package
    is imported.

    Args:
        source (`str`): a folder or Hub id, in either layout.
        destination (`str`): a folder that does not exist yet, and appears when it is complete.
        card (`str`, *optional*): for [`render_card`]. Without it, a `README.md` of the source stays as it is.

    Returns:
        `Path`: the new folder.

    Raises:
        ValueError, OSError: as [`convert_checkpoint`] and [`render_card`].
    """
    target = Path(destination)
    if os.path.lexists(target):
        raise FileExistsError(f"The destination `{target}` exists already.")
    _read_card(card, source)  # what is wrong with it is known before anything is converted
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target.parent, target.name) as work, write_errors(target):
        folder = convert_checkpoint(source, str(work / target.name))
        for file in [file for pattern in _LEFT_OUT for file in folder.glob(pattern)]:
            file.unlink()
        for file in code_files():
            shutil.copyfile(file, folder / file.name)
        _add_auto_maps(folder)
        if card is not None or not (folder / "README.md").is_file():
            (folder / "README.md").write_text(f"{render_card(folder, card)}\n", encoding="utf-8")
        settle(folder)
        os.replace(folder, target)
        sync(target.parent)
    return target


def push_checkpoint(folder: str, repo_id: str, private: bool | None = None) -> CommitInfo:
    """
    Put an exported folder on the Hub, where `huggingface_hub` is logged in. The card comes last, as its quick start names the
    commit of all the rest.

    Args:
        folder (`str`): of [`export_checkpoint`].
        repo_id (`str`): the repository; it is made if there is none.
        private (`bool`, *optional*): whether a new one is; the default is that of the account or organisation. One that is
            there already must be private then.

    Returns:
        `CommitInfo`: of weights and code; `oid` is the revision to pin.

    Raises:
        ValueError: if the folder carries no code, [`verify`] finds something wrong with it, or a public repository would have
            to be private.
        HfHubHTTPError: for what the Hub refuses.
    """
    config, readme = Path(folder) / "config.json", Path(folder) / "README.md"
    missing = [file.name for file in code_files() if not (Path(folder) / file.name).is_file()]
    if not config.is_file() or "auto_map" not in _read_object(config) or missing:
        lacks = f"such as `{missing[0]}`" if missing else "as its `config.json` has no `auto_map`"
        raise ValueError(f"`{folder}` carries no code, {lacks}: expected a folder that `longllava hub export` wrote.")
    if problems := verify(folder)["problems"]:
        raise ValueError(f"`{folder}` is not pushed: {'; '.join(problems)}")
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.repo_info(repo_id).private:
        raise ValueError(f"`{repo_id}` exists and is public: make it private first, or push without `private`.")
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        ignore_patterns="README.md",
        delete_patterns=_REPLACED,
        commit_message="Weights and code",
    )
    if readme.is_file():
        quick_start = f'checkpoint, revision = "{repo_id}", "{commit.oid}"'
        text, found = _ANY_QUICK_START.subn(quick_start, readme.read_text(encoding="utf-8"))
        if not found:
            logger.warning(
                f"`{readme}` has no quick start as `longllava hub export` writes it, and so names no commit."
            )
        api.upload_file(
            repo_id=repo_id, path_or_fileobj=text.encode(), path_in_repo="README.md", commit_message="Model card"
        )
    return commit


__all__ = ["AUTO_MAP", "cards", "code_files", "export_checkpoint", "push_checkpoint", "render_card"]
