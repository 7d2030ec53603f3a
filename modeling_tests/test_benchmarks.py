"""That the benchmarks run: their figures are for people, and no test is about time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "result"),
    [
        (["gpu_efficiency.py", "--tiny"], "gpu_efficiency_tiny_cpu"),
        (["experts.py", "--tokens", "64", "--hidden-size", "32", "--rounds", "2"], "experts_cpu"),
    ],
)
def test_benchmark_runs(tmp_path, arguments, result):
    script, *rest = arguments
    command = [sys.executable, str(BENCHMARKS / script), *rest, "--output", str(tmp_path)]
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert run.returncode == 0, run.stderr[-2000:]
    content = json.loads((tmp_path / f"{result}.json").read_text())
    assert content["device"] and (content.get("rows") or content["text"])
    assert "---" in run.stdout


def test_gpu_efficiency_without_a_gpu_says_so():
    command = [sys.executable, str(BENCHMARKS / "gpu_efficiency.py")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 2 and "no CUDA device" in run.stderr
