"""PEFT's adapters, on whatever they may be put: trained, generated with, merged; or refused."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from longllava_hf import LongLLaVAForCausalLM, LongLLaVAForConditionalGeneration, LongLLaVAInt8Config
from longllava_hf.training import lora_targets

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
    with torch.no_grad():  # so that DoRA is more than LoRA
        for name, parameter in model.named_parameters():
            parameter.mul_(1.3 if "magnitude" in name else 1)
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


PARTS = {
    "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mamba": {"in_proj", "x_proj", "dt_proj", "out_proj"},
    "experts": {"experts.gate_up_proj", "experts.down_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj"},
    "projector": {"linear_1", "linear_2"},
}


def targeted(model, **kwargs) -> set[str]:
    return set(
        peft.get_peft_model(model, peft.LoraConfig(target_modules=lora_targets(model, **kwargs))).targeted_module_names
    )


@pytest.mark.parametrize("parts", [None, *PARTS])
def test_lora_targets(parts):
    """All linear layers but those of the tower and the head, whichever PEFT would take by itself."""
    model = fresh()
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    wanted = PARTS if parts is None else {parts: PARTS[parts]}
    leaves = tuple(f".{leaf}" for names in wanted.values() for leaf in names)
    expected = {name for name in linear if name.endswith(leaves) and "vision_tower" not in name}
    if parts == "mlp":
        expected = {name for name in expected if ".experts." not in name}
    assert targeted(model, parts=parts and [parts]) == expected
    if parts is None:
        assert {name for name in linear - expected if "vision_tower" not in name} == {"lm_head"}


@pytest.mark.parametrize("kind", ["decoder alone", "base", "qwen2", "int8"])
def test_lora_targets_of_other_models(tmp_path, kind):
    if kind == "decoder alone":
        model = LongLLaVAForCausalLM(small_config().text_config)
    elif kind == "base":
        model = fresh().model
    elif kind == "qwen2":
        model = LongLLaVAForConditionalGeneration(small_config(text_config={"model_type": "qwen2"}))
    else:
        fresh().save_pretrained(tmp_path)
        options = {"quantization_config": LongLLaVAInt8Config()}
        model = LongLLaVAForConditionalGeneration.from_pretrained(tmp_path, **options)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert targeted(model) == {name for name in linear if "vision_tower" not in name and name != "lm_head"}


def test_lora_targets_are_refused():
    with pytest.raises(ValueError, match=r"'mlp', 'projector'\], but has \['router'\]"):
        lora_targets(fresh(), ["mlp", "router"])
    with pytest.raises(ValueError, match=r"but has \['experts'\]"):
        lora_targets(LongLLaVAForConditionalGeneration(small_config(text_config={"num_experts": 1})), ["experts"])
    model = fresh()
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="without adapters"):
        lora_targets(model)
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(fresh(), peft.LoraConfig())


@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_int8_is_refused(tmp_path, safe):
    """PEFT would fail obscurely, or round the adapter to int8 without a word."""
    fresh().save_pretrained(tmp_path)
    config = {"quantization_config": LongLLaVAInt8Config()}
    base = LongLLaVAForConditionalGeneration.from_pretrained(tmp_path, **config)
    lora = peft.LoraConfig(target_modules=["q_proj", "gate_up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, lora).eval()
    with torch.no_grad():
        expected = model(**INPUTS).logits
        for merge in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(ValueError, match=r"cannot be merged into int8 .* `dequantize\(\)`"):
                merge(safe_merge=safe)
        assert torch.equal(model(**INPUTS).logits, expected)
        model.dequantize()
        torch.testing.assert_close(model.merge_and_unload()(**INPUTS).logits, expected, rtol=1e-4, atol=1e-4)
    # Into layers that are not quantised it can be.
    model = LongLLaVAForConditionalGeneration.from_pretrained(tmp_path, **config)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["x_proj"], init_lora_weights=False)).eval()
    with torch.no_grad():
        expected = model(**INPUTS).logits
        torch.testing.assert_close(model.merge_and_unload()(**INPUTS).logits, expected, rtol=1e-4, atol=1e-4)


def test_dora_on_int8_is_refused(tmp_path):
    """Of which PEFT would take the norms without the scales."""
    fresh().save_pretrained(tmp_path)
    config = {"quantization_config": LongLLaVAInt8Config()}
    base = LongLLaVAForConditionalGeneration.from_pretrained(tmp_path, **config)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(NotImplementedError, match=r"`layers.4.self_attn.q_proj` has DoraLinearVariant"):
        model.train()
    model.save_pretrained(tmp_path / "adapter")
    base = LongLLaVAForConditionalGeneration.from_pretrained(tmp_path, **config)
    with pytest.raises(NotImplementedError, match="LoRA must be plain"):
        peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
