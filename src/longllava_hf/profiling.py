# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""Where the time of a generated token goes."""

import time
from typing import Any

import torch


# Parts of a decoder by the names of their classes; the first that fits, and of nested ones the outermost.
_PARTS = {
    "Attention": "attention",
    "MambaMixer": "Mamba",
    "SparseMoe": "experts",
    "MLP": "dense feed-forward",
    "RMSNorm": "norms",
    "Embedding": "embeddings",
}


class _Clock:
    """Seconds by part, measured around the calls of modules."""

    def __init__(self, model: Any):
        self.seconds: dict[str, float] = {}
        self.device = model.device
        self.open: list[tuple[str, float]] = []
        self.handles = []
        for name, module in model.named_modules():
            part = "head" if name == "lm_head" else self._part_of(type(module).__name__)
            if part is not None:
                self.handles.append(module.register_forward_pre_hook(lambda *_, part=part: self._start(part)))
                self.handles.append(module.register_forward_hook(lambda *_: self._stop()))

    @staticmethod
    def _part_of(class_name: str) -> str | None:
        return next((part for key, part in _PARTS.items() if key in class_name), None)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _start(self, part: str) -> None:
        self.open.append((part, self.now() if not self.open else 0.0))

    def _stop(self) -> None:
        part, started = self.open.pop()
        if not self.open:
            self.seconds[part] = self.seconds.get(part, 0.0) + self.now() - started

    def remove(self) -> None:
        for handle in self.handles:
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
        `dict[str, float]`: seconds by part, `"rest"` for what is between them, and `"whole token"`, measured apart and
        without looking at the parts.

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

    generate(3)  # what is done once is not a token's
    clock = _Clock(model)
    try:
        started = clock.now()
        generate(new_tokens)
        watched = clock.now() - started
    finally:
        clock.remove()
    started = clock.now()
    generate(new_tokens)
    whole = clock.now() - started
    parts = {part: seconds / new_tokens for part, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1])}
    return {**parts, "rest": watched / new_tokens - sum(parts.values()), "whole token": whole / new_tokens}


__all__ = ["profile_decoding"]
