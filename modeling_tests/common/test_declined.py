"""What is declined is there to be declined."""

import pytest
from tests.test_modeling_common import ModelTesterMixin
from tests.test_processing_common import ProcessorTesterMixin

from .declined import DECLINED


def test_names():
    hosts = (ModelTesterMixin, ProcessorTesterMixin)
    absent = [name for name in DECLINED if not any(hasattr(host, name.rpartition(".")[2]) for host in hosts)]
    if "test_base_model_prefix_loads_base_weights" in absent:
        pytest.skip("an older release has fewer tests")
    assert absent == []
