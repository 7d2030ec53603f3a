# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
A cache whose layers are right under everything that Transformers does to one: keys and values in buffers allocated ahead,
and the Mamba layers' states. What tokens are in it is not its business; see `context_longllava`.

The number of cached positions and the number of tokens read are two numbers: a decoder without attention layers caches
no position, however much it has read.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
)


_CHANGING = (
    "update", "update_conv_state", "update_recurrent_state", "crop", "reorder_cache", "batch_repeat_interleave",
    "batch_select_indices", "reset",
)  # fmt: skip


def _counted(method: Callable) -> Callable:
    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        self.changes += 1
        return method(self, *args, **kwargs)

    return wrapper


def _counts_changes(layer_class: type) -> type:
    """Let a layer count the calls that change it, so that a context can tell when it was changed by somebody else."""
    for name in _CHANGING:
        if (method := getattr(layer_class, name, None)) is not None:
            setattr(layer_class, name, _counted(method))
    layer_class.changes = 0  # type: ignore[attr-defined]
    return layer_class


def _writable(tensor: torch.Tensor) -> torch.Tensor:
    """
    The tensor, or a copy of one that was made under `torch.inference_mode` and may not be written to any more. Nobody can ask
    for that in a graph, so a compiled model gets a copy, which the compiler makes only where it has to.
    """
    if torch.compiler.is_compiling():
        return tensor.clone()
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


@_counts_changes
class PreallocatedLayer(DynamicLayer):
    """
    Keys and values that grow within buffers allocated ahead, so that a generated token copies one position and not all.

    Args:
        capacity (`int`, defaults to 0): positions to allocate at first. Past them, an eighth more each time.
    """

    def __init__(self, capacity: int = 0):
        super().__init__()
        self.capacity = capacity
        self.buffers: dict[str, torch.Tensor] = {}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """As [`DynamicLayer.update`]."""
        needs_grad = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        # Autograd needs the past as it was; and a graph that asks where its inputs lie is compiled for each token anew.
        if needs_grad or torch.compiler.is_compiling():
            self.buffers = {}
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", key_states)
        self.values = self._append("values", value_states)
        return self.keys, self.values

    def _append(self, name: str, new: torch.Tensor) -> torch.Tensor:
        past: Any = getattr(self, name)
        buffer: Any = self.buffers.get(name)
        used = past.shape[-2] if past.numel() else 0
        total = used + new.shape[-2]
        # Cropped, the past still begins where its buffer does; reordered or moved, it is another tensor.
        is_view = buffer is not None and (not used or past.data_ptr() == buffer.data_ptr())
        is_alike = is_view and buffer.shape[:2] == new.shape[:2] and buffer.device == new.device
        if not is_alike or total > buffer.shape[-2] or _writable(buffer) is not buffer:
            size = max(self.capacity, total + (total // 8 if used else 0))
            buffer = new.new_empty(*new.shape[:2], size, new.shape[-1], dtype=past.dtype if used else new.dtype)
            if used:
                buffer[..., :used, :] = past
            self.buffers = {**self.buffers, name: buffer}  # a copy of this layer keeps the dict it has
        buffer[..., used:total, :] = new
        return buffer[..., :total, :]

    def crop(self, tokens_to_remove: int) -> None:
        """As [`DynamicLayer.crop`], on every Transformers release."""
        length = self.get_seq_length()
        if not -length <= tokens_to_remove <= 0:
            raise ValueError(f"`tokens_to_remove` must be between {-length} and 0, but is {tokens_to_remove}.")
        if tokens_to_remove:
            self.keys, self.values = (x[..., :tokens_to_remove, :] for x in (self.keys, self.values))  # type: ignore[index]

    def reset(self) -> None:
        """Empty, on every Transformers release."""
        self.keys = self.values = None
        self.is_initialized = False
        self.buffers = {}

    def offload(self) -> None:
        """As [`DynamicLayer.offload`]; the buffers are given back."""
        super().offload()
        self.buffers = {}


@_counts_changes
class RecurrentLayer(LinearAttentionLayer):
    """
    The states of a Mamba layer, with what [`LinearAttentionLayer`] lacks: rows can be repeated and selected, a reset
    forgets the batch size too, and states made under `torch.inference_mode` can be continued outside it.
    """

    is_compileable = False  # it counts its changes

    def _prepare(self, states: dict[int, Any], state_idx: int) -> None:
        if states[state_idx] is not None:
            states[state_idx] = _writable(states[state_idx])

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **kwargs) -> torch.Tensor:
        """As [`LinearAttentionLayer.update_conv_state`]."""
        self._prepare(self.conv_states, state_idx)
        return super().update_conv_state(conv_states, state_idx, **kwargs)

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs) -> torch.Tensor:
        """As [`LinearAttentionLayer.update_recurrent_state`]."""
        self._prepare(self.recurrent_states, state_idx)
        return super().update_recurrent_state(recurrent_states, state_idx, **kwargs)

    def _select_rows(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Those rows that are selected of all there are; nothing where there is no state yet."""
        if states := list(layer_tensors(self).values()):
            self.reorder_cache(select(torch.arange(len(states[0]))))  # type: ignore[arg-type]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As [`DynamicLayer.batch_repeat_interleave`]."""
        self._select_rows(lambda rows: rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """As [`DynamicLayer.batch_select_indices`]."""
        self._select_rows(lambda rows: rows[indices.cpu()])

    def crop(self, tokens_to_remove: int) -> None:
        """Raises `ValueError`: a recurrent state cannot be rolled back."""
        if tokens_to_remove:
            raise ValueError("The states of Mamba layers cannot be cropped. Keep a copy of the cache from before.")

    def reset(self) -> None:
        """As [`LinearAttentionLayer.reset`]; other rows may follow."""
        self.__init__(number_of_states=self.number_of_states)  # type: ignore[misc]


class LongLLaVACache(DynamicCache):
    """
    A [`DynamicCache`] with layers of this file.

    Args:
        config ([`PreTrainedConfig`]): of the model or of its decoder.
        capacity (`int`, defaults to 0): positions that attention layers allocate at first.
    """

    def __init__(self, config: PreTrainedConfig, capacity: int = 0):
        super().__init__(config=config)
        for i, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[i] = PreallocatedLayer(capacity)
            elif type(layer) is LinearAttentionLayer:
                self.layers[i] = RecurrentLayer(number_of_states=layer.number_of_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """As [`DynamicCache.get_seq_length`]; 0 where no layer is attention."""
        return 0 if all(self.is_linear) else super().get_seq_length(layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """
        As [`DynamicCache.crop`], all layers or none.

        Raises:
            ValueError: if there are Mamba layers, or fewer positions than that.
        """
        if tokens_to_remove:
            for layer in self.layers:
                copy.copy(layer).crop(tokens_to_remove)  # raises before any layer is changed
        super().crop(tokens_to_remove)


def layer_tensors(layer: Any) -> dict[str, torch.Tensor]:
    """What a layer of a cache holds, by name: `keys` and `values`, `conv_states.0` and `recurrent_states.0`."""
    tensors = {name: getattr(layer, name, None) for name in ("keys", "values")}
    for name in ("conv_states", "recurrent_states"):
        tensors.update({f"{name}.{i}": state for i, state in getattr(layer, name, {}).items()})
    return {name: x for name, x in tensors.items() if isinstance(x, torch.Tensor) and x.numel()}


def cache_rows(cache: Cache) -> int:
    """How many sequences a cache holds; 0 if it is empty."""
    return next((x.shape[0] for layer in cache.layers for x in layer_tensors(layer).values()), 0)


def cached_length(cache: Cache | None) -> int:
    """How many positions the attention layers of a cache hold; 0 if there are none of those."""
    layers = [] if cache is None else [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
    return int(layers[0].get_seq_length()) if layers else 0


def is_empty(cache: Cache | None) -> bool:
    """Whether nothing was read into a cache."""
    if cache is None or cached_length(cache):
        return cache is None
    return not any(any(getattr(layer, "has_previous_state", {}).values()) for layer in cache.layers)


def _snapshot(layer: Any) -> Any:
    """A layer that stays as it is; what is only appended to is referred to, and not copied."""
    if type(layer) in (PreallocatedLayer, DynamicLayer, DynamicSlidingWindowLayer):
        return copy.copy(layer)
    if type(layer) is StaticLayer:
        kept = copy.copy(layer)
        kept.cumulative_length = layer.cumulative_length.clone()
        return kept
    return copy.deepcopy(layer)


class restored_on_error:  # noqa: N801
    """
    Whatever goes wrong or is interrupted inside leaves the cache as it was. No generator: one that is given up undoes what
    went well.

    Args:
        cache ([`Cache`], *optional*): which.
        undo (`Callable`, *optional*): what else to do then.
    """

    def __init__(self, cache: Cache | None, undo: Callable[[], None] | None = None):
        self.cache, self.undo = cache, undo
        self.layers = [] if cache is None else [_snapshot(layer) for layer in cache.layers]

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            return
        if self.cache is not None:
            self.cache.layers[:] = self.layers
        if self.undo is not None:
            self.undo()


__all__ = ["LongLLaVACache", "PreallocatedLayer", "RecurrentLayer"]
