# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
The vision tower of the small checkpoint, in the place of a published CLIP: taught to name what is pasted on a picture.

    python -m tiny.tower --output tower --steps 6000

It learns by classification (the nouns, the ten digits, nothing), from the hidden states that LongLLaVA reads: each pooled
patch says what is in the picture, and so does their mean. It stops and resumes at any step: `--output` holds the weights,
the optimiser and the step.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from longllava_hf.modeling_longllava import pool_patches

from .assets import ARTISTS, HELD_OUT_ARTIST, STAMPS, TEST_FOOTAGE, cut_outs, footage
from .nouns import NOUNS
from .pictures import IMAGE_SIZE, SHAPES, Pictures, _premultiplied, crop, digit_scans, draw_digit, pad, paste


CLASSES = [*NOUNS, *map(str, range(10)), "nothing"]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def tower_config(hidden_size=192, intermediate_size=384, layers=6, heads=3, patch_size=16) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        projection_dim=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=IMAGE_SIZE,
        patch_size=patch_size,
    )


def normalize(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 pictures as the image processor gives them, `(n, 3, height, width)`."""
    return (torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


class NamingTower(nn.Module):
    """
    The layers of a tower that LongLLaVA reads, and a cosine classifier: two artists' drawings of a thing are to have
    nearly the same features, as pictures are matched by them.
    """

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        config = CLIPVisionConfig(**{**config.to_dict(), "num_hidden_layers": config.num_hidden_layers - 1})
        self.tower = CLIPVisionModel(config)
        self.classes = nn.Parameter(torch.randn(len(CLASSES), config.hidden_size))
        self.scale = nn.Parameter(torch.tensor(math.log(12.0)))

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What LongLLaVA pools, `(n, tokens, hidden_size)`: the last states before the final norm."""
        hidden = self.tower(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]
        return pool_patches(hidden, "2d")

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the whole picture `(n, classes)`, and of each pooled patch `(n, tokens, classes)`."""
        tokens = self.features(pixel_values)
        classes = functional.normalize(self.classes, dim=-1) * self.scale.exp()
        whole = functional.normalize(tokens.mean(dim=1), dim=-1) @ classes.T
        return whole, functional.normalize(tokens, dim=-1) @ classes.T


def training_batch(pictures: Pictures, step: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch `step`, always the same."""
    rng = random.Random(f"tower-{seed}-{step}")
    images, labels = [], []
    for _ in range(size):
        kind = rng.random()
        if kind < 0.08:
            name, image = pictures.digit(rng)
        elif kind < 0.16:
            name, image = "nothing", pad(pictures.background(rng.choice(SHAPES), rng))
        else:
            name = rng.choice(NOUNS)
            image = pictures.object(name, rng)
        images.append(image)
        labels.append(CLASSES.index(name))
    pixels = normalize(images)
    generator = torch.Generator().manual_seed(rng.getrandbits(31))
    return pixels + 0.08 * torch.randn(pixels.shape, generator=generator), torch.tensor(labels)


def test_pictures(seed: int = 1, cases: int = 400) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Objects on the film that is kept for the test, by trained artists, the other artist and as photographs; digits."""
    rng = random.Random(seed)
    frames = footage(TEST_FOOTAGE)
    result = {}
    for name, artists in (("trained", ARTISTS), ("held-out artist", [HELD_OUT_ARTIST]), ("photographs", [STAMPS])):
        images, labels = [], []
        for _ in range(cases):
            bank = _premultiplied(rng.choice(artists), "own")
            noun = rng.choice([noun for noun in NOUNS if noun in bank])
            images.append(pad(paste(crop(rng.choice(frames), rng.choice(SHAPES), rng), rng.choice(bank[noun]), rng)))
            labels.append(CLASSES.index(noun))
        result[name] = normalize(images), torch.tensor(labels)
    scans, digits = digit_scans()["test"]
    images = [pad(draw_digit(scan, rng.choice(SHAPES))) for scan in scans]
    result["digits"] = normalize(images), torch.tensor([CLASSES.index(str(digit)) for digit in digits])
    images = [pad(crop(rng.choice(frames), rng.choice(SHAPES), rng)) for _ in range(cases)]
    result["footage"] = normalize(images), torch.full((cases,), CLASSES.index("nothing"))
    return result


@torch.no_grad()
def measure(model: NamingTower, tests: dict) -> dict[str, float]:
    model.eval()
    result = {}
    for name, (pixels, labels) in tests.items():
        right = [(model(p)[0].argmax(-1) == l).float().mean().item() * len(l) for p, l in zip(pixels.split(100), labels.split(100))]
        result[name] = round(sum(right) / len(labels), 4)
    model.train()
    return result


def train(output: Path, config: CLIPVisionConfig, steps: int, batch: int, learning_rate: float, seed: int) -> None:
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = NamingTower(config)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=learning_rate, betas=(0.9, 0.98),
    )
    pictures, tests, first, spent = Pictures(NOUNS), test_pictures(), 0, 0.0
    state_file = output / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]
    started, losses = time.process_time() - spent, []
    for step in range(first, steps):
        rate = min(1, (step + 1) / (0.04 * steps)) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        pixels, labels = training_batch(pictures, step, batch, seed)
        whole, tokens = model(pixels)
        loss = functional.cross_entropy(whole, labels, label_smoothing=0.05)
        each = functional.cross_entropy(
            tokens.flatten(0, 1), labels.repeat_interleave(tokens.shape[1]), label_smoothing=0.05
        )
        (loss + 0.3 * each).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss.item(), each.item()))
        if (step + 1) % 250 == 0 or step + 1 == steps:
            minutes = (time.process_time() - started) / 60
            line = {"step": step + 1, "cpu_minutes": round(minutes, 2), "loss": np.mean(losses, axis=0).round(3).tolist()}
            losses = []
            line |= measure(model, tests)
            print(json.dumps(line), flush=True)
            with open(output / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": step + 1, "seconds": 60 * minutes}, output / "state.pt.new")
            (output / "state.pt.new").replace(state_file)
    model.tower.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    for name in ("hidden_size", "intermediate_size", "layers", "heads", "patch_size"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=argparse.SUPPRESS)
    arguments = vars(parser.parse_args())
    named = {name: arguments.pop(name) for name in ("output", "steps", "batch", "learning_rate", "seed")}
    train(config=tower_config(**arguments), **named)


if __name__ == "__main__":
    main()
