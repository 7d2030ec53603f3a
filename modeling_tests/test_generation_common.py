"""
What Transformers tests of every model that generates, after the names of its tests, which its source distribution leaves
out. Logits are compared with those of a pass without a cache, or with another way of asking for the same.
"""

import copy

import pytest
import torch
from transformers import GenerationMixin, StaticCache

from longllava_hf import LongLLaVAForCausalLM
from longllava_hf.compat_longllava import get_cache
from longllava_hf.identity_longllava import hash_image

from .conftest import small_config
from .test_context_properties import build
from .test_generation_longllava import IDS, LOGITS, PICTURES, WITH_PICTURES, assert_as_without_cache


STATIC = {"cache_implementation": "static"}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
MODELS = {
    # Two rows that differ in their pictures alone.
    "hybrid": {"input_ids": WITH_PICTURES.repeat(2, 1), "pixel_values": torch.cat([PICTURES, PICTURES.flip(0)])},
    "attention": {"input_ids": WITH_PICTURES, "pixel_values": PICTURES},
    "text": {"input_ids": IDS},
}


@pytest.fixture(params=MODELS)
def case(request):
    """A model and its inputs."""
    inputs = dict(MODELS[request.param])
    if request.param != "text":
        return build(request.param), inputs
    torch.manual_seed(0)
    return LongLLaVAForCausalLM(build("hybrid").config.text_config).eval(), inputs


def logits(output) -> torch.Tensor:
    return torch.stack(output.logits, dim=1)


def without_cache(model, inputs, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(**{**inputs, "input_ids": ids}, use_cache=False).logits


def test_inherits_generation_mixin(case):
    assert isinstance(case[0], GenerationMixin) and case[0].can_generate()


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generate_dict_outputs(case, use_cache):
    model, inputs = case
    output = model.generate(**inputs, max_new_tokens=5, use_cache=use_cache, output_scores=True, **LOGITS)
    assert output.sequences.shape[1] == inputs["input_ids"].shape[1] + 5 and len(output.scores) == 5
    assert (get_cache(output) is not None) == use_cache
    expected = without_cache(model, inputs, output.sequences)[:, -6:-1]
    torch.testing.assert_close(logits(output), expected, **CLOSE)
    plain = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(plain, output.sequences)


def test_sample_generate_dict_output(case):
    model, inputs = case
    options = {**LOGITS, "do_sample": True, "top_k": 10, "num_return_sequences": 2, "max_new_tokens": 5}
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(model.generate(**inputs, use_cache=use_cache, **options))
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(logits(found[0]), logits(found[1]), **CLOSE)


@pytest.mark.parametrize("do_sample", [False, True])
def test_beam_search_generate_dict_output(case, do_sample):
    """And `test_beam_sample_generate_dict_output`."""
    model, inputs = case
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "eos_token_id": None}
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        options.update(use_cache=use_cache, do_sample=do_sample, output_scores=True, return_dict_in_generate=True)
        found.append(model.generate(**inputs, **options))
    torch.testing.assert_close(found[0].sequences_scores, found[1].sequences_scores, **CLOSE)
    torch.testing.assert_close(torch.stack(found[0].scores), torch.stack(found[1].scores), **CLOSE)
    assert torch.equal(found[0].sequences, found[1].sequences)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_returns_attentions_and_hidden_states(case, beams, use_cache):
    """`test_greedy_generate_dict_outputs_use_cache` and its like: those of each step, and of each layer that has them."""
    model, inputs = copy.deepcopy(case[0]), case[1]
    model.set_attn_implementation("eager")
    options = {"output_attentions": True, "output_hidden_states": True, "max_new_tokens": 3, **LOGITS}
    output = model.generate(**inputs, num_beams=beams, use_cache=use_cache, **options)
    (rows, length), config = inputs["input_ids"].shape, model.config.get_text_config()
    for step in range(3):
        total, heads = length + step, config.num_attention_heads
        new = 1 if step and use_cache else total
        attentions, hidden_states = output.attentions[step], output.hidden_states[step]
        assert {tuple(x.shape) for x in attentions} == {(rows * beams, heads, new, total)}
        assert {tuple(x.shape) for x in hidden_states} == {(rows * beams, new, config.hidden_size)}
        assert len(attentions) == config.layer_types.count("full_attention")
        assert len(hidden_states) == config.num_hidden_layers + 1


def test_prompt_lookup_decoding_matches_greedy_search():
    """Where there are no states that cannot be rolled back; else it is refused."""
    model, inputs = build("attention"), MODELS["attention"]
    greedy = model.generate(**inputs, max_new_tokens=8, **LOGITS)
    output = model.generate(**inputs, max_new_tokens=8, prompt_lookup_num_tokens=3, **LOGITS)
    assert torch.equal(greedy.sequences, output.sequences)
    torch.testing.assert_close(logits(output), logits(greedy), **CLOSE)
    with pytest.raises(ValueError, match="assisted generation"):
        build("hybrid").generate(**inputs, max_new_tokens=8, prompt_lookup_num_tokens=3)


def test_left_padding_compatibility(case):
    model, inputs = case
    expected = without_cache(model, inputs, inputs["input_ids"])[:, -1]
    padded = torch.nn.functional.pad(inputs["input_ids"], (4, 0), value=3)
    mask = torch.nn.functional.pad(torch.ones_like(inputs["input_ids"]), (4, 0))
    with torch.no_grad():
        found = model(**{**inputs, "input_ids": padded}, attention_mask=mask).logits[:, -1]
    torch.testing.assert_close(found, expected, **CLOSE)


def test_past_key_values_format(case):
    model, inputs = case
    with torch.no_grad():
        cache = get_cache(model(**inputs, use_cache=True))
    config, (rows, length) = model.config.get_text_config(), inputs["input_ids"].shape
    for layer, kind in zip(cache.layers, config.layer_types, strict=True):
        if kind == "full_attention":
            head_dim = config.hidden_size // config.num_attention_heads
            assert layer.keys.shape == layer.values.shape == (rows, config.num_key_value_heads, length, head_dim)
        else:
            channels = config.mamba_expand * config.hidden_size
            assert layer.conv_states[0].shape == (rows, channels, config.mamba_d_conv)
            assert layer.recurrent_states[0].shape == (rows, channels, config.mamba_d_state)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_from_inputs_embeds(case, num_beams):
    model, inputs = case
    inputs = {"input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == 5, 6)}
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    options = {**LOGITS, "num_beams": num_beams, "max_new_tokens": 5}
    expected = model.generate(**inputs, **options)
    both = model.generate(**inputs, inputs_embeds=embeds, **options)
    alone = model.generate(inputs_embeds=embeds, **options)
    other = model.generate(inputs_embeds=torch.rand_like(embeds), **options)
    assert torch.equal(both.sequences, expected.sequences)
    assert torch.equal(alone.sequences, expected.sequences[:, inputs["input_ids"].shape[1] :])
    torch.testing.assert_close(logits(alone), logits(expected), **CLOSE)
    assert (logits(other) - logits(expected)).abs().max() > 1e-3


def test_generate_from_inputs_embeds_with_static_cache(case):
    model, inputs = case
    embeds = model.get_input_embeddings()(inputs["input_ids"].masked_fill(inputs["input_ids"] == 5, 6)).detach()
    found = [model.generate(inputs_embeds=embeds, max_new_tokens=5, **LOGITS, **o) for o in ({}, STATIC)]
    assert isinstance(get_cache(found[1]), StaticCache)
    torch.testing.assert_close(logits(found[1]), logits(found[0]), **CLOSE)


def test_generate_with_static_cache(case):
    model, inputs = case
    output = model.generate(**inputs, max_new_tokens=5, **LOGITS, **STATIC)
    assert isinstance(get_cache(output), StaticCache)
    expected = without_cache(model, inputs, output.sequences)[:, -6:-1]
    torch.testing.assert_close(logits(output), expected, **CLOSE)


def test_generate_continue_from_past_key_values(case):
    model, inputs = case
    whole = model.generate(**inputs, max_new_tokens=7, **LOGITS)
    first = model.generate(**inputs, max_new_tokens=3, **LOGITS)
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    second = model.generate(first.sequences, cache=get_cache(first), max_new_tokens=4, **rest, **LOGITS)
    assert torch.equal(second.sequences, whole.sequences)
    torch.testing.assert_close(torch.cat([logits(first), logits(second)], dim=1), logits(whole), **CLOSE)


def test_generate_continue_from_inputs_embeds(case):
    """Embeddings of all tokens, of which the cache holds the first."""
    model, ids = case[0], case[1]["input_ids"].masked_fill(case[1]["input_ids"] == 5, 6)
    embed = model.get_input_embeddings()
    whole = model.generate(ids, max_new_tokens=7, **LOGITS)
    first = model.generate(inputs_embeds=embed(ids).detach(), max_new_tokens=3, **LOGITS)
    embeds = embed(torch.cat([ids, first.sequences], dim=1)).detach()
    second = model.generate(inputs_embeds=embeds, cache=get_cache(first), max_new_tokens=4, **LOGITS)
    torch.testing.assert_close(torch.cat([logits(first), logits(second)], dim=1), logits(whole), **CLOSE)


def test_generate_without_input_ids(case):
    model, _ = case
    model.generation_config.bos_token_id = 7
    output = model.generate(max_new_tokens=5, **LOGITS)
    assert output.sequences.shape == (1, 6) and output.sequences[0, 0] == 7
    assert_as_without_cache(model, output)


@pytest.mark.parametrize("chunk", [None, 3])
def test_generate_methods_with_logits_to_keep(case, chunk):
    model, inputs = case
    found = [
        model.generate(**inputs, max_new_tokens=4, prefill_chunk_size=chunk, logits_to_keep=keep, **LOGITS)
        for keep in (0, 1)
    ]
    torch.testing.assert_close(logits(found[0]), logits(found[1]), **CLOSE)


def test_generate_compile_model_forward_fullgraph():
    """With a cache of fixed size a prompt is one graph, and each token after it another; with states and experts too."""
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    model = LongLLaVAForCausalLM(small_config(text_config=layers).text_config).eval()
    model.set_experts_implementation("batched_mm")  # the default looks at how many tokens an expert has
    expected = model.generate(IDS, max_new_tokens=5, **LOGITS, **STATIC)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    output = model.generate(IDS, max_new_tokens=5, **LOGITS, **STATIC)
    torch.testing.assert_close(logits(output), logits(expected), **CLOSE)


def test_eager_matches_sdpa_generate(case):
    model, inputs = copy.deepcopy(case[0]), case[1]
    found = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        found.append(model.generate(**inputs, max_new_tokens=5, **LOGITS))
    torch.testing.assert_close(logits(found[0]), logits(found[1]), **CLOSE)


def test_inputs_are_left_as_they_are(case):
    model, inputs = case
    before = {name: hash_image(tensor) for name, tensor in inputs.items()}
    model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert {name: hash_image(tensor) for name, tensor in inputs.items()} == before
