# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""What pictures and films come as, paths, URLs, text, bytes or numbers, and how much of it is taken."""

import base64
import contextlib
import http.client
import io
import ipaddress
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


# Shorter text without a `data:` in front is a path that does not exist; no picture is so small.
_SHORTEST_BASE64 = 64
_BLOCK_BYTES = 1 << 16
# Addresses of the older protocol inside the newer one (RFC 4291, 6052), and those of a site that Python takes for global.
_WITH_IPV4 = [ipaddress.ip_network(network) for network in ("::/96", "64:ff9b::/96")]
_OF_A_SITE = [ipaddress.ip_network(network) for network in ("64:ff9b:1::/48", "fec0::/10")]


@dataclass
class InputLimits:
    """
    What is accepted of pictures and films. One object, [`LIMITS`], counts for the whole process: set its attributes.

    Args:
        max_pixels (`int`): of one picture or frame, width by height. The default is Pillow's own limit.
        max_memory (`int`): bytes that decoding may take at a time, over all threads; a picture that alone takes more is
            refused, and others wait for each other.
        max_bytes (`int`): of what a URL holds.
        timeout (`float`): seconds that a URL may take from the first step to the last byte.
        max_redirects (`int`): that a URL may lead through.
        allow_private_addresses (`bool`): whether URLs may lead to loopback, link-local, private and other addresses that
            are not global, and go through the environment's proxy, which hides where they lead.
        allow_local_files (`bool`): whether a text may be the path of a file. A server that passes on what its users
            write wants `False`.
    """

    max_pixels: int = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
    max_memory: int = 1 << 30
    max_bytes: int = 1 << 29
    timeout: float = 60.0
    max_redirects: int = 5
    allow_private_addresses: bool = False
    allow_local_files: bool = True


LIMITS = InputLimits()


def is_public(address: str) -> bool:
    """Whether an IP address is one of the whole Internet, also if it stands inside an IPv6 address."""
    ip: Any = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if any(ip in network for network in _OF_A_SITE):
            return False
        inside = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        is_inside = any(ip in network for network in _WITH_IPV4)
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if is_inside else inside or ip
    return ip.is_global and not ip.is_multicast


class _Connections:
    """The connections of one download, which are cut off when its time is over."""

    def __init__(self):
        self.sockets: list[socket.socket] = []
        self.ends, self.is_over, self._lock = time.monotonic() + LIMITS.timeout, False, threading.Lock()

    @property
    def left(self) -> float:
        """Seconds."""
        return max(self.ends - time.monotonic(), 1e-3)

    def admit(self, connection: Any) -> None:
        """Keep a connection in mind; raises `OSError` where it must not lead, before anything is sent."""
        address = connection.sock.getpeername()[0]
        if not LIMITS.allow_private_addresses and not is_public(address):
            connection.close()
            raise PermissionError(
                f"`{connection.host}` has the address {address}, which is not a public one. To allow such, set"
                " `longllava_hf.LIMITS.allow_private_addresses = True`."
            )
        with self._lock:
            if self.is_over:
                connection.close()
                raise TimeoutError
            # A handle of its own, as nothing else may be done with one that another thread reads from.
            self.sockets.append(connection.sock.dup())

    def cut(self) -> None:
        with self._lock:
            self.is_over = True
            for handle in self.sockets:
                with contextlib.suppress(OSError):
                    handle.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for handle in self.sockets:
            handle.close()


def _opener(connections: _Connections) -> urllib.request.OpenerDirector:
    """HTTP and HTTPS and nothing else, whatever a redirect asks for."""

    class Connection(http.client.HTTPConnection):
        def connect(self):
            self.timeout = connections.left
            super().connect()
            connections.admit(self)

    class SecureConnection(http.client.HTTPSConnection, Connection):
        """Of which the first shakes hands only after the second has admitted the address."""

    class Http(urllib.request.HTTPHandler):
        def http_open(self, request):
            return self.do_open(Connection, request)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, request):
            return self.do_open(SecureConnection, request)

    class Redirects(urllib.request.HTTPRedirectHandler):
        max_redirections = LIMITS.max_redirects

        def http_error_302(self, request, response, *args):
            response.close()  # which would be read to its end, however far that is
            return super().http_error_302(request, response, *args)

        http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    opener = urllib.request.OpenerDirector()
    handlers = [Http(), Https(), Redirects(), urllib.request.HTTPErrorProcessor()]
    handlers += [urllib.request.HTTPDefaultErrorHandler(), urllib.request.UnknownHandler()]
    if LIMITS.allow_private_addresses:
        handlers.append(urllib.request.ProxyHandler())
    for handler in handlers:
        opener.add_handler(handler)
    return opener


def _blocks(response: Any) -> Iterator[bytes]:
    """What a server sends, as long as it is within the limits."""
    if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
        raise OSError(f"it is compressed ({encoding}), and unpacked it could have any size")
    done = 0
    declared = int(response.headers.get("Content-Length") or 0)
    while True:
        block = response.read1(_BLOCK_BYTES)
        done += len(block)
        if max(done, declared) > LIMITS.max_bytes:
            raise OSError(f"it has more than {LIMITS.max_bytes} bytes, which is `longllava_hf.LIMITS.max_bytes`")
        if not block:
            break
        yield block
    if done < declared:
        raise OSError(f"it ends after {done} of {declared} bytes")


def download(url: str) -> io.BytesIO:
    """
    The content of a URL, within [`LIMITS`].

    Raises:
        OSError: with the reason, if it cannot be read, is too large, takes too long, or leads to where it must not.
    """
    connections, content = _Connections(), io.BytesIO()
    timer = threading.Timer(LIMITS.timeout, connections.cut)
    timer.daemon = True
    try:
        quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        headers = {"User-Agent": "longllava_hf", "Accept": "*/*", "Accept-Encoding": "identity"}
        timer.start()
        request = urllib.request.Request(quoted, headers=headers)
        with _opener(connections).open(request, timeout=LIMITS.timeout) as response:
            for block in _blocks(response):
                content.write(block)
        if connections.is_over:
            raise TimeoutError
    except Exception as error:
        seconds = f"it takes more than {LIMITS.timeout:g} seconds, which is `longllava_hf.LIMITS.timeout`"
        reason = seconds if connections.is_over else getattr(error, "reason", None) or error
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise OSError(f"{describe_source(url)} could not be read: {' '.join(str(reason).split())}") from error
    finally:
        timer.cancel()
        connections.close()
    content.seek(0)
    return content


def describe_source(source: Any) -> str:
    """A short name of a picture or video for messages."""
    if isinstance(source, (str, os.PathLike)):
        name = re.sub(r"^(https?://)[^/@]*@", r"\1", str(source))  # without a password
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
    text = os.fsdecode(source)
    if text.startswith(("http://", "https://")):
        return download(text)
    text = text.removeprefix("file://")
    is_data = text.startswith("data:")
    if LIMITS.allow_local_files:
        if os.path.isfile(text):
            return text
        if os.path.isdir(text):
            raise IsADirectoryError(f"{describe_source(text)} is a folder, but one file is wanted.")
    if is_data or (len(text) >= _SHORTEST_BASE64 and not isinstance(source, os.PathLike)):
        payload = text.split(",", 1)[-1] if is_data else text
        with contextlib.suppress(ValueError):
            return io.BytesIO(base64.b64decode("".join(payload.split()), validate=True))
    if not LIMITS.allow_local_files:
        raise PermissionError(
            f"{describe_source(text)} is not a URL or base64 text, and files are not read, as"
            " `longllava_hf.LIMITS.allow_local_files` is False."
        )
    raise FileNotFoundError(f"{describe_source(text)} is not a file, a URL or base64 text.")


def installed_formats(names: Iterable[str]) -> list[str]:
    """Those of Pillow's formats that this Pillow has."""
    Image.init()
    return [name for name in names if name in Image.OPEN]


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


@contextlib.contextmanager
def damage_named(name: str) -> Iterator[None]:
    """`ValueError` with a picture's or film's name, whatever the decoder of a damaged file raises."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{name} is damaged or truncated: {error}") from error


class NotAPictureError(ValueError):
    """What was given is not in a format of pictures."""


class NotAVideoError(ValueError):
    """What was given is not in a format of films."""


def check_memory(needed: int, name: str) -> None:
    """Raises `ValueError` if something takes more bytes to decode and to resize than there may be at a time."""
    if needed > LIMITS.max_memory:
        raise ValueError(
            f"{name} is too large: decoding and resizing it takes {needed} bytes, and the limit,"
            f" `longllava_hf.LIMITS.max_memory`, is {LIMITS.max_memory}."
        )


def to_rgb(image: Image.Image, is_deep: bool = False) -> Image.Image:
    """In 8 bits a channel, to which Pillow's own conversion would clip deeper ones; `is_deep` if integers are of 16 bits."""
    if image.mode == "F":
        values = np.asarray(image)
        image = Image.fromarray(to_uint8(values, "its pixels")[0])
    elif image.mode.startswith("I"):
        values = np.asarray(image)
        # Of 16 bits where the file or a value says so; otherwise the mode is that of any integers.
        if image.mode != "I" or is_deep or values.max() > 255:
            values = values.clip(0, 65535) // 257
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def to_uint8(picture: np.ndarray, name: str) -> tuple[np.ndarray, bool]:
    """An array of any dtype with values in 0..255, and whether they were given in 0..1."""
    kind = picture.dtype.kind
    if kind == "b":
        return picture.astype(np.uint8) * 255, False
    if picture.dtype == np.uint16:
        return (picture // 257).astype(np.uint8), False
    if picture.dtype == np.uint8:
        return picture, False
    if kind not in "iuf":
        raise ValueError(f"{name} must hold numbers, but its dtype is {picture.dtype}.")
    low, high = picture.min(), picture.max()
    if not (low >= 0 and high <= 255):  # nor NaN
        raise ValueError(f"{name} must hold values in 0..255 or 0..1, but has {low} to {high}.")
    is_unit = kind == "f" and high <= 1
    return np.rint(picture * 255.0 if is_unit else picture).astype(np.uint8), is_unit


__all__ = [
    "LIMITS",
    "InputLimits",
    "NotAPictureError",
    "NotAVideoError",
    "check_memory",
    "check_not_empty",
    "check_size",
    "damage_named", "describe_source",
    "download",
    "installed_formats",
    "is_public",
    "read_source",
    "to_rgb",
    "to_uint8",
]  # fmt: skip
