# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""Where the time of a generated token goes."""

import time
from collections import defaultdict
from contextlib import contextmanager
from typing import Any

import torch


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


@contextmanager
def _watch_parts(model: Any):
    """Seconds that the parts of a decoder's layers take, by their class, and what is around the layers."""
    decoder, started = model.get_decoder(), 0.0
    seconds: defaultdict[str, float] = defaultdict(float)
    parts = [part for layer in [*decoder.layers, decoder] for part in layer.children() if part is not decoder.layers]

    def start(*_):
        nonlocal started
        started = _now(model)

    def stop(part, *_):
        name = "lm_head" if part is model.get_output_embeddings() else type(part).__name__
        seconds[name] += _now(model) - started

    handles = []
    for part in [*parts, model.get_output_embeddings()]:
        handles += [part.register_forward_pre_hook(start), part.register_forward_hook(stop)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def profile_decoding(model: Any, context: int = 1024, new_tokens: int = 32) -> dict[str, float]:
    """
    Time of one generated token, by part. Parts are waited for one after the other, so on a GPU their sum is more than a
    token takes.

    Args:
        model ([`LongLLaVAForConditionalGeneration`]): loaded.
        context (`int`, defaults to 1024): tokens that are read before.
        new_tokens (`int`, defaults to 32): tokens to take the mean of.

    Returns:
        `dict[str, float]`: seconds by class of part, `"rest"` for what is between them, and `"whole token"`, measured
        apart and without looking at the parts.

    Raises:
        ValueError: if there are no tokens to read or to generate.
    """
    if min(context, new_tokens) < 1:
        raise ValueError(f"At least 1 token must be read and generated, but `{context=}` and `{new_tokens=}`.")
    low, high = model.config.image_token_id + 1, model.config.get_text_config().vocab_size
    ids = torch.randint(min(low, high - 1), high, (1, context), device=model.device)
    cache = model.prefill(input_ids=ids).cache

    def generate(count: int) -> None:
        for _ in range(count):
            model(input_ids=ids[:, -1:], cache=cache, use_cache=True, logits_to_keep=1)

    def measure() -> float:
        started = _now(model)
        generate(new_tokens)
        return (_now(model) - started) / new_tokens

    generate(3)  # what is done once is not a token's
    with _watch_parts(model) as seconds:
        watched = measure()
    parts = {part: total / new_tokens for part, total in sorted(seconds.items(), key=lambda item: -item[1])}
    return {**parts, "rest": watched - sum(parts.values()), "whole token": measure()}


__all__ = ["profile_decoding"]
