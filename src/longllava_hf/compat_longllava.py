# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
What differs between the releases of the hosts that are supported, found by looking and never by a version number, and what
is not public in them. Neither is named in any other file.

| name | what it stands for | since | reason | public alternative |
|---|---|---|---|---|
| `CACHE`, `as_cache`, `get_cache`, `take_cache`, `accepts_cache` | a cache is called `cache` in outputs, in `generate` and in `forward`; before, `past_key_values` | 5.24 | both names on every release | - |
| `recurrent_states` | `Cache.get_conv_state`; before, attributes of a layer | 5.20 | 5.17 has the attributes alone | - |
| `add_to_transformers` | what the module `transformers` holds, and that importing processors makes a second one | all | TRL and Transformers' server look classes up in either | Auto classes, which they ask last or never |
| `is_instance` | `dynamic_module_utils`, which imports code from the Hub for each Auto class | all | a checkpoint that carries its code | none |
| `align_module_device` | accelerate's, or nothing where that is not installed | all | Transformers does not need accelerate | - |
| `execution_device` | accelerate's `_hf_hook` | all | where offloaded modules compute | none |
| `capture_outputs`, `OutputRecorder`, `merge_with_config_defaults` | what Transformers' own models are decorated with | all | hidden states, attentions, router logits | none for packages |
| `SettableExperts` | `PreTrainedModel._can_set_experts_implementation`, which looks for a decorator in the file of a model's class | all | the whole model, and a user's subclass, have files of their own; what is not settable is passed over in silence | none |
| `FetchedAsOne` | DeepSpeed's `_z3_leaf`, which `deepspeed.utils.set_z3_leaf_modules` sets | all | a model does not know that it will be spread | `deepspeed_moe_layer_cls_names` in accelerate's configurations |
| `LazyWeightConverter` | `WeightConverter.materialize_tensors`, `collected_tensors`, `quantization_operation` | all | at most one expert in memory besides the result | documented operations, at more memory |
| `EXPANDS_ENCODER_OUTPUTS` | `GenerationMixin._expand_multimodal_outputs` | 5.18 | `generate` repeats encoded pictures for beams | none |
| `save_registered_names` | `model._weight_conversions` | all | saving goes by the registry, whatever was read | none |
| `ADAPTER_PATH`, `take_adapter` | `adapter_kwargs["_adapter_model_path"]`, where `Auto` classes leave it | all | tensors are loaded without a name to look for adapters by | none |
| `move_hook` | accelerate's `_hf_hook` | all | a layer that is replaced after it was dispatched | none |
| `set_zero3_state` | what keeps parts of a model from being spread for ZeRO-3 when they are built | all | the model that a checkpoint is compared with is on `meta` | none |
| `should_convert_module` | a helper of Transformers' quantisers | all | to say beforehand what they leave alone | none |
| `refuse_merging` | PEFT's `BaseTuner._check_merge_allowed` | all | PEFT rounds what it merges to the dtype of the weight, be that int8 | none |
| `has_forward_pre_hooks` | torch's `Module._forward_pre_hooks` | all | how PEFT tells a layer of an adapter for each row | none |
| `TorchDispatchMode` | torch's `utils._python_dispatch` | all | to count allocations | none |
| `int8_matmul_cpu` | torch's `_weight_int8pack_mm` | all | speed of generated tokens on a CPU | a product after a cast |
| `attention_and_logsumexp_cpu` | torch's `_scaled_dot_product_flash_attention_for_cpu` | all | a past without a mask on a CPU | attention with a mask |
| `merge_processor_kwargs` | `ProcessorMixin._merge_kwargs` | 5.17 to 5.24 | which keyword argument is the tokenizer's and which the image processor's, with the tokenizer's own defaults | none; its first argument is optional since 5.2x |
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import fields
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import Cache
from transformers.core_model_loading import WeightConverter
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import set_zero3_state
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import find_adapter_config_file, is_accelerate_available, is_peft_available
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs


if is_accelerate_available():
    from accelerate.hooks import add_hook_to_module
    from accelerate.utils import align_module_device
else:  # then nothing keeps weights elsewhere

    def align_module_device(module: nn.Module) -> contextlib.AbstractContextManager:  # type: ignore[misc]
        return contextlib.nullcontext()


_CACHE_NAMES = ("cache", "past_key_values")

CACHE: str = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in _CACHE_NAMES)
"""What this release calls a cache, as an argument and in an output."""


EXPANDS_ENCODER_OUTPUTS = hasattr(GenerationMixin, "_expand_multimodal_outputs")
"""Whether `generate` repeats `mm_encoder_outputs` for each beam and each sequence to return, as it does ids."""


ADAPTER_PATH = "_adapter_model_path"


def take_cache(arguments: dict[str, Any]) -> Any:
    """
    Take the cache out of keyword arguments, whichever name it has there.

    Raises:
        ValueError: if both names hold one, and not the same.
    """
    given = [arguments.pop(name, None) for name in _CACHE_NAMES]
    if given[0] is not None and given[1] is not None and given[0] is not given[1]:
        raise ValueError("You cannot specify both `cache` and `past_key_values` at the same time.")
    return given[1] if given[0] is None else given[0]


def as_cache(cache: Any) -> dict[str, Any]:
    """A cache as a keyword argument."""
    return {CACHE: cache}


def get_cache(outputs: Any) -> Cache | None:
    """The cache in an output."""
    return getattr(outputs, CACHE)


def accepts_cache(function: Callable) -> Callable:
    """
    Let a function with an argument `cache` be called with `past_key_values` too. Whoever looks at its signature finds the
    name that this release uses.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if "past_key_values" in kwargs:
            kwargs["cache"] = take_cache(kwargs)
        return function(*args, **kwargs)

    renamed = [p.replace(name=CACHE) if p.name == "cache" else p for p in signature.parameters.values()]
    wrapper.__signature__ = signature.replace(parameters=renamed)  # type: ignore[attr-defined]
    return wrapper


def recurrent_states(cache: Cache, layer_idx: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The convolution's and the recurrent state of a layer; none where nothing is cached."""
    if hasattr(cache, "get_conv_state"):
        return cache.get_conv_state(layer_idx), cache.get_recurrent_state(layer_idx)
    layer: Any = cache.layers[layer_idx]
    return (layer.conv_states[0], layer.recurrent_states[0]) if layer.has_previous_state[0] else (None, None)


def add_to_transformers(*classes: type) -> None:
    """
    Let `from transformers import` find classes by their names. Importing processors runs Transformers' `__init__` a second
    time, and whoever imported it before still has the first module: they are added to all that somebody has.
    """
    seen = [getattr(module, "__dict__", {}).get("transformers") for module in list(sys.modules.values())]
    for module in (sys.modules["transformers"], *seen):
        if isinstance(module, ModuleType) and module.__name__ == "transformers":
            for cls in classes:
                setattr(module, cls.__name__, cls)


def is_instance(value: Any, cls: type) -> bool:
    """
    As `isinstance`, by the name of the class. Code that comes with a checkpoint is imported for each of the Auto classes anew,
    so its classes may exist several times in one process.
    """
    return any(base.__name__ == cls.__name__ for base in type(value).__mro__)


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes, also if accelerate keeps its weights elsewhere."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if (device := getattr(one, "execution_device", None)) is not None:
                return torch.device(device)
    return next((x.device for x in module.parameters()), torch.device("cpu"))


def move_hook(old: nn.Module, new: nn.Module) -> None:
    """Give what accelerate hung on a module to the one that takes its place."""
    if (hook := getattr(old, "_hf_hook", None)) is not None:
        add_hook_to_module(new, hook)


class SettableExperts:
    """A model of which `set_experts_implementation` chooses the experts."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True


class FetchedAsOne:
    """
    A module whose weights DeepSpeed's ZeRO-3 fetches together, and of which it follows no calls inside: how many experts have
    tokens differs between processes, which must fetch the same in the same order.
    """

    _z3_leaf = True


class LazyWeightConverter(WeightConverter):
    """
    Hands its operation tensors that are not read yet, and leaves quantising to it: its attribute `quantize_op` is set to
    what the quantiser would do. The inverse operation has no such attribute, and is called as any other.
    """

    __slots__ = ()

    def materialize_tensors(self):
        operation: Any = self.operations[0]
        if not hasattr(operation, "quantize_op"):
            return super().materialize_tensors()
        collected = {pattern: self.collected_tensors.pop(pattern) for pattern in list(self.collected_tensors)}
        operation.quantize_op, self.quantization_operation = self.quantization_operation, None
        return collected


def save_registered_names(model: Any) -> None:
    """Forget by which names a checkpoint was read, so that a model is saved by the registered ones."""
    model._weight_conversions = None


def take_adapter(name: Any, kwargs: dict[str, Any], hub_arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Take what `from_pretrained` was told of an adapter out of its arguments; as arguments of `load_adapter`."""
    options = {**hub_arguments, **(kwargs.pop("adapter_kwargs", None) or {})}
    adapter_name, path = kwargs.pop("adapter_name", "default"), options.pop(ADAPTER_PATH, None)
    if path is None and is_peft_available() and find_adapter_config_file(name, **options) is not None:
        path = name
    return None if path is None else {"peft_model_id": path, "adapter_name": adapter_name, "adapter_kwargs": options}


def refuse_merging(cls: type, reason: str) -> None:
    """
    If PEFT is imported, let it raise `ValueError` before adapters are merged into layers of a class.

    Args:
        cls (`type`): of the layers.
        reason (`str`): what the error says.
    """
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    check = getattr(getattr(tuners, "BaseTuner", None), "_check_merge_allowed", None)
    if check is None or hasattr(check, "refused_class"):
        return

    @functools.wraps(check)
    def check_merge_allowed(tuner):
        adapted = (module for module in tuner.model.modules() if isinstance(module, tuners.BaseTunerLayer))
        if any(is_instance(module.get_base_layer(), cls) for module in adapted):
            raise ValueError(reason)
        check(tuner)

    check_merge_allowed.refused_class = cls  # type: ignore[attr-defined]
    tuners.BaseTuner._check_merge_allowed = check_merge_allowed  # type: ignore[union-attr]


def has_forward_pre_hooks(module: nn.Module) -> bool:
    """Whether something is to be called in front of a module's `forward`, which a module that is only read never does."""
    return bool(module._forward_pre_hooks)


def int8_matmul_cpu(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """
    `rows @ weight.T` without a copy of the weight in floating point, where PyTorch can do that.

    Args:
        rows (`torch.Tensor` of shape `(R, K)`): in bfloat16, on a CPU.
        weight (`torch.Tensor` of shape `(N, K)`): in int8.

    Returns:
        `torch.Tensor` of shape `(R, N)`, or `None`.
    """
    multiply = getattr(torch, "_weight_int8pack_mm", None)
    # Of any other shape it reads past the end, and tensors of a file may lie at any address.
    if multiply is None or any(n % 32 for n in weight.shape) or weight.data_ptr() % 64:
        return None
    ones = torch.ones(len(weight), dtype=rows.dtype)  # scales in bfloat16 would lose digits
    return multiply(rows.contiguous(), weight.contiguous(), ones)


def attention_and_logsumexp_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, is_causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's fused attention on a CPU, which also tells by what its rows were divided, `(batch, heads, length)`."""
    if query.is_meta:
        return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, key, value, is_causal=is_causal, scale=scaling)


def merge_processor_kwargs(processor: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A processor's keyword arguments by whom they are for: `"text_kwargs"`, `"images_kwargs"`, ..."""
    kinds, defaults = processor.valid_processor_kwargs, processor.tokenizer.init_kwargs
    return processor._merge_kwargs(kinds, tokenizer_init_kwargs=defaults, **kwargs)


__all__ = [
    "ADAPTER_PATH", "CACHE", "EXPANDS_ENCODER_OUTPUTS", "FetchedAsOne", "LazyWeightConverter", "OutputRecorder", "SettableExperts",
    "TorchDispatchMode", "accepts_cache", "add_to_transformers", "align_module_device", "as_cache", "attention_and_logsumexp_cpu", "capture_outputs",
    "execution_device", "get_cache", "has_forward_pre_hooks", "int8_matmul_cpu", "is_instance", "merge_processor_kwargs",
    "merge_with_config_defaults", "move_hook", "recurrent_states", "refuse_merging", "save_registered_names", "set_zero3_state",
    "should_convert_module",
    "take_adapter", "take_cache",
]  # fmt: skip
