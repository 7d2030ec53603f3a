# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
Damage what is read from outside, and see that it is either read rightly or refused with an error that names it.

    python scripts/fuzz.py --seed 0 --count 300
    python scripts/fuzz.py --kinds films --only 17 --keep FOLDER    # one case again, its files left there

A case depends on the seed, its kind and its number alone; those below zero are the intact files, which must be read. The
right answer, or a `ValueError` or `OSError` that names the file, within the limits of time and memory, is what should
happen. Everything else is printed, grouped by where it comes from, and makes the exit status 1. Linux only.
"""

import argparse
import contextlib
import faulthandler
import io
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Workers are forked, and threads are not.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import av
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import longllava_hf
from longllava_hf import (
    LongLLaVAConfig,
    LongLLaVAContext,
    LongLLaVAForConditionalGeneration,
    LongLLaVAImageProcessor,
    LongLLaVAProcessor,
)
from longllava_hf.video_longllava import VideoFile


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from report import machine, print_table, write_json


ROOT = Path(__file__).resolve().parent.parent
TINY = Path(longllava_hf.TINY)
PUBLISHED = ROOT / "modeling_tests" / "fixtures" / "longllava-moe-tiny"
SECONDS, MEGABYTES = 20.0, 1024
SIDE = 48  # of a picture, in pixels


# Damage

Damage = Callable[[Random, bytes, bytes], bytes]
INTEGERS = (0, 1, 0x7FFFFFFF, 0xFFFFFFFF)


def _spot(random: Random, data: bytes) -> int:
    """An offset, often near the start or the end, where formats keep what they say of themselves."""
    offset = random.randrange(random.choice((len(data), min(len(data), 256), min(len(data), 1024))))
    return offset if random.random() < 0.75 else len(data) - 1 - offset


def _block(random: Random, data: bytes) -> slice:
    start = _spot(random, data)
    return slice(start, start + random.choice((1, 4, 16, 256, 4096)))


def flip_bits(random: Random, data: bytes, other: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 4, 32))):
        changed[_spot(random, data)] ^= 1 << random.randrange(8)
    return bytes(changed)


def overwrite(random: Random, data: bytes, other: bytes) -> bytes:
    block = random.randbytes(random.choice((1, 2, 8, 64)))
    start = _spot(random, data)
    return data[:start] + block + data[start + len(block) :]


def write_integer(random: Random, data: bytes, other: bytes) -> bytes:
    size, order = random.choice((2, 4, 8)), random.choice(("big", "little"))
    block = (random.choice(INTEGERS) % (1 << 8 * size)).to_bytes(size, order)
    start = _spot(random, data)
    return data[:start] + block + data[start + size :]


def truncate(random: Random, data: bytes, other: bytes) -> bytes:
    return data[: _spot(random, data)]


def extend(random: Random, data: bytes, other: bytes) -> bytes:
    return data + random.choice((b"\0", b"\xff" * 7, random.randbytes(4096), bytes(1 << 20), data, other))


def remove_block(random: Random, data: bytes, other: bytes) -> bytes:
    block = _block(random, data)
    return data[: block.start] + data[block.stop :]


def repeat_block(random: Random, data: bytes, other: bytes) -> bytes:
    block = _block(random, data)
    return data[: block.stop] + data[block] * random.choice((1, 1, 100)) + data[block.stop :]


def swap_blocks(random: Random, data: bytes, other: bytes) -> bytes:
    a, b, c, d = sorted(_spot(random, data) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def splice(random: Random, data: bytes, other: bytes) -> bytes:
    return data[: _spot(random, data)] + other[_spot(random, other) :]


BYTES: tuple[Damage, ...] = (
    flip_bits, overwrite, write_integer, truncate, extend, remove_block, repeat_block, swap_blocks, splice,
)  # fmt: skip


def damage_bytes(random: Random, data: bytes, other: bytes) -> tuple[bytes, str]:
    """What one to three changes make of `data`, and their names; `other` is what is spliced in."""
    names = []
    for change in random.choices(BYTES, k=random.choice((1, 1, 1, 2, 3))):
        if data and other:
            data = change(random, data, other)
            names.append(change.__name__)
    return data, ", ".join(names)


NUMBERS = (0, -1, 1, 3, 2**31 - 1, 2**32 - 1, 2**63, -(10**9), 10**30, 0.5, -1e300, math.nan, math.inf, -math.inf)
OTHERS = (
    None,
    True,
    False,
    "",
    "7",
    "NaN",
    "auto",
    "../..",
    "/etc/passwd",
    "\u0001\ud800",
    [],
    [1],
    [[]],
    {},
    {"a": 1},
)


def damage_json(random: Random, text: str, extra: Iterable[Any] = (), swaps: bool = True) -> tuple[str, str]:
    """
    Text that `text` becomes with one to three of its values or keys changed, and what was changed.

    Args:
        extra (`Iterable`): more values to choose from.
        swaps (`bool`, defaults to `True`): whether values may change places.
    """
    document, names = json.loads(text), []
    values = (*NUMBERS, *OTHERS, *extra, *extra)

    def change(container: Any, key: Any) -> str:
        kinds = ["value", "value", "number", "delete", "long", "deep", *["swap"] * swaps]
        kind = random.choice([*kinds, "unknown", "twice"] if isinstance(container, dict) else kinds)
        if kind == "delete":
            del container[key]
        elif kind == "swap":
            keys = list(container) if isinstance(container, dict) else range(len(container))
            other = random.choice(keys)
            container[key], container[other] = container[other], container[key]
        elif kind == "unknown":
            container[random.choice(("unknown", "", "__class__", "from_dict", "self", "x" * 10_000))] = random.choice(
                values
            )
        elif kind == "twice":
            container[f"{key}\0"] = random.choice(values)
        else:
            container[key] = {
                "value": random.choice(values),
                "number": random.choice(NUMBERS),
                "long": "x" * 1_000_000,
                "deep": f"\0{random.choice((50, 900, 100_000))}",
            }[kind]
        return f"{kind} at {key!r:.80}"

    if random.random() < 0.05:
        document, names = random.choice(values), ["root"]
    else:
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            if document:
                names.append(change(*_json_spot(random, document)))
    text = json.dumps(document)
    # What Python has no value for was marked: a key that is there twice, and nesting that `dumps` would not write.
    text = text.replace('\\u0000":', '":')
    text = re.sub(r'"\\u0000(\d+)"', lambda found: "[" * int(found[1]) + "]" * int(found[1]), text)
    return text, ", ".join(names)


def _json_spot(random: Random, container: Any) -> tuple[Any, Any]:
    """A container and a key of it, at any depth; those of long lists are not favoured."""
    key = random.choice(list(container) if isinstance(container, dict) else range(len(container)))
    child = container[key]
    if isinstance(child, (dict, list)) and child and random.random() < 0.7:
        return _json_spot(random, child)
    return container, key


# What is read


class WrongAnswerError(Exception):
    """Something was read, but it is not what the file says."""


class Kind:
    """
    Files of one kind: those that are damaged, and how they are read.

    Args:
        folder (`Path`): for what it has to write beforehand.
    """

    name = ""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seeds: dict[str, bytes] = {}

    def damage(self, random: Random, name: str, data: bytes) -> tuple[bytes, str]:
        """Another content for a seed, and a description."""
        return damage_bytes(random, data, random.choice(list(self.seeds.values())))

    def place(self, name: str, data: bytes, folder: Path) -> Path:
        """Write the file, and whatever belongs to it."""
        file = folder / name
        file.write_bytes(data)
        return file

    def names(self, name: str, file: Path) -> tuple[str, ...]:
        """An error about a seed's file must have one of these in it."""
        return (file.name,)

    def read(self, random: Random, name: str, file: Path) -> Iterable[torch.Tensor]:
        """What a seed's file says, all of which must be finite. Raises `WrongAnswerError` where it can be told."""
        raise NotImplementedError


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise WrongAnswerError(message)


def _check_equal(answers: list[torch.Tensor], expected: list[torch.Tensor]) -> list[torch.Tensor]:
    shapes = [[tuple(x.shape) for x in tensors] for tensors in (answers, expected)]
    _check(shapes[0] == shapes[1], f"the shapes are {shapes[0]} and should be {shapes[1]}")
    _check(all(map(torch.equal, answers, expected)), "the values are others than those of the intact file")
    return answers


class Pictures(Kind):
    """Pictures, as bytes and as paths, eager and lazy, whole and in tiles."""

    name = "pictures"

    def __init__(self, folder: Path):
        super().__init__(folder)
        values = np.random.default_rng(0).integers(0, 256, (10, 14, 4)).astype(np.uint8)
        rgba = Image.fromarray(values).resize((56, 40))
        rgb, exif = rgba.convert("RGB"), Image.Exif()
        exif[0x0112] = 6  # lies on its side
        frames = {"save_all": True, "append_images": [rgb.rotate(90 * i) for i in (1, 2)], "duration": 40}
        deep = Image.fromarray(np.asarray(rgb.convert("L"), dtype=np.uint16) * 257)
        pictures: list[tuple[str, Image.Image, dict]] = [
            *((f"{mode}.png", rgba.convert(mode), {}) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")),
            ("deep.png", deep, {}),
            ("animated.png", rgb, frames),
            ("exif.jpg", rgb, {"exif": exif, "quality": 90}),
            ("progressive.jpg", rgb, {"progressive": True}),
            ("cmyk.jpg", rgb.convert("CMYK"), {}),
            ("still.gif", rgb, {}),
            ("animated.gif", rgb, frames),
            ("sideways.tiff", rgb, {"exif": exif}),
            ("lzw.tiff", rgb, {"compression": "tiff_lzw"}),
            ("lossy.webp", rgb, {"exif": exif}),
            ("lossless.webp", rgba, {"lossless": True}),
            ("plain.bmp", rgb, {}),
        ]
        for name, image, options in pictures:
            file = io.BytesIO()
            image.save(file, format={"jpg": "JPEG"}.get(name.split(".")[1], name.split(".")[1]), **options)
            self.seeds[name] = file.getvalue()
        size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
        self.processor = LongLLaVAImageProcessor(**size, image_seq_length=4)

    def names(self, name, file):
        return file.name, f"{file.stat().st_size} bytes", "Image 0"

    def read(self, random, name, file):
        source = random.choice((str(file), file.read_bytes()))
        options = {"patch_strategy": random.choice(("none", "best_fit")), "return_tensors": "pt"}
        is_lazy = random.random() < 0.5
        pixels = self.processor(source, lazy=is_lazy, **options)["pixel_values"]
        if is_lazy:
            pixels = pixels.load()
            _check_equal([pixels], [self.processor(source, **options)["pixel_values"]])
        _check(pixels.shape[0] >= 1 and pixels.shape[1:] == (3, SIDE, SIDE), f"the shape is {tuple(pixels.shape)}")
        return [pixels]


class Films(Kind):
    """Films in the usual containers, as bytes and as paths."""

    name = "films"
    FILMS = {
        "h264.mp4": ("libx264", {"bf": "2", "g": "6"}),
        "index_first.mp4": ("libx264", {"bf": "2", "g": "6"}),
        "h264_without_b.mp4": ("libx264", {"bf": "0", "g": "6"}),
        "mpeg4.mp4": ("mpeg4", {"g": "6"}),
        "h264.mkv": ("libx264", {"bf": "2", "g": "6"}),
        "mpeg4.avi": ("mpeg4", {"g": "6"}),
        "h264.ts": ("libx264", {"bf": "2", "g": "6"}),
        "mpeg2.ts": ("mpeg2video", {"g": "6"}),
        "vp8.webm": ("libvpx", {"g": "6"}),
        "film.gif": ("gif", {}),
    }

    def __init__(self, folder: Path):
        super().__init__(folder)
        for name, (codec, options) in self.FILMS.items():
            file = folder / name
            # The same bytes each time: no random identifiers, no dates, one thread.
            container_options = {"fflags": "+bitexact", **({"movflags": "faststart"} if "first" in name else {})}
            options = {**options, "flags": "+bitexact", "threads": "1"}
            with av.open(str(file), "w", options=container_options) as container:
                stream = container.add_stream(codec, rate=25, options=options)
                stream.width, stream.height = 64, 48
                stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
                for i in range(16):
                    frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (15 * i, 255 - 15 * i, 99)))
                    container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
                container.mux(stream.encode())
            self.seeds[name] = file.read_bytes()

    def names(self, name, file):
        return file.name, f"{file.stat().st_size} bytes"

    def read(self, random, name, file):
        source = random.choice((str(file), file.read_bytes()))
        film = VideoFile(source, **random.choice(({}, {"num_frames": 1}, {"num_frames": 5}, {"fps": 10})))
        count = 0
        for image in film:
            _check(image.mode == "RGB" and min(image.size) > 0, f"frame {count} is {image}")
            count += 1
        _check(count == len(film) > 0, f"{count} frames were read of {len(film)}")
        return []


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    """What a model makes of one picture in a prompt."""
    config, side = model.config, model.config.vision_config.image_size
    ids = torch.tensor([[1, 5, 6, *[config.image_token_id] * config.image_seq_length, 7, 8]])
    logits = model(input_ids=ids, pixel_values=torch.linspace(-1, 1, 3 * side * side).view(1, 3, side, side)).logits
    expected = (*ids.shape, config.get_text_config().vocab_size)
    _check(tuple(logits.shape) == expected, f"the shape is {tuple(logits.shape)} and should be {expected}")
    return logits


class Contexts(Kind):
    """Contexts that were kept; one that is loaded must answer as the one that was saved."""

    name = "contexts"

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.model = LongLLaVAForConditionalGeneration.from_pretrained(TINY).eval()
        self.processor = LongLLaVAProcessor.from_pretrained(TINY)
        self.question = self.processor.tokenizer("Which digit is this?", return_tensors="pt")["input_ids"]
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8))
        self.expected = {}
        for name, count in (("text.safetensors", 0), ("pictures.safetensors", 2)):
            text, images = "<image>" * count + "Look at this.", [picture] * count or None
            inputs = self.processor(text=text, images=images, return_tensors="pt")
            context = self.model.prefill(inputs["input_ids"], inputs.get("pixel_values"))
            context.metadata = {"title": "fuzz"}
            context.save(folder / name, self.model, self.processor)
            self.seeds[name] = _sorted_header((folder / name).read_bytes())
            self.expected[name] = self._answer(context)

    def damage(self, random, name, data):
        return damage_header(random, data) if random.random() < 0.4 else super().damage(random, name, data)

    def read(self, random, name, file):
        return _check_equal(self._answer(LongLLaVAContext.load(file, self.model, self.processor)), self.expected[name])

    def _answer(self, context: LongLLaVAContext) -> list[torch.Tensor]:
        """Logits of a greedy answer, and what a caller can see of the context."""
        hashes = torch.tensor([len(row) for row in context.image_hashes])
        known = context.input_ids.clone()
        options = {"min_new_tokens": 3, "max_new_tokens": 3, "do_sample": False, "output_logits": True}
        output = self.model.generate(self.question, cache=context, return_dict_in_generate=True, **options)
        return [known, hashes, *output.logits]


def _sorted_header(data: bytes) -> bytes:
    """The same safetensors file with the keys of its header in order; they are written in a random one."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return data[:8] + header.encode().ljust(end - 8) + data[end:]


def damage_header(random: Random, data: bytes, swaps: bool = True) -> tuple[bytes, str]:
    """A safetensors file with another header or length; the data stay what they are, but may be called differently."""
    end = 8 + int.from_bytes(data[:8], "little")
    header, weights = data[8:end], data[end:]
    kind = random.choice(("json", "json", "bytes", "start", "truncate", "extend"))
    if kind == "json":
        values = ("F64", "I32", "BOOL", [0, 4], [4, 4], [2**40, 2**41])
        text, what = damage_json(random, header.decode(), values, swaps)
        header = text.encode()
        return len(header).to_bytes(8, "little") + header + weights, f"header: {what}"
    if kind == "bytes":
        header, what = damage_bytes(random, header, header)
        return len(header).to_bytes(8, "little") + header + weights, f"header: {what}"
    if kind == "start":  # the length too, which then may no longer be right
        start, what = damage_bytes(random, data[:end], data[:end])
        return start + weights, f"start: {what}"
    return (truncate if kind == "truncate" else extend)(random, data, data), kind


class ModelKind(Kind):
    """Files of model folders: one is damaged, the others are linked to."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.folder = folder = folder / "intact"
        folder.mkdir()

    def add(self, root: str, source: Path, *damaged: str) -> None:
        """A folder to copy; `damaged` are the files in it that are to be damaged."""
        if source != self.folder / root:
            shutil.copytree(source, self.folder / root)
        for name in damaged:
            self.seeds[f"{root}/{name}"] = (self.folder / root / name).read_bytes()

    def damage(self, random, name, data):
        if name.endswith(".json") and random.random() < 0.8:
            text, what = damage_json(random, data.decode(), self.values(name))
            return text.encode("utf-8", "replace"), what
        return super().damage(random, name, data)

    def values(self, name: str) -> tuple:
        """What else a value in a JSON file may become."""
        return ()

    def place(self, name, data, folder):
        root = name.split("/")[0]
        shutil.copytree(self.folder / root, folder / root, copy_function=os.symlink)
        file = folder / name
        file.unlink()
        file.write_bytes(data)
        return file

    def names(self, name, file):
        return file.name, str(file.parents[name.count("/") - 1])  # or the folder that was given


class Safetensors(ModelKind):
    """The headers and lengths of a file of weights: either the model is what it was, or it is refused."""

    name = "safetensors"

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.add("tiny", TINY, "model.safetensors")
        self.expected = [_logits(LongLLaVAForConditionalGeneration.from_pretrained(TINY))]

    def damage(self, random, name, data):
        return damage_header(random, data, swaps=False)  # two weights' names may well be the other way round

    def read(self, random, name, file):
        return _check_equal([_logits(LongLLaVAForConditionalGeneration.from_pretrained(file.parent))], self.expected)


class Indexes(Safetensors):
    """Indexes of sharded weights. Outside of the folder lies a file of other weights, which must not be read."""

    name = "indexes"
    OUTSIDE = "outside.safetensors"

    def __init__(self, folder: Path):
        super().__init__(folder)
        model = LongLLaVAForConditionalGeneration.from_pretrained(TINY)
        model.save_pretrained(folder / "sharded", max_shard_size="2MB")
        self.seeds = {}
        self.add("sharded", folder / "sharded", "model.safetensors.index.json")
        self.shards = sorted(file.name for file in (folder / "sharded").glob("*.safetensors"))
        stored = self.folder / "sharded" / self.shards[0]
        weights = {name: -x for file in stored.parent.glob("*.safetensors") for name, x in load_file(file).items()}
        save_file(weights, folder / self.OUTSIDE, metadata={"format": "pt"})
        self.outside = folder / self.OUTSIDE

    def values(self, name):
        outside = (f"../{self.OUTSIDE}", f"x/../../{self.OUTSIDE}", str(self.outside), "..\\" + self.OUTSIDE)
        return *outside, *self.shards, ".", "config.json", "missing.safetensors", self.shards[0] + "\u0000"

    def damage(self, random, name, data):
        if random.random() < 0.75:
            return ModelKind.damage(self, random, name, data)
        # All that is in one shard is said to be elsewhere.
        shard, other = random.choice(self.shards), random.choice(self.values(name))
        text = data.decode().replace(json.dumps(shard), json.dumps(other))
        return text.encode(), f"{shard} is {other.replace(str(self.outside.parent), '')!r}"

    def place(self, name, data, folder):
        os.symlink(self.outside, folder / self.OUTSIDE)
        return super().place(name, data, folder)


class Configs(ModelKind):
    """
    Configurations, native and published, and the models made of them. Through this package's classes, as the `Auto`
    classes read a file themselves before they know whose it is.
    """

    name = "configs"

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.add("native", TINY, "config.json")
        self.add("published", PUBLISHED, "checkpoint/config.json", "clip-tiny-336/config.json")

    def read(self, random, name, file):
        folder = file.parent.parent / "checkpoint" if "published" in name else file.parent
        if random.random() < 0.1:
            LongLLaVAConfig.from_pretrained(folder)
            return []
        return [_logits(LongLLaVAForConditionalGeneration.from_pretrained(folder))]


class Processors(ModelKind):
    """What a processor is made of; then it is used on a picture and a prompt."""

    name = "processors"

    def __init__(self, folder: Path):
        super().__init__(folder)
        tokenizer = ("tokenizer_config.json", "tokenizer.json")
        self.add("whole", TINY, "processor_config.json", "chat_template.jinja", *tokenizer)
        self.add("split", TINY)
        whole = json.loads((TINY / "processor_config.json").read_text())
        (self.folder / "split" / "preprocessor_config.json").write_text(json.dumps(whole.pop("image_processor")))
        (self.folder / "split" / "processor_config.json").write_text(json.dumps(whole))
        self.add("split", self.folder / "split", "processor_config.json", "preprocessor_config.json")
        self.add("published", PUBLISHED)
        for file in tokenizer:
            shutil.copy(TINY / file, self.folder / "published" / "checkpoint")
        tower = "clip-tiny-336/preprocessor_config.json"
        self.add("published", self.folder / "published", "checkpoint/config.json", tower)
        self.picture = Image.new("RGB", (30, 20), (200, 100, 50))

    def names(self, name, file):
        # A damaged template may show a picture twice.
        return *super().names(name, file), "Image 0", "tokens in the prompts", "chat template"

    def read(self, random, name, file):
        folder = file.parent.parent / "checkpoint" if "published" in name else file.parent
        processor = LongLLaVAProcessor.from_pretrained(folder)
        content = [{"type": "image", "image": self.picture}, {"type": "text", "text": "Which digit is this?"}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
        ids, pixels = inputs["input_ids"], inputs["pixel_values"]
        pixels = pixels.load() if hasattr(pixels, "load") else torch.as_tensor(pixels)
        _check(ids.ndim == 2 and len(ids) == 1, f"`input_ids` has the shape {tuple(ids.shape)}")
        _check(pixels.ndim == 4 and pixels.shape[1] == 3, f"`pixel_values` has the shape {tuple(pixels.shape)}")
        return [ids, pixels]


KINDS: dict[str, type[Kind]] = {
    kind.name: kind for kind in (Pictures, Films, Contexts, Safetensors, Configs, Processors, Indexes)
}


# One case after another


@dataclass
class Outcome:
    """
    What became of a case.

    verdict: `"answered"`, `"refused"` or `"failed"`.
    cause: of a failure, the same for those that come from the same place.
    """

    kind: str
    number: int
    verdict: str
    cause: str = ""
    what: str = ""
    detail: str = ""


def _cause(error: BaseException) -> str:
    """An exception's class, and where it comes from: in this package, and in the end."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "longllava_hf" in Path(frame.filename).parts]
    places = dict.fromkeys(f"{Path(f.filename).name}:{f.name}" for f in (own[-1:] + frames[-1:]))
    return f"{type(error).__name__} in {' < '.join(places)}"


def make(kind: Kind, seed: int, number: int) -> tuple[Random, str, bytes, str]:
    """A case: what is random from there on, the seed's name, the content, and what was done to it."""
    random, names = Random(f"{seed} {kind.name} {number}"), list(kind.seeds)
    if number < 0:
        name = names[-number - 1]
        return random, name, kind.seeds[name], "nothing"
    name = random.choice(names)
    return random, name, *kind.damage(random, name, kind.seeds[name])


def judge(kind: Kind, seed: int, number: int, folder: Path) -> Outcome:
    """Write a case into an empty folder, read it, and say what became of it."""
    random, name, data, what = make(kind, seed, number)
    outcome = Outcome(kind.name, number, "failed", what=f"{name}: {what}")
    file = kind.place(name, data, folder)
    try:
        for tensor in kind.read(random, name, file):
            _check(
                not tensor.is_floating_point() or bool(tensor.isfinite().all()), "there are values that are not finite"
            )
    except BaseException as error:  # a panic in Rust is no `Exception`
        outcome.cause, outcome.detail = _cause(error), "".join(traceback.format_exception(error))
        if isinstance(error, (ValueError, OSError)):
            if number < 0:
                outcome.cause = f"intact, but {outcome.cause}"
            elif any(culprit in str(error) for culprit in kind.names(name, file)):
                outcome.verdict = "refused"
            else:
                by_key = any(f"`{key}`" in str(error) for key in re.findall(r"at '(\w+)'", what))
                outcome.cause = f"{'named by its key alone' if by_key else 'unnamed'}, {outcome.cause}"
        elif isinstance(error, WrongAnswerError):
            outcome.cause = f"wrong answer: {error}"
    else:
        outcome.verdict = "answered"
    return outcome


def _work(connection, kinds: list[Kind], seed: int, log: Path) -> None:
    """What a worker does: cases, one after another, until it is ended."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(log, "ab") as stream:
        for standard in (1, 2):
            os.dup2(stream.fileno(), standard)
        faulthandler.enable(stream)
        faulthandler.register(signal.SIGUSR1, stream)
        while True:
            i, number, folder = connection.recv()
            stream.truncate(0)
            connection.send(judge(kinds[i], seed, number, folder))


def _resident(pid: int, field: str) -> int:
    """Megabytes of a process, now (`VmRSS`) or at most (`VmHWM`); 0 where it has ended."""
    with contextlib.suppress(OSError):
        if found := re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()):
            return int(found[1]) // 1024
    return 0


class Worker:
    """A process that reads cases, and is replaced when it does not come back from one."""

    def __init__(self, kinds: list[Kind], seed: int, folder: Path, seconds: float, megabytes: int):
        self.kinds, self.seed, self.folder, self.seconds, self.megabytes = kinds, seed, folder, seconds, megabytes
        self.log, self.process = folder / "log", None

    def _start(self) -> None:
        fork = multiprocessing.get_context("fork")
        self.connection, theirs = fork.Pipe()
        arguments = (theirs, self.kinds, self.seed, self.log)
        self.process = fork.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None

    def run(self, i: int, number: int) -> Outcome:
        """One case of kind `i`; its files stay if it fails."""
        if self.process is None:
            self._start()
        pid, kind = self.process.pid, self.kinds[i]
        folder = self.folder / f"{kind.name}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the most so far is what is there now
        before, ends = _resident(pid, "VmRSS"), time.monotonic() + self.seconds
        outcome = None
        with contextlib.suppress(EOFError, OSError):
            self.connection.send((i, number, folder))
            while not (is_done := self.connection.poll(0.05)) and time.monotonic() < ends:
                if _resident(pid, "VmHWM") - before > self.megabytes:
                    break
            outcome = self.connection.recv() if is_done else None
        if _resident(pid, "VmHWM") - before > self.megabytes:
            outcome = self._lost(kind, number, f"more than {self.megabytes} MB", outcome)
        elif outcome is None:
            outcome = self._lost(kind, number, f"no answer within {self.seconds:g} s")
        if outcome.verdict != "failed":
            shutil.rmtree(folder)
        return outcome

    def _lost(self, kind: Kind, number: int, cause: str, outcome: Outcome | None = None) -> Outcome:
        """End the process, and tell where it was; `outcome` is what it said itself, if it did."""
        if self.process.exitcode is None:
            self.process.join(0.1)  # one that has crashed may not have been waited for yet
        if self.process.exitcode is None and outcome is None:
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.3)
        if (code := self.process.exitcode) is not None:
            cause = f"crashed with {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        detail = self.log.read_text(errors="replace")[-6000:] if outcome is None else outcome.detail
        own = re.findall(r'/longllava_hf/(\w+\.py)", line \d+ in (\w+)', detail)
        if own:
            cause += f" in {own[0][0]}:{own[0][1]}"
        self.stop()
        _, name, _, what = make(kind, self.seed, number)
        return Outcome(kind.name, number, "failed", cause, f"{name}: {what}", detail)


def fuzz(
    kinds: list[Kind],
    numbers: Iterable[int],
    folder: Path,
    seed: int = 0,
    seconds: float = SECONDS,
    megabytes: int = MEGABYTES,
    intact: bool = True,
) -> Iterator[Outcome]:
    """
    Outcomes of cases of each kind, in their order.

    Args:
        kinds (`list[Kind]`): which.
        numbers (`Iterable[int]`): of the cases.
        folder (`Path`): where their files are written; those of failures stay.
        seed (`int`, defaults to 0): of all randomness, with the kind's name and the number.
        seconds, megabytes: that a case may take, the latter on top of what the process has in memory before.
        intact (`bool`, defaults to `True`): also those that are not damaged, as the numbers below zero.
    """
    worker = Worker(kinds, seed, folder, seconds, megabytes)
    try:
        for i, kind in enumerate(kinds):
            for number in [*(range(-len(kind.seeds), 0) if intact else ()), *numbers]:
                yield worker.run(i, number)
    finally:
        worker.stop()


def summary(outcomes: list[Outcome]) -> list[dict]:
    """A row for each kind."""
    rows = []
    for kind in dict.fromkeys(outcome.kind for outcome in outcomes):
        found = Counter(outcome.verdict for outcome in outcomes if outcome.kind == kind)
        rows.append({"kind": kind, "tried": found.total(), **{v: found[v] for v in ("answered", "refused", "failed")}})
    return rows


def groups(outcomes: list[Outcome]) -> list[dict]:
    """A row for each cause of failures in a kind, the most frequent first."""
    found: dict[tuple[str, str], list[int]] = {}
    for outcome in outcomes:
        if outcome.verdict == "failed":
            found.setdefault((outcome.kind, outcome.cause), []).append(outcome.number)
    ordered = sorted(found.items(), key=lambda item: (item[0][0], -len(item[1])))
    return [{"kind": kind, "failed": len(n), "example": n[0], "cause": cause} for (kind, cause), n in ordered]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300, help="cases of each kind (default: %(default)s)")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS)
    )
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="these cases alone")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for one case (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the files of failures are left")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result is written")
    args = parser.parse_args(arguments)

    torch.set_num_threads(1)
    numbers, outcomes, known = args.only or range(args.count), [], set()
    with tempfile.TemporaryDirectory() as temporary:
        intact, cases = Path(temporary, "seeds"), args.keep or Path(temporary, "cases")
        cases.mkdir(parents=True, exist_ok=True)
        kinds = []
        for name in args.kinds:
            (intact / name).mkdir(parents=True)
            kinds.append(KINDS[name](intact / name))
        started = time.monotonic()
        for outcome in fuzz(kinds, numbers, cases, args.seed, args.seconds, intact=args.only is None):
            outcomes.append(outcome)
            if outcome.verdict == "failed":
                print(f"\n{outcome.kind} {outcome.number} ({outcome.what}): {outcome.cause}")
                if outcome.cause not in known or args.only:  # a traceback of each sort is enough
                    print("\n".join(line[:500] for line in outcome.detail.splitlines()[-40:]))
                known.add(outcome.cause)
            if sys.stderr.isatty() or outcome.number == numbers[-1]:
                progress = f"{outcome.kind} {outcome.number + 1}/{numbers[-1] + 1}, {len(known)} causes of failure"
                print(f"\r{progress:70}", end="", file=sys.stderr, flush=True)
        took = time.monotonic() - started
    rows, failures = summary(outcomes), groups(outcomes)
    print(file=sys.stderr)
    for table in (failures, rows):
        if table:
            print_table(table)
            print()
    print(f"{len(outcomes)} cases, {took:.0f} s")
    if args.json:
        details = [{**asdict(x), "detail": x.detail[-4000:]} for x in outcomes if x.verdict == "failed"]
        result = {
            **machine(),
            "seed": args.seed,
            "seconds": took,
            "rows": rows,
            "groups": failures,
            "failures": details,
        }
        write_json(args.json.stem, result, args.json.parent)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
