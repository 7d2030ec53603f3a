# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""Where pictures and films come from, paths, URLs, text or bytes, and how much of it is taken."""

import base64
import contextlib
import io
import os
from dataclasses import dataclass
from typing import Any

from huggingface_hub.utils import get_session
from PIL import Image


# Shorter text without a `data:` in front is a path that does not exist; no picture is so small.
_SHORTEST_BASE64 = 64


@dataclass
class InputLimits:
    """
    What is accepted of pictures and films, for the whole process; `longllava_hf.LIMITS` is the one that counts.

    Args:
        max_pixels (`int`): of one picture or frame, width by height. The default is Pillow's own limit.
        timeout (`float`): seconds that a URL may take.
    """

    max_pixels: int = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
    timeout: float = 60.0


LIMITS = InputLimits()


def describe_source(source: Any) -> str:
    """A short name of a picture or video for messages."""
    if isinstance(source, (str, os.PathLike)):
        name = str(source)
        return f"`{name if len(name) <= 200 else name[:60] + '...'}`"
    if isinstance(source, (bytes, bytearray)):
        return f"{len(source)} bytes"
    return type(source).__name__


def read_source(source: str | os.PathLike | bytes | bytearray) -> str | io.BytesIO:
    """
    Something that Pillow and PyAV can open: a local path as it is; the content of a URL, of base64 text (a data URI or
    bare), or of bytes.

    Raises:
        OSError: if there is no such file, or the URL cannot be read.
    """
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source)
    text = os.fspath(source).removeprefix("file://")
    if text.startswith(("http://", "https://")):
        try:
            response = get_session().get(text, timeout=LIMITS.timeout, follow_redirects=True)
            response.raise_for_status()
        except Exception as error:
            raise OSError(f"{describe_source(text)} could not be read: {error}") from error
        return io.BytesIO(response.content)
    if os.path.isfile(text):
        return text
    if os.path.isdir(text):
        raise IsADirectoryError(f"{describe_source(text)} is a folder, but one file is wanted.")
    is_data = text.startswith("data:")
    if is_data or (len(text) >= _SHORTEST_BASE64 and not isinstance(source, os.PathLike)):
        payload = text.split(",", 1)[-1] if is_data else text
        with contextlib.suppress(ValueError):
            return io.BytesIO(base64.b64decode("".join(payload.split()), validate=True))
    raise FileNotFoundError(f"{describe_source(text)} is not a file, a URL or base64 text.")


def check_not_empty(file: str | io.BytesIO, name: str) -> None:
    if (file.getbuffer().nbytes if isinstance(file, io.BytesIO) else os.path.getsize(file)) == 0:
        raise ValueError(f"{name} is empty: it has 0 bytes.")


def check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"{name} is empty: its size is {width} x {height} pixels, and both must be at least 1.")
    if width * height > LIMITS.max_pixels:
        raise ValueError(
            f"{name} is too large: {width} x {height} = {width * height} pixels, and the limit is {LIMITS.max_pixels}."
        )


__all__ = ["LIMITS", "InputLimits", "check_not_empty", "check_size", "describe_source", "read_source"]
