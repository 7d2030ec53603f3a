"""Int8 and 4 bits: what is quantised, what it costs, and that everything else goes on working."""

import copy
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig, TorchAoConfig

import longllava_hf
from longllava_hf import LongLLaVAForCausalLM, LongLLaVAForConditionalGeneration, LongLLaVAInt8Config
from longllava_hf.bitsandbytes_longllava import BlockwiseWeight, use_own_products
from longllava_hf.experts_longllava import unpack_experts
from longllava_hf.grouped_linear_longllava import quantize_rows, scaled_linear
from longllava_hf.int8_longllava import LongLLaVAInt8Linear, named_quantization, skip_patterns

from .conftest import expert_matrix, golden, published, small_config


bitsandbytes = pytest.importorskip("bitsandbytes")

KEPT = ("mamba", "router", "embed", "lm_head", "projector", "vision_tower", "norm")
METHODS = ("int8", "bnb-int8", "nf4")


def load(source=None, quantization: str | None = None, dtype=torch.float32, **kwargs):
    source = published("moe") if source is None else source
    if quantization is not None:
        kwargs["quantization_config"] = named_quantization(quantization, dtype)
    return AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, **kwargs).eval()


def text_ids(batch: int = 1) -> torch.Tensor:
    return torch.tensor(golden("moe")["text_ids"]).view(1, -1).repeat(batch, 1)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(text_ids()).logits


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.cosine_similarity(a[:, -1].float(), b[:, -1].float(), dim=-1).min().item()


def kinds(model) -> dict[str, set[torch.dtype]]:
    """Dtypes of the weights, by the part of the model they belong to."""
    found: dict[str, set[torch.dtype]] = {}
    for name, parameter in model.named_parameters():
        if name.endswith("weight_scale"):
            continue
        part = next(p for p in (*KEPT, "experts", "self_attn", "feed_forward") if p in name)
        found.setdefault(part, set()).add(parameter.dtype)
    return found


@pytest.fixture(scope="module")
def unquantized():
    return logits(load())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "also_kept"),
    [
        (BitsAndBytesConfig(load_in_8bit=True), ()),
        (BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["mamba"]), ()),
        (BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["self_attn"]), ("self_attn",)),
        (
            BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["experts", "self_attn"]),
            ("experts", "self_attn"),
        ),
        (LongLLaVAInt8Config(), ()),
        (LongLLaVAInt8Config(modules_to_not_convert=["self_attn"]), ("self_attn",)),
        ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, ()),
    ],
    ids=["bnb", "bnb mamba", "bnb attention", "bnb experts", "own", "own attention", "dict"],
)
def test_what_is_int8_and_what_is_not(config, also_kept, dtype):
    before = json.dumps(config if isinstance(config, dict) else config.to_dict(), default=str)
    model = load(dtype=dtype, quantization_config=config)
    for part, dtypes in kinds(model).items():
        assert dtypes == ({dtype} if part in (*KEPT, *also_kept) else {torch.int8}), part
    assert cosine(logits(model), logits(load(dtype=dtype))) > 0.999
    # The caller's own object is as it was.
    assert before == json.dumps(config if isinstance(config, dict) else config.to_dict(), default=str)


def test_what_is_four_bits_and_what_is_not(unquantized):
    model = load(quantization="nf4")
    for part, dtypes in kinds(model).items():
        assert dtypes == {torch.float32 if part in KEPT else torch.uint8}, part
    assert cosine(logits(model), unquantized) > 0.85  # a random model forgives less than a trained one


@pytest.mark.parametrize(
    ("names", "module", "is_skipped"),
    [
        (["mamba"], "model.language_model.layers.0.mamba.in_proj", True),
        (["layers.1"], "model.language_model.layers.1.feed_forward.down_proj", True),
        (["layers.1"], "model.language_model.layers.11.feed_forward.down_proj", False),
        (["o_proj"], "model.language_model.layers.4.self_attn.o_proj", True),
        ([], "model.language_model.layers.4.self_attn.o_proj", False),
        ([r"layers\.\d+\.self_attn"], "model.language_model.layers.4.self_attn.o_proj", True),
        ([], "model.vision_tower.encoder.layers.0.mlp.fc1", True),
        ([], "lm_head", True),
        ([], "model.multi_modal_projector.linear_1", True),
    ],
)
def test_names_count_in_the_middle_of_a_path(names, module, is_skipped):
    from transformers.quantizers.quantizers_utils import should_convert_module

    assert should_convert_module(module, skip_patterns(names)) is not is_skipped
    assert skip_patterns(skip_patterns(names)) == skip_patterns(names)


def test_experts_are_those_of_the_checkpoint():
    """Row by row and expert by expert, in the right order."""
    dense = dict(load().named_modules())
    for method in METHODS:
        for name, module in load(quantization=method).named_modules():
            if not re.search(r"experts\.(gate_up|down)_proj$", name):
                continue
            weight = dense[name].weight.view(4, -1, module.in_features)
            with unpack_experts(module, 4) as experts:
                for expert in range(4):
                    matrix = expert_matrix(experts, expert, torch.float32)
                    if method == "nf4":
                        assert (matrix - weight[expert]).abs().max() < 0.2 * weight.abs().max()
                    else:
                        step = weight[expert].abs().amax(-1, keepdim=True) / 127
                        assert ((matrix - weight[expert]).abs() <= 0.55 * step).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_reload_are_exact(tmp_path, method, dtype):
    model = load(quantization=method, dtype=dtype)
    expected = logits(model)
    model.generate(text_ids(), max_new_tokens=3, do_sample=False)  # saving comes after use, too
    model.save_pretrained(tmp_path / "once")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "once").eval()
    assert kinds(again) == kinds(model)
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "twice", max_shard_size="200KB")
    assert torch.equal(logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "twice").eval()), expected)
    with safe_open(tmp_path / "once" / "model.safetensors", framework="pt") as file:
        name = "model.language_model.layers.1.feed_forward.experts.gate_up_proj.weight"
        assert file.get_tensor(name).dtype == (torch.uint8 if method == "nf4" else torch.int8)


@pytest.mark.parametrize("method", METHODS)
def test_dequantize(tmp_path, method, unquantized):
    model = load(quantization=method)
    quantized = logits(model)
    model.save_pretrained(tmp_path / "quantized")  # leaves nothing behind that hinders
    model.dequantize()
    assert not getattr(model, "is_quantized", False)
    assert {dtype for dtypes in kinds(model).values() for dtype in dtypes} == {torch.float32}
    torch.testing.assert_close(logits(model), quantized, rtol=1e-3, atol=1e-3)
    # And saved it is a checkpoint like any other, one tensor for each expert.
    model.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(load(tmp_path / "dense")), logits(model))
    with safe_open(tmp_path / "dense" / "model.safetensors", framework="pt") as file:
        assert "model.language_model.layers.1.feed_forward.experts.3.up_proj.weight" in file.keys()


@pytest.mark.parametrize("method", METHODS)
def test_generate_with_images_and_a_batch(tmp_path, method):
    torch.manual_seed(0)
    LongLLaVAForConditionalGeneration(small_config()).save_pretrained(tmp_path)
    model = load(tmp_path, quantization=method)
    pixels = torch.randn(3, 3, 16, 16)
    ids = torch.full((1, 3 * 4 + 5), 7)
    ids[0, :12] = 5
    alone = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=6, do_sample=False)
    chunked = model.generate(
        input_ids=ids, pixel_values=pixels, max_new_tokens=6, do_sample=False, prefill_chunk_size=5
    )
    beams = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=6, do_sample=False, num_beams=2)
    batch = model.generate(
        input_ids=ids.repeat(2, 1), pixel_values=pixels.repeat(2, 1, 1, 1), max_new_tokens=6, do_sample=False
    )
    assert torch.equal(alone, chunked) and torch.equal(batch[0], batch[1]) and torch.equal(batch[:1], alone)
    assert beams.shape[1] <= alone.shape[1]


@pytest.mark.parametrize("method", METHODS)
def test_memory_footprint_counts_every_byte(tmp_path, method):
    model = load(quantization=method)
    model.save_pretrained(tmp_path)
    stored = 0
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        for name in file.keys():
            # Not kept: a code book and settings for each 4-bit layer, and a format for each int8 one.
            if not re.search(r"quant_map$|quant_state|weight_format$", name):
                stored += file.get_tensor(name).nbytes
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    offsets = 4 * sum(name.endswith("nested_absmax") for name in model.state_dict())
    assert model.get_memory_footprint() == stored + buffers + offsets


def test_memory_footprint_of_weights_made_of_others():
    """As torchao's, which say that they are of the dtype that they stand for."""
    model = load()
    before, projection = model.get_memory_footprint(), model.model.language_model.layers[4].self_attn.q_proj
    weight = projection.weight.detach()
    projection.weight = torch.nn.Parameter(TwoTensor(weight, weight.clone()))
    assert model.get_memory_footprint() == before + weight.nbytes


def test_torchao():
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig

    model, small = load(), load(quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    assert cosine(logits(model), logits(small)) > 0.99
    layers = [layer for layer in small.modules() if hasattr(getattr(layer, "weight", None), "__tensor_flatten__")]
    assert any(layer is small.model.language_model.layers[1].feed_forward.experts.down_proj for layer in layers)
    # A byte in place of four; scales and zero points of rows take some back.
    saved, most = (
        model.get_memory_footprint() - small.get_memory_footprint(),
        3 * sum(x.weight.numel() for x in layers),
    )
    assert most - 16 * sum(len(layer.weight) for layer in layers) < saved < most


@pytest.mark.parametrize("method", ["none", *METHODS])
def test_a_lora_step_on_top(method):
    peft = pytest.importorskip("peft")
    model = load(quantization=method)
    before = logits(model)
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", exclude_modules=r".*(vision_tower|multi_modal_projector).*", lora_dropout=0.1
    )
    model = peft.get_peft_model(model, config)
    assert any("experts.gate_up_proj.lora_A" in name for name, _ in model.named_parameters())
    assert torch.allclose(logits(model), before, atol=1e-5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(4):
        model.train()
        loss = model(text_ids(), labels=text_ids()).loss
        loss.backward()
        if step == 1:  # B is zero in the first
            assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    with model.disable_adapter():
        assert torch.allclose(logits(model), before, atol=1e-5)
    if method == "none":
        trained = logits(model)
        assert torch.allclose(logits(model.merge_and_unload()), trained, atol=1e-4)


def test_gradients_of_a_quantized_model_equal_those_of_its_dequantized_self():
    embeddings = torch.randn(1, 20, 64)
    grads = []
    model = load(quantization="int8")
    for _ in range(2):
        x = embeddings.clone().requires_grad_()
        model(inputs_embeds=x).logits.square().mean().backward()
        grads.append(x.grad)
        model.dequantize() if model.is_quantized else None
    assert ((grads[0] - grads[1]).abs().max() / grads[1].abs().max()) < 1e-4


def test_adapters_that_experts_cannot_have_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["gate_up_proj"], use_dora=True)
    model = peft.get_peft_model(load(), config)
    with pytest.raises(NotImplementedError, match="plain LoRA"):
        logits(model)
    model = peft.get_peft_model(load(), peft.LoraConfig(r=4, target_parameters=["experts.gate_up_proj.weight"]))
    with pytest.raises(NotImplementedError, match="plain LoRA"):
        logits(model)


def test_text_model_alone(tmp_path):
    torch.manual_seed(0)
    model = LongLLaVAForCausalLM(small_config().text_config).eval()
    model.save_pretrained(tmp_path)
    ids = torch.arange(6, 40)[None]
    with torch.no_grad():
        expected = model(ids).logits
        for method in ("int8", "bnb-int8"):
            quantized = AutoModelForCausalLM.from_pretrained(
                tmp_path, quantization_config=named_quantization(method)
            ).eval()
            assert quantized.model.layers[1].feed_forward.experts.down_proj.weight.dtype == torch.int8
            assert quantized.lm_head.weight.dtype == torch.float32
            assert cosine(quantized(ids).logits, expected) > 0.99


def test_own_int8_layer():
    torch.manual_seed(0)
    linear = torch.nn.Linear(40, 24)
    layer = LongLLaVAInt8Linear(40, 24, bias=True)
    layer.weight.data, layer.weight_scale.data = quantize_rows(linear.weight.detach())
    layer.bias = linear.bias
    x = torch.randn(3, 5, 40)
    torch.testing.assert_close(layer(x), layer.dequantize(torch.float32)(x), rtol=1e-4, atol=1e-5)
    assert torch.cosine_similarity(layer(x).flatten(), linear(x).flatten(), dim=0) > 0.9999
    scale = layer.weight_scale.clone()
    layer = layer.to(torch.bfloat16)  # the model's dtype is not the scales'
    assert layer.weight.dtype == torch.int8 and layer.weight_scale.dtype == torch.float32
    assert torch.equal(layer.weight_scale, scale) and layer.bias.dtype == torch.bfloat16


def test_layers_with_own_products_have_the_parameters_of_those_they_replace():
    model = torch.nn.Sequential(
        bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False), bitsandbytes.nn.Linear4bit(32, 64, bias=False)
    ).to("cpu")
    before = list(model)
    use_own_products(model)
    for old, new in zip(before, model):
        assert type(new) is not type(old) and isinstance(new, type(old))
        assert new.weight is old.weight and new.bias is old.bias and new.training == old.training
        assert vars(new).keys() == vars(old).keys()
    assert model[0].state is before[0].state
    assert model[1].weight.module is model[1] and model[1].quant_state is before[1].quant_state is not None
    assert model(torch.randn(3, 64)).shape == (3, 64)


def test_tiny_answers_the_same(capsys):
    """The README has the accuracies; here, that the film on its front page is still read."""
    from longllava_hf.cli import main

    pytest.importorskip("av")
    film = str(Path(__file__).parents[1] / "examples" / "film.mp4")
    for method in ("int8", "bnb-int8", "nf4"):
        assert main(["ask", film, "Which digit appears in this film?", "--quantization", method, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["answer"] == "5", method


@pytest.mark.parametrize("storage", ["uint8", "int8", "bfloat16", "float32"])
@pytest.mark.parametrize("double", [False, True])
def test_four_bits_in_every_storage(tmp_path, storage, double):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_quant_storage=storage,
        bnb_4bit_use_double_quant=double,
    )
    model = load(longllava_hf.TINY, quantization_config=config)
    ids = torch.arange(6, 33)[None]
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(ids).logits, expected)
        # The rows of this checkpoint do not end where blocks of 64 do.
        torch.testing.assert_close(model.dequantize()(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_four_bits_are_as_exact_as_they_can_be():
    dense = dict(load(longllava_hf.TINY).named_modules())
    for name, module in load(longllava_hf.TINY, quantization="nf4").named_modules():
        if getattr(getattr(module, "weight", None), "quant_state", None) is not None:
            matrix = BlockwiseWeight(module.weight).matrix(0, torch.float32)
            error = (matrix - dense[name].weight).norm() / dense[name].weight.norm()
            assert error < 0.12, name  # 0.09 for normally distributed weights


@pytest.mark.parametrize("offset", [0, 1, 4, 8, 16, 32])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_weights_at_any_address(rows, offset):
    """Tensors of a file lie where they lie."""
    weight, scale = quantize_rows(torch.randn(64, 96))
    memory = torch.zeros(64 * 96 + 64, dtype=torch.int8)
    start = (-memory.data_ptr()) % 64 + offset
    moved = memory[start : start + 64 * 96].view(64, 96).copy_(weight) if start + 64 * 96 <= len(memory) else weight
    x = torch.randn(rows, 96).bfloat16()
    assert torch.equal(scaled_linear(x, moved, scale), scaled_linear(x, moved.clone(), scale)) or torch.allclose(
        scaled_linear(x, moved, scale).float(), scaled_linear(x, weight, scale).float(), rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize("method", ["none", "int8", "bnb-int8"])
def test_weights_that_accelerate_keeps_elsewhere(tmp_path, method):
    accelerate = pytest.importorskip("accelerate")
    model = load(quantization=method)
    expected = logits(model)
    tokens = model.generate(text_ids(), max_new_tokens=4, do_sample=False)
    if method == "none":
        model = accelerate.cpu_offload(load(), execution_device="cpu")
        torch.testing.assert_close(logits(model), expected)
        assert torch.equal(model.generate(text_ids(), max_new_tokens=4, do_sample=False), tokens)
    if method != "bnb-int8":
        load(quantization=method).save_pretrained(tmp_path / "saved")
        places = {f"model.language_model.layers.{i}": "disk" if i in (1, 2) else "cpu" for i in range(8)}
        for name in ("vision_tower", "multi_modal_projector", "language_model.embed_tokens"):
            places[f"model.{name}"] = "cpu"
        places["model.language_model.final_layernorm"] = places["lm_head"] = "cpu"
        model = AutoModelForImageTextToText.from_pretrained(
            tmp_path / "saved", device_map=places, offload_folder=tmp_path / "offload"
        ).eval()
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_copies(method):
    model = load(quantization=method)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)


@pytest.mark.parametrize("method", ["bnb-int8", "nf4"])
def test_disabling_a_merged_adapter(method):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["gate_up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(load(quantization=method), config).eval()
    model.merge_adapter()
    with model.disable_adapter():
        first, second = logits(model), logits(model)
    assert torch.equal(first, second)


def test_an_adapter_for_each_row_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load(), peft.LoraConfig(r=4, target_modules=["gate_up_proj"])).eval()
    with pytest.raises(NotImplementedError, match="the same for all rows"):
        model(input_ids=text_ids(2), adapter_names=["default", "__base__"])


# Errors


def test_without_bitsandbytes_the_error_says_what_works(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    with pytest.raises(ImportError, match=r"longllava_hf\[int8\].*LongLLaVAInt8Config"):
        load(quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(ImportError, match=r"longllava_hf\[int8\]"):
        named_quantization("nf4")
    load(quantization_config=LongLLaVAInt8Config())


@pytest.mark.parametrize(
    ("stored", "asked", "words"),
    [
        ("bnb-int8", "nf4", ["bitsandbytes int8", "bitsandbytes nf4"]),
        ("bnb-int8", "int8", ["bitsandbytes int8", "longllava_int8"]),
        ("int8", "bnb-int8", ["longllava_int8", "bitsandbytes int8"]),
        ("nf4", "bnb-int8", ["bitsandbytes nf4", "bitsandbytes int8"]),
    ],
)
def test_another_quantization_than_the_checkpoints_is_refused(tmp_path, stored, asked, words):
    load(quantization=stored).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=".*".join(map(re.escape, ["already quantised", *words]))):
        load(tmp_path, quantization=asked)
    load(tmp_path, quantization=stored)  # asking for what it is, is no error


def test_a_gpu_that_is_too_small(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**6, 2 * 10**6))
    message = r"take 0\.0 GB, but cuda:0 has 0\.0 GB free.*in int8.*in nf4.*longllava plan"
    with pytest.raises(ValueError, match=message):
        load(device_map={"": 0})
    with pytest.raises(ValueError, match=r"in int8, but.*longllava plan"):
        load(device_map="cuda:0", quantization="int8")
    with pytest.raises(ValueError, match=message):  # one device, said in several ways
        load(device_map={"model": 0, "lm_head": "cuda:0"})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["layers.0.feed_forward.up_proj", "layers.1.feed_forward.experts"])
def test_a_weight_of_another_shape_is_named(tmp_path, method, name):
    load().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for key in tensors:
        if f"{name}." in key and "down_proj" not in key:
            tensors[key] = tensors[key][:, :50].contiguous()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"of another shape: .*layers\.\d\.feed_forward.*50\).*64\) in the model"):
        load(tmp_path, quantization=method)


@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_checkpoint_is_not_taken_for_another(tmp_path, method):
    load(quantization=method).save_pretrained(tmp_path)
    config = load().config
    with pytest.raises(ValueError, match=r"scales of quantised weights, such as .* no `quantization_config`"):
        load(tmp_path, config=config)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True), ValueError, "has_fp16_weight"),
        (LongLLaVAInt8Config(modules_to_not_convert="self_attn"), TypeError, "list of strings.*'self_attn'"),
        (LongLLaVAInt8Config(modules_to_not_convert=["a+("]), ValueError, r"'a\+\('.*no regular expression"),
    ],
)
def test_settings_that_make_no_sense(config, error, message):
    with pytest.raises(error, match=message):
        load(quantization_config=config)


def test_a_missing_expert_is_named_in_int8_too(published_copy):
    from .test_checkpoint_longllava import edit

    folder = published_copy()
    edit(folder, lambda tensors: tensors.pop("model.layers.1.moe.experts.2.up_proj.weight"))
    for method in METHODS:
        with pytest.raises(ValueError, match=r"1 missing: .*layers\.1\.feed_forward\.experts\.2\.up_proj\.weight"):
            load(folder, quantization=method)


# Loading


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("method", ["int8", "bnb-int8"])
def test_peak_memory_while_loading(method):
    """A 0.5 GB checkpoint here; `benchmarks/loading.py` takes 2 GB by default."""
    script = Path(__file__).parents[1] / "benchmarks" / "loading.py"
    result = subprocess.run(
        [
            sys.executable,
            str(script),
            "--gigabytes",
            "0.5",
            "--shard-megabytes",
            "60",
            "--quantization",
            method,
            "--json",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(result.stdout.splitlines()[-1])
    assert measured["peak"] < measured["limit"], measured


def test_import_needs_neither_bitsandbytes_nor_triton():
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['bitsandbytes'] = None\n"
        "import longllava_hf, torch\n"
        "from transformers import AutoModelForImageTextToText as A\n"
        "m = A.from_pretrained(longllava_hf.TINY, quantization_config=longllava_hf.LongLLaVAInt8Config())\n"
        "print(m.model.language_model.layers[1].feed_forward.experts.down_proj.weight.dtype)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split()[-1] == "torch.int8"


def test_public_names():
    assert "LongLLaVAInt8Config" in longllava_hf.__all__


@pytest.mark.parametrize("method", ["int8", "bnb-int8"])
@torch.no_grad()
def test_float16_does_not_overflow(method):
    """Sums of int8 values are up to 127 times those of the weights' share of their largest."""
    weight, x = torch.full((32, 4096), 0.01), torch.full((3, 4096), 2.0, dtype=torch.float16)
    values, scale = quantize_rows(weight)
    if method == "int8":
        layer = LongLLaVAInt8Linear(4096, 32)
        layer.weight.data, layer.weight_scale.data = values, scale
    else:
        bnb_layer = bitsandbytes.nn.Linear8bitLt(4096, 32, bias=False, has_fp16_weights=False)
        model = torch.nn.Sequential(bnb_layer)
        bnb_layer.weight = bitsandbytes.nn.Int8Params(values, requires_grad=False, CB=values, SCB=scale * 127)
        use_own_products(model)
        layer = model[0]
    torch.testing.assert_close(layer(x), torch.full((3, 32), 81.92, dtype=torch.float16), rtol=2e-3, atol=0)


def test_float16_gradients_of_small_scales():
    """A scale of float16 would be 0, or infinite with the sum of 4096 of them."""
    torch.manual_seed(0)
    for size in (1e-6, 1.0, 100.0):
        weight = torch.randn(64, 128) * size
        values, scale = quantize_rows(weight)
        x = (torch.randn(5, 128) / size**0.5).half().requires_grad_()
        output = scaled_linear(x, values, scale)
        output.backward(torch.ones_like(output))
        exact = (values.double() * scale.double()[:, None]).sum(0).expand(5, -1)
        assert (
            output.double() - x.double() @ (values.double() * scale.double()[:, None]).T
        ).abs().max() < 2e-3 * output.abs().max() + 1e-7
        assert (x.grad.double() - exact).abs().max() <= 1e-3 * exact.abs().max() + 6e-8
