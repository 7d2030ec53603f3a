# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
A training step on the CPU, forward and backward with gradient checkpointing, against Transformers' Jamba with the same weights
and both of its paths, in one run; longer rows beside a floor that is measured with them; what autograd keeps of one mixer; and
memory of packed rows. Times are those of a processor core.

    pip install mambapy
    python benchmarks/training.py [--lengths 256 512] [--alone 1024 2048 4096] [--before SRC]

`--before` is the folder `src` of another revision of this package, timed in turns with this one.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, machine, peak_of, print_table, recurrence_steps, run_apart, write_json
from torch.utils.flop_counter import FlopCounterMode
from transformers import JambaConfig, JambaForCausalLM
from transformers.models.jamba.modeling_jamba import JambaMambaMixer

from longllava_hf import LongLLaVAForCausalLM, LongLLaVATextConfig
from longllava_hf.modeling_longllava_text import LongLLaVAMambaMixer


PEER, PSCAN = "Transformers' Jamba", "Transformers' Jamba, use_mambapy"
STATES, VOCABULARY = 16, 1024
SHORT = 256  # tokens, for a step whose products are counted


def build(hidden_size: int, experts: int, folder: str) -> None:
    """A Jamba of 8 layers, one of them attention, with experts in every second."""
    torch.manual_seed(0)
    config = JambaConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_experts=experts,
        mamba_d_state=STATES,
        vocab_size=VOCABULARY,
        initializer_range=0.05,
    )
    JambaForCausalLM(config).save_pretrained(folder)


def load(name: str, folder: str) -> Any:
    cls, options = (
        (JambaForCausalLM, {"use_mambapy": name == PSCAN}) if "Jamba" in name else (LongLLaVAForCausalLM, {})
    )
    model = cls.from_pretrained(folder, **options).train()
    model.gradient_checkpointing_enable()
    return model


def row(length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))


def step(model: Any, ids: torch.Tensor, **options) -> torch.Tensor:
    model.zero_grad()
    loss = model(ids, labels=ids, **options).loss
    loss.backward()
    return loss.detach()


def largest_error(model: Any, peer: Any) -> float:
    """Of the gradients of the mixers, relative to the largest value of each."""
    expected = {name: p.grad for name, p in peer.named_parameters() if ".mamba." in name}
    found = {name: p.grad for name, p in model.named_parameters() if ".mamba." in name}
    assert expected.keys() == found.keys()
    return max(((found[name] - x).abs().max() / x.abs().max()).item() for name, x in expected.items())


def in_turns(candidates: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Least seconds of each, as the processor counts them: whoever else waits for it is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    return {name: min(mine) for name, mine in seconds.items()}


def compare(folder: str, lengths: list[int], rounds: int) -> list[dict]:
    names = [PEER, *([PSCAN] if importlib.util.find_spec("mambapy") else []), "ours"]
    models = {name: load(name, folder) for name in names}
    for model in models.values():
        step(model, row(16))
    rows = []
    for length in lengths:
        seconds = in_turns({name: partial(step, models[name], row(length)) for name in names}, rounds)
        for name in names:
            mine = {"tokens": length, "model": name}
            for peer in names[:-1]:
                mine[f"times faster than {peer}"] = seconds[peer] / seconds[name]
            mine["largest error of gradients"] = None if name == PEER else largest_error(models[name], models[PEER])
            rows.append(mine)
        print(f"{length:,} tokens: measured", flush=True)
    return rows


def products_seconds(hidden_size: int) -> float:
    """Seconds of 1e9 floating-point operations in the three products of a linear layer's training step."""
    x, weight, grad = (
        torch.randn(size) for size in ((2048, hidden_size), (4 * hidden_size, hidden_size), (2048, 4 * hidden_size))
    )

    def products() -> None:
        x @ weight.T, grad @ weight, grad.T @ x

    return in_turns({"products": products}, 5)["products"] * 1e9 / (6 * x.numel() * len(weight))


def scan_seconds() -> float:
    """Seconds of 1e9 steps of a state at the least: an exponential, a multiplication and a multiply-add, in the cache."""
    run, values = recurrence_steps()
    return in_turns({"steps": run}, 5)["steps"] * 1e9 / values


def step_beside_floor(folder: str, length: int) -> tuple[float, float, float]:
    """Seconds of a step, of its products alone, and of the least that its scans do; in a process of its own."""
    torch.set_num_threads(1)
    model = load("ours", folder)
    with FlopCounterMode(display=False) as counter:
        step(model, row(SHORT))
    seconds = in_turns({"step": lambda: step(model, row(length))}, 1)["step"]
    products = counter.get_total_flops() / 1e9 * length / SHORT * products_seconds(model.config.hidden_size)
    mixers = model.config.layer_types.count("linear_attention")
    states = length * model.config.mamba_expand * model.config.hidden_size * STATES
    # Forward, again because of the checkpoint, and again for the backward pass.
    return seconds, products, 3 * mixers * states * scan_seconds() / 1e9


def run_with(source: Path, *arguments) -> Any:
    """As [`run_apart`], with the package from another folder."""
    sys.path.insert(0, str(source.resolve()))  # which a process that is started takes over
    try:
        return run_apart(*arguments)
    finally:
        sys.path.pop(0)


def compare_alone(folder: str, lengths: list[int], rounds: int, before: Path | None) -> list[dict]:
    rows: list[dict] = []
    for length in lengths:
        turns: dict[str, list] = {"ours": [], "before": []}
        for _ in range(rounds):
            turns["ours"].append(run_apart(step_beside_floor, folder, length))
            if before is not None:
                turns["before"].append(run_with(before, step_beside_floor, folder, length))
        seconds, products, scans = map(min, zip(*turns["ours"]))
        rows.append(
            {
                "tokens": length,
                "times faster than before": min(turns["before"])[0] / seconds if before else None,
                "time a token / shortest's": seconds / length / (rows[0]["seconds"] / rows[0]["tokens"])
                if rows
                else 1.0,
                "products / time": products / seconds,
                "least of the scans / time": scans / seconds,
                "seconds": seconds,
            }
        )
        print(f"{length:,} tokens: measured", flush=True)
    for mine in rows:
        del mine["seconds"]
    return rows


def kept_bytes(mixer: torch.nn.Module, hidden_states: torch.Tensor) -> int:
    """What autograd keeps for the backward pass of a module, its parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in mixer.parameters()}
    kept: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        output = mixer(hidden_states)
    del output
    return sum(kept.values())


def compare_mixers(hidden_size: int, length: int) -> list[dict]:
    sizes = {"hidden_size": hidden_size, "mamba_d_state": STATES, "num_hidden_layers": 8}
    torch.manual_seed(0)
    peer = JambaMambaMixer(JambaConfig(**sizes), 0)
    mixers: dict[str, torch.nn.Module] = {PEER: peer}
    if importlib.util.find_spec("mambapy"):
        mixers[PSCAN] = JambaMambaMixer(JambaConfig(**sizes, use_mambapy=True), 0)
    mixers["ours"] = LongLLaVAMambaMixer(LongLLaVATextConfig(**sizes), 0)
    kept = {}
    for name, mixer in mixers.items():
        mixer.load_state_dict(peer.state_dict())
        kept[name] = kept_bytes(mixer, torch.randn(1, length, hidden_size, requires_grad=True))
    return [
        {"tokens": length, "mixer": name, "kept MB": mine / 1e6, "of Transformers'": mine / kept[PEER]}
        for name, mine in kept.items()
    ]


def measure_packed(folder: str, length: int, sample: int) -> tuple[float, int]:
    """Seconds and bytes of a step on one row of many samples, with the load-balancing loss, in a process of its own."""
    torch.set_num_threads(1)
    model = load("ours", folder)
    positions = (torch.arange(length) % sample)[None]
    options = {"output_router_logits": True}
    step(model, row(2 * sample), position_ids=positions[:, : 2 * sample], **options)
    run = partial(step, model, row(length), position_ids=positions, **options)
    seconds: dict[str, float] = {}
    extra = peak_of(lambda: seconds.update(in_turns({"step": run}, 1)))[1]
    return seconds["step"], extra


def compare_packed(folder: str, lengths: list[int], sample: int) -> list[dict]:
    results = {length: run_apart(measure_packed, folder, length, sample) for length in lengths}
    first = next(iter(results.values()), None)
    return [
        {
            "tokens": length,
            "samples": length // sample,
            "tokens / shortest's": length / lengths[0],
            "time / shortest's": seconds / first[0],
            "extra MB": extra / 1e6,
            "extra memory / shortest's": extra / first[1],
        }
        for length, (seconds, extra) in results.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[256, 512], help="with the peer")
    parser.add_argument("--alone", type=int, nargs="*", default=[1024, 2048, 4096], help="without it")
    parser.add_argument("--mixer", default="512x4096", help="hidden size x length, of which memory is measured")
    parser.add_argument("--packed", type=int, nargs="*", default=[10240, 20480, 40960], help="tokens of a packed row")
    parser.add_argument("--sample", type=int, default=512, help="tokens of a sample in it")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--packed-hidden-size", type=int, default=64)
    parser.add_argument("--experts", type=int, default=4, help="of every second layer; 1 for none")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--before", type=Path, help="`src` of another revision, to be compared with")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    arguments = parser.parse_args()
    # The time of one thread is no matter of what else the machine does.
    torch.set_num_threads(1)
    content: dict[str, Any] = {**machine(), "hidden_size": arguments.hidden_size, "experts": arguments.experts}
    if arguments.before is not None:
        command = ["git", "rev-parse", "--short", "HEAD"]
        content["before"] = subprocess.check_output(command, cwd=arguments.before, text=True).strip()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as small:
        build(arguments.hidden_size, arguments.experts, folder)
        build(arguments.packed_hidden_size, arguments.experts, small)
        content["mixer"] = compare_mixers(*map(int, arguments.mixer.split("x")))
        content["alone"] = compare_alone(folder, arguments.alone, arguments.rounds, arguments.before)
        content["packed"] = compare_packed(small, arguments.packed, arguments.sample)
        content["step"] = compare(folder, arguments.lengths, arguments.rounds)
    for table in filter(content.get, ("step", "alone", "mixer", "packed")):
        print()
        print_table(content[table])
    print(f"written: {write_json('training_cpu', content, arguments.output)}")


if __name__ == "__main__":
    main()
