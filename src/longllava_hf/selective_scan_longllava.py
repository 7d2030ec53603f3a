# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
The recurrence of a Mamba layer (arXiv 2312.00752, section 3), as a function from a state to a state.

Symbols, used throughout: `b` batch, `d` channels (`d_inner`), `n` states of a channel (`d_state`), `l` length.
With `dt = softplus(delta)`, token by token and for every channel and state:

    h[t] = exp(dt[t] * A) * h[t-1] + dt[t] * B[t] * u[t]
    y[t] = (sum over n of C[t] * h[t]  +  D * u[t]) * silu(z[t])

A token whose `dt` is 0 leaves the state as it was, which is how padding is skipped; where `seq_idx` changes, `h[t-1]` is
taken to be 0, which is how samples share a row. Every function takes the state before the first token and can give back
the one after the last, so a sequence may be cut anywhere. States are float32 (float64 where the inputs are). Nothing is
ever divided by a decay, so no step size can overflow.

One contract, [`selective_scan`], and behind it:

- `"reference"`: the equations as they stand, token by token.
- `"torch"`: in blocks of tokens that stay in a CPU's cache; any device (`scan_blocked_longllava.py`).
- `"triton"`: the same on a GPU, in one launch (`scan_triton_longllava.py`).
- `"mamba_ssm"`: the package's kernel, for what it knows: no initial state, no boundaries.

All but the reference keep, for the backward pass, one state for each block of tokens and compute the others again.
"""

import importlib
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from .causal_conv1d_longllava import is_installed, sequence_starts
from .grouped_linear_longllava import has_triton_kernels
from .scan_blocked_longllava import BlockedScan, allocate_block, state_dtype
from .scan_triton_longllava import TritonScan


def selective_scan_reference(u, delta, A, B, C, D, z, initial_state, seq_idx):
    """The equations above, one token after the other, from the arguments of [`selective_scan`] to output and state."""
    output_dtype, dtype = u.dtype, state_dtype(u)
    u, delta, A, B, C, D, z = (x.to(dtype) for x in (u, delta, A, B, C, D, z))
    delta = F.softplus(delta)
    state = u.new_zeros(*u.shape[:2], A.shape[1]) if initial_state is None else initial_state.to(dtype)
    resets = None if seq_idx is None else sequence_starts(seq_idx)
    outputs = []
    for t in range(u.shape[-1]):
        dt = delta[:, :, t, None]  # (b, d, 1)
        if resets is not None:
            state = torch.where(resets[:, t, None, None], 0.0, state)
        state = torch.exp(dt * A) * state + dt * B[:, None, :, t] * u[:, :, t, None]  # (b, d, n)
        outputs.append((state * C[:, None, :, t]).sum(-1))
    y = (torch.stack(outputs, dim=-1) + u * D[:, None]) * F.silu(z)
    return y.to(output_dtype), state


def _mamba_ssm_scan(u, delta, A, B, C, D, z, initial_state, seq_idx):
    kernels = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    # One dtype for all; step sizes would lose digits in a narrower one.
    x, B, C, z = (t.to(delta.dtype) for t in (u, B, C, z))
    options = {"delta_softplus": True, "return_last_state": True}
    y, state = kernels.selective_scan_fn(x, delta, A.float(), B, C, D.float(), z, **options)
    return y.to(u.dtype), state


def _one_token(u, delta, A, B, C, D, z, initial_state, seq_idx):
    """A step of the recurrence in a handful of operations, which `torch.compile` can fuse and autograd follow."""
    dtype = state_dtype(u)
    dt, x = F.softplus(delta.to(dtype)), u.to(dtype)  # (b, d, 1)
    state = (dt * x) * B.to(dtype).transpose(1, 2)
    if initial_state is not None:
        state = torch.addcmul(state, torch.exp(dt * A.to(dtype)), initial_state.to(dtype))
    y = torch.addcmul(state @ C.to(dtype), x, D.to(dtype)[:, None])  # (b, d, 1)
    return (y * F.silu(z.to(dtype))).to(u.dtype), state


def _shapes(u, delta, A, B, C, D, z, initial_state, seq_idx):
    """Output and state, not computed."""
    return torch.empty_like(u), u.new_empty(*u.shape[:2], A.shape[1], dtype=state_dtype(u))


@torch.no_grad()
def _meta_scan(u, delta, A, B, C, D, z, initial_state, seq_idx):
    """On `meta`: what the scan would allocate, and nothing else."""
    y, final_state = _shapes(u, delta, A, B, C, D, z, initial_state, seq_idx)
    if not has_triton_kernels(u):
        allocate_block(y, u, delta, A, B, C, D, z, seq_idx)
    return y, final_state


def _no_tokens(u, delta, A, B, C, D, z, initial_state, seq_idx):
    """Nothing happens to the state."""
    dtype = state_dtype(u)
    if initial_state is None:
        initial_state = u.new_zeros(*u.shape[:2], A.shape[1], dtype=dtype)
    return u, initial_state.to(dtype)


def _opaque_scan(u, delta, A, B, C, D, z, initial_state, seq_idx):
    """The scan in blocks, as an operator that a graph calls: its loops would make another graph for every length."""
    return torch.ops.longllava.selective_scan(u, delta, A, B, C, D, z, initial_state, seq_idx)


# Code that comes with a checkpoint may be imported several times; an operator is there once.
if not hasattr(torch.ops.longllava, "selective_scan"):
    torch.library.custom_op(
        "longllava::selective_scan",
        BlockedScan.apply,
        mutates_args=(),
        schema="(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor z, Tensor? initial_state, Tensor? seq_idx)"
        " -> (Tensor, Tensor)",
    )
    torch.library.register_fake("longllava::selective_scan", _shapes)


_SCANS: dict[str, Callable] = {
    "reference": selective_scan_reference,
    "torch": BlockedScan.apply,
    "triton": TritonScan.apply,
    "mamba_ssm": _mamba_ssm_scan,
}


def choose_scan(
    u: torch.Tensor, has_state: bool = False, has_boundaries: bool = False, requested: str | None = None
) -> str:
    """
    Which implementation a scan of `u` takes: the one that is requested, else the fastest there is.

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
    for package, name in (("mamba_ssm", "mamba-ssm"), ("triton", "triton")):
        if requested == package and not is_installed(package):
            raise ValueError(f'`scan_implementation="{package}"` needs the package {name}, which is not installed.')
    if requested == "triton" and u.dtype == torch.float64:
        raise ValueError('`scan_implementation="triton"` computes in float32, but the input is float64.')
    if requested in ("reference", "torch", "triton"):
        return requested
    return "triton" if has_triton_kernels(u) else "torch"


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The selective scan, with gradients for all inputs and memory for one value a token and channel, not for its states.

    Args:
        u (`torch.Tensor` of shape `(b, d, l)`): input.
        delta (`torch.Tensor` of shape `(b, d, l)`): step size, before its softplus.
        A (`torch.Tensor` of shape `(d, n)`): decay rates, negative.
        B (`torch.Tensor` of shape `(b, n, l)`): input to state.
        C (`torch.Tensor` of shape `(b, n, l)`): state to output.
        D (`torch.Tensor` of shape `(d,)`): skip connection.
        z (`torch.Tensor` of shape `(b, d, l)`): gate.
        initial_state (`torch.Tensor` of shape `(b, d, n)`, *optional*): state before the first token, zero if not given.
        seq_idx (`torch.Tensor` of shape `(b, l)`, *optional*): number of the sequence that each token belongs to; where
            it changes, the state starts from zero. The first token's sequence is the one that `initial_state` is of.
        implementation (`str`, *optional*): see [`choose_scan`].

    Returns:
        the output `(b, d, l)` in `u`'s dtype, and the state after the last token `(b, d, n)` in float32 (float64 for float64
        inputs). Gradients have no gradients of their own.

    Raises:
        ValueError: as [`choose_scan`].
    """
    name = choose_scan(u, initial_state is not None, seq_idx is not None, implementation)
    scan = _SCANS[name]
    if u.is_meta:
        scan = _meta_scan
    elif u.numel() == 0:
        scan = _no_tokens
    elif u.shape[-1] == 1 and name == "torch":
        scan = _one_token
    elif torch.compiler.is_compiling() and name == "torch" and not torch.is_grad_enabled():
        scan = _opaque_scan
    has_autocast = not u.is_meta and torch.is_autocast_enabled(u.device.type)
    # States are float32, whatever surrounds them.
    with torch.autocast(u.device.type, enabled=False) if has_autocast else nullcontext():
        return scan(u, delta, A, B, C, D, z, initial_state, seq_idx)


__all__ = ["choose_scan", "selective_scan", "selective_scan_reference"]
