# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""What training needs that Trainer, TRL and PEFT cannot know: the authors' labels, packing with pictures, and what to adapt."""

from .collator import LongLLaVADataCollator
from .data import convert_data, convert_sample, video_row, with_sub_images
from .lora import LORA_PARTS, lora_targets
from .packing import PackedDataset, draw_lengths, plan_bins, token_lengths


__all__ = [
    "LORA_PARTS",
    "LongLLaVADataCollator",
    "PackedDataset",
    "convert_data",
    "convert_sample",
    "draw_lengths",
    "lora_targets",
    "plan_bins",
    "token_lengths",
    "video_row",
    "with_sub_images",
]
