# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
The paper's three stages (arXiv 2409.02889, section 3.3) on `Trainer`: a YAML file says where to start, what to train, and
on what; all of its other keys are those of [`TrainingArguments`].
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
from array import array
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.data import Dataset
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .. import TINY
from ..files_longllava import settle, write_json
from .collator import LongLLaVADataCollator
from .packing import PackedDataset, draw_lengths, token_lengths


@dataclass(frozen=True)
class Stage:
    """What a stage trains, and the authors' settings for it, which a recipe may change."""

    trainable: tuple[str, ...]
    learning_rate: float
    per_device_train_batch_size: int


STAGES = {
    "align": Stage(("projector",), 1e-4, 32),
    "single_image": Stage(("projector", "decoder"), 1e-5, 1),
    "multi_image": Stage(("projector", "decoder"), 1e-5, 1),
}

_FIELDS = {field.name: field.type for field in fields(TrainingArguments)}

# Renamed in Transformers 5.24.
_CHECKPOINTING = {"activation_checkpointing", "gradient_checkpointing"}

_DEFAULTS = {
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # of all steps
    "weight_decay": 0.0,
    "activation_checkpointing" if "activation_checkpointing" in _FIELDS else "gradient_checkpointing": True,
    "remove_unused_columns": False,  # pictures are made from `messages`
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
}
# What does not change the weights that come out, and so may be another when training is resumed.
_FREE = re.compile(
    r"(logging|save|eval|report|push|hub|disable|log_level|dataloader|output_dir|run_name|project|ddp|use_cpu|skip).*|resume.*"
)


@dataclass
class RecipeArguments:
    """
    The keys of a recipe that are this package's own.

    stage (`str`): `"align"`, `"single_image"` or `"multi_image"`: what is trained and the learning rate, unless they are
        given too.
    data (`list[dict]`): the sources of rows. Each has a `path`: a `.jsonl` as `longllava data convert` writes it, a folder
        of `Dataset.save_to_disk`, or what `datasets.load_dataset` takes, with its `split`; or a `builder`,
        `"FILE.py:FUNCTION"`, called with `arguments`, that returns a dataset. `rows` is how many of its rows are taken, at
        random. With a `ratio` for each, sources are drawn from by these probabilities until each has been read whole.
    model (`str`, *optional*): the checkpoint to start from, such as the `output_dir` of the stage before; by default the
        small one that ships with the package.
    trainable (`list[str]`, *optional*): of `"tower"`, `"projector"` and `"decoder"`.
    pack_to (`int`, *optional*): tokens of a row into which samples are packed. By default samples are padded.
    max_length (`int`, *optional*): tokens of a sample, by default `pack_to`.
    truncation (`bool`, defaults to `False`): whether a longer sample is cut, or an error.
    lazy (`bool`, defaults to `False`): whether pictures are decoded by the model, and not by the workers.
    """

    stage: str
    data: list[dict[str, Any]]
    model: str = TINY
    trainable: list[str] | None = None
    pack_to: int | None = None
    max_length: int | None = None
    truncation: bool = False
    lazy: bool = False

    def __post_init__(self):
        if self.stage not in STAGES:
            raise ValueError(f"`stage` must be one of {list(STAGES)}, but is {self.stage!r}.")
        self.trainable = list(STAGES[self.stage].trainable) if self.trainable is None else self.trainable
        if not self.trainable or set(self.trainable) - {"tower", "projector", "decoder"}:
            raise ValueError(
                f"`trainable` must be a list of 'tower', 'projector' and 'decoder', but is {self.trainable!r}."
            )
        if not isinstance(self.data, list) or not self.data or not all(isinstance(one, dict) for one in self.data):
            raise ValueError(f"`data` must be a list of sources, each with a `path`, but is {self.data!r}.")
        if self.max_length is None:
            self.max_length = self.pack_to


class JsonLines(Dataset):
    """The rows of a `.jsonl`, read when they are asked for."""

    def __init__(self, file: str):
        self.file, self.starts = file, array("Q")
        with open(file, "rb") as stream:
            start = 0
            for line in stream:
                if line.strip():
                    self.starts.append(start)
                start += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict:
        with open(self.file, "rb") as stream:
            stream.seek(self.starts[index])
            try:
                return json.loads(stream.readline())
            except ValueError as error:
                raise ValueError(f"`{self.file}`, sample {index}, is no JSON: {error}") from None


def open_source(path: str | None = None, builder: str | None = None, split: str = "train", **arguments) -> Any:
    """The rows of one source, by number; see [`RecipeArguments`]."""
    if (path is None) == (builder is None):
        raise ValueError("A source of `data` must have either a `path` or a `builder`.")
    if builder is not None:
        file, _, function = builder.rpartition(":")
        if not os.path.isfile(file):
            raise FileNotFoundError(f"There is no file `{file}`, of the builder `{builder}`.")
        specification: Any = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return getattr(module, function)(**arguments)
    if arguments:
        raise ValueError(f"A source with a `path` has no {sorted(arguments)}.")
    if str(path).endswith(".jsonl"):
        return JsonLines(str(path))
    try:
        import datasets
    except ImportError:
        raise ImportError(f"To read `{path}`, install `datasets`: pip install longllava_hf[train]") from None
    return datasets.load_from_disk(str(path)) if os.path.isdir(str(path)) else datasets.load_dataset(path, split=split)


class MixedDataset(Dataset):
    """
    Rows of several sources: one after the other or, with a `ratio` for each, as `datasets.interleave_datasets` draws them.

    Args:
        sources (`list[dict]`): see [`RecipeArguments`].
        seed (`int`): of what is drawn.
    """

    def __init__(self, sources: list[dict[str, Any]], seed: int = 0):
        indices = []
        ratios: list[Any] = [source.get("ratio") for source in sources]
        self.sources: list[Any] = []
        for number, source in enumerate(sources):
            names = {key: value for key, value in source.items() if key not in ("ratio", "rows", "arguments")}
            rows = open_source(**names, **(source.get("arguments") or {}))
            count, wanted = len(rows), source.get("rows")
            if not count or (wanted is not None and not 0 < wanted <= count):
                raise ValueError(f"`rows` of {names} must be from 1 to {count}, as it has so many, but is {wanted}.")
            chosen = torch.arange(count)
            if wanted is not None:
                chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:wanted].sort().values
            self.sources.append(rows)
            indices.append([(number, row) for row in chosen.tolist()])
        if len({ratio is None for ratio in ratios}) > 1:
            raise ValueError(f"Either all sources of `data` have a `ratio` or none, but they are {ratios}.")
        self.indices = [pair for pairs in indices for pair in pairs]
        if ratios[0] is not None:
            import datasets

            parts = [datasets.Dataset.from_dict({"pair": pairs}) for pairs in indices]
            chances = [ratio / sum(ratios) for ratio in ratios]
            mixed = datasets.interleave_datasets(parts, chances, seed=seed, stopping_strategy="all_exhausted")
            self.indices = [tuple(pair) for pair in mixed["pair"]]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        source, row = self.indices[index]
        return self.sources[source][row]


def _as_float(key: str, value: str, file: str | os.PathLike) -> float:
    """YAML takes `1e-5` for a string."""
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"`{file}`: `{key}` must be a number, but is {value!r}.") from None


def read_recipe(file: str | os.PathLike) -> tuple[RecipeArguments, TrainingArguments]:
    """
    A YAML file as arguments. What neither it nor [`TrainingArguments`] says is as in the authors' code.

    Raises:
        ValueError: for a file that is no mapping, and for keys or values that are wrong.
    """
    with open(file, encoding="utf-8") as stream:
        try:
            content = yaml.safe_load(stream)
        except yaml.YAMLError as error:
            raise ValueError(f"`{file}` is no YAML: {error}") from None
    if not isinstance(content, dict) or {"stage", "data", "output_dir"} - content.keys():
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"`{file}` must have the keys stage, data and output_dir, but has {found}.")
    stage = STAGES.get(content["stage"])
    defaults: dict[str, Any] = {**_DEFAULTS, "bf16": torch.cuda.is_available()}
    if stage is not None:
        defaults.update(learning_rate=stage.learning_rate)
        defaults.update(per_device_train_batch_size=stage.per_device_train_batch_size)
    if _CHECKPOINTING & content.keys():
        defaults = {key: value for key, value in defaults.items() if key not in _CHECKPOINTING}
    for key, value in content.items():
        if isinstance(value, str) and "float" in str(_FIELDS.get(key)):
            content[key] = _as_float(key, value, file)
    parser = HfArgumentParser((RecipeArguments, TrainingArguments))  # type: ignore[arg-type]
    try:
        recipe, arguments = parser.parse_dict({**defaults, **content})
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{file}`: {error}") from error
    if not arguments.remove_unused_columns and arguments.train_sampling_strategy == "group_by_length":
        raise ValueError(f"`{file}`: rows of like length are for padding; give `pack_to`, which does without it.")
    return recipe, arguments


def set_trainable(model: Any, parts: list[str]) -> None:
    """Freeze all weights but those of `"tower"`, `"projector"` and `"decoder"`, which its head belongs to, as far as named."""
    modules = {
        "tower": [model.model.vision_tower],
        "projector": [model.model.multi_modal_projector],
        "decoder": [model.model.language_model, model.lm_head],
    }
    for part, of_part in modules.items():
        for module in of_part:
            module.requires_grad_(part in parts)


class _OnDisk(TrainerCallback):
    """What is said to be saved is on disk."""

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if args.should_save and folder.is_dir():
            settle(folder)


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """
    The last checkpoint that was saved to its end, if any. One that was not, as its process was killed or the disk was
    full, is removed: `Trainer` would take it for the last.
    """
    numbered = []
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if found := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name):
            try:
                json.loads((path / "trainer_state.json").read_text())  # which Trainer writes last
                numbered.append((int(found[1]), str(path)))
            except (OSError, ValueError):
                shutil.rmtree(path)
    return max(numbered)[1] if numbered else None


def _check_same(file: Path, now: dict[str, Any]) -> None:
    """Raises `ValueError` if what is resumed was started with other settings."""
    before = json.loads(file.read_text())
    changed = [
        f"`{key}` was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ValueError(
            f"`{file.parent}` has checkpoints of another recipe: {'; '.join(changed)}. Give another `output_dir`, or remove it."
        )


def train(file: str | os.PathLike) -> Trainer:
    """
    Run a recipe, or go on with it where its last checkpoint was saved. The weights that come out are the same.

    Args:
        file (`str`): see [`RecipeArguments`] for its keys.

    Returns:
        `Trainer`: done; model and processor are in its `output_dir`.

    Raises:
        ValueError: for keys, values or rows that are wrong, and for an `output_dir` with checkpoints of another recipe.
        OSError: if the disk is full; the last checkpoint is whole.
    """
    recipe, arguments = read_recipe(file)
    processor = AutoProcessor.from_pretrained(recipe.model)
    collator = LongLLaVADataCollator(processor, recipe.max_length, truncation=recipe.truncation, lazy=recipe.lazy)
    dataset: Any = MixedDataset(recipe.data, arguments.seed)
    lengths = token_lengths(dataset, collator, arguments.dataloader_num_workers)
    report = f"{len(lengths):,} rows of {sum(lengths):,} tokens, the longest of {max(lengths):,}"
    if recipe.pack_to is not None:
        dataset = PackedDataset(dataset, lengths, recipe.pack_to)
        report += f", in {len(dataset):,} of {recipe.pack_to:,}, of which {100 * dataset.waste:.1f} % is empty"

    # Before any work is done, what would make a resumed run another one.
    state = {key: value for key, value in arguments.to_dict().items() if not _FREE.fullmatch(key)}
    state.update(asdict(recipe), tokens=hashlib.sha256(json.dumps(lengths).encode()).hexdigest())
    state = json.loads(json.dumps(state, default=str))
    output_dir = Path(str(arguments.output_dir))
    checkpoint = None
    if (output_dir / "recipe.json").is_file():
        _check_same(output_dir / "recipe.json", state)
        checkpoint = last_checkpoint(output_dir)
    elif any(output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        raise ValueError(
            f"`{output_dir}` has checkpoints, but no `recipe.json` that says what of. Give another `output_dir`."
        )
    if arguments.should_save:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / "recipe.json", state)
        try:
            draw_lengths(lengths, output_dir / "lengths.png", recipe.pack_to)
        except ImportError:
            report += " (a histogram needs matplotlib)"
        print(report, flush=True)

    # In float32, as small steps are lost on weights in 16 bits; DeepSpeed keeps float32 beside them itself.
    dtype = "auto" if is_deepspeed_zero3_enabled() else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(recipe.model, dtype=dtype)
    set_trainable(model, recipe.trainable or [])
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=processor,
        callbacks=[_OnDisk()],
    )
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except RuntimeError as error:
        if "inline_container" not in str(error):  # of PyTorch's files, which says no more when the disk is full
            raise
        free = shutil.disk_usage(output_dir).free
        raise OSError(
            f"A checkpoint could not be written to `{output_dir}`, where {free:,} bytes are free. The one before it is whole."
        ) from error
    trainer.save_model()
    trainer.save_state()
    return trainer


__all__ = [
    "STAGES",
    "JsonLines",
    "MixedDataset",
    "RecipeArguments",
    "last_checkpoint",
    "read_recipe",
    "set_trainable",
    "train",
]
