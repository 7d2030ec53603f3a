# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""Films: which frames there are, which are wanted, and decoding no more than that."""

import io
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from .sources_longllava import check_not_empty, check_size, describe_source, read_source


# Containers whose index can be trusted to lead to a frame; others are decoded from the start.
_SEEKABLE = ("mov", "matroska")
# What FFmpeg takes for a film though it is text or, by its name, a picture.
_NO_VIDEO_FORMATS = ("image2", "tty", "bin", "xbin", "adf", "idf")


def check_num_frames(num_frames: int | None) -> None:
    """Raises `ValueError` unless at least one frame is asked for."""
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"`num_frames` must be at least 1, but it is {num_frames}.")


class VideoFile:
    """
    The sampled frames of a video file, decoded with PyAV each time they are iterated over and not before.

    Args:
        source (`str`, `os.PathLike` or `bytes`): a path, URL, base64 text, or the content of a file.
        num_frames (`int`, *optional*): how many frames, uniformly from the first to the last; all if there are fewer.
        fps (`float`, *optional*): frames a second, instead; exactly one of the two may be given, none means all.

    Raises:
        ValueError: if the file is empty, truncated, or has no video in it.
        OSError: if there is no such file.
        ImportError: without PyAV.
    """

    def __init__(self, source, num_frames: int | None = None, fps: float | None = None, name: str | None = None):
        if num_frames is not None and fps is not None:
            raise ValueError(f"Only one of `num_frames` ({num_frames}) and `fps` ({fps}) can be given.")
        check_num_frames(num_frames)
        if fps is not None and fps <= 0:
            raise ValueError(f"`fps` must be positive, but it is {fps}.")
        self.name = name or f"The video ({describe_source(source)})"
        file = read_source(source)
        check_not_empty(file, self.name)
        # What had to be fetched or decoded is kept, so that it is fetched once.
        self.source = file.getvalue() if isinstance(file, io.BytesIO) else file
        self._index(file)
        self.indices = self._sample(num_frames, fps)

    def _open(self, file):
        try:
            import av
        except ImportError:
            raise ImportError("Reading videos needs PyAV: `pip install longllava_hf[video]`.") from None
        try:
            container = av.open(file)
        except av.FFmpegError as error:
            raise ValueError(f"{self.name} is not a video that FFmpeg can read: {error}") from error
        if container.format.name in _NO_VIDEO_FORMATS or container.format.name.endswith("_pipe"):
            container.close()
            raise ValueError(f"{self.name} is not a video that FFmpeg can read, but {container.format.long_name}.")
        return container

    def _index(self, file) -> None:
        """Read the packets, without decoding them: when each frame is shown, and at which ones decoding can start."""
        import av

        times, keys, count = [], [], 0
        with self._open(file) as container:
            if not container.streams.video:
                raise ValueError(f"{self.name} has no video stream.")
            stream = container.streams.video[0]
            try:
                for packet in container.demux(stream):
                    count += packet.size > 0
                    if packet.pts is not None:
                        times.append(packet.pts)
                        if packet.is_keyframe:
                            keys.append(packet.pts)
            except av.FFmpegError as error:
                raise ValueError(f"{self.name} is damaged after {count} frames: {error}") from error
            declared = stream.frames
            self._seekable = container.format.name.startswith(_SEEKABLE) and len(times) == count
            self._time_base = stream.time_base
            self.fps = float(stream.average_rate or stream.guessed_rate or 0) or None
        if not count:
            raise ValueError(f"{self.name} has no frames.")
        if count < declared:
            raise ValueError(f"{self.name} is truncated: it should have {declared} frames, and {count} are there.")
        self.total_frames = count
        # Elsewhere than in containers with an index, frames are only counted.
        self._times, self._keys = (sorted(times), sorted(keys)) if self._seekable else (list(range(count)), [])

    def _sample(self, num_frames: int | None, fps: float | None) -> list[int]:
        total = self.total_frames
        if fps is not None:
            if self.fps is None:
                raise ValueError(f"{self.name} does not say its frame rate; use `num_frames` instead of `fps`.")
            seconds = np.array(self._times) * float(self._time_base if self._seekable else 1 / self.fps)
            # The frame that is on the screen at each tick, once.
            ticks = np.arange(seconds[0], seconds[-1] + 1 / self.fps - 1e-6, 1 / fps)
            picks = np.unique(np.searchsorted(seconds, ticks + 1e-6, side="right") - 1)
        elif num_frames is not None and num_frames < total:
            picks = np.linspace(0, total - 1, num_frames).astype(int)
        else:
            picks = np.arange(total)
        return picks.tolist()

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Image.Image]:
        for frame in self._frames():
            image = frame.to_image()
            if rotation := getattr(frame, "rotation", 0):
                image = image.rotate(rotation, expand=True)
            check_size(image.width, image.height, self.name)
            yield image

    def _frames(self) -> Iterator:
        """The wanted frames. Where an index leads to them, what none of them depends on is not decoded."""
        import av

        wanted, done = [self._times[i] for i in self.indices], 0
        with self._open(read_source(self.source)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO" if self._seekable else "SLICE"

            def decode() -> Iterator[tuple[int, Any]]:
                if not self._seekable:
                    return enumerate(container.decode(stream))
                return ((frame.pts, frame) for frame in container.decode(stream) if frame.pts is not None)

            frames, position = decode(), self._times[0]
            try:
                while done < len(wanted):
                    key = bisect_right(self._keys, wanted[done]) - 1
                    if key >= 0 and self._keys[key] > position:
                        container.seek(self._keys[key], stream=stream)
                        frames = decode()
                    position, frame = next(pair for pair in frames if pair[0] >= wanted[done])
                    while done < len(wanted) and wanted[done] <= position:  # one frame may be wanted several times
                        yield frame
                        done += 1
            except (av.FFmpegError, StopIteration) as error:
                counts = f"{len(self)} frames were wanted, {done} could be read"
                reason = str(error) or "it ends early"
                raise ValueError(f"{self.name} is damaged or truncated: {counts} ({reason}).") from error


class Frames(Sequence):
    """The frames of one video, decoded already. No list, which a chat template would rebuild (Transformers 5.24)."""

    def __init__(self, frames: Iterable):
        self._frames = tuple(frames)

    def __getitem__(self, index):
        return self._frames[index]

    def __len__(self) -> int:
        return len(self._frames)


__all__ = ["Frames", "VideoFile", "check_num_frames"]
