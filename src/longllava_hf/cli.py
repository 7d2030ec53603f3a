# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""The command line: `longllava ask`, `chat`, `convert`, `plan` and `info`."""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageSequence
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache, TextStreamer
from transformers.utils import logging

from . import TINY, __version__
from .configuration_longllava import LongLLaVAConfig, LongLLaVATextConfig
from .convert import convert_checkpoint, weight_files
from .image_processing_longllava import Frames, VideoFile, load_picture, read_source
from .modeling_longllava import LongLLaVAForConditionalGeneration
from .plan import SHAPES, MemoryPlanner, draw_plan, published_shape
from .processing_longllava import LongLLaVAProcessor
from .quantization_longllava import BITS, QUANTIZATIONS, named_quantization


@dataclass
class Visual:
    """A file on the command line, once it is known what it holds."""

    path: str
    kind: str
    content: Any

    @property
    def block(self) -> dict[str, Any]:
        return {"type": self.kind, self.kind: self.content}

    def describe(self) -> dict[str, Any]:
        frames = {"frames": len(self.content)} if self.kind == "video" else {}
        return {"path": self.path, "kind": self.kind, **frames}


def open_visual(path: str, num_frames: int | None = None, fps: float | None = None) -> Visual:
    """
    A picture or a video, told by its content and not by its name.

    Raises:
        ValueError: if it is neither, empty or damaged.
        OSError: if it does not exist.
    """
    try:
        with Image.open(read_source(path)) as image:
            if getattr(image, "is_animated", False):
                frames = Frames(frame.convert("RGB") for frame in ImageSequence.Iterator(image))
                return Visual(path, "video", frames)
        return Visual(path, "image", path)
    except Image.DecompressionBombError:
        return Visual(path, "image", load_picture(path))  # says what is wrong with it
    except FileNotFoundError:
        raise
    except Exception as not_a_picture:
        try:
            if num_frames is None and fps is None:
                num_frames = LongLLaVAProcessor.videos_kwargs["num_frames"]
            return Visual(path, "video", VideoFile(path, num_frames=num_frames, fps=fps, name=f"`{path}`"))
        except ValueError as not_a_video:
            if "not a video" not in str(not_a_video):
                raise
            raise ValueError(
                f"`{path}` is neither a picture nor a video. As a picture: {not_a_picture}. As a video: {not_a_video}"
            ) from None


class Session:
    """A model, its processor, and one conversation, of which only what is new is computed each turn."""

    def __init__(self, arguments: argparse.Namespace):
        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = AutoProcessor.from_pretrained(arguments.model)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            arguments.model,
            dtype="auto",
            device_map={"": device},
            quantization_config=named_quantization(arguments.quantization),
        )
        self.model = model.eval()
        self.arguments = arguments
        self.cache = DynamicCache(config=self.model.config)
        self.ids = torch.empty(1, 0, dtype=torch.long, device=device)

    def _line_break(self) -> torch.Tensor:
        """What stands between an answer and the next turn."""
        bos = self.processor.tokenizer.bos_token
        ids = self.processor.tokenizer(f"x\n{bos}", add_special_tokens=False)["input_ids"]
        return self.ids.new_tensor([ids[1:-1]])

    def ask(self, visuals: list[Visual], question: str, stream: bool) -> dict[str, Any]:
        """Answer one turn; the conversation so far is kept."""
        started = time.perf_counter()
        content = [*(visual.block for visual in visuals), {"type": "text", "text": question}]
        settings = {"patch_strategy": "best_fit"} if self.arguments.high_resolution else {}
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=settings,
        ).to(self.model.device)
        past = [self.ids, self._line_break()] if self.ids.shape[1] else [self.ids]
        ids = torch.cat([*past, inputs["input_ids"]], dim=1)
        streamer = (
            TextStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
        )
        prepared = time.perf_counter()
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=inputs.get("pixel_values"),
                past_key_values=self.cache,
                max_new_tokens=self.arguments.max_new_tokens,
                prefill_chunk_size=self.arguments.prefill_chunk_size,
                streamer=streamer,
                do_sample=False,
            )
        answer_ids = output[0, ids.shape[1] :]
        eos = self.processor.tokenizer.eos_token_id
        # The end-of-text is the one token that a next turn does not continue from.
        self.ids = output[:, :-1] if output[0, -1] == eos else output
        return {
            "answer": self.processor.decode(answer_ids, skip_special_tokens=True).strip(),
            "model": self.arguments.model,
            "files": [visual.describe() for visual in visuals],
            "prompt_tokens": inputs["input_ids"].shape[1],
            "new_tokens": len(answer_ids),
            "seconds": {
                "prepare": round(prepared - started, 3),
                "generate": round(time.perf_counter() - prepared, 3),
            },
        }


def ask(arguments: argparse.Namespace) -> None:
    *paths, question = arguments.inputs
    visuals = [open_visual(path, arguments.num_frames, arguments.fps) for path in paths]
    result = Session(arguments).ask(visuals, question, stream=not arguments.json)
    if arguments.json:
        print(json.dumps(result, indent=2))


def chat(arguments: argparse.Namespace) -> None:
    session = Session(arguments)
    waiting = [open_visual(path, arguments.num_frames, arguments.fps) for path in arguments.inputs]
    if sys.stdin.isatty():
        print("Ask away. `/show FILE` adds a picture or a video to the next question; `/quit` or Ctrl-D ends.")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        try:
            if line.startswith("/show "):
                waiting.append(open_visual(line.removeprefix("/show ").strip(), arguments.num_frames, arguments.fps))
            elif line:
                result = session.ask(waiting, line, stream=not arguments.json)
                waiting = []
                if arguments.json:
                    print(json.dumps(result), flush=True)
        except (ValueError, OSError) as error:
            waiting = []
            print(f"error: {error} (Files that were waiting for the question are dropped.)", file=sys.stderr)


def convert(arguments: argparse.Namespace) -> None:
    folder = convert_checkpoint(arguments.source, arguments.destination, to=arguments.to)
    files = weight_files(folder)
    size = sum(file.stat().st_size for file in files)
    print(f"{folder}: {arguments.to} layout, {len(files)} files of weights, {size / 1e6:.1f} MB")


def describe_model(name: str) -> dict[str, Any]:
    """What a checkpoint is, from its configuration alone."""
    config = LongLLaVAConfig.from_pretrained(name)
    text, vision = config.get_text_config(), config.vision_config
    with torch.device("meta"):
        model = LongLLaVAForConditionalGeneration(config)
    groups = {
        "vision tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "decoder": model.model.language_model,
        "head": model.lm_head,
    }
    info: dict[str, Any] = {
        "model": name,
        "parameters": model.num_parameters(),
        **{f"parameters, {part}": sum(p.numel() for p in module.parameters()) for part, module in groups.items()},
        "decoder": f"{text.model_type}, {text.num_hidden_layers} layers, hidden size {text.hidden_size}",
        "image tokens": f"{config.image_seq_length} (pooling {config.pooling_mode}, {config.pooling_order.replace('_', ' ')})",
        "picture size": f"{vision.image_size} pixels, patches of {vision.patch_size}",
        "image token id": config.image_token_id,
    }
    if isinstance(text, LongLLaVATextConfig):
        attention = [i for i, kind in enumerate(text.layer_types) if kind == "full_attention"]
        experts = sum(n > 1 for n in text.layers_num_experts)
        head_dim = text.hidden_size // text.num_attention_heads
        info["attention layers"] = ", ".join(map(str, attention)) or "none"
        info["expert layers"] = (
            f"{experts} with {text.num_experts} experts, {text.num_experts_per_tok} a token" if experts else "none"
        )
        info["cache, bytes a token in bfloat16"] = 2 * 2 * len(attention) * text.num_key_value_heads * head_dim
    return info


def info(arguments: argparse.Namespace) -> None:
    facts = describe_model(arguments.model)
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {f'{value:,}' if isinstance(value, int) and 'id' not in name.split() else value}")


def plan(arguments: argparse.Namespace) -> None:
    if (arguments.model is None) == (arguments.shape is None):
        raise ValueError("Say either a MODEL, a folder or Hub id, or a --shape.")
    if not math.isfinite(arguments.memory):
        raise ValueError(f"--memory must be a number of GB, but is {arguments.memory}.")
    if arguments.plot is not None and not os.path.isdir(os.path.dirname(os.path.abspath(arguments.plot))):
        raise OSError(f"The folder of `{arguments.plot}` does not exist.")
    if arguments.shape is not None:
        config, name = published_shape(arguments.shape), f"LongLLaVA, shape {arguments.shape}"
    else:
        config, name = LongLLaVAConfig.from_pretrained(arguments.model), arguments.model
    planner = MemoryPlanner(
        config,
        arguments.quantization,
        dtype=getattr(torch, arguments.dtype),
        memory=round(arguments.memory * 1e9),
        max_new_tokens=arguments.max_new_tokens,
        prefill_chunk_size=arguments.prefill_chunk_size,
        device=arguments.device,
    )
    result = planner.plan(arguments.images)
    if arguments.plot is not None:
        draw_plan(planner, result, arguments.plot)
    if arguments.json:
        print(json.dumps({"model": name, **result.to_dict()}, indent=2))
        return
    rows = {f"weights, {kind}": size for kind, size in result.weights.items() if size >= result.total / 1e5}
    rows["weights, all"] = sum(result.weights.values())
    rows.update(result.items)
    rows["total"] = result.total
    print(f"{name}, quantization {planner.quantization}: {result.images:,} images, {result.tokens:,} tokens")
    unit, power = ("G", 3) if result.total >= 1e8 else ("M", 2)
    print(f"{'':22}{unit + 'B':>9}{unit + 'iB':>9}")
    for row, size in rows.items():
        print(f"{row:22}{size / 1000**power:>9.3f}{size / 1024**power:>9.3f}")
    verdict = "fits" if result.fits else "does not fit"
    print(f"This {verdict} in {result.memory / 1e9:g} GB; so do up to {result.max_images:,} images.")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="longllava", description="Ask LongLLaVA about pictures and videos.")
    parser.add_argument("--version", action="version", version=f"longllava_hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, function, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(function=function)
        return command

    def add_generation(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--model", default=TINY, help="folder or Hub id (default: the small checkpoint of this package)"
        )
        command.add_argument("--max-new-tokens", type=int, default=256)
        command.add_argument("--num-frames", type=int, help="frames of each video, uniformly (default: 128)")
        command.add_argument("--fps", type=float, help="frames a second of each video, instead")
        command.add_argument("--high-resolution", action="store_true", help="also cut large pictures into sub-images")
        command.add_argument("--prefill-chunk-size", type=int, help="tokens to read at a time (default: all)")
        command.add_argument(
            "--quantization", choices=QUANTIZATIONS, default="none", help="of the weights, while they are loaded"
        )
        command.add_argument("--device", help="where to run (default: a GPU if there is one)")
        command.add_argument("--json", action="store_true", help="print the answer and its circumstances as JSON")

    command = add("ask", ask, "Ask one question about any number of pictures and videos.")
    command.add_argument("inputs", nargs="+", metavar="FILE... QUESTION", help="paths or URLs, then the question")
    add_generation(command)
    command = add("chat", chat, "A conversation about pictures and videos.")
    command.add_argument("inputs", nargs="*", metavar="FILE", help="paths or URLs that the first question is about")
    add_generation(command)
    command = add("convert", convert, "Rewrite a checkpoint in the native layout, or back in the published one.")
    command.add_argument("source", help="folder or Hub id")
    command.add_argument("destination", help="folder that does not exist yet")
    command.add_argument("--to", choices=["native", "published"], default="native")
    command = add("plan", plan, "What a run takes in memory, before it is started, and how many images fit.")
    command.add_argument("model", nargs="?", help="folder or Hub id")
    command.add_argument("--shape", choices=list(SHAPES), help="a published shape, instead of a model")
    command.add_argument("--quantization", choices=BITS, help="of the weights (default: the checkpoint's own)")
    command.add_argument("--images", type=int, default=1000)
    command.add_argument("--max-new-tokens", type=int, default=256)
    command.add_argument("--memory", type=float, default=80.0, help="of the device, in GB of 10^9 bytes (default: 80)")
    command.add_argument("--prefill-chunk-size", type=int, default=4096, help="tokens to read at a time")
    command.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    command.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="whose kernels (default: cuda)")
    command.add_argument("--plot", metavar="FILE.png", help="draw memory against the number of images")
    command.add_argument("--json", action="store_true")
    command = add("info", info, "What a checkpoint is, without loading its weights.")
    command.add_argument("model", nargs="?", default=TINY, help="folder or Hub id")
    command.add_argument("--json", action="store_true")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 when it went well, 2 with one line on stderr when it did not, 130 when it was interrupted."""
    arguments = build_parser().parse_args(argv)
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        arguments.function(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


__all__ = ["Visual", "describe_model", "main", "open_visual"]


if __name__ == "__main__":
    sys.exit(main())
