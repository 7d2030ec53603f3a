# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""What training needs that Trainer, TRL and PEFT cannot know: the authors' labels, and packing with pictures."""

from .collator import LongLLaVADataCollator
from .data import convert_data, convert_sample, video_row, with_sub_images
from .packing import PackedDataset, draw_lengths, plan_bins, token_lengths


__all__ = [
    "LongLLaVADataCollator",
    "PackedDataset",
    "convert_data",
    "convert_sample",
    "draw_lengths",
    "plan_bins",
    "token_lengths",
    "video_row",
    "with_sub_images",
]
