# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
Photographs of 12 megapixels from disk to pixel values, against CLIP's image processor in a plain loop, which pads to a
square as the authors' code does: throughput, and whether every pixel is identical.

    pip install -e ".[tiny]"
    python benchmarks/preprocessing.py [--photos 200]
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from report import RESULTS, machine, print_table, time_side_by_side, write_json
from sklearn.datasets import load_sample_images
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from longllava_hf import LongLLaVAImageProcessor


PEER = "CLIPImageProcessor in a loop"


def write_photos(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """
    Parts of scikit-learn's two photographs, enlarged, with a camera's noise; every second one upright. Twenty are
    different, and read again and again.
    """
    photos = [Image.fromarray(image) for image in load_sample_images().images]
    generator = np.random.default_rng(0)
    files = []
    for i in range(min(count, 20)):
        shape = size if i % 2 else size[::-1]
        corner = generator.uniform(0, 0.3, 2) * photos[i % 2].size
        photo = photos[i % 2].crop((*corner, *photos[i % 2].size)).resize(shape, Image.Resampling.BICUBIC)
        noise = generator.integers(-6, 7, (shape[1], shape[0], 1), dtype=np.int16)
        photo = Image.fromarray((np.asarray(photo, dtype=np.int16) + noise).clip(0, 255).astype(np.uint8))
        files.append(folder / f"{i}.jpg")
        photo.save(files[-1], quality=90)
    return [files[i % len(files)] for i in range(count)]


def plain_loop(files: list[Path]) -> torch.Tensor:
    sizes = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    clip = CLIPImageProcessorPil(**sizes)
    background = tuple(int(x * 255) for x in clip.image_mean)
    pixel_values = []
    for file in files:
        photo = Image.open(file).convert("RGB")
        side = max(photo.size)
        square = Image.new("RGB", (side, side), background)
        square.paste(photo, ((side - photo.width) // 2, (side - photo.height) // 2))
        pixel_values.append(clip(square, return_tensors="pt")["pixel_values"])
    return torch.cat(pixel_values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--size", default="4000x3000", help="pixels, width x height")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    arguments = parser.parse_args()
    width, height = map(int, arguments.size.split("x"))
    processor = LongLLaVAImageProcessor()
    with tempfile.TemporaryDirectory() as folder:
        files = write_photos(Path(folder), arguments.photos, (width, height))
        candidates = {
            PEER: lambda: plain_loop(files),
            "ours": lambda: processor(files, return_tensors="pt")["pixel_values"],
            "ours, lazy": lambda: processor(files, return_tensors="pt", lazy=True)["pixel_values"].load(),  # noqa: PLW0108
        }
        results: dict[str, torch.Tensor] = {}

        def keeping(name: str) -> Callable[[], None]:
            return lambda: results.update({name: candidates[name]()})

        seconds = time_side_by_side({name: keeping(name) for name in candidates}, arguments.rounds)
    rows = [
        {
            "photos": arguments.photos,
            "size": arguments.size,
            "with": name,
            "times the throughput": seconds[PEER]["minimum"] / seconds[name]["minimum"],
            "identical": torch.equal(results[name], results[PEER]),
        }
        for name in candidates
    ]
    print_table(rows)
    print(f"written: {write_json('preprocessing_cpu', {**machine(), 'rows': rows}, arguments.output)}")


if __name__ == "__main__":
    main()
