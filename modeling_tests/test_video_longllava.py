"""Films: the frames that a plain decoding shows, whatever the container hides, turns or breaks, and nothing else."""

import io
import os
import pickle
import socket
import struct
import sys
import threading
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


def encode(
    path,
    codec="libx264",
    frames=24,
    gop=8,
    b_frames=2,
    pix_fmt="yuv420p",
    images=None,
    aspect=None,
    bit_rate=2_000_000,
    **options,
):
    """A film of pictures whose grey level tells their number, ten a second, or of the `images`."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10)
        images = images or [still(i) for i in range(frames)]
        (stream.width, stream.height), stream.pix_fmt, stream.gop_size = images[0].size, pix_fmt, gop
        stream.bit_rate = bit_rate
        stream.codec_context.max_b_frames = b_frames
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


def remux(source, target, skip=0, change=lambda packet, n: packet, **options):
    """A copy of the packets, the first `skip` of them before the film's beginning, so that an edit list hides them."""
    if av.__version__.startswith("14."):
        pytest.skip("this PyAV makes broken copies")
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = old.streams.video[0]
        # The decoder of AV1 has no encoder of its name, and an old PyAV does not know `opaque`.
        copy = new.add_stream_from_template(stream, **({"opaque": True} if stream.name == "libdav1d" else {}))
        for n, packet in enumerate(packet for packet in old.demux(stream) if packet.size):
            step = packet.duration or int(1 / (10 * packet.time_base))
            packet.pts, packet.dts = packet.pts - skip * step, packet.dts - skip * step
            if (packet := change(packet, n)) is not None:
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
    if None in times or sorted(set(times)) != list(times):
        times = [i / VideoFile(path).fps for i in range(total)]
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
    name = "whole.mov" if codec == "prores_ks" else "whole.mp4"
    path = encode(tmp_path / name, codec, pix_fmt=pix_fmt, bit_rate=0)
    assert_as_plain(remux(path, tmp_path / f"cut{path.suffix}", skip), shown=24 - skip, step=4)


@pytest.mark.parametrize(
    "edits", [[(0, 24)], [(0, 8), (16, 8)], [(8, 8), (0, 8)], [(0, 24), (3, 9)], [(5, 7), (20, 4)]]
)
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


def replace(packet, content: bytes):
    """The packet with another content."""
    other = av.Packet(content)
    other.pts, other.dts, other.time_base, other.duration = packet.pts, packet.dts, packet.time_base, packet.duration
    other.is_keyframe = packet.is_keyframe
    return other


def test_vp8_has_frames_that_are_never_shown(tmp_path):
    def hide(packet, n):
        content = bytearray(bytes(packet))
        if n in (3, 4, 17, 23):
            content[0] &= ~0x10
        return replace(packet, content)

    path = remux(encode(tmp_path / "whole.webm", "libvpx", b_frames=0), tmp_path / "film.webm", change=hide)
    assert_as_plain(path, shown=20, step=3)


@pytest.mark.parametrize(
    "name", ["a.mp4", "a.mov", "a.mkv", "a.avi", "a.ts", "a.mpg", "a.flv", "a.nut", "a.webm", "a.gif"]
)
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
    nothing = bytes.fromhex("000001b65a80")
    path = remux(
        encode(tmp_path / "whole.mp4", "mpeg4", b_frames=0),
        tmp_path / "film.mp4",
        change=lambda packet, n: replace(packet, nothing) if n in (3, 4, 13) else packet,
    )
    assert_as_plain(path, step=4)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("first", [0, 1, 6, 7])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_what_depends_on_frames_that_are_not_there(tmp_path, codec, first, suffix):
    """A film cut out of one whose groups of pictures lean on one another: the decoder drops what it cannot show."""
    params = "open-gop=1:keyint=6:min-keyint=6:bframes=2:b-adapt=0:scenecut=0"
    whole, path = tmp_path / "whole.mp4", tmp_path / f"film.{suffix}"
    with av.open(str(whole), "w") as container:
        stream = container.add_stream(codec, rate=10, options={f"{codec[3:]}-params": params})
        (stream.width, stream.height), stream.pix_fmt = SIZE, "yuv420p"
        for i in range(24):
            container.mux(stream.encode(av.VideoFrame.from_image(still(i))))
        container.mux(stream.encode())
    remux(whole, path, change=lambda packet, n: packet if n >= first else None)
    assert (len(plain(path)) < 24) == (first > 0)
    assert_as_plain(path, step=3)


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("b.mp4", "libx265"), ("c.webm", "libvpx-vp9")])
@pytest.mark.parametrize("gop", [1, 2, 7])
def test_seeking_leads_to_the_right_frames(tmp_path, name, codec, gop):
    path = encode(tmp_path / name, codec, gop=gop, b_frames=min(2, gop - 1))
    video, pictures = VideoFile(path), [picture for _, picture in plain(path)]
    for indices in ([23], [9, 10, 10, 11], [0, 23], [7, 8, 16], list(range(24))):
        marks = [video._marks[i] for i in indices]
        assert same(list(video._pictures(marks, seeks=True)), [pictures[i] for i in indices])


def test_where_seeking_leads_astray_everything_is_decoded(tmp_path):
    video = VideoFile(encode(tmp_path / "film.mp4"), num_frames=5)
    video._keys = list(video._marks)
    with pytest.raises(LookupError, match="a key frame is none"):
        list(video._pictures(video._marks[20:], seeks=True))
    assert [number(frame) for frame in video] == video.indices


def test_avi_counts_frames_that_are_dropped(tmp_path):
    path = encode(tmp_path / "film.avi", "mpeg4", b_frames=0, gop=1)
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        at = [packet.pos for packet in container.demux() if packet.size][5] - 8
    (size,) = struct.unpack_from("<I", content, at + 4)
    assert content[at : at + 4] == b"00dc"
    struct.pack_into("<I4sI", content, at + 4, 0, b"JUNK", size + size % 2 - 8)
    struct.pack_into("<I", content, content.rindex(b"idx1") + 8 + 16 * 5 + 12, 0)
    path.write_bytes(content)
    assert_as_plain(path, shown=23, step=5)
    assert [number(frame) for frame in VideoFile(path)][4:7] == [4, 6, 7]


def test_the_film_in_an_avif_and_not_the_picture_before_it(tmp_path):
    features = pytest.importorskip("PIL.features")
    if "avif" not in features.modules or not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    levels = [np.asarray(frame).mean() for frame in VideoFile(animate(tmp_path / "film.avif"))]
    assert len(levels) == 6 and sorted(levels) == levels and levels[5] - levels[0] > 40


# Films that are cut off


@pytest.mark.parametrize("name", ["a.mp4", "b.mp4", "c.avi", "d.mov", "e.mkv", "f.webm"])
def test_films_that_are_cut_off(tmp_path, name):
    codec = {"c.avi": "mpeg4", "d.mov": "mpeg4", "f.webm": "libvpx"}.get(name, "libx264")
    movflags = {"a.mp4": {"movflags": "faststart"}, "b.mp4": {"movflags": "frag_keyframe"}}
    movflags["d.mov"] = movflags["a.mp4"]
    whole = encode(tmp_path / name, codec, **movflags.get(name, {})).read_bytes()
    with av.open(str(tmp_path / name)) as container:
        positions = sorted(packet.pos for packet in container.demux() if packet.size)
    culprit = tmp_path / f"culprit-{name}"
    for at in (positions[4], positions[4] + 1, positions[12] + 3, positions[20], positions[23] - 1, positions[23] + 9):
        culprit.write_bytes(whole[:at])
        try:
            frames = list(VideoFile(culprit))
        except ValueError as error:
            assert culprit.name in str(error)
            assert name not in ("e.mkv", "f.webm")
        else:
            # Matroska ends anywhere, and so do fragments where PyAV has no index; then what is there is all there is.
            assert name in ("e.mkv", "f.webm") or (name == "b.mp4" and not hasattr(av.stream.Stream, "index_entries"))
            assert 3 <= len(frames) < 24 and [number(frame) for frame in frames] == list(range(len(frames)))


@pytest.mark.parametrize("skip", [0, 5])
def test_trimmed_films_that_are_cut_off(tmp_path, skip):
    path = remux(encode(tmp_path / "whole.mp4"), tmp_path / "trimmed.mp4", skip, movflags="faststart")
    whole = edit(path, seconds=1.2).read_bytes()
    assert VideoFile(path).total_frames == 12
    with av.open(str(path), options={"ignore_editlist": "1"}) as container:
        positions = [packet.pos for packet in container.demux() if packet.size]
    for at in (positions[0], positions[2], positions[7] + 1, positions[12], positions[16] - 1, positions[23]):
        path.write_bytes(whole[:at])
        with pytest.raises(ValueError, match=r"trimmed\.mp4.*truncated"):
            VideoFile(path)


def test_a_frame_that_does_not_come_is_an_error(tmp_path):
    path = encode(tmp_path / "film.mp4", b_frames=0)
    video = VideoFile(path)
    video._marks[7] += 1
    with pytest.raises(ValueError, match=r"film\.mp4.*24 frames were wanted, 7 could be read \(a frame is missing\)"):
        list(video)
    video.indices = [5, 3]
    with pytest.raises(ValueError, match=r"film\.mp4.*only be read forwards, but its `indices` go back: \[5, 3\]"):
        list(video)


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv", "a.ts", "a.mpg", "a.gif"])
def test_damage_is_said_soon(tmp_path, name):
    codec = {"a.mpg": "mpeg2video", "a.gif": "gif", "a.avi": "mpeg4"}.get(name, "libx264")
    path = encode(tmp_path / name, codec, pix_fmt="rgb8" if codec == "gif" else "yuv420p", b_frames=0)
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    for _ in range(15):
        content = bytearray(whole)
        for at in generator.integers(0, len(content), 12):
            content[at] = generator.integers(256)
        begin = time.monotonic()
        try:
            list(VideoFile(bytes(content), fps=3, name="culprit"))
        except ValueError as error:
            assert "culprit" in str(error)
        assert time.monotonic() - begin < 10


# How frames are to be shown


def with_matrix(path, linear):
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 4 + 20 + 16
    a, b, c, d = (round(value * (1 << 16)) for value in linear)
    struct.pack_into(">9i", content, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def quarters() -> Image.Image:
    """Four colours, so that each of the eight ways to show it is another picture."""
    picture = Image.new("RGB", SIZE)
    for box, colour in zip(
        [(0, 0, 32, 24), (32, 0, 64, 24), (0, 24, 32, 48), (32, 24, 64, 48)], ["red", "lime", "blue", "white"]
    ):
        picture.paste(colour, box)
    return picture


def shown_by(picture: Image.Image, linear) -> np.ndarray:
    """Every pixel where the matrix sends it: `(p, q)` to `(a p + c q, b p + d q)`, the picture moved back to zero."""
    (a, b, c, d), pixels = (int(np.sign(value)) for value in linear), np.asarray(picture)
    q, p = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    x, y = a * p + c * q, b * p + d * q
    x, y = x - x.min(), y - y.min()
    out = np.zeros((y.max() + 1, x.max() + 1, 3), dtype=np.uint8)
    out[y, x] = pixels
    return out


# The matrix that undoes what each EXIF orientation says of how the stored picture lies.
EXIF = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


@pytest.mark.parametrize("orientation", EXIF)
def test_display_matrices(tmp_path, orientation):
    path = encode(tmp_path / "film.mp4", images=[quarters()] * 3)
    stored = plain(path)[0][1]
    with_matrix(path, EXIF[orientation])
    picture = next(iter(VideoFile(path)))
    assert np.array_equal(np.asarray(picture), shown_by(stored, EXIF[orientation]))
    stored.getexif()[0x0112] = orientation
    assert same([picture], [ImageOps.exif_transpose(stored)])


def test_display_matrices_turn_as_ffmpeg_says(tmp_path):
    """`AVFrame`'s rotation is in degrees counterclockwise, as Pillow's."""
    for linear in ((0, 1, -1, 0), (0, -1, 1, 0), (-1, 0, 0, -1)):
        path = with_matrix(encode(tmp_path / "film.mp4", images=[quarters()]), linear)
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
            if not hasattr(frame, "rotation"):
                pytest.skip("this PyAV does not tell the rotation")
            turned = frame.to_image().rotate(frame.rotation, expand=True)
        assert same(list(VideoFile(path)), [turned])


def test_odd_display_matrices(tmp_path):
    path = encode(tmp_path / "film.mp4", images=[quarters()])
    stored = plain(path)[0][1]
    for linear in ((0, 0, 0, 0), (2, 0, 0, 2), (1, 0.005, -0.005, 1)):
        assert same(list(VideoFile(with_matrix(path, linear))), [stored])
    for linear in ((0.7, 0.7, -0.7, 0.7), (1, 0, 0, 0), (1, 0, 1, 0)):
        video = VideoFile(with_matrix(path, linear))
        with pytest.raises(ValueError, match=r"film\.mp4.*display matrix is \[\[(0\.7|1\.0)"):
            list(video)


@pytest.mark.parametrize("aspect", [Fraction(16, 11), Fraction(2), Fraction(3, 4), Fraction(1)])
@pytest.mark.parametrize("name", ["film.mp4", "film.mkv", "film.mpg"])
def test_pixels_that_are_not_square(tmp_path, aspect, name):
    if name == "film.mpg":
        aspect = Fraction(4, 3) * 48 / 64 if aspect == 1 else Fraction(16, 9) * 48 / 64  # MPEG-2 has only few
    codec = "mpeg2video" if name == "film.mpg" else "libx264"
    path = encode(tmp_path / name, codec, images=[quarters()] * 3, aspect=aspect)
    stored, picture = plain(path)[0][1], next(iter(VideoFile(path)))
    assert picture.size == (round(64 * aspect), 48)
    assert same([picture], [stored.resize(picture.size, Image.Resampling.BICUBIC)])


def test_pixels_are_made_square_before_they_are_turned(tmp_path, monkeypatch):
    path = with_matrix(encode(tmp_path / "film.mp4", images=[quarters()], aspect=Fraction(2)), EXIF[6])
    (picture,) = VideoFile(path)
    assert picture.size == (48, 128) and picture.getpixel((40, 10)) == pytest.approx((255, 0, 0), abs=8)
    monkeypatch.setattr(LIMITS, "max_pixels", 64 * 48)
    with pytest.raises(ValueError, match=r"film\.mp4.*too large: 128 x 48"):
        list(VideoFile(path))


def test_sizes_are_checked_before_anything_is_decoded(tmp_path, monkeypatch):
    path = encode(tmp_path / "film.mkv", "mpeg4")
    monkeypatch.setattr(LIMITS, "max_pixels", 64 * 48 - 1)
    monkeypatch.setattr(VideoFile, "_all_packets", None)
    with pytest.raises(ValueError, match=r"film\.mkv.*too large: 64 x 48"):
        VideoFile(path)


def test_a_size_that_changes(tmp_path, monkeypatch):
    small = encode(tmp_path / "a.ts", "mpeg2video", 5, b_frames=0).read_bytes()
    large = encode(tmp_path / "b.ts", "mpeg2video", images=[still(9, (128, 96))] * 5, b_frames=0).read_bytes()
    path = tmp_path / "film.ts"
    path.write_bytes(small + large)
    assert_as_plain(path)
    assert {frame.size for frame in VideoFile(path)} == {SIZE, (128, 96)}
    monkeypatch.setattr(LIMITS, "max_pixels", 64 * 48)
    with pytest.raises(ValueError, match=r"film\.ts.*too large: 128 x 96"):
        list(VideoFile(path))


# What is in a container besides


def box(name: bytes, *content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + sum(map(len, content)), name) + b"".join(content)


def with_tags(path, *items: bytes):
    """An MP4 with these items in its list of tags."""
    content = path.read_bytes()
    at = content.rindex(b"moov") - 4
    (size,) = struct.unpack_from(">I", content, at)
    assert at + size == len(content)
    handler = box(b"hdlr", bytes(8), b"mdirappl", bytes(9))
    tags = box(b"udta", box(b"meta", bytes(4), handler, box(b"ilst", *items)))
    path.write_bytes(content[:at] + struct.pack(">I", size + len(tags)) + content[at + 4 :] + tags)
    return path


def cover() -> bytes:
    jpeg = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(jpeg, "jpeg")
    return box(b"covr", box(b"data", struct.pack(">II", 13, 0), jpeg.getvalue()))


def sound(path, codec="aac"):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=44100)
        for _ in range(9):
            samples = np.zeros((1, 1024), np.int16 if codec in ("flac", "pcm_s16le") else np.float32)
            layout = "s16" if samples.dtype == np.int16 else "fltp"
            frame = av.AudioFrame.from_ndarray(samples, layout, "mono")
            frame.rate = 44100
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_tags_that_are_not_utf8(tmp_path):
    name = box(b"\xa9nam", box(b"data", struct.pack(">II", 1, 0), b"\xe9t\xe9"))
    path = with_tags(encode(tmp_path / "film.mp4"), name)
    with pytest.raises(UnicodeDecodeError):
        av.open(str(path))
    assert [number(frame) for frame in VideoFile(path, num_frames=3)] == [0, 11, 23]


@pytest.mark.parametrize(
    "name",
    [b"\xe9t\xe9.mp4", b"100%.mp4", b"concat:a|b.mp4", b"http:x.mp4", b"data:,x.mp4", b"film%03d.mp4", b"file:x.mp4"],
)
def test_names_of_files_are_nothing_else(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = os.fsdecode(name)
    try:
        os.rename(encode(tmp_path / "film.mp4"), path)
    except OSError:
        pytest.skip("no file can have this name here")
    for source in (path, os.path.join(tmp_path, path), tmp_path / path):
        assert [number(frame) for frame in VideoFile(source, num_frames=3)] == [0, 11, 23]


@pytest.mark.parametrize(
    ("name", "codec"),
    [("sound.m4a", "aac"), ("sound.mp3", "libmp3lame"), ("sound.flac", "flac"), ("sound.wav", "pcm_s16le")],
)
def test_sound_is_no_film(tmp_path, name, codec):
    path = sound(tmp_path / name, codec)
    with pytest.raises(ValueError, match=rf"{name}.*has no video stream"):
        VideoFile(path)
    if name == "sound.m4a":
        with pytest.raises(ValueError, match=rf"{name}.*has no video stream"):
            VideoFile(with_tags(path, cover()))


def test_a_cover_before_the_film(tmp_path):
    path = with_tags(encode(tmp_path / "film.mp4"), cover())
    assert [number(frame) for frame in VideoFile(path, num_frames=3)] == [0, 11, 23]
    # The other way round: the stream of the cover comes first where the tags do.
    content = path.read_bytes()
    track, tags = content.rindex(b"trak") - 4, content.rindex(b"udta") - 4
    (size,) = struct.unpack_from(">I", content, track)
    (length,) = struct.unpack_from(">I", content, tags)
    swapped = (
        content[:track] + content[tags : tags + length] + content[track : track + size] + content[track + size : tags]
    )
    path.write_bytes(swapped + content[tags + length :])
    with av.open(str(path)) as container:
        assert [stream.codec_context.name for stream in container.streams.video] == ["mjpeg", "h264"]
    assert [number(frame) for frame in VideoFile(path, num_frames=3)] == [0, 11, 23]


def test_a_codec_that_nobody_knows(tmp_path):
    path = encode(tmp_path / "film.mp4")
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(ValueError, match=r"film\.mp4.*cannot be decoded"):
        VideoFile(path)


# What reaches out


@pytest.mark.parametrize("as_path", [True, False])
@pytest.mark.parametrize("kind", ["ffconcat", "ffconcat-pipe", "sdp", "hls", "hls-pipe", "hls-url", "image2"])
def test_scripts_and_playlists_open_nothing(tmp_path, as_path, kind):
    encode(tmp_path / "film.ts", "mpeg2video")
    # Whoever opened this would wait, until somebody writes into it after a while.
    pipe = tmp_path / "pipe.ts"
    os.mkfifo(pipe)
    release = threading.Timer(9, lambda: os.close(os.open(pipe, os.O_RDWR)))
    release.start()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        content = {
            "ffconcat": f"ffconcat version 1.0\nfile '{tmp_path}/film.ts'\nfile 'film.ts'\n",
            "ffconcat-pipe": f"ffconcat version 1.0\nfile '{pipe}'\nfile 'pipe.ts'\n",
            "sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n"
            "a=rtpmap:96 H264/90000\n",
            "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path}/film.ts\n#EXT-X-ENDLIST\n",
            "hls-pipe": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{pipe}\n#EXT-X-ENDLIST\n",
            "hls-url": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:{port}/film.ts\n#EXT-X-ENDLIST\n",
            "image2": "P6 64 48 255\n" + "x" * (3 * 64 * 48),
        }[kind].encode()
        suffix = {"ffconcat": "ffconcat", "ffconcat-pipe": "ffconcat", "sdp": "sdp", "image2": "ppm"}.get(kind, "m3u8")
        path = tmp_path / f"culprit.{suffix}"
        path.write_bytes(content)
        begin = time.monotonic()
        with pytest.raises(ValueError, match=r"culprit.*is not a video that FFmpeg can read"):
            VideoFile(path if as_path else content, name="culprit")
        assert time.monotonic() - begin < 2
        with pytest.raises(BlockingIOError):
            server.accept()
    release.cancel()


def test_no_protocol_is_open_to_what_is_in_a_file(tmp_path, monkeypatch):
    """Even if a script got as far as to be read."""
    monkeypatch.setattr("longllava_hf.video_longllava._FORMATS", "concat,mov")
    path = encode(tmp_path / "film.mp4")
    script = f"ffconcat version 1.0\nfile '{path}'\n".encode()
    with av.open(io.BytesIO(script), options={"safe": "0", "protocol_whitelist": "file"}) as container:
        assert container.streams.video
    with pytest.raises(ValueError, match="is not a video that FFmpeg can read"):
        VideoFile(script)


# Time


def times_of(path, times, codec="libx264", time_base=Fraction(1, 10)):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        (stream.width, stream.height), stream.pix_fmt = SIZE, "yuv420p"
        stream.codec_context.time_base = time_base
        for i, at in enumerate(times):
            frame = av.VideoFrame.from_image(still(i))
            frame.pts, frame.time_base = at, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("name", ["film.mkv", "film.mp4", "film.ts", "film.nut"])
@pytest.mark.parametrize("times", [[*range(10), 10, 20, 30, 40, 50], [0, 7, 8, 9, 20], [5, 6, 9]])
def test_a_rate_that_varies(tmp_path, name, times):
    path = times_of(tmp_path / name, times)
    assert_as_plain(path)
    # In milliseconds, as Matroska counts.
    assert VideoFile(path).timestamps == pytest.approx([(time - times[0]) / 10 for time in times], abs=1e-3)


def test_a_film_that_begins_before_zero(tmp_path):
    path = remux(encode(tmp_path / "whole.mkv", b_frames=0), tmp_path / "film.nut", 5)
    assert_as_plain(path, step=5)


def test_rates_far_out(tmp_path):
    path = encode(tmp_path / "film.mkv")
    assert VideoFile(path, fps=1e-9).indices == [0]
    assert VideoFile(path, fps=1e12).indices == list(range(24))
    for fps in (float("nan"), float("inf"), 0):
        with pytest.raises(ValueError, match="`fps` must be positive"):
            VideoFile(path, fps=fps)
    far = times_of(tmp_path / "far.mkv", [0, 1, 10**9])
    assert VideoFile(far, fps=1000).indices == [0, 1, 2]


def test_a_stream_without_times(tmp_path):
    path = encode(tmp_path / "film.h264", b_frames=0)
    video = VideoFile(path, fps=VideoFile(path).fps / 5)
    assert video.indices == [0, 5, 10, 15, 20]
    assert [number(frame) for frame in video] == video.indices


def test_films_are_pickled(tmp_path):
    path = encode(tmp_path / "film.mp4")
    for source in (path, path.read_bytes()):
        video = VideoFile(source, num_frames=5)
        assert same(list(pickle.loads(pickle.dumps(video))), list(video))


@pytest.mark.parametrize("count", [1, 2, 5, 24])
def test_many_at_once(tmp_path, count):
    from concurrent.futures import ThreadPoolExecutor

    video = VideoFile(encode(tmp_path / "film.mp4"), num_frames=count)
    with ThreadPoolExecutor(4) as pool:
        for numbers in pool.map(lambda _: [number(frame) for frame in video], range(8)):
            assert numbers == video.indices


# Animated pictures


DURATIONS = [100, 200, 100, 400, 100, 100]


def animate(path, frames=6, **settings):
    images = [still(i) for i in range(frames)]
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=DURATIONS[:frames], lossless=True, **settings
    )
    return path


@pytest.fixture(params=["gif", "png", "webp", "avif"])
def animation(request, tmp_path):
    if request.param == "avif":
        from PIL import features

        if "avif" not in features.modules or not features.check("avif"):
            pytest.skip("this Pillow has no AVIF")
    return animate(tmp_path / f"film.{request.param}")


def test_animations(animation):
    film = AnimationFile(animation)
    assert isinstance(film, VideoFile) and (len(film), film.total_frames, film.fps) == (6, 6, 6.0)
    assert [number(frame) for frame in film] == list(range(6)) == [number(frame) for frame in film]
    assert {(frame.mode, frame.size) for frame in film} == {("RGB", SIZE)}
    assert [number(frame) for frame in AnimationFile(animation, num_frames=3)] == [0, 2, 5]
    assert [number(frame) for frame in AnimationFile(animation.read_bytes(), fps=5)] == [0, 1, 3, 4]
    assert AnimationFile(animation, fps=10).indices == list(range(6))
    assert AnimationFile(animation, fps=2).indices == [0, 3]
    assert [number(frame) for frame in pickle.loads(pickle.dumps(film))] == list(range(6))


def test_animations_that_are_broken(animation, monkeypatch):
    whole = animation.read_bytes()
    for content in (b"", b"no film at all " * 50, *(whole[:at] for at in range(30, len(whole), 29))):
        try:
            frames = list(AnimationFile(content, name="culprit"))
        except ValueError as error:
            assert "culprit" in str(error)
        else:
            assert [number(frame) for frame in frames] == list(range(len(frames)))
    with pytest.raises(OSError, match=r"nowhere\.gif"):
        AnimationFile("/nowhere.gif")
    with pytest.raises(ValueError, match="Only one of `num_frames`"):
        AnimationFile(animation, num_frames=1, fps=1)
    monkeypatch.setattr(LIMITS, "max_pixels", 64 * 48 - 1)
    with pytest.raises(ValueError, match=r"film\.\w+.*too large: 64 x 48"):
        AnimationFile(animation)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9)
    with pytest.raises(ValueError, match=r"film\.\w+.*too large"):
        AnimationFile(animation)


def test_animations_need_no_pyav_and_videos_say_so(animation, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert [number(frame) for frame in AnimationFile(animation)] == list(range(6))
    with pytest.raises(ImportError, match=r"Reading videos needs PyAV: `pip install longllava_hf\[video\]`"):
        VideoFile(animation)


def test_a_picture_that_is_not_of_the_animation(tmp_path):
    path = tmp_path / "film.png"
    frames = [still(i) for i in range(1, 4)]
    still(0).save(path, save_all=True, append_images=frames, default_image=True, duration=100)
    assert [number(frame) for frame in AnimationFile(path)] == [1, 2, 3]


def test_animations_of_16_bits(tmp_path):
    grey = Image.fromarray(np.full((48, 64), 128 * 257, dtype=np.uint16))
    grey.save(tmp_path / "film.png", save_all=True, append_images=[grey.point(lambda value: value)])
    with Image.open(tmp_path / "film.png") as image:
        if getattr(image, "n_frames", 1) == 1:
            pytest.skip("this Pillow writes no such animations")
    assert {frame.getpixel((3, 3)) for frame in AnimationFile(tmp_path / "film.png")} == {(128, 128, 128)}


def test_animations_that_do_not_say_how_long(tmp_path):
    images = [still(i) for i in range(4)]
    images[0].save(tmp_path / "film.gif", save_all=True, append_images=images[1:])
    assert AnimationFile(tmp_path / "film.gif").fps == 10
    still(3).save(tmp_path / "still.png")
    assert [number(frame) for frame in AnimationFile(tmp_path / "still.png", fps=1)] == [3]
    with pytest.raises(ValueError, match=r"x\.ppm.*is not an animation that Pillow can read"):
        still(3).save(tmp_path / "x.ppm")
        AnimationFile(tmp_path / "x.ppm")
