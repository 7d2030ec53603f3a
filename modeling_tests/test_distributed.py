"""
Two processes, on a CPU through gloo, that train one model on unlike batches: against one process that sees the batches of both.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from longllava_hf import LongLLaVAForConditionalGeneration

from . import distributed_worker
from .conftest import free_port, published


pytestmark = pytest.mark.slow

WORLD = 2
ROOT = Path(__file__).parent.parent


def launch(folder: Path, *ways: str) -> None:
    """Run the worker as `WORLD` processes. All are killed where one of them fails or hangs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "modeling_tests.distributed_worker"]
    arguments, port = [str(folder), *ways], str(free_port())
    logs = [(folder / f"{rank}.log").open("w") for rank in range(WORLD)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(WORLD), port, *arguments], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
        for rank, log in enumerate(logs)
    ]
    try:
        for process in processes:
            process.wait(timeout=240)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process, log in zip(processes, logs):
            process.kill()
            process.wait()
            log.close()


def results(folder: Path, way: str) -> list[dict]:
    files = [folder / f"{way}-{rank}.json" for rank in range(WORLD)]
    if not all(file.exists() for file in files):
        pytest.fail("\n".join((folder / f"{rank}.log").read_text()[-2000:] for rank in range(WORLD)))
    return [json.loads(file.read_text()) for file in files]


has_deepspeed = find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not has_deepspeed, reason="deepspeed is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of what both processes computed, for each way of spreading a model."""
    folder = tmp_path_factory.mktemp("distributed")
    distributed_worker.build().save_pretrained(folder / "checkpoint")
    for name in (folder / "checkpoint", published("moe")):
        model = LongLLaVAForConditionalGeneration.from_pretrained(name)
        torch.save(model.state_dict(), folder / f"{name.parent.name}.pt")
    launch(folder, "ddp", "fsdp2", *(("zero3", "zero3_load") if has_deepspeed else ()))
    return folder


@pytest.fixture(scope="module")
def alone():
    return distributed_worker.train_alone(WORLD)


def check(found: list[dict], expected: dict) -> None:
    for rank, result in enumerate(found):
        assert len(result["losses"]) == 20 and result["losses"][-1] != result["losses"][-5]
        assert result["losses"] == pytest.approx(expected["losses"][rank], abs=1e-4)
        assert result["eval"] == pytest.approx(expected["eval"][rank], abs=1e-4)


def test_batches_are_unlike():
    """On some step one process alone has pictures, or more than the tower takes at a time; and experts are left out."""
    pictures = [
        tuple(len(distributed_worker.batch_of(step, rank).get("pixel_values", ())) for rank in range(WORLD))
        for step in range(8)
    ]
    assert {(1, 2), (0, 1), (1, 0), (5, 0), (0, 5), (0, 0)} <= set(pictures)
    model, text = distributed_worker.build(), distributed_worker.batch_of(3, 0)
    router_logits = model(**text, output_router_logits=True).router_logits
    assert all(len(logits) * 2 < logits.shape[1] for logits in router_logits)


def test_ddp(folder, alone):
    """Without `find_unused_parameters`."""
    check(results(folder, "ddp"), alone)


def test_fsdp2(folder, alone):
    found = results(folder, "fsdp2")
    assert all(result["is_sharded"] for result in found)
    check(found, alone)


@needs_deepspeed
def test_zero3(folder, alone):
    found = results(folder, "zero3")
    assert all(result["is_sharded"] for result in found)
    check(found, alone)


@needs_deepspeed
def test_zero3_loads_experts(folder):
    for result in results(folder, "zero3_load"):
        assert result["is_sharded"] and result["compared"] > 100 and not result["differs"]
