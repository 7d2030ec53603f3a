# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures and frames to tensors: decoding, the padding to a square, and CLIP's own preprocessing."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from PIL import ExifTags, Image, ImageOps
from transformers import LlavaImageProcessorPil
from transformers.image_processing_utils import BatchFeature, get_size_dict, select_best_resolution
from transformers.image_utils import ChannelDimension, SizeDict, validate_preprocess_arguments
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import logging

from .sources_longllava import LIMITS, check_not_empty, check_size, describe_source, read_source
from .video_longllava import Frames, VideoFile


# Grids of sub-images that "best_fit" chooses from: all up to 6 x 6 (arXiv 2406.16852, section 3).
DEFAULT_GRID_PINPOINTS = [[rows, columns] for rows in range(1, 7) for columns in range(1, 7)]

_WORKERS = max(1, min(8, os.cpu_count() or 1))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # 16 bits a pixel; Pillow's own conversion would clip them at 255.
        values = np.asarray(image, dtype=np.int64).clip(0, 65535)
        image = Image.fromarray((values // 257).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _open_picture(source: str | os.PathLike | bytes | bytearray, name: str) -> Image.Image:
    """The picture in a file, its header read and its pixels not."""
    file = read_source(source)
    check_not_empty(file, name)
    try:
        image = Image.open(file)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large, the limit is {LIMITS.max_pixels} pixels: {error}") from error
    except Exception as error:
        raise ValueError(f"{name} is not a picture in a format that Pillow {Image.__version__} knows.") from error
    check_size(*image.size, name)
    return image


def _is_channels_last(picture: np.ndarray) -> bool:
    return picture.ndim == 2 or picture.shape[-1] in (1, 3, 4)


def picture_size(source: Any, name: str | None = None) -> tuple[int, int]:
    """Height and width of a picture as [`load_picture`] would give it; of a file, only the header is read."""
    name = name or f"The picture ({describe_source(source)})"
    if isinstance(source, (str, os.PathLike, bytes, bytearray)):
        with _open_picture(source, name) as image:
            lies_on_its_side = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            return image.size if lies_on_its_side else image.size[::-1]
    picture = load_picture(source, name)
    if isinstance(picture, Image.Image):
        return picture.size[::-1]
    return picture.shape[:2] if _is_channels_last(picture) else picture.shape[1:]


def load_picture(source: Any, name: str | None = None) -> Image.Image | np.ndarray:
    """
    A picture as an RGB PIL image, upright as its EXIF orientation says; arrays and tensors as arrays.

    Args:
        source: a path, a URL, base64 text, bytes, a PIL image in any mode, or an array or tensor of shape `(height,
            width)`, `(height, width, channels)` or `(channels, height, width)`, with values in 0..255 or 0..1.
        name (`str`, *optional*): what to call it in errors.

    Raises:
        ValueError: if it is empty, damaged, too large, or no picture at all.
        OSError: if there is no such file.
    """
    name = name or f"The picture ({describe_source(source)})"
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
    if isinstance(source, np.ndarray):
        if source.ndim not in (2, 3):
            raise ValueError(f"{name} must have 2 or 3 dimensions, but it has {source.ndim}: shape {source.shape}.")
        height, width = source.shape[:2] if _is_channels_last(source) else source.shape[1:]
        check_size(width, height, name)
        return source
    if isinstance(source, Image.Image):
        check_size(*source.size, name)
        image = source
    elif isinstance(source, (str, os.PathLike, bytes, bytearray)):
        image = _open_picture(source, name)
    else:
        raise ValueError(
            f"{name} must be a path, a URL, base64 text, bytes, a PIL image, an array or a tensor, but it is a"
            f" {type(source).__name__}."
        )
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:
        raise ValueError(f"{name} is damaged or truncated: {error}") from error


def ordered_map(function: Callable, items: Iterable, max_workers: int, ahead: int = 0) -> Iterator:
    """`map` in threads, in order, taking from `items` only as far ahead of what is asked for as one is told."""
    with ThreadPoolExecutor(max_workers) as pool:
        pending: deque = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
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

    Args:
        items (`list`): pictures and films, each with whether only the whole of it is wanted.
        process (`Callable`): from a picture's number, the picture, and that, to its tiles.
        counts (`list[int]`): tiles of each item.
        shape (`tuple[int, int, int]`): of a tile.
        first (`int`, defaults to 0): number of the first picture, for messages.
    """

    def __init__(self, items: list, process: Callable, counts: list[int], shape: tuple[int, int, int], first: int = 0):
        self._items, self._process, self._counts, self._first = items, process, counts, first
        self.shape = (sum(counts), *shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape})"

    def split(self, size: int) -> Iterator[torch.Tensor]:
        """Tensors `(size, 3, height, width)`, float32, the last one maybe smaller. The next is made meanwhile."""
        numbered = enumerate(_open_films(self._items), self._first)
        pictures = (n for (item, _), n in zip(self._items, self._counts) if not isinstance(item, VideoFile))
        most = max(pictures, default=1)  # a film's frames are one tile each
        done = ordered_map(lambda item: self._process(item[0], *item[1]), numbered, _WORKERS, ahead=size // most)
        left, filled, batch, shape = len(self), 0, None, self.shape[1:]
        for tile in chain.from_iterable(done):
            if tile.shape != shape:
                raise ValueError(f"With `lazy=True` a tile must have the shape {shape}, but it is {tile.shape}.")
            if batch is None:
                batch = torch.empty(min(size, max(left, 1)), *shape, dtype=torch.float32, device="cpu")
            batch.numpy()[filled] = tile
            filled += 1
            if filled == len(batch):
                full, left, filled, batch = [batch], left - filled, 0, None
                yield full.pop()  # nothing here holds on to it while the next one is made
        if batch is not None:
            yield batch[:filled]

    def skip(self, items: int) -> "LazyPixelValues":
        """The same without the first so many pictures or films."""
        _, *shape = self.shape
        first = self._first + items
        return LazyPixelValues(self._items[items:], self._process, self._counts[items:], tuple(shape), first)  # type: ignore[arg-type]

    def load(self) -> torch.Tensor:
        """All of them, `(tiles, 3, height, width)`."""
        return torch.cat(list(self.split(len(self)))) if len(self) else torch.empty(self.shape)


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

    def _to_array(self, picture: Image.Image | np.ndarray, name: str, settings: dict) -> np.ndarray:
        """What [`load_picture`] gives as an array `(channels, height, width)`, its values between 0 and 255."""
        if isinstance(picture, Image.Image):
            return np.asarray(picture).transpose(2, 0, 1)
        if picture.ndim == 2:
            picture = picture[None]
        data_format = settings["input_data_format"]
        if data_format == ChannelDimension.LAST or (data_format is None and _is_channels_last(picture)):
            picture = np.moveaxis(picture, -1, 0)
        if picture.shape[0] not in (1, 3, 4):
            raise ValueError(f"{name} must have 1, 3 or 4 channels, but its shape is {picture.shape}.")
        if picture.shape[0] != 3 and settings["do_convert_rgb"]:
            picture = np.repeat(picture, 3, axis=0) if picture.shape[0] == 1 else picture[:3]
        if picture.dtype == bool:
            picture = picture.astype(np.uint8) * 255
        elif picture.dtype == np.uint16:
            picture = (picture // 257).astype(np.uint8)
        elif np.issubdtype(picture.dtype, np.floating) and settings["do_rescale"] and picture.max() <= 1:
            picture = picture * 255  # given between 0 and 1
        return np.ascontiguousarray(picture)

    def best_grid(self, height: int, width: int, tile: int, pinpoints: list | None = None) -> tuple[int, int]:
        """Rows and columns of `tile`-sized sub-images that lose the least of a picture and waste the least of a grid."""
        resolutions = [[rows * tile, columns * tile] for rows, columns in pinpoints or DEFAULT_GRID_PINPOINTS]
        best_height, best_width = select_best_resolution((height, width), resolutions)
        return best_height // tile, best_width // tile

    def _sub_images(self, image: np.ndarray, grid: tuple[int, int], tile: int, resample) -> list[np.ndarray]:
        """`image` fitted into the grid, the rest black, cut into tiles in raster order (arXiv 2406.16852, section 3)."""
        (rows, columns), (channels, height, width) = grid, image.shape
        full = (rows * tile, columns * tile)
        scale = min(full[0] / height, full[1] / width)
        size = SizeDict(height=min(math.ceil(height * scale), full[0]), width=min(math.ceil(width * scale), full[1]))
        fitted = self.resize(image, size, resample=resample)
        canvas = np.zeros((channels, *full), dtype=fitted.dtype)
        top, left = (full[0] - size.height) // 2, (full[1] - size.width) // 2
        canvas[:, top : top + size.height, left : left + size.width] = fitted
        tiles = canvas.reshape(-1, rows, tile, columns, tile).transpose(1, 3, 0, 2, 4)
        return list(tiles.reshape(rows * columns, -1, tile, tile))

    def _fit_square(self, picture: Image.Image, side: int, resample: int, background: tuple[int, ...]) -> np.ndarray:
        """The picture in the middle of a square of `background`, resized: `(3, side, side)`, as an array would be."""
        width, height = picture.size
        if width > height:
            # Pillow resizes rows, then columns; rows of one colour stay as they are.
            scaled, picture = picture.resize((side, height), resample), Image.new("RGB", (side, width), background)
            picture.paste(scaled, (0, (width - height) // 2))
        elif width < height:
            narrow, picture = picture, Image.new("RGB", (height, height), background)
            picture.paste(narrow, ((height - width) // 2, 0))
        return np.asarray(picture.resize((side, side), resample)).transpose(2, 0, 1)

    def _tiles(
        self, source: Any, name: str, whole_only: bool, settings: dict
    ) -> tuple[list[np.ndarray], tuple[int, int]]:
        """A picture, then its sub-images, as the tower takes them; and the sub-images' rows and columns."""
        size, resample, mean = settings["size"], settings["resample"], settings["image_mean"]
        picture, grid = load_picture(source, name), (0, 0)
        background: Any = tuple(int(x * 255) for x in mean or (0,))
        is_usual = settings["do_pad"] and settings["do_resize"] and mean is not None and isinstance(resample, int)
        if is_usual and isinstance(picture, Image.Image) and size.shortest_edge and not size.longest_edge:
            tiles = [self._fit_square(picture, size.shortest_edge, resample, background)]
        else:
            tile = self._to_array(picture, name, settings)
            tile = self.pad_to_square(tile, background) if settings["do_pad"] else tile
            tiles = [self.resize(tile, size, resample=resample) if settings["do_resize"] else tile]
        if settings["patch_strategy"] == "best_fit" and not whole_only:
            image, side = self._to_array(picture, name, settings), settings["crop_size"].height
            grid = self.best_grid(image.shape[1], image.shape[2], side, settings["image_grid_pinpoints"])
            tiles += self._sub_images(image, grid, side, resample)
        if settings["do_center_crop"]:
            tiles = [self.center_crop(tile, settings["crop_size"]) for tile in tiles]
        if settings["do_rescale"]:
            tiles = [self.rescale(tile, settings["rescale_factor"]) for tile in tiles]
        if settings["do_normalize"]:
            tiles = [self.normalize(tile, mean, settings["image_std"]) for tile in tiles]
        return tiles, grid

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

        def process(number: int, source: Any, whole_only: bool) -> tuple[list[np.ndarray], tuple[int, int]]:
            return self._tiles(source, f"Image {number} ({describe_source(source)})", whole_only, settings)

        pixel_values: Any = []
        grids: list[tuple[int, int]] = []
        if settings["lazy"]:
            if not settings["do_center_crop"]:
                raise ValueError("`lazy=True` needs `do_center_crop=True`: sizes must be known before pictures are.")
            by_item = [self._grids(n, *item, settings) for n, item in enumerate(items)]
            counts = [sum(1 + rows * columns for rows, columns in of_item) for of_item in by_item]
            grids, return_tensors = list(chain.from_iterable(by_item)), None
            shape = (3, settings["crop_size"].height, settings["crop_size"].width)
            pixel_values = LazyPixelValues(items, lambda *item: process(*item)[0], counts, shape)
        else:
            done = ordered_map(lambda item: process(item[0], *item[1]), enumerate(_open_films(items)), _WORKERS)
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


__all__ = ["LazyPixelValues", "LongLLaVAImageProcessor", "load_picture", "picture_size"]
