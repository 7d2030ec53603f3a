"""Transformers' common tests of the image processor, which is the same with and without torchvision."""

import unittest

from tests import test_image_processing_common as common
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from longllava_hf import LongLLaVAImageProcessor


# Older releases hide this class behind torchvision, which it does not need.
common.AutoImageProcessor = AutoImageProcessor


class LongLLaVAImageProcessingTester(common.ImageProcessingTester):
    batch_size, num_channels, min_resolution, max_resolution = 7, 3, 30, 400
    size = {"shortest_edge": 20}
    crop_size = {"height": 18, "width": 18}

    def __init__(self):
        """Without the parent's, which finds classes by the name of a folder."""

    def prepare_image_processor_dict(self):
        # Neither is possible with 4 channels, which some tests are about.
        return {"size": self.size, "crop_size": self.crop_size, "do_pad": False, "do_convert_rgb": False}


class LongLLaVAImageProcessingTest(common.ImageProcessingTestMixin, unittest.TestCase):
    image_processing_classes = {"pil": LongLLaVAImageProcessor, "torchvision": LongLLaVAImageProcessor}
    image_processor_dict = LongLLaVAImageProcessingTester().prepare_image_processor_dict()
    test_cast_dtype = True

    def setUp(self):
        self.image_processor_tester = LongLLaVAImageProcessingTester()
