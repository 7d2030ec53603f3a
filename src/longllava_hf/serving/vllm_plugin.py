# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
What vLLM runs at the start of each of its processes: the entry point `longllava` of the group `vllm.general_plugins`.
It says which module has the model; that is imported when a LongLLaVA is served.
"""

from ..checkpoint_longllava import published_names, to_native_name
from ..configuration_longllava import LongLLaVAConfig


ARCHITECTURES = ("LongLLaVAForConditionalGeneration", "LlavaJambaForCausalLM")
"""As which a native and a published checkpoint know themselves."""

VLLM_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
"""How native names begin, and how the same begin in vLLM; what is below a decoder's layer, vLLM's Jamba maps itself."""


def to_vllm_name(name: str, config: LongLLaVAConfig) -> str:
    """
    The name that a weight of a native or published checkpoint has in vLLM's model, before vLLM's Jamba maps it further.

    Raises:
        ValueError: for a name that belongs to no part of the model.
    """
    native = to_native_name(name, published_names(config))
    for prefix, replacement in VLLM_PREFIXES.items():
        if native.startswith(prefix):
            return replacement + native.removeprefix(prefix)
    raise ValueError(f"The weight `{name}` belongs to no part of LongLLaVA: expected one of {list(VLLM_PREFIXES)}.")


def register() -> None:
    """Tell vLLM where the model is. May be called any number of times."""
    from vllm import ModelRegistry

    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, "longllava_hf.serving.vllm:LongLLaVAForConditionalGeneration")


__all__ = ["ARCHITECTURES", "VLLM_PREFIXES", "register", "to_vllm_name"]
