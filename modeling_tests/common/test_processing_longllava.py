"""Transformers' common tests of processors."""

import unittest
from pathlib import Path

from tests import test_processing_common
from tests.test_processing_common import ProcessorTesterMixin

from longllava_hf import TINY, LongLLaVAProcessor


EXAMPLES = Path(__file__).parents[2] / "examples"
# In place of what would come from the Hub.
test_processing_common.MODALITY_INPUT_DATA.update(
    images=[str(EXAMPLES / "three.png"), str(EXAMPLES / "seven.png")], videos=[str(EXAMPLES / "film.mp4")] * 2
)


class LongLLaVAProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = LongLLaVAProcessor
    model_id = TINY
    videos_input_name = "pixel_values"
