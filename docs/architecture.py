# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""Draw `docs/architecture.png`: a picture from file to logits, and a token from `generate` to the cache."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch


# Title, file, and what is handed on.
PICTURE = [
    ("a file, URL or bytes", "load_picture, VideoFile", "image_processing, video", "RGB"),
    ("padded to a square, resized", "LongLLaVAImageProcessor", "image_processing", "pixel_values (images, 3, 336, 336)"),
    ("vision tower", "CLIP ViT-L/14", "transformers", "(images, 576, 1024)"),
    ("pooled to a quarter, projected", "LongLLaVAModel.get_image_features", "modeling_longllava", "(images, 144, 4096)"),
    ("written over the placeholders", "prefill", "generation_longllava", "inputs_embeds, a chunk at a time"),
    ("7 Mamba layers for each attention layer,\nexperts in every second one", "LongLLaVATextModel",
     "modeling_longllava_text", "(batch, length, 4096)"),
    ("head", "lm_head", "modeling_longllava", "logits"),
]  # fmt: skip
TOKEN = [
    ("generate(inputs, cache=context)", "LongLLaVAGenerationMixin", "generation_longllava", "what is new"),
    ("all but the last token", "prefill", "generation_longllava", "cache, ids, mask, hashes of pictures"),
    ("the last token, and each one that follows", "GenerationMixin.generate", "transformers", "one token"),
    ("Mamba: convolution, then the scan", "causal_conv1d, selective_scan", "scan_*_longllava", "states"),
    ("attention: to itself and all before", "causal_attention", "modeling_longllava_text", "keys, values"),
    ("states, and buffers allocated ahead", "LongLLaVACache", "cache_longllava", "all that was read"),
    ("saved, branched, continued", "LongLLaVAContext", "context_longllava", None),
]  # fmt: skip
COLORS = {"transformers": "#e8e8e8"}


def draw_column(axes, left: float, title: str, steps: list) -> None:
    axes.text(left + 2, 10.45, title, ha="center", va="center", fontsize=12, fontweight="bold")
    for row, (what, name, file, result) in enumerate(steps):
        top = 9.9 - 1.45 * row
        box = FancyBboxPatch(
            (left, top - 0.85),
            4,
            0.85,
            boxstyle="round,pad=0.06",
            facecolor=COLORS.get(file, "#dbe9f6"),
            edgecolor="#446",
        )
        axes.add_patch(box)
        axes.text(left + 2, top - 0.26, what, ha="center", va="center", fontsize=8.5, linespacing=1.1)
        axes.text(left + 2, top - 0.69, f"{name}  ({file})", ha="center", va="center", fontsize=7, family="monospace")
        if row + 1 < len(steps):
            arrow = {"arrowstyle": "-|>", "color": "#446", "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", xy=(left + 0.7, top - 1.39), xytext=(left + 0.7, top - 0.91), arrowprops=arrow)
        if result is not None:
            axes.text(left + 0.9, top - 1.15, result, ha="left", va="center", fontsize=7.5, style="italic")


def main() -> None:
    figure = Figure(figsize=(9.6, 9.2), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(-0.2, 9.2)
    axes.set_ylim(-0.15, 10.7)
    axes.axis("off")
    draw_column(axes, 0, "A picture, from file to logits", PICTURE)
    draw_column(axes, 5, "A token, from generate to the cache", TOKEN)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
