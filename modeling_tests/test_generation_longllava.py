"""`generate` and `prefill` with every kind of cache and decoder, compared on logits with a pass without a cache."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from longllava_hf import LongLLaVACache, LongLLaVAForConditionalGeneration
from longllava_hf.compat_longllava import get_cache

from .conftest import small_config
from .test_context_properties import DECODERS, IMAGE, build


IDS = torch.randint(6, 120, (2, 20), generator=torch.Generator().manual_seed(0))
PICTURES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WITH_PICTURES = torch.tensor([[7, 8, *[IMAGE] * 4, 9, *[IMAGE] * 4, 11, 12]])
LOGITS = {"do_sample": False, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}


@torch.no_grad()
def assert_as_without_cache(model, output, pixel_values=None, mask=None) -> None:
    """Each step's logits are those of one pass over what was generated."""
    steps = len(output.logits)
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (0, output.sequences.shape[1] - mask.shape[1]), value=1)
    expected = model(output.sequences, attention_mask=mask, pixel_values=pixel_values, use_cache=False).logits
    found = torch.stack(output.logits, dim=1)
    torch.testing.assert_close(found, expected[:, -steps - 1 : -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize("kind", ["static", "static cache", "dynamic", "dynamic cache"])
def test_kinds_of_cache(decoder, chunk, kind):
    model = build(decoder)
    text_config = model.config.get_text_config()
    options = {"prefill_chunk_size": chunk, "max_new_tokens": 6, **LOGITS}
    if kind == "static cache":
        if decoder == "mamba":
            pytest.skip("without attention layers, older releases do not know how long it is")
        options["cache"] = StaticCache(config=text_config, max_cache_len=40)
    elif kind == "dynamic cache":
        if decoder == "mamba":
            pytest.skip("without attention layers, older releases do not know how long it is")
        options["cache"] = DynamicCache(config=text_config)
    else:
        options["cache_implementation"] = kind
    assert_as_without_cache(model, model.generate(IDS, **options))
    if "cache" in options:
        assert int(options["cache"].get_seq_length()) == 25
        options["cache"].reset()
    output = model.generate(WITH_PICTURES, pixel_values=PICTURES, **{k: v for k, v in options.items() if k != "cache"})
    assert_as_without_cache(model, output, PICTURES)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_forward_with_a_static_cache(implementation):
    """What is not used yet of a cache of fixed size is not the past."""
    model = copy.deepcopy(build("hybrid"))
    model.set_attn_implementation(implementation)
    expected = model(IDS).logits
    for cuts in ((20,), (7, 13), (1, 1, 18), (19, 1)):
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
        found = torch.cat([model(part, cache=cache).logits for part in IDS.split(cuts, dim=1)], dim=1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decoder", ["hybrid", "attention", "mamba", "qwen2"])
@pytest.mark.parametrize("implementation", [None, "static"])
@torch.no_grad()
def test_beams(decoder, implementation):
    """The score of a beam is what its tokens are given in one pass."""
    model = build(decoder)
    inputs = {"input_ids": WITH_PICTURES, "pixel_values": PICTURES}
    output = model.generate(
        **inputs, num_beams=3, max_new_tokens=5, cache_implementation=implementation, output_scores=True, **LOGITS
    )
    logits = model(output.sequences, pixel_values=PICTURES, use_cache=False).logits.log_softmax(-1)
    logits[..., IMAGE] = float("-inf")
    new = output.sequences[:, WITH_PICTURES.shape[1] :]
    scores = logits[:, WITH_PICTURES.shape[1] - 1 : -1].gather(-1, new[..., None]).sum((1, 2))
    torch.testing.assert_close(output.sequences_scores, scores / new.shape[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decoder", ["attention", "qwen2"])
@pytest.mark.parametrize("pictures", [False, True])
def test_assisted_decoding_without_states(decoder, pictures):
    model = build(decoder)
    inputs = {"input_ids": WITH_PICTURES, "pixel_values": PICTURES} if pictures else {"input_ids": IDS[:1]}
    for options in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 2}):
        output = model.generate(**inputs, max_new_tokens=8, **options, **LOGITS)
        assert_as_without_cache(model, output, inputs.get("pixel_values"))
    with pytest.raises(ValueError, match="Assisted decoding rolls its cache back"):
        model.generate(IDS[:1], cache=model.new_context(), assistant_model=model, max_new_tokens=2)


@pytest.mark.parametrize("decoder", ["hybrid", "mamba"])
def test_assisted_decoding_with_states_is_refused(decoder):
    with pytest.raises(ValueError, match="assisted"):
        build(decoder).generate(IDS[:1], assistant_model=build("attention"), max_new_tokens=2)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("how", ["seq_idx", "position_ids", "cu_seq_lens"])
@torch.no_grad()
def test_packed_samples_do_not_see_each_other(decoder, how):
    model, lengths = build(decoder), (7, 1, 12)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    arguments = {
        "seq_idx": {"seq_idx": torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]},
        "position_ids": {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]},
        "cu_seq_lens": {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 12, "max_length_k": 12},
    }[how]
    expected = torch.cat([model(part).logits for part in IDS[:1].split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(model(IDS[:1], **arguments).logits, expected, rtol=1e-4, atol=1e-4)
    if how == "seq_idx":
        with pytest.raises(ValueError, match="cannot be combined with a cache"):
            model(IDS[:1], cache=LongLLaVACache(model.config), **arguments)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_step_of_training(decoder):
    model = copy.deepcopy(build(decoder)).train()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    logits = model(IDS, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decoder", ["hybrid", "mamba", "qwen2"])
@torch.no_grad()
def test_what_is_returned_of_a_long_prompt(decoder):
    """Hidden states of all of it, as one pass gives them."""
    model, ids = build(decoder), torch.randint(6, 120, (1, 600), generator=torch.Generator().manual_seed(1))
    output = model.generate(ids, output_hidden_states=True, max_new_tokens=2, **LOGITS)
    expected = model(ids, output_hidden_states=True).hidden_states
    for found, wanted in zip(output.hidden_states[0], expected):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert_as_without_cache(model, output)


@torch.no_grad()
def test_all_at_once_but_for_the_own_decoder():
    for decoder, calls in (("hybrid", 3), ("qwen2", 2)):
        model, seen = build(decoder), []
        hook = model.model.language_model.register_forward_hook(lambda *_, seen=seen: seen.append(None))
        model.generate(torch.randint(6, 120, (1, 600)), max_new_tokens=1)
        hook.remove()
        assert len(seen) == calls


@pytest.mark.parametrize("decoder", ["hybrid", "attention", "mamba"])
def test_states_made_in_inference_mode_go_on_outside_it(decoder):
    model = build(decoder)
    with torch.inference_mode():
        context, outputs = model.prefill(IDS), model(IDS, use_cache=True)
    more = torch.full((2, 3), 17)
    expected = model(torch.cat([IDS, more], dim=1)).logits[:, -3:]
    with torch.no_grad():
        torch.testing.assert_close(model(more, cache=get_cache(outputs)).logits, expected, rtol=1e-4, atol=1e-4)
    output = model.generate(more, cache=context, max_new_tokens=1, **LOGITS)
    torch.testing.assert_close(output.logits[0], expected[:, -1], rtol=1e-4, atol=1e-4)


# Pictures


@torch.no_grad()
def test_outputs_of_many_pictures(small_model):
    pixels = torch.randn(65, 3, 16, 16)
    small_model.set_attn_implementation("eager")
    outputs = small_model.get_image_features(pixels, output_hidden_states=True, output_attentions=True)
    expected = small_model.get_image_features(pixels[64:], output_hidden_states=True, output_attentions=True)
    for name in ("hidden_states", "attentions"):
        assert len(outputs[name]) == len(expected[name])
        for found, wanted in zip(outputs[name], expected[name]):
            assert len(found) == 65
            torch.testing.assert_close(found[64:], wanted)
    assert small_model.get_image_features(pixels).hidden_states is None


@torch.no_grad()
def test_an_image_token_outside_the_vocabulary():
    torch.manual_seed(0)
    inside = LongLLaVAForConditionalGeneration(small_config()).eval()
    outside = LongLLaVAForConditionalGeneration(small_config(image_token_id=500)).eval()
    outside.load_state_dict(inside.state_dict())
    ids = WITH_PICTURES.masked_fill(WITH_PICTURES == IMAGE, 500)
    expected = inside(WITH_PICTURES, pixel_values=PICTURES).logits
    torch.testing.assert_close(outside(ids, pixel_values=PICTURES).logits, expected)
    for options in ({}, {"num_beams": 2}, {"use_cache": False}, {"prefill_chunk_size": 3}):
        output = outside.generate(ids, pixel_values=PICTURES, max_new_tokens=4, **options, **LOGITS)
        if "num_beams" not in options:
            assert_as_without_cache(outside, output, PICTURES)
    context = outside.prefill(ids, PICTURES)
    assert context.image_hashes == inside.prefill(WITH_PICTURES, PICTURES).image_hashes
    with pytest.raises(ValueError, match=r"`image_token_id` \(500\) is outside the vocabulary"):
        outside(inputs_embeds=torch.randn(1, 13, 32), pixel_values=PICTURES)


def test_an_explicit_choice_wins_over_the_configuration(small_model):
    small_model.config.text_config.output_router_logits = True
    assert small_model(IDS, labels=IDS).aux_loss is not None
    outputs = small_model(IDS, labels=IDS, output_router_logits=False)
    assert outputs.aux_loss is None and outputs.router_logits is None


# Bad input


def test_refused(small_model):
    context = small_model.prefill(IDS)
    with pytest.raises(ValueError, match=r"`cache` must be a `Cache`, but is a LongLLaVAContext"):
        small_model(IDS, cache=context)
    with pytest.raises(ValueError, match="Mamba layers, for which this DynamicCache has no states"):
        small_model(IDS, cache=DynamicCache())
    with pytest.raises(ValueError, match="continue it with `input_ids`"):
        small_model.generate(inputs_embeds=torch.randn(2, 3, 32), cache=context, max_new_tokens=2)
    with pytest.raises(ValueError, match="`prefill_chunk_size` must be at least 1"):
        small_model.prefill(IDS, prefill_chunk_size=-3)
    with pytest.raises(ValueError, match="both `inputs` and `input_ids`"):
        small_model.generate(IDS, input_ids=IDS, max_new_tokens=2)
    with pytest.raises(ValueError, match="`attention_mask` must be as long as"):
        small_model.generate(IDS[:, :3] + 1, attention_mask=torch.ones(2, 27), cache=context, max_new_tokens=2)
    assert context.num_tokens == 20
    with pytest.raises(ValueError, match="begin with an empty one"):
        small_model.prefill(IDS, cache=context.cache)
