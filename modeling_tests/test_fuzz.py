"""That damaged files are read rightly or refused by name, in a few cases; and that the fuzzer would notice."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch


pytest.importorskip("av")
if not sys.platform.startswith("linux"):
    pytest.skip("the fuzzer reads /proc", allow_module_level=True)

SCRIPT = Path(__file__).parents[1] / "scripts" / "fuzz.py"


@pytest.fixture(scope="module")
def fuzz():
    specification = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules["fuzz"] = module  # where dataclasses look for it
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_damaged_files(tmp_path):
    # In a process of its own, that is forked before it has threads.
    command = [sys.executable, str(SCRIPT), "--count", "8", "--json", str(tmp_path / "result.json")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, (run.stdout or run.stderr)[-6000:]
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["kind"] for row in rows][:2] == ["pictures", "films"] and len(rows) == 7
    assert all(row["tried"] > 8 and row["answered"] and row["refused"] for row in rows)


def fault(kind: str, file: Path):
    """A reader with one fault."""
    if kind == "class":
        return {}["missing"]
    if kind == "unnamed":
        raise ValueError("Something is damaged.")
    if kind == "hang":
        time.sleep(60)
    if kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "exit":
        sys.exit(3)
    if kind == "memory":
        return [torch.from_numpy(np.ones(30 << 20))]  # 240 MB
    if kind == "nan":
        return [torch.tensor([1.0, float("nan")])]
    if file.stat().st_size != 1000:
        raise ValueError(f"`{file}` is damaged.")
    return [torch.ones(2)]


CAUSES = {
    "class": "KeyError in test_fuzz.py:fault",
    "unnamed": "unnamed, ValueError in test_fuzz.py:fault",
    "hang": "no answer within 1 s",
    "crash": "crashed with SIGSEGV",
    "exit": "SystemExit in test_fuzz.py:fault",
    "memory": "more than 100 MB",
    "nan": "wrong answer: there are values that are not finite",
}


@pytest.mark.parametrize("kind", [*CAUSES, None])
def test_faults_are_found(fuzz, tmp_path, kind):
    class Planted(fuzz.Kind):
        name = "planted"

        def __init__(self, folder):
            super().__init__(folder)
            self.seeds = {"file.bin": bytes(1000)}

        def read(self, random, name, file):
            # The other cases go on in another process, if need be.
            return fault(kind if file.parent.name == "planted-2" else None, file)

    outcomes = list(fuzz.fuzz([Planted(tmp_path)], range(6), tmp_path, seconds=1, megabytes=100))
    assert [outcome.number for outcome in outcomes] == [-1, *range(6)]
    assert outcomes[0].verdict == "answered"
    assert {"answered", "refused"} >= {outcome.verdict for outcome in outcomes if outcome.number != 2}
    found = fuzz.groups(outcomes)
    if kind is None:
        assert not found
    else:
        assert found == [{"kind": "planted", "failed": 1, "example": 2, "cause": CAUSES[kind]}]
        assert (tmp_path / "planted-2" / "file.bin").exists()


def test_cases_depend_on_the_seed_and_number_alone(fuzz, tmp_path):
    kinds = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        kinds.append(fuzz.Contexts(folder))
        assert fuzz.Films(folder).seeds == fuzz.Films(folder).seeds
    assert kinds[0].seeds == kinds[1].seeds
    cases = [[fuzz.make(kind, seed, 7)[1:] for kind in kinds] for seed in (0, 1)]
    assert cases[0][0] == cases[0][1] and cases[1][0] == cases[1][1]
    assert cases[0] != cases[1]


def test_json_is_damaged_in_ways_that_python_cannot_write(fuzz):
    texts = [fuzz.damage_json(fuzz.Random(i), '{"a": {"b": 1, "c": [1, 2]}, "d": "x"}')[0] for i in range(300)]
    assert any("[" * 100_000 in text for text in texts)
    assert any(text.count('"d":') == 2 for text in texts)
    assert any("NaN" in text for text in texts) and any("\\u0000" not in text for text in texts)
