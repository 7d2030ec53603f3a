# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
Write `constraints.txt`: the exact versions of all that a virtual environment holds, for the README's commands to install.

    python scripts/refresh_constraints.py .venv    # of the newest run that passed

Where a release is not for the oldest Python that is supported, that gets the newest one that is.
"""

import argparse
import contextlib
import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from urllib.request import urlopen

from packaging.requirements import Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version


FILE = Path(__file__).parent.parent / "constraints.txt"
OLDEST_PYTHON, NEWER_PYTHON = "3.10", "3.11"
# What other packages need on the oldest Python alone, and so is in no newer environment.
BACKPORTS = ("exceptiongroup", "tomli")
HEADER = """\
# The exact versions that the tests last passed with, for the README's commands. Written by
# scripts/refresh_constraints.py; Triton's is the one that PyTorch's builds for CUDA ask for.
"""


def installed(environment: Path) -> dict[str, str]:
    """Name and version of each distribution in a virtual environment, but for what is installed from a folder."""
    command = [str(environment / "bin" / "python"), "-m", "pip", "list", "--format=json", "--exclude-editable"]
    listed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    # A local version, as in `2.13.0+cpu`, is one build of a release.
    found = {canonicalize_name(item["name"]): Version(item["version"]).public for item in listed}
    return {name: version for name, version in sorted(found.items()) if name != "pip"}


def supported_releases(name: str, python: str) -> list[Version]:
    """The final releases on PyPI that are for a Python version, in their order."""
    with urlopen(f"https://pypi.org/pypi/{name}/json", timeout=60) as response:
        releases = json.load(response)["releases"]
    found = []
    for version, files in releases.items():
        with contextlib.suppress(InvalidVersion, InvalidSpecifier):  # of years ago
            is_final = not Version(version).is_prerelease
            if is_final and any(not f["yanked"] and python in SpecifierSet(f["requires_python"] or "") for f in files):
                found.append(Version(version))
    return sorted(found)


def pins(versions: dict[str, str]) -> Iterable[str]:
    """Lines of the constraints file."""
    older, newer = f'python_version < "{NEWER_PYTHON}"', f'python_version >= "{NEWER_PYTHON}"'
    for name in sorted({*versions, *BACKPORTS}):
        supported = supported_releases(name, f"{OLDEST_PYTHON}.0")
        if name in versions and Version(versions[name]) in supported:
            yield f"{name}=={versions[name]}"
            continue
        if name in versions:
            yield f"{name}=={versions[name]} ; {newer}"
        if supported:
            yield f"{name}=={supported[-1]} ; {older}"


def read(file: Path = FILE) -> list[Requirement]:
    """The pins of a constraints file."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def write(lines: Iterable[str], file: Path = FILE) -> None:
    """Write a constraints file, whole or not at all."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(HEADER + "".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", type=Path, help="folder of a virtual environment")
    write(pins(installed(parser.parse_args().environment)))
