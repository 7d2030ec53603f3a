# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
The depthwise causal convolution before a Mamba layer's scan, as a function from a state to an output. Symbols are those
of `selective_scan_longllava.py`.
"""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .grouped_linear_longllava import planned_device


_PIECE = 256  # tokens


def is_installed(package: str) -> bool:
    """Whether an optional package can be imported; it is not imported for that."""
    return importlib.util.find_spec(package) is not None


def sequence_starts(seq_idx: torch.Tensor) -> torch.Tensor:
    """Where another sequence begins than the token before belongs to, `(b, l)`. The first token continues what was."""
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))


def _knows_causal_conv1d(x: torch.Tensor, conv1d: torch.nn.Module, has_both: bool) -> bool:
    # A module that an adapter or a quantiser put in its place has to be called.
    is_known = type(conv1d) is torch.nn.Conv1d and conv1d.kernel_size[0] in (2, 3, 4) and not has_both
    return (
        is_known and x.is_cuda and x.dtype != torch.float64 and x.shape[1] % 8 == 0 and is_installed("causal_conv1d")
    )


def _sum_of_products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Over rows and tokens, `(b, l, d)` to `(d,)`, in pieces that stay in a CPU's cache."""
    return sum((part * other).sum((0, 1)) for part, other in zip(x.split(_PIECE, dim=1), y.split(_PIECE, dim=1)))  # type: ignore[return-value]


class TapByTap(torch.autograd.Function):
    """
    The convolution on a CPU, tap by tap over rows of channels, as they come from and go to linear layers and the scan.
    The past is of width `p`, not less than `k - 1`.
    """

    @staticmethod
    def _reach(past: torch.Tensor, length: int, back: int, seq_idx: torch.Tensor | None):
        """
        What the tap that looks `back` tokens behind reads: which of the past are before the first tokens, and which
        tokens `(b, l, 1)` see it, `None` for all.
        """
        before = slice(past.shape[1] - back, past.shape[1] - back + length)
        if seq_idx is None:
            return before, None
        number = F.pad(sequence_starts(seq_idx).cumsum(-1), (back, 0))  # the past belongs to the first
        return before, (number[:, back:] == number[:, :length]).unsqueeze(-1)

    @staticmethod
    def forward(ctx: Any, x, weight, bias, past, seq_idx):
        """`(b, l, d)` to the same, from weights `(d, k)` and a past `(b, p, d)`."""
        ctx.save_for_backward(x, weight, bias, past, seq_idx)
        *earlier, now = weight.unbind(-1)
        y = x * now if bias is None else torch.addcmul(bias, x, now)
        for back, tap in enumerate(reversed(earlier), 1):
            before, sees = TapByTap._reach(past, x.shape[1], back, seq_idx)
            for tokens, seen in ((slice(back, None), x[:, :-back]), (slice(back), past[:, before])):
                # Selected, not multiplied: what another sequence holds may be infinite.
                y[:, tokens].addcmul_(seen if sees is None else torch.where(sees[:, tokens], seen, 0), tap)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor):
        x, weight, bias, past, seq_idx = ctx.saved_tensors
        *earlier, now = weight.unbind(-1)
        grad_x, grad_past = grad * now, torch.zeros_like(past)
        grad_taps = [_sum_of_products(grad, x)]
        for back, tap in enumerate(reversed(earlier), 1):
            before, sees = TapByTap._reach(past, x.shape[1], back, seq_idx)
            wanted = grad if sees is None else torch.where(sees, grad, 0)
            later, first = wanted[:, back:], wanted[:, :back]
            grad_x[:, :-back].addcmul_(later, tap)
            grad_past[:, before].addcmul_(first, tap)
            grad_taps.append(_sum_of_products(later, x[:, :-back]) + _sum_of_products(first, past[:, before]))
        grad_weight = torch.stack(grad_taps[::-1], dim=-1)
        return grad_x, grad_weight, None if bias is None else grad.sum((0, 1)), grad_past, None


def causal_conv1d(
    x: torch.Tensor,
    conv1d: Any,
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
    plain = conv1d.get_base_layer() if hasattr(conv1d, "get_base_layer") else conv1d
    width = plain.kernel_size[0]
    if initial_state is not None and initial_state.shape != (shape := (*x.shape[:2], width)):
        raise ValueError(f"`initial_state` must have the shape {shape}, but it is {tuple(initial_state.shape)}.")
    # A kernel of width k sees k - 1 tokens of the past; the state holds one more, as Transformers' caches do.
    past = None if initial_state is None else initial_state[..., 1:].to(x.dtype)
    if _knows_causal_conv1d(x, conv1d, has_both=past is not None and seq_idx is not None):
        # Channels last, which the package demands wherever there is a past or a boundary.
        x, past = (None if t is None else t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, past))
        index = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
        kernels = importlib.import_module("causal_conv1d")
        return kernels.causal_conv1d_fn(x, conv1d.weight.squeeze(1), conv1d.bias, seq_idx=index, initial_states=past)
    if past is None:
        past = x.new_zeros(*x.shape[:2], width - 1)
    kind = planned_device.get() if x.is_meta else x.device.type
    if kind == "cpu" and x.dtype in (torch.float32, torch.float64) and type(conv1d) is torch.nn.Conv1d:
        weight, bias = conv1d.weight[:, 0], conv1d.bias
        return TapByTap.apply(x.transpose(1, 2), weight, bias, past.transpose(1, 2), seq_idx).transpose(1, 2)
    if seq_idx is None:
        return conv1d(torch.cat([past, x], dim=-1))
    # Sequences are moved apart, so that each has zeros before it, and their outputs gathered.
    positions = torch.arange(x.shape[-1], device=x.device) + (width - 1) * (1 + sequence_starts(seq_idx).cumsum(-1))
    apart = x.new_zeros(*x.shape[:2], int(positions.max()) + 1)
    apart[..., : width - 1] = past
    positions = positions.unsqueeze(1).expand(-1, x.shape[1], -1)
    return conv1d(apart.scatter(2, positions, x)).gather(2, positions - (width - 1))


__all__ = ["causal_conv1d", "is_installed", "sequence_starts"]
