"""Pictures and frames: pixels equal CLIP's, every kind of input, and a clear word about every broken one."""

import base64
import gc
import io
import pickle
import subprocess
import sys
import textwrap
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from longllava_hf import LIMITS, LongLLaVAImageProcessor
from longllava_hf.image_processing_longllava import (
    LazyPixelValues,
    _Memory,
    load_picture,
    ordered_map,
    picture_size,
)
from longllava_hf.video_longllava import Frames, VideoFile

from .conftest import FIXTURES


CLIP = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}


def photo(size=(60, 40), mode="RGB", seed=0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture
def processor():
    return LongLLaVAImageProcessor(**CLIP, image_seq_length=4)


def pixels(processor, images, **kwargs) -> torch.Tensor:
    return processor(images, return_tensors="pt", **kwargs)["pixel_values"]


def as_the_authors_do(image: Image.Image, clip) -> torch.Tensor:
    """Pasted on a square of the mean colour, then CLIP."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(x * 255) for x in clip.image_mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return clip([square], return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize(
    "size", [(60, 40), (40, 60), (41, 60), (48, 48), (1, 7), (500, 3), (1000, 999), (1333, 750), (751, 1334)]
)
def test_pixels_equal_clips_bit_for_bit(processor, size):
    image = photo((max(4, size[0]), max(4, size[1]))).resize(size)
    assert torch.equal(pixels(processor, image), as_the_authors_do(image, CLIPImageProcessorPil(**CLIP)))


@pytest.mark.parametrize("size", [(1600, 1201), (1201, 1600), (4000, 3000), (97, 96)])
@pytest.mark.parametrize("colours", ["noise", "black and white", "background"])
def test_pixels_equal_clips_where_it_is_hard(processor, size, colours):
    """Colours at both ends, where rounding is clipped, and noise that smooths nothing over."""
    generator = np.random.default_rng(1)
    values = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if colours == "black and white":
        values = (values > 127).astype(np.uint8) * 255
    elif colours == "background":
        values[:] = [int(x * 255) for x in processor.image_mean]
    image = Image.fromarray(values)
    assert torch.equal(pixels(processor, image), as_the_authors_do(image, CLIPImageProcessorPil(**CLIP)))


def test_settings_without_a_square(processor):
    """What is not CLIP's recipe takes the longer road, through arrays."""
    image = photo((90, 50))
    for settings in ({"do_pad": False}, {"do_resize": False, "do_center_crop": False}, {"resample": 0}):
        ours = pixels(processor, image, **settings)
        assert torch.equal(ours, pixels(processor, np.asarray(image), **settings)), settings


def test_torchvision_makes_no_difference():
    """The class is Pillow's on every machine, whatever back end is asked for."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    from longllava_hf import LongLLaVAConfig

    assert set(IMAGE_PROCESSOR_MAPPING[LongLLaVAConfig].values()) == {LongLLaVAImageProcessor}
    assert LongLLaVAImageProcessor().backend == "pil"
    assert "torchvision" not in sys.modules or LongLLaVAImageProcessor().backend == "pil"


def test_every_kind_of_input_gives_the_same_pixels(processor, tmp_path):
    image = photo()
    path = tmp_path / "photo.png"
    image.save(path)
    array = np.asarray(image)
    sources = [
        image,
        str(path),
        path,
        path.read_bytes(),
        f"file://{path}",
        base64.b64encode(path.read_bytes()).decode(),
        "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
        array,
        np.moveaxis(array, -1, 0),
        torch.from_numpy(array),
        torch.from_numpy(np.moveaxis(array, -1, 0).copy()),
    ]
    together = pixels(processor, sources)
    assert together.shape == (len(sources), 3, 48, 48) and together.dtype == torch.float32
    for i in range(len(sources)):
        assert torch.equal(together[i], together[0]), i


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "HSV", "YCbCr"])
def test_modes(processor, mode, tmp_path):
    image = photo().convert("L").convert(mode) if mode == "LA" else photo(mode=mode)
    expected = pixels(processor, image.convert("RGB"))
    assert torch.equal(pixels(processor, image), expected)
    if mode in ("L", "LA", "P", "RGBA", "1"):
        image.save(tmp_path / "x.png")
        assert torch.equal(pixels(processor, tmp_path / "x.png"), expected)


def test_sixteen_bits_a_pixel(processor, tmp_path):
    grey = np.asarray(photo(mode="L"))
    image = Image.fromarray(grey.astype(np.uint16) * 257)
    assert image.mode.startswith("I;16")
    image.save(tmp_path / "deep.png")
    expected = pixels(processor, Image.fromarray(grey).convert("RGB"))
    assert torch.equal(pixels(processor, image), expected)
    assert torch.equal(pixels(processor, tmp_path / "deep.png"), expected)


def test_grey_arrays_and_arrays_between_0_and_1(processor):
    grey = np.asarray(photo(mode="L"))
    expected = pixels(processor, Image.fromarray(grey))
    assert torch.equal(pixels(processor, grey), expected)
    assert torch.equal(pixels(processor, grey[None]), expected)
    assert torch.equal(pixels(processor, grey[..., None]), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(processor, orientation, tmp_path):
    upright = photo((64, 32))
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(turn[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(pixels(processor, tmp_path / "turned.png"), pixels(processor, upright))


def test_nesting_and_order(processor):
    images = [photo(seed=i) for i in range(30)]
    nested = pixels(processor, [images[:3], [], [images[3:20]], images[20:]])
    assert torch.equal(nested, torch.cat([pixels(processor, image) for image in images]))


def test_high_resolution(processor):
    image = photo((200, 100))
    outputs = processor(image, patch_strategy="best_fit", return_tensors="pt")
    assert outputs["image_grids"].tolist() == [[3, 5]]
    assert outputs["pixel_values"].shape == (16, 3, 48, 48)
    assert torch.equal(outputs["pixel_values"][:1], pixels(processor, image))
    # Raster order: put together again, the tiles are the picture, fitted in and centred on black.
    plain = {"do_normalize": False, "do_rescale": False}
    tiles = processor(image, patch_strategy="best_fit", return_tensors="np", **plain)["pixel_values"][1:]
    canvas = tiles.reshape(3, 5, 3, 48, 48).transpose(2, 0, 3, 1, 4).reshape(3, 144, 240)
    fitted = np.moveaxis(np.asarray(image.resize((240, 120), Image.Resampling.BICUBIC)), -1, 0)
    assert np.array_equal(canvas[:, 12:132], fitted)
    assert canvas[:, :12].max() == canvas[:, 132:].max() == 0


def test_best_fit_prefers_what_loses_and_wastes_least(processor):
    assert processor.best_grid(336, 336, 336) == (1, 1)
    assert processor.best_grid(672, 336, 336) == (2, 1)
    assert processor.best_grid(100, 900, 48, [[1, 1], [2, 2], [1, 4]]) == (1, 4)


def test_save_and_load(processor, tmp_path):
    LongLLaVAImageProcessor(
        **CLIP, patch_strategy="best_fit", image_grid_pinpoints=[[1, 2]], image_seq_length=7
    ).save_pretrained(tmp_path)
    again = LongLLaVAImageProcessor.from_pretrained(tmp_path)
    assert (again.patch_strategy, again.image_grid_pinpoints, again.image_seq_length) == ("best_fit", [[1, 2]], 7)
    assert again.crop_size["height"] == 48 and again.do_pad


BROKEN = {
    "zero bytes": (b"", "is empty: it has 0 bytes"),
    "text": (b"This is no picture at all.\n" * 9, "is not a picture"),
    "truncated": (lambda b: b[: len(b) // 2], "damaged or truncated"),
    "only a header": (lambda b: b[:40], "is not a picture|damaged or truncated"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "gif"])
def test_broken_pictures_are_named(processor, case, format, tmp_path):
    content, message = BROKEN[case]
    whole = io.BytesIO()
    photo((300, 200)).save(whole, format=format)
    path = tmp_path / f"culprit.{format}"
    path.write_bytes(content(whole.getvalue()) if callable(content) else content)
    good = photo()
    if format in ("gif", "webp") and case in ("truncated", "only a header"):
        message = "is not a picture|damaged or truncated"
    with pytest.raises(ValueError, match=rf"Image 1 \(`.*culprit\.{format}`\).*({message})"):
        processor([good, path, good])


def test_a_picture_that_is_not_there(processor):
    with pytest.raises(OSError, match=r"nowhere\.png"):
        processor("/nowhere.png")


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_empty_pictures(processor, size):
    for empty in (Image.new("RGB", size), np.zeros((*size[::-1], 3), dtype=np.uint8)):
        with pytest.raises(ValueError, match=f"Image 0.*{size[0]} x {size[1]} pixels"):
            processor(empty)


def test_a_picture_of_60000_by_60000_pixels(processor, tmp_path):
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    path = tmp_path / "huge.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match=r"huge\.png.*too large.*limit is 178956970"):
        processor(path)


@pytest.mark.parametrize("odd", [42, None, {"a": 1}, np.zeros(7), np.zeros((2, 7, 7))])
def test_what_is_no_picture(processor, odd):
    with pytest.raises(ValueError, match="Image 0"):
        processor([odd])
    with pytest.raises(ValueError, match="At least one image"):
        processor([])


def test_video_is_sampled_uniformly(film):
    path = film(40)
    video = VideoFile(path, num_frames=4)
    assert (video.total_frames, video.indices, video.fps) == (40, [0, 13, 26, 39], 10.0)
    assert [round((np.asarray(frame).mean() - 20) / 5) for frame in video] == [0, 13, 26, 39]
    assert [round((np.asarray(frame).mean() - 20) / 5) for frame in video] == [0, 13, 26, 39]  # again from the start
    assert VideoFile(path, num_frames=100).indices == list(range(40)) and len(VideoFile(path)) == 40


def test_video_is_sampled_by_rate(film):
    assert VideoFile(film(40), fps=2).indices == [0, 5, 10, 15, 20, 25, 30, 35]
    assert VideoFile(film(40), fps=99).indices == list(range(40))


def encode(path, codec, frames=40, **options):
    """Frames whose grey level tells their number, with B-frames where the codec has them."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 10
        stream.bit_rate = 2_000_000
        stream.codec_context.max_b_frames = options.get("b_frames", 0)
        for i in range(frames):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (5 * i + 20,) * 3))
            if "times" in options:
                frame.pts, frame.time_base = options["times"][i], Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("name", "codec", "b_frames"),
    [
        ("a.avi", "mpeg4", 2),
        ("b.mpg", "mpeg2video", 2),
        ("c.ts", "mpeg2video", 2),
        ("d.mp4", "mpeg4", 2),
        ("e.mkv", "mpeg4", 2),
    ],
)
def test_the_right_frames_of_every_container(tmp_path, name, codec, b_frames):
    video = VideoFile(encode(tmp_path / name, codec, b_frames=b_frames))
    assert video.total_frames == 40
    video.indices = [0, 9, 19, 29, 39]
    assert [round((np.asarray(frame).mean() - 20) / 5) for frame in video] == [0, 9, 19, 29, 39]


def test_rates_go_by_the_clock(tmp_path):
    """Ten frames in the first second, then one each second: once a second is the first and then each of those."""
    path = encode(tmp_path / "x.mp4", "mpeg4", frames=15, times=[*range(10), 10, 20, 30, 40, 50])
    assert VideoFile(path, fps=1).indices == [0, 10, 11, 12, 13, 14]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint16, bool, torch.bfloat16])
def test_arrays_of_other_types(processor, dtype):
    grey = np.asarray(photo(mode="L")) // 128 * 255  # black and white, so that every type can say it
    array = np.stack([grey] * 3, axis=-1)
    expected = pixels(processor, array)
    if dtype is torch.bfloat16:
        other = torch.from_numpy(array / 255).to(dtype)
    else:
        other = (array.astype(np.float64) / 255 * (65535 if dtype is np.uint16 else 1)).astype(dtype)
    torch.testing.assert_close(pixels(processor, other), expected)


def test_paths_that_do_not_exist_are_not_base64(processor, tmp_path):
    with pytest.raises(FileNotFoundError, match="pics/cat"):
        processor("pics/cat")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        processor(str(tmp_path))


@pytest.mark.parametrize("gop", [1, 10, 1000])
def test_every_frame_is_the_right_one_wherever_key_frames_are(film, gop):
    video = VideoFile(film(45, gop=gop))
    for indices in ([44], [9, 10, 11], [0, 44], list(range(45)), [3, 3, 30]):
        video.indices = indices
        assert [round((np.asarray(frame).mean() - 20) / 5) for frame in video] == indices


def test_frames_are_decoded_when_they_are_needed(film, monkeypatch):
    taken = []

    class Counting(VideoFile):
        def __iter__(self):
            for frame in super().__iter__():
                taken.append(frame)
                yield frame

    frames = ordered_map(lambda frame: len(taken), iter(Counting(film(40))), max_workers=2)
    assert next(frames) <= 6 and len(taken) <= 6
    assert sum(1 for _ in frames) == 39


@pytest.mark.parametrize("name", ["film.mp4", "film.avi", "film.mkv"])
def test_broken_videos_are_named(film, name, tmp_path):
    whole = film(40, name=name).read_bytes()
    culprit = tmp_path / f"culprit-{name}"
    for content in (b"", b"no film at all " * 50, whole[: len(whole) // 2], whole[:100]):
        culprit.write_bytes(content)
        try:
            video = VideoFile(culprit)
            frames = list(video)
        except ValueError as error:
            assert culprit.name in str(error)
        else:
            # A stream format may end anywhere; then what is there is all there is.
            assert name == "film.mkv" and 0 < len(frames) < 40


def test_sampling_that_makes_no_sense(film):
    path = film(5)
    with pytest.raises(ValueError, match=r"Only one of `num_frames` \(3\) and `fps` \(2\)"):
        VideoFile(path, num_frames=3, fps=2)
    with pytest.raises(ValueError, match="`num_frames` must be at least 1, but it is 0"):
        VideoFile(path, num_frames=0)
    with pytest.raises(ValueError, match="`fps` must be positive, but it is -1"):
        VideoFile(path, fps=-1)
    with pytest.raises(OSError, match=r"nowhere\.mp4"):
        VideoFile("/nowhere.mp4")


def test_load_picture_keeps_rgb_files_as_they_are():
    path = FIXTURES / "longllava-moe-tiny" / "image_3.png"
    assert np.array_equal(np.asarray(load_picture(path)), np.asarray(Image.open(path).convert("RGB")))


def test_auto_class(tmp_path, processor):
    from longllava_hf import LongLLaVAConfig

    LongLLaVAConfig().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    try:
        loaded = AutoImageProcessor.from_pretrained(tmp_path)
    except ImportError:
        pytest.skip("this release of Transformers has no AutoImageProcessor without torchvision")
    assert type(loaded) is LongLLaVAImageProcessor


# Pictures that are decoded when they are needed


@pytest.mark.parametrize("settings", [{}, {"patch_strategy": "best_fit"}])
def test_lazy_pixels_are_the_same(processor, film, tmp_path, settings):
    tilted = Image.Exif()
    tilted[0x0112] = 6
    photo((200, 90)).save(tmp_path / "tilted.jpg", exif=tilted)
    photo((130, 50), mode="L").save(tmp_path / "grey.png")
    array = np.asarray(photo((60, 150)))
    movie = VideoFile(film(20), num_frames=7)
    frames = Frames([photo(seed=i) for i in range(3)])
    images = [tmp_path / "tilted.jpg", str(tmp_path / "grey.png"), movie, array, frames, photo((300, 50))]
    now = processor(images, return_tensors="pt", **settings)
    lazy = processor(images, return_tensors="pt", lazy=True, **settings)
    later = lazy["pixel_values"]
    assert isinstance(later, LazyPixelValues) and len(later) == len(now["pixel_values"])
    assert later.shape == now["pixel_values"].shape and "LazyPixelValues(shape=(" in repr(later)
    assert torch.equal(later.load(), now["pixel_values"])
    for size in (1, 4, 5, 100):
        batches = list(later.split(size))
        assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
        assert torch.equal(torch.cat(batches), now["pixel_values"])
    tiles = [1, 1]
    if settings:
        assert np.array_equal(lazy["image_grids"], now["image_grids"])
        tiles = [1 + rows * columns for rows, columns in now["image_grids"][:2].tolist()]
    assert torch.equal(later.skip(2).load(), now["pixel_values"][sum(tiles) :])


def test_lazy_pictures_are_decoded_a_little_ahead(tmp_path):
    photo().save(tmp_path / "x.png")
    loaded = []

    class Counting(LongLLaVAImageProcessor):
        def tiles_of(self, number, *args):
            loaded.append(number)
            return super().tiles_of(number, *args)

    processor = Counting(**CLIP)
    lazy = processor([tmp_path / "x.png"] * 100, lazy=True)["pixel_values"]
    assert not loaded
    batches = lazy.split(5)
    next(batches)
    assert len(loaded) < 30
    batches.close()
    assert len(loaded) < 60
    assert len(list(lazy.split(64))) == 2 and len(loaded) >= 100


def test_broken_lazy_pictures_are_named(processor, tmp_path):
    photo().save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:200])
    lazy = processor([tmp_path / "good.png"] * 3 + [tmp_path / "bad.png"], lazy=True)["pixel_values"]
    with pytest.raises(ValueError, match=r"Image 3 \(`.*bad.png`\) is damaged or truncated"):
        list(lazy.split(2))
    with pytest.raises(ValueError, match=r"Image 3 \("):
        list(lazy.skip(2).split(2))


def test_lazy_pixels_are_float32_and_no_more_than_there_are(processor):
    lazy = processor([photo()] * 3, lazy=True)["pixel_values"]
    torch.set_default_dtype(torch.bfloat16)
    try:
        (batch,) = lazy.split(10**9)
    finally:
        torch.set_default_dtype(torch.float32)
    assert batch.dtype == torch.float32 and batch.untyped_storage().nbytes() == batch.nbytes
    grey = processor([np.zeros((60, 60), np.uint8)], lazy=True, do_pad=False, do_convert_rgb=False, do_normalize=False)
    with pytest.raises(ValueError, match=r"a tile must have the shape \(3, 48, 48\), but it is \(1, 48, 48\)"):
        grey["pixel_values"].load()


def test_lazy_pixels_need_a_size(processor):
    with pytest.raises(ValueError, match="`lazy=True` needs `do_center_crop=True`"):
        processor([photo()], lazy=True, do_center_crop=False)
    assert processor([photo()], lazy=True)["pixel_values"].skip(1).load().shape == (0, 3, 48, 48)


@pytest.mark.parametrize("orientation", range(1, 10))
def test_size_without_pixels(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo((60, 40)).save(tmp_path / "x.jpg", exif=exif)
    assert picture_size(tmp_path / "x.jpg") == load_picture(tmp_path / "x.jpg").size[::-1]
    assert picture_size(np.zeros((3, 5, 7))) == picture_size(np.zeros((5, 7, 3))) == picture_size(np.zeros((5, 7)))


# Edges


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS])
@pytest.mark.parametrize("size", [(1, 2), (1, 7), (1, 97), (2, 480), (3, 1001), (50, 101), (96, 1000), (33, 2222)])
def test_long_pictures_are_those_of_the_square(size, resample):
    """Pillow itself on the square that CLIP's processor would pad to."""
    processor = LongLLaVAImageProcessor(**CLIP, resample=resample, do_rescale=False, do_normalize=False)
    for width, height in (size, size[::-1]):
        noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        square = Image.new("RGB", (max(size), max(size)), tuple(int(x * 255) for x in processor.image_mean))
        square.paste(Image.fromarray(noise), ((max(size) - width) // 2, (max(size) - height) // 2))
        expected = np.asarray(square.resize((48, 48), resample)).transpose(2, 0, 1)
        for source in (Image.fromarray(noise), noise):
            assert np.array_equal(processor(source)["pixel_values"][0], expected)


def in_a_process(script: str, both: bool = False):
    """Run Python, and return by how many MB its peak memory grew after the line `begin()`; and what it printed last."""
    lines = ["import io, resource, numpy as np", "from PIL import Image", "from longllava_hf import *"]
    lines += ["peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024", "before = [0]"]
    lines += ["def begin(): before[0] = peak()", textwrap.dedent(script), "print(peak() - before[0])"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = float(done.stdout.split()[-1])
    return (grown, float(done.stdout.split()[-2])) if both else grown


def test_memory_follows_width_times_height():
    grown = in_a_process("""
        processor = LongLLaVAImageProcessor()
        processor(Image.new("RGB", (300, 300)))
        begin()
        for size in ((1, 16_000), (1, 178_000), (178_000, 1), (540, 10_000)):
            buffer = io.BytesIO()
            Image.new("1" if 1 in size else "RGB", size).save(buffer, "PNG")
            assert processor(buffer.getvalue())["pixel_values"][0].shape == (3, 336, 336)
    """)
    assert grown < 150  # of which most is the largest one, decoded; by the square it was 1,500


@pytest.mark.parametrize("case", ["landscape", "portrait", "turned", "tall", "grey", "deep"])
def test_the_memory_that_is_counted_is_what_is_taken(case, tmp_path):
    """Within a third, or less than what is counted."""
    size = {"landscape": (5000, 3000), "portrait": (3000, 5000), "tall": (1500, 10_000)}.get(case, (4000, 3600))
    taken, counted = in_a_process(
        f"""
        from longllava_hf.image_processing_longllava import _bytes_needed
        processor, exif, size = LongLLaVAImageProcessor(), Image.Exif(), {size}
        if {case == "turned"}:
            exif[0x0112] = 6
        values = np.random.default_rng(0).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
        image = Image.fromarray(values.astype(np.uint16) * 257 if {case == "deep"} else values)
        image = image if {case in ("grey", "deep")} else image.convert("RGB")
        file = {str(tmp_path / "x.png")!r}  # whose own bytes are nobody's memory
        image.save(file, exif=exif, compress_level=1)
        del image, values
        processor(Image.new("RGB", (300, 300)))
        counted = _bytes_needed(Image.open(file), False, "x") / 2**20
        open("/proc/self/clear_refs", "w").write("5")
        peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
        begin()
        processor(file)
        print(counted)
    """,
        both=True,
    )
    assert taken < 1.34 * counted + 10


def test_threads_share_the_memory(monkeypatch):
    monkeypatch.setattr(LIMITS, "max_memory", 1000)
    memory, together, most = _Memory(), [0], []

    def work(_):
        with memory.reserve(400, "x"):
            together[0] += 1
            most.append(together[0])
            time.sleep(0.002)
            together[0] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(40)))
    assert max(most) == 2
    with pytest.raises(ValueError, match=r"x is too large: decoding and resizing it takes 1001 bytes"):
        with memory.reserve(1001, "x"):
            pass


@pytest.mark.parametrize("size", [(13_000, 13_000), (1, 100_000_000)])
def test_what_decoding_takes_is_known_before(processor, size, monkeypatch):
    monkeypatch.setattr(LIMITS, "max_memory", 800 << 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    header = io.BytesIO()
    Image.new("1", (1, 1)).save(header, "PNG")
    data = bytearray(header.getvalue())
    data[16:24] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(ValueError, match=r"Image 0 \(.*\) is too large: decoding and resizing it takes \d+ bytes"):
        processor(bytes(data))


def test_few_frames_wait_to_be_resized():
    """A film's frames are large, and are not decoded faster than they are resized."""
    decoded, resized = [], []

    def frames():
        for i in range(50):
            decoded.append(i)
            yield i

    def resize(frame):
        time.sleep(0.002)
        resized.append(frame)
        assert len(decoded) - len(resized) <= 5
        return frame

    assert list(ordered_map(resize, frames(), max_workers=2, ahead=40)) == list(range(50))


def test_integers_and_floats_of_any_range(processor):
    grey = np.asarray(photo(mode="L"))
    expected = pixels(processor, Image.fromarray(grey).convert("RGB"))
    color = np.asarray(photo())
    for value in (grey.astype(np.int32), grey.astype(np.int32) * 257, grey.astype(np.float32)):
        assert torch.equal(pixels(processor, Image.fromarray(value)), expected)
    unit = Image.fromarray(grey.astype(np.float32) / 255)
    assert unit.mode == "F" and torch.equal(pixels(processor, unit), expected)
    expected = pixels(processor, Image.fromarray(color))
    for dtype in (np.int16, np.int64, np.float16, np.float32, np.float64):
        assert torch.equal(pixels(processor, color.astype(dtype)), expected), dtype
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        whole = torch.tensor(color).permute(2, 0, 1).to(dtype)
        assert torch.equal(pixels(processor, whole), expected), dtype
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert torch.equal(pixels(processor, (torch.tensor(color) / 255).to(dtype)), expected), dtype
    near = pixels(processor, (torch.tensor(color) / 255).to(torch.bfloat16))
    assert (near - expected).abs().max() < 0.02


def test_floats_between_0_and_1_are_as_clips(processor):
    """What Transformers' users do: values in 0..1, and `do_rescale=False`."""
    unit = np.asarray(photo((48, 48))).astype(np.float32) / 255
    clip = CLIPImageProcessorPil(**CLIP, do_resize=False)
    expected = clip(unit, do_rescale=False, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    assert torch.allclose(pixels(processor, unit, do_rescale=False), expected, atol=1e-6)
    assert torch.allclose(pixels(processor, photo((48, 48))), expected, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 256.0])
def test_values_that_no_picture_has(processor, value):
    picture = np.full((20, 20, 3), 0.5)
    picture[3, 4, 1] = value
    with pytest.raises(ValueError, match=r"Image 0 \(ndarray\) must hold values in 0\.\.255 or 0\.\.1, but has"):
        processor(picture)
    with pytest.raises(ValueError, match="Image 0"):
        processor(np.full((20, 20, 3), 300, np.int32))
    with pytest.raises(ValueError, match="must hold numbers"):
        processor(np.full((20, 20, 3), "x"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["tiff", "jpeg", "png", "webp"])
def test_orientations_of_every_format(processor, tmp_path, kind, orientation):
    file = tmp_path / f"x.{kind}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo((120, 60)).save(file, exif=exif)
    options = {"patch_strategy": "best_fit", "image_grid_pinpoints": [[1, 2], [2, 1]]}
    eager, lazy = processor(file, **options, return_tensors="pt"), processor(file, **options, lazy=True)
    assert eager["image_grids"].tolist() == np.asarray(lazy["image_grids"]).tolist()
    assert eager["image_grids"].tolist() == [[2, 1] if orientation > 4 else [1, 2]]
    assert torch.equal(lazy["pixel_values"].load(), eager["pixel_values"])


def test_damaged_files_are_named_in_every_mode(processor, tmp_path):
    file = tmp_path / "x.png"
    photo((200, 100)).save(file)
    whole, outcomes = file.read_bytes(), set()
    for position in range(8, len(whole), 97):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        for options in ({}, {"lazy": True}, {"lazy": True, "patch_strategy": "best_fit"}):
            try:
                found = processor(file, **options, return_tensors="pt")["pixel_values"]
                outcomes.add(bool(torch.isfinite(found.load() if options else found).all()))
            except ValueError as error:
                assert "Image 0 (" in str(error) and "x.png" in str(error)
                outcomes.add(False)
    assert False in outcomes


def test_a_file_that_vanishes(processor, tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file in files:
        photo().save(file)
    lazy = processor(files, lazy=True)["pixel_values"]
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"Image 1 \(`.*1\.png`\) cannot be read"):
        lazy.load()


def test_integers_of_sixteen_bits_in_files(processor, tmp_path):
    """Dark ones too, turned or not: the file says how deep they are, and not the values."""
    dark = np.full((40, 60), 200, np.uint16)
    (tmp_path / "x.pgm").write_bytes(b"P5 60 40 65535\n" + dark.astype(">u2").tobytes())
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(dark).save(tmp_path / "x.png", exif=exif)
    black = pixels(processor, Image.new("RGB", (60, 40)))
    assert torch.equal(pixels(processor, tmp_path / "x.pgm"), black)
    assert torch.equal(pixels(processor, tmp_path / "x.png"), pixels(processor, Image.new("RGB", (40, 60))))


@pytest.mark.parametrize("options", [{"do_pad": False}, {"resample": 0}, {"resample": 4}, {"do_resize": False}])
@pytest.mark.parametrize("kind", ["file", "array"])
def test_no_setting_takes_more_than_the_limit(processor, options, kind):
    array = np.zeros((178_000, 1, 3), np.uint8)
    buffer = io.BytesIO()
    Image.new("1", (1, 178_000)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="is too large: decoding and resizing it takes"):
        processor(array if kind == "array" else buffer.getvalue(), **options)


def test_tensors_that_are_no_pictures(processor):
    for tensor in (torch.zeros(3, 20, 20).to_sparse(), torch.zeros(3, 20, 20, device="meta")):
        with pytest.raises(ValueError, match=r"Image 0 \(Tensor\) must be a plain tensor of numbers"):
            processor(tensor)


def test_a_file_that_changes(processor, tmp_path):
    options = {"patch_strategy": "best_fit", "image_grid_pinpoints": [[1, 1], [1, 3]], "lazy": True}
    photo((48, 48)).save(tmp_path / "x.png")
    lazy = processor([tmp_path / "x.png"] * 2, **options)["pixel_values"]
    photo((144, 48)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="should hold 2 pictures, but 4 came: image 0 has changed"):
        lazy.load()


def test_no_program_is_started_for_a_picture(processor):
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with Image.open(io.BytesIO(script)) as image:
        assert image.format == "EPS"
    with pytest.raises(ValueError, match=r"Image 0 \(.*\) is not a picture"):
        processor(script)


def test_lazy_pixels_are_as_a_tensor(processor, film, tmp_path):
    photo((200, 100)).save(tmp_path / "x.png")
    sources = [tmp_path / "x.png", VideoFile(film(9), num_frames=5), photo((50, 300)), tmp_path / "x.png"]
    lazy = processor(sources, lazy=True, patch_strategy="best_fit", image_grid_pinpoints=[[1, 2], [2, 1]])[
        "pixel_values"
    ]
    whole = lazy.load()
    assert lazy.shape == whole.shape and len(lazy) == len(whole) and lazy.ndim == whole.ndim == 4
    assert lazy.dtype == whole.dtype and lazy.device == whole.device
    assert torch.equal(torch.stack(list(lazy)), whole)
    for index in (0, 3, -1, np.int64(5), slice(2, 7), slice(None), slice(-3, None), slice(4, 4), slice(None, None, 3)):
        assert torch.equal(lazy[index], whole[index]), index
    for index in (len(whole), -len(whole) - 1):
        with pytest.raises(IndexError):
            lazy[index]
    half = lazy.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and lazy.dtype == torch.float32
    assert torch.equal(half.load(), whole.to(torch.bfloat16)) and torch.equal(half[3:5], whole[3:5].to(torch.bfloat16))
    assert lazy.to("meta").device.type == "meta" and lazy.to("cpu", non_blocking=True).device.type == "cpu"
    again = pickle.loads(pickle.dumps(half.skip(1)))
    assert again.dtype == torch.bfloat16 and torch.equal(again.load(), half.load()[3:])


def test_one_frame_of_a_film_is_decoded_alone(processor, film, monkeypatch):
    lazy = processor(VideoFile(film(30)), lazy=True)["pixel_values"]
    made = []
    tiles_of = LongLLaVAImageProcessor.tiles_of
    monkeypatch.setattr(LongLLaVAImageProcessor, "tiles_of", lambda *args: made.append(args[1]) or tiles_of(*args))
    assert torch.equal(lazy[17], lazy.load()[17]) and len(made) == 31


def test_frames_count_too(film, monkeypatch):
    monkeypatch.setattr(LIMITS, "max_memory", 8 * 64 * 48 - 1)
    with pytest.raises(ValueError, match=r"The video \(.*film\.mp4`\) is too large: decoding and resizing it takes"):
        VideoFile(film(3))


def test_lazy_pixels_pass_through_the_workers_of_a_data_loader(processor, tmp_path):
    photo().save(tmp_path / "x.png")
    samples = [processor([tmp_path / "x.png"] * n, lazy=True)["pixel_values"] for n in (1, 2, 3)]
    gc.collect()  # what other tests left, films with threads among it, is nothing for a fork to clean up
    loader = torch.utils.data.DataLoader(samples, batch_size=None, num_workers=2)
    found = [lazy.load() for lazy in loader]
    assert [len(x) for x in found] == [1, 2, 3]
    assert all(torch.equal(tile, pixels(processor, photo())[0]) for x in found for tile in x)
