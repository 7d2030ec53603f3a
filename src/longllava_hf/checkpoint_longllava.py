# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
From the names in a checkpoint to the names in the model, as one declarative table.

On disk there are three namings: the authors' (`model.layers.0.moe.experts.3.up_proj`), the same with Transformers'
Jamba names below the layer (`model.layers.0.feed_forward.experts.3.up_proj`), and the native one, which has Jamba's
names under `model.language_model.`. All three hold one tensor an expert; only in memory are experts stacked.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from glob import glob
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, WeightTransform
from transformers.modeling_utils import load_state_dict
from transformers.utils import logging

from .bitsandbytes_longllava import quantized_shape, row_quantizer, use_own_products
from .configuration_longllava import LongLLaVATextConfig, locate_vision_tower
from .int8_longllava import bits_of, check_device_memory


logger = logging.get_logger(__name__)

_VISION_TOWER = "vision_tower."
# What is beside a quantised weight, and never beside another.
_QUANTIZED_NAME = re.compile(r"\.(SCB|weight_scale|weight\.absmax)$")


class StackExperts(ConversionOps):
    """
    One tensor for each expert and part to one tensor with all rows: those of expert 0's first part, its second part,
    expert 1's first part, and so on. Each is read, quantised where that goes by rows, and put in its place before the
    next one is read, so that at most one of them is in memory besides the result.
    """

    # Set by `ExpertConverter`, for each tensor.
    quantization_operation: ConversionOps | None = None

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, full_layer_name="", config=None, **kwargs):
        num_experts = config.get_text_config().num_experts
        found = [len(input_dict.get(pattern, ())) for pattern in source_patterns]
        if found != [num_experts] * len(source_patterns):
            raise ValueError(f"expected {num_experts} of each of {source_patterns}, found {found}")
        pending = [part for expert in zip(*(input_dict[pattern] for pattern in source_patterns)) for part in expert]
        by_rows = row_quantizer(self.quantization_operation)
        stacked: list[torch.Tensor] = []
        for i, part in enumerate(pending):
            rows = part.result() if isinstance(part, Future) else part()
            pending[i] = None
            pieces = by_rows[0](rows) if by_rows else (rows,)
            if i == 0:
                stacked = [piece.new_empty(len(pending) * len(piece), *piece.shape[1:]) for piece in pieces]
            for whole, piece in zip(stacked, pieces):
                whole.narrow(0, i * len(piece), len(piece)).copy_(piece)
        if by_rows:
            return by_rows[1](full_layer_name, *stacked)
        converted = {full_layer_name: stacked[0]}
        if self.quantization_operation is not None:
            return self.quantization_operation.convert(converted, full_layer_name=full_layer_name, **kwargs)
        return converted

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitExperts()


class SplitExperts(ConversionOps):
    """The inverse of [`StackExperts`]; experts that are quantised stay as they are."""

    def convert(self, input_dict, source_patterns, target_patterns, config=None, full_layer_name="", **kwargs):
        (tensors,) = input_dict.values()
        stacked = tensors[0] if isinstance(tensors, list) else tensors
        before = full_layer_name.split(".experts.")[0]
        name = f"{before}.experts.{source_patterns[0].rpartition('.experts.')[2].partition('(')[0]}"
        # Packed bits are one column, of whatever dtype.
        if not stacked.is_floating_point() or stacked.shape[-1] == 1:
            return {name: stacked}
        names = expert_names(name, config.get_text_config().num_experts)
        return dict(zip(names, stacked.chunk(len(names))))

    @property
    def reverse_op(self) -> ConversionOps:
        return StackExperts()


class ExpertConverter(WeightConverter):
    """Hands the operation tensors that are not read yet, and leaves quantising to it."""

    __slots__ = ()

    def materialize_tensors(self):
        operation: Any = self.operations[0]
        if isinstance(operation, SplitExperts):
            return super().materialize_tensors()
        collected = {pattern: self.collected_tensors.pop(pattern) for pattern in list(self.collected_tensors)}
        operation.quantization_operation, self.quantization_operation = self.quantization_operation, None
        return collected


def register_expert_conversion() -> None:
    """Tell Transformers that experts are stored one by one and used stacked. Saving undoes it."""
    register_checkpoint_conversion_mapping(
        LongLLaVATextConfig.model_type,
        [
            ExpertConverter(
                source_patterns=[
                    "feed_forward.experts.*.gate_proj.weight",
                    "feed_forward.experts.*.up_proj.weight",
                ],
                target_patterns=r"feed_forward.experts.gate_up_proj.weight(?![\w.])",
                operations=[StackExperts()],
            ),
            ExpertConverter(
                source_patterns="feed_forward.experts.*.down_proj.weight",
                target_patterns=r"feed_forward.experts.down_proj.weight(?![\w.])",
                operations=[StackExperts()],
            ),
        ],
        overwrite=True,
    )


def published_names(config: PreTrainedConfig) -> list[tuple[str, str]]:
    """
    The table from the authors' names to native ones: `(regular expression, replacement)`, to be applied in order. No
    native name matches any of them.

    Args:
        config ([`LongLLaVAConfig`] or [`LongLLaVATextConfig`]): which layers are dense decides what
            `moe.experts.0` means in them.
    """
    names = [
        (r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
        (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
        (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
        (r"^model\.mm_projector\.(weight|bias)$", r"model.multi_modal_projector.linear_1.\1"),
        (r"\.mamba\.B_layernorm\.", ".mamba.b_layernorm."),
        (r"\.mamba\.C_layernorm\.", ".mamba.c_layernorm."),
        (r"\.pre_moe_layernorm\.", ".pre_ff_layernorm."),
    ]
    text_config = config.get_text_config()
    if isinstance(text_config, LongLLaVATextConfig):
        dense = "|".join(str(i) for i, experts in enumerate(text_config.layers_num_experts) if experts == 1)
        names.append((rf"\.layers\.({dense})\.moe\.experts\.0\.", r".layers.\1.feed_forward."))
        names.append((r"\.moe\.(experts|router)\.", r".feed_forward.\1."))
    if text_config is not config:
        names.insert(0, (r"^model\.(embed_tokens|layers|final_layernorm|norm)\.", r"model.language_model.\1."))
    return names


def to_native_name(name: str, names: list[tuple[str, str]]) -> str:
    """Apply the table of [`published_names`] to one name."""
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name, count=1)
    return name


def to_published_name(name: str, config: PreTrainedConfig) -> str:
    """The authors' name of a native one: the inverse of [`to_native_name`]."""
    dense = {i for i, experts in enumerate(config.get_text_config().layers_num_experts) if experts == 1}
    layer = re.search(r"\.layers\.(\d+)\.", name)
    if name.startswith("model.language_model."):
        name = name.replace("model.language_model.", "model.", 1)
        name = name.replace(".b_layernorm.", ".B_layernorm.").replace(".c_layernorm.", ".C_layernorm.")
        name = name.replace(".pre_ff_layernorm.", ".pre_moe_layernorm.")
        experts = ".moe.experts.0." if layer and int(layer.group(1)) in dense else ".moe."
        return name.replace(".feed_forward.", experts)
    if name.startswith("model.vision_tower."):
        return name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.", 1)
    if config.projector_type == "linear":
        return name.replace("model.multi_modal_projector.linear_1.", "model.mm_projector.")
    name = name.replace("model.multi_modal_projector.linear_1.", "model.mm_projector.0.")
    return name.replace("model.multi_modal_projector.linear_2.", "model.mm_projector.2.")


def damaged_files(folder: str | os.PathLike) -> str:
    """What is wrong with the weight files of a local folder: a line naming each that cannot be read, or nothing."""
    problems = []
    for file in sorted(glob(os.path.join(str(folder), "*.safetensors")) + glob(os.path.join(str(folder), "*.bin"))):
        try:
            read_lazily([file])
        except Exception as error:
            problems.append(f"`{file}` ({error})")
    return ", ".join(problems)


def read_lazily(checkpoint_files: Iterable[str]) -> dict:
    """All tensors of a checkpoint by name; those of safetensors files are read when they are used."""
    tensors: dict = {}
    for file in checkpoint_files:
        if file.endswith(".safetensors"):
            pointer = safe_open(file, framework="pt")
            tensors.update({name: pointer.get_slice(name) for name in pointer.keys()})
        else:
            tensors.update(load_state_dict(file, weights_only=True))
    return tensors


class _OwnedSlice:
    """
    A tensor of a safetensors file that is read into memory of its own, and of which nothing stays mapped afterwards:
    the pages of a mapped file would count as the process's memory for as long as the file is open.
    """

    def __init__(self, file: str, name: str):
        self.file, self.name = file, name

    def __getitem__(self, index) -> torch.Tensor:
        with safe_open(self.file, framework="pt") as pointer:
            return pointer.get_slice(self.name)[index].clone()


def read_one_by_one(checkpoint_files: Iterable[str]) -> dict[str, _OwnedSlice]:
    """As [`read_lazily`], for safetensors files of which only one tensor is to be in memory at a time."""
    tensors = {}
    for file in checkpoint_files:
        with safe_open(file, framework="pt") as pointer:
            tensors.update({name: _OwnedSlice(file, name) for name in pointer.keys()})
    return tensors


def load_vision_tower(config: PreTrainedConfig, folder: str | os.PathLike | None) -> dict[str, torch.Tensor]:
    """
    The tower's weights, under native names, for a checkpoint that has none of its own.

    Args:
        config ([`LongLLaVAConfig`]): its `vision_tower` says where they are.
        folder (`str`, *optional*): the checkpoint's own, which that may be relative to.

    Raises:
        ValueError: if that tower lacks a weight, or one has another shape.
        OSError: if there is no such tower.
    """
    source = locate_vision_tower(config.vision_tower, folder)
    logger.warning(f"The checkpoint `{folder}` has no vision tower of its own; taking it from `{source}`.")
    tower, info = AutoModel.from_pretrained(source, config=config.vision_config, output_loading_info=True)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"The vision tower `{source}` lacks {len(missing)} weights: {', '.join(missing)}")
    return {f"model.{_VISION_TOWER}{name}": tensor for name, tensor in tower.state_dict().items()}


def expert_names(stacked: str, num_experts: int) -> list[str]:
    """The names on disk of what is stacked in memory as `...experts.gate_up_proj.weight` or `down_proj.weight`."""
    prefix, _, weight = stacked.rpartition(".experts.")
    parts = ["gate_proj", "up_proj"] if weight.startswith("gate_up_proj") else ["down_proj"]
    return [f"{prefix}.experts.{expert}.{part}.weight" for expert in range(num_experts) for part in parts]


def _raise_on_problems(
    model: PreTrainedModel, loading_info, present: set[str], source, ignore_mismatched: bool
) -> None:
    """Fail, with every name, where Transformers would go on with random weights."""
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = {
        name for name in loading_info.missing_keys - tied if not any(pattern.search(name) for pattern in ignored)
    }
    mismatched = {item[0]: item[1:] for item in loading_info.mismatched_keys}
    failed = dict(loading_info.conversion_errors)
    for name in [n for n in (*missing, *mismatched, *failed) if ".experts." in n]:
        wanted = expert_names(name, model.config.get_text_config().num_experts)
        # A base model is saved without `model.` in front.
        absent = [w for w in wanted if not {w, f"model.{w}", w.removeprefix("model.")} & present]
        if absent:
            missing = missing - {name} | set(absent)
            mismatched.pop(name, None)
            failed.pop(name, None)
    for name, module in model.named_modules():
        # Transformers compares shapes before it quantises, and only of what it does not quantise.
        if (found := quantized_shape(module)) is not None and found != (module.out_features, module.in_features):
            mismatched[f"{name}.weight"] = (found, (module.out_features, module.in_features))
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {', '.join(sorted(missing))}")
    if mismatched and not ignore_mismatched:
        shapes = [
            f"{name} is {tuple(found)} in the checkpoint but {tuple(expected)} in the model"
            for name, (found, expected) in sorted(mismatched.items())
        ]
        problems.append(f"{len(shapes)} of another shape: {'; '.join(shapes)}")
    if failed:
        reasons = [f"{name} ({error.strip().splitlines()[-2]})" for name, error in sorted(failed.items())]
        problems.append(f"{len(failed)} that cannot be put together: {'; '.join(reasons)}")
    if problems:
        raise ValueError(
            f"The weights of `{source}` do not fit {type(model).__name__}. Weights "
            + ". Weights ".join(problems)
            + "."
        )


def _operations(conversion: WeightTransform) -> list[ConversionOps]:
    return getattr(conversion, "operations", [])


def load_published_checkpoint(
    load: Callable, model: PreTrainedModel, state_dict, checkpoint_files, load_config, **kwargs
):
    """
    What [`PreTrainedModel._load_pretrained_model`] does, and besides: published names are understood, a missing vision
    tower is fetched from where the configuration says, and weights that are missing or of another shape are an error.

    Args:
        load: that method of the parent class; the other arguments and the result are its own.

    Raises:
        ValueError: listing every weight that is missing, of another shape, or not convertible; or if a GPU is too
            small for all of them.
    """
    quantizer = load_config.hf_quantizer
    source = load_config.pretrained_model_name_or_path
    bits = bits_of(None if quantizer is None else quantizer.quantization_config)
    check_device_memory(model, bits, load_config.device_map, source)
    names = published_names(model.config)
    # Tensors that the caller hands over are what they are: only files are held to be complete.
    is_file = state_dict is None
    is_quantized_now = quantizer is not None and not quantizer.pre_quantized
    if not is_file:
        tensors = state_dict
    elif is_quantized_now and all(file.endswith(".safetensors") for file in checkpoint_files):
        tensors = state_dict = read_one_by_one(checkpoint_files)
    else:
        tensors = read_lazily(checkpoint_files)
    present = {to_native_name(name, names) for name in tensors}
    marks = sorted(name for name in present if _QUANTIZED_NAME.search(name))
    if marks and (quantizer is None or not quantizer.pre_quantized):
        raise ValueError(
            f"`{source}` holds {len(marks)} scales of quantised weights, such as `{marks[0]}`, but its configuration has"
            " no `quantization_config`."
        )
    is_composite = model.config.get_text_config() is not model.config
    if is_file and not checkpoint_files[0].endswith(".safetensors"):
        state_dict = tensors  # read already, and once is enough
    if is_file and is_composite and not any(_VISION_TOWER in name for name in present):
        tower = load_vision_tower(model.config, source)
        state_dict = {**tensors, **tower}

    conversions = load_config.weight_mapping or []
    renamings = [WeightRenaming(pattern, replacement) for pattern, replacement in names]
    load_config = dataclasses.replace(load_config, weight_mapping=[*renamings, *conversions])
    loading_info, offload_index = load(model, state_dict, checkpoint_files, load_config, **kwargs)
    if quantizer is not None:
        use_own_products(model)
    # Saving writes the native layout, whatever was read, and experts one by one once they are dequantised.
    used = {id(conversion) for conversion in model._weight_conversions}
    model._weight_conversions = [
        conversion
        for conversion in conversions
        if isinstance(conversion, ExpertConverter)
        or (id(conversion) in used and not any(hasattr(op, "hf_quantizer") for op in _operations(conversion)))
    ]
    if is_file:
        _raise_on_problems(model, loading_info, present, source, load_config.ignore_mismatched_sizes)
    return loading_info, offload_index


__all__ = [
    "damaged_files",
    "expert_names",
    "load_published_checkpoint",
    "load_vision_tower",
    "published_names",
    "read_lazily",
    "register_expert_conversion",
    "to_native_name",
    "to_published_name",
]
