# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
The README's pictures and films: held-out digits, objects drawn here, which no artist of the training drew, and footage of the
film that no training picture shows.

    python -m tiny.examples examples
"""

import argparse
import math
from pathlib import Path

from PIL import Image, ImageDraw

from .assets import TEST_FOOTAGE, footage
from .pictures import digit_scans, draw_digit


FRAME_SIZE = (320, 180)
SIDE = 128


def snowman(draw: ImageDraw.ImageDraw) -> None:
    for y, radius in ((92, 32), (48, 24)):
        draw.ellipse((64 - radius, y - radius, 64 + radius, y + radius), "white", "#333333", 3)
    draw.rectangle((46, 6, 82, 28), "#222222")
    draw.rectangle((38, 24, 90, 30), "#222222")
    for x, y in ((56, 44), (72, 44), (64, 82), (64, 96)):
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), "#222222")
    draw.polygon(((64, 50), (64, 57), (82, 55)), "#ee7711")
    draw.line((34, 86, 10, 62), "#664422", 4)
    draw.line((94, 86, 118, 62), "#664422", 4)


def traffic_light(draw: ImageDraw.ImageDraw) -> None:
    draw.rounded_rectangle((40, 4, 88, 124), 12, "#444a50", "#222222", 3)
    for y, colour in ((26, "#e03030"), (64, "#f0c020"), (102, "#30b050")):
        draw.ellipse((48, y - 16, 80, y + 16), colour, "#222222", 2)


def sailboat(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((60, 8, 65, 96), "#7a5230")
    draw.polygon(((68, 10), (68, 88), (116, 88)), "#fafafa", "#333333")
    draw.polygon(((57, 22), (57, 88), (18, 88)), "#e04040", "#333333")
    draw.polygon(((6, 94), (122, 94), (100, 122), (28, 122)), "#8a5a2a", "#333333")


def rainbow(draw: ImageDraw.ImageDraw) -> None:
    for ring, colour in enumerate(("#e03030", "#f08020", "#f0d020", "#30b050", "#3070e0", "#8040c0")):
        draw.arc((4 + 8 * ring, 24 + 8 * ring, 124 - 8 * ring, 144 - 8 * ring), 180, 360, colour, 9)


def star(draw: ImageDraw.ImageDraw) -> None:
    corners = [(62 if corner % 2 == 0 else 26, math.pi * (corner / 5 - 0.5)) for corner in range(10)]
    draw.polygon([(64 + r * math.cos(turn), 68 + r * math.sin(turn)) for r, turn in corners], "#f8c830", "#c08010", 3)


OBJECTS = {draw.__name__.replace("_", "-"): draw for draw in (snowman, traffic_light, sailboat, rainbow, star)}


def objects() -> dict[str, Image.Image]:
    """Each object by its name, RGBA `(128, 128)`."""
    result = {}
    for name, draw in OBJECTS.items():
        image = Image.new("RGBA", (SIDE, SIDE))
        draw(ImageDraw.Draw(image))
        result[name] = image
    return result


def on_frame(thing: Image.Image, frame: Image.Image) -> Image.Image:
    """A thing in the middle of a frame, nearly as high."""
    side = round(0.94 * frame.height)
    thing = thing.resize((side, side), Image.Resampling.LANCZOS)
    result = frame.copy()
    result.paste(thing, ((frame.width - side) // 2, (frame.height - side) // 2), thing)
    return result


def write_film(frames: list[Image.Image], file: Path) -> None:
    import av

    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *frames[0].size, "yuv420p", 400_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    scans, digits = digit_scans()["test"]

    def digit(number: int, size: tuple[int, int]) -> Image.Image:
        return Image.fromarray(draw_digit(scans[list(digits).index(number)], size))

    for number, name in ((3, "three"), (7, "seven")):
        digit(number, (SIDE, SIDE)).save(folder / f"{name}.png")
    film = [frame.resize(FRAME_SIZE) for frame in footage(TEST_FOOTAGE)]
    write_film([*film[30:71], digit(5, FRAME_SIZE), *film[72:94]], folder / "film.mp4")
    for (name, thing), frame in zip(objects().items(), film[::25]):
        on_frame(thing, frame.crop((70, 0, 250, 180))).save(folder / f"{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
