# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
Fewer bytes for each weight. What is quantised is what most weights are, experts, dense MLPs and attention; all else keeps
the model's dtype, whichever quantiser is asked for. One quantiser is this package's own: weight-only int8 (ExpertsInt8,
arXiv 2408.12570, section 4), which needs nothing but torch.
"""

import copy
import importlib.util
import re
from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoQuantizationConfig,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .compat_longllava import is_instance, refuse_merging, should_convert_module
from .grouped_linear_longllava import grouped_linear, has_triton_kernels, quantize_rows, scaled_linear


INT8_METHOD = "longllava_int8"

QUANTIZATIONS = ("none", "int8", "bnb-int8", "nf4")
"""What [`named_quantization`] knows."""

BITS = ("none", "int8", "nf4")
"""What they differ in as far as memory goes, from the most to the least of it."""

KEPT_MODULES = ("mamba", "router", "embed_tokens", "lm_head", "multi_modal_projector", "vision_tower")
"""Modules, by a part of their path, that every quantiser leaves in the model's dtype."""


def skip_patterns(names: list[str] | None) -> list[str]:
    """
    What to tell a quantiser to leave alone: [`KEPT_MODULES`] and `names`.

    Args:
        names (`list[str]`, *optional*): the user's. Transformers finds a name at the start or the end of a path; here
            it counts in the middle too, so that `"mamba"` means `model.language_model.layers.0.mamba.in_proj`.

    Raises:
        TypeError: if `names` is a string.
        ValueError: if one of them is not a regular expression.
    """
    if isinstance(names, str):
        raise TypeError(f"Names of modules to leave alone must be a list of strings, but are the string {names!r}.")
    names = list(names or ())
    for name in names:
        try:
            re.compile(name)
        except re.error as error:
            raise ValueError(
                f"{name!r}, a name of modules to leave alone, is no regular expression: {error}"
            ) from None
    anywhere = [rf".*\b(?:{name})\b" for name in (*KEPT_MODULES, *names) if not name.startswith(".*")]
    return list(dict.fromkeys([*anywhere, *names]))


class LongLLaVAInt8Config(QuantizationConfigMixin):
    """
    Weight-only int8: each row of a weight is int8 with a float32 scale, and multiplied in the dtype of the activations.
    Runs wherever torch does; Triton makes it fast on a GPU.

    Args:
        modules_to_not_convert (`list[str]`, *optional*):
            Names of modules, or of a part of their path, to leave as they are, besides [`KEPT_MODULES`].
    """

    def __init__(self, modules_to_not_convert: list[str] | None = None, **kwargs):
        self.quant_method = INT8_METHOD  # type: ignore[assignment]
        self.modules_to_not_convert = modules_to_not_convert


def int8_linear(
    hidden_states: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """
    `(..., columns)` to `(..., rows)` through an int8 `weight` `(rows, columns)` with float32 scales `(rows,)`, in the
    dtype of `hidden_states`.
    """
    if has_triton_kernels(hidden_states):
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        offsets = torch.full((1,), len(rows), device=rows.device)
        output = grouped_linear(rows, weight[None], offsets, scale[None]).view(*hidden_states.shape[:-1], -1)
    else:
        output = scaled_linear(hidden_states, weight, scale)
    return output if bias is None else output + bias


def dense_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear layer in the weight's dtype."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(weight.dtype))
    return linear


def refuse_unquantized_weight(
    layer: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Load pre-hook of [`LongLLaVAInt8Linear`], called with the arguments of torch's `register_load_state_dict_pre_hook`."""
    weight = state_dict.get(name := f"{prefix}weight")
    if weight is not None and weight.dtype != torch.int8:
        error_msgs.append(
            f"{name} must be int8 with scales, but is {weight.dtype}: use `from_pretrained` to quantise it."
        )


class LongLLaVAInt8Linear(nn.Linear):
    """
    A frozen linear layer: `weight` `(out_features, in_features)` in int8, `weight_scale` `(out_features,)` in float32.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, device=None):
        super().__init__(in_features, out_features, bias=bias, device=device)
        self.weight = nn.Parameter(self.weight.to(torch.int8), requires_grad=False)
        scale = torch.ones(out_features, device=device, dtype=torch.float32)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.register_load_state_dict_pre_hook(refuse_unquantized_weight)

    def _apply(self, fn, recurse: bool = True):
        # A scale follows its weight to another device, but not the model to another dtype.
        scale = self.weight_scale.data
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale.data = scale.to(self.weight_scale.device)
        return self

    def train(self, mode: bool = True):
        # Called after every loading, of adapters too, and before training: PEFT need not be imported earlier.
        refuse_merging(
            LongLLaVAInt8Linear,
            "Adapters cannot be merged into int8 weights: `dequantize()` the model first, or load it without"
            " `quantization_config`.",
        )
        return super().train(mode)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return int8_linear(hidden_states, self.weight, self.weight_scale, self.bias)

    def dequantize(self, dtype: torch.dtype) -> nn.Linear:
        """The linear layer that this one stands for."""
        return dense_linear((self.weight.float() * self.weight_scale[:, None]).to(dtype), self.bias)


def check_int8_adapters(model: nn.Module) -> None:
    """Raises `NotImplementedError` for DoRA and the like on int8 layers: PEFT would take the weights without their scales."""
    for name, layer in model.named_modules():
        if getattr(layer, "lora_variant", None) and is_instance(layer.get_base_layer(), LongLLaVAInt8Linear):
            kinds = sorted({type(variant).__name__ for variant in layer.lora_variant.values()})
            raise NotImplementedError(
                f"On {INT8_METHOD} weights LoRA must be plain, but `{name}` has {', '.join(kinds)}: take plain LoRA,"
                " bitsandbytes' int8, or no quantisation."
            )


class LongLLaVAInt8Quantize(ConversionOps):
    """One floating-point weight to an int8 weight and its scales, while a checkpoint is read."""

    def convert(self, input_dict, full_layer_name=None, **kwargs):
        ((name, tensor),) = input_dict.items()
        weight, scale = quantize_rows(tensor[0] if isinstance(tensor, list) else tensor)
        return {name: weight, f"{name}_scale": scale}


def convertible_layers(model: nn.Module, names: list[str] | None = None) -> list[tuple[str, Any]]:
    """Name and module of each linear layer that quantisers convert, or have converted, if told to skip `names`."""
    skipped = skip_patterns(names)
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and should_convert_module(name, skipped)
    ]


def replace_linear_layers(model: nn.Module, names: list[str] | None = None, pre_quantized: bool = True) -> None:
    """
    Put [`LongLLaVAInt8Linear`]s, without values, in the place of the linear layers of a model on `meta`.

    Args:
        model (`nn.Module`).
        names (`list[str]`, *optional*): layers to leave alone, as for [`skip_patterns`].
        pre_quantized (`bool`, defaults to `True`): whether weights are int8 already where they will be read from.
    """
    for name, module in convertible_layers(model, names):
        if type(module) is nn.Linear:
            with torch.device("meta"):
                quantized = LongLLaVAInt8Linear(module.in_features, module.out_features, module.bias is not None)
            quantized.bias = module.bias
            if not pre_quantized:
                # Older releases of Transformers cast a weight to the dtype found here before it is quantised.
                quantized.weight = nn.Parameter(module.weight.data, requires_grad=False)
            model.set_submodule(name, quantized)


class LongLLaVAInt8HfQuantizer(HfQuantizer):
    """Puts [`LongLLaVAInt8Linear`] in the place of linear layers, for [`LongLLaVAInt8Config`]."""

    requires_calibration = False
    is_trainable = is_compileable = True

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs) -> bool:
        module, _, name = param_name.rpartition(".")
        return name == "weight" and is_instance(model.get_submodule(module), LongLLaVAInt8Linear)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        if self.param_needs_quantization(model, param_name):
            return 1
        return super().param_element_size(model, param_name, param)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs):
        names = self.quantization_config.modules_to_not_convert  # type: ignore[attr-defined]
        replace_linear_layers(model, names, self.pre_quantized)
        return model

    def get_quantize_ops(self) -> ConversionOps:
        return LongLLaVAInt8Quantize()

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if is_instance(module, LongLLaVAInt8Linear):
                model.set_submodule(name, module.dequantize(dtype or model.dtype))
        return model

    def is_serializable(self) -> bool:
        return True


def named_quantization(name: str, dtype: torch.dtype | None = None) -> QuantizationConfigMixin | None:
    """
    The configuration behind a short name.

    Args:
        name (`str`): `"none"`; `"int8"`, this package's own; `"bnb-int8"` or `"nf4"`, bitsandbytes', the latter with its
            scales quantised too.
        dtype (`torch.dtype`, *optional*): what 4-bit weights are multiplied in; by default that of the activations.
    """
    if name == "none":
        return None
    if name == "int8":
        return LongLLaVAInt8Config()
    if name == "bnb-int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("nf4 needs bitsandbytes: `pip install 'longllava_hf[int8]'`. Without it there is int8.")
    options: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **options)


def describe_quantization(config: QuantizationConfigMixin | dict) -> str:
    """`"bitsandbytes int8"`, say: what distinguishes one quantised checkpoint from another."""
    settings = config if isinstance(config, dict) else config.to_dict()
    if settings.get("load_in_8bit"):
        return "bitsandbytes int8"
    if settings.get("load_in_4bit"):
        return f"bitsandbytes {settings.get('bnb_4bit_quant_type', 'fp4')}"
    return str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")))


def prepare_quantization(
    requested: QuantizationConfigMixin | dict | None, stored: QuantizationConfigMixin | dict | None, source: Any
) -> QuantizationConfigMixin | None:
    """
    The quantisation to load a checkpoint with.

    Args:
        requested (`QuantizationConfigMixin` or `dict`, *optional*): what the caller passed; left as it is.
        stored (`QuantizationConfigMixin` or `dict`, *optional*): what the checkpoint is quantised with already.
        source: the checkpoint's name, for messages.

    Returns:
        a copy of `requested` that names all modules to leave alone, see [`skip_patterns`].

    Raises:
        ValueError: if the checkpoint is quantised, and otherwise than requested; or for `llm_int8_has_fp16_weight`.
        ImportError: if bitsandbytes is needed and missing.
    """
    wanted = requested if requested is not None else stored
    if wanted is None:
        return None
    found, expected = (None if config is None else describe_quantization(config) for config in (stored, requested))
    if None not in (found, expected) and found != expected:
        raise ValueError(
            f"`{source}` is already quantised ({found}), but `quantization_config` asks for {expected}. Leave"
            " `quantization_config` out to load it as it is, or quantise the checkpoint it was made from."
        )
    name = describe_quantization(wanted)
    if name.startswith("bitsandbytes") and importlib.util.find_spec("bitsandbytes") is None:
        message = f"{name} needs bitsandbytes: `pip install 'longllava_hf[int8]'`."
        alternative = " Int8 works without it: `quantization_config=LongLLaVAInt8Config()`."
        raise ImportError(message + ("" if stored is not None else alternative))
    if (wanted if isinstance(wanted, dict) else wanted.to_dict()).get("llm_int8_has_fp16_weight"):
        raise ValueError("`llm_int8_has_fp16_weight=True` keeps weights in float16, which this model does without.")
    if requested is None or stored is not None:
        return requested  # type: ignore[return-value]
    prepared: Any = copy.deepcopy(requested)
    if isinstance(requested, dict):
        prepared = AutoQuantizationConfig.from_dict(requested)
    for name in ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules"):
        if hasattr(prepared, name):
            setattr(prepared, name, skip_patterns(getattr(prepared, name)))
    return prepared


def stored_quantization(config: PreTrainedConfig) -> QuantizationConfigMixin | dict | None:
    """What a checkpoint's configuration says that it is quantised with."""
    parts = (config, config.get_text_config())
    return next((found for part in parts if (found := getattr(part, "quantization_config", None))), None)


def bits_of(config: QuantizationConfigMixin | dict | None) -> str | None:
    """Which of [`BITS`] a quantisation comes to; `None` for any other."""
    if config is None:
        return "none"
    names = {"bitsandbytes int8": "int8", INT8_METHOD: "int8", "bitsandbytes nf4": "nf4", "bitsandbytes fp4": "nf4"}
    return names.get(describe_quantization(config))


def weight_bytes(model: nn.Module, quantization: str) -> dict[str, int]:
    """
    Bytes of a model's weights if it were quantised so, by dtype; those of scales apart.

    Args:
        model (`nn.Module`): on any device, `meta` too.
        quantization (`"none"`, `"int8"` or `"nf4"`): the latter with its scales quantised too.
    """
    sizes: Counter[str] = Counter()
    converted = set()
    if quantization != "none":
        for name, module in convertible_layers(model):
            converted |= {f"{name}.weight", f"{name}.weight_scale"}
            size = module.in_features * module.out_features
            if quantization == "int8":
                sizes.update(int8=size, scales=4 * module.out_features)
            else:  # one byte for each block of 64 weights, four for each 256 of those, and four for their mean
                blocks = -(-size // 64)
                sizes.update(nf4=-(-size // 2), scales=blocks + 4 * -(-blocks // 256) + 4)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in converted:
            sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return dict(sizes)


def check_device_memory(model: nn.Module, quantization: str | None, device_map: Any, source: Any) -> None:
    """
    Before any weight is read, see that all fit on the GPU they are meant for.

    Args:
        model (`nn.Module`): on `meta`.
        quantization (`str`, *optional*): what [`bits_of`] says.
        device_map (`dict`, `str`, `int` or `torch.device`, *optional*): as for `from_pretrained`; nothing is said of more
            than one device.
        source: the checkpoint's name, for messages.

    Raises:
        ValueError: with the bytes needed, found, and needed in fewer bits.
    """
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    devices = {f"cuda:{place}" if isinstance(place, int) else str(place) for place in places} - {"disk"}
    if len(devices) != 1 or quantization is None or not str(*devices).startswith("cuda"):
        return
    device = torch.device(*devices)
    free, _ = torch.cuda.mem_get_info(device)
    needed = sum(weight_bytes(model, quantization).values())
    if needed <= free:
        return
    smaller = BITS[BITS.index(quantization) + 1 :]
    others = [f"{sum(weight_bytes(model, kind).values()) / 1e9:.1f} GB in {kind}" for kind in smaller]
    kind = f" in {quantization}" if quantization != "none" else ""
    raise ValueError(
        f"The weights of `{source}` take {needed / 1e9:.1f} GB{kind}, but {device} has {free / 1e9:.1f} GB free."
        + (f" They take {', '.join(others)}." if others else "")
        + f' `longllava plan {source}` says what a run takes besides; `device_map="auto"` spreads a model over devices.'
    )


# Where the code comes with a checkpoint it is imported more than once.
if INT8_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(INT8_METHOD)(LongLLaVAInt8HfQuantizer)
if INT8_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(INT8_METHOD)(LongLLaVAInt8Config)


__all__ = ["LongLLaVAInt8Config", "LongLLaVAInt8HfQuantizer", "LongLLaVAInt8Linear", "named_quantization"]
