# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
What the parts of LongLLaVA are worth at the small checkpoint's scale: pooling, the hybrid decoder, the three stages, replay.

    python -m tiny.ablation --tower tower --output ablation

Every variant differs from the first one in one thing, and has the same tower and the same rows, a fraction of those of the
checkpoint that ships. What is done is not done again, so that variants may run side by side (`--variants`) before all are
put into one table.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor

from longllava_hf.training.recipe import train as train_recipe

from . import decoder
from .evaluate import evaluate


@dataclass(frozen=True)
class Variant:
    layers: str = "hybrid"
    pooling: str = "2d"
    stages: tuple[str, ...] = ("align", "single_image", "multi_image")
    replay: float = 0.15


VARIANTS = {
    "hybrid, 2d, three stages, replay": Variant(),
    "no pooling": Variant(pooling="none"),
    "1d pooling": Variant(pooling="1d"),
    "attention only": Variant(layers="attention"),
    "Mamba only": Variant(layers="Mamba"),
    "one stage": Variant(stages=("multi_image",)),
    "no replay": Variant(replay=0.0),
}
LAYERS: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "attention": {"layer_types": ["full_attention"] * 8},
    "Mamba": {"layer_types": ["linear_attention"] * 8},
}
# Enough for the hybrid; whatever a decoder has learned by then, it goes on to rows.
DRILL_STEPS = 2000
TASKS = (
    "digit",
    "object by a trained artist",
    "object in one of 64 frames",
    "object in the N-th of 8 pictures",
    "which of two comes first, or last",
    "how many (0 to 5) pictures or frames",
    "invented label, 4-shot",
)


def start(variant: Variant, tower: Path, folder: Path, rows: int) -> Path:
    """A decoder that has seen words, one for each kind of layers, and how pictures are pooled."""
    words = folder / f"decoder-{variant.layers}"
    if not (words / "model.safetensors").is_file():
        decoder.train(tower, words, rows, drill_steps=DRILL_STEPS, **LAYERS[variant.layers])
    pooled = folder / f"decoder-{variant.layers}-{variant.pooling}"
    model, processor = AutoModelForImageTextToText.from_pretrained(words), AutoProcessor.from_pretrained(words)
    model.config.pooling_mode = variant.pooling
    processor.image_processor.image_seq_length = model.config.image_seq_length
    model.save_pretrained(pooled)
    processor.save_pretrained(pooled)
    return pooled


def run(variant: Variant, tower: Path, folder: Path, name: str, scale: float) -> Path:
    """The last stage's folder."""
    checkpoint = start(variant, tower, folder, round(decoder.ROWS * scale))
    for stage in variant.stages:
        recipe = yaml.safe_load(Path(__file__).with_name(f"{stage}.yaml").read_text())
        arguments = recipe["data"][0]["arguments"]
        arguments["length"] = round(arguments["length"] * scale)
        if stage != "align":
            arguments["replay"] = variant.replay
        output = folder / name.replace(",", "").replace(" ", "-") / stage
        recipe.update(model=str(checkpoint), output_dir=str(output))
        if variant.pooling == "none":
            recipe["pack_to"] *= 4  # as a picture has four times the tokens
        output.mkdir(parents=True, exist_ok=True)
        file = output / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe))
        if not (output / "model.safetensors").is_file():
            train_recipe(file)
        checkpoint = output
    return checkpoint


def draw(results: dict, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(results)
    for number, (name, scores) in enumerate(results.items()):
        places = [task + (number - len(results) / 2) * width for task in range(len(TASKS))]
        axes.bar(places, [100 * scores[task] for task in TASKS], width, align="edge", label=name)
    axes.set_xticks(range(len(TASKS)), [task.replace(" ", "\n", 2) for task in TASKS], fontsize=8)
    axes.set(ylabel="right, %", ylim=(0, 100))
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", type=Path, required=True, help="a folder that `tiny.tower` wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=0.25, help="of the rows of the shipped checkpoint")
    parser.add_argument("--share", type=float, default=0.5, help="of the cases of each task")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    results = {}
    for name in arguments.variants:
        started = time.process_time()
        checkpoint = run(VARIANTS[name], arguments.tower, arguments.output, name, arguments.scale)
        file = checkpoint / "results.json"
        if not file.is_file():
            scores = evaluate(checkpoint, share=arguments.share, only=TASKS)
            file.write_text(json.dumps({task: round(accuracy, 4) for task, (accuracy, _) in scores.items()}, indent=2))
        results[name] = json.loads(file.read_text())
        print(f"{name}: {(time.process_time() - started) / 60:.1f} CPU minutes", flush=True)
    (arguments.output / "ablation.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(results, arguments.output / "ablation.png")
    print("| | " + " | ".join(TASKS) + " |\n" + "|---" * (len(TASKS) + 1) + "|")
    for name, scores in results.items():
        print(f"| {name} | " + " | ".join(f"{100 * scores[task]:.1f}" for task in TASKS) + " |")


if __name__ == "__main__":
    main()
