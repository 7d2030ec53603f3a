# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
The selective scan in PyTorch, in blocks of tokens and groups of channels that stay in a CPU's cache; any device. For
symbols and arguments see [`selective_scan`].
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .causal_conv1d_longllava import sequence_starts


# Channels times states that are advanced at a time, and values of a block of tokens: on a CPU, few enough for its
# cache, and enough that an operation takes longer than to start it.
_BUSY_STATES = 1 << 16
_BLOCK_VALUES = 1 << 20
_SHORTEST_BLOCK, _LONGEST_BLOCK = 16, 128
# Values, and tokens, of one input that are turned into rows of time at once, for several blocks: a cache line is many
# tokens.
_STRETCH_VALUES, _LONGEST_STRETCH = 1 << 18, 256


def state_dtype(u: torch.Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _time_first(x: torch.Tensor) -> torch.Tensor:
    """`(b, c, l)` as `(l, b, c)`, in memory too."""
    if x.stride(1) == 1:  # as a linear layer leaves it
        return x.permute(2, 0, 1).contiguous()
    # PyTorch transposes by tiles that suit the cache, but only whole matrices.
    matrices = [matrix.contiguous().t().contiguous() for matrix in x]
    return matrices[0].unsqueeze(1) if len(matrices) == 1 else torch.stack(matrices, dim=1)


class _Scratch:
    """
    Memory for the states of one block after another: to allocate it resets would cost more than to fill it, and to take it
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

    def __init__(self, tensors: dict, tokens: slice, channels: slice, scratch: _Scratch):
        dtype, self.scratch = tensors["A"].dtype, scratch

        def take(name: str) -> torch.Tensor:
            x = tensors[name][:, channels if name in ("u", "delta", "z") else slice(None), tokens]
            return _time_first(x).to(dtype)

        self.u, self.B, self.C = take("u"), take("B").unsqueeze(-1), take("C").unsqueeze(-1)
        self.A = tensors["A"][:, channels]  # (n, d)
        self.D, self.z, self.dt = tensors["D"][channels], take("z"), F.softplus(take("delta"))
        self.drive = self.dt * self.u
        self.carries_on = None
        if tensors["resets"] is not None:
            self.carries_on = ~tensors["resets"][:, tokens].T[:, :, None, None]

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
        return y.addcmul_(self.u[tokens], self.D)

    def gated(self, y: torch.Tensor) -> torch.Tensor:
        return y.mul_(F.silu(self.z))


def _block_sizes(batch: int, channels: int, states: int, length: int) -> tuple[int, int, int]:
    """Channels of a group, tokens of a block, and tokens of a stretch of blocks."""
    group = min(channels, max(1, _BUSY_STATES // (batch * states)))
    block = _BLOCK_VALUES // (batch * states * group)
    block = min(max(block, _SHORTEST_BLOCK), _LONGEST_BLOCK, length)
    return group, block, block * max(1, min(_STRETCH_VALUES // (batch * group), _LONGEST_STRETCH) // block)


def _output_buffer(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A buffer for some of the output `(b, d, l)`, time first: a view of it, if that is how it lies in memory."""
    y = y.permute(2, 0, 1)
    # Compiled, operations write to whole tensors only.
    if y.stride(-1) == 1 and y.dtype == dtype and not torch.compiler.is_compiling():
        return y
    return torch.empty(y.shape, dtype=dtype, device=y.device)


def _prepare(u, delta, A, B, C, D, z, seq_idx) -> dict[str, Any]:
    """What is small in the dtype of the state; what is long as it is."""
    dtype = state_dtype(u)
    resets = None if seq_idx is None else sequence_starts(seq_idx)
    small = {"A": A.to(dtype).T.contiguous(), "D": D.to(dtype), "resets": resets}
    return {"u": u, "delta": delta, "B": B, "C": C, "z": z, **small}


class BlockedScan(torch.autograd.Function):
    """The scan in blocks of tokens and groups of channels; see [`selective_scan`] for the arguments."""

    @staticmethod
    def forward(ctx: Any, u, delta, A, B, C, D, z, initial_state, seq_idx):
        dtype = state_dtype(u)
        (batch, channels, length), states = u.shape, A.shape[1]
        tensors = _prepare(u, delta, A, B, C, D, z, seq_idx)
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
                now = _Block(tensors, tokens, part, scratch)
                output = _output_buffer(y[:, part, tokens], dtype)
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
            ctx.save_for_backward(u, delta, A, B, C, D, z, initial_state, seq_idx, *starts)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor, grad_final_state: torch.Tensor):
        with torch.autocast(grad_y.device.type, enabled=False):
            return BlockedScan._backward(ctx, grad_y, grad_final_state)

    @staticmethod
    def _backward(ctx: Any, grad_y: torch.Tensor, grad_final_state: torch.Tensor):
        u, delta, A, B, C, D, z, initial_state, seq_idx, *starts = ctx.saved_tensors
        dtype = state_dtype(u)
        (batch, channels, length), states = u.shape, A.shape[1]
        tensors = _prepare(u, delta, A, B, C, D, z, seq_idx)
        grad_u, grad_delta, grad_z = (torch.empty_like(x) for x in (u, delta, z))
        # Sums over channels or tokens, in the dtype of the state.
        grad_A, grad_D = torch.zeros_like(tensors["A"]), torch.zeros_like(tensors["D"])
        grad_B, grad_C = u.new_zeros(2, length, batch, states, dtype=dtype)
        grad_state = u.new_empty(batch, channels, states, dtype=dtype)
        group, block, stretch = _block_sizes(batch, channels, states, length)
        scratch = _Scratch(3, block * batch * states * group, u, dtype)
        for first in reversed(range(0, channels, group)):
            part = slice(first, first + group)
            carry = grad_final_state[:, part].to(dtype).transpose(1, 2).contiguous()  # of the state after the block
            for start in reversed(range(0, length, stretch)):
                tokens = slice(start, start + stretch)
                now = _Block(tensors, tokens, part, scratch)
                grad_gated = _time_first(grad_y[:, part, tokens]).to(dtype)
                grad = grad_gated * F.silu(now.z)
                y, grad_drive, grad_dt = (torch.empty_like(grad) for _ in range(3))
                for first_token in reversed(range(0, len(grad), block)):
                    inner = slice(first_token, first_token + block)
                    whole = slice(start + first_token, start + first_token + block)  # the same, in the whole sequence
                    state = starts.pop()
                    decay, h = now.states(state, inner)
                    now.read(h, inner, out=y[inner])

                    # The recurrence backwards: what the output and the next token want of each state.
                    each_decay, (grad_h, each_grad) = now.buffer(0, inner)[1], now.buffer(2, inner)
                    torch.mul(grad[inner].unsqueeze(2), now.C[inner], out=grad_h)
                    carry = each_grad[-1].add_(carry)
                    for grad_t, decay_after in zip(each_grad[-2::-1], each_decay[:0:-1]):
                        carry = grad_t.addcmul_(carry, decay_after)
                    carry = carry * decay[0]

                    # Rows on the left of a product: with columns on the right of it, PyTorch takes ten times as long.
                    grad_C[whole] += (grad[inner].unsqueeze(2) @ h.transpose(2, 3)).squeeze(2)
                    grad_B[whole] += (now.drive[inner].unsqueeze(2) @ grad_h.transpose(2, 3)).squeeze(2)
                    torch.matmul(now.B[inner].transpose(2, 3), grad_h, out=grad_drive[inner].unsqueeze(2))
                    # In place of the decay, the gradient of its exponent; the states are not needed any more.
                    decay[1:] *= h[:-1]
                    decay[0] *= state
                    decay *= grad_h
                    torch.sum(torch.mul(decay, now.A, out=h), 2, out=grad_dt[inner])
                    grad_A[:, part] += decay.mul_(now.dt[inner].unsqueeze(2)).sum((0, 1))

                grad_dt.addcmul_(grad_drive, now.u)
                grad_dt *= -torch.expm1(-now.dt)  # the softplus' slope, told from its value
                grad_delta[:, part, tokens] = grad_dt.permute(1, 2, 0)
                grad_z[:, part, tokens] = torch.ops.aten.silu_backward(y.mul_(grad_gated), now.z).permute(1, 2, 0)
                grad_D[part] += (grad * now.u).sum((0, 1))
                grad_u[:, part, tokens] = grad_drive.mul_(now.dt).addcmul_(grad, now.D).permute(1, 2, 0)
            grad_state[:, part] = carry.transpose(1, 2)
        grad_B, grad_C = (grad.permute(1, 2, 0) for grad in (grad_B, grad_C))
        sums = zip((grad_A.T, grad_B, grad_C, grad_D, grad_state), (A, B, C, D, initial_state))
        *grad_sums, grad_initial = (None if x is None else grad.to(x.dtype) for grad, x in sums)
        return grad_u, grad_delta, *grad_sums, grad_z, grad_initial, None


def allocate_block(y, u, delta, A, B, C, D, z, seq_idx) -> None:
    """On `meta`, for an output `y`: the tensors that [`BlockedScan`] makes for one stretch of tokens, its most at a time."""
    dtype = state_dtype(u)
    (batch, channels, length), states = u.shape, A.shape[1]
    group, block, stretch = _block_sizes(batch, channels, states, length)
    scratch = _Scratch(2, block * batch * states * group, u, dtype)
    tensors = _prepare(u, delta, A, B, C, D, z, seq_idx)
    now = _Block(tensors, slice(stretch), slice(group), scratch)
    now.gated(_output_buffer(y[:, :group, :stretch], dtype))


__all__ = ["BlockedScan", "allocate_block", "state_dtype"]
