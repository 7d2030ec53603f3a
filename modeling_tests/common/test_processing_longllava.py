"""Transformers' common tests of processors, on the small checkpoint's."""

import unittest

from tests.test_processing_common import ProcessorTesterMixin

from longllava_hf import TINY, LongLLaVAProcessor


class LongLLaVAProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = LongLLaVAProcessor
    model_id = TINY
    videos_input_name = "pixel_values"

    @staticmethod
    def does_processor_return_mm_offsets(processor_class, method_name):
        """It does, though it replaces placeholders by no method for each kind: their texts are computed before."""
        return True

    # A video is given only where there is a video processor, and a placeholder without its video is refused.

    def test_processor_with_multiple_inputs(self):
        self.video_token = ""
        super().test_processor_with_multiple_inputs()

    def test_replacement_offsets(self):
        self.video_token = ""
        super().test_replacement_offsets()
