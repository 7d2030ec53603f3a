"""
What a new release of Transformers may break without a word, in a few seconds: run first, here and by the canary.
"""

import inspect
import logging
import warnings

import pytest
import torch
from PIL import Image
from transformers import (
    BatchFeature,
    DynamicCache,
    PreTrainedModel,
    ProcessorMixin,
    Trainer,
    TrainingArguments,
)
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer
from transformers.generation import GenerationMixin

import longllava_hf
from longllava_hf import LongLLaVAForCausalLM, LongLLaVAForConditionalGeneration, LongLLaVAProcessor
from longllava_hf.cache_longllava import LongLLaVACache, PreallocatedLayer, RecurrentLayer
from longllava_hf.compat_longllava import CACHE, get_cache, take_cache

from .test_context_properties import DECODERS, build


IDS = torch.randint(6, 120, (1, 20), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("decoder", ["hybrid", "qwen2"])
def test_generate_fills_the_users_cache(decoder, name):
    model = build(decoder)
    cache = DynamicCache(config=model.config.get_text_config())
    kinds = [type(layer) for layer in cache.layers]
    model.generate(IDS, **{name: cache}, **GREEDY)
    assert cache.get_seq_length() == 24
    assert [type(layer) for layer in cache.layers] == kinds  # its own, as it was given
    with pytest.raises(ValueError, match="both `cache` and `past_key_values`"):
        model.generate(IDS, cache=cache, past_key_values=DynamicCache(), **GREEDY)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_forward_fills_the_users_cache(name):
    model = build("hybrid")
    for one in (model, model.model, model.model.language_model):
        cache = DynamicCache(config=model.config.get_text_config())
        outputs = one(IDS, **{name: cache}, use_cache=True)
        assert cache.get_seq_length() == 20 and get_cache(outputs) is cache


@pytest.mark.parametrize("decoder", DECODERS)
def test_greedy_equals_no_cache(decoder):
    model, options = build(decoder), {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    cached, plain = model.generate(IDS, **options), model.generate(IDS, use_cache=False, **options)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"input_ids": IDS[0], "labels": IDS[0]}


def test_trainer_predicts(tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), report_to="none", use_cpu=True, per_device_eval_batch_size=2, disable_tqdm=True
    )
    output = Trainer(model=build("hybrid"), args=arguments).predict(Rows())
    assert output.predictions.shape == (4, 20, 120)


def test_a_checkpointed_layer_drops_the_cache(small_model):
    small_model.train()
    small_model.gradient_checkpointing_enable()
    outputs = small_model(IDS, labels=IDS, use_cache=True)
    outputs.loss.backward()  # a layer that is run again must not find what it has written
    assert get_cache(outputs) is None or get_cache(outputs).get_seq_length() == 0


def test_frames_survive_a_chat(tiny_processor):
    frames = [Image.new("RGB", (48, 48), (10 * i, 0, 0)) for i in range(3)]
    content = [{"type": "video", "video": frames}, {"type": "text", "text": "?"}]
    inputs = tiny_processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert isinstance(inputs, BatchFeature) and len(inputs["pixel_values"]) == 3
    text = tiny_processor.decode(inputs["input_ids"][0])
    assert text.count("<t>") == 2 and text.count("<vid>") == 1


OVERRIDES = [
    (LongLLaVAForConditionalGeneration, GenerationMixin),
    (LongLLaVAForConditionalGeneration, PreTrainedModel),
    (LongLLaVAForCausalLM, GenerationMixin),
    (LongLLaVAProcessor, ProcessorMixin),
    (longllava_hf.LongLLaVAImageProcessor, longllava_hf.LongLLaVAImageProcessor.__mro__[1]),
    (LongLLaVACache, DynamicCache),
    (PreallocatedLayer, DynamicLayer),
    (RecurrentLayer, LinearAttentionLayer),
]


def overridden() -> list:
    found = []
    for ours, theirs in OVERRIDES:
        for name in sorted(set(dir(theirs)) - {"__init__"}):
            method, parent = getattr(ours, name), getattr(theirs, name)
            if not callable(method) or method is parent or not inspect.isfunction(inspect.unwrap(parent)):
                continue
            if "longllava_hf" in getattr(inspect.unwrap(method), "__module__", ""):
                found.append(pytest.param(method, parent, id=f"{ours.__name__}.{name}"))
    return found


@pytest.mark.parametrize(("method", "parent"), overridden())
def test_overrides_take_what_their_parents_take(method, parent):
    ours, theirs = inspect.signature(method).parameters, inspect.signature(parent).parameters
    kinds = [parameter.kind for parameter in ours.values()]
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds
    lacking = [
        name
        for name, parameter in theirs.items()
        if name not in ours
        and not takes_any
        and parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    ]
    assert not lacking


def test_layers_are_the_hosts():
    """Every layer of our cache is of the class that the host's own cache has there, and takes all that is done to rows."""
    config = build("hybrid").config
    for ours, theirs in zip(LongLLaVACache(config).layers, DynamicCache(config=config).layers, strict=True):
        assert isinstance(ours, type(theirs))
        for name in ("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "crop", "reset"):
            assert callable(getattr(Cache, name)) and callable(getattr(ours, name))


def test_nothing_of_ours_is_deprecated(small_model, tiny_processor, caplog):
    """A call of ours that the host will not know any more."""
    logging.getLogger("transformers").propagate = True
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=FutureWarning, module=r"longllava_hf\.")
        context = small_model.prefill(IDS)
        small_model.generate(torch.tensor([[7, 8]]), cache=context, **GREEDY)
        small_model.generate(IDS, num_beams=2, **GREEDY)
        small_model(IDS, labels=IDS, output_hidden_states=True).loss.backward()
        messages = [{"role": "user", "content": "Hello"}]
        tiny_processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    deprecations = [r.getMessage() for r in caplog.records if "deprecated" in r.getMessage()]
    assert not deprecations


def test_names_of_a_cache():
    assert CACHE in ("cache", "past_key_values")
    cache = DynamicCache()
    assert take_cache({"cache": cache}) is take_cache({"past_key_values": cache}) is cache
    for model in (LongLLaVAForConditionalGeneration, LongLLaVAForCausalLM):
        for method in (model.forward, model.prepare_inputs_for_generation):
            assert CACHE in inspect.signature(method).parameters
