# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
Ten questions about one film of 500 frames: from a kept context, read from its file in a fresh process, against ten runs
from the film. Same tokens; how many times faster in total, with the model loaded and with loading it.

    pip install -e ".[tiny]"
    python benchmarks/contexts.py [--frames 500]
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from report import RESULTS, machine, print_table, run_apart, write_json

import longllava_hf
from longllava_hf import LongLLaVAContext
from longllava_hf.video_longllava import VideoFile


sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from tiny.assets import TEST_FOOTAGE, footage
from tiny.examples import FRAME_SIZE, write_film
from tiny.pictures import digit_scans, draw_digit
from tiny.tasks import DIGIT_NEEDLE
from transformers import AutoModelForImageTextToText, AutoProcessor


QUESTIONS = [*DIGIT_NEEDLE, *(f"{question} Say it." for question in DIGIT_NEEDLE), "Which digit?", "Is there a digit?"]


def write_needle(file: Path, frames: int) -> None:
    """A film of unseen footage, with a held-out digit in its middle."""
    scenes = [frame.resize(FRAME_SIZE) for frame in footage(TEST_FOOTAGE)]
    film = [scenes[i % len(scenes)] for i in range(frames)]
    film[frames // 2] = Image.fromarray(draw_digit(digit_scans()["test"][0][0], FRAME_SIZE))
    write_film(film, file)


def load() -> tuple[Any, Any]:
    processor = AutoProcessor.from_pretrained(longllava_hf.TINY)
    model: Any = AutoModelForImageTextToText.from_pretrained(longllava_hf.TINY).eval()
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2)
    return model, processor


def prepare(processor: Any, film: str, frames: int, question: str) -> Any:
    content = [{"type": "video", "video": VideoFile(film, num_frames=frames)}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"lazy": True},
    )


def keep(film: str, frames: int, file: str) -> None:
    """What `longllava ask FILM ... --keep FILE` does: read all up to the last picture."""
    model, processor = load()
    inputs = prepare(processor, film, frames, "?")
    end = int((inputs["input_ids"][0] == processor.image_token_id).nonzero()[-1]) + 1
    context = model.prefill(inputs["input_ids"][:, :end], inputs["pixel_values"])
    context.save(file, model, processor)


def answers_from_film(film: str, frames: int) -> tuple[list[list[int]], float, float]:
    entered = time.perf_counter()
    model, processor = load()
    started, answers = time.perf_counter(), []
    for question in QUESTIONS:
        inputs = prepare(processor, film, frames, question)
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    done = time.perf_counter()
    return answers, done - started, done - entered


def answers_from_file(file: str) -> tuple[list[list[int]], float, float]:
    entered = time.perf_counter()
    model, processor = load()
    started, answers = time.perf_counter(), []
    context = LongLLaVAContext.load(file, model, processor)
    for question in QUESTIONS:
        text = f"</img></vid>\n{question}\n<|startoftext|><|Assistant|>\n"
        ids = torch.tensor([processor.tokenizer(text, add_special_tokens=False)["input_ids"]])
        output = model.generate(ids, cache=context.branch(), max_new_tokens=4, do_sample=False)
        answers.append(output[0, ids.shape[1] :].tolist())
    done = time.perf_counter()
    return answers, done - started, done - entered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=500)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        film, file = str(Path(folder, "film.mp4")), str(Path(folder, "film.ctx"))
        write_needle(Path(film), arguments.frames)
        run_apart(keep, film, arguments.frames, file)
        expected, whole, whole_with_loading = run_apart(answers_from_film, film, arguments.frames)
        found, kept, kept_with_loading = run_apart(answers_from_file, file)
        size = Path(file).stat().st_size
    rows = [
        {
            "frames": arguments.frames,
            "questions": len(QUESTIONS),
            "same tokens": found == expected,
            "times faster": whole / kept,
            "with loading the model": whole_with_loading / kept_with_loading,
            "file MB": size / 1e6,
        }
    ]
    print_table(rows)
    print(f"written: {write_json('contexts_cpu', {**machine(), 'rows': rows}, arguments.output)}")


if __name__ == "__main__":
    main()
