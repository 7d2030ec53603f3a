"""The memory plan against what is measured, and against the figures of the published shapes."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForImageTextToText, DynamicCache

import longllava_hf
from longllava_hf import LongLLaVAConfig
from longllava_hf.bitsandbytes_longllava import scale_bytes
from longllava_hf.cli import main
from longllava_hf.int8_longllava import named_quantization, weight_bytes
from longllava_hf.plan import MemoryPlanner, MemoryTracker, draw_plan, published_shape

from .conftest import published


def load(source, quantization: str):
    return AutoModelForImageTextToText.from_pretrained(
        source, dtype=torch.float32, quantization_config=named_quantization(quantization, torch.float32)
    ).eval()


def peak_of(run) -> int:
    """Bytes that the CPU's allocator hands out at most at a time while `run` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del result
    return peak


def prompt(config: LongLLaVAConfig, images: int) -> torch.Tensor:
    """As many tokens as the plan assumes: six around each picture, and 64 more."""
    return torch.tensor([([config.image_token_id] * config.image_seq_length + [7] * 6) * images + [9] * 64])


@pytest.mark.parametrize("quantization", ["none", "int8", "bnb-int8", "nf4"])
@pytest.mark.parametrize(("checkpoint", "images", "chunk"), [("tiny", 40, 256), ("tiny", 100, 4096), ("moe", 6, 512)])
def test_within_three_percent_of_what_is_measured(checkpoint, images, chunk, quantization):
    if "nf4" in quantization or "bnb" in quantization:
        pytest.importorskip("bitsandbytes")
    model = load(longllava_hf.TINY if checkpoint == "tiny" else published("moe"), quantization)
    config = model.config
    planner = MemoryPlanner(config, None, torch.float32, device="cpu", prefill_chunk_size=chunk, max_new_tokens=4)
    plan = planner._plan(images)
    size = config.vision_config.image_size
    ids, pixels = prompt(config, images), torch.randn(images, 3, size, size)
    cache = DynamicCache(config=config)
    arguments = {
        "attention_mask": torch.ones_like(ids),
        "past_key_values": cache,
        "prefill_chunk_size": chunk,
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
    }
    with torch.no_grad():
        model(ids[:, -32:])  # what is allocated once is not the run's
    peak = peak_of(lambda: model.generate(input_ids=ids, pixel_values=pixels, **arguments))
    assert sum(plan.weights.values()) == model.get_memory_footprint()
    measured = model.get_memory_footprint() + peak + pixels.nbytes + 2 * ids.nbytes
    assert plan.total == pytest.approx(measured, rel=0.03)
    leaves = torch.utils._pytree.tree_leaves([vars(layer) for layer in cache.layers])
    storages = {t.data_ptr(): t.untyped_storage().nbytes() for t in leaves if isinstance(t, torch.Tensor)}
    kept = sum(storages.values())
    assert plan.items["KV cache"] + plan.items["Mamba states"] == pytest.approx(kept, rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_within_three_percent_of_what_is_measured_on_a_gpu(quantization):
    """Weights, cache and features; the largest activation is bounded, as kernels allocate inside."""
    model = AutoModelForImageTextToText.from_pretrained(
        longllava_hf.TINY,
        dtype=torch.bfloat16,
        device_map={"": 0},
        quantization_config=named_quantization(quantization),
    ).eval()
    assert torch.cuda.memory_allocated() == pytest.approx(
        sum(MemoryPlanner(model.config, quantization).weights.values()), rel=0.03, abs=2**20
    )


@pytest.mark.parametrize(
    ("shape", "quantization", "gibibytes"), [("53b", "int8", 57), ("53b", "nf4", 32), ("9b", "int8", 13)]
)
def test_weights_of_the_published_shapes(shape, quantization, gibibytes):
    planner = MemoryPlanner(published_shape(shape), quantization)
    total = sum(planner.weights.values())
    assert 0.8 * gibibytes < total / 2**30 <= gibibytes
    assert planner.weights["bfloat16"] == pytest.approx(7.62e9, rel=0.01)  # Mamba, embeddings, head, tower


def test_a_thousand_images_fit_80_gigabytes_in_int8():
    planner = MemoryPlanner(published_shape("53b"), "int8")
    plan = planner.plan(1000)
    assert plan.fits and plan.max_images > 1000
    assert plan.items["KV cache"] == 16 * 1024 * plan.tokens  # 16 KiB a token, as the paper has it
    assert planner._plan(plan.max_images).fits and not planner._plan(plan.max_images + 1).fits
    unquantized = MemoryPlanner(published_shape("53b"), "none").plan(1)
    assert not unquantized.fits and unquantized.max_images == 0


def test_a_quantized_checkpoint_is_recognized(tmp_path):
    load(longllava_hf.TINY, "int8").save_pretrained(tmp_path)
    assert MemoryPlanner(LongLLaVAConfig.from_pretrained(tmp_path)).quantization == "int8"
    assert MemoryPlanner(LongLLaVAConfig.from_pretrained(longllava_hf.TINY)).quantization == "none"


def test_another_decoder():
    """Nothing here knows more of a decoder than its classes do."""
    text = {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
    }
    plan = MemoryPlanner(LongLLaVAConfig(text_config=text), "int8").plan(10)
    assert plan.items["Mamba states"] == 0
    assert plan.items["KV cache"] == 3 * 2 * 2 * 16 * 2 * plan.tokens


def test_layer_types_that_were_given():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    types = ["full_attention", "linear_attention", "linear_attention", "full_attention", "linear_attention"]
    text = {**sizes, "vocab_size": 1000, "num_experts": 1, "num_hidden_layers": 5, "layer_types": types}
    plan = MemoryPlanner(LongLLaVAConfig(text_config=text)).plan(10)
    assert plan.items["KV cache"] == 2 * 2 * 2 * 16 * 2 * plan.tokens


def test_tracker():
    with MemoryTracker() as tracker:
        a = torch.ones(1000)
        b = a.view(10, 100)  # the same bytes
        c = a + b.flatten()
        del c
        d = torch.ones(500)
    assert (tracker.live, tracker.peak) == (6000, 8000)
    del a, b, d
    assert tracker.live == 0


def test_scale_bytes_of_a_model_without_scales(small_model):
    assert scale_bytes(small_model) == 0
    assert sum(weight_bytes(small_model, "none").values()) == small_model.get_memory_footprint()


def test_drawing(tmp_path):
    pytest.importorskip("matplotlib")
    config = LongLLaVAConfig.from_pretrained(longllava_hf.TINY)
    planner = MemoryPlanner(config, memory=10**8, prefill_chunk_size=64)
    draw_plan(planner, planner.plan(100), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["plan.png"]


def test_command(capsys):
    assert (
        main(["plan", longllava_hf.TINY, "--images", "10", "--quantization", "int8", "--memory", "0.05", "--json"])
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["fits"] and result["max_images"] > 10
    assert result["total"] == sum(result["weights"].values()) + sum(result["items"].values())
    assert main(["plan", longllava_hf.TINY, "--images", "10", "--memory", "0.001"]) == 0
    out = capsys.readouterr().out
    assert "weights, all" in out and "does not fit in 0.001 GB; so do up to 0 images" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "either a MODEL"),
        (["plan", "model", "--shape", "9b"], "either a MODEL"),
        (["plan", "--shape", "9b", "--images", "-1"], "at least 0, but is -1"),
        (["plan", "no/such/folder/at/all"], "no/such/folder"),
        (["plan", "--shape", "9b", "--prefill-chunk-size", "0"], "at least 1, but is 0"),
        (["plan", "--shape", "9b", "--max-new-tokens", "-5"], "at least 0, but is -5"),
        (["plan", "--shape", "9b", "--memory", "inf"], "--memory"),
        (["plan", "--shape", "9b", "--memory", "-1"], "`memory`"),
        (["plan", "--shape", "9b", "--plot", "no/such/folder/plan.png"], "no/such/folder/plan.png"),
    ],
)
def test_command_with_bad_arguments(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
