import json
import logging as python_logging

import pytest
import torch
from transformers import AutoConfig, Qwen2Config

from longllava_hf import LongLLaVAConfig, LongLLaVATextConfig
from longllava_hf.configuration_longllava import (
    DEFAULT_VISION_TOWER,
    locate_vision_tower,
    native_to_published,
    published_to_native,
)

from .conftest import published


def test_defaults_are_the_53b():
    config = LongLLaVAConfig()
    text = config.text_config
    assert [i for i, kind in enumerate(text.layers_block_type) if kind == "attention"] == [4, 12, 20, 28]
    assert text.layers_num_experts == [1, 16] * 16
    assert (text.mamba_dt_rank, text.hidden_size, text.vocab_size) == (256, 4096, 65536)
    assert config.image_seq_length == 144 and config.image_token_id == 516


@pytest.mark.parametrize("read", [AutoConfig.from_pretrained, LongLLaVAConfig.from_pretrained])
def test_published_configuration_is_translated(read):
    config = read(published("moe"))
    assert type(config) is LongLLaVAConfig and config.model_type == "longllava"
    assert type(config.text_config) is LongLLaVATextConfig
    assert (config.text_config.num_experts, config.text_config.vocab_size) == (4, 512)
    assert (config.vision_config.hidden_size, config.vision_config.image_size) == (32, 336)
    assert (config.pooling_mode, config.pooling_order, config.vision_feature_layer) == ("2d", "before_projector", -2)
    assert config.dtype == torch.float32


def test_native_configuration_survives_saving(tmp_path):
    config = AutoConfig.from_pretrained(published("dense"))
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is LongLLaVAConfig
    ours, theirs = again.to_dict(), config.to_dict()
    for one in (ours, theirs):
        one.pop("_name_or_path", None)
    assert ours == theirs


def test_back_to_the_published_layout():
    flat = json.loads((published("moe") / "config.json").read_text())
    back = native_to_published(AutoConfig.from_pretrained(published("moe")), "./clip-tiny-336")
    for key in (
        "model_type",
        "architectures",
        "resamplePooling",
        "mm_vision_tower",
        "mm_projector_type",
        "num_experts",
    ):
        assert back[key] == flat[key], key
    for key in ("hidden_size", "mamba_dt_rank", "mm_vision_select_layer", "torch_dtype", "attn_layer_period"):
        assert back[key] == flat[key], key
    assert published_to_native(back, published("moe"))["text_config"]["num_experts"] == 4


@pytest.mark.parametrize(
    ("written", "mode"), [({}, "2d"), ({"resamplePooling": "1d"}, "1d"), ({"resamplePooling": None}, "none")]
)
def test_pooling_is_2d_where_nothing_is_said(written, mode):
    flat = json.loads((published("moe") / "config.json").read_text())
    flat.pop("resamplePooling")
    config = LongLLaVAConfig.from_dict({**flat, **written}, name_or_path=str(published("moe")))
    assert config.pooling_mode == mode
    assert config.image_seq_length == {"2d": 144, "1d": 144, "none": 576}[mode]


def test_a_tower_that_is_not_there_falls_back_to_the_hub(caplog):
    flat = json.loads((published("moe") / "config.json").read_text())
    flat["mm_vision_tower"] = "/mntcephfs/data/models/clip_vit_large_patch14_336"
    transformers_logger = python_logging.getLogger("transformers")
    package_logger = python_logging.getLogger("longllava_hf")
    for logger in (transformers_logger, package_logger):
        logger.propagate = True
    with caplog.at_level("WARNING"):
        config = LongLLaVAConfig.from_dict(flat)
    assert config.vision_tower == DEFAULT_VISION_TOWER
    assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (1024, 24)
    assert any(flat["mm_vision_tower"] in m and DEFAULT_VISION_TOWER in m for m in caplog.messages)


def test_where_a_tower_is_looked_for(tmp_path):
    (tmp_path / "checkpoint" / "inside").mkdir(parents=True)
    (tmp_path / "beside").mkdir()
    folder = tmp_path / "checkpoint"
    assert locate_vision_tower("./inside", folder) == str(folder / "inside")
    assert locate_vision_tower("./beside", folder) == str(tmp_path / "beside")
    assert locate_vision_tower(str(tmp_path / "beside"), folder) == str(tmp_path / "beside")
    assert locate_vision_tower("google/siglip-base", folder) == "google/siglip-base"
    assert locate_vision_tower(None, folder) == DEFAULT_VISION_TOWER


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mm_projector_type", "qformer"),
        ("resamplePooling", "3d"),
        ("mm_patch_merge_type", "spatial"),
        ("mm_vision_select_feature", "cls"),
    ],
)
def test_what_longllava_does_not_have_is_refused(key, value):
    flat = json.loads((published("moe") / "config.json").read_text())
    with pytest.raises(ValueError, match=f"{key}.*{value}"):
        LongLLaVAConfig.from_dict({**flat, key: value}, name_or_path=str(published("moe")))


def test_impossible_architectures_are_refused():
    with pytest.raises(Exception, match=r"attn_layer_offset.*8.*8"):
        LongLLaVATextConfig(attn_layer_offset=8)
    with pytest.raises(Exception, match=r"num_experts_per_tok.*3.*2"):
        LongLLaVATextConfig(num_experts=2, num_experts_per_tok=3)
    with pytest.raises(Exception, match="class token"):
        LongLLaVAConfig(vision_feature_select_strategy="full")


def test_any_decoder(tmp_path):
    text = Qwen2Config(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    LongLLaVAConfig(text_config=text, pooling_order="after_projector").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config.text_config) is Qwen2Config and config.pooling_order == "after_projector"
    with pytest.raises(ValueError, match="qwen2"):
        native_to_published(config, "x")
