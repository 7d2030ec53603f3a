# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""Films: which frames there are, which are wanted, and decoding no more than that."""

import contextlib
import io
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .sources_longllava import (
    NotAVideoError,
    check_memory,
    check_not_empty,
    check_size,
    damage_named,
    describe_source,
    installed_formats,
    read_source,
    to_rgb,
)


# What FFmpeg may take a file for: containers and streams of films that hold what they show. Playlists and scripts, which
# make it open other files or the network, are none of them. Those of sound are here to be told that they have no video.
_FORMATS = (
    "mov,matroska,avi,flv,asf,mpeg,mpegts,mpegvideo,m4v,h261,h263,h264,hevc,vvc,av1,obu,ivf,vc1,mjpeg,ogg,mxf,nut,dv,rm"
    ",gxf,wtv,swf,nsv,gif,apng,yuv4mpegpipe,mp3,flac,wav"
)
# Those whose index can be trusted to lead to a frame; others are decoded from the start.
_SEEKABLE = ("mov", "matroska")
# Those that say how many packets there are, so that one that is cut off can be told from a whole one.
_COUNTED = ("mov", "avi")
# Decoders that show one frame for each packet. Others may show none or two, so that only decoding tells.
_ONE_FRAME_A_PACKET = ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mjpeg", "prores", "dnxhd")
# As many frames are decoded to see that packets and frames agree.
_PROBED = 8
_BUFFER_SIZE = 1 << 18
# What a cover is made of, for a PyAV that does not tell.
_COVERS = ("mjpeg", "png", "bmp", "gif", "webp")

# What a display matrix a b, c d does to a picture, by the signs: `x' = a x + c y`, `y' = b x + d y`, y downwards.
_ORIENTATIONS = {
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}

# Pictures that move, as Pillow calls them, and how long a frame is shown that does not say (as browsers and FFmpeg do).
ANIMATIONS = ("AVIF", "GIF", "PNG", "WEBP")
_DEFAULT_DURATION = 100


def check_num_frames(num_frames: int | None) -> None:
    """Raises `ValueError` unless at least one frame is asked for."""
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"`num_frames` must be at least 1, but it is {num_frames}.")


def _import_av() -> Any:
    try:
        import av
    except ImportError:
        raise ImportError("Reading videos needs PyAV: `pip install longllava_hf[video]`.") from None
    return av


def _increases(times: list) -> bool:
    return None not in times and all(a < b for a, b in pairwise(times))


class VideoFile:
    """
    The sampled frames of a video file, decoded with PyAV each time they are iterated over and not before.

    They are those that a player shows, in that order and that way up: without what an edit list hides, turned and
    mirrored as the display matrix says, and with square pixels.

    Args:
        source (`str`, `os.PathLike` or `bytes`): a path, URL, base64 text, or the content of a file.
        num_frames (`int`, *optional*): how many frames, uniformly from the first to the last; all if there are fewer.
        fps (`float`, *optional*): frames a second, instead; exactly one of the two may be given, none means all.
        name (`str`, *optional*): what to call it in errors.

    Raises:
        ValueError: if the file is empty, truncated, too large, or has no video in it.
        OSError: if there is no such file.
        ImportError: without PyAV.
    """

    fps: float | None
    # By what each frame is found: its time where an index leads to it, else its number; times of key frames.
    _has_times: bool
    _marks: list[int]
    _keys: list[int]
    # When each frame is shown, and when the last one ends; `None` if nothing tells.
    _seconds: np.ndarray | None

    def __init__(self, source, num_frames: int | None = None, fps: float | None = None, name: str | None = None):
        if num_frames is not None and fps is not None:
            raise ValueError(f"Only one of `num_frames` ({num_frames}) and `fps` ({fps}) can be given.")
        check_num_frames(num_frames)
        if fps is not None and not 0 < fps < math.inf:
            raise ValueError(f"`fps` must be positive, but it is {fps}.")
        self.name = name or f"The video ({describe_source(source)})"
        file = read_source(source)
        check_not_empty(file, self.name)
        # What had to be fetched or decoded is kept, so that it is fetched once.
        self.source = file.getvalue() if isinstance(file, io.BytesIO) else file
        self._index()
        self.indices = self._sample(num_frames, fps)

    @property
    def total_frames(self) -> int:
        return len(self._marks)

    @property
    def timestamps(self) -> list[float] | None:
        """When each of the sampled frames is shown, in seconds; `None` where the file does not tell."""
        return None if self._seconds is None else [float(self._seconds[i]) for i in self.indices]

    @contextlib.contextmanager
    def _file(self) -> Iterator[Any]:
        """The file, opened here: libraries take some names for more than names, and cannot read others."""
        file = read_source(self.source)
        with open(file, "rb") if isinstance(file, str) else file as opened:
            yield opened

    @contextlib.contextmanager
    def _open(self, **options: str) -> Iterator[Any]:
        """The first stream that is a film, in a container that is open."""
        av = _import_av()
        # The file is open already, so no protocol is needed, and what is in it may open no other one. Options of the
        # container only: PyAV 14 crashes on those of streams if a header does not tell how many there are.
        options |= {"format_whitelist": _FORMATS, "protocol_whitelist": ""}
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(self._file())
            try:
                container = stack.enter_context(
                    av.open(file, container_options=options, metadata_errors="replace", buffer_size=_BUFFER_SIZE)
                )
            except av.FFmpegError as error:
                raise NotAVideoError(f"{self.name} is not a video that FFmpeg can read: {error.strerror}.") from error
            streams = [stream for stream in container.streams.video if not _is_cover(stream)]
            if not streams:
                raise ValueError(f"{self.name} has no video stream.")
            # A single frame may be there to stand for the film (AVIF).
            stream = next((stream for stream in streams if stream.frames != 1), streams[0])
            if stream.codec_context is None:
                raise ValueError(f"{self.name} cannot be decoded: this FFmpeg has no decoder for it.")
            if stream.width and stream.height:
                self._check_frame(stream.width, stream.height)
            yield stream

    def _check_frame(self, width: int, height: int) -> None:
        """Raises `ValueError` for frames that are too large."""
        check_size(width, height, self.name)
        check_memory(8 * width * height, self.name)  # as it is decoded, and in RGB

    def _all_packets(self, stream) -> Iterator:
        """The packets of a stream from the first to the last, and an error if some are missing or cut off."""
        count, container, expected = 0, stream.container.format.name, stream.frames
        for packet in stream.container.demux(stream):
            count += packet.size > 0 or packet.dts is not None  # all but the last one, of which nothing is
            if container == "avi" and packet.dts is not None:
                count = packet.dts + 1  # its clock counts frames, also those that are dropped
            if packet.is_corrupt and container.startswith(_COUNTED):
                raise ValueError(f"{self.name} is truncated or damaged after {count - 1} frames.")
            yield packet
        if container.startswith("mov") and count != (expected := _promised(stream)):
            # An edit list may leave out packets, or show some twice; without it all of them must be there.
            with self._open(ignore_editlist="1") as whole:
                count = sum(packet.size > 0 or packet.dts is not None for packet in whole.container.demux(whole))
                expected = _promised(whole)
        if container.startswith(_COUNTED) and count < expected:
            raise ValueError(f"{self.name} is truncated: it should have {expected} frames, and {count} are there.")

    def _index(self) -> None:
        """Find out when each frame is shown, and at which ones decoding can start."""
        av = _import_av()
        try:
            with self._open() as stream:
                rate, time_base = stream.average_rate or stream.guessed_rate, stream.time_base
                is_seekable = stream.container.format.name.startswith(_SEEKABLE)
                found = self._by_packets(stream) if is_seekable else None
            if found is None:
                with self._open() as stream:
                    frames = [(frame.pts, frame.key_frame) for frame in _decode(stream, self._all_packets(stream))]
                found = [time for time, _ in frames], [time for time, is_key in frames if is_key]
        except av.FFmpegError as error:
            raise ValueError(f"{self.name} is damaged: {error.strerror}.") from error
        times, keys = found
        if not times:
            raise ValueError(f"{self.name} has no frames.")
        has_clock = _increases(times)
        self._has_times = is_seekable and has_clock
        self._marks, self._keys = (times, keys) if self._has_times else (list(range(len(times))), [])
        self.fps, self._seconds = float(rate or 0) or None, None
        if has_clock and time_base:
            starts = np.array([time - times[0] for time in times], dtype=float) * float(time_base)
            self.fps = self.fps or (len(starts[1:]) / starts[-1] if len(times) > 1 else None)
            self._seconds = np.append(starts, starts[-1] + 1 / (self.fps or 1))
        elif self.fps:
            self._seconds = np.arange(len(times) + 1) / self.fps

    def _by_packets(self, stream) -> tuple[list, list] | None:
        """Times of frames and of key frames as the packets tell without being decoded, `None` if they do not."""
        codec = stream.codec_context.name
        if codec not in _ONE_FRAME_A_PACKET:
            return None
        times: list = []
        keys: list = []
        probe: list = []
        for packet in self._all_packets(stream):
            if not packet.size:
                continue
            if len(probe) < _PROBED:
                probe += [frame.pts for frame in packet.decode()]
            if packet.is_discard or (codec == "vp8" and not memoryview(packet)[0] & 0x10):
                continue  # decoded for what follows, and not shown
            times.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
        if len(probe) < _PROBED:
            probe += [frame.pts for frame in stream.decode()]
        if not probe or None in probe or None in times:
            return None
        # What comes before the first frame that is shown depends on frames that are not there.
        times = sorted(time for time in times if time >= probe[0])
        return (times, sorted(keys)) if times[: len(probe)] == probe and _increases(times) else None

    def _sample(self, num_frames: int | None, fps: float | None) -> list[int]:
        total = self.total_frames
        if fps is not None:
            if self._seconds is None:
                raise ValueError(f"{self.name} does not say its frame rate; use `num_frames` instead of `fps`.")
            # How many ticks there are before each frame and its end: it is on the screen at those in between.
            ticks = np.maximum(np.ceil(self._seconds * fps - 1e-6), self._seconds > 0)
            return np.flatnonzero(ticks[1:] > ticks[:-1]).tolist()
        if num_frames is not None and num_frames < total:
            return np.linspace(0, total - 1, num_frames).astype(int).tolist()
        return list(range(total))

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Image.Image]:
        av = _import_av()
        marks, done = [self._marks[i] for i in self.indices], 0
        if marks != sorted(marks):
            raise ValueError(f"{self.name} can only be read forwards, but its `indices` go back: {self.indices}.")
        # Where seeking does not lead to the frame that the index promised, everything is decoded, as players do.
        for seeks in (True, False) if self._keys else (False,):
            try:
                for picture in self._pictures(marks[done:], seeks):
                    yield picture
                    done += 1
                return
            except (av.FFmpegError, LookupError) as error:
                failure = error
        counts = f"{len(self)} frames were wanted, {done} could be read"
        reason = getattr(failure, "strerror", None) or failure
        raise ValueError(f"{self.name} is damaged or truncated: {counts} ({reason}).") from failure

    def _pictures(self, marks: list[int], seeks: bool) -> Iterator[Image.Image]:
        """The frames with these marks. With `seeks`, what none of them depends on is not decoded."""
        with self._open() as stream:
            stream.thread_type = "AUTO" if seeks else "SLICE"

            def decode() -> Iterator[tuple[int, Any]]:
                shown = _decode(stream, stream.container.demux(stream))
                return ((frame.pts, frame) for frame in shown) if self._has_times else enumerate(shown)

            def find(mark: int) -> tuple[int, Any]:
                found = next((pair for pair in frames if pair[0] is not None and pair[0] >= mark), None)
                if found is None or found[0] != mark:
                    raise LookupError("a frame is missing" if found else "it ends early")
                return found

            frames, position, frame = decode(), self._marks[0], None
            for mark in marks:
                key = bisect_right(self._keys, mark) - 1 if seeks else -1
                if key >= 0 and self._keys[key] > position:
                    stream.container.seek(self._keys[key], stream=stream)
                    frames = decode()
                    position, frame = find(self._keys[key])
                    if not frame.key_frame:
                        raise LookupError("a key frame is none")
                if frame is None or position != mark:
                    position, frame = find(mark)
                yield self._picture(frame, stream.sample_aspect_ratio)

    def _picture(self, frame, aspect) -> Image.Image:
        """A frame with square pixels, turned and mirrored as it is to be shown."""
        self._check_frame(frame.width, frame.height)
        try:
            # With threads of its own a frame that is still about after a fork never comes to its end.
            picture = frame.to_image(threads=1)
        except TypeError:  # PyAV 14 has none
            picture = frame.to_image()
        if aspect and aspect != 1:
            width = round(picture.width * aspect)
            self._check_frame(width, picture.height)
            picture = picture.resize((width, picture.height), Image.Resampling.BICUBIC)
        data = frame.side_data.get("DISPLAYMATRIX")
        orientation = None if data is None else self._orientation(np.frombuffer(bytes(data), dtype=np.int32))
        return picture if orientation is None else picture.transpose(orientation)

    def _orientation(self, matrix: np.ndarray) -> Image.Transpose | None:
        """What a display matrix, nine numbers, does to a picture; how much it scales does not matter."""
        linear = matrix.reshape(3, 3)[:2, :2] / (1 << 16)
        # Within a degree it is straight, as for FFmpeg.
        small = np.abs(linear) < np.abs(linear).max(axis=1, keepdims=True) * math.sin(math.radians(1))
        signs = tuple(np.sign(np.where(small, 0, linear)).ravel().tolist())
        if any(signs) and signs not in _ORIENTATIONS:
            raise ValueError(
                f"{self.name} can be shown mirrored or turned by quarters, but its display matrix is"
                f" {linear.round(3).tolist()}."
            )
        return _ORIENTATIONS.get(signs)


def _decode(stream, packets: Iterable) -> Iterator:
    """The frames that packets are decoded to; an empty one would end it."""
    for packet in packets:
        if packet.size:
            yield from packet.decode()
    yield from stream.decode()


def _promised(stream) -> int:
    """How many packets an MP4 or MOV should have. For one in fragments only the index tells, if PyAV shows it."""
    return max(stream.frames, len(getattr(stream, "index_entries", ())))


def _is_cover(stream) -> bool:
    """Whether a stream of video is a picture that comes with music or with a film."""
    if hasattr(stream, "disposition"):
        return bool(stream.disposition & type(stream.disposition).attached_pic)
    # An older PyAV does not say.
    return stream.codec_context is not None and stream.codec_context.name in _COVERS and not stream.average_rate


class AnimationFile(VideoFile):
    """
    The sampled frames of an animated picture (GIF, APNG, WebP, AVIF), decoded with Pillow, one at a time. It needs no
    PyAV, and takes the arguments of [`VideoFile`].

    Raises:
        ValueError: if the file is empty, damaged, too large, or nothing that Pillow can read.
        OSError: if there is no such file.
    """

    @contextlib.contextmanager
    def _animation(self) -> Iterator[Image.Image]:
        """The picture, open: at one frame after the other."""
        with self._file() as file:
            try:
                image = Image.open(file, formats=installed_formats(ANIMATIONS))
            except Image.DecompressionBombError as error:
                raise ValueError(f"{self.name} is too large: {error}") from error
            except Exception as error:
                raise ValueError(f"{self.name} is not an animation that Pillow can read: {error}") from error
            with image:
                self._check_frame(*image.size)
                yield image

    def _show(self, image: Image.Image, mark: int) -> None:
        with damage_named(self.name):
            image.seek(mark)
        self._check_frame(*image.size)
        with damage_named(self.name):
            image.load()

    def _index(self) -> None:
        durations = []
        with self._animation() as image:
            # The first picture of an APNG may be for those who know no animations, and no frame of it.
            first = 1 if image.info.get("default_image") else 0
            with damage_named(self.name):
                self._marks, self._keys = list(range(first, getattr(image, "n_frames", 1))), []
            for mark in self._marks:
                self._show(image, mark)
                durations.append(image.info.get("duration") or _DEFAULT_DURATION)
        self._seconds = np.cumsum([0, *durations]) / 1000
        self.fps = float(self.total_frames / self._seconds[-1])

    def __iter__(self) -> Iterator[Image.Image]:
        with self._animation() as image:
            for index in self.indices:
                self._show(image, self._marks[index])
                yield to_rgb(ImageOps.exif_transpose(image), is_deep=image.format == "PNG")


class Frames(Sequence):
    """The frames of one video, decoded already. No list, which a chat template would rebuild (Transformers 5.24)."""

    def __init__(self, frames: Iterable):
        self._frames = tuple(frames)

    def __getitem__(self, index):
        return self._frames[index]

    def __len__(self) -> int:
        return len(self._frames)


__all__ = ["ANIMATIONS", "AnimationFile", "Frames", "VideoFile", "check_num_frames"]
