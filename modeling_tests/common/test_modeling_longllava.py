"""Transformers' common tests of models and configurations."""

import inspect
import unittest
from unittest.mock import patch

import torch
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

from longllava_hf import (
    LongLLaVAConfig,
    LongLLaVAForCausalLM,
    LongLLaVAForConditionalGeneration,
    LongLLaVAModel,
    LongLLaVATextConfig,
    LongLLaVATextModel,
)

from ..conftest import small_config


TEXT = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "initializer_range": 0.02}


class LongLLaVATextModelTester:
    batch_size, seq_length, is_training = 5, 7, True

    def __init__(self, parent):
        self.parent = parent
        config = self.get_config()
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.num_hidden_layers, self.num_attention_heads = config.num_hidden_layers, config.num_attention_heads

    def get_config(self) -> LongLLaVATextConfig:
        return small_config(text_config=TEXT).text_config

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 6) + 6
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class CommonTests(ModelTesterMixin):
    """What differs from most models."""

    def test_attention_outputs(self):
        """Of the attention layers alone, as a hybrid's."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config._attn_implementation = "eager"
        for model_class in self.all_model_classes:
            model = model_class(config).eval()
            with torch.no_grad():
                outputs = model(**self._prepare_for_class(inputs, model_class), output_attentions=True)
                hidden_states = model(**inputs, output_attentions=True, output_hidden_states=True).attentions
            length, heads = self.model_tester.seq_length, self.model_tester.num_attention_heads
            self.assertEqual([tuple(x.shape[-3:]) for x in outputs.attentions], [(heads, length, length)])
            self.assertEqual(len(hidden_states), 1)


class LongLLaVATextModelTest(CommonTests, unittest.TestCase):
    all_model_classes = (LongLLaVATextModel, LongLLaVAForCausalLM)

    def setUp(self):
        self.model_tester = LongLLaVATextModelTester(self)
        self.config_tester = ConfigTester(self, config_class=LongLLaVATextConfig)

    def test_config(self):
        self.config_tester.run_common_tests()


class LongLLaVAModelTester(LongLLaVATextModelTester):
    """A picture of four tokens in each row, and as many rows as the host's tests fill their inputs up to."""

    batch_size, seq_length, tokens_per_image = 7, 11, 4

    def __init__(self, parent):
        self.parent = parent
        config = self.get_config()
        self.vocab_size = config.text_config.vocab_size
        self.text_config, self.vision_config = config.text_config.to_dict(), config.vision_config.to_dict()
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            setattr(self, name, self.text_config[name])

    def get_config(self) -> LongLLaVAConfig:
        return small_config(text_config=TEXT, vision_config={"num_hidden_layers": 2})

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        inputs["input_ids"][:, 1 : 1 + self.tokens_per_image] = config.image_token_id
        size = config.vision_config.image_size
        inputs["pixel_values"] = floats_tensor([self.batch_size, 3, size, size])
        return config, inputs


class LongLLaVAModelTest(CommonTests, unittest.TestCase):
    all_model_classes = (LongLLaVAModel, LongLLaVAForConditionalGeneration)
    _is_composite = True
    additional_model_inputs = ["pixel_values"]  # there are no placeholders without pictures
    # The tower's layers after `vision_feature_layer` have none, and are frozen; older tests unfreeze them.
    test_all_params_have_gradient = "frozen" in inspect.getsource(CommonTests.check_training_gradient_checkpointing)

    def setUp(self):
        self.model_tester = LongLLaVAModelTester(self)
        self.config_tester = ConfigTester(self, config_class=LongLLaVAConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_can_init_all_missing_weights(self):
        """
        Below a class of a third party, Transformers takes a module without parameters of its own for initialized, and
        leaves out what CLIP's attention initializes in its children. Here a weight that is missing is an error.
        """
        with patch.object(LongLLaVAModel, "is_custom_code", return_value=False):
            with patch.object(LongLLaVAForConditionalGeneration, "is_custom_code", return_value=False):
                super().test_can_init_all_missing_weights()
