# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
One stage of the small checkpoint's training in a plain loop: what `longllava train` does with the same rows, on one
thread, and the decoder's own training on words, which comes before LongLLaVA's stages as the tower's does.

    python -m tiny.prototype text --output decoder --tower tower
    python -m tiny.prototype multi_image --start decoder --output trained
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from . import tasks
from .model import build_model_and_processor
from .tower import Muon, normalize


def encode(row: dict, tokenizer, image_seq_length: int) -> tuple[list[int], list[int], list[np.ndarray]]:
    """
    Ids, labels and pictures of a row, as the processor and the authors' labels have them. Other than the processor it
    takes words in the place of pictures.
    """
    images, videos, pictures = iter(row["images"]), iter(row["videos"]), []
    ids, labels = [], []

    def add(text: str, learned: bool = False, repeat: int = 1) -> None:
        some = tokenizer(text, add_special_tokens=False)["input_ids"] * repeat
        ids.extend(some)
        labels.extend(some if learned else [-100] * len(some))

    def add_picture(block: dict) -> None:
        add("<img>")
        if "word" in block:
            add(block["word"], repeat=block["repeat"])
        else:
            pictures.append(np.asarray(block["image"]))
            add("<image>", repeat=image_seq_length)
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
                add_picture(block if "word" in block else {"image": next(images)})
            else:
                frames = block["words"] if "words" in block else [{"image": frame} for frame in next(videos)]
                add("<vid>")
                for frame in frames:
                    if frame is not frames[0]:
                        add("<t>")
                    add_picture(frame)
                add("</vid>")
            if block is not blocks[-1]:
                add("\n")
        add("\n")
    return ids, labels, pictures


def bins(dataset, first: int, tokenizer, image_seq_length: int, budget: int):
    """Rows in their order, packed to `budget` tokens: the number of rows so far, and the model's inputs."""
    waiting: list = []
    for index in range(first, len(dataset)):
        encoded = encode(dataset[index], tokenizer, image_seq_length)
        if waiting and sum(len(ids) for ids, _, _ in waiting) + len(encoded[0]) > budget:
            yield index, collate(waiting)
            waiting = []
        waiting.append(encoded)


def collate(encoded: list) -> dict[str, torch.Tensor]:
    batch = {
        "input_ids": torch.tensor([[i for ids, _, _ in encoded for i in ids]]),
        "labels": torch.tensor([[i for _, labels, _ in encoded for i in labels]]),
        "position_ids": torch.tensor([[i for ids, _, _ in encoded for i in range(len(ids))]]),
    }
    pictures = [picture for _, _, some in encoded for picture in some]
    if pictures:
        batch["pixel_values"] = normalize(pictures)
    return batch


def train(stage: str, start: Path | None, tower: Path | None, output: Path, rows: int, **options) -> None:
    torch.manual_seed(options["seed"])
    kwargs = {"longest": options["longest"], "start": options["progress"], "seed": options["seed"]}
    dataset = getattr(tasks, stage)(rows, **kwargs)
    if start is None:
        model, processor = build_model_and_processor(tower)
    else:
        model = AutoModelForImageTextToText.from_pretrained(start)
        processor = AutoProcessor.from_pretrained(start)
        if tower is not None:
            trained = build_model_and_processor(tower)[0].model.vision_tower
            model.model.vision_tower.load_state_dict(trained.state_dict())
    model.config.text_config.output_router_logits = True
    model.model.vision_tower.requires_grad_(False)
    if stage == "align":
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
    learned = [p for p in model.parameters() if p.requires_grad]
    highest = options["learning_rate"]
    matrices = ("in_proj.weight", "out_proj.weight", "gate_up_proj.weight", "gate_proj.weight", "up_proj.weight")
    matrices += ("down_proj.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
    names = {p: name for name, p in model.named_parameters()}
    orthogonal = [p for p in learned if options["muon_rate"] and names[p].endswith(matrices)]
    known = {id(p) for p in orthogonal}
    rest = [p for p in learned if id(p) not in known]
    optimizers = [(highest, torch.optim.AdamW(rest, lr=highest, betas=(0.9, 0.98), weight_decay=0.05))]
    if orthogonal:
        optimizers.append((options["muon_rate"], Muon(orthogonal, options["muon_rate"])))
    tokenizer, length = processor.tokenizer, processor.image_processor.image_seq_length
    output.mkdir(parents=True, exist_ok=True)
    started, tokens, pictures, losses, right = time.process_time(), 0, 0, [], []
    model.train()
    packed = bins(dataset, 0, tokenizer, length, options["budget"])
    for step, (done, batch) in enumerate(packed, 1):
        rate = min(1.0, step / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done / rows)))
        for most, optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = most * rate
        result = model(**batch)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        for _, optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        labels = batch["labels"][0, 1:]
        said = labels != -100
        right.append((result.logits[0, :-1].argmax(-1)[said] == labels[said]).float().mean().item())
        losses.append(result.loss.item())
        tokens += batch["input_ids"].shape[1]
        pictures += len(batch.get("pixel_values", ()))
        if step % options["log"] == 0:
            minutes = (time.process_time() - started) / 60
            line = {"stage": stage, "step": step, "rows": done, "cpu_minutes": round(minutes, 2), "tokens": tokens}
            line |= {
                "pictures": pictures,
                "loss": round(float(np.mean(losses)), 4),
                "right": round(float(np.mean(right)), 4),
            }
            losses, right = [], []
            print(json.dumps(line), flush=True)
            with open(output / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            if step % (5 * options["log"]) == 0:
                save(model, processor, output)
    save(model, processor, output)


def save(model, processor, output: Path) -> None:
    model.config.text_config.output_router_logits = False
    model.save_pretrained(output)
    processor.save_pretrained(output)
    model.config.text_config.output_router_logits = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["text", "align", "single_image", "multi_image"])
    parser.add_argument("--start", type=Path)
    parser.add_argument("--tower", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=10000)
    parser.add_argument("--budget", type=int, default=1536, help="tokens of a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--muon-rate", type=float, default=0.0, help="for the decoder's matrices; 0: AdamW for all")
    parser.add_argument("--longest", type=int, default=64, help="frames of the longest film")
    parser.add_argument("--progress", type=float, default=0.0, help="of the curriculum at the first row")
    parser.add_argument("--log", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
