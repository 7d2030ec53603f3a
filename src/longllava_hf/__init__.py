# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
LongLLaVA for Transformers. Importing this package registers the model with the Auto classes; from then on
`AutoModelForImageTextToText.from_pretrained(...)` and its siblings load native and published checkpoints.
"""

from pathlib import Path

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

# Older releases hide this class behind torchvision, which it does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .cache_longllava import LongLLaVACache
from .compat_longllava import add_to_transformers
from .configuration_longllava import LlavaJambaConfig, LongLLaVAConfig, LongLLaVATextConfig
from .context_longllava import LongLLaVAContext
from .image_processing_longllava import LazyPixelValues, LongLLaVAImageProcessor
from .int8_longllava import LongLLaVAInt8Config
from .modeling_longllava import LongLLaVAForConditionalGeneration, LongLLaVAModel
from .modeling_longllava_text import LongLLaVAForCausalLM, LongLLaVATextModel
from .processing_longllava import LongLLaVAProcessor
from .sources_longllava import LIMITS, InputLimits


__version__ = "0.1.0"

TINY = str(Path(__file__).parent / "longllava-tiny")
"""Folder of the small checkpoint that ships with the package."""


def _register() -> None:
    for config_class in (LongLLaVAConfig, LongLLaVATextConfig, LlavaJambaConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(LongLLaVAConfig, LongLLaVAModel, exist_ok=True)
    AutoModel.register(LongLLaVATextConfig, LongLLaVATextModel, exist_ok=True)
    AutoModelForCausalLM.register(LongLLaVATextConfig, LongLLaVAForCausalLM, exist_ok=True)
    # The authors' users load the published checkpoints through this class.
    AutoModelForCausalLM.register(LongLLaVAConfig, LongLLaVAForConditionalGeneration, exist_ok=True)
    AutoModelForImageTextToText.register(LongLLaVAConfig, LongLLaVAForConditionalGeneration, exist_ok=True)
    if (auto_class := getattr(transformers, "AutoModelForMultimodalLM", None)) is not None:
        auto_class.register(LongLLaVAConfig, LongLLaVAForConditionalGeneration, exist_ok=True)
    # One class for both back ends: pixels are the same with and without torchvision.
    image_processors: dict[str, type] = {"pil": LongLLaVAImageProcessor, "torchvision": LongLLaVAImageProcessor}
    AutoImageProcessor.register(LongLLaVAConfig, image_processor_classes=image_processors, exist_ok=True)
    AutoProcessor.register(LongLLaVAConfig, LongLLaVAProcessor, exist_ok=True)
    # TRL and Transformers' server look a class up by the name in `architectures`.
    add_to_transformers(LongLLaVAForConditionalGeneration, LongLLaVAForCausalLM)


_register()

__all__ = [
    "LIMITS",
    "TINY",
    "InputLimits",
    "LazyPixelValues",
    "LongLLaVACache",
    "LongLLaVAConfig",
    "LongLLaVAContext",
    "LongLLaVAForCausalLM",
    "LongLLaVAForConditionalGeneration",
    "LongLLaVAImageProcessor",
    "LongLLaVAInt8Config",
    "LongLLaVAModel",
    "LongLLaVAProcessor",
    "LongLLaVATextConfig",
    "LongLLaVATextModel",
    "__version__",
]
