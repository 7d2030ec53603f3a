# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
The decoder of the small checkpoint, in the place of a published language model: taught on words in the place of pictures.

    python -m tiny.decoder --tower tower --output decoder

What LongLLaVA's three stages ask of pictures, it is asked here of words, as often as a picture has tokens, between the tags
of pictures and films: to find, count and order things, and to call them by invented names. The stages then have to
bring pictures to where it reads words. The processor refuses such rows, as it would have to take text for tags.
"""

import argparse
import itertools
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch

from . import tasks
from .model import build_model_and_processor


def encode(row: dict, tokenizer) -> tuple[list[int], list[int]]:
    """Ids and labels of a row of `tasks.text`, laid out as the processor and the authors' labels have pictures."""
    ids, labels = [], []

    def add(text: str, learned: bool = False, repeat: int = 1) -> None:
        some = tokenizer(text, add_special_tokens=False)["input_ids"] * repeat
        ids.extend(some)
        labels.extend(some if learned else [-100] * len(some))

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
            labels[-1] = tokenizer.eos_token_id
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
    return ids, labels


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
ROWS = 24000


class Recall:
    """
    What a decoder learns before any row: two words and what each is called, then both are asked again. Comparing what is
    shown with what was shown is not found by chance among hundreds of words with tags between; it is among three without, and
    from there it spreads. Whenever nearly all answers of fifty steps are right, a tag is added, and then words.
    """

    # From left to right more of what stands around a word and its label in a row.
    LAYOUTS = (("word", "label"), ("word", "</img>", "label"), ("<img>", "word", "</img>", "label"),
               ("<img>", "word", "</img>", "\n", "label"), ("<img>", "word", "</img>", "\n", "label", "\n"))  # fmt: skip

    def __init__(self, tokenizer, seed: int):
        self.rng = random.Random(f"recall-{seed}")
        self.ids = {tag: tokenizer(tag, add_special_tokens=False)["input_ids"][0] for tag in ("<img>", "</img>", "\n")}
        words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in (*tasks.NOUNS, *tasks.DIGITS)]
        self.words = [ids[0] for ids in words if len(ids) == 1]
        self.rng.shuffle(self.words)
        self.labels = tokenizer.convert_tokens_to_ids(list(tasks.LABELS))
        self.level, self.known = 0, 3

    @property
    def is_done(self) -> bool:
        return self.known == len(self.words) and self.level == len(self.LAYOUTS) - 1

    def grow(self) -> None:
        if self.level < len(self.LAYOUTS) - 1:
            self.level += 1
        else:
            self.known = min(len(self.words), self.known * 3 // 2 + 1)

    def batch(self, size: int = 48) -> dict[str, torch.Tensor]:
        layout = self.LAYOUTS[self.level if self.rng.random() < 0.6 else self.rng.randint(0, self.level)]
        rows, labels = [], []
        for _ in range(size):
            words, names = self.rng.sample(self.words[: self.known], 2), self.rng.sample(self.labels, 2)
            row, label = [], []
            for place, which in enumerate([0, 1, self.rng.randrange(2), self.rng.randrange(2)]):
                of_part = {**self.ids, "word": words[which], "label": names[which]}
                row += [of_part[part] for part in layout]
                label += [names[which] if part == "label" and place > 1 else -100 for part in layout]
            rows.append(row)
            labels.append(label)
        return {"input_ids": torch.tensor(rows), "labels": torch.tensor(labels)}


def train(
    tower: Path | None,
    output: Path,
    rows: int = ROWS,
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

    def report(**facts) -> float:
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
        return line["right"]

    recall = Recall(processor.tokenizer, seed)
    for step in itertools.count(1):
        update(recall.batch(), min(1.0, step / 50))
        if step % 50 == 0 and report(step=step, tags=recall.level, words=recall.known) > 0.93:
            if recall.is_done:
                break
            recall.grow()
        if step == 4000:
            raise RuntimeError("The decoder does not recall: after 4000 steps it still misses more than 7 %.")
    for step, (done, batch) in enumerate(batches(tasks.text(rows, seed=seed), processor.tokenizer, budget), 1):
        update(batch, min(1.0, step / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done / rows))))
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
    parser.add_argument("--budget", type=int, default=argparse.SUPPRESS, help="tokens of a step")
    parser.add_argument("--learning-rate", type=float, default=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=argparse.SUPPRESS)
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
