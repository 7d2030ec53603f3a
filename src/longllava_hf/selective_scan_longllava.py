# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
The recurrence of a Mamba layer (arXiv 2312.00752, section 3), as functions from a state to a state.

Symbols, used throughout: `b` batch, `d` channels (`d_inner`), `n` states of a channel (`d_state`), `l` length.
With `dt = softplus(delta + delta_bias)`, token by token and for every channel and state:

    h[t] = exp(dt[t] * A) * h[t-1] + dt[t] * B[t] * u[t]
    y[t] = (sum over n of C[t] * h[t]  +  D * u[t]) * silu(z[t])

A token whose `dt` is 0 leaves the state as it was, which is how padding is skipped. Every function takes the state
before the first token and can give back the one after the last, so a sequence may be cut anywhere. States are float32
(float64 where the inputs are).
"""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


# Tokens that are worked on at a time: what bounds the memory of a long scan.
_BLOCK_LENGTH = 1024
# States that are advanced at a time: enough that an operation takes longer than it takes to start, and on a CPU still
# few enough to stay in its cache.
_BUSY_STATES = {"cpu": 1 << 15, "cuda": 1 << 22}


def _prepare(u, delta, A, delta_bias, delta_softplus, initial_state):
    """Inputs in the dtype of the state, the step size applied its bias and softplus, and the state to start from."""
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    u, delta, A = u.to(dtype), delta.to(dtype), A.to(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[..., None]
    if delta_softplus:
        delta = F.softplus(delta)
    if initial_state is None:
        initial_state = u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    return u, delta, A, initial_state.to(dtype), dtype


def _finish(y, u, D, z, dtype):
    """The skip connection and the gate, which need no state."""
    if D is not None:
        y = y + u * D.to(y.dtype)[:, None]
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(dtype)


def selective_scan_reference(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: torch.Tensor | None = None,
    return_final_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The equations above, one token after the other. Same arguments and results as [`selective_scan`]."""
    output_dtype = u.dtype
    u, delta, A, state, dtype = _prepare(u, delta, A, delta_bias, delta_softplus, initial_state)
    outputs = []
    for t in range(u.shape[-1]):
        dt = delta[:, :, t, None]  # (b, d, 1)
        state = torch.exp(dt * A) * state + dt * B[:, None, :, t].to(dtype) * u[:, :, t, None]  # (b, d, n)
        outputs.append((state * C[:, None, :, t].to(dtype)).sum(-1))
    y = _finish(torch.stack(outputs, dim=-1), u, D, z, output_dtype)
    return (y, state) if return_final_state else y


def _scan_block(u, delta, A, B, C, state):
    """
    The recurrence over one block, without `D` and `z`.

    Where one token's states are too few to keep the device busy, the block is folded into up to `sqrt(l)` chunks that
    advance together, one token of each a step: once from an empty state, which gives what each chunk adds; then, the
    chunks' true starting states being known, once more for the outputs. Nothing is divided by a decay, so no step size
    can overflow.

    Args and returns: `u`, `delta` `(b, d, l)`, `A` `(d, n)`, `B`, `C` `(b, n, l)`, `state` `(b, d, n)`; the output
    `(b, d, l)` and the state after the block.
    """
    batch, channels, length = u.shape
    # As many chunks as it takes to keep the device busy; each more than one costs a second pass over the states.
    enough = _BUSY_STATES.get(u.device.type, _BUSY_STATES["cuda"])
    chunks = max(1, min(enough // (batch * channels * A.shape[1]), math.isqrt(length)))
    steps = math.ceil(length / chunks)
    chunks = math.ceil(length / steps)
    padding = steps * chunks - length

    def fold(x):  # (b, c, l) -> (steps, b, chunks, c); padding has delta = 0 and so changes nothing
        return F.pad(x, (0, padding)).unflatten(-1, (chunks, steps)).permute(3, 0, 2, 1).contiguous()

    # Unbound once: indexing inside the loops would make the backward pass add full-size gradients at every step.
    step_size, drive = fold(delta).unbind(0), fold(delta * u).unbind(0)
    B, C = fold(B).unsqueeze(-2).unbind(0), fold(C).unsqueeze(-1).unbind(0)

    def advance(h, t):  # (b, chunks, d, n)
        return torch.addcmul(torch.exp(step_size[t].unsqueeze(-1) * A) * h, drive[t].unsqueeze(-1), B[t])

    if chunks == 1:
        states = state.unsqueeze(1)
    else:
        added = torch.zeros(batch, chunks, channels, A.shape[1], dtype=u.dtype, device=u.device)
        for t in range(steps):
            added = advance(added, t)
        decay = torch.exp(sum(step_size).unsqueeze(-1) * A).unbind(1)
        starts = [state]
        for k, addition in enumerate(added.unbind(1)[:-1]):
            starts.append(decay[k] * starts[-1] + addition)
        states = torch.stack(starts, dim=1)

    outputs = []
    for t in range(steps):
        states = advance(states, t)
        outputs.append((states @ C[t]).squeeze(-1))  # (b, chunks, d)
    y = torch.stack(outputs, dim=-1).permute(0, 2, 1, 3).flatten(-2)[..., :length]
    return y, states[:, -1]


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: torch.Tensor | None = None,
    return_final_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """
    The selective scan in PyTorch, on any device, with memory for a block of states and not for a sequence of them.
    In training the states of a block are recomputed, unless there is only one.

    Args:
        u (`torch.Tensor` of shape `(b, d, l)`): input.
        delta (`torch.Tensor` of shape `(b, d, l)`): step size, before its bias and softplus.
        A (`torch.Tensor` of shape `(d, n)`): decay rates, negative.
        B (`torch.Tensor` of shape `(b, n, l)`): input to state.
        C (`torch.Tensor` of shape `(b, n, l)`): state to output.
        D (`torch.Tensor` of shape `(d,)`, *optional*): skip connection.
        z (`torch.Tensor` of shape `(b, d, l)`, *optional*): gate.
        delta_bias (`torch.Tensor` of shape `(d,)`, *optional*): added to `delta` in the dtype of the state.
        delta_softplus (`bool`, defaults to `False`): whether `delta` then goes through a softplus.
        initial_state (`torch.Tensor` of shape `(b, d, n)`, *optional*): state before the first token, zero if not given.
        return_final_state (`bool`, defaults to `False`): return the state after the last token too.

    Returns:
        `torch.Tensor` of shape `(b, d, l)` in `u`'s dtype; with `return_final_state`, also the final state
        `(b, d, n)` in float32 (float64 for float64 inputs).
    """
    output_dtype = u.dtype
    u, delta, A, state, dtype = _prepare(u, delta, A, delta_bias, delta_softplus, initial_state)
    recompute = torch.is_grad_enabled() and u.shape[-1] > _BLOCK_LENGTH
    outputs = []
    for start in range(0, u.shape[-1], _BLOCK_LENGTH):
        block = slice(start, start + _BLOCK_LENGTH)
        inputs = (u[..., block], delta[..., block], A, B[..., block].to(dtype), C[..., block].to(dtype), state)
        y, state = checkpoint(_scan_block, *inputs, use_reentrant=False) if recompute else _scan_block(*inputs)
        outputs.append(y)
    y = _finish(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1), u, D, z, output_dtype)
    return (y, state) if return_final_state else y


def causal_conv1d(x: torch.Tensor, conv_state: torch.Tensor, conv1d: torch.nn.Conv1d) -> torch.Tensor:
    """
    Depthwise causal convolution that knows its past.

    Args:
        x (`torch.Tensor` of shape `(b, d, l)`): input.
        conv_state (`torch.Tensor` of shape `(b, d, k)`): the `k` inputs before it, `k` being the kernel's width.
        conv1d (`torch.nn.Conv1d`): the convolution, without padding. The module is called, not its weight read, so
            that hooks (offloading, adapters) see it.

    Returns:
        `torch.Tensor` of shape `(b, d, l)`.
    """
    # A kernel of width k sees k - 1 tokens of the past; the state holds one more, as Transformers' caches do.
    return conv1d(torch.cat([conv_state[..., 1:].to(x.dtype), x], dim=-1))


__all__ = ["causal_conv1d", "selective_scan", "selective_scan_reference"]
