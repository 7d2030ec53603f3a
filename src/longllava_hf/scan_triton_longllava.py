# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""The selective scan on a GPU, in one launch. For symbols and arguments see [`selective_scan`]."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .causal_conv1d_longllava import sequence_starts


try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels below are then never reached
    triton = None

# Tokens between two states that are kept for the backward pass, and what the kernels' programs hold.
_CHUNK = 64
_KERNEL_CHANNELS, _KERNEL_WARPS = 32, 1


if triton is not None:

    @triton.jit
    def _softplus(x):
        # log(1 + w) for a w that may be tiny, without losing it in the sum.
        w = tl.exp(-tl.abs(x))
        total = 1.0 + w
        added = tl.where(total == 1.0, 1.0, total - 1.0)
        return tl.maximum(x, 0.0) + tl.where(total == 1.0, w, tl.log(total) * w / added)

    @triton.jit
    def _scan_kernel(
        u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, resets_ptr, state_ptr, y_ptr, final_ptr, starts_ptr,
        channels, states, length,
        u_b, u_d, u_l, delta_b, delta_d, delta_l, z_b, z_d, z_l, y_b, y_d, y_l, B_b, B_n, B_l, C_b, C_n, C_l,
        HAS_STATE: tl.constexpr, HAS_RESETS: tl.constexpr, SAVE: tl.constexpr,
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
        D = tl.load(D_ptr + d, mask=is_channel, other=0.0)
        d = d.to(tl.int64)
        u_ptr += batch * u_b + d * u_d
        delta_ptr += batch * delta_b + d * delta_d
        y_ptr += batch * y_b + d * y_d
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
            dt = _softplus(tl.load(delta_ptr + at * delta_l, mask=is_channel, other=0.0).to(tl.float32))
            B = tl.load(B_ptr + at * B_l, mask=is_state, other=0.0).to(tl.float32)
            C = tl.load(C_ptr + at * C_l, mask=is_state, other=0.0).to(tl.float32)
            decay = tl.exp(A * dt[None, :])
            if HAS_RESETS:
                decay = tl.where(tl.load(resets_ptr + batch * length + t) != 0, 0.0, decay)
            h = decay * h + B[:, None] * (dt * u)[None, :]
            y = tl.sum(C[:, None] * h, axis=0) + D * u
            z = tl.load(z_ptr + at * z_l, mask=is_channel, other=0.0).to(tl.float32)
            y *= z * tl.sigmoid(z)
            tl.store(y_ptr + at * y_l, y.to(y_ptr.dtype.element_ty), mask=is_channel)
        tl.store(final_ptr + batch * size + of_state, h, mask=is_both)

    @triton.jit
    def _scan_backward_kernel(
        u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, resets_ptr, starts_ptr, scratch_ptr,
        grad_y_ptr, grad_final_ptr,
        grad_u_ptr, grad_delta_ptr, grad_A_ptr, grad_B_ptr, grad_C_ptr, grad_D_ptr, grad_z_ptr, grad_state_ptr,
        channels, states, length,
        u_b, u_d, u_l, delta_b, delta_d, delta_l, z_b, z_d, z_l, y_b, y_d, y_l, B_b, B_n, B_l, C_b, C_n, C_l,
        grad_u_b, grad_u_d, grad_u_l, grad_delta_b, grad_delta_d, grad_delta_l, grad_z_b, grad_z_d, grad_z_l,
        HAS_RESETS: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr,
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
        D = tl.load(D_ptr + d, mask=is_channel, other=0.0)
        of_channel = batch * channels + d
        d = d.to(tl.int64)
        u_ptr += batch * u_b + d * u_d
        delta_ptr += batch * delta_b + d * delta_d
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
                dt = _softplus(tl.load(delta_ptr + at * delta_l, mask=is_channel, other=0.0).to(tl.float32))
                B = tl.load(B_ptr + at * B_l, mask=is_state, other=0.0).to(tl.float32)
                decay = tl.exp(A * dt[None, :])
                if HAS_RESETS:
                    decay = tl.where(tl.load(resets_ptr + batch * length + at) != 0, 0.0, decay)
                h = decay * h + B[:, None] * (dt * u)[None, :]
                tl.store(scratch_ptr + i * STATES * BLOCK + of_scratch, h)
            tl.debug_barrier()
            for i_back in range(0, count):
                i = count - 1 - i_back
                at = tl.cast(first + i, tl.int64)
                u = tl.load(u_ptr + at * u_l, mask=is_channel, other=0.0).to(tl.float32)
                step = tl.load(delta_ptr + at * delta_l, mask=is_channel, other=0.0).to(tl.float32)
                B = tl.load(B_ptr + at * B_l, mask=is_state, other=0.0).to(tl.float32)
                C = tl.load(C_ptr + at * C_l, mask=is_state, other=0.0).to(tl.float32)
                grad = tl.load(grad_y_ptr + at * y_l, mask=is_channel, other=0.0).to(tl.float32)
                dt = _softplus(step)
                decay = tl.exp(A * dt[None, :])
                if HAS_RESETS:
                    decay = tl.where(tl.load(resets_ptr + batch * length + at) != 0, 0.0, decay)
                h = tl.load(scratch_ptr + i * STATES * BLOCK + of_scratch)
                # Not read before the chunk's second token: the first one's past is `start`.
                before = tl.load(scratch_ptr + tl.maximum(i - 1, 0) * STATES * BLOCK + of_scratch)
                before = tl.where(i == 0, start, before)
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
                grad_dt = (grad_drive * u + tl.sum(exponent * A, axis=0)) * tl.sigmoid(step)
                grad_u = grad_drive * dt + grad * D
                grad_D += grad * u
                tl.store(grad_u_ptr + at * grad_u_l, grad_u.to(grad_u_ptr.dtype.element_ty), mask=is_channel)
                tl.store(
                    grad_delta_ptr + at * grad_delta_l, grad_dt.to(grad_delta_ptr.dtype.element_ty), mask=is_channel
                )
            tl.debug_barrier()
        tl.store(grad_state_ptr + batch * size + of_state, carry, mask=is_both)
        tl.store(grad_A_ptr + batch * size + of_state, grad_A, mask=is_both)
        tl.store(grad_D_ptr + of_channel, grad_D, mask=is_channel)


class TritonScan(torch.autograd.Function):
    """The scan on a GPU; see [`selective_scan`] for the arguments. One token is the same kernel, made for that length."""

    @staticmethod
    def forward(ctx: Any, u, delta, A, B, C, D, z, initial_state, seq_idx):
        (batch, channels, length), states = u.shape, A.shape[1]
        small = {"device": u.device, "dtype": torch.float32}
        A_, D_ = (x.float().contiguous() for x in (A.T, D))
        state = None if initial_state is None else initial_state.float().transpose(1, 2).contiguous()
        resets = None if seq_idx is None else sequence_starts(seq_idx).to(torch.int8).contiguous()
        save = any(ctx.needs_input_grad)
        starts = torch.empty(batch, triton.cdiv(length, _CHUNK) if save else 0, states, channels, **small)
        y, final_state = torch.empty_like(u), torch.empty(batch, states, channels, **small)
        _scan_kernel[(triton.cdiv(channels, _KERNEL_CHANNELS), batch)](
            u, delta, A_, B, C, D_, z, resets, state, y, final_state, starts,
            channels, states, length,
            *u.stride(), *delta.stride(), *z.stride(), *y.stride(), *B.stride(), *C.stride(),
            HAS_STATE=state is not None, HAS_RESETS=resets is not None, SAVE=save,
            BLOCK=_KERNEL_CHANNELS, STATES=triton.next_power_of_2(states), CHUNK=_CHUNK, num_warps=_KERNEL_WARPS,
        )  # fmt: skip
        if save:
            ctx.save_for_backward(u, delta, A, B, C, D, z, initial_state, resets, starts)
        return y, final_state.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor, grad_final_state: torch.Tensor):
        u, delta, A, B, C, D, z, initial_state, resets, starts = ctx.saved_tensors
        (batch, channels, length), states = u.shape, A.shape[1]
        small = {"device": u.device, "dtype": torch.float32}
        A_, D_ = (x.float().contiguous() for x in (A.T, D))
        grad_final = grad_final_state.float().transpose(1, 2).contiguous()
        grad_u, grad_delta, grad_z = (torch.empty_like(x) for x in (u, delta, z))
        programs = triton.cdiv(channels, _KERNEL_CHANNELS)
        padded = triton.next_power_of_2(states)
        scratch = torch.empty(batch, programs, _CHUNK, padded, _KERNEL_CHANNELS, **small)
        grad_A, grad_state = (torch.empty(batch, states, channels, **small) for _ in range(2))
        grad_B, grad_C = (torch.empty(batch, programs, length, states, **small) for _ in range(2))
        grad_D = torch.empty(batch, channels, **small)
        _scan_backward_kernel[(programs, batch)](
            u, delta, A_, B, C, D_, z, resets, starts, scratch, grad_y, grad_final,
            grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_state,
            channels, states, length,
            *u.stride(), *delta.stride(), *z.stride(), *grad_y.stride(), *B.stride(), *C.stride(),
            *grad_u.stride(), *grad_delta.stride(), *grad_z.stride(),
            HAS_RESETS=resets is not None, BLOCK=_KERNEL_CHANNELS, STATES=padded, CHUNK=_CHUNK, num_warps=_KERNEL_WARPS,
        )  # fmt: skip
        grad_B, grad_C = (grad.sum(1).transpose(1, 2) for grad in (grad_B, grad_C))
        sums = (grad_A.sum(0).T, grad_B, grad_C, grad_D.sum(0), grad_state.transpose(1, 2))
        given = (A, B, C, D, initial_state)
        *grad_sums, grad_initial = (None if x is None else grad.to(x.dtype) for grad, x in zip(sums, given))
        return grad_u, grad_delta, *grad_sums, grad_z, grad_initial, None


__all__ = ["TritonScan"]
