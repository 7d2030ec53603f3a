"""Films: the frames that a plain decoding shows, whatever the container hides, turns or breaks, and nothing else."""

import io
import os
import pickle
import socket
import struct
import time
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image, ImageOps

from longllava_hf.sources_longllava import LIMITS
from longllava_hf.video_longllava import AnimationFile, VideoFile


av = pytest.importorskip("av")

SIZE = (64, 48)


def still(number: int, size=SIZE) -> Image.Image:
    return Image.new("RGB", size, (9 * number + 20,) * 3)


def number(picture: Image.Image) -> int:
    return round((np.asarray(picture).mean() - 20) / 9)


def encode(path, codec="libx264", frames=24, gop=8, b_frames=2, pix_fmt="yuv420p", images=None, aspect=None, **options):
    """A film of pictures whose grey level tells their number, ten a second, or of the `images`."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10)
        images = images or [still(i) for i in range(frames)]
        (stream.width, stream.height), stream.pix_fmt, stream.gop_size = images[0].size, pix_fmt, gop
        stream.bit_rate = 2_000_000
        stream.codec_context.max_b_frames = b_frames
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


def remux(source, target, skip=0, keep=None, change=lambda packet, n: None):
    """A copy of the packets, the first `skip` of them before the film's beginning, so that an edit list hides them."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for n, packet in enumerate(packet for packet in old.demux(stream) if packet.size):
            if keep is not None and n >= keep:
                break
            step = packet.duration or int(1 / (10 * packet.time_base))
            packet.pts, packet.dts = packet.pts - skip * step, packet.dts - skip * step
            change(packet, n)
            packet.stream = copy
            new.mux(packet)
    return target


def edit(path, start=None, seconds=None):
    """Let the one edit of a film's list begin so many frames later, or last so long."""
    content = bytearray(path.read_bytes())
    at = content.index(b"elst") + 4
    version, count = content[at], struct.unpack_from(">I", content, at + 4)[0]
    assert (version, count) == (0, 1)
    duration, media_time = struct.unpack_from(">Ii", content, at + 8)
    if seconds is not None:
        duration = round(seconds * 1000)  # FFmpeg's movies count in milliseconds
    if start is not None:
        media_time += start
    struct.pack_into(">Ii", content, at + 8, duration, media_time)
    path.write_bytes(content)
    return path


def plain(path) -> list[tuple[float, Image.Image]]:
    """What a plain decoding shows, and when."""
    with av.open(str(path)) as container:
        return [(frame.time, frame.to_image()) for frame in container.decode(video=0)]


def same(one, other) -> bool:
    return len(one) == len(other) and all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(one, other))


def assert_as_plain(path, shown: int | None = None, step: int = 1) -> None:
    """Whatever is asked for is what a plain decoding shows."""
    expected = plain(path)
    times, pictures = zip(*expected)
    total = len(expected)
    assert shown is None or total == shown
    assert VideoFile(path).total_frames == total
    for count in range(1, total + 2, step):
        wanted = np.linspace(0, total - 1, count).astype(int) if count < total else range(total)
        assert same(list(VideoFile(path, num_frames=count)), [pictures[i] for i in wanted]), count
    if None in times:
        times = [i / 10 for i in range(total)]
    for fps in (0.4, 1, 3, 10, 25):
        ticks, end = [], times[-1] + 1 / VideoFile(path).fps
        while (tick := times[0] + len(ticks) / fps) < end - 1e-6:
            ticks.append(max(i for i in range(total) if times[i] <= tick + 1e-6))
        assert same(list(VideoFile(path, fps=fps)), [pictures[i] for i in sorted(set(ticks))]), fps


# Films that hide some of their packets


@pytest.mark.parametrize("skip", [1, 6, 8, 13])
@pytest.mark.parametrize(
    ("codec", "settings"),
    [("libx264", {}), ("libx264", {"b_frames": 0}), ("mpeg4", {}), ("libx264", {"gop": 100}), ("mjpeg", {"gop": 1})],
)
def test_films_cut_at_the_start(tmp_path, codec, settings, skip):
    if codec == "mjpeg":
        settings = {**settings, "pix_fmt": "yuvj420p", "b_frames": 0}
    path = remux(encode(tmp_path / "whole.mp4", codec, **settings), tmp_path / "cut.mp4", skip)
    assert_as_plain(path, shown=24 - skip)


def test_the_frames_of_a_film_cut_at_the_start(tmp_path):
    path = remux(encode(tmp_path / "whole.mp4"), tmp_path / "cut.mp4", 6)
    assert [number(frame) for frame in VideoFile(path, num_frames=5)] == [6, 10, 14, 18, 23]


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize("seconds", [0.1, 0.7, 1.55, 2.3])
@pytest.mark.parametrize("skip", [0, 5])
@pytest.mark.parametrize(("codec", "b_frames"), [("libx264", 2), ("libx264", 0), ("mpeg4", 2)])
def test_films_cut_at_the_end(tmp_path, suffix, codec, b_frames, seconds, skip):
    path = encode(tmp_path / "whole.mov", codec, b_frames=b_frames)
    path = edit(remux(path, tmp_path / f"cut.{suffix}", skip), seconds=seconds)
    assert_as_plain(path, step=3)
    assert VideoFile(path).total_frames < 24


@pytest.mark.parametrize("codec", ["libx265", "libvpx-vp9", "libsvtav1", "prores_ks"])
@pytest.mark.parametrize("skip", [0, 5])
def test_films_of_other_codecs_that_are_cut(tmp_path, codec, skip):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    pix_fmt = "yuv422p10le" if codec == "prores_ks" else "yuv420p"
    path = encode(tmp_path / "whole.mov" if codec == "prores_ks" else tmp_path / "whole.mp4", codec, pix_fmt=pix_fmt)
    assert_as_plain(remux(path, tmp_path / f"cut{path.suffix}", skip), shown=24 - skip, step=4)


@pytest.mark.parametrize("edits", [[(0, 24)], [(0, 8), (16, 8)], [(8, 8), (0, 8)], [(0, 24), (3, 9)], [(5, 7), (20, 4)]])
def test_films_of_several_edits(tmp_path, edits):
    path = encode(tmp_path / "whole.mp4", b_frames=0, movflags="faststart")
    content = path.read_bytes()
    at = content.index(b"elst") - 4
    with av.open(str(path)) as container:
        frame = int(1 / (10 * container.streams.video[0].time_base))
    entries = b"".join(struct.pack(">IiI", 100 * count, frame * first, 1 << 16) for first, count in edits)
    new = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(edits)) + entries
    old = struct.unpack_from(">I", content, at)[0]
    grown = bytearray(content[:at] + new + content[at + old :])
    for name in (b"moov", b"trak", b"edts"):
        size_at = grown.index(name) - 4
        struct.pack_into(">I", grown, size_at, struct.unpack_from(">I", grown, size_at)[0] + len(new) - old)
    offsets = grown.index(b"stco") + 8
    for i in range(struct.unpack_from(">I", grown, offsets)[0]):
        offset = struct.unpack_from(">I", grown, offsets + 4 + 4 * i)[0]
        struct.pack_into(">I", grown, offsets + 4 + 4 * i, offset + len(new) - old)
    path.write_bytes(grown)
    assert_as_plain(path, step=5)


@pytest.mark.parametrize("lag", [0, 25])
def test_vp8_has_frames_that_are_never_shown(tmp_path, lag):
    alt_ref = {"auto-alt-ref": "1", "lag-in-frames": str(lag), "arnr-maxframes": "5"}
    path = tmp_path / "film.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx", rate=10, options=alt_ref)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *SIZE, "yuv420p", 200_000
        for i in range(40):
            pixels = np.random.default_rng(i).integers(0, 99, (48, 64, 3), dtype=np.uint8) + np.uint8(3 * i)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        packets = sum(packet.size > 0 for packet in container.demux())
    assert (packets > 40) == (lag > 0)
    assert_as_plain(path, shown=40, step=7)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.avi", "a.ts", "a.mpg", "a.flv", "a.nut", "a.webm", "a.gif"])
def test_whole_films_of_every_container(tmp_path, name):
    codec = {"a.mpg": "mpeg2video", "a.webm": "libvpx-vp9", "a.gif": "gif", "a.avi": "mpeg4"}.get(name, "libx264")
    settings = {"pix_fmt": "rgb8", "b_frames": 0} if codec == "gif" else {}
    assert_as_plain(encode(tmp_path / name, codec, **settings), shown=24, step=5)


def test_a_gif_with_a_comment_after_the_last_frame(tmp_path):
    path = encode(tmp_path / "film.gif", "gif", pix_fmt="rgb8", b_frames=0)
    assert path.read_bytes()[-1:] == b";"
    path.write_bytes(path.read_bytes()[:-1] + b"\x21\xfe\x05hello\0;")
    assert_as_plain(path, shown=24, step=5)


def test_frames_that_are_not_coded(tmp_path):
    """MPEG-4 says so of a frame that is like the one before; FFmpeg shows none for it."""
    nothing = bytes.fromhex("000001b6 5a 80")

    def change(packet, n):
        pass

    whole = encode(tmp_path / "whole.mp4", "mpeg4", b_frames=0)
    path = tmp_path / "film.mp4"
    with av.open(str(whole)) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for n, packet in enumerate(packet for packet in old.demux(stream) if packet.size):
            if n in (3, 4, 13):
                other = av.Packet(nothing)
                other.pts, other.dts, other.time_base = packet.pts, packet.dts, packet.time_base
                packet = other
            packet.stream = copy
            new.mux(packet)
    assert_as_plain(path, step=4)
