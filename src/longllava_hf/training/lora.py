# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""Where adapters go."""

import re
from collections import defaultdict
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel


# What a part's modules have in their path, the first that fits. Routers are no linear layers; a convolution's adapter cannot
# be merged; the tower is not trained after the first stage, and nothing reads its last layers.
_PATHS = {
    "projector": r"(^|\.)multi_modal_projector\.",
    "attention": r"(^|\.)layers\.\d+\.self_attn\.",
    "mamba": r"(^|\.)layers\.\d+\.mamba\.",
    "experts": r"(^|\.)layers\.\d+\.feed_forward\.experts\.",
    "mlp": r"(^|\.)layers\.\d+\.(feed_forward|mlp)\.",
}

LORA_PARTS = tuple(_PATHS)
"""What [`lora_targets`] tells apart."""


def _part_of(name: str) -> str | None:
    if re.search(r"(^|\.)vision_tower\.", name):
        return None
    return next((part for part, path in _PATHS.items() if re.search(path, name)), None)


def lora_targets(model: PreTrainedModel, parts: Iterable[str] | None = None) -> str:
    r"""
    All linear layers of the decoder and of the projector, as `LoraConfig(target_modules=lora_targets(model))` takes them;
    PEFT's `"all-linear"` takes the tower's too, the last of which nobody reads. The head and the embeddings are left out.

    Args:
        model (`PreTrainedModel`): without adapters; quantised or not.
        parts (`Iterable[str]`, *optional*): of [`LORA_PARTS`], such as `("attention", "mamba")`; by default all that the
            model has. Adapters of `"experts"` must be plain LoRA.

    Returns:
        `str`: a regular expression for whole names of modules.

    Raises:
        ValueError: for a part that is unknown, or that the model has not; or if there are adapters already.
    """
    if getattr(model, "peft_config", None):
        raise ValueError(f"`model` must be without adapters, but has {sorted(model.peft_config)}.")
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (part := _part_of(name)) is not None:
            parent, _, leaf = name.rpartition(".")
            found[part][re.sub(r"\d+", r"\\d+", re.escape(parent))].add(re.escape(leaf))
    wanted = list(found) if parts is None else [parts] if isinstance(parts, str) else list(parts)
    if missing := [part for part in wanted if part not in found]:
        raise ValueError(f"`parts` must be among those of the model, {sorted(found)}, but has {missing}.")
    return "|".join(
        rf"{parent}\.({'|'.join(sorted(leaves))})" for part in wanted for parent, leaves in sorted(found[part].items())
    )


__all__ = ["LORA_PARTS", "lora_targets"]
