"""
Transformers' own tests on this package's classes. They come from its source distribution, which
`scripts/run_common_tests.py` fetches; without it nothing here is collected.
"""

import importlib.abc
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from .declined import DECLINED


SOURCES = os.environ.get("TRANSFORMERS_SOURCES")
collect_ignore_glob = [] if SOURCES else ["test_*.py"]


class AbsentModule(types.ModuleType):
    """Stands for a module of Transformers' tests that is not in its source distribution: its classes have no tests."""

    __path__: list[str] = []
    config_common_kwargs: dict[str, Any] = {}

    @staticmethod
    def url_to_local_path(url: str) -> str:
        return url

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class AbsentModuleFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked last, for what nothing else finds."""

    def find_spec(self, fullname, path=None, target=None):
        is_absent = fullname.startswith("tests.") or fullname == "fetch_hub_objects_for_ci"
        return importlib.util.spec_from_loader(fullname, self) if is_absent else None

    def create_module(self, spec):
        return AbsentModule(spec.name)

    def exec_module(self, module):
        pass


if SOURCES:
    sys.path.insert(0, SOURCES)
    sys.meta_path.append(AbsentModuleFinder())


def pytest_collection_modifyitems(items):
    for item in items:  # of the whole session
        name, test_class = getattr(item, "originalname", item.name), getattr(item.cls, "__name__", None)
        reason = DECLINED.get(f"{test_class}.{name}", DECLINED.get(name))
        if reason is not None and item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason=f"declined: {reason}"))
