# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
What differs between the releases of Transformers that are supported. Found by looking, never by a version number.

| name | differs | release |
|---|---|---|
| `CACHE` | a cache is called `cache` in outputs, in `generate` and in `forward`; before, `past_key_values` | 5.24 |

And the names of the host that are not public.

| name here | name there | release | reason | public alternative |
|---|---|---|---|---|
| `merge_processor_kwargs` | `ProcessorMixin._merge_kwargs` | 5.17 to 5.24 | which keyword argument is the tokenizer's and which the image processor's, with the tokenizer's own defaults | none; its first argument is optional since 5.2x |
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast


_CACHE_NAMES = ("cache", "past_key_values")

CACHE: str = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in _CACHE_NAMES)
"""What this release calls a cache, as an argument and in an output."""


def take_cache(arguments: dict[str, Any]) -> Any:
    """
    Take the cache out of keyword arguments, whichever name it has there.

    Raises:
        ValueError: if both names hold one.
    """
    given = [arguments.pop(name, None) for name in _CACHE_NAMES]
    if given[0] is not None and given[1] is not None:
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


def merge_processor_kwargs(processor: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A processor's keyword arguments by whom they are for: `"text_kwargs"`, `"images_kwargs"`, ..."""
    return processor._merge_kwargs(
        processor.valid_processor_kwargs, tokenizer_init_kwargs=processor.tokenizer.init_kwargs, **kwargs
    )


__all__ = ["CACHE", "accepts_cache", "get_cache", "merge_processor_kwargs", "take_cache"]
