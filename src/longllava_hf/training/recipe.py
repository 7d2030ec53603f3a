# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
The paper's three stages (arXiv 2409.02889, section 3.3) on `Trainer`: a YAML file says where to start, what to train, and
on what; all of its other keys are those of [`TrainingArguments`].
"""

import contextlib
import hashlib
import importlib
import importlib.util
import json
import math
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
from .packing import PackedDataset, draw_lengths, measure_rows


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

# Rows that are packed together where their order is to be kept.
PACKED_IN_ORDER = 256

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
    "prediction_loss_only": True,
    "dataloader_pin_memory": torch.cuda.is_available(),
}
# What does not change the weights that come out, and so may be another when training is resumed.
_FREE = {
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers",
    "disable_tqdm", "eval_on_start", "eval_steps", "eval_strategy", "hub_token", "log_level", "log_level_replica",
    "logging_dir", "logging_first_step", "logging_nan_inf_filter", "logging_steps", "logging_strategy", "output_dir",
    "per_device_eval_batch_size", "push_to_hub", "push_to_hub_token", "report_to", "run_name", "save_steps", "save_strategy",
    "save_total_limit", "skip_memory_metrics",
}  # fmt: skip


@dataclass
class RecipeArguments:
    """
    The keys of a recipe that are this package's own.

    stage (`str`): `"align"`, `"single_image"` or `"multi_image"`: what is trained and the learning rate, unless they are
        given too.
    data (`list[dict]`): the sources of rows. Paths are relative to where the command is run. Each has a `path`: a `.jsonl` as `longllava data convert` writes it, a folder
        of `Dataset.save_to_disk`, or what `datasets.load_dataset` takes, with its `split`; or a `builder`,
        `"FILE.py:FUNCTION"` or `"MODULE:FUNCTION"`, called with `arguments`, that returns a dataset. `rows` is how many of its rows are taken, at
        random. With a `ratio` for each, sources are drawn from by these probabilities until each has been read whole.
    model (`str`, *optional*): the checkpoint to start from, such as the `output_dir` of the stage before; by default the
        small one that ships with the package.
    eval_data (`list[dict]`, *optional*): likewise, for the `eval_strategy` of [`TrainingArguments`]; it is not packed.
    trainable (`list[str]`, *optional*): of `"tower"`, `"projector"` and `"decoder"`.
    pack_to (`int`, *optional*): tokens of a row into which samples are packed. By default samples are padded. With the
        `train_sampling_strategy` "sequential" samples are packed with their neighbours, so that a curriculum remains one.
    max_length (`int`, *optional*): tokens of a sample, by default `pack_to`.
    truncation (`bool`, defaults to `False`): whether a longer sample is cut, or an error.
    lazy (`bool`, defaults to `False`): whether pictures are decoded by the model, and not by the workers.
    """

    stage: str
    data: list[dict[str, Any]]
    model: str = TINY
    eval_data: list[dict[str, Any]] | None = None
    trainable: list[str] | None = None
    pack_to: int | None = None
    max_length: int | None = None
    truncation: bool = False
    lazy: bool = False

    def __post_init__(self):
        if self.stage not in list(STAGES):
            raise ValueError(f"`stage` must be one of {list(STAGES)}, but is {self.stage!r}.")
        self.trainable = list(STAGES[self.stage].trainable) if self.trainable is None else self.trainable
        parts = ("tower", "projector", "decoder")
        if not isinstance(self.trainable, list) or not self.trainable or any(x not in parts for x in self.trainable):
            raise ValueError(f"`trainable` must be a list of {list(parts)}, but is {self.trainable!r}.")
        for name in ("data", "eval_data"):
            sources = getattr(self, name)
            is_list = isinstance(sources, list) and sources and all(isinstance(one, dict) for one in sources)
            if not is_list and (name == "data" or sources is not None):
                raise ValueError(f"`{name}` must be a list of sources, each with a `path`, but is {sources!r}.")
        for name in ("pack_to", "max_length"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"`{name}` must be a number of tokens, but is {value!r}.")
        for name in ("truncation", "lazy"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"`{name}` must be true or false, but is {getattr(self, name)!r}.")
        self.max_length = self.pack_to if self.max_length is None else self.max_length
        if self.pack_to is not None and self.max_length > self.pack_to:
            raise ValueError(f"`max_length` ({self.max_length}) must not exceed `pack_to` ({self.pack_to}).")


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


def open_source(source: dict[str, Any]) -> Any:
    """The rows of one source, by number; see [`RecipeArguments`]."""
    path, builder = source.get("path"), source.get("builder")
    allowed = {"path", "split"} if builder is None else {"builder", "arguments"}
    if (path is None) == (builder is None) or (unknown := sorted(source.keys() - allowed - {"ratio", "rows"})):
        found = sorted(source) if (path is None) == (builder is None) else unknown
        raise ValueError(
            "A source must have either a `path`, maybe with a `split`, or a `builder`, maybe with `arguments`; then `rows`"
            f" and `ratio`; but it has {found}."
        )
    if builder is not None:
        file, _, name = str(builder).rpartition(":")
        if file.endswith(".py"):
            if not os.path.isfile(file):
                raise FileNotFoundError(f"There is no file `{file}`, of the builder `{builder}`.")
            specification: Any = importlib.util.spec_from_file_location(Path(file).stem, file)
            module = importlib.util.module_from_spec(specification)
            specification.loader.exec_module(module)
        else:
            module = importlib.import_module(file)
        if not hasattr(module, name):
            raise ValueError(f"`{file}` has no function `{name}`.")
        return getattr(module, name)(**(source.get("arguments") or {}))
    path, split = str(path), source.get("split")
    if path.endswith(".jsonl"):
        if split is not None:
            raise ValueError(f"`{path}` has no splits, but `split` is {split!r}.")
        return JsonLines(path)
    try:
        import datasets
    except ImportError:
        raise ImportError(f"To read `{path}`, install `datasets`: pip install longllava_hf[train]") from None
    if not os.path.isdir(path):
        return datasets.load_dataset(path, split="train" if split is None else split)
    found = datasets.load_from_disk(path)
    if isinstance(found, datasets.DatasetDict) != (split is not None) or (split is not None and split not in found):
        splits = sorted(found) if isinstance(found, datasets.DatasetDict) else "none"
        raise ValueError(f"`{path}` has the splits {splits}, but `split` is {split!r}.")
    return found if split is None else found[split]


class MixedDataset(Dataset):
    """
    Rows of several sources: one after the other or, with a `ratio` for each, as `datasets.interleave_datasets` draws them.

    Args:
        sources (`list[dict]`): see [`RecipeArguments`].
        seed (`int`): of what is drawn.
    """

    def __init__(self, sources: list[dict[str, Any]], seed: int = 0):
        ratios: list[Any] = [source.get("ratio") for source in sources]
        if any(ratio is not None for ratio in ratios) and not all(_is_positive(ratio) for ratio in ratios):
            raise ValueError(f"Either all sources have a positive `ratio` or none, but they are {ratios}.")
        self.names = [str(source.get("path", source.get("builder"))) for source in sources]
        self.sources, indices = [], []
        for number, (source, name) in enumerate(zip(sources, self.names)):
            rows, wanted = open_source(source), source.get("rows")
            count = len(rows)
            if not count:
                raise ValueError(f"`{name}` has no rows.")
            if wanted is not None and not (type(wanted) is int and 0 < wanted <= count):
                raise ValueError(
                    f"`rows` of `{name}` must be from 1 to {count}, as it has so many, but is {wanted!r}."
                )
            chosen = torch.arange(count)
            if wanted is not None:
                chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:wanted].sort().values
            self.sources.append(rows)
            indices.append([(number, row) for row in chosen.tolist()])
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
        source, number = self.indices[index]
        row = self.sources[source][number]
        if isinstance(row, dict) and row.get("id") is None:
            return {"id": f"{self.names[source]}, row {number}", **{key: row[key] for key in row if key != "id"}}
        return row


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


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
    stage = STAGES[content["stage"]] if content["stage"] in list(STAGES) else None
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
    for is_wrong, message in (
        (arguments.train_sampling_strategy == "group_by_length", "in place of `group_by_length` give `pack_to`"),
        (
            arguments.remove_unused_columns,
            "`remove_unused_columns` must be false, as pictures are made from `messages`",
        ),
        (
            arguments.resume_from_checkpoint is not None,
            "a recipe is resumed by itself, without `resume_from_checkpoint`",
        ),
        (arguments.save_only_model, "with `save_only_model` it could not be resumed"),
        (arguments.eval_strategy != "no" and recipe.eval_data is None, "`eval_strategy` needs `eval_data`"),
    ):
        if is_wrong:
            raise ValueError(f"`{file}`: {message}.")
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
    The last checkpoint that was saved to its end, if any; one that was not, as its process was killed or the disk was full, is
    passed over. `transformers.trainer_utils.get_last_checkpoint` would take it.
    """
    numbered = []
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if found := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name):
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
                json.loads((path / "trainer_state.json").read_text())  # which Trainer writes last
                numbered.append((int(found[1]), str(path)))
    return max(numbered)[1] if numbered else None


def _check_same(file: Path, now: dict[str, Any]) -> None:
    """Raises `ValueError` if what is resumed was started with other settings."""
    before = json.loads(file.read_text())
    changed = [
        f"`{key}` was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() & now.keys())
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
    eval_dataset = None if recipe.eval_data is None else MixedDataset(recipe.eval_data, arguments.seed)
    lengths, checksums = measure_rows(dataset, collator, arguments.dataloader_num_workers)
    report = f"{len(lengths):,} rows of {sum(lengths):,} tokens, the longest of {max(lengths):,}"
    if recipe.pack_to is not None:
        window = PACKED_IN_ORDER if arguments.train_sampling_strategy == "sequential" else None
        dataset = PackedDataset(dataset, lengths, recipe.pack_to, window)
        report += f", in {len(dataset):,} of {recipe.pack_to:,}, of which {100 * dataset.waste:.1f} % is empty"

    # Before any work is done, what would make a resumed run another one.
    state = {key: value for key, value in arguments.to_dict().items() if key not in _FREE}
    state.update(asdict(recipe), processes=arguments.world_size)
    state["rows"] = hashlib.sha256(json.dumps([lengths, checksums]).encode()).hexdigest()
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
        eval_dataset=eval_dataset,
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
