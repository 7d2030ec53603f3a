# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks share: timing things side by side, a table, and JSON."""

import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

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


def recurrence_steps() -> tuple[Callable, int]:
    """
    The least that a scan does: an exponential, a multiplication and a multiply-add of values that stay in the cache. A
    function that does so, and for how many values.
    """
    a, b, c = torch.rand(3, 1 << 16).neg_()
    out = torch.empty_like(a)

    def run() -> None:
        for _ in range(100):
            torch.exp(a, out=out)
            torch.mul(a, b, out=out)
            torch.addcmul(c, a, b, out=out)

    return run, 100 * a.numel()


def run_apart(function: Callable, *arguments) -> Any:
    """The result of a function of a module, called in a process of its own, where nothing was allocated before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def resident(kind: str = "VmRSS") -> int:
    """Bytes of this process in memory: now (`"VmRSS"`), or at most so far (`"VmHWM"`). Linux only."""
    line = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert line is not None
    return 1024 * int(line[1])


def peak_of(run: Callable) -> tuple[Any, int]:
    """The result of a function, and how many bytes more than before were in memory meanwhile, at most."""
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what is there now
    result = run()
    return result, resident("VmHWM") - before


def machine(device: str = "cpu") -> dict[str, str | int]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif cpu.exists() and (model := re.search(r"model name\s*: (.+)", cpu.read_text())) is not None:
        name = model[1]
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=RESULTS, capture_output=True, text=True, check=False)
    return {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
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


def draw(name: str, title: str, x: str, panels: dict[str, dict[str, list]], folder: Path = RESULTS) -> Path:
    """
    Panels side by side, as `name.png`.

    Args:
        panels (`dict`): for each, by the label of its y axis, the lines: name to `(x values, y values)`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), layout="constrained", squeeze=False)
    for panel, (label, lines) in zip(axes[0], panels.items()):
        for line, (xs, ys) in lines.items():
            panel.plot(xs, ys, marker="o", label=line)
        panel.set(xlabel=x, ylabel=label, ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(title)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.png"
    temporary = file.with_suffix(".png.tmp")
    figure.savefig(temporary, format="png", dpi=130)
    plt.close(figure)
    os.replace(temporary, file)
    return file


def write_json(name: str, content: dict, folder: Path = RESULTS) -> Path:
    """Write `name.json`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, file)
    return file
