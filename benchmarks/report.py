# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks share: timing things side by side, a table, and JSON."""

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers


RESULTS = Path(__file__).parent / "results"


def time_side_by_side(candidates: dict[str, Callable], rounds: int) -> dict[str, dict[str, float]]:
    """
    Seconds of each candidate, taken in turns, so that whatever else the machine does hits all of them alike.

    Returns:
        `dict`: for each, `minimum` and `median` of `rounds` runs after one that does not count.
    """
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: {"minimum": min(s), "median": statistics.median(s)} for name, s in seconds.items()}


def machine(device: str = "cpu") -> dict[str, str | int]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif cpu.exists() and (model := re.search(r"model name\s*: (.+)", cpu.read_text())) is not None:
        name = model[1]
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def print_table(rows: list[dict]) -> None:
    """Rows with the same keys, which become the header; `None` is a dash."""

    def text(value) -> str:
        if value is None:
            return "-"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    cells = [list(rows[0])] + [[text(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for i, line in enumerate(cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
        if i == 0:
            print("  ".join("-" * width for width in widths))


def write_json(name: str, content: dict, folder: Path = RESULTS) -> Path:
    """Write `name.json`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, file)
    return file
