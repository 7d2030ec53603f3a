# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
The decoder of the small checkpoint, in the place of a published language model: taught on words in the place of pictures.

    python -m tiny.decoder --tower tower --output decoder

What LongLLaVA's three stages ask of pictures, it is asked here of words, as often as a picture has tokens, between the tags
of pictures and films: to find, count and order things, and to call them by invented names. The stages then have to
bring pictures to where it reads words. The processor refuses such rows, as it would have to take text for tags.
"""

import argparse
import json
import math
import random
import re
import time
from pathlib import Path

import numpy as np
import torch

from . import tasks
from .model import build_model_and_processor
from .tasks import ORDINALS, with_article


class Tokens:
    """Ids and labels of a text that is put together."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.labels: list[int] = []

    def add(self, text: str, learned: bool = False, repeat: int = 1) -> None:
        some = self.tokenizer(text, add_special_tokens=False)["input_ids"] * repeat
        self.ids.extend(some)
        self.labels.extend(some if learned else [-100] * len(some))


def encode(row: dict, tokenizer) -> tuple[list[int], list[int]]:
    """Ids and labels of a row of `tasks.text`, laid out as the processor and the authors' labels have pictures."""
    tokens = Tokens(tokenizer)
    add = tokens.add

    def add_word(block: dict) -> None:
        add("<img>")
        add(block["word"], repeat=block["repeat"])
        add("</img>")

    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    for message in row["messages"]:
        if message["role"] == "assistant":
            add(f"{bos}<|Assistant|>\n")
            add(message["content"][0]["text"], learned=True)
            # The label of what follows an answer is the end of text, also in the middle, where a line break follows.
            add(eos if message is row["messages"][-1] else "\n")
            tokens.labels[-1] = tokenizer.eos_token_id
            continue
        add(f"{bos}<|User|>\n")
        blocks = message["content"]
        for block in blocks:
            if block["type"] == "text":
                add(block["text"])
                continue
            if block["type"] == "image":
                add_word(block)
            else:
                add("<vid>")
                for frame in block["words"]:
                    if frame is not block["words"][0]:
                        add("<t>")
                    add_word(frame)
                add("</vid>")
            if block is not blocks[-1]:
                add("\n")
        add("\n")
    return tokens.ids, tokens.labels


def batches(dataset, tokenizer, budget: int):
    """Rows in their order, packed to `budget` tokens: the number of rows so far, and the model's inputs."""
    waiting: list[tuple[list[int], list[int]]] = []
    for index in range(len(dataset)):
        ids, labels = encode(dataset[index], tokenizer)
        if waiting and sum(len(some) for some, _ in waiting) + len(ids) > budget:
            yield index, pack(waiting)
            waiting = []
        waiting.append((ids, labels))
    yield len(dataset), pack(waiting)


def pack(encoded: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([[i for ids, _ in encoded for i in ids]]),
        "labels": torch.tensor([[i for _, labels in encoded for i in labels]]),
        "position_ids": torch.tensor([[i for ids, _ in encoded for i in range(len(ids))]]),
    }


# Rows of `tasks.text` that the checkpoint which ships has seen.
ROWS = 16000


class Drills:
    """
    What a decoder learns before any row: to find what is asked for among what was shown, and to count it. It does not find out
    by chance among hundreds of words with tags between; it does among a few without, and from there it spreads. Whenever
    most answers are right, the next drill is added; when there is none, words are.
    """

    # What is said of each thing, what is asked of two of them, and how many things there are.
    REPLY = "\n<|startoftext|><|Assistant|>\n"
    CALLED, PICTURE = "<img>{word}</img>\nThis is called {label}.\n", "<img>{word}</img>\n"
    WHERE = f"Which picture shows {{a}}?{REPLY}{{ordinal}}\n"
    COUNT = f"How many pictures show {{a}}?{REPLY}{{count}}\n"
    ALL = (
        ("{word}{label}", "{word}{label}", 2),
        ("{word}</img>{label}", "{word}</img>{label}", 2),
        ("<img>{word}</img>{label}", "<img>{word}</img>{label}", 2),
        ("<img>{word}</img>\n{label}\n", "<img>{word}</img>\n{label}\n", 2),
        ("<img>{word}</img>\nThis is {label}.\n", "<img>{word}</img>\nThis is {label}.\n", 2),
        (CALLED, CALLED, 2),
        (CALLED, "<img>{word}</img>\nWhat is this called?\n{label}\n", 2),
        (CALLED, f"<img>{{word}}</img>\nWhat is this called?{REPLY}{{label}}\n", 2),
        # Asked in words, not by a picture.
        (CALLED, "{word}{label}\n", 2),
        (CALLED, f"{{a}}?{REPLY}{{label}}\n", 2),
        (CALLED, f"What is {{a}} called?{REPLY}{{label}}\n", 2),
        (PICTURE, WHERE, 2),
        (PICTURE, WHERE, 3),
        (PICTURE, WHERE, 5),
        (PICTURE, COUNT, 2),
        (PICTURE, COUNT, 4),
        (PICTURE, COUNT, 7),
    )
    FEW = 8

    def __init__(self, tokenizer, seed: int):
        self.rng, self.tokenizer = random.Random(f"drills-{seed}"), tokenizer
        self.words = [*tasks.NOUNS, *tasks.DIGITS]
        self.rng.shuffle(self.words)
        self.newest, self.known = 0, self.FEW

    @property
    def has_all(self) -> bool:
        return self.newest == len(self.ALL) - 1

    @property
    def is_done(self) -> bool:
        return self.has_all and self.known == len(self.words)

    def grow(self) -> None:
        if self.has_all:
            self.known = min(len(self.words), self.known * 3 // 2)
        else:
            self.newest += 1

    def example(self, drill: int) -> tuple[list[int], list[int]]:
        """Ids and labels."""
        shown, asked, count = self.ALL[drill]
        rng, tokens = self.rng, Tokens(self.tokenizer)
        before, kind, after = re.split("{(label|ordinal|count)}", asked)
        # What is counted are two things, each as often as it comes.
        things = rng.sample(self.words[: self.known], 2 if kind == "count" else count)
        labels = rng.sample(tasks.LABELS, len(things))
        pictures = rng.choices((0, 1), k=count) if kind == "count" else range(count)

        for which in pictures:
            for part in re.split("({label})", shown):  # apart, as a word and its label would be read as one
                tokens.add(part.format(word=things[which], label=labels[which]))
        for which in rng.choices(range(len(things)), k=2):
            tokens.add(before.format(word=things[which], a=with_article(things[which])))
            answers = {"label": labels[which], "ordinal": ORDINALS[which], "count": str(list(pictures).count(which))}
            tokens.add(answers[kind], learned=True)
            tokens.add(after)
        return tokens.ids, tokens.labels

    def batch(self, budget: int) -> tuple[bool, dict[str, torch.Tensor]]:
        """Examples of a drill, packed to `budget` tokens, and whether they are of what was added last."""
        is_new = self.known > self.FEW or self.rng.random() < 0.6
        drill = self.newest if is_new and self.known == self.FEW else self.rng.randint(0, self.newest)
        examples = [self.example(drill)]
        while sum(len(ids) for ids, _ in examples) < budget:
            examples.append(self.example(drill))
        return is_new, pack(examples)


def train(
    tower: Path | None,
    output: Path,
    rows: int = ROWS,
    drill_steps: int = 4000,
    budget: int = 768,
    learning_rate: float = 1e-3,
    seed: int = 0,
    **text_config,
) -> None:
    """
    Args:
        tower (`Path`, *optional*): a folder that `tiny.tower` wrote.
        output (`Path`): a folder for the checkpoint, and for `log.jsonl`.
        rows (`int`, defaults to [`ROWS`]): of `tasks.text`.
        drill_steps (`int`, defaults to 4000): of drills at most; the log says how far they came.
        budget (`int`, defaults to 768): tokens of a step.
        text_config: in place of what the small checkpoint has, such as `layer_types`.
    """
    torch.manual_seed(seed)
    model, processor = build_model_and_processor(tower, **text_config)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    # The loss that keeps experts busy is for this stage alone.
    model.config.text_config.output_router_logits = True
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    output.mkdir(parents=True, exist_ok=True)
    started, tokens, losses, right = time.process_time(), 0, [], []
    model.train()

    def update(batch: dict[str, torch.Tensor], rate: float) -> None:
        nonlocal tokens
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        result = model(**batch)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        labels = batch["labels"][:, 1:]
        said = labels != -100
        right.append((result.logits[:, :-1].argmax(-1)[said] == labels[said]).float().mean().item())
        losses.append(result.loss.item())
        tokens += batch["input_ids"].numel()

    def report(**facts) -> None:
        line = {
            **facts,
            "cpu_minutes": round((time.process_time() - started) / 60, 2),
            "tokens": tokens,
            "loss": round(float(np.mean(losses)), 4),
            "right": round(float(np.mean(right)), 4),
        }
        losses.clear()
        right.clear()
        print(json.dumps(line), flush=True)
        with open(output / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    drills, answers = Drills(processor.tokenizer, seed), []
    for step in range(1, drill_steps + 1):
        is_new, batch = drills.batch(2 * budget)
        update(batch, min(1.0, step / 50))
        if is_new:
            answers.append(right[-1])
        if step % 25 == 0 or step == drill_steps:
            report(step=step, drill=drills.newest, words=drills.known)
        if len(answers) == 12:
            if np.mean(answers) > 0.88:
                if drills.is_done:
                    break
                drills.grow()
            answers.clear()
    for step, (done, batch) in enumerate(batches(tasks.text(rows, seed=seed), processor.tokenizer, budget), 1):
        rate = min(1.0, step / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done / rows)))
        update(batch, rate)
        # What is not asked for is soon forgotten.
        if step % 3 == 0:
            update(drills.batch(budget)[1], rate)
        if step % 50 == 0 or done == rows:
            report(step=step, rows=done)
    model.config.text_config.output_router_logits = False
    model.save_pretrained(output)
    processor.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", type=Path, help="a folder that `tiny.tower` wrote")
    parser.add_argument("--output", type=Path, required=True)
    # Defaults are those of `train`.
    parser.add_argument("--rows", type=int, default=argparse.SUPPRESS)
    parser.add_argument("--drill-steps", type=int, default=argparse.SUPPRESS, help="at most")
    parser.add_argument("--budget", type=int, default=argparse.SUPPRESS, help="tokens of a step")
    parser.add_argument("--learning-rate", type=float, default=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=argparse.SUPPRESS)
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
