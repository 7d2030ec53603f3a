# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""Objects and digits on footage: pictures as uint8 arrays, each made from a seed and from nothing else."""

import math
import random
from functools import cache, cached_property

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from sklearn.datasets import load_digits, load_sample_images

from .assets import ARTISTS, TRAIN_FOOTAGE, cut_outs, footage


# Pictures are squares of this side.
IMAGE_SIZE = 64
# What the processor pads others to squares with: the mean of CLIP's pictures.
PADDING = (122, 116, 104)
# Heights of 16:9 and 4:3 within the square.
WIDE = (36, 48)
# The longer side of an object, in units of the picture's side: a tower this small needs objects that fill a picture.
SCALE = (0.8, 1.0)
# An object turns by up to so many degrees, mostly by less.
TURN = 12


@cache
def digit_scans() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Scans `(n, 8, 8)` in 0..255 and their digits, apart for training and test."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    scans, digits = (data.images[order] * 255 / 16).astype(np.uint8), data.target[order]
    held_out = len(digits) // 5
    return {"test": (scans[:held_out], digits[:held_out]), "train": (scans[held_out:], digits[held_out:])}


def draw_digit(scan: np.ndarray, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)) -> np.ndarray:
    """A scan as a picture `(height, width, 3)` of `size` (width, height): white on black, as large as fits."""
    side = min(size)
    canvas = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    digit = np.asarray(Image.fromarray(scan).resize((side, side), Image.Resampling.BICUBIC))
    top, left = (size[1] - side) // 2, (size[0] - side) // 2
    canvas[top : top + side, left : left + side] = digit[..., None]
    return canvas


def distort(scan: np.ndarray, rng: random.Random) -> np.ndarray:
    """A scan, turned, scaled, sheared and shifted a little, in 16 x 16 pixels."""
    image = Image.fromarray(scan).resize((32, 32), Image.Resampling.BICUBIC)
    image = image.rotate(rng.uniform(-14, 14), Image.Resampling.BILINEAR)
    scale_x, scale_y, shear = rng.uniform(0.85, 1.18), rng.uniform(0.85, 1.18), rng.uniform(-0.15, 0.15)
    shift_x, shift_y = rng.uniform(-3, 3), rng.uniform(-3, 3)
    matrix = (scale_x, shear, 16 - 16 * scale_x - 16 * shear + shift_x, 0, scale_y, 16 - 16 * scale_y + shift_y)
    image = image.transform((32, 32), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(image.resize((16, 16), Image.Resampling.BOX))


def shorten(picture: np.ndarray, height: int) -> np.ndarray:
    """The middle of a picture, so many rows of it."""
    top = (len(picture) - height) // 2
    return picture[top : top + height]


def pad(picture: np.ndarray) -> np.ndarray:
    """A wide picture in the middle of a square, as the processor pads it."""
    missing = picture.shape[1] - picture.shape[0]
    if not missing:
        return picture
    square = np.empty((picture.shape[1], *picture.shape[1:]), dtype=np.uint8)
    square[:] = PADDING
    square[missing // 2 : missing // 2 + len(picture)] = picture
    return square


# ---- Objects.


# Which style is drawn how often.
STYLES = ("own", "own", "comic", "comic", "pen", "flat", "line")


def paste(
    background: np.ndarray, cut_out: Image.Image, rng: random.Random, scale: tuple[float, float] = SCALE
) -> np.ndarray:
    """
    A cut-out on a background, at random scale, turn, light and place.

    Args:
        background (`np.ndarray` of shape `(height, width, 3)`, uint8).
        cut_out (`Image.Image`): RGBA, premultiplied.
        scale (`tuple[float, float]`, *optional*): its longer side, in units of the background's shorter one; by default
            [`SCALE`].
    """
    height, width = background.shape[:2]
    size = rng.uniform(*scale) * min(height, width)
    angle, squeeze = math.radians(rng.triangular(-TURN, TURN)), rng.uniform(0.85, 1.15)
    center_x = rng.uniform(0.45 * size, width - 0.45 * size)
    center_y = rng.uniform(0.45 * size, height - 0.45 * size)
    ratio = cut_out.width / size
    if ratio > 2:  # bilinear alone would skip pixels
        cut_out = cut_out.reduce(2)
        ratio /= 2
    middle = cut_out.width / 2
    cos, sin = ratio * math.cos(angle), ratio * math.sin(angle)
    mirror = rng.choice((-1, 1))
    a, b, d, e = mirror * cos * squeeze, mirror * sin, -sin * squeeze, cos
    matrix = (a, b, middle - a * center_x - b * center_y, d, e, middle - d * center_x - e * center_y)
    sprite = np.asarray(cut_out.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))
    light = np.array([rng.uniform(0.7, 1.15) * rng.uniform(0.93, 1.07) for _ in range(3)], dtype=np.float32)
    alpha = sprite[..., 3:].astype(np.float32)
    result = background * (1 - alpha / 255) + np.minimum(sprite[..., :3] * light, alpha)
    return result.astype(np.uint8)


# ---- Footage.


def crop(image: Image.Image, size: int, rng: random.Random) -> np.ndarray:
    """A part of a picture, mirrored, darkened or brightened, as `(size, size, 3)`."""
    side = min(image.width, image.height) * math.sqrt(rng.uniform(0.12, 1.0))
    x, y = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
    part = image.resize((size, size), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side), reducing_gap=2.0)
    pixels = np.asarray(part, dtype=np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if rng.random() < 0.15:
        pixels = pixels.mean(axis=2, keepdims=True).repeat(3, axis=2)
    tint = np.array([rng.uniform(0.85, 1.15) for _ in range(3)], dtype=np.float32)
    pixels = (pixels - 128) * rng.uniform(0.5, 1.2) + 128 * rng.uniform(0.6, 1.3)
    return (pixels.clip(0, 255) * tint).clip(0, 255).astype(np.uint8)


def plain(rng: random.Random) -> np.ndarray:
    """No footage: a colour, or one that changes into another."""
    first = np.array([rng.uniform(0, 255) for _ in range(3)], dtype=np.float32)
    second = first if rng.random() < 0.5 else np.array([rng.uniform(0, 255) for _ in range(3)], dtype=np.float32)
    if rng.random() < 0.3:
        first = second = np.full(3, 255, dtype=np.float32)
    along = np.linspace(0, 1, IMAGE_SIZE, dtype=np.float32)
    turn = rng.uniform(0, 1)
    mix = turn * along[None, :, None] + (1 - turn) * along[:, None, None]
    return (first * (1 - mix) + second * mix).astype(np.uint8)


def clutter(picture: np.ndarray, rng: random.Random) -> np.ndarray:
    """A picture with shapes on it that are no objects: ellipses and polygons of a colour, or of other footage."""
    height, width = picture.shape[:2]
    image = Image.fromarray(picture)
    for _ in range(rng.randint(1, 3)):
        mask = Image.new("L", image.size)
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        reach = [rng.uniform(0.1, 0.5) * height for _ in range(8)]
        if rng.random() < 0.5:
            box = (x - reach[0], y - reach[1], x + reach[0], y + reach[1])
            ImageDraw.Draw(mask).ellipse(box, fill=255)
        else:
            corners = rng.randint(3, 8)
            turns = [2 * math.pi * (corner + rng.uniform(-0.3, 0.3)) / corners for corner in range(corners)]
            outline = [(x + r * math.cos(turn), y + r * math.sin(turn)) for r, turn in zip(reach, turns)]
            ImageDraw.Draw(mask).polygon(outline, fill=255)
        if rng.random() < 0.6:
            mask = mask.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 4)))
        filling = plain(rng) if rng.random() < 0.6 else rng.choice(rng.choice(scenes()))
        image.paste(Image.fromarray(shorten(filling, height)), mask=mask)
    return np.asarray(image)


@cache
def scenes(per_film: int = 100, seed: int = 0) -> list[list[np.ndarray]]:
    """
    Training footage: scenes of frames that follow one another, each seen through a window of its own, and windows of the
    photographs that move.
    """
    rng = random.Random(seed)
    films = [footage(name) for name in TRAIN_FOOTAGE]
    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    result = []
    for _ in range(per_film):
        for film in films:
            start, state = rng.randrange(len(film)), rng.getstate()
            scene = []
            for frame in range(start, min(start + 40, len(film))):
                rng.setstate(state)
                scene.append(crop(film[frame], IMAGE_SIZE, rng))
            result.append(scene)
        for photograph in photographs:
            result.append([crop(photograph, IMAGE_SIZE, rng) for _ in range(12)])
    return result


# ---- What is asked about.


class Pictures:
    """
    Pictures for training: objects by the training artists, digits of the training scans, and footage with nothing on it.

    Args:
        nouns (`list[str]`): what may be shown.
    """

    def __init__(self, nouns: list[str]):
        self.nouns = nouns

    @cached_property
    def by_noun(self) -> dict[str, list[str]]:
        """The artists that drew each."""
        return {noun: [artist for artist in ARTISTS if noun in cut_outs(artist, "own")] for noun in self.nouns}

    def background(self, rng: random.Random) -> np.ndarray:
        return plain(rng) if rng.random() < 0.2 else rng.choice(rng.choice(scenes()))

    def object(
        self,
        noun: str,
        rng: random.Random,
        background: np.ndarray | None = None,
        easy: bool = False,
        height: int = IMAGE_SIZE,
    ) -> np.ndarray:
        """
        A noun on a background `(size, size, 3)`, by default any.

        Args:
            easy (`bool`, defaults to `False`): as the artist drew it, large, and nothing behind it.
            height (`int`, defaults to [`IMAGE_SIZE`]): of the picture within the square.
        """
        drawings = cut_outs(rng.choice(self.by_noun[noun]), "own" if easy else rng.choice(STYLES))[noun]
        if easy:
            background = plain(rng)
        elif background is None:
            background = self.background(rng)
        background = shorten(background, height)
        return pad(paste(background, rng.choice(drawings), rng, (0.9, 1.0) if easy else SCALE))

    def digit(self, digit: str, rng: random.Random, height: int = IMAGE_SIZE) -> np.ndarray:
        scans, digits = digit_scans()["train"]
        scan = scans[rng.choice(np.flatnonzero(digits == int(digit)))]
        return pad(draw_digit(scan if rng.random() < 0.1 else distort(scan, rng), (IMAGE_SIZE, height)))

    def nothing(
        self, rng: random.Random, background: np.ndarray | None = None, height: int = IMAGE_SIZE
    ) -> np.ndarray:
        picture = shorten(self.background(rng) if background is None else background, height)
        return pad(clutter(picture, rng) if rng.random() < 0.4 else picture)
