# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
Loading. From the names in a checkpoint to the names in the model, as one declarative table; what must be there, told by
the headers of its files before a weight is read; and the rest through Transformers' `from_pretrained`.

On disk there are three namings: the authors' (`model.layers.0.moe.experts.3.up_proj`), the same with Transformers'
Jamba names below the layer (`model.layers.0.feed_forward.experts.3.up_proj`), and the native one, which has Jamba's
names under `model.language_model.`. All three hold one tensor an expert; only in memory are experts stacked.
"""

import contextlib
import copy
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModel, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps
from transformers.distributed import DistributedConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import load_state_dict
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    logging,
)
from transformers.utils.hub import get_checkpoint_shard_files

from .bitsandbytes_longllava import dequantize_4bit_layers, is_blockwise, row_quantizer, scale_bytes, use_own_products
from .compat_longllava import (
    ADAPTER_PATH,
    LazyWeightConverter,
    save_registered_names,
    set_zero3_state,
    take_adapter,
)
from .configuration_longllava import (
    LongLLaVATextConfig,
    has_own_decoder,
    hub_arguments,
    locate_vision_tower,
    named_errors,
)
from .files_longllava import all_or_nothing, finish_save, has_unfinished_save
from .int8_longllava import bits_of, check_device_memory, prepare_quantization, stored_quantization


logger = logging.get_logger(__name__)

_VISION_TOWER = "vision_tower."
# What lies stacked in memory, and what it is made of on disk.
_EXPERT_PARTS = {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]}
# What readers of weights raise for files that are damaged.
_DAMAGE = (SafetensorError, UnpicklingError, EOFError)
# In an index: no path, on whatever system.
_FILE_NAME = re.compile(r"(?!\.\.?$)[^/\\:\x00]+")
# What is beside a quantised weight, and never beside another.
_QUANTIZED_NAME = re.compile(r"\.(SCB|weight_scale|weight\.absmax)$")
# What quantisers keep beside a weight.
_BESIDE_A_WEIGHT = re.compile(
    r"\.(SCB|weight_format|weight_scale|weight\.(absmax|quant_map|nested_\w+|quant_state\.\w+))$"
)


class StackExperts(ConversionOps):
    """
    One tensor for each expert and part to one tensor with all rows: those of expert 0's first part, its second part,
    expert 1's first part, and so on. Each is read, quantised where that goes by rows, and put in its place before the
    next one is read, so that at most one of them is in memory besides the result.
    """

    # Set by [`LazyWeightConverter`], for each tensor.
    quantize_op: ConversionOps | None = None

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, full_layer_name="", config=None, **kwargs):
        num_experts = config.get_text_config().num_experts
        found = [len(input_dict.get(pattern, ())) for pattern in source_patterns]
        if found != [num_experts] * len(source_patterns):
            raise ValueError(f"expected {num_experts} of each of {source_patterns}, found {found}")
        pending = [part for expert in zip(*(input_dict[pattern] for pattern in source_patterns)) for part in expert]
        by_rows = row_quantizer(self.quantize_op)
        stacked: list[torch.Tensor] = []
        for i, part in enumerate(pending):
            if isinstance(part, Future):
                part = part.result()
            rows = part if isinstance(part, torch.Tensor) else part()  # for ZeRO-3 they are read already
            pending[i] = None
            pieces = by_rows[0](rows) if by_rows else (rows,)
            if i == 0:
                stacked = [piece.new_empty(len(pending) * len(piece), *piece.shape[1:]) for piece in pieces]
            for whole, piece in zip(stacked, pieces):
                whole.narrow(0, i * len(piece), len(piece)).copy_(piece)
        if by_rows:
            return by_rows[1](full_layer_name, *stacked)
        converted = {full_layer_name: stacked[0]}
        if self.quantize_op is not None:
            return self.quantize_op.convert(converted, full_layer_name=full_layer_name, **kwargs)
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


def _register_expert_conversion() -> None:
    """Tell Transformers that experts are stored one by one and used stacked. Saving undoes it."""
    converters: list[Any] = [
        LazyWeightConverter(
            source_patterns=[f"feed_forward.experts.*.{part}.weight" for part in parts],
            target_patterns=rf"feed_forward.experts.{stacked}.weight(?![\w.])",
            operations=[StackExperts()],
        )
        for stacked, parts in _EXPERT_PARTS.items()
    ]
    register_checkpoint_conversion_mapping(LongLLaVATextConfig.model_type, converters, overwrite=True)


_register_expert_conversion()


def _name_pairs(config: PreTrainedConfig) -> list[tuple[str, str]]:
    """Parts of the authors' names, and what they are in native ones."""
    text_config, is_linear = config.get_text_config(), getattr(config, "projector_type", None) == "linear"
    pairs = [
        ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
        (".mamba.B_layernorm.", ".mamba.b_layernorm."),
        (".mamba.C_layernorm.", ".mamba.c_layernorm."),
        (".pre_moe_layernorm.", ".pre_ff_layernorm."),
    ]
    projector = [("", "linear_1.")] if is_linear else [("0.", "linear_1."), ("2.", "linear_2.")]
    pairs += [(f"model.mm_projector.{old}", f"model.multi_modal_projector.{new}") for old, new in projector]
    if has_own_decoder(config):  # where a dense layer's MLP is an only expert
        for i, experts in enumerate(text_config.layers_num_experts):
            pairs.append((f".layers.{i}.moe.{'experts.0.' if experts == 1 else ''}", f".layers.{i}.feed_forward."))
    if text_config is not config:
        parts = ("embed_tokens", "layers", "final_layernorm", "norm")
        pairs += [(f"model.{part}.", f"model.language_model.{part}.") for part in parts]
    return pairs


def _pattern(part: str) -> str:
    # Not all published towers have the middle one of these names.
    pattern = re.escape(part).replace(r"vision_model\.", r"(?:vision_model\.)?")
    return pattern if part.startswith(".") else f"^{pattern}"


def published_names(config: PreTrainedConfig) -> list[tuple[str, str]]:
    """
    The table from the authors' names to native ones: `(regular expression, replacement)`, to be applied in order. No
    native name matches any of them.

    Args:
        config ([`LongLLaVAConfig`] or [`LongLLaVATextConfig`]): which layers are dense decides what `moe.experts.0` means.
    """
    names = [(_pattern(published), native) for published, native in _name_pairs(config)]
    if config.get_text_config() is config:  # of the native names of a whole model, those of its decoder
        names.append((r"^model\.language_model\.", "model."))
    return names


def to_native_name(name: str, names: list[tuple[str, str]]) -> str:
    """Apply a table as that of [`published_names`] to one name."""
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name, count=1)
    return name


def to_published_name(name: str, config: PreTrainedConfig) -> str:
    """The authors' name of a native one: the inverse of [`to_native_name`]."""
    return to_native_name(name, [(_pattern(native), published) for published, native in _name_pairs(config)])


def damaged_files(*folders: Any) -> str:
    """What is wrong with the weight files of local folders: a line naming each that cannot be read, or nothing."""
    problems = []
    found = [file for folder in folders if folder is not None for file in Path(folder).glob("*")]
    for file in sorted(str(file) for file in found if file.suffix in (".safetensors", ".bin")):
        try:
            read_lazily([file])
        except Exception as error:
            problems.append(f"`{file}` ({error})")
    return ", ".join(problems)


class StoredTensor:
    """
    A tensor of a safetensors file, of which `tensor[...]` is read into memory of its own: nothing stays mapped afterwards,
    as the pages of a mapped file count as the process's memory for as long as the file is open.
    """

    def __init__(self, file: str, name: str, shape: Iterable[int]):
        self.file, self.name, self.shape = file, name, tuple(shape)

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, index) -> torch.Tensor:
        with safe_open(self.file, framework="pt") as pointer:
            return pointer.get_slice(self.name)[index].clone()

    @property
    def dtype(self) -> torch.dtype:
        return self[:0].dtype if self.shape else self[...].dtype

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


def read_lazily(checkpoint_files: Iterable[str]) -> dict[str, Any]:
    """All tensors of a checkpoint by name; of safetensors files only the headers are read."""
    tensors: dict[str, Any] = {}
    for file in checkpoint_files:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as pointer:
                for name in pointer.keys():
                    tensors[name] = StoredTensor(file, name, pointer.get_slice(name).get_shape())
        else:
            tensors.update(load_state_dict(file, weights_only=True))
    return tensors


@contextlib.contextmanager
def _damage_named(source: Any, *folders: Any, kinds: Any = _DAMAGE) -> Iterator[None]:
    """`OSError`, with the files of these folders that are damaged, in place of such errors of those who read them."""
    try:
        yield
    except (OSError, MemoryError):  # such as a file that is not there
        raise
    except kinds as error:
        raise OSError(f"The weights of `{source}` are damaged: {damaged_files(*folders) or error}") from error


def read_headers(checkpoint_files: list[str], source: Any) -> dict[str, Any]:
    """As [`read_lazily`]; raises `OSError` for a damaged file, whatever its reader raises."""
    with _damage_named(source, *map(os.path.dirname, checkpoint_files[:1]), kinds=Exception):
        return read_lazily(checkpoint_files)


def _check_index(index: str) -> None:
    """Raises `OSError` unless an index names files beside it, and nothing else."""
    try:
        content = json.loads(Path(index).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise OSError(f"The index `{index}` is damaged: it is no JSON ({error}).") from error
    for key in ("metadata", "weight_map"):
        found = content.get(key) if isinstance(content, dict) else content
        if not isinstance(found, dict):
            kind = f"`{key}` is {type(found).__name__}" if isinstance(content, dict) else type(content).__name__
            raise OSError(f"The index `{index}` is damaged: expected an object with an object `{key}`, found {kind}.")
    if not content["weight_map"]:
        raise OSError(f"The index `{index}` is damaged: its `weight_map` names no file.")
    for weight, file in content["weight_map"].items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise OSError(
                f"The index `{index}` has `{weight}` in {file!r}, where the name of a file beside it must be."
            )


def checkpoint_files(
    name: str | os.PathLike, variant: str | None = None, use_safetensors: bool | None = None, **where
) -> list[str]:
    """
    The files of a checkpoint's weights, as [`~PreTrainedModel.from_pretrained`] finds them; none under other names.

    Raises:
        OSError: for an index that is damaged, or leads to other folders.
    """
    safe = [] if use_safetensors is False else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    for file_name in [*safe, *([] if use_safetensors else [WEIGHTS_NAME, WEIGHTS_INDEX_NAME])]:
        stem, extension = file_name.rsplit(".", 1)
        try:
            file: Any = cached_file(name, ".".join(filter(None, (stem, variant, extension))), **where)
        except OSError:
            continue
        if ".index." not in file_name:
            return [file]
        _check_index(file)
        return get_checkpoint_shard_files(name, file, **where)[0]
    return []


def load_vision_tower(config: PreTrainedConfig, folder: str | os.PathLike | None) -> dict[str, torch.Tensor]:
    """
    The tower's weights, under native names, for a checkpoint that has none of its own.

    Args:
        config ([`LongLLaVAConfig`]): its `vision_tower` says where they are.
        folder (`str`, *optional*): the checkpoint's own, which that may be relative to.

    Raises:
        ValueError: if that tower lacks a weight, or one has another shape.
        OSError: if there is no such tower, or its file is damaged.
    """
    source = locate_vision_tower(config.vision_tower, folder)
    logger.warning(f"The checkpoint `{folder}` has no vision tower of its own; taking it from `{source}`.")
    with _damage_named(source, source), set_zero3_state():
        checkpoint_files(source)  # for what it says of an index
        options = {"output_loading_info": True, "trust_remote_code": False}
        tower, info = AutoModel.from_pretrained(source, config=config.vision_config, **options)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"The vision tower `{source}` lacks {len(missing)} weights: {', '.join(missing)}")
    return {f"model.{_VISION_TOWER}{name}": tensor for name, tensor in tower.state_dict().items()}


def has_vision_tower(names: Iterable[str]) -> bool:
    """Whether any of these weights is the tower's."""
    return any(_VISION_TOWER in name for name in names)


def expert_names(stacked: str, num_experts: int) -> list[str]:
    """The names on disk of what is stacked in memory as `...experts.gate_up_proj.weight` or `down_proj.weight`."""
    prefix, _, weight = stacked.rpartition(".experts.")
    parts = _EXPERT_PARTS[weight.partition(".")[0]]
    return [f"{prefix}.experts.{expert}.{part}.weight" for expert in range(num_experts) for part in parts]


def load_split_experts(
    experts: Any,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """
    Load pre-hook of [`LongLLaVAExperts`], called with the arguments of torch's `register_load_state_dict_pre_hook`. Lets
    `load_state_dict`, with which `Trainer` resumes, take experts one by one, as [`~PreTrainedModel.save_pretrained`] writes
    them, beside stacked ones. Those that are not there, as in one file of several, stay as they are and are missing keys.
    """
    for stacked, parts in _EXPERT_PARTS.items():
        layer = getattr(experts, stacked)
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        inner = "base_layer." * (base is not layer)
        names = [f"{prefix}{i}.{part}.weight" for i in range(experts.num_experts) for part in parts]
        found = [name for name in names if name in state_dict]
        if not found or f"{prefix}{stacked}.{inner}weight" in state_dict:
            continue
        if not base.weight.is_floating_point() or is_blockwise(base):
            error_msgs.append(
                f"{found[0]} cannot be put into {prefix}{stacked}, which is quantised: use `from_pretrained`."
            )
            continue
        shape = torch.Size((base.out_features // len(names), base.in_features))
        if wrong := [name for name in found if state_dict[name].shape != shape]:
            error_msgs += [f"size mismatch for {n}: {state_dict[n].shape}, but the model has {shape}" for n in wrong]
        elif len(found) == len(names):
            state_dict[f"{prefix}{stacked}.{inner}weight"] = torch.cat([state_dict.pop(name) for name in names])
        elif not base.weight.is_meta:
            weight = base.weight.detach()
            for name, rows in zip(names, weight.chunk(len(names))):
                if name in state_dict:
                    rows.copy_(state_dict.pop(name))
                else:
                    missing_keys.append(name)
            state_dict[f"{prefix}{stacked}.{inner}weight"] = weight


def load_tied_weights(model: Any, state_dict: dict[str, Any], prefix: str, *args) -> None:
    """Load pre-hook of a model: weights that are tied are stored once, which leaves none of them missing."""
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        if prefix + source in state_dict:
            state_dict.setdefault(prefix + name, state_dict[prefix + source])


def expected_shapes(model: PreTrainedModel, present: Iterable[str] = ()) -> dict[str, tuple[int, ...]]:
    """
    Native name and shape of every tensor that a complete checkpoint has on disk.

    Args:
        model (`PreTrainedModel`): on `meta`.
        present (`Iterable[str]`): native names that are there: experts that were quantised are stored stacked. A base
            model is saved without `model.` in front.
    """
    present = {name.removeprefix("model.") for name in present}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        if ".experts." in name and name.removeprefix("model.") not in present:
            parts = expert_names(name, model.config.get_text_config().num_experts)
            shapes.update(dict.fromkeys(parts, (tensor.shape[0] // len(parts), tensor.shape[1])))
        else:
            shapes[name] = tuple(tensor.shape)
    return shapes


def check_weights(
    model: PreTrainedModel, tensors: Mapping[str, Any], source: Any, ignore_mismatched_sizes: bool = False
) -> set[str]:
    """
    Compare the names and shapes of a checkpoint with those of a model, where Transformers would go on with random weights.

    Args:
        model (`PreTrainedModel`): on `meta`.
        tensors (`Mapping`): whatever has a shape, by native name.
        source: the checkpoint's name, for messages.

    Returns:
        names that have no place in the model; what quantisers keep beside a weight has one.

    Raises:
        ValueError: listing every weight that is missing or of another shape. A vision tower may be missing as a whole.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors.items():
        is_blockwise = f"{name}.absmax" in tensors  # two weights of 4 bits are a byte, all in one column of any dtype
        shape = (tensor.shape[0] * tensor.dtype.itemsize, 1) if is_blockwise else tuple(tensor.shape)
        found[name.removeprefix("model.")] = shape
    expected = {n.removeprefix("model."): shape for n, shape in expected_shapes(model, tensors).items()}
    has_tower = has_vision_tower(found)
    missing = [n for n in expected if n not in found and (has_tower or not n.startswith(_VISION_TOWER))]
    mismatched = []
    for name, shape in expected.items():
        stored = (-(-torch.Size(shape).numel() // 2), 1) if f"{name}.absmax" in found else shape
        if found.get(name, stored) != stored and not ignore_mismatched_sizes:
            mismatched.append(f"{name} is {found[name]} in the checkpoint but {stored} in the model")
    problems = [f"{len(missing)} missing: {', '.join(sorted(missing))}"] if missing else []
    problems += [f"{len(mismatched)} of another shape: {'; '.join(sorted(mismatched))}"] if mismatched else []
    if problems:
        raise ValueError(
            f"The weights of `{source}` do not fit {type(model).__name__}. Weights {'. Weights '.join(problems)}."
        )
    return {name for name in found.keys() - expected.keys() if not _BESIDE_A_WEIGHT.search(name)}


def _stored_bytes(tensor: torch.Tensor) -> int:
    """Of a tensor, or of those that a subclass of it is made of, such as integers and their scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(_stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def check_parallel_plan(config: PreTrainedConfig, kwargs: Mapping[str, Any], quantization: Any) -> None:
    """
    Raises `ValueError` for what cannot be cut and would give other answers: of LongLLaVA's own decoder, Mamba layers and
    experts, which stay whole on each device; weights that are quantised; and any model into stages of a pipeline, past
    which `prefill` would read.

    Args:
        config ([`LongLLaVAConfig`] or [`LongLLaVATextConfig`]).
        kwargs (`Mapping`): the arguments of `from_pretrained`, with `tp_plan`, `tp_size` or `distributed_config`.
        quantization (*optional*): the quantisation of the weights.
    """
    distributed = kwargs.get("distributed_config") or {name: kwargs.get(name) for name in ("tp_plan", "tp_size")}
    if isinstance(distributed, dict):
        distributed = DistributedConfig.from_dict(distributed)
    if (distributed.pp_size or 1) > 1:
        raise ValueError(
            "There is no pipeline parallelism: `device_map` places layers on several devices of one process."
        )
    is_expert_parallel = distributed.enable_expert_parallel
    if (distributed.tp_size or 1) == 1 and not is_expert_parallel:
        return
    plans = [distributed.tp_plan, getattr(distributed, "ep_plan", None)]
    names = sorted(name for plan in plans if isinstance(plan, dict) for name in plan)
    whole = [name for name in names if re.search(r"\.(mamba|router|experts)\b", name)]
    if (whole or is_expert_parallel) and has_own_decoder(config):
        asked = f"a parallel plan was given for {whole}" if whole else "expert parallelism was asked for"
        raise ValueError(f"Mamba layers and experts stay whole on each device, but {asked}.")
    if quantization is not None:
        raise ValueError("Quantised weights are not cut for tensor parallelism: leave out one of the two.")


def _finish_save(name: str | os.PathLike, kwargs: dict[str, Any]) -> None:
    """Complete a save that was interrupted. A `config` that was read from the folder already is read again."""
    folder = os.path.join(name, kwargs.get("subfolder") or "")
    if not has_unfinished_save(folder):
        return
    config, earlier = kwargs.get("config"), None
    if isinstance(config, PreTrainedConfig) and config.name_or_path == str(name):
        earlier = type(config).from_pretrained(folder).to_dict()
    finish_save(folder)
    if earlier is not None:
        overrides = {key: value for key, value in config.to_dict().items() if value != earlier.get(key)}
        kwargs["config"] = type(config).from_pretrained(folder, **overrides)


class PublishedPreTrainedModel(PreTrainedModel):
    """A model whose `from_pretrained` reads native and published checkpoints, and leaves no weight to chance."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        r"""
        As [`~PreTrainedModel.from_pretrained`], for native and published checkpoints. Whatever `quantization_config`
        asks for, [`KEPT_MODULES`] keep the model's dtype. A vision tower that is not in the checkpoint is fetched from
        where the configuration says.

        Raises:
            ValueError: listing the weights that are missing or of another shape (none is ever left random); if the
                checkpoint is quantised otherwise than asked for; or if the weights do not fit the device.
            ImportError: if a quantiser is asked for that is not installed.
            OSError: if there are no weights, or a file of them is damaged.
        """
        name, wants_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        for folder in (name, (kwargs.get("adapter_kwargs") or {}).get(ADAPTER_PATH)):
            if folder is not None:
                _finish_save(folder, kwargs)
        config, requested = kwargs.get("config"), kwargs.pop("quantization_config", None)
        if not isinstance(config, PreTrainedConfig) and (name or config) is not None:
            overrides = {key: value for key, value in kwargs.items() if key not in ("config", "dtype", "torch_dtype")}
            config, _ = cls.config_class.from_pretrained(config or name, return_unused_kwargs=True, **overrides)
        for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
            dtype, model_type = getattr(part, "dtype", None), getattr(part, "model_type", "")
            if not isinstance(model_type, str):
                raise ValueError(f"A `model_type` of `{name}` must be a string, but is {model_type!r}.")
            if not (dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)):
                raise ValueError(f"The `dtype` of `{name}` must be one of floating-point numbers, but is {dtype!r}.")
        stored = stored_quantization(config) if isinstance(config, PreTrainedConfig) else None
        requested = prepare_quantization(requested, stored, name)
        if requested is not None:
            kwargs["quantization_config"] = requested
        if config is not None:
            kwargs["key_mapping"] = {**dict(published_names(config)), **(kwargs.get("key_mapping") or {})}
            check_parallel_plan(config, kwargs, requested or stored)
        adapter, tensors = None, {}
        if name is not None and kwargs.get("state_dict") is None:
            tensors = cls._check_checkpoint(config, name, model_args, kwargs, requested or stored)
        if tensors:  # Transformers takes tensors or a name, and with them looks for nothing else
            adapter = take_adapter(name, kwargs, hub_arguments(kwargs))
            kwargs.update(state_dict=tensors, config=kwargs.get("config") or name)
            if kwargs.get("generation_config") is None and cls.can_generate():
                with contextlib.suppress(OSError):
                    kwargs["generation_config"] = GenerationConfig.from_pretrained(name, **hub_arguments(kwargs))
        path = None if tensors else name
        with _damage_named(name, name, (kwargs.get("adapter_kwargs") or {}).get(ADAPTER_PATH)):
            loaded: Any = super().from_pretrained(path, *model_args, output_loading_info=True, **kwargs)
        model, info = loaded
        if name is not None and info["missing_keys"]:
            raise ValueError(f"Weights of `{name}` are missing: {', '.join(sorted(info['missing_keys']))}")
        if tensors:
            model.config.name_or_path = model.name_or_path = str(name)
        use_own_products(model)
        save_registered_names(model)
        if adapter is not None:
            with _damage_named(name, adapter["peft_model_id"]):
                model.load_adapter(**adapter)
        return (model, info) if wants_info else model

    @classmethod
    def _check_checkpoint(cls, config, name, model_args, kwargs, quantization) -> dict[str, Any]:
        """
        Look at the headers of a checkpoint's files, and at the device.

        Returns:
            the checkpoint's tensors, where Transformers is to be given them instead of its name: with a vision tower from
            elsewhere; to be quantised, without mapping all of them into memory; or because they are read already. The
            values of safetensors files are read when they are used.
        """
        options = {key: kwargs.get(key) for key in ("variant", "use_safetensors")}
        files = [] if kwargs.get("gguf_file") else checkpoint_files(name, **options, **hub_arguments(kwargs))
        tensors = read_headers(files, name)
        if not tensors:
            return {}
        names = list(kwargs["key_mapping"].items())
        native = {to_native_name(stored, names): tensor for stored, tensor in tensors.items()}
        marks = sorted(filter(_QUANTIZED_NAME.search, native))
        if marks and quantization is None:
            raise ValueError(
                f"`{name}` holds {len(marks)} scales of quantised weights, such as `{marks[0]}`, but its configuration has"
                " no `quantization_config`."
            )
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype") or "auto"
        dtype = dtype.get("", torch.float32) if isinstance(dtype, dict) else dtype
        dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
        # For ZeRO-3, modules spread what is built in them, which nothing on `meta` can be.
        with torch.device("meta"), set_zero3_state(), named_errors("The configuration", name):
            model: Any = cls(copy.deepcopy(config), *model_args)
        model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        check_device_memory(model, bits_of(quantization), kwargs.get("device_map"), name)
        check_weights(model, native, name, kwargs.get("ignore_mismatched_sizes", False))
        lacks_tower = hasattr(config, "vision_config") and not has_vision_tower(native)
        if lacks_tower:
            tensors.update(load_vision_tower(config, name))
        is_quantized_now = quantization is not None and not marks
        is_read = not files[0].endswith(".safetensors")
        if lacks_tower and is_deepspeed_zero3_enabled():  # which takes nothing but tensors
            tensors = {name: tensor[...] for name, tensor in tensors.items()}
        return tensors if lacks_tower or is_quantized_now or is_read else {}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        *args,
        **kwargs,
    ) -> None:
        """
        As [`~PreTrainedModel.save_pretrained`], but a process that is killed leaves either all of the earlier state or all
        of the new one, which [`from_pretrained`] then puts in its place. Weights are there twice meanwhile. With
        `push_to_hub` or `distributed_checkpoint` files are overwritten one by one.

        Raises:
            OSError: naming the folder, if the disk is full or the folder may not be written to.
        """
        save, options = super().save_pretrained, (state_dict, push_to_hub, *args)
        is_distributed = kwargs.get("distributed_checkpoint") or any(args[5:])
        if os.path.isdir(save_directory) and is_main_process:
            finish_save(save_directory)
        if push_to_hub or is_distributed or not is_main_process or os.path.isfile(save_directory):
            save(save_directory, is_main_process, *options, **kwargs)
            return
        os.makedirs(save_directory, exist_ok=True)
        with all_or_nothing(Path(save_directory)) as folder:
            save(folder, is_main_process, *options, **kwargs)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """
        Bytes of all weights, as [`~PreTrainedModel.get_memory_footprint`], with the scales of quantised ones, and of those
        that are made of other tensors, as torchao's are, the bytes of these.
        """
        footprint = super().get_memory_footprint(return_buffers) + scale_bytes(self)
        return footprint + sum(_stored_bytes(weight) - weight.nbytes for weight in self.parameters())

    def dequantize(self, dtype: torch.dtype | None = None):
        """As [`~PreTrainedModel.dequantize`]; to the dtype of the weights that are not quantised, unless told."""
        dtype = dtype or self.dtype
        quantizer = getattr(self, "hf_quantizer", None)
        if getattr(getattr(quantizer, "quantization_config", None), "load_in_4bit", False):
            dequantize_4bit_layers(self, dtype)
            quantizer.remove_quantization_config(self)
            return self
        return super().dequantize(dtype)


__all__ = ["PublishedPreTrainedModel", "check_weights", "published_names", "to_native_name", "to_published_name"]
