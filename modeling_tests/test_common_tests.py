"""What is declined of Transformers' own tests is what the documentation says."""

from pathlib import Path

from .common.declined import DECLINED


def test_what_is_declined_is_documented():
    document = Path(__file__).parents[1] / "docs" / "common_tests.md"
    rows = [line.split(" | ") for line in document.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert {name.strip("|` "): reason.strip("| ") for name, reason in rows} == DECLINED
