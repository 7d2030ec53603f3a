# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
Measure the small checkpoint through its processor and `generate`, as a user would.

    python -m tiny.evaluate longllava-tiny             # writes longllava-tiny/results.json
    python -m tiny.evaluate longllava-tiny --share 0.1  # a tenth of the cases

All footage is of the film that no training picture shows (Big Buck Bunny), digits are of held-out scans, and every
composition is new. "Trained artists" drew what the model learned from, the held-out artist (OpenMoji) and the photographs
(Tux Paint's stamps) were never seen. "Unseen things" were never named to the model, nor to its tower.
"""

import argparse
import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor

from longllava_hf.int8_longllava import QUANTIZATIONS, named_quantization

from . import tasks
from .assets import ARTISTS, HELD_OUT_ARTIST, STAMPS, TEST_FOOTAGE, cut_outs, footage
from .nouns import NOUNS, UNSEEN
from .pictures import crop, digit_scans, draw_digit, paste
from .tasks import LABELS, ORDINALS, the, with_article


# Side of pictures, of a film's frames, and of those of a film of a thousand.
PICTURE_SIZE, FRAME_SIZE, SMALL_FRAME_SIZE = 192, 128, 64
SHOTS = (1, 2, 4, 5)

# A case: the content of messages of the user, and the answer to the last of them.
Case = tuple[list[dict], str]


@cache
def frames(size: int) -> list[np.ndarray]:
    return [np.asarray(ImageOps.fit(frame, (size, size), Image.Resampling.BICUBIC)) for frame in footage(TEST_FOOTAGE)]


class Cases:
    """Questions about pictures that no training row has."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.films = footage(TEST_FOOTAGE)

    def object(self, noun: str, artists: list[str], background: np.ndarray | None = None) -> Image.Image:
        rng = self.rng
        drawings = [drawing for artist in artists for drawing in cut_outs(artist).get(noun, ())]
        if background is None:
            background = crop(rng.choice(self.films), PICTURE_SIZE, rng)
        return Image.fromarray(paste(background, rng.choice(drawings), rng))

    def digit(self, size: int = PICTURE_SIZE) -> tuple[str, Image.Image]:
        scans, digits = digit_scans()["test"]
        index = self.rng.randrange(len(digits))
        return str(digits[index]), Image.fromarray(draw_digit(scans[index], (size, size)))

    @staticmethod
    def text(text: str) -> dict:
        return {"type": "text", "text": text}

    def pictures(self, pictures: list[Image.Image], question: str) -> list[dict]:
        return [*({"type": "image", "image": picture} for picture in pictures), self.text(question)]

    def digits(self) -> list[Case]:
        scans, digits = digit_scans()["test"]
        drawn = [Image.fromarray(draw_digit(scan, (PICTURE_SIZE, PICTURE_SIZE))) for scan in scans]
        questions = [self.rng.choice(tasks.DIGIT) for _ in digits]
        return [(self.pictures([p], q), str(digit)) for p, q, digit in zip(drawn, questions, digits)]

    def names(self, artists: list[str], cases: int) -> list[Case]:
        known = [noun for noun in NOUNS if any(noun in cut_outs(artist) for artist in artists)]
        result = []
        for case in range(cases):
            noun = known[case % len(known)]
            result.append((self.pictures([self.object(noun, artists)], self.rng.choice(tasks.NAME)), noun))
        return result

    def film(self, count: int, shown: dict[int, str], size: int) -> list[Image.Image]:
        """Frames that follow one another, and on some of them something."""
        start = self.rng.randrange(max(1, len(frames(size)) - count))
        film = [frames(size)[(start + i) % len(frames(size))] for i in range(count)]
        result = list(map(Image.fromarray, film))
        for place, name in shown.items():
            if name.isdigit():
                scans, digits = digit_scans()["test"]
                scan = scans[self.rng.choice(np.flatnonzero(digits == int(name)))]
                result[place] = Image.fromarray(draw_digit(scan, (size, size)))
            else:
                result[place] = self.object(name, ARTISTS, film[place])
        return result

    def needles(self, count: int, cases: int, digits: bool = False) -> list[Case]:
        rng, result = self.rng, []
        size = FRAME_SIZE if count <= 100 else SMALL_FRAME_SIZE
        for case in range(cases):
            name = rng.choice(tasks.DIGITS if digits else NOUNS)
            place = rng.randrange(count) if count <= 100 else (0, count - 1, rng.randrange(count))[case % 3]
            film = self.film(count, {place: name}, size)
            if count > 100 and case % 2:
                question = rng.choice(tasks.DIGIT_NEEDLE_PILE if digits else tasks.NEEDLE_PILE)
                result.append((self.pictures(film, question), name))
            else:
                question = rng.choice(tasks.DIGIT_NEEDLE if digits else tasks.NEEDLE)
                result.append(([{"type": "video", "video": film}, self.text(question)], name))
        return result

    def places(self, cases: int, digits: bool = False) -> list[Case]:
        rng, result = self.rng, []
        for _ in range(cases):
            place = rng.randrange(8)
            if digits:
                names, pictures = zip(*(self.digit() for _ in range(8)))
            else:
                names = rng.sample(NOUNS, 8)
                pictures = [self.object(name, ARTISTS) for name in names]
            question = rng.choice(tasks.DIGIT_PLACE if digits else tasks.PLACE)
            question = question.format(ordinal=ORDINALS[place], number=place + 1)
            result.append((self.pictures(list(pictures), question), names[place]))
        return result

    def firsts(self, cases: int) -> list[Case]:
        rng, result = self.rng, []
        for case in range(cases):
            count = rng.randint(4, 12)
            pair = rng.sample(NOUNS, 2)
            film = self.film(count, dict(zip(sorted(rng.sample(range(count), 2)), pair)), FRAME_SIZE)
            one, other = map(the, rng.sample(pair, 2))
            question = rng.choice((tasks.FIRST, tasks.LAST)[case % 2]).format(the=one, other=other)
            result.append(([{"type": "video", "video": film}, self.text(question)], pair[case % 2]))
        return result

    def orders(self, cases: int) -> list[Case]:
        rng, result = self.rng, []
        for _ in range(cases):
            count, three = rng.randint(4, 12), rng.sample(NOUNS, 3)
            film = self.film(count, dict(zip(sorted(rng.sample(range(count), 3)), three)), FRAME_SIZE)
            question = rng.choice(tasks.ORDER).format(names=", ".join(rng.sample(three, 3)))
            result.append(([{"type": "video", "video": film}, self.text(question)], ", ".join(three)))
        return result

    def counts(self, cases: int) -> list[Case]:
        """Nought to five of up to eight pictures, or frames."""
        rng, result = self.rng, []
        for case in range(cases):
            number, total = case // 2 % 6, rng.randint(5, 8)
            asked, other = rng.sample(NOUNS, 2)
            places = rng.sample(range(total), number)
            if case % 2:
                film = self.film(total, dict.fromkeys(places, asked), FRAME_SIZE)
                question = rng.choice(tasks.COUNT_FILM).format(a=with_article(asked))
                result.append(([{"type": "video", "video": film}, self.text(question)], str(number)))
            else:
                names = [asked if place in places else other for place in range(total)]
                question = rng.choice(tasks.COUNT).format(a=with_article(asked))
                result.append((self.pictures([self.object(n, ARTISTS) for n in names], question), str(number)))
        return result

    def shots(self, shots: int, cases: int, nouns: list[str]) -> list[Case]:
        """Two things with invented names, each shown `shots` times, and one more picture of one of them."""
        rng, result = self.rng, []
        for _ in range(cases):
            things, labels = rng.sample(nouns, 2), rng.sample(LABELS, 2)
            shown = [0, 1] * shots
            rng.shuffle(shown)
            statement, asked, content = rng.choice(tasks.SHOT), rng.randrange(2), []
            for which in shown:
                content.append({"type": "image", "image": self.object(things[which], ARTISTS)})
                content.append(self.text(statement.format(label=labels[which]) + "\n"))
            content.append({"type": "image", "image": self.object(things[asked], ARTISTS)})
            content.append(self.text(rng.choice(tasks.QUERY)))
            result.append((content, labels[asked]))
        return result


@torch.no_grad()
def answers(model, processor, cases: list[Case], batch: int) -> list[str]:
    result = []
    for i in range(0, len(cases), batch):
        inputs = processor.apply_chat_template(
            [[{"role": "user", "content": content}] for content, _ in cases[i : i + batch]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=12)
        said = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        result += [answer.strip() for answer in said]
    return result


def evaluate(
    checkpoint: str | Path,
    quantization: str = "none",
    share: float = 1.0,
    seed: int = 1,
    only: Sequence[str] | None = None,
) -> dict[str, tuple[float, int]]:
    """
    Args:
        share (`float`, defaults to 1.0): of the cases of each task.
        only (`list[str]`, *optional*): the tasks to ask; by default all.

    Returns:
        `dict[str, tuple[float, int]]`: of each task the part that was answered right, and how many cases there were.
    """
    model = AutoModelForImageTextToText.from_pretrained(
        checkpoint, quantization_config=named_quantization(quantization)
    ).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)

    def n(cases: int) -> int:
        return max(2, round(cases * share))

    # What is asked, how many questions at a time, and the questions; each task has a seed of its own.
    plan = {
        "digit": (40, lambda cases: cases.digits()[: n(359)]),
        "object by a trained artist": (40, lambda cases: cases.names(ARTISTS, n(472))),
        "object by the held-out artist": (40, lambda cases: cases.names([HELD_OUT_ARTIST], n(472))),
        "object in a photograph": (40, lambda cases: cases.names([STAMPS], n(300))),
        "object in one of 64 frames": (5, lambda cases: cases.needles(64, n(200))),
        "digit in one of 64 frames": (5, lambda cases: cases.needles(64, n(100), digits=True)),
        "object in one of 1,000 pictures or frames": (1, lambda cases: cases.needles(1000, n(60))),
        "digit in one of 1,000 pictures or frames": (1, lambda cases: cases.needles(1000, n(60), digits=True)),
        "object in the N-th of 8 pictures": (20, lambda cases: cases.places(n(200))),
        "digit in the N-th of 8 pictures": (20, lambda cases: cases.places(n(200), digits=True)),
        "which of two comes first, or last": (20, lambda cases: cases.firsts(n(200))),
        "order of three": (20, lambda cases: cases.orders(n(200))),
        "how many (0 to 5) pictures or frames": (20, lambda cases: cases.counts(n(240))),
    }
    for shots in SHOTS:
        plan[f"invented label, {shots}-shot"] = (20, lambda cases, k=shots: cases.shots(k, n(200), NOUNS))
    for shots in SHOTS:
        name = f"invented label of an unseen thing, {shots}-shot"
        plan[name] = (20, lambda cases, k=shots: cases.shots(k, n(200), UNSEEN))
    results = {}
    for number, (task, (batch, make)) in enumerate(plan.items()):
        if only is not None and task not in only:
            continue
        cases = make(Cases(seed + number))
        given = answers(model, processor, cases, batch)
        right = sum(answer == wanted for answer, (_, wanted) in zip(given, cases))
        results[task] = right / len(cases), len(cases)
        print(f"{task:50s} {100 * right / len(cases):5.1f} %  ({len(cases)})", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="none", help="how to load it")
    parser.add_argument("--share", type=float, default=1.0, help="of the cases of each task")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="where to write the results (CHECKPOINT/results.json)")
    arguments = parser.parse_args()
    results = evaluate(arguments.checkpoint, arguments.quantization, arguments.share, arguments.seed)
    output = arguments.output or Path(arguments.checkpoint, "results.json")
    named = {f"{task} ({cases})": round(accuracy, 4) for task, (accuracy, cases) in results.items()}
    output.write_text(json.dumps(named, indent=2) + "\n")


if __name__ == "__main__":
    main()
