# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
The vision tower of the small checkpoint, in the place of a published CLIP: taught to name what is pasted on a picture.

    python -m tiny.tower --output tower

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
from .pictures import IMAGE_SIZE, WIDE, Pictures, crop, digit_scans, draw_digit, pad, paste, shorten


CLASSES = [*NOUNS, *map(str, range(10)), "nothing"]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def tower_config(hidden_size=160, intermediate_size=320, layers=6, heads=4, patch_size=8) -> CLIPVisionConfig:
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
    """uint8 pictures as the image processor gives them, `(n, 3, size, size)`."""
    return (torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


class NamingTower(nn.Module):
    """The layers of a tower that LongLLaVA reads, and a classifier on what it pools."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        config = CLIPVisionConfig(**{**config.to_dict(), "num_hidden_layers": config.num_hidden_layers - 1})
        self.tower = CLIPVisionModel(config)
        # Without what all pictures have in common, which at first is nearly everything.
        self.norm = nn.BatchNorm1d(config.hidden_size, affine=False)
        self.classifier = nn.Linear(config.hidden_size, len(CLASSES))

    @property
    def layers(self) -> nn.Module:
        return getattr(self.tower, "vision_model", self.tower)  # before Transformers 5.20 one level deeper

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What LongLLaVA pools, `(n, tokens, hidden_size)`: the last states before the final norm."""
        hidden = self.tower(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]
        return pool_patches(hidden, "2d")

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the whole picture `(n, classes)`, and of each pooled patch `(n, tokens, classes)`."""
        tokens = self.features(pixel_values)
        tokens = self.norm(tokens.flatten(0, 1)).view_as(tokens)
        return self.classifier(tokens.mean(dim=1)), self.classifier(tokens)

    @torch.no_grad()
    def prepare(self, pixel_values: torch.Tensor) -> None:
        """
        A good start, from some pictures: patches are embedded by their principal components, each as loud as the others;
        places are waves. A random start costs a tower this small a good part of its training.
        """
        embeddings, config = self.layers.embeddings, self.tower.config
        size, width = config.patch_size, config.hidden_size
        patches = functional.unfold(pixel_values, size, stride=size).transpose(1, 2).flatten(0, 1)
        patches = patches - patches.mean(dim=1, keepdim=True) * 0.5
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        values, vectors = values.flip(0)[:width], vectors.flip(1)[:, :width]
        scale = (values + 0.02 * values[: width // 4].mean()).rsqrt()
        embeddings.patch_embedding.weight.copy_((vectors * scale).T.reshape(-1, 3, size, size))
        side = config.image_size // size
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        rates = math.pi / side * 2.0 ** (torch.arange(width // 4) / (width // 4) * math.log2(side))
        waves = [f(p.flatten()[:, None] * rates) for p in (x, y) for f in (torch.sin, torch.cos)]
        embeddings.position_embedding.weight[1:] = torch.cat(waves, dim=1)
        for layer in self.layers.encoder.layers:
            # A patch looks at what resembles it, so at its neighbours first (Trockman and Kolter, 2023).
            attention = layer.self_attn
            nn.init.normal_(attention.q_proj.weight, std=0.7 * width**-0.5)
            attention.k_proj.weight.copy_(attention.q_proj.weight)


class Muon(torch.optim.Optimizer):
    """
    Momentum whose matrices are made orthogonal (Jordan et al., 2024), in float32 and all of one shape at once: PyTorch's own
    works in bfloat16, which most CPUs only emulate.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.02, iterations: int = 4):
        super().__init__(params, {"lr": lr})
        self.momentum, self.weight_decay, self.iterations = momentum, weight_decay, iterations

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                for p in params:
                    state = self.state[p]
                    state.setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - self.momentum)
                update = torch.stack([p.grad.lerp(self.state[p]["momentum"], self.momentum) for p in params])
                update = update if shape[0] <= shape[1] else update.mT
                update = update / (update.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(self.iterations):
                    square = update @ update.mT
                    update = 3.4445 * update + (-4.775 * square + 2.0315 * square @ square) @ update
                update = update if shape[0] <= shape[1] else update.mT
                scale = max(1, shape[0] / shape[1]) ** 0.5
                for p, change in zip(params, update):
                    p.mul_(1 - group["lr"] * self.weight_decay).add_(change, alpha=-group["lr"] * scale)


def training_batch(
    pictures: Pictures, step: int, size: int, seed: int, ease: float = 0.0, wide: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Batch `step`, always the same.

    Args:
        ease (`float`, defaults to 0): share of pictures that are large, as their artists drew them, with nothing behind.
        wide (`float`, defaults to 0): share of pictures that are wider than high.
    """
    rng = random.Random(f"tower-{seed}-{step}")
    images, labels = [], []
    for _ in range(size):
        height = rng.choice(WIDE) if wide and rng.random() < wide else IMAGE_SIZE
        kind = rng.random()
        if kind < 0.08:
            name = str(rng.randrange(10))
            image = pictures.digit(name, rng, height)
        elif kind < 0.22:
            name, image = "nothing", pictures.nothing(rng, height=height)
        else:
            name = rng.choice(NOUNS)
            image = pictures.object(name, rng, easy=rng.random() < ease, height=height)
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
    for name, artists in (
        ("trained", ARTISTS),
        ("held-out artist", [HELD_OUT_ARTIST]),
        ("photographs", [STAMPS]),
        ("trained, wide", ARTISTS),
    ):
        images, labels = [], []
        for _ in range(cases):
            bank = cut_outs(rng.choice(artists))
            noun = rng.choice([noun for noun in NOUNS if noun in bank])
            background = crop(rng.choice(frames), IMAGE_SIZE, rng)
            background = shorten(background, rng.choice(WIDE) if name.endswith("wide") else IMAGE_SIZE)
            images.append(pad(paste(background, rng.choice(bank[noun]), rng)))
            labels.append(CLASSES.index(noun))
        result[name] = normalize(images), torch.tensor(labels)
    scans, digits = digit_scans()["test"]
    images = [draw_digit(scan) for scan in scans]
    result["digits"] = normalize(images), torch.tensor([CLASSES.index(str(digit)) for digit in digits])
    images = [crop(rng.choice(frames), IMAGE_SIZE, rng) for _ in range(cases)]
    result["footage"] = normalize(images), torch.full((cases,), CLASSES.index("nothing"))
    return result


@torch.no_grad()
def measure(model: NamingTower, tests: dict) -> dict[str, float]:
    model.eval()
    result = {}
    for name, (pixels, labels) in tests.items():
        pairs = zip(pixels.split(100), labels.split(100))
        right = sum((model(some)[0].argmax(-1) == wanted).sum().item() for some, wanted in pairs)
        result[name] = round(right / len(labels), 4)
    model.train()
    return result


def train(
    output: Path,
    config: CLIPVisionConfig,
    steps: int,
    batch: int,
    muon_rate: float,
    learning_rate: float,
    seed: int,
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = NamingTower(config)
    # Muon for the layers' matrices: it needs far fewer pictures than AdamW.
    matrices = [p for p in model.layers.encoder.parameters() if p.ndim == 2] if muon_rate else []
    known = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in known]
    optimizers = [torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.02)]
    if muon_rate:
        optimizers.append(Muon(matrices, muon_rate))
    pictures, tests, first, spent = Pictures(NOUNS), test_pictures(), 0, 0.0
    state_file = output / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        first, spent = state["step"], state["seconds"]
    else:
        model.prepare(training_batch(pictures, 0, 512, seed + 1)[0])
    started, losses = time.process_time() - spent, []
    for step in range(first, steps):
        progress = step / steps
        rate = min(1, (step + 1) / 200) * min(1, (1 - progress) / 0.7)
        for optimizer, highest in zip(optimizers, (learning_rate, muon_rate)):
            for group in optimizer.param_groups:
                group["lr"] = highest * rate
        pixels, labels = training_batch(
            pictures, step, batch, seed, 1 - 20 * progress, wide=0.25 if progress > 0.3 else 0.0
        )
        whole, tokens = model(pixels)
        loss = functional.cross_entropy(whole, labels, label_smoothing=0.05)
        each = functional.cross_entropy(
            tokens.flatten(0, 1), labels.repeat_interleave(tokens.shape[1]), label_smoothing=0.05
        )
        (loss + 0.3 * each).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append((loss.item(), each.item()))
        if (step + 1) % 500 == 0 or step + 1 == steps:
            minutes = (time.process_time() - started) / 60
            line = {
                "step": step + 1,
                "cpu_minutes": round(minutes, 2),
                "loss": np.mean(losses, axis=0).round(3).tolist(),
            }
            losses = []
            line |= measure(model, tests)
            print(json.dumps(line), flush=True)
            with open(output / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            torch.save({**state, "step": step + 1, "seconds": 60 * minutes}, output / "state.pt.new")
            (output / "state.pt.new").replace(state_file)
    model.tower.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=13000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    for name in ("hidden_size", "intermediate_size", "layers", "heads", "patch_size"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=argparse.SUPPRESS)
    arguments = vars(parser.parse_args())
    options = ("output", "steps", "batch", "muon_rate", "learning_rate", "seed")
    named = {name: arguments.pop(name) for name in options}
    train(config=tower_config(**arguments), **named)


if __name__ == "__main__":
    main()
