# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
Run Transformers' own tests on this package's classes: those of the release that is installed, from its source
distribution on PyPI, which is kept for the next time.

    python scripts/run_common_tests.py [--cache FOLDER] [arguments of pytest]
"""

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urljoin
from urllib.request import urlopen

import transformers


INDEX = "https://pypi.org/pypi/transformers/json"
MAX_BYTES = 100_000_000
TESTS = Path(__file__).parent.parent / "modeling_tests" / "common"


def download(release: str) -> bytes:
    """
    The source distribution of a release.

    Raises:
        OSError: without network, or if it is not what the index says.
    """
    try:
        with urlopen(INDEX, timeout=60) as response:
            files = json.load(response)["releases"].get(release, [])
        found = next((file for file in files if file["packagetype"] == "sdist"), None)
        if found is None:
            raise OSError(f"{INDEX} has no source distribution of Transformers {release}.")
        with urlopen(urljoin(INDEX, found["url"]), timeout=60) as response:
            content = response.read(MAX_BYTES)
    except URLError as error:
        raise OSError(f"Transformers {release} could not be fetched from {INDEX}: {error.reason}") from error
    if hashlib.sha256(content).hexdigest() != found["digests"]["sha256"]:
        raise OSError(f"What was fetched as {found['filename']} has another checksum than {INDEX} says.")
    return content


def sources(release: str, cache: Path) -> Path:
    """The folder of a release's sources, fetched if it is not there yet."""
    folder = cache / f"transformers-{release}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            with tarfile.open(fileobj=io.BytesIO(download(release))) as archive:
                archive.extractall(temporary, filter="data")
            # Left out of the distribution, and imported by the tests.
            (Path(temporary) / folder.name / "tests" / "__init__.py").touch()
            os.replace(Path(temporary) / folder.name, folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "longllava_hf"
    parser.add_argument("--cache", type=Path, default=default, help=f"where to keep the sources (default: {default})")
    arguments, rest = parser.parse_known_args()
    try:
        folder = sources(transformers.__version__, arguments.cache)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    environment = {**os.environ, "TRANSFORMERS_SOURCES": str(folder.resolve())}
    # They have markers of their own.
    command = [sys.executable, "-m", "pytest", "-o", "addopts=-p no:cacheprovider", str(TESTS), *rest]
    return subprocess.run(command, env=environment, cwd=TESTS.parent.parent, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
