# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
Everything about bitsandbytes: its formats, read by their attributes, and products with them in the dtype of the
activations. It need not be installed; it is imported with the first layer of its own.
"""

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.core_model_loading import ConversionOps

from .compat_longllava import is_instance, move_hook
from .grouped_linear_longllava import quantize_rows
from .int8_longllava import LongLLaVAInt8Quantize, dense_linear, int8_linear


def is_blockwise(layer: nn.Module) -> bool:
    """Whether a layer's weight is in bitsandbytes' 4-bit format, of which [`BlockwiseWeight`] knows."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def _int8_scales(layer: nn.Module) -> Any:
    """127 times the scales of an int8 layer: at the weight, until bitsandbytes calls the layer itself."""
    scales = getattr(layer.weight, "SCB", None)
    return getattr(getattr(layer, "state", None), "SCB", None) if scales is None else scales


def int8_parts(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The int8 weight `(rows, columns)` and float32 scales `(rows,)` of a quantised layer, bitsandbytes' or ours."""
    weight: Any = layer.weight
    if weight.dtype != torch.int8:
        return None
    scale: Any = getattr(layer, "weight_scale", None)
    if scale is None:
        scale = _int8_scales(layer).float() / 127
    return weight.data, scale.data


class RecomputedLinear(torch.autograd.Function):
    """
    `apply(hidden_states, matrix)`: `(..., columns)` to `(..., rows)` through the frozen `(rows, columns)` that `matrix()`
    gives, once in the forward and once in the backward pass; it is kept in neither.
    """

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, matrix: Callable[[], torch.Tensor]) -> torch.Tensor:
        ctx.matrix = matrix
        return F.linear(hidden_states, matrix())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor):
        return grad_output @ ctx.matrix(), None


class BlockwiseWeight:
    """
    Bitsandbytes' 4-bit format, for as long as its weight stays where it is.

    Args:
        weight (`bitsandbytes.nn.Params4bit`): of shape `(rows, columns)` once it is dequantised.
        groups (`int`): parts that the rows are divided into, to be dequantised one at a time.
    """

    def __init__(self, weight: Any, groups: int = 1):
        self.functional = importlib.import_module("bitsandbytes.functional")
        self.state = state = weight.quant_state
        rows, columns = state.shape
        self.shape = torch.Size((groups, rows // groups, columns))
        self.packed = weight.data.view(torch.uint8).flatten()
        absmax = state.absmax
        if state.nested:
            absmax = self.functional.dequantize_blockwise(absmax, state.state2) + state.offset
        self.absmax = absmax.float()

    def matrix(self, group: int, dtype: torch.dtype) -> torch.Tensor:
        """`(rows // groups, columns)` in floating point."""
        block = self.state.blocksize
        size = self.shape[1:].numel()
        start = group * size
        first, last = start // block, -(-(start + size) // block)  # the blocks that hold it
        packed = self.packed[first * block // 2 : last * block // 2]
        if len(packed) < (last - first) * block // 2:  # the last one may not be full
            packed = F.pad(packed, (0, (last - first) * block // 2 - len(packed)))
        # As if a row were a block: on a CPU bitsandbytes 0.50.2 gets rows wrong that do not end with one.
        state = self.functional.QuantState(
            absmax=self.absmax[first:last].contiguous(),
            shape=torch.Size((last - first, block)),
            code=self.state.code,
            blocksize=block,
            quant_type=self.state.quant_type,
            dtype=dtype,
        )
        values = self.functional.dequantize_4bit(packed.contiguous()[:, None], state).flatten()
        return values[start - first * block :][:size].view(self.shape[1:])


@functools.cache
def _bitsandbytes_layers() -> dict[type, type]:
    """Bitsandbytes' linear layers, and what [`use_own_products`] makes of them."""
    layers: Any = importlib.import_module("bitsandbytes.nn")

    class LongLLaVABnbInt8Linear(layers.Linear8bitLt):
        """Bitsandbytes' int8 layer, with its parameters, but for its product: see [`use_own_products`]."""

        def __init__(self, layer: Any):
            state, has_bias = layer.state, layer.bias is not None
            options = (has_bias, state.has_fp16_weights, state.threshold, layer.index)
            super().__init__(layer.in_features, layer.out_features, *options, device="meta")
            self.weight, self.bias, self.state = layer.weight, layer.bias, state

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            weight, scale = int8_parts(self)  # type: ignore[misc]
            return int8_linear(hidden_states, weight, scale, self.bias)

    class LongLLaVABnb4bitLinear(layers.Linear4bit):
        """Bitsandbytes' 4-bit layer, with its parameters, but for its product on a CPU: see [`use_own_products`]."""

        def __init__(self, layer: Any):
            options = {"compute_dtype": layer.compute_dtype, "quant_storage": layer.quant_storage, "device": "meta"}
            super().__init__(layer.in_features, layer.out_features, layer.bias is not None, **options)
            weight: Any = layer.weight
            weight.module = self  # which it tells of its state
            self.weight, self.bias, self.quant_state = weight, layer.bias, layer.quant_state

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            if hidden_states.device.type != "cpu":
                return super().forward(hidden_states)
            dtype = hidden_states.dtype
            output = RecomputedLinear.apply(hidden_states, lambda: BlockwiseWeight(self.weight).matrix(0, dtype))
            return output if self.bias is None else output + self.bias.to(dtype)

    for layer in (LongLLaVABnbInt8Linear, LongLLaVABnb4bitLinear):
        layer.__qualname__ = layer.__name__
    return {layers.Linear8bitLt: LongLLaVABnbInt8Linear, layers.Linear4bit: LongLLaVABnb4bitLinear}


def __getattr__(name: str) -> Any:
    # So that a model with these layers can be pickled, though bitsandbytes is only imported with the first of them.
    if name.startswith("LongLLaVABnb"):
        for layer in _bitsandbytes_layers().values():
            if layer.__name__ == name:
                return layer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def use_own_products(model: nn.Module) -> None:
    """
    Let bitsandbytes keep the weights, and multiply with them in the dtype of the activations, as everywhere here.

    Its int8 product rounds the activations to float16 and then to int8, which costs four times the error (measured on
    the golden checkpoints: a cosine of 0.998 between the logits of the two models, against 0.9993). Its 4-bit product
    on a CPU is wrong where rows are not whole blocks of 64, and on some CPUs repacks a layer when it is first called, so
    that neither `save_pretrained` nor `dequantize` gets its weights out again (measured with 0.50.2).
    """
    if sys.modules.get("bitsandbytes") is None:
        return
    for name, module in list(model.named_modules()):
        if (layer := _bitsandbytes_layers().get(type(module))) is not None:
            replacement = layer(module)
            move_hook(module, replacement)
            model.set_submodule(name, replacement)


def dequantize_4bit_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Put linear layers in the place of bitsandbytes' 4-bit ones."""
    for name, module in list(model.named_modules()):
        if is_blockwise(module):
            bias: Any = module.bias
            model.set_submodule(name, dense_linear(BlockwiseWeight(module.weight).matrix(0, dtype), bias))


def row_quantizer(operation: ConversionOps | None) -> tuple[Callable, Callable] | None:
    """
    How to do by rows what a quantiser's operation does to a whole weight, or `None` where that cannot be done.

    Returns:
        a function from rows to their int8 values and scales, and one from the name, the values and the scales of all
        rows to what the operation returns.
    """
    if is_instance(operation, LongLLaVAInt8Quantize):
        return quantize_rows, lambda name, values, scales: {name: values, f"{name}_scale": scales}
    if type(operation).__name__ != "Bnb8bitQuantize":
        return None
    bnb = importlib.import_module("bitsandbytes")

    def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return bnb.functional.int8_vectorwise_quant(rows.contiguous().half())[:2]

    def collect(name: str, values: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: bnb.nn.Int8Params(values, requires_grad=False, CB=values, SCB=scales)}

    return quantize, collect


def scale_bytes(model: nn.Module) -> int:
    """Bytes of scales that bitsandbytes keeps beside its parameters, and `parameters()` does not find."""
    tensors = []
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if is_blockwise(module):
            state = weight.quant_state
            tensors += [state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]
        elif getattr(weight, "dtype", None) == torch.int8:
            tensors.append(_int8_scales(module))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


__all__ = ["BlockwiseWeight", "RecomputedLinear", "row_quantizer", "use_own_products"]
