# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures and frames to tensors: decoding, the padding to a square, and CLIP's own preprocessing."""

import copy
import math
import operator
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from itertools import accumulate, chain
from threading import Condition, Semaphore
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from PIL import ExifTags, Image, ImageOps
from transformers import AutoConfig, LlavaImageProcessorPil
from transformers.image_processing_utils import BatchFeature, get_size_dict, select_best_resolution
from transformers.image_utils import ChannelDimension, SizeDict, validate_preprocess_arguments
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, has_file, logging

from .configuration_longllava import hub_arguments, locate_vision_tower
from .sources_longllava import (
    LIMITS,
    NotAPictureError,
    check_memory,
    check_not_empty,
    check_size,
    damage_named,
    describe_source,
    installed_formats,
    read_source,
    to_rgb,
    to_uint8,
)
from .video_longllava import Frames, VideoFile


# Grids of sub-images that "best_fit" chooses from: all up to 6 x 6 (arXiv 2406.16852, section 3).
DEFAULT_GRID_PINPOINTS = [[rows, columns] for rows in range(1, 7) for columns in range(1, 7)]

# What a tower's own folder says of how pictures are prepared for it.
_TOWER_SETTINGS = ("size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor")

_WORKERS = max(1, min(8, os.cpu_count() or 1))

# What is read as a picture. EPS is not among them, as Pillow hands it to a program of its own.
_PICTURE_FORMATS = (
    "AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FLI", "FTEX", "GBR", "GIF", "ICNS", "ICO", "IM", "IMT", "IPTC",
    "JPEG", "JPEG2000", "MCIDAS", "MPO", "MSP", "PCD", "PCX", "PIXAR", "PNG", "PPM", "PSD", "QOI", "SGI", "SPIDER", "SUN",
    "TGA", "TIFF", "WEBP", "XBM", "XPM", "XVTHUMB",
)  # fmt: skip

# Support and weights of Pillow's filters, as `Image.resize` applies them.
_FILTERS: dict[int, tuple[float, Callable[[np.ndarray], np.ndarray]]] = {
    Image.Resampling.BILINEAR: (1.0, lambda x: np.maximum(1 - x, 0)),
    Image.Resampling.BICUBIC: (
        2.0,
        lambda x: np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, (((x - 5) * x + 8) * x - 4) * -0.5, 0)),
    ),
    Image.Resampling.LANCZOS: (3.0, lambda x: np.where(x < 3, np.sinc(x) * np.sinc(x / 3), 0)),
}
_FILTER_BITS = 22
# Pixels of a tile's side, and sub-images of a picture: far more than any tower takes.
_MAX_SIDE, _MAX_TILES = 1 << 14, 1024
_BAND_BYTES = 1 << 24


class _Memory:
    """What decoding takes at a time, over all threads: [`LIMITS`]`.max_memory`."""

    def __init__(self):
        self._used, self._changed = 0, Condition()

    @contextmanager
    def reserve(self, needed: int, name: str) -> Iterator[None]:
        """Wait until there is room. Raises `ValueError` where there will never be."""
        check_memory(needed, name)
        with self._changed:
            self._changed.wait_for(lambda: self._used + needed <= LIMITS.max_memory or self._used == 0)
            self._used += needed
        try:
            yield
        finally:
            with self._changed:
                self._used -= needed
                self._changed.notify_all()


_MEMORY = _Memory()
if hasattr(os, "register_at_fork"):  # where no thread of the parent's will ever give back what it has
    os.register_at_fork(after_in_child=_MEMORY.__init__)  # type: ignore[misc]


def _bytes_needed(picture: Image.Image | np.ndarray, is_decoded: bool, name: str) -> int:
    """What it takes to decode a picture, to turn it, to have it in RGB and to resize it, and the filter's weights."""
    if isinstance(picture, np.ndarray):
        height, width = picture.shape[:2] if _is_channels_last(picture) else picture.shape[1:]
        a_pixel, is_turned = 8, False
    else:
        (width, height) = picture.size
        # A PNG is decoded to look for what it does not say in front.
        with damage_named(name):
            is_turned = (picture.format != "PNG" or "exif" in picture.info) and _is_turned(picture)
        stored = 4 if len(picture.getbands()) > 1 or picture.mode[:1] in "IF" else 1
        a_pixel = (0 if is_decoded else stored) + (stored if is_turned else 0)
        a_pixel += {"I": 16, "F": 24}.get(picture.mode[:1], 0 if picture.mode == "RGB" else 4)
        if is_turned:
            height, width = max(picture.size), min(picture.size)
    if height > 2 * width:
        a_pixel += 6  # as an array
    square = 4 * height * height if width < height <= 2 * width else 0
    return width * height * a_pixel + square + 128 * max(width, height)


def _is_turned(picture: Image.Image) -> bool:
    return picture.getexif().get(ExifTags.Base.Orientation, 1) != 1


def open_picture(source: str | os.PathLike | bytes | bytearray, name: str) -> Image.Image:
    """The picture in a file, its header read and its pixels not."""
    try:
        file = read_source(source)
        check_not_empty(file, name)
    except OSError as error:
        raise type(error)(f"{name} cannot be read: {error}") from error
    formats = installed_formats(_PICTURE_FORMATS)
    try:
        image = Image.open(file, formats=formats)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large, the limit is {LIMITS.max_pixels} pixels: {error}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise type(error)(error.errno, f"{name} cannot be read: {error.strerror}") from error
        raise NotAPictureError(
            f"{name} is not a picture in a format that Pillow {Image.__version__} knows."
        ) from error
    check_size(*image.size, name)
    return image


def _is_channels_last(picture: np.ndarray) -> bool:
    return picture.ndim == 2 or picture.shape[-1] in (1, 3, 4)


def picture_size(source: Any, name: str | None = None) -> tuple[int, int]:
    """Height and width of a picture as [`load_picture`] would give it; of most files, only the header is read."""
    name = name or f"The picture ({describe_source(source)})"
    if isinstance(source, (str, os.PathLike, bytes, bytearray)):
        with open_picture(source, name) as image:
            # Some releases of Pillow turn a TIFF as they decode it, and say so before.
            if image.format != "TIFF":
                with damage_named(name):
                    lies_on_its_side = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
                return image.size if lies_on_its_side else image.size[::-1]
    picture = load_picture(source, name)
    if isinstance(picture, Image.Image):
        return picture.size[::-1]
    return picture.shape[:2] if _is_channels_last(picture) else picture.shape[1:]


def _open(source: Any, name: str) -> Image.Image | np.ndarray:
    """A picture of any kind, of which files are not decoded yet."""
    if isinstance(source, torch.Tensor):
        try:
            source = source.detach().cpu()
            source = (source.float() if source.is_floating_point() and source.itemsize < 4 else source).numpy()
        except Exception as error:
            raise ValueError(f"{name} must be a plain tensor of numbers: {error}") from error
    if isinstance(source, np.ndarray):
        if source.ndim not in (2, 3):
            raise ValueError(f"{name} must have 2 or 3 dimensions, but it has {source.ndim}: shape {source.shape}.")
        height, width = source.shape[:2] if _is_channels_last(source) else source.shape[1:]
        check_size(width, height, name)
        return source
    if isinstance(source, Image.Image):
        check_size(*source.size, name)
        return source
    if isinstance(source, (str, os.PathLike, bytes, bytearray)):
        return open_picture(source, name)
    raise ValueError(
        f"{name} must be a path, a URL, base64 text, bytes, a PIL image, an array or a tensor, but it is a"
        f" {type(source).__name__}."
    )


def _decode(picture: Image.Image | np.ndarray, name: str) -> Image.Image | np.ndarray:
    """What [`_open`] gave, upright and in RGB."""
    if isinstance(picture, np.ndarray):
        return picture
    with damage_named(name):
        picture.load()
        # Which copies a picture even where there is nothing to turn.
        upright = ImageOps.exif_transpose(picture) if _is_turned(picture) else picture
        return to_rgb(upright, is_deep=picture.format in ("PNG", "PPM"))


def load_picture(source: Any, name: str | None = None) -> Image.Image | np.ndarray:
    """
    A picture as an RGB PIL image, upright as its EXIF orientation says; arrays and tensors as arrays. Of a file with
    several pages the first.

    Args:
        source: a path, a URL, base64 text, bytes, a PIL image in any mode, or an array or tensor of shape `(height,
            width)`, `(height, width, channels)` or `(channels, height, width)`, with values in 0..255 or 0..1.
        name (`str`, *optional*): what to call it in errors.

    Raises:
        ValueError: if it is empty, damaged, too large, or no picture at all.
        OSError: if there is no such file, or it cannot be read.
    """
    name = name or f"The picture ({describe_source(source)})"
    picture = _open(source, name)
    with _MEMORY.reserve(_bytes_needed(picture, picture is source, name), name):
        return _decode(picture, name)


def _taps(position: int, total: int, size: int, resample: int) -> tuple[int, np.ndarray]:
    """Where Pillow begins to read for one of `size` pixels made of `total`, and its integer weights."""
    support, weigh = _FILTERS[resample]
    scale = total / size
    support, center = support * max(scale, 1.0), (position + 0.5) * scale
    first, end = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), total)
    weights = weigh(np.abs((np.arange(first, end) - center + 0.5) * (1 / max(scale, 1.0))))
    weights = weights / np.cumsum(weights)[-1]  # one after the other, as Pillow adds them
    return first, np.trunc(weights * (1 << _FILTER_BITS) + np.copysign(0.5, weights)).astype(np.int64)


def _resize_padded(
    lines: np.ndarray, total: int, size: int, resample: int, background: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """
    One of the two passes of Pillow's `resize`, bit for bit, over something mostly empty.

    Args:
        lines (`np.ndarray` of shape `(n, length, 3)`, uint8): in the middle of `total` lines, all others of `background`.
        total, size (`int`): lines before and after.

    Returns:
        `np.ndarray` of shape `(m, length, 3)`: the lines that differ; and `(size,)`: which of them stands where.
    """
    start, count, length = (total - len(lines)) // 2, len(lines), lines.shape[1]
    color, half = np.array(background, dtype=np.int64), 1 << (_FILTER_BITS - 1)
    plan: list[tuple[int, np.ndarray, np.ndarray]] = []
    where, known = np.empty(size, dtype=np.int64), {}
    for position in range(size):
        first, weights = _taps(position, total, size, resample)
        begin, end = (min(max(edge - first, 0), len(weights)) for edge in (start, start + count))
        rest = half + color * (weights[:begin].sum() + weights[end:].sum())
        key = (position,) if begin < end else tuple(rest.tolist())
        if key not in known:
            known[key] = len(plan)
            plan.append((first + begin - start, weights[begin:end].astype(np.float64), rest))
        where[position] = known[key]
    result = np.empty((len(plan), length, 3), dtype=np.uint8)
    band = max(1, _BAND_BYTES // (count * 24))
    for left in range(0, length, band):
        # Sums of products of integers below 2^53 are exact, and much faster so.
        some = np.ascontiguousarray(lines[:, left : left + band]).reshape(count, -1).astype(np.float64)
        for number, (begin, weights, rest) in enumerate(plan):
            total_of = weights @ some[begin : begin + len(weights)] if len(weights) else np.zeros(some.shape[1])
            values = (total_of.astype(np.int64).reshape(-1, 3) + rest) >> _FILTER_BITS
            result[number, left : left + band] = values.clip(0, 255)
    return result, where


def ordered_map(function: Callable, items: Iterable, max_workers: int, ahead: int = 0) -> Iterator:
    """
    `map` in threads, in order. As many results as one is told may wait to be taken, but of the items, which may be large,
    hardly more than there are threads.
    """
    waiting = Semaphore(max_workers + 1)

    def work(item: Any) -> Any:
        try:
            return function(item)
        finally:
            waiting.release()

    with ThreadPoolExecutor(max_workers) as pool:
        pending: deque = deque()
        try:
            for item in items:
                waiting.acquire()
                pending.append(pool.submit(work, item))
                del item
                if len(pending) > max(ahead, 2 * max_workers):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


class LazyPixelValues:
    """
    The `pixel_values` of pictures that are decoded when they are needed, in threads, while the model works on those
    before them: what [`LongLLaVAImageProcessor`] returns with `lazy=True`. `generate` and `prefill` take it as it is;
    [`~LazyPixelValues.load`] makes a tensor of it. Each use decodes again.

    It has the `shape`, `ndim`, `dtype`, `device`, `to`, length, items and slices of a tensor, can be iterated over, and
    pickled for the workers of a `DataLoader`.

    Args:
        items (`list`): pictures and films, each with whether only the whole of it is wanted.
        processor ([`LongLLaVAImageProcessor`]): that makes tiles of them.
        settings (`dict` or `list[dict]`): of the call that it does so for, or for each item.
        counts (`list[int]`): tiles of each item.
        shape (`tuple[int, int, int]`): of a tile.
        first (`int`, defaults to 0): number of the first picture, for messages.
        like (`torch.Tensor`, *optional*): whose dtype and device it has; by default float32, on the CPU.
    """

    ndim = 4

    def __init__(
        self,
        items: list,
        processor: "LongLLaVAImageProcessor",
        settings: dict[str, Any] | list[dict[str, Any]],
        counts: list[int],
        shape: tuple[int, int, int],
        first: int = 0,
        like: torch.Tensor | None = None,
    ):
        self._items, self._processor, self._counts = items, processor, counts
        self._settings = settings if isinstance(settings, list) else [settings] * len(items)
        self._first, self._like = first, torch.empty(0, dtype=torch.float32, device="cpu") if like is None else like
        self.shape = torch.Size((sum(counts), *shape))

    dtype = property(lambda self: self._like.dtype)
    device = property(lambda self: self._like.device)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def to(self, *args, **kwargs) -> "LazyPixelValues":
        """As [`torch.Tensor.to`]: another one, whose tensors are of that dtype and on that device."""
        result = copy.copy(self)
        result._like = self._like.to(*args, **kwargs)
        return result

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in self.split(_WORKERS):
            yield from batch

    def __getitem__(self, index) -> torch.Tensor:
        if not isinstance(index, slice):
            position = operator.index(index)
            if not -len(self) <= position < len(self):
                raise IndexError(f"index {position} is out of bounds for {len(self)} tiles")
            return self[position : position + 1 or None][0]
        begin, end, step = index.indices(len(self))
        if step != 1:
            return self.load()[index]
        if begin >= end:
            return self._like.new_empty(0, *self.shape[1:])
        ends = list(accumulate(self._counts))
        low, high = bisect_right(ends, begin), bisect_right(ends, end - 1) + 1
        part, offset = self._select(slice(low, high)), begin - (ends[low] - self._counts[low])
        if len(part._items) == 1 and isinstance(film := part._items[0][0], VideoFile):
            film, count = copy.copy(film), end - begin  # of which only some frames are decoded
            film.indices = film.indices[offset : offset + count]
            shape: Any = tuple(self.shape[1:])
            part = LazyPixelValues([(film, True)], self._processor, part._settings, [count], shape, like=self._like)
            offset = 0
        return part.load()[offset : offset + end - begin]

    def split(self, size: int) -> Iterator[torch.Tensor]:
        """Tensors `(size, 3, height, width)`, the last one maybe smaller. The next is made meanwhile."""
        opened = ((one, kept) for item, kept in zip(self._items, self._settings) for one in _open_films([item]))
        numbered = enumerate(opened, self._first)
        pictures = (n for (item, _), n in zip(self._items, self._counts) if not isinstance(item, VideoFile))
        most = max(pictures, default=1)  # a film's frames are one tile each
        process = self._processor.tiles_of
        done = ordered_map(
            lambda n: process(n[0], n[1][0][0], n[1][0][1], n[1][1])[0], numbered, _WORKERS, ahead=size // most
        )
        left, filled, batch, shape = len(self), 0, None, tuple(self.shape[1:])
        for tile in chain.from_iterable(map(self._counted, enumerate(done), self._expected())):
            if tile.shape != shape:
                raise ValueError(f"With `lazy=True` a tile must have the shape {shape}, but it is {tile.shape}.")
            if batch is None:
                batch = torch.empty(min(size, max(left, 1)), *shape, dtype=torch.float32, device="cpu")
            batch.numpy()[filled] = tile
            filled += 1
            if filled == len(batch):
                full, left, filled, batch = [batch.to(self._like)], left - filled, 0, None
                yield full.pop()  # nothing here holds on to it while the next one is made
        if batch is not None:
            yield batch[:filled].to(self._like)

    def _expected(self) -> Iterator[int]:
        """Tiles of each picture and frame."""
        for (item, _), count in zip(self._items, self._counts):
            yield from [1] * count if isinstance(item, VideoFile) else [count]

    def _counted(self, numbered: tuple[int, list], expected: int) -> list:
        number, tiles = numbered
        if len(tiles) != expected:
            raise ValueError(
                f"`pixel_values` should hold {expected} pictures, but {len(tiles)} came: image {self._first + number} has"
                " changed since it was looked at."
            )
        return tiles

    def _select(self, part: slice) -> "LazyPixelValues":
        before = (len(item) if isinstance(item, VideoFile) else 1 for item, _ in self._items[: part.start])
        _, *shape = self.shape
        return LazyPixelValues(
            self._items[part],
            self._processor,
            self._settings[part],
            self._counts[part],
            tuple(shape),  # type: ignore[arg-type]
            self._first + sum(before),
            self._like,
        )

    @classmethod
    def cat(cls, parts: "list[LazyPixelValues]") -> "LazyPixelValues":
        """
        As [`torch.cat`] of those that one processor made, such as the rows of a batch, each with the settings of its own.

        Raises:
            ValueError: if their tiles have different shapes.
        """
        shape: Any = tuple(parts[0].shape[1:])
        if any(tuple(part.shape[1:]) != shape for part in parts):
            raise ValueError(
                f"Tiles must have one shape, but have {sorted({tuple(part.shape[1:]) for part in parts})}."
            )
        items, settings, counts = (
            [one for part in parts for one in getattr(part, name)] for name in ("_items", "_settings", "_counts")
        )
        return cls(items, parts[0]._processor, settings, counts, shape, like=parts[0]._like)

    def skip(self, items: int) -> "LazyPixelValues":
        """The same without the first so many pictures or films."""
        return self._select(slice(items, None))

    def load(self) -> torch.Tensor:
        """All of them, `(tiles, 3, height, width)`."""
        return next(self.split(len(self))) if len(self) else self._like.new_empty(self.shape)


class LongLLaVAImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    patch_strategy (`"none"` or `"best_fit"`, defaults to `"none"`):
        Whether a picture is, after the whole of it, also cut into sub-images.
    image_grid_pinpoints (`list[list[int]]`, *optional*):
        The `(rows, columns)` that `"best_fit"` chooses from, by default all up to 6 x 6.
    image_seq_length (`int`, defaults to 144):
        Tokens that the model makes of one tile.
    lazy (`bool`, defaults to `False`):
        Decode pictures when the model asks for them, and not before: `pixel_values` is then a [`LazyPixelValues`].
    """

    patch_strategy: Literal["none", "best_fit"] | None
    image_grid_pinpoints: list | None
    image_seq_length: int | None
    lazy: bool | None


class LongLLaVAImageProcessor(LlavaImageProcessorPil):
    r"""
    CLIP's preprocessing on a picture padded to a square, bit for bit as Pillow does it, whether torchvision is
    installed or not. Pictures are decoded and resized in threads.

    `preprocess` takes one picture or any nesting of lists of them (see [`load_picture`] for what a picture can be) and
    returns `pixel_values` of shape `(tiles, 3, height, width)`, float32. With `patch_strategy="best_fit"` it also
    returns `image_grids`, the rows and columns of each picture's sub-images; the whole picture, the first tile, is not
    counted.
    """

    valid_kwargs = LongLLaVAImageProcessorKwargs
    size = {"shortest_edge": 336}
    crop_size = {"height": 336, "width": 336}
    do_pad = True
    patch_strategy = "none"
    image_grid_pinpoints = None
    image_seq_length = 144
    lazy = False

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path, **kwargs):
        """
        As [`~ImageProcessingMixin.get_image_processor_dict`]. A published folder has no settings, or CLIP's; its configuration
        and its tower's folder tell the rest.
        """
        where, name = hub_arguments(kwargs), pretrained_model_name_or_path
        subfolder, looked_up = where.get("subfolder", ""), {**where}
        for option in ("force_download", "subfolder"):
            looked_up.pop(option, None)
        files = (PROCESSOR_NAME, kwargs.get("image_processor_filename", IMAGE_PROCESSOR_NAME))
        settings: dict[str, Any] = {}
        if any(has_file(name, os.path.join(subfolder, file), **looked_up) for file in files):
            settings, kwargs = super().get_image_processor_dict(name, **kwargs)
        if "image_seq_length" in settings:
            return settings, kwargs
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **where)
        side = config.vision_config.image_size
        tower = locate_vision_tower(config.vision_tower, name)
        if os.path.isfile(os.path.join(tower, IMAGE_PROCESSOR_NAME)):
            stored, _ = super().get_image_processor_dict(tower)
            settings = {**{key: stored[key] for key in _TOWER_SETTINGS if key in stored}, **settings}
        settings = {
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
            **settings,
            "patch_strategy": config.patch_strategy,
            "image_grid_pinpoints": config.image_grid_pinpoints,
            "image_seq_length": config.image_seq_length,
        }
        return settings, kwargs

    def _to_array(self, picture: np.ndarray, name: str, settings: dict) -> tuple[np.ndarray, bool]:
        """An array as one of shape `(channels, height, width)`, uint8, and whether its values were given in 0..1."""
        if picture.ndim == 2:
            picture = picture[None]
        data_format = settings["input_data_format"]
        if data_format == ChannelDimension.LAST or (data_format is None and _is_channels_last(picture)):
            picture = np.moveaxis(picture, -1, 0)
        if picture.shape[0] not in (1, 3, 4):
            raise ValueError(f"{name} must have 1, 3 or 4 channels, but its shape is {picture.shape}.")
        if picture.shape[0] != 3 and settings["do_convert_rgb"]:
            picture = np.repeat(picture, 3, axis=0) if picture.shape[0] == 1 else picture[:3]
        return to_uint8(picture, name)

    def best_grid(self, height: int, width: int, tile: int, pinpoints: list | None = None) -> tuple[int, int]:
        """Rows and columns of `tile`-sized sub-images that lose the least of a picture and waste the least of a grid."""
        resolutions = [[rows * tile, columns * tile] for rows, columns in pinpoints or DEFAULT_GRID_PINPOINTS]
        best_height, best_width = select_best_resolution((height, width), resolutions)
        return best_height // tile, best_width // tile

    def _sub_images(self, picture: Image.Image, grid: tuple[int, int], tile: int, resample) -> list[np.ndarray]:
        """A picture fitted into the grid, the rest black, cut into tiles in raster order (arXiv 2406.16852, section 3)."""
        (rows, columns), (width, height) = grid, picture.size
        full = (columns * tile, rows * tile)
        scale = min(full[1] / height, full[0] / width)
        fitted = picture.resize(
            (min(math.ceil(width * scale), full[0]), min(math.ceil(height * scale), full[1])), resample
        )
        canvas = Image.new("RGB", full)
        canvas.paste(fitted, ((full[0] - fitted.width) // 2, (full[1] - fitted.height) // 2))
        tiles = np.asarray(canvas).reshape(rows, tile, columns, tile, 3).transpose(0, 2, 4, 1, 3)
        return list(tiles.reshape(rows * columns, 3, tile, tile))

    def _fit_square(self, picture: Image.Image, side: int, resample: int, background: tuple[int, ...]) -> np.ndarray:
        """
        The picture in the middle of a square of `background`, resized: `(3, side, side)`, as an array would be. Takes
        time and memory by the picture, and not by the square.
        """
        width, height = picture.size
        # Pillow resizes rows, then columns.
        if width > 2 * height and resample in _FILTERS:
            lines = np.asarray(picture.resize((side, height), resample))
            lines, where = _resize_padded(lines, width, side, resample, background)
            return lines[where].transpose(2, 0, 1)
        if height > 2 * width and resample in _FILTERS:
            columns, where = _resize_padded(np.asarray(picture).transpose(1, 0, 2), height, side, resample, background)
            narrow = Image.fromarray(np.ascontiguousarray(columns.transpose(1, 0, 2)))
            return np.asarray(narrow.resize((len(columns), side), resample))[:, where].transpose(2, 0, 1)
        check_memory(4 * max(width, height) * (side if width > height else height), "A picture padded to a square")
        if width > height:
            scaled, picture = picture.resize((side, height), resample), Image.new("RGB", (side, width), background)
            picture.paste(scaled, (0, (width - height) // 2))
        elif width < height:
            narrow, picture = picture, Image.new("RGB", (height, height), background)
            picture.paste(narrow, ((height - width) // 2, 0))
        return np.asarray(picture.resize((side, side), resample)).transpose(2, 0, 1)

    def tiles_of(
        self, number: int, source: Any, whole_only: bool, settings: dict[str, Any]
    ) -> tuple[list[np.ndarray], tuple[int, int]]:
        """A picture, then its sub-images, as the tower takes them; and the sub-images' rows and columns."""
        name = f"Image {number} ({describe_source(source)})"
        picture = _open(source, name)
        with _MEMORY.reserve(_bytes_needed(picture, picture is source, name), name):
            return self._tiles(_decode(picture, name), name, whole_only, settings)

    def _tiles(
        self, picture: Image.Image | np.ndarray, name: str, whole_only: bool, settings: dict[str, Any]
    ) -> tuple[list[np.ndarray], tuple[int, int]]:
        size, resample, mean = settings["size"], settings["resample"], settings["image_mean"]
        background: Any = tuple(int(x * 255) for x in mean or (0,))
        grid, is_unit, array = (0, 0), False, None
        if isinstance(picture, np.ndarray):
            array, is_unit = self._to_array(picture, name, settings)
            if len(array) == 3:
                picture = Image.fromarray(np.ascontiguousarray(np.moveaxis(array, 0, -1)))
        is_usual = settings["do_pad"] and settings["do_resize"] and len(background) == 3 and isinstance(resample, int)
        if is_usual and isinstance(picture, Image.Image) and size.shortest_edge and not size.longest_edge:
            tiles = [self._fit_square(picture, size.shortest_edge, resample, background)]
        else:
            tile = np.asarray(picture).transpose(2, 0, 1) if array is None else array
            if settings["do_pad"]:
                check_memory(len(tile) * max(tile.shape[1:]) ** 2, name)
                tile = self.pad_to_square(tile, background)
            if settings["do_resize"] and size.shortest_edge and not size.longest_edge:
                long, short = max(tile.shape[1:]), min(tile.shape[1:])
                check_memory(20 * size.shortest_edge**2 * long // short, name)  # as it becomes, and in floats
            tiles = [self.resize(tile, size, resample=resample) if settings["do_resize"] else tile]
        if settings["patch_strategy"] == "best_fit" and not whole_only:
            if not isinstance(picture, Image.Image):
                raise ValueError(
                    f'{name} must have 3 channels for `patch_strategy="best_fit"`, but has {len(picture)}.'
                )
            side = settings["crop_size"].height
            grid = self.best_grid(picture.height, picture.width, side, settings["image_grid_pinpoints"])
            tiles += self._sub_images(picture, grid, side, resample)
        if settings["do_center_crop"]:
            tiles = [self.center_crop(tile, settings["crop_size"]) for tile in tiles]
        if settings["do_rescale"]:
            tiles = [self.rescale(tile, settings["rescale_factor"]) for tile in tiles]
        elif is_unit:  # as it was given
            tiles = [self.rescale(tile, 1 / 255) for tile in tiles]
        if settings["do_normalize"]:
            tiles = [self.normalize(tile, mean, settings["image_std"]) for tile in tiles]
        return tiles, grid

    def check_settings(self) -> None:
        """Raises `ValueError` where this processor's own settings make no sense."""
        self._settings({})

    def _settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """The settings of one call: those given, the rest from this processor. Raises where they make no sense."""
        validate_typed_dict(self.valid_kwargs, given)  # type: ignore[type-var]
        names = self.valid_kwargs.__annotations__
        settings: dict[str, Any] = {name: given.get(name, getattr(self, name, None)) for name in names}
        for name, to_square in (("size", settings["default_to_square"]), ("crop_size", True)):
            if settings[name] is not None:
                sizes = get_size_dict(settings[name], default_to_square=to_square, param_name=name)
                settings[name] = SizeDict(**sizes)
        checked = "do_rescale rescale_factor do_normalize image_mean image_std do_center_crop crop_size do_resize size resample"
        validate_preprocess_arguments(**{name: settings[name] for name in checked.split()})
        _check_values(settings)
        if settings["do_pad"] and settings["image_mean"] is not None:
            settings["do_convert_rgb"] = True  # the background has three channels
        return settings

    def preprocess(self, images, **kwargs: Unpack[LongLLaVAImageProcessorKwargs]) -> BatchFeature:
        """
        Pictures to tensors; see the class for what goes in and comes out.

        Raises:
            ValueError: for a picture that is broken, empty or too large, for none at all, and for settings that make no
                sense together.
        """
        settings = self._settings(dict(kwargs))
        return_tensors = settings["return_tensors"]
        items = list(_flatten(images))
        if not items:
            raise ValueError("At least one image must be given, but there are 0.")

        pixel_values: Any = []
        grids: list[tuple[int, int]] = []
        if settings["lazy"]:
            if not settings["do_center_crop"]:
                raise ValueError("`lazy=True` needs `do_center_crop=True`: sizes must be known before pictures are.")
            by_item = [self._grids(n, *item, settings) for n, item in enumerate(items)]
            counts = [sum(1 + rows * columns for rows, columns in of_item) for of_item in by_item]
            grids, return_tensors = list(chain.from_iterable(by_item)), None
            shape = (3, settings["crop_size"].height, settings["crop_size"].width)
            pixel_values = LazyPixelValues(items, self, settings, counts, shape)
        else:
            numbered = enumerate(_open_films(items))
            done = ordered_map(lambda n: self.tiles_of(n[0], n[1][0], n[1][1], settings), numbered, _WORKERS)
            for tiles, grid in logging.tqdm(done, desc="Preparing images", delay=1.0, leave=False):
                pixel_values.extend(tiles)
                grids.append(grid)
            if len({tile.shape for tile in pixel_values}) == 1:
                pixel_values = np.stack(pixel_values)
        data = {"pixel_values": pixel_values}
        if settings["patch_strategy"] == "best_fit":
            data["image_grids"] = np.array(grids)
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _grids(self, number: int, item: Any, whole_only: bool, settings: dict) -> list[tuple[int, int]]:
        """Rows and columns of the sub-images of one picture, or of each frame of a film, before it is decoded."""
        if isinstance(item, VideoFile) or whole_only or settings["patch_strategy"] != "best_fit":
            return [(0, 0)] * (len(item) if isinstance(item, VideoFile) else 1)
        size = picture_size(item, f"Image {number} ({describe_source(item)})")
        return [self.best_grid(*size, settings["crop_size"].height, settings["image_grid_pinpoints"])]


def _check_values(settings: dict[str, Any]) -> None:
    """Raises `ValueError` for numbers that would only be noticed, or not be noticed, when a picture comes."""

    def refuse(name: str, wanted: str) -> None:
        raise ValueError(f"`{name}` must be {wanted}, but is {settings[name]!r}.")

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e6

    for name in ("image_mean", "image_std"):
        values = settings[name]
        is_wrong = values is not None and (
            not isinstance(values, (list, tuple)) or len(values) not in (1, 3, 4) or not all(map(is_number, values))
        )
        if is_wrong or (name == "image_std" and values is not None and 0 in values):
            refuse(name, "a number for each channel" + (" other than 0" if name == "image_std" else ""))
    if settings["do_pad"] and settings["image_mean"] and not all(0 <= x <= 1 for x in settings["image_mean"]):
        refuse("image_mean", "numbers from 0 to 1, as it is the padding's color too")
    if settings["do_rescale"] and not is_number(settings["rescale_factor"]):
        refuse("rescale_factor", "a number")
    for name in ("size", "crop_size"):
        given = {key: value for key, value in asdict(settings[name] or SizeDict()).items() if value is not None}
        if not all(isinstance(value, int) and 1 <= value <= _MAX_SIDE for value in given.values()):
            refuse(name, f"of whole numbers from 1 to {_MAX_SIDE}")
    resample = settings["resample"]
    if settings["do_resize"] and isinstance(resample, int) and resample not in list(Image.Resampling):
        refuse("resample", f"one of Pillow's filters, {[int(x) for x in Image.Resampling]}")
    length = settings["image_seq_length"]
    if not isinstance(length, int) or not 1 <= length <= _MAX_SIDE:
        refuse("image_seq_length", f"a whole number from 1 to {_MAX_SIDE}")
    if settings["patch_strategy"] not in (None, "none", "best_fit"):
        refuse("patch_strategy", "'none' or 'best_fit'")
    pinpoints = settings["image_grid_pinpoints"]
    if pinpoints is not None:
        are_pairs = isinstance(pinpoints, (list, tuple)) and all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(n, int) for n in pair)
            for pair in pinpoints
        )
        if (
            not are_pairs
            or not pinpoints
            or not all(n >= 1 and rows * columns <= _MAX_TILES for rows, columns in pinpoints for n in (rows, columns))
        ):
            refuse("image_grid_pinpoints", f"pairs of rows and columns, of at most {_MAX_TILES} sub-images")


def _flatten(images) -> Iterator[tuple[Any, bool]]:
    """Every picture and video file in any nesting, and whether only the whole is wanted, as of the frames of a video."""
    if isinstance(images, VideoFile):
        yield images, True
    elif isinstance(images, Frames):
        yield from ((frame, True) for frame, _ in _flatten(list(images)))
    elif isinstance(images, (list, tuple)) or (isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim > 3):
        for image in images:
            yield from _flatten(image)
    else:
        yield images, False


def _open_films(items: Iterable[tuple[Any, bool]]) -> Iterator[tuple[Any, bool]]:
    """The same with the frames of a video file in its place."""
    for item, whole_only in items:
        if isinstance(item, VideoFile):
            yield from ((frame, True) for frame in item)
        else:
            yield item, whole_only


__all__ = ["LazyPixelValues", "LongLLaVAImageProcessor", "load_picture", "open_picture", "picture_size"]
