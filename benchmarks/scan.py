# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
The selective scan and the Mamba mixer on the CPU, against Transformers' own with the same inputs, in one run: time, the
most memory beyond the inputs, and the distance to a floor that is measured beside them.

    python benchmarks/scan.py [--shapes 4096x4096 512x16384] [--rounds 2]
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from report import (
    RESULTS,
    draw,
    machine,
    peak_of,
    print_table,
    recurrence_steps,
    run_apart,
    time_side_by_side,
    write_json,
)
from transformers import JambaConfig
from transformers.models.jamba import modeling_jamba

from longllava_hf import LongLLaVATextConfig
from longllava_hf.modeling_longllava_text import LongLLaVAMambaMixer
from longllava_hf.selective_scan_longllava import selective_scan


STATES = 16
PEER = "Transformers"


def make_inputs(channels: int, length: int, requires_grad: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    inputs = {
        "u": torch.randn(1, channels, length),
        "delta": torch.randn(1, channels, length) - 3,
        "A": -torch.arange(1.0, STATES + 1).repeat(channels, 1),
        "B": torch.randn(1, STATES, length),
        "C": torch.randn(1, STATES, length),
        "D": torch.randn(channels),
        "z": torch.randn(1, channels, length),
    }
    return {name: x.requires_grad_(requires_grad) for name, x in inputs.items()}


def theirs(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    names = {"u": "hidden_states", "delta": "dt"}
    scan = modeling_jamba.mamba_selective_scan
    return scan(**{names.get(name, name): x for name, x in inputs.items()}, delta_softplus=True)


def ours(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return selective_scan(**inputs)[0]


SCANS = {PEER: theirs, "ours": ours}


def forward(name: str, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return SCANS[name](inputs)


def forward_and_backward(name: str, inputs: dict) -> None:
    SCANS[name](inputs).sum().backward()


PASSES = {"forward": forward, "forward and backward": forward_and_backward}


def extra_memory(kind: str, name: str, channels: int, length: int) -> int:
    """Bytes beyond the inputs, in a process of its own."""
    inputs = make_inputs(channels, length, requires_grad=kind != "forward")
    warm_up = make_inputs(8, 8, requires_grad=kind != "forward")
    PASSES[kind](name, warm_up)
    return peak_of(lambda: PASSES[kind](name, inputs))[1]


def floor() -> float:
    """Nanoseconds of an exponential, a multiplication and a multiply-add, of values that stay in the cache."""
    run, values = recurrence_steps()
    return time_side_by_side({"floor": run}, 5)["floor"]["minimum"] * 1e9 / values


def compare(channels: int, whole_length: int, rounds: int, backward_values: int) -> list[dict]:
    rows = []
    for kind, run in PASSES.items():
        # Theirs adds a gradient of full size for every token, which takes a time that is quadratic in them: hours.
        length = whole_length if kind == "forward" else min(whole_length, backward_values // channels)
        inputs = make_inputs(channels, length, requires_grad=kind != "forward")
        candidates = {name: partial(run, name, inputs) for name in SCANS}
        if kind == "forward":
            expected, found = (SCANS[name](inputs) for name in SCANS)
            error = ((found - expected).abs().max() / expected.abs().max()).item()
        seconds = time_side_by_side(candidates, rounds)
        memory = {name: run_apart(extra_memory, kind, name, channels, length) for name in SCANS}
        nearest = floor()
        for name in SCANS:
            nanoseconds = seconds[name]["minimum"] * 1e9 / (channels * length * STATES)
            rows.append(
                {
                    "d_inner": channels,
                    "length": length,
                    "pass": kind,
                    "scan": name,
                    "times faster": seconds[PEER]["minimum"] / seconds[name]["minimum"],
                    "time / floor": nanoseconds / nearest,
                    "extra memory / Transformers'": memory[name] / memory[PEER],
                    "largest error": error if name == "ours" else None,
                }
            )
    return rows


@torch.no_grad()
def compare_mixers(hidden_size: int, length: int, rounds: int) -> list[dict]:
    sizes = {"hidden_size": hidden_size, "mamba_d_state": STATES, "num_hidden_layers": 8}
    torch.manual_seed(0)
    peer = modeling_jamba.JambaMambaMixer(JambaConfig(**sizes), 0)
    mixer = LongLLaVAMambaMixer(LongLLaVATextConfig(**sizes), 0)
    mixer.load_state_dict(peer.state_dict())
    hidden_states = torch.randn(1, length, hidden_size)
    candidates = {PEER: lambda: peer(hidden_states), "ours": lambda: mixer(hidden_states)}
    expected, found = (run() for run in candidates.values())
    seconds = time_side_by_side(candidates, rounds)
    return [
        {
            "hidden_size": hidden_size,
            "length": length,
            "mixer": name,
            "times faster": seconds[PEER]["minimum"] / seconds[name]["minimum"],
            "largest error": ((found - expected).abs().max() / expected.abs().max()).item()
            if name == "ours"
            else None,
        }
        for name in candidates
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "512x16384"], help="d_inner x length")
    parser.add_argument("--mixer", default="512x4096", help="hidden size x length")
    parser.add_argument(
        "--backward-values", type=int, default=1 << 19, help="d_inner x length at most, where there is a backward pass"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON and the picture")
    arguments = parser.parse_args()
    rows = []
    for shape in arguments.shapes:
        channels, length = map(int, shape.split("x"))
        rows += compare(channels, length, arguments.rounds, arguments.backward_values)
    print_table(rows)
    mixers = compare_mixers(*map(int, arguments.mixer.split("x")), arguments.rounds)
    print()
    print_table(mixers)
    written = write_json("scan_cpu", {**machine(), "scan": rows, "mixer": mixers}, arguments.output)
    panels: dict[str, dict] = {"times faster than Transformers'": {}}
    for kind in PASSES:
        mine = [row for row in rows if row["scan"] == "ours" and row["pass"] == kind]
        panels["times faster than Transformers'"][kind] = (
            [str(row["d_inner"]) for row in mine],
            [row["times faster"] for row in mine],
        )
    picture = draw("scan_cpu", "The scan, float32, two CPU cores", "d_inner", panels, arguments.output)
    print(f"written: {written}, {picture}")


if __name__ == "__main__":
    main()
