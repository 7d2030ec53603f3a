# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
What differs between the releases of Transformers that are supported. Found by looking, never by a version number.

| name | differs | release |
|---|---|---|
| `CACHE` | a cache is called `cache` in outputs, in `generate` and in `forward`; before, `past_key_values` | 5.24 |
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast


_CACHE_NAMES = ("cache", "past_key_values")

CACHE: str = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in _CACHE_NAMES)
"""What this release calls a cache, as an argument and in an output."""


def take_cache(arguments: dict[str, Any]) -> Any:
    """
    Take the cache out of keyword arguments, whichever name it has there.

    Raises:
        ValueError: if both names hold one, and not the same.
    """
    given = [arguments.pop(name, None) for name in _CACHE_NAMES]
    if given[0] is not None and given[1] is not None and given[0] is not given[1]:
        raise ValueError("You cannot specify both `cache` and `past_key_values` at the same time.")
    return given[1] if given[0] is None else given[0]


def get_cache(outputs: Any) -> Cache | None:
    """The cache in an output."""
    return getattr(outputs, CACHE)


def accepts_cache(function: Callable) -> Callable:
    """
    Let a function with an argument `cache` be called with `past_key_values` too. Whoever looks at its signature finds the
    name that this release uses.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if "past_key_values" in kwargs:
            kwargs["cache"] = take_cache(kwargs)
        return function(*args, **kwargs)

    renamed = [p.replace(name=CACHE) if p.name == "cache" else p for p in signature.parameters.values()]
    wrapper.__signature__ = signature.replace(parameters=renamed)  # type: ignore[attr-defined]
    return wrapper


def recurrent_states(cache: Cache, layer_idx: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The convolution's and the recurrent state of a layer; none where nothing is cached."""
    if hasattr(cache, "get_conv_state"):
        return cache.get_conv_state(layer_idx), cache.get_recurrent_state(layer_idx)
    layer: Any = cache.layers[layer_idx]
    return (layer.conv_states[0], layer.recurrent_states[0]) if layer.has_previous_state[0] else (None, None)


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes, also if accelerate keeps its weights elsewhere."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if (device := getattr(one, "execution_device", None)) is not None:
                return torch.device(device)
    return next((x.device for x in module.parameters()), torch.device("cpu"))


__all__ = ["CACHE", "accepts_cache", "execution_device", "get_cache", "recurrent_states", "take_cache"]
