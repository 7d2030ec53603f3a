"""Transformers' tensor parallelism: two processes give the logits of one, and what cannot be cut is refused."""

import os
import re

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.distributed import DistributedConfig

from longllava_hf import (
    TINY,
    LongLLaVAForCausalLM,
    LongLLaVAForConditionalGeneration,
    LongLLaVAInt8Config,
    LongLLaVATextConfig,
    LongLLaVATextModel,
)

from .conftest import published, small_config


IDS = torch.tensor([[1, 20, 30, 40, 50], [1, 21, 31, 41, 51]])


def test_every_entry_of_the_plan_is_a_layer_that_divides():
    model = LongLLaVATextModel(small_config().text_config)
    modules = {re.sub(r"\b\d+\b", "*", name): module for name, module in model.named_modules()}
    for name, style in LongLLaVATextConfig.base_model_tp_plan.items():
        kinds = {torch.nn.Linear: ("colwise", "rowwise"), torch.nn.Embedding: ("embedding_rowwise",)}
        assert style in kinds[type(modules[name])]
    assert not any(re.search("mamba|experts|router", name) for name in LongLLaVATextConfig.base_model_tp_plan)


@pytest.fixture
def two_processes(monkeypatch):
    """As far as a configuration is told."""
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.parametrize("part", ["feed_forward.experts", "feed_forward.experts.down_proj", "mamba.in_proj"])
def test_what_stays_whole_is_not_cut(part, two_processes):
    """Experts whose outputs are added although each device has all of them gave another answer."""
    plan = {f"model.language_model.layers.*.{part}": "rowwise"}
    config = {"tp_plan": plan, "tp_size": 2}
    for options in (
        {"distributed_config": DistributedConfig(**config)},
        {"distributed_config": config},
        {"tp_plan": plan},
    ):
        with pytest.raises(ValueError, match=f"stay whole on each device.*{re.escape(part)}"):
            AutoModelForImageTextToText.from_pretrained(TINY, **options)


@pytest.mark.parametrize("options", [{"tp_size": 2}, {"tp_plan": "auto"}, {"tp_size": 2, "tp_plan": {}}])
def test_expert_parallelism_is_refused(options, two_processes):
    config = {"enable_expert_parallel": True, **options}
    for distributed in (DistributedConfig(**config), config):
        with pytest.raises(
            ValueError, match="experts stay whole on each device, but expert parallelism was asked for"
        ):
            AutoModelForImageTextToText.from_pretrained(TINY, distributed_config=distributed)


def test_pipeline_parallelism_is_refused():
    """Transformers puts stages into `forward` alone."""
    with pytest.raises(ValueError, match="no pipeline parallelism: `device_map`"):
        LongLLaVAForCausalLM.from_pretrained(TINY, distributed_config={"pp_size": 2})


def test_quantised_weights_are_not_cut():
    config = {"tp_plan": "auto", "tp_size": 2}
    for distributed in (DistributedConfig(**config), config):
        options = {"quantization_config": LongLLaVAInt8Config(), "distributed_config": distributed}
        with pytest.raises(ValueError, match="Quantised weights are not cut"):
            AutoModelForImageTextToText.from_pretrained(TINY, **options)


def run_rank(rank: int, folder: str, name: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", ACCELERATE_USE_CPU="true")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    parallel = {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=2)}
    whole = LongLLaVAForConditionalGeneration.from_pretrained(name).eval()
    model = LongLLaVAForConditionalGeneration.from_pretrained(name, **parallel).eval()
    cut = {
        n.split(".layers.4.")[1] for n, p in model.named_parameters() if hasattr(p, "placements") and ".layers.4." in n
    }
    assert {f"self_attn.{kind}_proj.weight" for kind in "qkvo"} < cut, cut
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, whole(IDS).logits, rtol=1e-4, atol=1e-4)
    pictures = torch.rand(1, 3, *[model.config.vision_config.image_size] * 2)
    torch.distributed.broadcast(pictures, 0)
    size, token = model.config.image_seq_length, model.config.image_token_id
    inputs = {"input_ids": torch.tensor([[1, *[token] * size, 30, 40]]), "pixel_values": pictures}
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**inputs, **greedy), whole.generate(**inputs, **greedy))
    model.save_pretrained(f"{folder}/saved")
    torch.distributed.barrier()
    again = LongLLaVAForConditionalGeneration.from_pretrained(f"{folder}/saved")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "dense", "tied"])
def test_two_processes_give_the_logits_of_one(tmp_path, kind):
    """
    `native` has experts, which each process computes whole; `dense` is a published checkpoint, as the 9B one; logits of a
    `tied` head that was cut without its embedding were twice as many.
    """
    name = published(kind) if kind == "dense" else tmp_path / kind
    if kind == "native":
        model = LongLLaVAForConditionalGeneration.from_pretrained(TINY)
        model.resize_token_embeddings(414)  # of 413 Transformers 5.17 cannot give each process as many
        model.save_pretrained(name)
    elif kind == "tied":
        torch.manual_seed(0)
        LongLLaVAForConditionalGeneration(small_config(tie_word_embeddings=True)).save_pretrained(name)
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path), str(name)), nprocs=2)
