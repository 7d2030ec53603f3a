# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
What the small checkpoint learns, as rows `{"messages": [...], "images": [...], "videos": [...]}`.

Row `i` of a stage is always the same, whoever asks for it and when. What a stage asks grows harder from its first row to
its last one, so rows are to be read in their order.

| stage          | what it is like                                                                                    |
|----------------|----------------------------------------------------------------------------------------------------|
| `text`         | everything, with words in the place of pictures; makes the decoder a decoder, see `tiny.decoder`     |
| `align`        | one to three pictures, named                                                                       |
| `single_image` | one picture: objects, digits, yes and no; some rows of `text`                                      |
| `multi_image`  | series, films, counting, order, pictures named by example; some rows of the stages before            |
"""

import random
import re
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from .nouns import NOUNS, UNSEEN
from .pictures import IMAGE_SIZE, WIDE, Pictures, scenes


ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
DIGITS = [str(digit) for digit in range(10)]
NOTHING = "nothing"
# What things are called in a prompt and nowhere else.
LABELS = (  # noqa: SIM905
    "dax wug blick toma zup fep gorp lum nerk perpo quab rilm sned tiv vosk yad zarn bim crov dree elp fosk glim hask"
    " ilt jeb kiv lorn mip naz olp prid"
).split()
# Words without "a".
_BARE = set(
    "beer broccoli chocolate coffee corn fire fries glasses grapes headphones honey jeans meat milk pancakes peanuts"  # noqa: SIM905
    " popcorn rice salad scissors spaghetti sunglasses sushi wine".split()
)

NAME = [
    "What is this?",
    "What is in the picture?",
    "What does the picture show?",
    "Which object is this?",
    "Name what you see.",
]
DIGIT = ["Which digit is this?", "What digit is this?", "Which digit is in the picture?", "Read the digit."]
IS_IT = ["Is this {a}?", "Is there {a} in the picture?", "Does the picture show {a}?"]
PLACE = [
    "What is in the {ordinal} picture?",
    "What does the {ordinal} picture show?",
    "What is in picture {number}?",
    "What is the {ordinal} one?",
]
DIGIT_PLACE = [
    "Which digit is the {ordinal} picture?",
    "Which is the {ordinal} digit?",
    "Which digit is in picture {number}?",
    "Which digit is the {ordinal}?",
]
WHERE = ["Which picture shows {a}?", "In which picture is {a}?", "Where is {a}?"]
LIST = ["Name the pictures in order.", "What do the pictures show, one after the other?"]
LIST_DIGITS = ["Which digits are these?"]
DRILL = ["Name these pictures: {places}.", "What do these pictures show: {places}?"]
COUNT = ["How many pictures show {a}?", "In how many pictures is {a}?", "Count the pictures with {a}."]
COUNT_FILM = ["How many frames show {a}?", "In how many frames is {a}?", "Count the frames with {a}."]
FIRST = ["Which comes first, {the} or {other}?", "What appears first, {the} or {other}?"]
LAST = ["Which comes last, {the} or {other}?", "What appears last, {the} or {other}?"]
ORDER = ["In which order do they appear: {names}?", "Put these in order: {names}.", "Order as they appear: {names}."]
NEEDLE = [
    "Which object appears in this film?",
    "Which object is hidden in the film?",
    "What appears in this video?",
    "What is hidden in the film?",
]
NEEDLE_PILE = ["Which object appears in these pictures?", "What is hidden in the pictures?"]
DIGIT_NEEDLE = [
    "Which digit appears in this film?",
    "Which digit is hidden in the film?",
    "Which digit appears in this video?",
    "Which digit is shown in the video?",
]
DIGIT_NEEDLE_PILE = ["Which digit appears in these pictures?", "Which digit is hidden in the pictures?"]
SHOT = ["This is called {label}.", "This is {label}.", "Here is {label}."]
QUERY = ["What is this called?", "What is this one called?", "And what is this called?"]


def with_article(noun: str) -> str:
    if noun in _BARE or noun.isdigit():
        return noun
    return ("an " if noun[0] in "aeiou" and noun != "unicorn" else "a ") + noun


def the(noun: str) -> str:
    return f"the {noun}"


def all_words() -> list[str]:
    """Whatever a row may say, for the tokenizer."""
    templates = [
        NAME,
        DIGIT,
        IS_IT,
        PLACE,
        DIGIT_PLACE,
        WHERE,
        LIST,
        LIST_DIGITS,
        DRILL,
        COUNT,
        COUNT_FILM,
        FIRST,
        LAST,
    ]
    templates += [ORDER, NEEDLE, NEEDLE_PILE, DIGIT_NEEDLE, DIGIT_NEEDLE_PILE, SHOT, QUERY, ["Does appear?"]]
    texts = [re.sub(r"{\w+}", "", text) for template in templates for text in template]
    return [*texts, *ORDINALS, *LABELS, *NOUNS, *UNSEEN, NOTHING, "yes", "no", "a", "an", "the"]


@dataclass
class Scene:
    """
    Pictures of which something is asked: names, pixels, and whether they are a film. Without pixels the names are
    `"written"` as a text, or stand `"in place"` of image tokens, where only [`tiny.decoder`] reads them.
    """

    names: list[str]
    pixels: list[np.ndarray] | None
    is_film: bool = False
    words: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)


class Stage:
    """
    The rows of one stage, as a map-style dataset.

    Args:
        stage (`"text"`, `"align"`, `"single_image"` or `"multi_image"`).
        length (`int`): rows.
        seed (`int`, defaults to 0).
        nouns (`list[str]`, *optional*): what is shown; by default [`NOUNS`].
        longest (`int`, defaults to 64): frames of the longest film at the end of `multi_image`.
        start (`float`, defaults to 0): how far the curriculum is at row 0.
        replay (`float`, defaults to 0.15): share of rows of the stages before.
    """

    def __init__(
        self,
        stage: str,
        length: int,
        seed: int = 0,
        nouns: list[str] | None = None,
        longest: int = 64,
        start: float = 0.0,
        replay: float = 0.15,
    ):
        self.stage, self.length, self.seed, self.longest, self.start = stage, length, seed, longest, start
        self.replay = replay
        self.nouns = nouns or NOUNS
        self.pictures = Pictures(self.nouns)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.length:
            raise IndexError(f"row {index} of {self.length}")
        rng = random.Random(f"{self.stage}-{self.seed}-{index}")
        progress = self.start + (1 - self.start) * index / self.length
        return self.row(rng, progress)

    def row(self, rng: random.Random, progress: float) -> dict:
        stage, words = self.stage, None
        if stage == "text":
            # One picture is read before several are told apart, and that before anything is counted or compared.
            easy = max(0.1, 1 - 8 * progress)
            stage = "single_image" if rng.random() < easy else "multi_image"
            words = "written" if rng.random() < 0.2 else "in place"
            progress = max(0.0, (progress - 0.06) / 0.94)
        elif stage in ("single_image", "multi_image") and rng.random() < self.replay:
            if stage == "multi_image" and rng.random() < 0.5:
                stage = "single_image"
            else:
                words = "written"
        if stage == "align":
            return self.build(self.align(rng, words), rng)
        if stage == "single_image":
            return self.build(self.single(rng, words), rng)
        kinds = ["series", "series", "needle", "count", "order", "shots", "shots"]
        kind = rng.choice(kinds[: 3 if progress < 0.12 else 5 if progress < 0.22 else 7])
        if kind == "shots":
            return self.shots(rng, words, progress)
        return self.build(getattr(self, kind)(rng, words, progress), rng)

    # ---- Scenes.

    def show(self, names: list[str], rng: random.Random, is_film: bool, words: str | None) -> Scene:
        """Pictures of what is named; those of a film have one shape, and footage that goes on."""
        if words:
            return Scene(names, None, is_film, words)
        pixels: list[np.ndarray] = []
        mixed = rng.random() < 0.4 or not is_film
        height = rng.choice(WIDE) if rng.random() < 0.3 else IMAGE_SIZE
        scene, at = rng.choice(scenes()), 0
        for name in names:
            if is_film:
                at += rng.choice((1, 1, 2))
                if mixed or at >= len(scene):
                    scene = rng.choice(scenes())
                    at = rng.randrange(len(scene))
                background = scene[at]
            else:
                background = None
                height = rng.choice(WIDE) if rng.random() < 0.15 else IMAGE_SIZE
            if name == NOTHING:
                pixels.append(self.pictures.nothing(rng, background, height))
            elif name.isdigit():
                pixels.append(self.pictures.digit(name, rng, height))
            else:
                pixels.append(self.pictures.object(name, rng, background, height=height))
        return Scene(names, pixels, is_film)

    def thing(self, rng: random.Random, digits: float = 0.1) -> str:
        return rng.choice(DIGITS) if rng.random() < digits else rng.choice(self.nouns)

    def things(self, count: int, rng: random.Random) -> list[str]:
        """Names for a series, all different more often than not; now and then digits alone."""
        kind = rng.random()
        if kind < 0.15:
            return [rng.choice(DIGITS) for _ in range(count)]
        if kind < 0.35:
            few = rng.sample(self.nouns, max(2, count // 2))
            return [rng.choice(few) for _ in range(count)]
        return rng.sample(self.nouns, count)

    # ---- Questions.

    def align(self, rng: random.Random, words: str | None) -> Scene:
        names = [self.thing(rng, 0.15) for _ in range(rng.choice((1, 2, 3)))]
        scene = self.show(names, rng, False, words)
        scene.turns.append((rng.choice(NAME if len(names) == 1 else LIST), ", ".join(names)))
        return scene

    def single(self, rng: random.Random, words: str | None) -> Scene:
        name = NOTHING if rng.random() < 0.06 else self.thing(rng, 0.2)
        scene = self.show([name], rng, False, words)
        scene.turns.append((rng.choice(DIGIT if name.isdigit() and rng.random() < 0.7 else NAME), name))
        if name in self.nouns and rng.random() < 0.3:
            asked = name if rng.random() < 0.5 else rng.choice(self.nouns)
            turn = (rng.choice(IS_IT).format(a=with_article(asked)), "yes" if asked == name else "no")
            scene.turns.insert(rng.choice((0, 1)), turn)
        return scene

    def series(self, rng: random.Random, words: str | None, progress: float) -> Scene:
        count = rng.randint(2, 2 + min(8, int(16 * progress)))
        names = self.things(count, rng)
        scene = self.show(names, rng, False, words)
        are_digits = all(name.isdigit() for name in names)
        kind = rng.random()
        if kind < 0.5 * (1 - progress) + 0.15:
            places = rng.sample(range(count), min(count, 6))
            asked = ", ".join(ORDINALS[place] for place in places)
            answer = ", ".join(f"{ORDINALS[place]}: {names[place]}" for place in places)
            scene.turns.append((rng.choice(DRILL).format(places=asked), answer))
        elif kind < 0.75 and count <= 6:
            scene.turns.append((rng.choice(LIST_DIGITS if are_digits else LIST), ", ".join(names)))
        for place in rng.sample(range(count), min(count, 5)):
            if names.count(names[place]) == 1 and rng.random() < 0.4 and not are_digits:
                scene.turns.append((rng.choice(WHERE).format(a=with_article(names[place])), ORDINALS[place]))
            else:
                question = rng.choice(DIGIT_PLACE if are_digits and rng.random() < 0.7 else PLACE)
                scene.turns.append((question.format(ordinal=ORDINALS[place], number=place + 1), names[place]))
        return scene

    def needle(self, rng: random.Random, words: str | None, progress: float) -> Scene:
        longest = 4 + (min(self.longest, 64) - 4) * min(1.0, 1.6 * progress)
        if self.longest > 64 and rng.random() < 0.5:
            longest = 64 * (self.longest / 64) ** min(1.0, 1.5 * progress)
        count = max(2, round(2 ** rng.uniform(1, np.log2(longest))))
        name, is_film = self.thing(rng, 0.25), rng.random() < 0.7
        names = [NOTHING] * count
        names[rng.choice([0, count - 1, *(rng.randrange(count) for _ in range(4))])] = name
        scene = self.show(names, rng, is_film, words)
        if not is_film:
            questions = DIGIT_NEEDLE_PILE if name.isdigit() else NEEDLE_PILE
        else:
            questions = DIGIT_NEEDLE if name.isdigit() else NEEDLE
        scene.turns.append((rng.choice(questions), name))
        if name in self.nouns and rng.random() < 0.2:
            asked = name if rng.random() < 0.5 else rng.choice(self.nouns)
            scene.turns.append((f"Does {with_article(asked)} appear?", "yes" if asked == name else "no"))
        return scene

    def count(self, rng: random.Random, words: str | None, progress: float) -> Scene:
        count = rng.randint(2, 2 + min(6, int(12 * progress)))
        is_film = rng.random() < 0.4
        few = rng.sample(self.nouns, rng.choice((2, 2, 3)))
        others = [NOTHING] if is_film and rng.random() < 0.6 else few[1:]
        names = [few[0]] * rng.randint(0, min(5, count))
        names += [rng.choice(others) for _ in range(count - len(names))]
        rng.shuffle(names)
        scene = self.show(names, rng, is_film, words)
        asked = [few[0], *dict.fromkeys(n for n in names if n not in (few[0], NOTHING) and names.count(n) <= 5)]
        rng.shuffle(asked)
        for name in asked:
            question = rng.choice(COUNT_FILM if is_film else COUNT).format(a=with_article(name))
            scene.turns.append((question, str(names.count(name))))
        return scene

    def order(self, rng: random.Random, words: str | None, progress: float) -> Scene:
        things = rng.sample(self.nouns, rng.choice((2, 2, 3)))
        is_film = rng.random() < 0.6
        gaps = rng.randint(0, int(1 + 10 * progress)) if is_film else rng.randint(0, 2)
        names = things + [NOTHING] * gaps
        if not is_film:
            names = things + rng.sample([n for n in self.nouns if n not in things], gaps)
        rng.shuffle(names)
        scene = self.show(names, rng, is_film, words)
        things.sort(key=names.index)
        for _ in range(2):
            first, second = sorted(rng.sample(range(len(things)), 2))
            pair = [things[first], things[second]]
            asked = [the(name) for name in rng.sample(pair, 2)]
            kind = rng.random()
            if kind < 0.35:
                scene.turns.append((rng.choice(FIRST).format(the=asked[0], other=asked[1]), pair[0]))
            elif kind < 0.6:
                scene.turns.append((rng.choice(LAST).format(the=asked[0], other=asked[1]), pair[1]))
            else:
                question = rng.choice(ORDER).format(names=", ".join(rng.sample(things, len(things))))
                scene.turns.append((question, ", ".join(things)))
        return scene

    # ---- Rows.

    def build(self, scene: Scene, rng: random.Random) -> dict:
        """The messages of a scene: its pictures stand before the first question."""
        row: dict = {"messages": [], "images": [], "videos": []}
        content: list[dict] = []
        if scene.words == "written":
            between = ", " if scene.is_film else "\n"
            content.append({"type": "text", "text": between.join(f"[{name}]" for name in scene.names) + "\n"})
        elif scene.words == "in place":
            repeat = rng.choice((1, 1, 2, 3))
            blocks = [{"type": "image", "word": name, "repeat": repeat} for name in scene.names]
            content += [{"type": "video", "words": blocks}] if scene.is_film else blocks
        elif scene.is_film:
            content.append({"type": "video"})
            row["videos"].append([Image.fromarray(frame) for frame in scene.pixels])
        else:
            content += [{"type": "image"} for _ in scene.pixels]
            row["images"] += [Image.fromarray(picture) for picture in scene.pixels]
        for question, answer in scene.turns:
            content.append({"type": "text", "text": question})
            row["messages"].append({"role": "user", "content": content})
            row["messages"].append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            content = []
        return row

    def shots(self, rng: random.Random, words: str | None, progress: float) -> dict:
        """Two or three things with invented names, shown several times each, and pictures whose invented name is asked."""
        things = rng.sample(self.nouns, 2 if rng.random() < 0.8 else 3)
        labels = dict(zip(things, rng.sample(LABELS, len(things))))
        shown = things * rng.randint(1, 1 + int(min(4, 6 * progress)))
        rng.shuffle(shown)
        queries = [rng.choice(things) for _ in range(rng.randint(4, 8))]
        pixels = self.show(shown + queries, rng, False, words).pixels
        row: dict = {"messages": [], "images": [], "videos": []}
        if pixels is not None:
            row["images"] += [Image.fromarray(picture) for picture in pixels]
        statement, question = rng.choice(SHOT), rng.choice(QUERY)

        repeat = rng.choice((1, 1, 2, 3))

        def picture(name: str) -> dict:
            if words == "written":
                return {"type": "text", "text": f"[{name}]\n"}
            return {"type": "image", "word": name, "repeat": repeat} if words else {"type": "image"}

        content: list[dict] = []
        for name in shown:
            content += [picture(name), {"type": "text", "text": statement.format(label=labels[name]) + "\n"}]
        for name in queries:
            content += [picture(name), {"type": "text", "text": question}]
            row["messages"].append({"role": "user", "content": content})
            row["messages"].append({"role": "assistant", "content": [{"type": "text", "text": labels[name]}]})
            content = []
        return row


def text(length: int = 20000, **kwargs) -> Stage:
    return Stage("text", length, **kwargs)


def align(length: int = 4000, **kwargs) -> Stage:
    return Stage("align", length, **kwargs)


def single_image(length: int = 8000, **kwargs) -> Stage:
    return Stage("single_image", length, **kwargs)


def multi_image(length: int = 30000, **kwargs) -> Stage:
    return Stage("multi_image", length, **kwargs)
