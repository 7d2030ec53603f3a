"""What is declined is there to be declined."""

from tests.test_image_processing_common import ImageProcessingTestMixin
from tests.test_modeling_common import ModelTesterMixin
from tests.test_processing_common import ProcessorTesterMixin

from longllava_hf.compat_longllava import CACHE

from .declined import DECLINED, NEW


def test_names():
    classes = (ImageProcessingTestMixin, ModelTesterMixin, ProcessorTesterMixin)
    absent = {name for name in DECLINED if not any(hasattr(host, name) for host in classes)}
    assert absent <= (set() if CACHE == "cache" else NEW)
