"""
Transformers' own tests on this package's classes. They are in its source distribution alone, which
`scripts/run_common_tests.py` fetches and names in `TRANSFORMERS_SOURCES`; without it nothing here is collected.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from .declined import DECLINED


EXAMPLES = Path(__file__).parents[2] / "examples"
SOURCES = os.environ.get("TRANSFORMERS_SOURCES")
collect_ignore_glob = [] if SOURCES else ["test_*.py"]


def local_file(url: str) -> str:
    """A file of this repository in place of one of the Hub's."""
    names = {".mp4": "film.mp4", ".png": "three.png", ".jpg": "seven.png"}
    return str(EXAMPLES / names[Path(url).suffix]) if Path(url).suffix in names else url


def provide(module_name: str, **contents) -> None:
    """A module that the tests import and that the source distribution leaves out."""
    try:
        importlib.import_module(module_name)
    except ModuleNotFoundError:
        sys.modules[module_name] = ModuleType(module_name)
        vars(sys.modules[module_name]).update(contents)


if SOURCES:
    sys.path.insert(0, SOURCES)
    # Every other module must be there: a mixin that were only a stand-in would have no tests, and pass.
    provide("tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    provide("tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    provide("fetch_hub_objects_for_ci", url_to_local_path=local_file)
    # Arguments of every configuration, none of them with its default.
    arguments = {
        "return_dict": False,
        "output_hidden_states": True,
        "dtype": "float16",
        "chunk_size_feed_forward": 3,
        "architectures": ["AnyModel"],
        "id2label": {0: "digit"},
        "label2id": {"digit": 0},
        "problem_type": "regression",
    }
    provide("tests.utils.test_configuration_utils", config_common_kwargs=arguments)
    # By which the tests tell a base model from one that has a loss.
    MODEL_MAPPING_NAMES.update(longllava="LongLLaVAModel", longllava_text="LongLLaVATextModel")
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.update(longllava_text="LongLLaVAForCausalLM")
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.update(longllava="LongLLaVAForConditionalGeneration")


def pytest_report_header():
    if not SOURCES:
        return "Transformers' common tests are left out: scripts/run_common_tests.py fetches and runs them"


def pytest_collection_modifyitems(items):
    for item in items:  # of the whole session
        reason = DECLINED.get(getattr(item, "originalname", item.name))
        if reason is not None and item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason=f"declined: {reason}"))
