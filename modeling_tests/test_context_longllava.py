"""Caches that grow in place, that survive an interruption, and that are kept in files."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache

from longllava_hf import LongLLaVACache, LongLLaVAContext, LongLLaVAForConditionalGeneration, cli
from longllava_hf.cache_longllava import PreallocatedLayer, RecurrentLayer, layer_tensors, restored_on_error
from longllava_hf.context_longllava import context_metadata

from .conftest import small_config
from .test_longllava_tiny import DIGITS, FILM, FILM_DIGIT


def prompt(images: int = 3, tail: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(6, 120, (images + 1, tail), generator=generator).tolist()
    ids = [id for text in words[:-1] for id in [*text, 5, 5, 5, 5]] + words[-1]
    return {"input_ids": torch.tensor([ids]), "pixel_values": torch.randn(images, 3, 16, 16, generator=generator)}


def states(cache) -> list[torch.Tensor]:
    cache = getattr(cache, "cache", cache)
    tensors = []
    for layer in cache.layers:
        for value in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            tensors += [] if value is None else [value.clone()]
        for group in ("conv_states", "recurrent_states"):
            tensors += [state.clone() for state in getattr(layer, group, {}).values() if state is not None]
    return tensors


def assert_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(one, other))


# Room


@torch.no_grad()
def test_a_layer_grows_in_place():
    layer, plain = PreallocatedLayer(capacity=40), DynamicCache().layer_class_to_replicate()
    addresses = set()
    for length in (30, *[1] * 30):
        new = torch.randn(2, 3, length, 8)
        keys, values = layer.update(new, -new)
        expected_keys, expected_values = plain.update(new, -new)
        torch.testing.assert_close(keys, expected_keys)
        torch.testing.assert_close(values, expected_values)
        addresses.add(keys.data_ptr())
    assert layer.get_seq_length() == 60
    assert len(addresses) <= 6  # allocated a few times, not thirty


@torch.no_grad()
def test_a_layer_that_was_changed_by_others():
    """Cropped, reordered, repeated or reset, it goes on from what it holds then."""
    layer, plain = PreallocatedLayer(capacity=50), DynamicCache().layer_class_to_replicate()
    changes = [
        lambda x: x.crop(-4),
        lambda x: x.reorder_cache(torch.tensor([1, 0])),
        lambda x: x.batch_repeat_interleave(2),
        lambda x: x.batch_select_indices(torch.tensor([0, 3])),
        lambda x: x.reset(),
    ]
    for change in changes:
        for length in (5, 1):
            new = torch.randn(2, 3, length, 8)
            if layer.get_seq_length() and layer.keys.shape[0] != 2:
                new = new.repeat(2, 1, 1, 1)
            layer.update(new, -new), plain.update(new, -new)
        torch.testing.assert_close(layer.keys, plain.keys)
        torch.testing.assert_close(layer.values, plain.values)
        change(layer), change(plain)
    assert layer.get_seq_length() == 0


def test_a_layer_in_training():
    layer = PreallocatedLayer(capacity=50)
    pieces = [torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3)]
    for piece in pieces:
        keys, _ = layer.update(piece, piece)
    keys.square().sum().backward()
    for piece in pieces:
        torch.testing.assert_close(piece.grad, 2 * piece)


@torch.no_grad()
def test_generating_copies_no_keys(small_model):
    inputs, cache = prompt(), LongLLaVACache(small_model.config)
    addresses = set()
    hook = small_model.register_forward_hook(lambda *_: addresses.add(cache.layers[4].keys.data_ptr()))
    small_model.generate(**inputs, past_key_values=cache, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    hook.remove()
    assert isinstance(cache.layers[4], PreallocatedLayer) and len(addresses) == 1


def test_copies_are_apart():
    cache = LongLLaVACache(small_config(), capacity=30)
    new = torch.randn(1, 2, 5, 8)
    cache.update(new, new, 4)
    branch = copy.deepcopy(cache)
    branch.update(new, new, 4)
    cache.update(-new, -new, 4)
    torch.testing.assert_close(branch.layers[4].keys, torch.cat([new, new], dim=2))
    torch.testing.assert_close(cache.layers[4].keys, torch.cat([new, -new], dim=2))


# Interruption


@pytest.mark.parametrize("kind", ["DynamicCache", "LongLLaVACache", "context"])
@pytest.mark.parametrize("is_empty", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing_behind(small_model, kind, is_empty, error):
    caches = {"DynamicCache": DynamicCache, "LongLLaVACache": LongLLaVACache}
    cache = small_model.new_context() if kind == "context" else caches[kind](config=small_model.config)
    first, second = prompt(2), prompt(3, seed=1)
    ids = second["input_ids"]
    if not is_empty:
        small_model.generate(**first, past_key_values=cache, max_new_tokens=1, do_sample=False)
        ids = torch.cat([first["input_ids"], ids], dim=1)
    before, length = states(cache), getattr(cache, "cache", cache).get_seq_length()
    calls = []

    def stop(*args):
        calls.append(None)
        if len(calls) == 4:
            raise error("stopped")

    hook = small_model.model.language_model.register_forward_hook(stop)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    with pytest.raises(error, match="stopped"):
        small_model.generate(
            input_ids=ids,
            pixel_values=second["pixel_values"],
            past_key_values=cache,
            prefill_chunk_size=10,
            **arguments,
        )
    hook.remove()
    assert getattr(cache, "cache", cache).get_seq_length() == length
    assert_same(states(cache), before)
    again = small_model.generate(
        input_ids=ids, pixel_values=second["pixel_values"], past_key_values=cache, **arguments
    )
    pixels = second["pixel_values"] if is_empty else torch.cat([first["pixel_values"], second["pixel_values"]])
    assert torch.equal(again, small_model.generate(input_ids=ids, pixel_values=pixels, **arguments))


def test_nothing_is_undone_that_went_well():
    cache = DynamicCache(config=small_config().text_config)
    with restored_on_error(cache):
        cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 4)
    assert cache.get_seq_length() == 3


# Contexts


@pytest.mark.parametrize("repeats", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_a_context_answers_like_the_whole_prompt(small_model, tmp_path, repeats, masked):
    inputs = prompt()
    ids, cut = inputs["input_ids"], 31
    context = small_model.prefill(ids[:, :cut], inputs["pixel_values"][:2], prefill_chunk_size=8)
    context.save(tmp_path / "x.ctx", small_model)
    again = LongLLaVAContext.load(tmp_path / "x.ctx", small_model)
    assert_same(states(context), states(again))
    assert again.inputs_digest == context.inputs_digest and torch.equal(again.input_ids, ids[:, :cut])
    before = states(context)
    for cache in (context.branch(), again):
        new = ids if repeats else ids[:, cut:]
        mask = {"attention_mask": torch.ones_like(new)} if masked else {}
        pixels = inputs["pixel_values"] if repeats else inputs["pixel_values"][2:]
        output = small_model.generate(new, pixel_values=pixels, past_key_values=cache, max_new_tokens=8, **mask)
        expected = small_model.generate(**inputs, max_new_tokens=8)
        assert torch.equal(output[:, new.shape[1] :], expected[:, ids.shape[1] :])
        assert torch.equal(cache.input_ids, expected[:, :-1])  # it knows what was said, too
    assert_same(states(context), before)


def test_a_context_is_continued(small_model):
    inputs = prompt(4)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    whole = small_model.prefill(**inputs)
    parts = small_model.prefill(ids[:, :20], pixels[:1])
    digest = parts.inputs_digest
    assert small_model.prefill(ids[:, 20:40], pixels[1:3], past_key_values=parts) is parts
    small_model.prefill(ids, pixels[3:], past_key_values=parts)  # all ids again
    assert torch.equal(parts.input_ids, ids) and parts.num_tokens == ids.shape[1]
    assert parts.inputs_digest != digest
    for one, other in zip(states(whole), states(parts)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    other = small_model.prefill(ids, -pixels)
    assert other.inputs_digest != whole.inputs_digest


def test_padded_rows_in_a_context(small_model):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(6, 120, (2, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    question = torch.randint(6, 120, (2, 4), generator=generator)
    context = small_model.prefill(ids, attention_mask=mask)
    output = small_model.generate(question, past_key_values=context, max_new_tokens=5, do_sample=False)
    for row in range(2):
        alone = torch.cat([ids[row][mask[row].bool()], question[row]])[None]
        expected = small_model.generate(alone, max_new_tokens=5, do_sample=False)
        assert torch.equal(output[row, 4:], expected[0, alone.shape[1] :])
    with pytest.raises(ValueError, match="on the left"):
        small_model.prefill(ids, attention_mask=mask.flip(1))


@pytest.mark.parametrize("begin", ["prefill", "generate"])
def test_padded_rows_over_several_turns(small_model, begin):
    """What was padding once stays padding, whoever says so again."""
    generator = torch.Generator().manual_seed(4)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    ids = torch.randint(6, 120, (2, 9), generator=generator)
    answers = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    cache = small_model.new_context()
    whole, whole_mask = ids, mask
    if begin == "prefill":
        small_model.prefill(ids, attention_mask=mask, past_key_values=cache)
    else:
        whole = small_model.generate(ids, attention_mask=mask, past_key_values=cache, **answers)
        whole_mask = torch.nn.functional.pad(mask, (0, 4), value=1)
    for turn, new_tokens in enumerate((3, 21, 2)):
        new = torch.randint(6, 120, (2, new_tokens), generator=generator)
        known = cache.num_tokens
        whole = torch.cat([whole, new], dim=1)
        whole_mask = torch.nn.functional.pad(whole_mask, (0, new_tokens), value=1)
        given = {"input_ids": whole[:, known:]}
        if turn == 1:
            given["attention_mask"] = torch.ones_like(given["input_ids"])
        if turn == 2:
            given = {"input_ids": whole, "attention_mask": whole_mask}
        output = small_model.generate(**given, past_key_values=cache, **answers)
        expected = small_model.generate(whole, attention_mask=whole_mask, **answers)
        assert torch.equal(output[:, -4:], expected[:, -4:])
        assert cache.num_tokens == expected.shape[1] - 1
        whole, whole_mask = expected, torch.nn.functional.pad(whole_mask, (0, 4), value=1)
    assert torch.equal(cache.attention_mask, whole_mask[:, :-1])


def other_decoder() -> LongLLaVAForConditionalGeneration:
    text = {
        "model_type": "qwen2",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 120,
    }
    torch.manual_seed(0)
    config = small_config()
    config = type(config)(text_config=text, vision_config=config.vision_config.to_dict(), image_token_id=5)
    return LongLLaVAForConditionalGeneration(config).eval()


@pytest.mark.parametrize("chunk", [None, 5])
def test_another_decoder_has_contexts_too(tmp_path, chunk):
    model, inputs = other_decoder(), prompt()
    ids = inputs["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **options)
    model.prefill(ids[:, :32], inputs["pixel_values"][:2], prefill_chunk_size=16).save(tmp_path / "x", model)
    for new, pixels in ((ids, inputs["pixel_values"]), (ids[:, 32:], inputs["pixel_values"][2:])):
        for mask in ({}, {"attention_mask": torch.ones_like(new)}):
            context = LongLLaVAContext.load(tmp_path / "x", model)
            found = model.generate(
                new, pixel_values=pixels, past_key_values=context, prefill_chunk_size=chunk, **mask, **options
            )
            for one, other in zip(found.logits, expected.logits):  # positions go on from the past
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_other_pictures_are_not_taken_for_those_in_a_context(small_model):
    inputs = prompt(2)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    context = small_model.prefill(ids[:, :-3], pixels)
    small_model.generate(ids, pixel_values=pixels, past_key_values=context.branch(), max_new_tokens=2)
    with pytest.raises(ValueError, match="repeat the context's tokens, but not its pictures"):
        small_model.generate(ids, pixel_values=pixels.flip(0), past_key_values=context, max_new_tokens=2)
    assert context.num_tokens == ids.shape[1] - 3


def test_a_context_forgets_when_it_is_reset(small_model):
    inputs = prompt()
    context = small_model.prefill(**inputs)
    context.reset()
    assert context.input_ids is None and context.image_hashes == [] and context.num_tokens == 0
    words = torch.tensor([[7, 8, 9, 10]])
    first = small_model.generate(words, past_key_values=context, max_new_tokens=3, do_sample=False)
    assert torch.equal(first, small_model.generate(words, max_new_tokens=3, do_sample=False))


def test_more_sequences_than_a_context_has(small_model):
    inputs = prompt()
    for options in ({"num_beams": 2, "num_return_sequences": 2}, {"num_return_sequences": 2, "do_sample": True}):
        context = small_model.prefill(**inputs)
        with pytest.raises(ValueError, match="holds 1 sequences, but 2 are to be continued"):
            small_model.generate(torch.tensor([[7, 8]]), past_key_values=context, max_new_tokens=2, **options)


def test_contexts_of_others_are_refused(small_model, tmp_path, tiny_processor):
    file = tmp_path / "x.ctx"
    small_model.prefill(**prompt()).save(file, small_model, tiny_processor)
    LongLLaVAContext.load(file, small_model, tiny_processor)

    torch.manual_seed(1)
    other = LongLLaVAForConditionalGeneration(small_config())
    with pytest.raises(
        ValueError, match=r"x.ctx` is of another model: its fingerprint is \w{12}, and that of the model"
    ):
        LongLLaVAContext.load(file, other)
    changed = copy.deepcopy(small_model)
    with torch.no_grad():
        changed.lm_head.weight[:, 1] += 1
    with pytest.raises(ValueError, match="of another model"):
        LongLLaVAContext.load(file, changed)
    changed = copy.deepcopy(small_model)
    changed.config.text_config.rms_norm_eps = 1e-3
    with pytest.raises(ValueError, match="of another model"):
        LongLLaVAContext.load(file, changed)
    with pytest.raises(ValueError, match="of another model"):
        LongLLaVAContext.load(file, copy.deepcopy(small_model).to(torch.bfloat16))
    processor = copy.deepcopy(tiny_processor)
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="of another processor"):
        LongLLaVAContext.load(file, small_model, processor)

    # How it is computed does not make it another one.
    changed = copy.deepcopy(small_model)
    changed.config.vision_batch_size, changed.config.text_config.scan_implementation = 3, "reference"
    LongLLaVAContext.load(file, changed)


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.5, 0.999])
def test_a_truncated_context_is_refused(small_model, tmp_path, share):
    file = tmp_path / "x.ctx"
    small_model.prefill(**prompt()).save(file, small_model)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises((OSError, ValueError), match=r"x.ctx` is (damaged or truncated|not a context)"):
        LongLLaVAContext.load(file, small_model)


def test_what_is_no_context(small_model, tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "weights.safetensors")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("weights.safetensors", "empty"):
        assert context_metadata(tmp_path / name) is None
        with pytest.raises(ValueError, match="not a context"):
            LongLLaVAContext.load(tmp_path / name, small_model)
    with pytest.raises(FileNotFoundError):
        LongLLaVAContext.load(tmp_path / "none", small_model)
    with pytest.raises(ValueError, match="0 tokens"):
        small_model.new_context().save(tmp_path / "x", small_model)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty", "weights.safetensors"]


def test_a_context_file_is_plain_safetensors(small_model, tmp_path):
    small_model.prefill(**prompt()).save(tmp_path / "x.ctx", small_model)
    with safe_open(tmp_path / "x.ctx", framework="pt") as file:
        assert list(file.metadata()) == ["longllava_context"]
        assert "layers.4.keys" in file.keys() and "layers.0.recurrent_states.0" in file.keys()
    assert [file.name for file in tmp_path.iterdir()] == ["x.ctx"]


# What others do to a cache


def test_a_cache_that_was_changed_by_something_else(small_model, tmp_path):
    inputs = prompt()
    more = torch.tensor([[17]])
    changes = {
        "a loop of one's own": lambda cache: small_model(more, cache=cache),
        "reorder_cache": lambda cache: cache.reorder_cache(torch.tensor([0])),
        "batch_repeat_interleave": lambda cache: cache.batch_repeat_interleave(2),
        "batch_select_indices": lambda cache: cache.batch_select_indices(torch.tensor([0])),
        "reset": lambda cache: cache.reset(),
    }
    for change in changes.values():
        context = small_model.prefill(**inputs)
        with torch.no_grad():
            change(context.cache)
        for use in (
            lambda context=context: context.save(tmp_path / "x", small_model),
            lambda context=context: context.branch(),
            lambda context=context: context.reorder_cache(torch.tensor([0])),
            lambda context=context: small_model.prefill(more, cache=context),
            lambda context=context: small_model.generate(more, cache=context, max_new_tokens=2),
        ):
            with pytest.raises(ValueError, match="was changed by something else after the context had read 48 tokens"):
                use()
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_a_cache_is_all_or_nothing_cropped(small_model):
    """Of a decoder with Mamba layers it is not cropped at all, also where an attention layer comes first."""
    model = LongLLaVAForConditionalGeneration(small_config(text_config={"attn_layer_offset": 0})).eval()
    cache = model.prefill(**prompt()).cache
    before = states(cache)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-3)
    assert_same(states(cache), before)
    with pytest.raises(ValueError, match="must be between -48 and 0"):
        cache.layers[0].crop(-49)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_what_was_said_is_in_the_context(small_model, options):
    """Also of beams, into an empty one: as many rows as were asked, and what was returned."""
    inputs, context = prompt(), small_model.new_context()
    output = small_model.generate(**inputs, cache=context, max_new_tokens=4, eos_token_id=None, **options)
    assert torch.equal(context.input_ids, output[:, :-1])
    whole = small_model.prefill(output[:, :-1], inputs["pixel_values"])
    for one, other in zip(states(context), states(whole), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_rows_of_a_context(small_model):
    inputs = prompt()
    context = small_model.prefill(**inputs)
    context.batch_repeat_interleave(3)
    question = torch.tensor([[7, 8], [9, 10], [11, 12]])
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = small_model.generate(question, cache=context, **options)
    for row in range(3):
        ids = torch.cat([inputs["input_ids"], question[row : row + 1]], dim=1)
        alone = small_model.generate(ids, pixel_values=inputs["pixel_values"], **options)
        for one, other in zip(found.logits, alone.logits):
            torch.testing.assert_close(one[row : row + 1], other, rtol=1e-4, atol=1e-4)
    context.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(context.input_ids, found.sequences.new_tensor(context.input_ids.tolist()))
    assert torch.equal(context.input_ids[:, 48:50], question[[2, 0]]) and len(context.image_hashes) == 2


def test_the_pictures_of_each_row_are_known(small_model):
    inputs = prompt()
    ids, pixels = inputs["input_ids"].repeat(2, 1), torch.randn(6, 3, 16, 16)
    context = small_model.prefill(ids, pixels)
    more = torch.cat([ids, torch.tensor([[7], [8]])], dim=1)
    for order in ([3, 4, 5, 0, 1, 2], [0, 1, 2, 3, 5, 4], [0, 1, 2, 3, 4, 4]):
        with pytest.raises(ValueError, match="but not its pictures"):
            small_model.generate(more, pixel_values=pixels[order], cache=context, max_new_tokens=2)
    calls = []
    hook = small_model.model.vision_tower.register_forward_hook(lambda *_: calls.append(None))
    small_model.generate(more, pixel_values=pixels, cache=context, max_new_tokens=2)
    hook.remove()
    assert not calls  # those that are known are compared, and not encoded again


def test_files_of_older_releases_are_refused_with_the_reason(small_model, tmp_path):
    file = tmp_path / "x.ctx"
    small_model.prefill(**prompt()).save(file, small_model)
    with safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        facts = json.loads(stored.metadata()["longllava_context"])
    for metadata, reason in (
        ({"format": "longllava_cache", "version": "1"}, "version 1 of the format `longllava_cache`"),
        ({"format": "longllava_context", "version": "2"}, "version 2 of the format `longllava_context`"),
        ({"longllava_context": json.dumps({**facts, "version": "4"})}, "version 4 of the format `longllava_context`"),
    ):
        save_file(tensors, file, metadata=metadata)
        with pytest.raises(
            ValueError, match=rf"{reason}, and version 3 of `longllava_context` is known. Read the pictures again"
        ):
            LongLLaVAContext.load(file, small_model)


# On the command line


def ask(*arguments, capsys) -> dict:
    assert cli.main(["ask", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_keeping_a_film(tmp_path, capsys):
    question, context = "Which digit appears in this film?", tmp_path / "film.ctx"
    whole = ask(FILM, question, capsys=capsys)
    kept = ask(FILM, question, "--keep", context, capsys=capsys)
    size = context.stat().st_size
    for _ in range(2):
        again = ask(context, question, capsys=capsys)
        assert again["answer"] == kept["answer"] == whole["answer"] == FILM_DIGIT
        assert again["files"] == whole["files"]
        assert again["context_tokens"] + again["prompt_tokens"] == whole["prompt_tokens"]
        assert again["prompt_tokens"] < 20
    assert context.stat().st_size == size
    assert [file.name for file in tmp_path.iterdir()] == ["film.ctx"]


def test_adding_to_what_was_kept(tmp_path, capsys):
    question = "Which digit is the {} picture?"
    ask(DIGITS["three"], question.format("first"), "--keep", tmp_path / "1", capsys=capsys)
    ask(tmp_path / "1", DIGITS["seven"], question.format("first"), "--keep", tmp_path / "2", capsys=capsys)
    files = [DIGITS["three"], DIGITS["seven"], DIGITS["three"]]
    whole = ask(*files, question.format("third"), capsys=capsys)
    for place, answer in (("first", "3"), ("second", "7"), ("third", "3")):
        result = ask(tmp_path / "2", DIGITS["three"], question.format(place), capsys=capsys)
        assert result["answer"] == answer
        assert [file["path"] for file in result["files"]] == files
        assert result["context_tokens"] + result["prompt_tokens"] == whole["prompt_tokens"]


def test_chat_about_what_was_kept(tmp_path, capsys, monkeypatch):
    ask(DIGITS["three"], "Which digit is this?", "--keep", tmp_path / "x", capsys=capsys)
    turns = iter(["Which digit is this?", f"/show {DIGITS['seven']}", "Which digit is this?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(turns))
    assert cli.main(["chat", str(tmp_path / "x"), "--json"]) == 0
    answers = [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()]
    assert answers[0] == "3" and len(answers) == 2


def test_bad_contexts_on_the_command_line(small_model, tmp_path, capsys):
    ask(DIGITS["three"], "Which digit is this?", "--keep", tmp_path / "x", capsys=capsys)
    content = (tmp_path / "x").read_bytes()
    for size in (300, len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:size])
        assert cli.main(["ask", str(tmp_path / "cut"), "?"]) == 2
        assert "cut` is damaged or truncated" in capsys.readouterr().err
    small_model.prefill(**prompt()).save(tmp_path / "other", small_model)
    assert cli.main(["ask", str(tmp_path / "other"), "?"]) == 2
    assert "other` is of another model" in capsys.readouterr().err
    content = Path(DIGITS["three"]).read_bytes()
    (tmp_path / "three.png").write_bytes(content)
    assert cli.main(["ask", str(tmp_path / "three.png"), "?", "--keep", str(tmp_path / "three.png")]) == 2
    assert "is no kept context, so it is not written over" in capsys.readouterr().err
    assert (tmp_path / "three.png").read_bytes() == content
    assert cli.main(["ask", DIGITS["three"], "?", "--keep", str(tmp_path / "no" / "x")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_rows_of_states_that_are_not_there_yet():
    """As with keys and values: nothing to select from is no error."""
    layer = RecurrentLayer()
    layer.batch_select_indices(torch.tensor([0, 1]))
    layer.batch_repeat_interleave(2)
    assert layer_tensors(layer) == {}
