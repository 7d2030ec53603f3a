# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
The command line: `longllava ask`, `chat`, `web`, `serve`, `convert`, `data convert`, `train`, `downcycle`, `hub export`,
`hub push`, `verify`, `plan`, `info`.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer
from transformers.utils import logging

from . import TINY, __version__
from .causal_conv1d_longllava import is_installed
from .configuration_longllava import LongLLaVAConfig, has_own_decoder
from .context_longllava import context_metadata
from .convert import convert_checkpoint
from .hub import cards, export_checkpoint, push_checkpoint
from .int8_longllava import BITS, QUANTIZATIONS, named_quantization
from .modeling_longllava import LongLLaVAForConditionalGeneration
from .plan import SHAPES, MemoryPlanner, draw_plan, published_shape
from .profiling import profile_decoding
from .selective_scan_longllava import choose_scan
from .session import Session, Visual, open_visual
from .sources_longllava import LIMITS
from .training.data import convert_data
from .training.downcycle import downcycle as downcycle_checkpoint
from .verify import verify as verify_path


# To ask the Hub whether it has a model.
_HUB_SECONDS = 10


def local_model(name: str) -> str:
    """
    The folder of a model, or its Hub id if the Hub can be asked; where it cannot, what was fetched before.

    Raises:
        OSError: if it is in neither place, within seconds and with the reason.
        ValueError: if `name` can be no Hub id either.
    """
    if os.path.isdir(name):
        return name
    if os.path.exists(name):
        raise OSError(f"`{name}` is a file, but a model is a folder or a Hub id.")
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"`{name}` is neither a folder nor a Hub id: {error}") from None
    try:
        HfApi().model_info(name, timeout=_HUB_SECONDS)
        return name
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise OSError(f"`{name}` is not a folder, and the Hub has no such model for you: {error}") from None
    except Exception as error:
        try:
            return snapshot_download(name, local_files_only=True)
        except Exception:
            raise OSError(
                f"`{name}` is not a folder, nor in the Hub's cache, and the Hub cannot be asked: {error}"
            ) from None


def check_device(name: str | None) -> str:
    """
    The device to run on, by default a GPU if there is one.

    Raises:
        ValueError: if there is no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:
        raise ValueError(f"There is no device `{name}` here: {str(error).splitlines()[0]}") from None
    if device.type == "meta":
        raise ValueError("On the device `meta` nothing is computed; choose `cpu`, `cuda`, `cuda:1` or the like.")
    return name


def load_model(arguments: argparse.Namespace) -> Any:
    device_map = {"": check_device(arguments.device)}
    quantization = named_quantization(arguments.quantization)
    return AutoModelForImageTextToText.from_pretrained(
        arguments.model, dtype="auto", device_map=device_map, quantization_config=quantization
    )


def open_session(arguments: argparse.Namespace, context: str | None = None) -> Session:
    check_device(arguments.device)
    arguments.model = local_model(arguments.model)
    processor = AutoProcessor.from_pretrained(arguments.model)
    names = ("max_new_tokens", "prefill_chunk_size", "high_resolution")
    settings = {name: getattr(arguments, name) for name in names}
    return Session(load_model(arguments), processor, **settings, context=context)


def open_inputs(paths: list[str], arguments: argparse.Namespace) -> tuple[str | None, list[Visual]]:
    """A kept context, if the first path is one, and the pictures and films."""
    context = None
    if paths and os.path.isfile(paths[0]) and context_metadata(paths[0]) is not None:
        context, *paths = paths
    return context, [open_visual(path, arguments.num_frames, arguments.fps) for path in paths]


def check_writable(file: str | None) -> None:
    """Before any work is done, see that a file can be written where it is wanted; raises `OSError` if not."""
    if file is None:
        return
    if not file:
        raise ValueError("The name of the file to write is empty.")
    folder = os.path.dirname(os.path.abspath(file))
    if not os.path.isdir(folder):
        raise OSError(f"The folder of `{file}` does not exist.")
    if os.path.isdir(file):
        raise IsADirectoryError(f"`{file}` is a folder, but a file is to be written.")
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(1 << 16))
    except OSError as error:
        raise OSError(f"`{file}` cannot be written: {error.strerror}, in the folder `{folder}`.") from None


def answer(session: Session, visuals: list[Visual], question: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One turn, printed as it comes unless JSON is wanted."""
    streamer = TextStreamer(session.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    result = session.ask(visuals, question, None if arguments.json else streamer)
    return {"answer": result.pop("answer"), "model": arguments.model, **result}


def ask(arguments: argparse.Namespace) -> None:
    *paths, question = arguments.inputs
    if not paths and os.path.exists(question):
        raise ValueError(f"There is no question: `{question}`, the last of what was given, is a file.")
    if arguments.keep is not None and os.path.isfile(arguments.keep) and context_metadata(arguments.keep) is None:
        raise ValueError(f"`{arguments.keep}` exists and is no kept context, so it is not written over.")
    check_writable(arguments.keep)
    context, visuals = open_inputs(paths, arguments)
    session = open_session(arguments, context)
    if arguments.keep is not None:
        if visuals:
            session.show(visuals)
        session.context.save(arguments.keep, session.model, session.processor)
        visuals = []
    result = answer(session, visuals, question, arguments)
    if arguments.json:
        print(json.dumps(result, indent=2))


def chat(arguments: argparse.Namespace) -> None:
    context, waiting = open_inputs(arguments.inputs, arguments)
    session = open_session(arguments, context)
    if sys.stdin.isatty():
        print(
            "Ask away. `/show FILE` adds a picture or a video to the next question; Ctrl-C ends an answer; `/quit`, Ctrl-D"
            " or a second Ctrl-C ends the conversation."
        )
    interruptions = 0
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            interruptions = _count_interruption(interruptions)
            continue
        if line == "/quit":
            return
        interruptions = 0
        try:
            if line.startswith("/show "):
                waiting.append(open_visual(line.removeprefix("/show ").strip(), arguments.num_frames, arguments.fps))
            elif line:
                check_text(line, "The question")
                result = answer(session, waiting, line, arguments)
                waiting = []
                if arguments.json:
                    print(json.dumps(result), flush=True)
        except KeyboardInterrupt:  # the conversation is as it was before the question
            interruptions = _count_interruption(interruptions)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            waiting = []
            print(f"error: {error} (Files that were waiting for the question are dropped.)", file=sys.stderr)


def web(arguments: argparse.Namespace) -> None:
    from .serving.web import open_page

    if not 0 < arguments.port < 1 << 16:
        raise ValueError(f"--port must be between 1 and 65535, but is {arguments.port}.")
    open_page(open_session(arguments), arguments.model, arguments.host, arguments.port, arguments.num_frames)


def _count_interruption(before: int) -> int:
    """Raises `KeyboardInterrupt` at the second one."""
    if before:
        raise KeyboardInterrupt
    print("\n(Ctrl-C once more ends the conversation.)", file=sys.stderr)
    return before + 1


def convert(arguments: argparse.Namespace) -> None:
    folder = convert_checkpoint(local_model(arguments.source), arguments.destination, to=arguments.to)
    files = list(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    print(f"{folder}: {arguments.to} layout, {len(files)} files of weights, {size / 1e6:.1f} MB")


def verify(arguments: argparse.Namespace) -> None:
    report = verify_path(arguments.path)
    problems = report["problems"]
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        facts = ", ".join(f"{value:,} {name}" for name, value in report.items() if isinstance(value, int))
        print(f"{arguments.path}: {report['kind']}{', ' + facts if facts else ''}")
        if others := report.get("without a place"):
            print(f"{len(others)} weights have no place in the model, such as {others[0]}")
    if problems:
        raise ValueError("; ".join(problems))
    if not arguments.json:
        print("whole")


def data_convert(arguments: argparse.Namespace) -> None:
    names = ("images", "videos", "num_frames", "sub_images", "skip_bad")
    result = convert_data(
        arguments.source, arguments.destination, **{name: getattr(arguments, name) for name in names}
    )
    if arguments.json:
        print(json.dumps(asdict(result), indent=2))
        return
    print(f"Wrote {result.rows:,} rows with {result.images:,} images and {result.videos:,} videos.")
    if result.skipped:
        print(f"Left out {len(result.skipped):,}:")
        print("\n".join(result.skipped))


def train(arguments: argparse.Namespace) -> None:
    from .training.recipe import train as run_recipe  # which needs PyYAML, and imports Trainer

    trainer = run_recipe(arguments.recipe)
    if trainer.is_world_process_zero():
        print(f"Wrote {trainer.args.output_dir}, after {trainer.state.global_step:,} steps.")


def downcycle(arguments: argparse.Namespace) -> None:
    names = ("method", "expert", "down_scale")
    options = {name: getattr(arguments, name) for name in names}
    print(f"Wrote {downcycle_checkpoint(local_model(arguments.source), arguments.destination, **options)}")


def hub_export(arguments: argparse.Namespace) -> None:
    print(f"Wrote {export_checkpoint(local_model(arguments.source), arguments.destination, arguments.card)}")


def hub_push(arguments: argparse.Namespace) -> None:
    commit = push_checkpoint(arguments.source, arguments.repo_id, private=arguments.private or None)
    print(f"Pushed {commit.repo_url.repo_id}, revision {commit.oid}")


def describe_model(name: str) -> dict[str, Any]:
    """What a checkpoint is, from its configuration alone."""
    config = LongLLaVAConfig.from_pretrained(name)
    text, vision = config.get_text_config(), config.vision_config
    with torch.device("meta"):
        model = LongLLaVAForConditionalGeneration(config)
    info: dict[str, Any] = {"model": name, "parameters": model.num_parameters()}
    parts = {"vision tower": "model.vision_tower", "projector": "model.multi_modal_projector"}
    for part, path in {**parts, "decoder": "model.language_model", "head": "lm_head"}.items():
        info[f"parameters, {part}"] = sum(p.numel() for p in model.get_submodule(path).parameters())
    info |= {
        "decoder": f"{text.model_type}, {text.num_hidden_layers} layers, hidden size {text.hidden_size}",
        "image tokens": f"{config.image_seq_length} (pooling {config.pooling_mode}, {config.pooling_order.replace('_', ' ')})",
        "picture size": f"{vision.image_size} pixels, patches of {vision.patch_size}",
        "image token id": config.image_token_id,
    }
    if has_own_decoder(config):
        attention = [i for i, kind in enumerate(text.layer_types) if kind == "full_attention"]
        experts = sum(n > 1 for n in text.layers_num_experts)
        head_dim, a_token = text.hidden_size // text.num_attention_heads, f"{text.num_experts_per_tok} a token"
        info["attention layers"] = ", ".join(map(str, attention)) or "none"
        info["expert layers"] = f"{experts} with {text.num_experts} experts, {a_token}" if experts else "none"
        info["cache, bytes a token in bfloat16"] = 2 * 2 * len(attention) * text.num_key_value_heads * head_dim
        info["scan"] = describe_scan(text.scan_implementation)
    return info


def describe_scan(requested: str | None) -> str:
    """Which implementation of the scan runs here, and of the convolution before it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sample = torch.empty(1, 8, 1, dtype=torch.bfloat16, device=device)
    first, later = (choose_scan(sample, has_state, requested=requested) for has_state in (False, True))
    scan = first if first == later else f"{first}; {later} where there is a past"
    convolution = "causal_conv1d" if device == "cuda" and is_installed("causal_conv1d") else "torch"
    return f"{scan} (convolution: {convolution}) on {device}"


def info(arguments: argparse.Namespace) -> None:
    arguments.model = local_model(arguments.model)
    if arguments.profile:
        seconds = profile_decoding(load_model(arguments), arguments.context)
        facts: dict[str, Any] = {"context": arguments.context, "seconds": seconds}
    else:
        facts = describe_model(arguments.model)
    if arguments.json:
        print(json.dumps(facts, indent=2))
    elif arguments.profile:
        total = sum(value for part, value in seconds.items() if part != "whole token")
        print(f"a generated token after {arguments.context:,}: {1e3 * seconds.pop('whole token'):.2f} ms, of which")
        for part, value in seconds.items():
            print(f"  {part:28}{100 * value / total:5.1f} %")
    else:
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name:{width}}  {f'{value:,}' if isinstance(value, int) and 'id' not in name.split() else value}")


def plan(arguments: argparse.Namespace) -> None:
    if (arguments.model is None) == (arguments.shape is None):
        raise ValueError("Say either a MODEL, a folder or Hub id, or a --shape.")
    if not math.isfinite(arguments.memory):
        raise ValueError(f"--memory must be a number of GB, but is {arguments.memory}.")
    check_writable(arguments.plot)
    if arguments.shape is not None:
        config, name = published_shape(arguments.shape), f"LongLLaVA, shape {arguments.shape}"
    else:
        config, name = LongLLaVAConfig.from_pretrained(local_model(arguments.model)), arguments.model
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


def serve(arguments: argparse.Namespace) -> None:
    from .serving.server import serve as run

    local_model(arguments.model)  # says at once what is wrong with the name
    run(arguments.model, check_device(arguments.device), arguments.quantization, arguments.host, arguments.port)


def _option(name: str, **options: Any) -> tuple[str, dict[str, Any]]:
    return name, options


_CHUNKS = _option("--prefill-chunk-size", type=int, help="tokens to read at a time (default: 4096, on a CPU 512)")
_MAX_NEW_TOKENS = _option("--max-new-tokens", type=int, default=256)
_JSON = _option("--json", action="store_true", help="print the result and its circumstances as JSON")
_LOADING = [
    _option("--quantization", choices=QUANTIZATIONS, default="none", help="of the weights, while they are loaded"),
    _option("--device", help="where to run (default: a GPU if there is one)"),
]
_FRAMES = _option("--num-frames", type=int, help="frames of each video, uniformly (default: 128)")
_HIGH_RESOLUTION = _option("--high-resolution", action="store_true", help="also cut large pictures into sub-images")
_MODEL = _option(
    "model", nargs="?", default=TINY, help="folder or Hub id (default: the small checkpoint of this package)"
)
_HOST = _option("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine alone)")
_GENERATION = [
    _option("--model", default=TINY, help="folder or Hub id (default: the small checkpoint of this package)"),
    _FRAMES,
    _option("--fps", type=float, help="frames a second of each video, instead"),
    _HIGH_RESOLUTION,
    _option("--allow-private-addresses", action="store_true", help="for URLs of this machine and its network"),
    *(_MAX_NEW_TOKENS, _CHUNKS, *_LOADING, _JSON),
]
# A function, what it does, and its arguments.
_COMMANDS: list[tuple[Callable[[argparse.Namespace], None], str, list[tuple[str, dict[str, Any]]]]] = [
    (ask, "Ask one question about any number of pictures and videos.", [
        _option("inputs", nargs="+", metavar="FILE... QUESTION", help="a kept context, paths or URLs, then the question"),
        _option("--keep", metavar="FILE", help="keep what was read, for other questions about it"),
        *_GENERATION,
    ]),
    (chat, "A conversation about pictures and videos.", [
        _option("inputs", nargs="*", metavar="FILE", help="a kept context, paths or URLs that it is about"),
        *_GENERATION,
    ]),
    (web, "A page to show pictures and videos to, and to ask about them.", [
        *(_MODEL, _HOST),
        _option("--port", type=int, default=7860),
        *(_FRAMES, _HIGH_RESOLUTION, _MAX_NEW_TOKENS, _CHUNKS, *_LOADING),
    ]),
    (serve, "Serve a model to OpenAI's clients, through Transformers' own server.", [
        *(_MODEL, _HOST),
        _option("--port", type=int, default=8000, help="0 for one that is free (default: 8000)"),
        _option("--allow-private-addresses", action="store_true", help="for URLs of this machine and its network"),
        *_LOADING,
    ]),
    (convert, "Rewrite a checkpoint in the native layout, or back in the published one.", [
        _option("source", help="folder or Hub id"),
        _option("destination", help="folder that does not exist yet"),
        _option("--to", choices=["native", "published"], default="native"),
    ]),
    (data_convert, "Rewrite LLaVA-style JSON as rows to train on, one a line.", [
        _option("source", help="a JSON file with a list of samples, or a .jsonl with one a line"),
        _option("destination", help="the .jsonl to write"),
        _option("--images", metavar="FOLDER", help="of the pictures (default: that of the source)"),
        _option("--videos", metavar="FOLDER", help="of the videos (default: that of the pictures)"),
        _option("--num-frames", type=int, help="frames that a video is sampled by (default: the processor's)"),
        _option("--sub-images", action="store_true", help="also cut pictures into sub-images"),
        _option("--skip-bad", action="store_true", help="leave out samples that are wrong, and list them"),
        _JSON,
    ]),
    (train, "Run a recipe, or go on with it where its last checkpoint was saved.", [
        _option("recipe", metavar="CONFIG.yaml", help="where to start, what to train, and on what; see docs/training.md"),
    ]),
    (downcycle, "Make a dense checkpoint of one with experts, to be trained further.", [
        _option("source", help="folder or Hub id"),
        _option("destination", help="folder that does not exist yet"),
        _option("--method", choices=["expert", "arithmetic", "spherical"], default="expert",
                help="take one expert, or the mean of their weights, or of the directions of these (default: expert)"),
        _option("--expert", type=int, help="which one to take (default: 0)"),
        _option("--down-scale", type=float, default=1.0, help="factor of `down_proj`; the authors' script has 0.045 (default: 1)"),
    ]),
    (hub_export, "A folder for the Hub: the checkpoint in the native layout, the code that runs it, and a model card.", [
        _option("source", help="folder or Hub id"),
        _option("destination", help="folder that does not exist yet"),
        _option("--card", help=f"what the card says beside what is computed: {', '.join(cards())}, or a JSON file"),
    ]),
    (hub_push, "Put such a folder on the Hub.", [
        _option("source", help="folder that `longllava hub export` wrote"),
        _option("repo_id", help="the repository, which is made if there is none"),
        _option("--private", action="store_true", help="make a private one; one that is there must be private"),
    ]),
    (verify, "Whether a kept context or a checkpoint is whole, and what is wrong with it if not.", [
        _option("path", help="file of a context, or folder of a checkpoint"),
        _JSON,
    ]),
    (plan, "What a run takes in memory, before it is started, and how many images fit.", [
        _option("model", nargs="?", help="folder or Hub id"),
        _option("--shape", choices=list(SHAPES), help="a published shape, instead of a model"),
        _option("--quantization", choices=BITS, help="of the weights (default: the checkpoint's own)"),
        _option("--images", type=int, default=1000),
        _option("--memory", type=float, default=80.0, help="of the device, in GB of 10^9 bytes (default: 80)"),
        _option("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16"),
        _option("--device", choices=["cuda", "cpu"], default="cuda", help="whose kernels (default: cuda)"),
        _option("--plot", metavar="FILE.png", help="draw memory against the number of images"),
        *(_MAX_NEW_TOKENS, _CHUNKS, _JSON),
    ]),
    (info, "What a checkpoint is, without loading its weights; or where its time goes.", [
        _option("model", nargs="?", default=TINY, help="folder or Hub id"),
        _option("--profile", action="store_true", help="load it, and say where the time of a token goes"),
        _option("--context", type=int, default=1024, help="tokens before that one (default: 1024)"),
        *(*_LOADING, _JSON),
    ]),
]  # fmt: skip


_GROUPS = {"data": "Commands for data to train on.", "hub": "Commands for the Hub."}

_EXIT_CODES = (
    "Exit codes: 0 all went well; 1 something unforeseen; 2 what was asked for cannot be done, for the reason"
)
_EXIT_CODES += " that is printed; 130 interrupted; 141 whoever read the output has gone."


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="longllava", description="Ask LongLLaVA about pictures and videos.", epilog=_EXIT_CODES
    )
    parser.add_argument("--version", action="version", version=f"longllava_hf {__version__}")
    groups = {"": parser.add_subparsers(dest="command", required=True)}
    for function, description, options in _COMMANDS:
        group, _, name = function.__name__.rpartition("_")
        if group not in groups:
            group_parser = groups[""].add_parser(group, help=_GROUPS[group])
            groups[group] = group_parser.add_subparsers(dest=f"{group}_command", required=True)
        command = groups[group].add_parser(name, help=description, description=description)
        command.set_defaults(function=function)
        for name, option in options:
            command.add_argument(name, **option)
    return parser


def check_text(text: str, name: str) -> None:
    """Raises `ValueError` for what came from a terminal or a program as no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be UTF-8, but has other bytes at position {error.start}: {text!r}.") from None


# The least that options may be.
_LEAST = {"prefill_chunk_size": 1, "num_frames": 1, "context": 1, "images": 0, "max_new_tokens": 0}


def _check_numbers(arguments: argparse.Namespace) -> None:
    """Raises `ValueError` for numbers that make no sense, before anything is read."""
    for name, least in _LEAST.items():
        least = max(least, arguments.function in (ask, chat, web))
        value, option = getattr(arguments, name, None), f"--{name.replace('_', '-')}"
        if isinstance(value, int) and value < least:
            raise ValueError(f"{option} must be at least {least}, but is {value}.")
        if isinstance(value, int) and value > 10**9:
            raise ValueError(f"{option} must be at most 10^9, but is {value}.")
    fps = getattr(arguments, "fps", None)
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"--fps must be positive, but is {fps}.")


def _run(arguments: argparse.Namespace) -> None:
    for name in ("model", "device", "source", "destination"):
        if isinstance(value := getattr(arguments, name, None), str):
            check_text(value, f"The argument `{name}`")
    _check_numbers(arguments)
    if arguments.function is ask:
        check_text(arguments.inputs[-1], "The question")
    LIMITS.allow_private_addresses |= getattr(arguments, "allow_private_addresses", False)
    arguments.function(arguments)
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """Run a command; what it returns is the exit code, see `longllava --help`. Errors are one line on stderr."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed from the beginning
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")
    arguments = build_parser().parse_args(argv)
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        _run(arguments)
    except BrokenPipeError:
        # What is left in the buffer would fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("LONGLLAVA_TRACEBACK"):
            raise
        print(
            f"error: unforeseen: {type(error).__name__}: {error} (LONGLLAVA_TRACEBACK=1 shows where.)", file=sys.stderr
        )
        return 1
    return 0


__all__ = ["Visual", "describe_model", "main", "open_visual"]


if __name__ == "__main__":
    sys.exit(main())
