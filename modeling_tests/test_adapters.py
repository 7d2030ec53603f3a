"""PEFT's adapters, on whatever they may be put: trained, generated with, merged; or refused."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from longllava_hf import LongLLaVAForConditionalGeneration, LongLLaVAInt8Config

from .conftest import small_config
from .test_context_properties import build
from .test_generation_longllava import IDS, LOGITS, PICTURES, WITH_PICTURES


peft = pytest.importorskip("peft")
INPUTS = {"input_ids": WITH_PICTURES, "pixel_values": PICTURES}


def fresh() -> LongLLaVAForConditionalGeneration:
    torch.manual_seed(0)
    return LongLLaVAForConditionalGeneration(small_config()).eval()


@torch.no_grad()
def assert_generates(model, **inputs) -> None:
    output = model.generate(**inputs, max_new_tokens=4, **LOGITS)
    expected = model(**{**inputs, "input_ids": output.sequences, "use_cache": False}).logits[:, -5:-1]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("target", ["embed_tokens", "dt_proj", "in_proj", "lm_head", "linear_1", "o_proj"])
def test_lora(target, use_dora):
    if target == "embed_tokens" and use_dora:
        pytest.skip("its magnitudes take other paths through PEFT; see plain LoRA")
    config = peft.LoraConfig(target_modules=[target], r=2, init_lora_weights=False, use_dora=use_dora)
    plain = fresh()(**INPUTS).logits
    model = peft.get_peft_model(fresh(), config)
    model(**INPUTS, labels=WITH_PICTURES).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert grads and all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())
    assert_generates(model, **INPUTS)
    with torch.no_grad():
        expected = model(**INPUTS).logits
        assert (expected - plain).abs().max() > 1e-3
        torch.testing.assert_close(model.merge_and_unload()(**INPUTS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beside_lora", [False, True])
def test_trainable_tokens(beside_lora):
    if beside_lora:
        config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [7, 8]})
    else:
        config = peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[7, 8])
    model = peft.get_peft_model(fresh(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += 1.0
    model(**INPUTS, labels=WITH_PICTURES).loss.backward()
    trained = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert any("trainable_tokens" in name for name in trained)
    assert (model(**INPUTS).logits - fresh()(**INPUTS).logits).abs().max() > 1e-3
    assert_generates(model, **INPUTS)


@pytest.mark.parametrize("decoder", ["hybrid", "mamba", "attention"])
def test_prompt_tuning(decoder):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(build(decoder)), config).eval()
    model(input_ids=IDS, labels=IDS).loss.backward()
    if decoder == "mamba":
        with pytest.raises(ValueError, match="with `use_cache=False`"):
            model.generate(input_ids=IDS, max_new_tokens=2)
        assert_generates(model, input_ids=IDS, use_cache=False)
    else:
        assert_generates(model, input_ids=IDS)


def test_a_prefix_is_refused_by_mamba_layers():
    model = peft.get_peft_model(fresh(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="prefix tuning"):
        model(input_ids=IDS)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_folder_of_an_adapter(tmp_path, quantized):
    """Through the Auto class, which reads the base model that the folder names."""
    fresh().save_pretrained(tmp_path / "base")
    base = LongLLaVAForConditionalGeneration.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["in_proj"], r=2, init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    options = {"quantization_config": LongLLaVAInt8Config()} if quantized else {}
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter", **options)
    plain = LongLLaVAForConditionalGeneration.from_pretrained(tmp_path / "base", **options)
    with torch.no_grad():
        assert (model(**INPUTS).logits - plain(**INPUTS).logits).abs().max() > 1e-3
        if not quantized:
            torch.testing.assert_close(model(**INPUTS).logits, base(**INPUTS).logits)


def test_base_weights_reach_experts_below_an_adapter(tmp_path):
    """Through `load_state_dict`, one by one as they are saved."""
    fresh().save_pretrained(tmp_path)
    model = LongLLaVAForConditionalGeneration(small_config())
    peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*experts\.(gate_up_proj|down_proj)", r=2))
    found = model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert all("lora_" in name for name in found.missing_keys) and not found.unexpected_keys
    torch.testing.assert_close(model(**INPUTS).logits, fresh()(**INPUTS).logits)
