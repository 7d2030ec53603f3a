import copy
import json
import logging as python_logging

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from longllava_hf import LongLLaVAConfig, LongLLaVATextConfig
from longllava_hf.configuration_longllava import (
    DEFAULT_VISION_TOWER,
    SUPPORTED_DECODERS,
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
    assert again.to_dict() == config.to_dict()


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


def test_a_tower_is_never_taken_from_the_working_directory(tmp_path, monkeypatch):
    for place in ("work/tower", "home/checkpoint/tower", "work/other"):
        (tmp_path / place).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    folder = tmp_path / "home" / "checkpoint"
    assert locate_vision_tower("tower", folder) == locate_vision_tower("./tower", folder) == str(folder / "tower")
    assert locate_vision_tower("./other", folder) == DEFAULT_VISION_TOWER
    assert locate_vision_tower("other", folder) == "other"  # on the Hub
    assert locate_vision_tower("./tower", None) == DEFAULT_VISION_TOWER


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


@pytest.mark.parametrize("read", [AutoConfig.from_pretrained, LongLLaVAConfig.from_pretrained])
def test_a_configuration_is_equal_to_itself_wherever_it_is_saved(tmp_path, read):
    read(published("moe")).save_pretrained(tmp_path / "one")
    one = read(tmp_path / "one")
    one.save_pretrained(tmp_path / "two")
    two = read(tmp_path / "two")
    assert two == one == copy.deepcopy(one) and vars(two) == vars(one) and two.to_dict() == one.to_dict()


ATTENTION_FIRST = ["full_attention", "linear_attention", "linear_attention"]


def test_layer_types_can_be_given(tmp_path):
    text = LongLLaVATextConfig(num_hidden_layers=3, layer_types=ATTENTION_FIRST)
    assert text.layers_block_type == ["attention", "mamba", "mamba"] and text.layers_num_experts == [1, 16, 1]
    LongLLaVAConfig(text_config=text).save_pretrained(tmp_path)
    for read in (AutoConfig.from_pretrained, LongLLaVAConfig.from_pretrained):
        assert read(tmp_path).text_config.layer_types == ATTENTION_FIRST
    assert LongLLaVATextConfig.from_pretrained(tmp_path).layer_types == ATTENTION_FIRST
    assert LongLLaVATextConfig.from_dict(text.to_diff_dict()).layer_types == ATTENTION_FIRST
    jambas = LongLLaVATextConfig(num_hidden_layers=2, layer_types=["mamba", "attention"])
    assert jambas.layer_types == ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="other `layer_types`"):
        native_to_published(AutoConfig.from_pretrained(tmp_path), "x")


@pytest.mark.parametrize(
    ("layer_types", "message"),
    [
        (ATTENTION_FIRST[:2], r"\(3\) must be equal to the number of `layer_types` \(2\)"),
        (["full_attention", "sliding_attention", "linear_attention"], r"there are \['sliding_attention'\]"),
        (["full_attention", "nothing", "linear_attention"], "nothing"),
    ],
)
def test_layer_types_that_make_no_sense(layer_types, message):
    with pytest.raises(Exception, match=message):
        LongLLaVATextConfig(num_hidden_layers=3, layer_types=layer_types)


def test_layer_types_follow_period_and_offset(tmp_path):
    text = LongLLaVATextConfig(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1)
    assert text.layers_block_type == ["mamba", "attention"] * 2
    text.num_hidden_layers = 5
    assert text.layers_block_type == ["mamba", "attention", "mamba", "attention", "mamba"]
    text.attn_layer_offset = 0
    assert text.layer_types[:2] == ["full_attention", "linear_attention"]
    config = LongLLaVAConfig(text_config=text)
    config.save_pretrained(tmp_path)
    assert "layer_types" not in json.loads((tmp_path / "config.json").read_text())["text_config"]
    for fewer in (
        LongLLaVATextConfig.from_pretrained(tmp_path, num_hidden_layers=2),
        LongLLaVAConfig.from_pretrained(tmp_path, text_config={"num_hidden_layers": 2}).text_config,
    ):
        assert fewer.layer_types == ["full_attention", "linear_attention"]


def test_layer_types_of_another_number_of_layers_are_refused(tmp_path):
    text = LongLLaVATextConfig(num_hidden_layers=3, layer_types=ATTENTION_FIRST)
    text.num_hidden_layers = 2
    for read in ("layers_block_type", "layers_num_experts"):
        with pytest.raises(ValueError, match=r"`num_hidden_layers` \(2\) must be equal .*`layer_types` \(3\)"):
            getattr(text, read)
    with pytest.raises(Exception, match="must be equal"):
        text.save_pretrained(tmp_path)
    text.layer_types = ATTENTION_FIRST[:2]
    assert text.layers_block_type == ["attention", "mamba"]


SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "decoder",
    [Qwen2Config(**SIZES), Qwen3Config(**SIZES), LlamaConfig(**SIZES), MistralConfig(**SIZES, sliding_window=None)],
)
def test_other_decoders(tmp_path, decoder):
    LongLLaVAConfig(text_config=decoder, pooling_order="after_projector").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config.text_config) is type(decoder) and config.pooling_order == "after_projector"
    assert config.text_config.model_type in SUPPORTED_DECODERS
    with pytest.raises(ValueError, match=decoder.model_type):
        native_to_published(config, "x")


@pytest.mark.parametrize("model_type", ["jamba", "mixtral", "gemma3_text", "granitemoe", "mamba2"])
def test_decoders_that_are_not_supported(model_type):
    for decoder in (CONFIG_MAPPING[model_type](), {"model_type": model_type}):
        with pytest.raises(ValueError, match=rf"`{model_type}` is not supported.*'longllava_text', 'qwen2', 'qwen3'"):
            LongLLaVAConfig(text_config=decoder)


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ({"model_type": "mistral"}, "has `sliding_window=4096`: set `sliding_window=None`"),
        (MistralConfig(sliding_window=8), "has `sliding_window=8`: set `sliding_window=None`"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "set `use_sliding_window=False`"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 99},
            "set `use_sliding_window=False`",
        ),
        (
            Qwen2Config(**SIZES, layer_types=["full_attention", "sliding_attention"]),
            r"\['sliding_attention'\] are among",
        ),
    ],
)
def test_sliding_windows_are_refused(decoder, message):
    with pytest.raises(ValueError, match=message):
        LongLLaVAConfig(text_config=decoder)
