# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
The recurrence of a Mamba layer (arXiv 2312.00752, section 3) and the convolution before it, as functions from a state to
a state.

Symbols, used throughout: `b` batch, `d` channels (`d_inner`), `n` states of a channel (`d_state`), `l` length.
With `dt = softplus(delta + delta_bias)`, token by token and for every channel and state:

    h[t] = exp(dt[t] * A) * h[t-1] + dt[t] * B[t] * u[t]
    y[t] = (sum over n of C[t] * h[t]  +  D * u[t]) * silu(z[t])

A token whose `dt` is 0 leaves the state as it was, which is how padding is skipped; where `seq_idx` changes, `h[t-1]` is
taken to be 0, which is how samples share a row. Every function takes the state before the first token and can give back
the one after the last, so a sequence may be cut anywhere. States are float32 (float64 where the inputs are). Nothing is
ever divided by a decay, so no step size can overflow.

One contract, [`selective_scan`], and behind it:

- `"reference"`: the equations as they stand, token by token.
- `"torch"`: in blocks of tokens that stay in a CPU's cache; any device.
- `"triton"`: the same on a GPU, in one launch.
- `"mamba_ssm"`: the package's kernel, for what it knows: no initial state, no boundaries.

All but the reference keep, for the backward pass, one state for each block of tokens and compute the others again.
"""

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .grouped_linear_longllava import has_triton_kernels, planned_device


try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels below are then never reached
    triton = None

# Channels times states that are advanced at a time, and values of a block of tokens: on a CPU, few enough for its
# cache, and enough that an operation takes longer than to start it.
_BUSY_STATES = 1 << 16
_BLOCK_VALUES = 1 << 20
_SHORTEST_BLOCK, _LONGEST_BLOCK = 16, 128
# Values, and tokens, of one input that are turned into rows of time at once, for several blocks: a cache line is many
# tokens.
_STRETCH_VALUES, _LONGEST_STRETCH = 1 << 18, 256


def _state_dtype(u: torch.Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def starts_anew(seq_idx: torch.Tensor) -> torch.Tensor:
    """Where another sequence begins than the token before belongs to, `(b, l)`. The first token continues what was."""
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))


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
    seq_idx: torch.Tensor | None = None,
    return_final_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The equations above, one token after the other. Same arguments and results as [`selective_scan`]."""
    output_dtype, dtype = u.dtype, _state_dtype(u)
    u, delta, A, B, C = (x.to(dtype) for x in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    state = u.new_zeros(*u.shape[:2], A.shape[1]) if initial_state is None else initial_state.to(dtype)
    anew = None if seq_idx is None else starts_anew(seq_idx)
    outputs = []
    for t in range(u.shape[-1]):
        dt = delta[:, :, t, None]  # (b, d, 1)
        if anew is not None:
            state = torch.where(anew[:, t, None, None], 0.0, state)
        state = torch.exp(dt * A) * state + dt * B[:, None, :, t] * u[:, :, t, None]  # (b, d, n)
        outputs.append((state * C[:, None, :, t]).sum(-1))
    y = torch.stack(outputs, dim=-1)
    if D is not None:
        y = y + u * D.to(dtype)[:, None]
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(output_dtype)
    return (y, state) if return_final_state else y


def _time_first(x: torch.Tensor) -> torch.Tensor:
    """`(b, c, l)` as `(l, b, c)`, in memory too."""
    if x.stride(1) == 1:  # as a linear layer leaves it
        return x.permute(2, 0, 1).contiguous()
    # PyTorch transposes by tiles that suit the cache, but only whole matrices.
    matrices = [matrix.contiguous().t().contiguous() for matrix in x]
    return matrices[0].unsqueeze(1) if len(matrices) == 1 else torch.stack(matrices, dim=1)


class _Scratch:
    """
    Memory for the states of one block after another: to allocate it anew would cost more than to fill it, and to take it
    apart into tokens as much as to advance some of them.
    """

    def __init__(self, buffers: int, values: int, like: torch.Tensor, dtype: torch.dtype):
        self.memory = like.new_empty(buffers, values, dtype=dtype)
        self.pieces: dict[tuple[int, ...], tuple[torch.Tensor, tuple[torch.Tensor, ...]]] = {}

    def piece(self, number: int, *shape: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Part of a buffer as a tensor, and its tokens one by one."""
        key = (number, *shape)
        if key not in self.pieces:
            piece = self.memory[number, : math.prod(shape)].view(shape)
            self.pieces[key] = piece, piece.unbind(0)
        return self.pieces[key]


class _Block:
    """
    One block of tokens for some of the channels, time first: `(l, b, d)`, and `(l, b, n, d)` where there are states.
    Everything that a whole sequence of would be too large is made here, and gone with it.
    """

    def __init__(
        self,
        tensors: dict[str, Any],
        tokens: slice,
        channels: slice,
        delta_softplus: bool,
        scratch: _Scratch,
    ):
        dtype, self.scratch = tensors["A"].dtype, scratch

        def take(name: str) -> torch.Tensor:
            x = tensors[name][:, channels if name in ("u", "delta", "z") else slice(None), tokens]
            return _time_first(x).to(dtype)

        self.u, self.B, self.C = take("u"), take("B").unsqueeze(-1), take("C").unsqueeze(-1)
        self.A = tensors["A"][:, channels]  # (n, d)
        self.D: Any = None if tensors["D"] is None else tensors["D"][channels]
        self.z: Any = None if tensors["z"] is None else take("z")
        step = take("delta")
        if tensors["delta_bias"] is not None:
            step = step + tensors["delta_bias"][channels]  # not in place: it may be the input itself
        self.dt = F.softplus(step) if delta_softplus else step
        del step
        self.drive = self.dt * self.u
        self.carries_on = None
        if tensors["anew"] is not None:
            self.carries_on = ~tensors["anew"][:, tokens].T[:, :, None, None]

    def buffer(self, number: int, tokens: slice = slice(None)) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Memory for `(l, b, n, d)`, and for each token of it."""
        return self.scratch.piece(number, *self.dt[tokens].shape[:2], *self.A.shape)

    def states(self, state: torch.Tensor, tokens: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """The decay of each of these tokens and the state after it, from the state `(b, n, d)` before the first."""
        (decay, each_decay), (states, each_state) = (self.buffer(i, tokens) for i in range(2))
        torch.mul(self.dt[tokens].unsqueeze(2), self.A, out=decay).exp_()
        if self.carries_on is not None:
            decay *= self.carries_on[tokens]
        torch.mul(self.drive[tokens].unsqueeze(2), self.B[tokens], out=states)
        for decay_t, state_t in zip(each_decay, each_state):
            state = state_t.addcmul_(decay_t, state)
        return decay, states

    def read(self, states: torch.Tensor, tokens: slice = slice(None), out: torch.Tensor | None = None) -> torch.Tensor:
        """The output `(l, b, d)`, not yet gated."""
        C = self.C[tokens].transpose(2, 3)
        y = torch.matmul(C, states, out=None if out is None else out.unsqueeze(2)).squeeze(2)
        return y if self.D is None else y.addcmul_(self.u[tokens], self.D)

    def gated(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.z is None else y.mul_(F.silu(self.z))


def _block_sizes(batch: int, channels: int, states: int, length: int) -> tuple[int, int, int]:
    """Channels of a group, tokens of a block, and tokens of a stretch of blocks."""
    group = min(channels, max(1, _BUSY_STATES // (batch * states)))
    block = _BLOCK_VALUES // (batch * states * group)
    block = min(max(block, _SHORTEST_BLOCK), _LONGEST_BLOCK, length)
    return group, block, block * max(1, min(_STRETCH_VALUES // (batch * group), _LONGEST_STRETCH) // block)


def _room_for(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where to put some of the output `(b, d, l)` time first: where it belongs, if that is how it lies in memory."""
    y = y.permute(2, 0, 1)
    if (
        y.stride(-1) == 1 and y.dtype == dtype and not torch.compiler.is_compiling()
    ):  # which writes to whole tensors only
        return y
    return torch.empty(y.shape, dtype=dtype, device=y.device)


def _prepare(u, delta, A, B, C, D, z, delta_bias, seq_idx) -> dict[str, Any]:
    """What is small in the dtype of the state; what is long as it is."""
    dtype = _state_dtype(u)
    return {
        "u": u,
        "delta": delta,
        "A": A.to(dtype).T.contiguous(),
        "B": B,
        "C": C,
        "D": None if D is None else D.to(dtype),
        "z": z,
        "delta_bias": None if delta_bias is None else delta_bias.to(dtype),
        "anew": None if seq_idx is None else starts_anew(seq_idx),
    }


class _BlockedScan(torch.autograd.Function):
    """The scan in blocks of tokens and groups of channels; see [`selective_scan`] for the arguments."""

    @staticmethod
    def forward(ctx: Any, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx):
        dtype = _state_dtype(u)
        (batch, channels, length), states = u.shape, A.shape[1]
        tensors = _prepare(u, delta, A, B, C, D, z, delta_bias, seq_idx)
        group, block, stretch = _block_sizes(batch, channels, states, length)
        scratch = _Scratch(2, block * batch * states * group, u, dtype)
        y = torch.empty_like(u)
        final_state = u.new_empty(batch, channels, states, dtype=dtype)
        starts = []
        for first in range(0, channels, group):
            part = slice(first, first + group)
            if initial_state is None:
                state = u.new_zeros(batch, states, min(group, channels - first), dtype=dtype)
            else:
                state = initial_state[:, part].to(dtype).transpose(1, 2).contiguous()
            for start in range(0, length, stretch):
                tokens = slice(start, start + stretch)
                now = _Block(tensors, tokens, part, delta_softplus, scratch)
                output = _room_for(y[:, part, tokens], dtype)
                for first_token in range(0, len(output), block):
                    if any(ctx.needs_input_grad):
                        starts.append(state)
                    inner = slice(first_token, first_token + block)
                    all_states = now.states(state, inner)[1]
                    now.read(all_states, inner, out=output[inner])
                    state = all_states[-1].clone()
                y[:, part, tokens] = now.gated(output).permute(1, 2, 0)
                del now, output  # before the next ones are made
            final_state[:, part] = state.transpose(1, 2)
        if starts:
            ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, *starts)
            ctx.delta_softplus = delta_softplus
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor, grad_final_state: torch.Tensor):
        with torch.autocast(grad_y.device.type, enabled=False):
            return _BlockedScan._backward(ctx, grad_y, grad_final_state)

    @staticmethod
    def _backward(ctx: Any, grad_y: torch.Tensor, grad_final_state: torch.Tensor):
        u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, *starts = ctx.saved_tensors
        dtype = _state_dtype(u)
        (batch, channels, length), states = u.shape, A.shape[1]
        tensors = _prepare(u, delta, A, B, C, D, z, delta_bias, seq_idx)
        grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
        grad_z: Any = None if z is None else torch.empty_like(z)
        # Sums over channels or tokens, in the dtype of the state.
        grad_A, grad_B, grad_C = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (A.T, B, C))
        grad_D, grad_bias = (u.new_zeros(channels, dtype=dtype) for _ in range(2))
        grad_state = u.new_empty(batch, channels, states, dtype=dtype)
        group, block, _ = _block_sizes(batch, channels, states, length)
        scratch = _Scratch(3, block * batch * states * group, u, dtype)
        blocks = range(0, length, block)
        for first in range(0, channels, group):
            part = slice(first, first + group)
            carry = grad_final_state[:, part].to(dtype).transpose(1, 2).contiguous()  # of the state after the block
            for number in reversed(range(len(blocks))):
                tokens = slice(blocks[number], blocks[number] + block)
                now = _Block(tensors, tokens, part, ctx.delta_softplus, scratch)
                start = starts[first // group * len(blocks) + number]
                decay, h = now.states(start)
                grad = _time_first(grad_y[:, part, tokens]).to(dtype)
                if z is not None:
                    gate = torch.sigmoid(now.z)
                    slope = gate * (1 + now.z * (1 - gate))  # of silu
                    grad_z[:, part, tokens] = (grad * now.read(h) * slope).permute(1, 2, 0)
                    grad = grad * now.z * gate

                # The recurrence backwards: what the output and the next token want of each state.
                each_decay, (grad_h, each_grad) = now.buffer(0)[1], now.buffer(2)
                torch.mul(grad.unsqueeze(2), now.C, out=grad_h)
                carry = each_grad[-1].add_(carry)
                for grad_t, decay_after in zip(each_grad[-2::-1], each_decay[:0:-1]):
                    carry = grad_t.addcmul_(carry, decay_after)
                carry = carry * decay[0]

                grad_C[:, :, tokens] += (h @ grad.unsqueeze(-1)).squeeze(-1).permute(1, 2, 0)
                grad_B[:, :, tokens] += (grad_h @ now.drive.unsqueeze(-1)).squeeze(-1).permute(1, 2, 0)
                grad_drive = (now.B.transpose(2, 3) @ grad_h).squeeze(2)
                # In place of the decay, the gradient of its exponent.
                decay[1:] *= h[:-1]
                decay[0] *= start
                decay *= grad_h
                grad_dt = grad_drive * now.u
                for exponent, rate in zip(decay.unbind(2), now.A):
                    grad_dt.addcmul_(exponent, rate)
                grad_A[:, part] += (decay.mul_(now.dt.unsqueeze(2))).sum((0, 1))

                grad_u_now = grad_drive * now.dt
                if D is not None:
                    grad_u_now.addcmul_(grad, now.D)
                    grad_D[part] += (grad * now.u).sum((0, 1))
                if ctx.delta_softplus:
                    grad_dt *= -torch.expm1(-now.dt)  # the softplus' slope, told from its value
                grad_bias[part] += grad_dt.sum((0, 1))
                grad_u[:, part, tokens] = grad_u_now.permute(1, 2, 0)
                grad_delta[:, part, tokens] = grad_dt.permute(1, 2, 0)
            grad_state[:, part] = carry.transpose(1, 2)
        return (
            grad_u,
            grad_delta,
            grad_A.T.to(A.dtype),
            grad_B.to(B.dtype),
            grad_C.to(C.dtype),
            None if D is None else grad_D.to(D.dtype),
            grad_z,
            None if delta_bias is None else grad_bias.to(delta_bias.dtype),
            None,
            None if initial_state is None else grad_state.to(initial_state.dtype),
            None,
        )


if triton is not None:

    @triton.jit
    def _softplus(x):
        # log(1 + w) for a w that may be tiny, without losing it in the sum.
        w = tl.exp(-tl.abs(x))
        total = 1.0 + w
        return tl.maximum(x, 0.0) + tl.where(
            total == 1.0, w, tl.log(total) * w / tl.where(total == 1.0, 1.0, total - 1.0)
        )

    @triton.jit
    def _scan_kernel(
        u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, anew_ptr, state_ptr, y_ptr, final_ptr, starts_ptr,
        channels, states, length,
        u_b, u_d, u_l, delta_b, delta_d, delta_l, z_b, z_d, z_l, y_b, y_d, y_l, B_b, B_n, B_l, C_b, C_n, C_l,
        HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
        HAS_ANEW: tl.constexpr, SAVE: tl.constexpr, SOFTPLUS: tl.constexpr,
        BLOCK: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """All tokens of one row for `BLOCK` channels, whose states stay in registers."""
        batch = tl.program_id(1).to(tl.int64)
        d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        n = tl.arange(0, STATES)
        is_channel, is_state = d < channels, n < states
        is_both = is_state[:, None] & is_channel[None, :]
        of_state = n[:, None] * channels + d[None, :]
        size = states * channels
        A = tl.load(A_ptr + of_state, mask=is_both, other=0.0)
        h = tl.zeros((STATES, BLOCK), dtype=tl.float32)
        if HAS_STATE:
            h = tl.load(state_ptr + batch * size + of_state, mask=is_both, other=0.0)
        D = tl.load(D_ptr + d, mask=is_channel, other=0.0) if HAS_D else 0.0
        bias = tl.load(bias_ptr + d, mask=is_channel, other=0.0) if HAS_BIAS else 0.0
        d = d.to(tl.int64)
        u_ptr += batch * u_b + d * u_d
        delta_ptr += batch * delta_b + d * delta_d
        y_ptr += batch * y_b + d * y_d
        if HAS_Z:
            z_ptr += batch * z_b + d * z_d
        B_ptr += batch * B_b + n * B_n
        C_ptr += batch * C_b + n * C_n
        chunks = tl.cdiv(length, CHUNK)
        for t in tl.range(0, length, num_stages=4):
            at = tl.cast(t, tl.int64)
            if SAVE:  # noqa: SIM102 (a constant for the compiler)
                if t % CHUNK == 0:
                    tl.store(starts_ptr + (batch * chunks + t // CHUNK) * size + of_state, h, mask=is_both)
            u = tl.load(u_ptr + at * u_l, mask=is_channel, other=0.0).to(tl.float32)
            dt = tl.load(delta_ptr + at * delta_l, mask=is_channel, other=0.0).to(tl.float32) + bias
            B = tl.load(B_ptr + at * B_l, mask=is_state, other=0.0).to(tl.float32)
            C = tl.load(C_ptr + at * C_l, mask=is_state, other=0.0).to(tl.float32)
            if SOFTPLUS:
                dt = _softplus(dt)
            decay = tl.exp(A * dt[None, :])
            if HAS_ANEW:
                decay = tl.where(tl.load(anew_ptr + batch * length + t) != 0, 0.0, decay)
            h = decay * h + B[:, None] * (dt * u)[None, :]
            y = tl.sum(C[:, None] * h, axis=0) + D * u
            if HAS_Z:
                z = tl.load(z_ptr + at * z_l, mask=is_channel, other=0.0).to(tl.float32)
                y *= z * tl.sigmoid(z)
            tl.store(y_ptr + at * y_l, y.to(y_ptr.dtype.element_ty), mask=is_channel)
        tl.store(final_ptr + batch * size + of_state, h, mask=is_both)

    @triton.jit
    def _scan_backward_kernel(
        u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, anew_ptr, starts_ptr, scratch_ptr,
        grad_y_ptr, grad_final_ptr,
        grad_u_ptr, grad_delta_ptr, grad_A_ptr, grad_B_ptr, grad_C_ptr, grad_D_ptr, grad_z_ptr, grad_bias_ptr,
        grad_state_ptr,
        channels, states, length,
        u_b, u_d, u_l, delta_b, delta_d, delta_l, z_b, z_d, z_l, y_b, y_d, y_l, B_b, B_n, B_l, C_b, C_n, C_l,
        grad_u_b, grad_u_d, grad_u_l, grad_delta_b, grad_delta_d, grad_delta_l, grad_z_b, grad_z_d, grad_z_l,
        HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ANEW: tl.constexpr,
        SOFTPLUS: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """
        Chunk after chunk from the last: its states once more from the one before it, into scratch memory that is this
        program's own; then the recurrence backwards. Sums over channels are left to the caller, a term for each block.
        """
        batch = tl.program_id(1).to(tl.int64)
        program = batch * tl.num_programs(0) + tl.program_id(0)
        d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        n = tl.arange(0, STATES)
        is_channel, is_state = d < channels, n < states
        is_both = is_state[:, None] & is_channel[None, :]
        of_state = n[:, None] * channels + d[None, :]
        of_scratch = n[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        size = states * channels
        A = tl.load(A_ptr + of_state, mask=is_both, other=0.0)
        D = tl.load(D_ptr + d, mask=is_channel, other=0.0) if HAS_D else 0.0
        bias = tl.load(bias_ptr + d, mask=is_channel, other=0.0) if HAS_BIAS else 0.0
        of_channel = batch * channels + d
        d = d.to(tl.int64)
        u_ptr += batch * u_b + d * u_d
        delta_ptr += batch * delta_b + d * delta_d
        if HAS_Z:
            z_ptr += batch * z_b + d * z_d
            grad_z_ptr += batch * grad_z_b + d * grad_z_d
        grad_y_ptr += batch * y_b + d * y_d
        grad_u_ptr += batch * grad_u_b + d * grad_u_d
        grad_delta_ptr += batch * grad_delta_b + d * grad_delta_d
        B_ptr += batch * B_b + n * B_n
        C_ptr += batch * C_b + n * C_n
        grad_B_ptr += program * length * states + n
        grad_C_ptr += program * length * states + n
        scratch_ptr += program * CHUNK * STATES * BLOCK

        carry = tl.load(grad_final_ptr + batch * size + of_state, mask=is_both, other=0.0)
        grad_A = tl.zeros((STATES, BLOCK), dtype=tl.float32)
        grad_D = tl.zeros((BLOCK,), dtype=tl.float32)
        grad_bias = tl.zeros((BLOCK,), dtype=tl.float32)
        chunks = tl.cdiv(length, CHUNK)
        for back in range(0, chunks):
            chunk = chunks - 1 - back
            first = chunk * CHUNK
            count = tl.minimum(CHUNK, length - first)
            start = tl.load(starts_ptr + (batch * chunks + chunk) * size + of_state, mask=is_both, other=0.0)
            h = start
            for i in range(0, count):
                at = tl.cast(first + i, tl.int64)
                u = tl.load(u_ptr + at * u_l, mask=is_channel, other=0.0).to(tl.float32)
                dt = tl.load(delta_ptr + at * delta_l, mask=is_channel, other=0.0).to(tl.float32) + bias
                B = tl.load(B_ptr + at * B_l, mask=is_state, other=0.0).to(tl.float32)
                if SOFTPLUS:
                    dt = _softplus(dt)
                decay = tl.exp(A * dt[None, :])
                if HAS_ANEW:
                    decay = tl.where(tl.load(anew_ptr + batch * length + at) != 0, 0.0, decay)
                h = decay * h + B[:, None] * (dt * u)[None, :]
                tl.store(scratch_ptr + i * STATES * BLOCK + of_scratch, h)
            tl.debug_barrier()
            for i_back in range(0, count):
                i = count - 1 - i_back
                at = tl.cast(first + i, tl.int64)
                u = tl.load(u_ptr + at * u_l, mask=is_channel, other=0.0).to(tl.float32)
                step = tl.load(delta_ptr + at * delta_l, mask=is_channel, other=0.0).to(tl.float32) + bias
                B = tl.load(B_ptr + at * B_l, mask=is_state, other=0.0).to(tl.float32)
                C = tl.load(C_ptr + at * C_l, mask=is_state, other=0.0).to(tl.float32)
                grad = tl.load(grad_y_ptr + at * y_l, mask=is_channel, other=0.0).to(tl.float32)
                dt = step
                if SOFTPLUS:
                    dt = _softplus(step)
                decay = tl.exp(A * dt[None, :])
                if HAS_ANEW:
                    decay = tl.where(tl.load(anew_ptr + batch * length + at) != 0, 0.0, decay)
                h = tl.load(scratch_ptr + i * STATES * BLOCK + of_scratch)
                # Not read before the chunk's second token: the first one's past is `start`.
                before = tl.load(scratch_ptr + tl.maximum(i - 1, 0) * STATES * BLOCK + of_scratch)
                before = tl.where(i == 0, start, before)
                if HAS_Z:
                    z = tl.load(z_ptr + at * z_l, mask=is_channel, other=0.0).to(tl.float32)
                    gate = tl.sigmoid(z)
                    y = tl.sum(C[:, None] * h, axis=0) + D * u
                    grad_z = grad * y * gate * (1.0 + z * (1.0 - gate))
                    tl.store(grad_z_ptr + at * grad_z_l, grad_z.to(grad_z_ptr.dtype.element_ty), mask=is_channel)
                    grad *= z * gate
                grad_h = C[:, None] * grad[None, :] + carry
                tl.store(grad_C_ptr + at * states, tl.sum(h * grad[None, :], axis=1), mask=is_state)
                tl.store(grad_B_ptr + at * states, tl.sum(grad_h * (dt * u)[None, :], axis=1), mask=is_state)
                grad_drive = tl.sum(grad_h * B[:, None], axis=0)
                carry = grad_h * decay
                exponent = carry * before
                grad_A += exponent * dt[None, :]
                grad_dt = grad_drive * u + tl.sum(exponent * A, axis=0)
                grad_u = grad_drive * dt
                if HAS_D:
                    grad_u += grad * D
                    grad_D += grad * u
                if SOFTPLUS:
                    grad_dt *= tl.sigmoid(step)
                grad_bias += grad_dt
                tl.store(grad_u_ptr + at * grad_u_l, grad_u.to(grad_u_ptr.dtype.element_ty), mask=is_channel)
                tl.store(
                    grad_delta_ptr + at * grad_delta_l, grad_dt.to(grad_delta_ptr.dtype.element_ty), mask=is_channel
                )
            tl.debug_barrier()
        tl.store(grad_state_ptr + batch * size + of_state, carry, mask=is_both)
        tl.store(grad_A_ptr + batch * size + of_state, grad_A, mask=is_both)
        tl.store(grad_D_ptr + of_channel, grad_D, mask=is_channel)
        tl.store(grad_bias_ptr + of_channel, grad_bias, mask=is_channel)


# Tokens between two states that are kept for the backward pass, and what the kernels' programs hold.
_CHUNK = 64
_KERNEL_CHANNELS, _KERNEL_WARPS = 32, 1


class _TritonScan(torch.autograd.Function):
    """The scan on a GPU; see [`selective_scan`] for the arguments. One token is the same kernel, made for that length."""

    @staticmethod
    def forward(ctx: Any, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx):
        (batch, channels, length), states = u.shape, A.shape[1]
        small = {"device": u.device, "dtype": torch.float32}
        A_, D_, bias = (None if x is None else x.float().contiguous() for x in (A.T, D, delta_bias))
        state = None if initial_state is None else initial_state.float().transpose(1, 2).contiguous()
        anew = None if seq_idx is None else starts_anew(seq_idx).to(torch.int8).contiguous()
        save = any(ctx.needs_input_grad)
        starts = torch.empty(batch, triton.cdiv(length, _CHUNK) if save else 0, states, channels, **small)
        y, final_state = torch.empty_like(u), torch.empty(batch, states, channels, **small)
        no_strides = (0, 0, 0)
        _scan_kernel[(triton.cdiv(channels, _KERNEL_CHANNELS), batch)](
            u, delta, A_, B, C, D_, z, bias, anew, state, y, final_state, starts,
            channels, states, length,
            *u.stride(), *delta.stride(), *(no_strides if z is None else z.stride()), *y.stride(), *B.stride(), *C.stride(),
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=bias is not None, HAS_STATE=state is not None,
            HAS_ANEW=anew is not None, SAVE=save, SOFTPLUS=delta_softplus,
            BLOCK=_KERNEL_CHANNELS, STATES=triton.next_power_of_2(states), CHUNK=_CHUNK, num_warps=_KERNEL_WARPS,
        )  # fmt: skip
        if save:
            ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, initial_state, anew, starts)
            ctx.delta_softplus = delta_softplus
        return y, final_state.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor, grad_final_state: torch.Tensor):
        u, delta, A, B, C, D, z, delta_bias, initial_state, anew, starts = ctx.saved_tensors
        (batch, channels, length), states = u.shape, A.shape[1]
        small = {"device": u.device, "dtype": torch.float32}
        A_, D_, bias = (None if x is None else x.float().contiguous() for x in (A.T, D, delta_bias))
        grad_final = grad_final_state.float().transpose(1, 2).contiguous()
        grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
        grad_z = None if z is None else torch.empty_like(z)
        no_strides = (0, 0, 0)
        programs = triton.cdiv(channels, _KERNEL_CHANNELS)
        padded = triton.next_power_of_2(states)
        scratch = torch.empty(batch, programs, _CHUNK, padded, _KERNEL_CHANNELS, **small)
        grad_A, grad_state = (torch.empty(batch, states, channels, **small) for _ in range(2))
        grad_B, grad_C = (torch.empty(batch, programs, length, states, **small) for _ in range(2))
        grad_D, grad_bias = (torch.empty(batch, channels, **small) for _ in range(2))
        _scan_backward_kernel[(programs, batch)](
            u, delta, A_, B, C, D_, z, bias, anew, starts, scratch, grad_y, grad_final,
            grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_state,
            channels, states, length,
            *u.stride(), *delta.stride(), *(no_strides if z is None else z.stride()), *grad_y.stride(), *B.stride(), *C.stride(),
            *grad_u.stride(), *grad_delta.stride(), *(no_strides if z is None else grad_z.stride()),
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=bias is not None, HAS_ANEW=anew is not None,
            SOFTPLUS=ctx.delta_softplus, BLOCK=_KERNEL_CHANNELS, STATES=padded, CHUNK=_CHUNK, num_warps=_KERNEL_WARPS,
        )  # fmt: skip
        return (
            grad_u,
            grad_delta,
            grad_A.sum(0).T.to(A.dtype),
            grad_B.sum(1).transpose(1, 2).to(B.dtype),
            grad_C.sum(1).transpose(1, 2).to(C.dtype),
            None if D is None else grad_D.sum(0).to(D.dtype),
            grad_z,
            None if delta_bias is None else grad_bias.sum(0).to(delta_bias.dtype),
            None,
            None if initial_state is None else grad_state.transpose(1, 2).to(initial_state.dtype),
            None,
        )


def _mamba_ssm_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    D, delta_bias = (None if x is None else x.float() for x in (D, delta_bias))
    delta, B, C = (x.to(u.dtype) for x in (delta, B, C))
    z = None if z is None else z.to(u.dtype)
    return selective_scan_fn(u, delta, A.float(), B, C, D, z, delta_bias, delta_softplus, return_last_state=True)


def _reference_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx):
    return selective_scan_reference(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx, return_final_state=True
    )


def _one_token(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx):
    """A step of the recurrence in a handful of operations, which `torch.compile` can fuse and autograd follow."""
    dtype = _state_dtype(u)
    dt, x = delta.to(dtype), u.to(dtype)  # (b, d, 1)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    state = (dt * x) * B.to(dtype).transpose(1, 2)
    if initial_state is not None:
        state = torch.addcmul(state, torch.exp(dt * A.to(dtype)), initial_state.to(dtype))
    y = state @ C.to(dtype)  # (b, d, 1)
    if D is not None:
        y = torch.addcmul(y, x, D.to(dtype)[:, None])
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), state


@torch.no_grad()
def _no_data(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx):
    """On `meta`: what the scan would allocate, and nothing else."""
    (batch, channels, length), states = u.shape, A.shape[1]
    y, final_state = torch.empty_like(u), u.new_empty(batch, channels, states, dtype=_state_dtype(u))
    if not has_triton_kernels(u):
        dtype = _state_dtype(u)
        group, block, stretch = _block_sizes(batch, channels, states, length)
        scratch = _Scratch(2, block * batch * states * group, u, dtype)
        tensors = _prepare(u, delta, A, B, C, D, z, delta_bias, seq_idx)
        now = _Block(tensors, slice(stretch), slice(group), delta_softplus, scratch)
        now.gated(_room_for(y[:, :group, :stretch], dtype))
    return y, final_state


def _no_tokens(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx):
    """Nothing happens to the state."""
    dtype = _state_dtype(u)
    if initial_state is None:
        initial_state = u.new_zeros(*u.shape[:2], A.shape[1], dtype=dtype)
    return u, initial_state.to(dtype)


_SCANS: dict[str, Callable] = {
    "reference": _reference_scan,
    "torch": _BlockedScan.apply,
    "triton": _TritonScan.apply,
    "mamba_ssm": _mamba_ssm_scan,
}
SCAN_IMPLEMENTATIONS = tuple(_SCANS)


def is_installed(package: str) -> bool:
    """Whether an optional package can be imported; it is not imported for that."""
    return importlib.util.find_spec(package) is not None


def choose_scan(
    u: torch.Tensor, has_state: bool = False, has_boundaries: bool = False, requested: str | None = None
) -> str:
    """
    Which of [`SCAN_IMPLEMENTATIONS`] a scan of `u` takes: the one that is requested, else the fastest there is.

    Args:
        u (`torch.Tensor`): of the device and dtype of the input.
        has_state, has_boundaries (`bool`): whether there is an initial state, or several sequences in a row.
        requested (`str`, *optional*): `"mamba_ssm"` stands for the next best where the package cannot do what is asked.

    Raises:
        ValueError: for a name that is not among them, or one that cannot run here.
    """
    if requested is not None and requested not in _SCANS:
        raise ValueError(f"`scan_implementation` must be one of {list(_SCANS)}, but is {requested!r}.")
    known_to_mamba_ssm = not has_state and not has_boundaries and u.dtype != torch.float64
    if requested in (None, "mamba_ssm") and u.is_cuda and known_to_mamba_ssm and is_installed("mamba_ssm"):
        return "mamba_ssm"
    if requested == "mamba_ssm" and not is_installed("mamba_ssm"):
        raise ValueError('`scan_implementation="mamba_ssm"` needs the package mamba-ssm, which is not installed.')
    if requested == "triton" and u.dtype == torch.float64:
        raise ValueError('`scan_implementation="triton"` computes in float32, but the input is float64.')
    if requested == "triton" and triton is None:
        raise ValueError('`scan_implementation="triton"` needs the package triton, which is not installed.')
    if requested in ("reference", "torch", "triton"):
        return requested
    return "triton" if has_triton_kernels(u) else "torch"


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
    seq_idx: torch.Tensor | None = None,
    return_final_state: bool = False,
    implementation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """
    The selective scan, with gradients for all inputs and memory for one value a token and channel, not for its states.

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
        seq_idx (`torch.Tensor` of shape `(b, l)`, *optional*): number of the sequence that each token belongs to; where
            it changes, the state starts from zero. The first token's sequence is the one that `initial_state` is of.
        return_final_state (`bool`, defaults to `False`): return the state after the last token too.
        implementation (`str`, *optional*): one of [`SCAN_IMPLEMENTATIONS`]; see [`choose_scan`].

    Returns:
        `torch.Tensor` of shape `(b, d, l)` in `u`'s dtype; with `return_final_state`, also the final state
        `(b, d, n)` in float32 (float64 for float64 inputs). Gradients have no gradients of their own.

    Raises:
        ValueError: as [`choose_scan`].
    """
    name = choose_scan(u, initial_state is not None, seq_idx is not None, implementation)
    scan = _SCANS[name]
    if u.is_meta:
        scan = _no_data
    elif u.numel() == 0:
        scan = _no_tokens
    elif u.shape[-1] == 1 and name == "torch":
        scan = _one_token
    arguments = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx)
    if not u.is_meta and torch.is_autocast_enabled(u.device.type):
        with torch.autocast(u.device.type, enabled=False):  # states are float32, whatever surrounds them
            y, final_state = scan(*arguments)
    else:
        y, final_state = scan(*arguments)
    return (y, final_state) if return_final_state else y


def causal_conv1d_reference(
    x: torch.Tensor,
    conv1d: torch.nn.Conv1d,
    initial_state: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
) -> torch.Tensor:
    """Token by token and tap by tap. Same arguments and result as [`causal_conv1d`]."""
    length, width = x.shape[-1], conv1d.kernel_size[0]
    past = x.new_zeros(*x.shape[:2], width) if initial_state is None else initial_state.to(x.dtype)
    inputs = torch.cat([past, x], dim=-1)
    outputs = []
    for t in range(length):
        y = torch.zeros_like(x[..., 0])
        for back in range(width):
            tap = inputs[..., width + t - back] * conv1d.weight[:, 0, -1 - back]
            if seq_idx is not None:
                same = seq_idx[:, max(t - back, 0)] == seq_idx[:, t]
                tap = torch.where(same[:, None], tap, 0)
            y = y + tap
        outputs.append(y if conv1d.bias is None else y + conv1d.bias)
    return torch.stack(outputs, dim=-1)


def _knows_causal_conv1d(x: torch.Tensor, conv1d: torch.nn.Module, has_both: bool) -> bool:
    # A module that an adapter or a quantiser put in its place has to be called.
    return (
        x.is_cuda
        and x.dtype != torch.float64
        and not has_both
        and type(conv1d) is torch.nn.Conv1d
        and conv1d.kernel_size[0] in (2, 3, 4)
        and x.shape[1] % 8 == 0
        and is_installed("causal_conv1d")
    )


def _convolve_time_first(x: torch.Tensor, conv1d: torch.nn.Conv1d, past: torch.Tensor) -> torch.Tensor:
    """On a CPU, tap by tap over rows of channels, as they come from and go to linear layers and the scan."""
    x, past = x.transpose(1, 2), past.transpose(1, 2)
    *earlier, now = conv1d.weight[:, 0].unbind(-1)
    y = x * now if conv1d.bias is None else torch.addcmul(conv1d.bias, x, now)
    for back, tap in enumerate(reversed(earlier), 1):
        y[:, back:].addcmul_(x[:, :-back], tap)
        y[:, :back].addcmul_(past[:, past.shape[1] - back :][:, : y.shape[1]], tap)
    return y.transpose(1, 2)


def causal_conv1d(
    x: torch.Tensor,
    conv1d: torch.nn.Conv1d,
    initial_state: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Depthwise causal convolution that knows its past.

    Args:
        x (`torch.Tensor` of shape `(b, d, l)`): input.
        conv1d (`torch.nn.Conv1d`): the convolution, `k` wide, without padding. If it is of another class, which an
            adapter or a quantiser put in its place, it is called and its weight not read.
        initial_state (`torch.Tensor` of shape `(b, d, k)`, *optional*): the `k` inputs before `x`, zero if not given.
        seq_idx (`torch.Tensor` of shape `(b, l)`, *optional*): number of the sequence that each token belongs to;
            nothing before the first token of a sequence is seen. `initial_state` belongs to the first.

    Returns:
        `torch.Tensor` of shape `(b, d, l)`.

    Raises:
        ValueError: if `initial_state` has another shape.
    """
    width = conv1d.kernel_size[0]
    if initial_state is not None and initial_state.shape != (*x.shape[:2], width):
        raise ValueError(
            f"`initial_state` must have the shape {(*x.shape[:2], width)}, but it is {tuple(initial_state.shape)}."
        )
    # A kernel of width k sees k - 1 tokens of the past; the state holds one more, as Transformers' caches do.
    past = None if initial_state is None else initial_state[..., 1:].to(x.dtype)
    if _knows_causal_conv1d(x, conv1d, has_both=past is not None and seq_idx is not None):
        from causal_conv1d import causal_conv1d_fn

        # Channels last, which the package demands wherever there is a past or a boundary.
        x, past = (None if t is None else t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, past))
        index = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
        return causal_conv1d_fn(x, conv1d.weight.squeeze(1), conv1d.bias, seq_idx=index, initial_states=past)
    if past is None:
        past = x.new_zeros(*x.shape[:2], width - 1)
    if seq_idx is None:
        kind = planned_device.get() if x.is_meta else x.device.type
        if kind == "cpu" and x.dtype in (torch.float32, torch.float64) and type(conv1d) is torch.nn.Conv1d:
            return _convolve_time_first(x, conv1d, past)
        return conv1d(torch.cat([past, x], dim=-1))
    # Sequences are moved apart, so that each has zeros before it, and their outputs gathered.
    place = torch.arange(x.shape[-1], device=x.device) + (width - 1) * (1 + starts_anew(seq_idx).cumsum(-1))
    apart = x.new_zeros(*x.shape[:2], int(place.max()) + 1)
    apart[..., : width - 1] = past
    place = place.unsqueeze(1).expand(-1, x.shape[1], -1)
    return conv1d(apart.scatter(2, place, x)).gather(2, place - (width - 1))


__all__ = [
    "SCAN_IMPLEMENTATIONS",
    "causal_conv1d",
    "causal_conv1d_reference",
    "choose_scan",
    "selective_scan",
    "selective_scan_reference",
    "starts_anew",
]
