"""`constraints.txt` has one pin for all that the README's commands install, within pyproject.toml's bounds."""

import runpy
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version


tomllib = pytest.importorskip("tomllib")
ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "refresh_constraints.py"))
# mamba-ssm and causal-conv1d are compiled for the machine that they run on; Gradio needs an earlier Pillow, and so an
# environment of its own.
UNPINNED = {"longllava-hf", "mamba-ssm", "causal-conv1d", "gradio"}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    found = [Requirement(line) for line in lines]
    return [item for item in found if canonicalize_name(item.name) not in UNPINNED]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_dependency_is_pinned_within_its_bounds(python):
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    pins = [pin for pin in SCRIPT["read"]() if pin.marker is None or pin.marker.evaluate(environment)]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(versions) == len(pins)
    for item in requirements():
        version = versions.get(canonicalize_name(item.name))
        assert version is not None, f"{item} has no pin"
        assert version in item.specifier, f"{item}, but the pin is {version}"


def test_floors_are_those_of_the_oldest_lane():
    pins = {pin.name: pin.specifier for pin in SCRIPT["read"](ROOT / ".ci" / "oldest.txt")}
    for item in requirements():
        if item.name in pins and item.name not in ("torch", "triton"):
            (pin,), (floor,) = pins[item.name], [one for one in item.specifier if one.operator == ">="]
            assert pin.operator == "==" and Version(pin.version) in SpecifierSet(f"=={floor.version}.*"), item
    # What trains the small checkpoint, lint, and what asks for newer releases of accelerate and huggingface_hub.
    untested = {item.name for item in requirements()} - set(pins)
    assert untested == {
        "datasets",
        "deepspeed",
        "mypy",
        "pre-commit",
        "resvg-py",
        "ruff",
        "scikit-video",
        "trl",
        "typos",
    }


def test_lines_are_read_as_they_were_written(tmp_path):
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    SCRIPT["write"](lines, tmp_path / "constraints.txt")
    assert (tmp_path / "constraints.txt").read_text() == (ROOT / "constraints.txt").read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["constraints.txt"]
    assert all(str(pin.specifier).startswith("==") for pin in SCRIPT["read"](tmp_path / "constraints.txt"))
