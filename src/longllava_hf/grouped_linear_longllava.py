# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
Linear layers of many experts at once, with weights in floating point or in int8 (ExpertsInt8, arXiv 2408.12570,
section 4): symmetric, one scale for each row, dequantised on the way into the matrix product and never in memory.

Two contracts:

- [`grouped_linear`]: rows sorted by group, each group with a matrix of its own; a loop, and a Triton kernel of the same
  signature. For a prompt. Differentiable.
- [`routed_mlp_triton`]: a few tokens, each through its own experts, in two launches and without the host looking at a
  device tensor, so that a CUDA graph can capture it. For generated tokens. Not differentiable. To be read, it is
  `experts_reference`.

Symbols: R rows, G groups (experts), N output and K input features, T tokens, H hidden size, I intermediate size.
"""

import os
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .compat_longllava import int8_matmul_cpu


try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels below are then never reached
    triton = None

# Rows up to which weights are read in int8 by PyTorch's own CPU kernel, which is made for generated tokens.
_FEW_ROWS = 4


# What tensors on `meta` stand for, when memory is planned: kernels differ in what they allocate.
planned_device: ContextVar[str] = ContextVar("planned_device", default="cuda")


def has_triton_kernels(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels of this file take `tensor`, or would take what it stands for."""
    if tensor.device.type == "meta":
        return planned_device.get() == "cuda"
    return triton is not None and tensor.is_cuda and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Symmetric int8 with one scale for each row.

    Args:
        weight (`torch.Tensor` of shape `(..., K)`), in floating point.

    Returns:
        int8 of the same shape, and the float32 scales `(...,)`; their product is the weight, to half a scale.
    """
    scale = weight.abs().amax(-1).float().div_(127)
    # A row of zeros has no scale of its own; any will do.
    scale.masked_fill_(scale == 0, 1.0)
    return (weight.float() / scale.unsqueeze(-1)).round_().to(torch.int8), scale


def _product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Sums of int8 values, before they are scaled, and scales themselves are out of float16's range."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


class _ScaledLinear(torch.autograd.Function):
    """A frozen int8 matrix: only its int8 values are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        rows, output = hidden_states.reshape(-1, hidden_states.shape[-1]), None
        if rows.dtype == torch.bfloat16 and rows.device.type == "cpu" and 0 < len(rows) <= _FEW_ROWS:
            output = int8_matmul_cpu(rows, weight)
        if output is None:
            dtype = _product_dtype(rows)
            output = F.linear(rows.to(dtype), weight.to(dtype))
        output = output.view(*hidden_states.shape[:-1], len(weight))
        output = output * scale.to(output.dtype) if output.dtype == torch.float64 else output.mul_(scale)
        return output.to(hidden_states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor):
        weight, scale = ctx.saved_tensors
        dtype = _product_dtype(grad_output)
        return ((grad_output.to(dtype) * scale.to(dtype)) @ weight.to(dtype)).to(grad_output.dtype), None, None


def scaled_linear(hidden_states: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """
    `torch.nn.functional.linear` for one matrix that may be int8.

    Args:
        hidden_states (`torch.Tensor` of shape `(..., K)`).
        weight (`torch.Tensor` of shape `(N, K)`): int8 with `scale`, else floating point.
        scale (`torch.Tensor` of shape `(N,)`, float32): `None` for a floating-point weight.

    Returns:
        `torch.Tensor` of shape `(..., N)`, with gradients for `hidden_states`, and for `weight` without `scale`.
    """
    return F.linear(hidden_states, weight) if scale is None else _ScaledLinear.apply(hidden_states, weight, scale)


def grouped_linear(
    hidden_states: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Args:
        hidden_states (`torch.Tensor` of shape `(R, K)`): sorted by group.
        weight (`torch.Tensor` of shape `(G, N, K)`): int8 with `scale`, else in floating point.
        offsets (`torch.Tensor` of shape `(G,)`, integers): where the rows of each group end.
        scale (`torch.Tensor` of shape `(G, N)`, float32, *optional*): what each row of an int8 weight is multiplied with.

    Returns:
        `torch.Tensor` of shape `(R, N)`, with gradients for `hidden_states`, and for `weight` without `scale`.
    """
    if has_triton_kernels(hidden_states):
        if hidden_states.device.type == "meta":
            return hidden_states.new_empty(len(hidden_states), weight.shape[1])
        return grouped_linear_triton(hidden_states, weight, offsets, scale)
    outputs, start = [], 0
    for group, end in enumerate(offsets.tolist()):
        if end > start:
            group_scale = None if scale is None else scale[group]
            outputs.append(scaled_linear(hidden_states[start:end], weight[group], group_scale))
        start = end
    return torch.cat(outputs) if outputs else hidden_states.new_zeros(0, weight.shape[1])


if triton is not None:
    _INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

    def _config(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> Any:
        blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
        return triton.Config(blocks, num_warps=num_warps, num_stages=num_stages)

    _BLOCKS = [
        (16, 32, 256, 4, 4), (16, 64, 128, 4, 5), (32, 64, 128, 4, 4), (64, 128, 64, 4, 4),
        (128, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3),
    ]  # fmt: skip
    if _INTERPRET:  # which cannot measure; small blocks make it take every branch
        _BLOCKS = [(32, 32, 32, 4, 2)]

    @triton.autotune(configs=[_config(*blocks) for blocks in _BLOCKS], key=["ROWS_A_GROUP", "N", "K", "SCALED"])
    @triton.jit
    def _grouped_linear_kernel(
        x_ptr, w_ptr, scale_ptr, offsets_ptr, out_ptr,
        rows, N, K, stride_xm, stride_wg, stride_wn, stride_wk, stride_sg,
        GROUPS: tl.constexpr, IEEE: tl.constexpr,
        ROWS_A_GROUP: tl.constexpr,  # only chooses the configuration
        SCALED: tl.constexpr,  # 0: floating-point weight, 1: a scale for each n, 2: a scale for each k
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        # Blocks of rows lie within a group, so there are at most this many. Eight of them share a pass over the
        # weight, which then comes from memory once for all eight.
        blocks_m = rows // BLOCK_M + GROUPS
        blocks_n = tl.cdiv(N, BLOCK_N)
        pid = tl.program_id(0)
        first_m = pid // (8 * blocks_n) * 8
        height = tl.minimum(blocks_m - first_m, 8)
        pid_m = first_m + pid % (8 * blocks_n) % height
        pid_n = pid % (8 * blocks_n) // height

        # Which group this block of rows belongs to: found here, as the host does not know the offsets.
        group = 0
        row_start = 0
        row_end = 0
        start = 0
        block = 0
        for g in range(GROUPS):
            end = tl.load(offsets_ptr + g).to(tl.int32)
            blocks = tl.cdiv(end - start, BLOCK_M)
            if (pid_m >= block) & (pid_m < block + blocks):
                group = g
                row_start = start + (pid_m - block) * BLOCK_M
                row_end = end
            block += blocks
            start = end
        if row_start >= row_end:
            return

        m = row_start + tl.arange(0, BLOCK_M)
        n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + m[:, None].to(tl.int64) * stride_xm + k[None, :]
        w_ptrs = w_ptr + tl.cast(group, tl.int64) * stride_wg + k[:, None] * stride_wk + n[None, :] * stride_wn
        scale_ptr += group * stride_sg
        in_m = m[:, None] < row_end
        in_n = n[None, :] < N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k_start in range(0, K, BLOCK_K):
            left = K - k_start
            x = tl.load(x_ptrs, mask=in_m & (k[None, :] < left), other=0.0)
            w = tl.load(w_ptrs, mask=in_n & (k[:, None] < left), other=0)
            if SCALED == 2:
                scale = tl.load(scale_ptr + k_start + k, mask=k < left, other=0.0)
                x = (x.to(tl.float32) * scale[None, :]).to(x.dtype)
            if IEEE:
                acc = tl.dot(x.to(tl.float32), w.to(tl.float32), acc, input_precision="ieee")
            else:
                acc = tl.dot(x, w.to(x.dtype), acc)
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * stride_wk
        if SCALED == 1:
            acc *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[None, :]
        out_ptrs = out_ptr + m[:, None].to(tl.int64) * N + n[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=in_m & in_n)

    def _on_device_of(tensor: torch.Tensor):
        # Triton launches on the current device, which need not be the one of a layer.
        return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()

    def _launch_grouped_linear(x, weight, offsets, scale, transpose: bool) -> torch.Tensor:
        """`x @ weight[g].T`, or `x @ weight[g]` with `transpose`, for each group's rows of `x`."""
        groups, n, k = weight.shape
        stride_wg, stride_wn, stride_wk = weight.stride()
        if transpose:
            n, k, stride_wn, stride_wk = k, n, stride_wk, stride_wn
        x, rows = x.contiguous(), len(x)
        out = x.new_empty(rows, n)
        if rows == 0:
            return out

        def grid(meta):
            return ((rows // meta["BLOCK_M"] + groups) * triton.cdiv(n, meta["BLOCK_N"]),)

        scale = None if scale is None else scale.contiguous()
        with _on_device_of(x):
            _grouped_linear_kernel[grid](
                x, weight, out if scale is None else scale,  # any pointer does where there is no scale
                offsets.contiguous(), out,
                rows, n, k, x.stride(0), stride_wg, stride_wn, stride_wk, 0 if scale is None else scale.stride(0),
                GROUPS=groups,
                IEEE=x.dtype == torch.float32 or _INTERPRET,  # the interpreter multiplies the bits of bfloat16
                ROWS_A_GROUP=min(triton.next_power_of_2(triton.cdiv(rows, groups)), 4096),
                SCALED=0 if scale is None else 2 if transpose else 1,
            )  # fmt: skip
        return out

    class _GroupedLinearTriton(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden_states, weight, offsets, scale):
            ctx.save_for_backward(hidden_states if ctx.needs_input_grad[1] else None, weight, offsets, scale)
            return _launch_grouped_linear(hidden_states, weight, offsets, scale, transpose=False)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad_output):
            hidden_states, weight, offsets, scale = ctx.saved_tensors
            grad_input = grad_weight = None
            if ctx.needs_input_grad[0]:
                grad_input = _launch_grouped_linear(grad_output, weight, offsets, scale, transpose=True)
            if ctx.needs_input_grad[1]:
                grad_weight, start = torch.zeros_like(weight), 0
                for group, end in enumerate(offsets.tolist()):
                    grad_weight[group] = grad_output[start:end].T @ hidden_states[start:end]
                    start = end
            return grad_input, grad_weight, None, None

    @triton.jit
    def _routed_gate_up_kernel(
        x_ptr, index_ptr, w_ptr, scale_ptr, out_ptr, H, I,  # noqa: E741
        TOP_K: tl.constexpr, SCALED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        pair = tl.program_id(0)  # a token and one of its experts
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        expert = tl.load(index_ptr + pair).to(tl.int64)
        x_ptr += pair // TOP_K * H
        gate_ptrs = w_ptr + expert * 2 * I * H + n[:, None].to(tl.int64) * H + k[None, :]
        in_n = n[:, None] < I
        gate = tl.zeros((BLOCK_N,), dtype=tl.float32)
        up = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for k_start in range(0, H, BLOCK_K):
            left = H - k_start
            x = tl.load(x_ptr + k_start + k, mask=k < left, other=0.0).to(tl.float32)
            mask = in_n & (k[None, :] < left)
            gate_w = tl.load(gate_ptrs, mask=mask, other=0).to(tl.float32)
            up_w = tl.load(gate_ptrs + I.to(tl.int64) * H, mask=mask, other=0).to(tl.float32)
            gate += tl.sum(gate_w * x[None, :], axis=1)
            up += tl.sum(up_w * x[None, :], axis=1)
            gate_ptrs += BLOCK_K
        if SCALED:
            gate *= tl.load(scale_ptr + expert * 2 * I + n, mask=n < I, other=0.0)
            up *= tl.load(scale_ptr + expert * 2 * I + I + n, mask=n < I, other=0.0)
        out = gate * tl.sigmoid(gate) * up
        tl.store(out_ptr + pair.to(tl.int64) * I + n, out.to(out_ptr.dtype.element_ty), mask=n < I)

    @triton.jit
    def _routed_down_kernel(
        x_ptr, index_ptr, weights_ptr, w_ptr, scale_ptr, out_ptr, H, I,  # noqa: E741
        TOP_K: tl.constexpr, SCALED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        in_n = n[:, None] < H
        out = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for choice in range(TOP_K):
            pair = token * TOP_K + choice
            expert = tl.load(index_ptr + pair).to(tl.int64)
            w_ptrs = w_ptr + expert * H * I + n[:, None].to(tl.int64) * I + k[None, :]
            acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
            for k_start in range(0, I, BLOCK_K):
                left = I - k_start
                x = tl.load(x_ptr + pair.to(tl.int64) * I + k_start + k, mask=k < left, other=0.0).to(tl.float32)
                w = tl.load(w_ptrs, mask=in_n & (k[None, :] < left), other=0).to(tl.float32)
                acc += tl.sum(w * x[None, :], axis=1)
                w_ptrs += BLOCK_K
            if SCALED:
                acc *= tl.load(scale_ptr + expert * H + n, mask=n < H, other=0.0)
            out += acc * tl.load(weights_ptr + pair).to(tl.float32)
        tl.store(out_ptr + token.to(tl.int64) * H + n, out.to(out_ptr.dtype.element_ty), mask=n < H)


def grouped_linear_triton(
    hidden_states: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """As [`grouped_linear`]. Int8 weights are dequantised in registers, products are summed in float32."""
    return _GroupedLinearTriton.apply(hidden_states, weight, offsets, scale)


def routed_mlp_triton(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_scale: torch.Tensor | None = None,
    down_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The weighted sum over each token's experts of `down(silu(gate(x)) * up(x))`. Each weight of a chosen expert is read
    once for each token that chose it.

    Args:
        hidden_states (`torch.Tensor` of shape `(T, H)`).
        top_k_index, top_k_weights (`torch.Tensor` of shape `(T, top_k)`): each token's experts, and their weights.
        gate_up (`torch.Tensor` of shape `(G, 2 * I, H)`): gate rows, then up rows; int8 with `gate_up_scale`.
        down (`torch.Tensor` of shape `(G, H, I)`): int8 with `down_scale`.
        gate_up_scale, down_scale (`torch.Tensor` of shape `(G, 2 * I)` and `(G, H)`, float32, *optional*).

    Returns:
        `torch.Tensor` of shape `(T, H)`.
    """
    given = (hidden_states, top_k_index, top_k_weights, gate_up, down)
    x, index, weights, gate_up, down = (tensor.contiguous() for tensor in given)
    (tokens, hidden_size), top_k, intermediate_size = x.shape, index.shape[1], down.shape[2]
    block_k, is_scaled = 16 if _INTERPRET else 512, gate_up_scale is not None
    options = {"TOP_K": top_k, "SCALED": is_scaled, "BLOCK_N": 16, "BLOCK_K": block_k}
    intermediate, output = x.new_empty(tokens * top_k, intermediate_size), torch.empty_like(x)
    scales = (output if scale is None else scale.contiguous() for scale in (gate_up_scale, down_scale))
    with _on_device_of(x):
        _routed_gate_up_kernel[(tokens * top_k, triton.cdiv(intermediate_size, options["BLOCK_N"]))](
            x, index, gate_up, next(scales), intermediate, hidden_size, intermediate_size, **options
        )
        _routed_down_kernel[(tokens, triton.cdiv(hidden_size, options["BLOCK_N"]))](
            intermediate, index, weights, down, next(scales), output, hidden_size, intermediate_size, **options
        )
    return output


__all__ = ["grouped_linear", "grouped_linear_triton", "quantize_rows", "routed_mlp_triton", "scaled_linear"]
