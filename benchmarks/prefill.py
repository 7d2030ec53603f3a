# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
The whole decoder on the CPU, against Transformers' Jamba with the same weights, in one run: prefill of prompts of several
lengths (time, the most memory beyond the model, and whether the logits are equal), and the time of a generated token.

    python benchmarks/prefill.py [--lengths 1024 2048 4096 8192 16384] [--alone 32768 65536]
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, draw, machine, peak_of, print_table, run_apart, time_side_by_side, write_json
from transformers import DynamicCache, JambaConfig, JambaForCausalLM

from longllava_hf import LongLLaVACache, LongLLaVAForCausalLM
from longllava_hf.generation_longllava import default_chunk_size


PEER = "Transformers' Jamba"
RELATIVE = "time / Jamba's shortest"


def build(hidden_size: int, folder: str) -> None:
    """A Jamba of 8 layers, one of them attention, with experts in every second."""
    torch.manual_seed(0)
    config = JambaConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_experts=4,
        vocab_size=1024,
        initializer_range=0.05,
    )
    JambaForCausalLM(config).save_pretrained(folder)


def load(name: str, folder: str) -> Any:
    return (JambaForCausalLM if name == PEER else LongLLaVAForCausalLM).from_pretrained(folder).eval()


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """The last logits and the cache: in one pass, and where the state allows it in chunks."""
    if isinstance(model, JambaForCausalLM):
        cache: Any = DynamicCache(config=model.config)
        return model(ids, past_key_values=cache, logits_to_keep=1).logits, cache
    cache = LongLLaVACache(model.config, capacity=ids.shape[1] + 256)
    for chunk in ids.split(default_chunk_size("cpu"), dim=1):
        logits = model(chunk, past_key_values=cache, logits_to_keep=1).logits
    return logits, cache


def prompt(length: int) -> torch.Tensor:
    return torch.randint(3, 1024, (1, length), generator=torch.Generator().manual_seed(1))


def measure_prefill(name: str, folder: str, length: int) -> tuple[float, int, torch.Tensor]:
    """Seconds, bytes and logits, in a process of its own."""
    model = load(name, folder)
    prefill(model, prompt(8))
    started = time.perf_counter()
    (logits, _), extra = peak_of(lambda: prefill(model, prompt(length)))
    return time.perf_counter() - started, extra, logits


def compare_prefill(folder: str, lengths: list[int], alone: list[int]) -> list[dict]:
    rows: list[dict] = []
    unit = None
    for length in [*lengths, *alone]:
        names = ["ours"] if length in alone else [PEER, "ours"]
        results = {name: run_apart(measure_prefill, name, folder, length) for name in names}
        seconds, _, logits = results[names[0]]
        unit = unit or seconds
        for name, (mine, extra, found) in results.items():
            has_peer = len(names) > 1
            rows.append(
                {
                    "tokens": length,
                    "model": name,
                    "times faster": seconds / mine if has_peer else None,
                    RELATIVE: mine / unit,
                    "extra MB": extra / 1e6,
                    "largest error": ((found - logits).abs().max() / logits.abs().max()).item() if has_peer else None,
                }
            )
            print(f"{length:,} tokens, {name}: measured", flush=True)
    return rows


@torch.no_grad()
def compare_decoding(folder: str, contexts: list[int], rounds: int, new_tokens: int = 16) -> list[dict]:
    """Ours at all contexts, the peer at the first, taken in turns."""

    def step(model: Any, cache: Any):
        token = prompt(1)

        def run() -> None:
            for _ in range(new_tokens):
                model(token, past_key_values=cache, logits_to_keep=1)

        return run

    mine, peer = load("ours", folder), load(PEER, folder)
    candidates = {(PEER, contexts[0]): step(peer, prefill(peer, prompt(contexts[0]))[1])}
    attention = {}
    for context in contexts:
        candidates["ours", context] = step(mine, prefill(mine, prompt(context))[1])
        cache = prefill(mine, prompt(context))[1]
        index = mine.config.layer_types.index("full_attention")
        layer, hidden_states = mine.model.layers[index].self_attn, torch.randn(1, 1, mine.config.hidden_size)

        def attend(layer=layer, hidden_states=hidden_states, cache=cache) -> None:
            for _ in range(new_tokens):
                layer(hidden_states, cache=cache)

        attention[context] = attend
    seconds = time_side_by_side(candidates, rounds)
    shares = time_side_by_side(attention, rounds)
    base = seconds["ours", contexts[0]]["minimum"]
    rows = []
    for (name, context), time_ in seconds.items():
        extra = shares[context]["minimum"] - shares[contexts[0]]["minimum"] if name == "ours" else 0.0
        rows.append(
            {
                "context": context,
                "model": name,
                "time / Jamba at the shortest": time_["minimum"] / seconds[PEER, contexts[0]]["minimum"],
                "time / ours at the shortest": time_["minimum"] / base,
                "of which attention's growth": extra / base,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384], help="with the peer"
    )
    parser.add_argument("--alone", type=int, nargs="*", default=[32768, 65536], help="without it")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 32768], help="for generated tokens")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON and the picture")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        build(arguments.hidden_size, folder)
        rows = compare_prefill(folder, arguments.lengths, arguments.alone)
        decoding = compare_decoding(folder, arguments.contexts, arguments.rounds)
    print_table(rows)
    print()
    print_table(decoding)
    written = write_json(
        "prefill_cpu",
        {**machine(), "hidden_size": arguments.hidden_size, "prefill": rows, "decoding": decoding},
        arguments.output,
    )
    panels: dict[str, dict] = {RELATIVE: {}, "extra MB": {}}
    for name in (PEER, "ours"):
        mine = [row for row in rows if row["model"] == name]
        for label, lines in panels.items():
            lines[name] = ([row["tokens"] for row in mine], [row[label] for row in mine])
    title = f"Prefill, hidden size {arguments.hidden_size}, 8 layers, on two CPU cores"
    print(f"written: {written}, {draw('prefill_cpu', title, 'tokens', panels, arguments.output)}")


if __name__ == "__main__":
    main()
