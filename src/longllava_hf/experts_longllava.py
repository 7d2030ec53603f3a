# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""What a layer's experts compute (arXiv 2403.19887, section 2), from weights that quantisers or adapters may have changed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .bitsandbytes_longllava import BlockwiseWeight, RecomputedLinear, int8_parts, is_blockwise
from .compat_longllava import align_module_device, has_forward_pre_hooks
from .grouped_linear_longllava import grouped_linear, has_triton_kernels, routed_mlp_triton, scaled_linear


# Up to this many tokens each reads its own experts; beyond it, tokens of one expert share a pass over its weights.
_FEW_TOKENS = 8


@dataclass
class ExpertWeights:
    """
    What is inside a linear layer that holds all experts' rows, whatever a quantiser or an adapter made of it.

    weight (`(experts, rows, columns)`): floating point, int8 with `scale`, or in bitsandbytes' 4-bit format.
    scale (`(experts, rows)`): float32, for int8.
    adapters: LoRA's, as `(dropout, A, B, scaling)`. A is shared by all experts, each has its rows of B.
    """

    weight: torch.Tensor | BlockwiseWeight
    scale: torch.Tensor | None = None
    adapters: list[tuple[Any, Any, torch.Tensor, float]] = field(default_factory=list)

    @property
    def is_plain(self) -> bool:
        """Whether the weight is all there is, and in floating point."""
        return isinstance(self.weight, torch.Tensor) and self.scale is None and not self.adapters

    def _add_adapters(self, output: torch.Tensor, hidden_states: torch.Tensor, expand: Callable) -> torch.Tensor:
        for dropout, lora_a, lora_b, scaling in self.adapters:
            low_rank = lora_a(dropout(hidden_states.to(lora_a.weight.dtype)))
            output = output + (expand(low_rank, lora_b) * scaling).to(output.dtype)
        return output

    def linear(self, hidden_states: torch.Tensor, expert: int, rows: slice = slice(None)) -> torch.Tensor:
        """`(tokens, columns)` to `(tokens, rows)` through one expert, or some rows of it."""
        if isinstance(weight := self.weight, BlockwiseWeight):
            dtype = hidden_states.dtype
            output = RecomputedLinear.apply(hidden_states, lambda: weight.matrix(expert, dtype)[rows])
        else:
            scale = None if self.scale is None else self.scale[expert, rows]
            output = scaled_linear(hidden_states, weight[expert, rows], scale)
        return self._add_adapters(output, hidden_states, lambda low, lora_b: F.linear(low, lora_b[expert, rows]))

    def gate_and_up(self, hidden_states: torch.Tensor, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The two halves of [`~ExpertWeights.linear`]'s rows, each contiguous where that costs nothing."""
        if isinstance(self.weight, BlockwiseWeight):
            gate, up = self.linear(hidden_states, expert).chunk(2, dim=-1)
            return gate, up
        size = self.weight.shape[1] // 2
        return self.linear(hidden_states, expert, slice(size)), self.linear(hidden_states, expert, slice(size, None))

    def grouped(self, hidden_states: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """`(tokens, columns)`, sorted by expert, to `(tokens, rows)`, each through its own."""
        output = grouped_linear(hidden_states, self.weight, offsets, self.scale)  # type: ignore[arg-type]
        return self._add_adapters(output, hidden_states, lambda low, lora_b: grouped_linear(low, lora_b, offsets))


def _lora_adapters(layer: Any, num_experts: int) -> list[tuple[Any, Any, torch.Tensor, float]]:
    """
    The active adapters of a layer that PEFT has wrapped.

    Raises:
        NotImplementedError: for an adapter other than plain LoRA, which would have no effect here.
    """
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    if layer.disable_adapters or layer.merged:
        return []
    lora_a = getattr(layer, "lora_A", None)
    active = [name for name in layer.active_adapters if lora_a is None or name in lora_a]
    is_plain = isinstance(lora_a, nn.ModuleDict) and not hasattr(layer, "parameter_name")
    has_more = is_plain and any(n in layer.lora_variant or layer.lora_B[n].bias is not None for n in active)
    if not is_plain or has_more or has_forward_pre_hooks(layer):  # of which PEFT hangs one there for adapters by row
        raise NotImplementedError(
            "On experts only plain LoRA through `target_modules` works, the same for all rows, but"
            f" {type(layer).__name__} with adapters {active} is something else. Leave `gate_up_proj` and `down_proj` of"
            " `experts` out of its targets."
        )
    adapters = []
    for name in active:
        lora_b = layer.lora_B[name].weight.unflatten(0, (num_experts, -1))
        adapters.append((layer.lora_dropout[name], layer.lora_A[name], lora_b, layer.scaling[name]))
    return adapters


@contextmanager
def unpack_experts(layer: nn.Module, num_experts: int) -> Iterator[ExpertWeights]:
    """
    The weights of a linear layer that holds all experts' rows one below the other. Where accelerate keeps them
    elsewhere, they are here as long as the context is open.

    Args:
        layer (`nn.Module`): `nn.Linear`, or what bitsandbytes, torchao, this package's own int8 or PEFT made of it.
        num_experts (`int`).

    Raises:
        NotImplementedError: for any other layer.
    """
    base, adapters = layer, []
    if hasattr(layer, "get_base_layer"):
        adapters = _lora_adapters(layer, num_experts)  # before the weight is read, which it may change
        base = layer.get_base_layer()
    with align_module_device(base):
        weight: Any = base.weight
        if is_blockwise(base):
            yield ExpertWeights(BlockwiseWeight(weight, num_experts), adapters=adapters)
            return
        if (parts := int8_parts(base)) is not None:
            weight, scale = parts[0], parts[1].view(num_experts, -1)
        else:
            scale = None
            if type(weight.data) is not torch.Tensor:
                if not hasattr(weight, "dequantize"):
                    raise NotImplementedError(f"Experts cannot be computed from a weight of type {type(weight)}.")
                weight = weight.dequantize()
        yield ExpertWeights(weight.view(num_experts, -1, weight.shape[-1]), scale, adapters)


def experts_reference(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    act_fn: Callable,
) -> torch.Tensor:
    """
    The weighted sum over each token's experts of `down(act(gate(x)) * up(x))`, to be read.

    Args:
        hidden_states (`torch.Tensor` of shape `(tokens, hidden_size)`).
        top_k_index, top_k_weights (`torch.Tensor` of shape `(tokens, top_k)`): each token's experts, and their weights.
        gate_up, down (`ExpertWeights`).
        act_fn (`Callable`).

    Returns:
        `torch.Tensor` of shape `(tokens, hidden_size)`.
    """
    output = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        token, choice = torch.where(top_k_index == expert)
        gate, up = gate_up.linear(hidden_states[token], expert).chunk(2, dim=-1)
        expert_output = down.linear(act_fn(gate) * up, expert)
        output.index_add_(0, token, expert_output * top_k_weights[token, choice, None].to(expert_output.dtype))
    return output


def experts_loop(hidden_states, top_k_index, top_k_weights, gate_up, down, act_fn) -> torch.Tensor:
    """
    As [`experts_reference`]; one sort in place of a search for each expert, and gate and up apart, so that what is
    between the products is contiguous. An expert's tokens are done with before the next one's are touched, which suits
    a cache.
    """
    pairs = top_k_index.flatten()
    expert_of_pair, order = pairs.sort(stable=True)
    token = order // top_k_index.shape[1]
    weights = top_k_weights.flatten()[order, None]
    num_experts = gate_up.weight.shape[0]
    if pairs.device.type == "meta":  # each expert has its share of the tokens
        counts = [len(part) for part in pairs.tensor_split(num_experts)]
    else:
        counts = torch.bincount(expert_of_pair, minlength=num_experts).tolist()
    output, start = torch.zeros_like(hidden_states), 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        rows = token[start : start + count]
        gate, up = gate_up.gate_and_up(hidden_states[rows], expert)
        expert_output = down.linear(act_fn(gate) * up, expert) * weights[start : start + count]
        output.index_add_(0, rows, expert_output.to(output.dtype))
        start += count
    return output


def experts_grouped(hidden_states, top_k_index, top_k_weights, gate_up, down, act_fn) -> torch.Tensor:
    """As [`experts_reference`], all experts in one product; the host never waits for the device."""
    tokens, top_k = top_k_index.shape
    expert_of_pair, order = top_k_index.flatten().sort(stable=True)
    experts = torch.arange(gate_up.weight.shape[0], device=order.device)
    offsets = torch.searchsorted(expert_of_pair, experts, right=True)
    gate, up = gate_up.grouped(hidden_states[order // top_k], offsets).chunk(2, dim=-1)
    output = down.grouped(act_fn(gate) * up, offsets)
    # Back in the order of the tokens, where a token's experts lie side by side: their sum is a small product, and the
    # same at every run, as atomic additions would not be.
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    output = output[inverse].view(tokens, top_k, -1)
    return (top_k_weights.unsqueeze(1) @ output).squeeze(1)


def experts_routed(hidden_states, top_k_index, top_k_weights, gate_up, down, act_fn) -> torch.Tensor:
    """As [`experts_reference`], for a few tokens, SiLU, and neither adapters nor gradients."""
    weights: Any = (gate_up.weight, down.weight, gate_up.scale, down.scale)
    return routed_mlp_triton(hidden_states, top_k_index, top_k_weights, *weights)


def choose_experts_forward(
    hidden_states: torch.Tensor, gate_up: ExpertWeights, down: ExpertWeights, act_fn: Callable
) -> Callable:
    """Which of the functions above is the fastest for the device, the number of tokens and the weights."""
    is_blockwise = isinstance(gate_up.weight, BlockwiseWeight) or isinstance(down.weight, BlockwiseWeight)
    if is_blockwise or not has_triton_kernels(hidden_states):
        return experts_loop
    needs_grad = torch.is_grad_enabled() and (hidden_states.requires_grad or gate_up.weight.requires_grad)
    is_plain = isinstance(act_fn, nn.SiLU) and not gate_up.adapters and not down.adapters
    if len(hidden_states) <= _FEW_TOKENS and is_plain and not needs_grad and hidden_states.is_cuda:
        return experts_routed
    return experts_grouped


__all__ = ["ExpertWeights", "experts_grouped", "experts_loop", "experts_reference", "experts_routed", "unpack_experts"]
