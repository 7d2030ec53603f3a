"""
Whatever is done with a context, what the model says next is what it says after one uncached pass over the same tokens.
"""

import functools
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache
from transformers.utils import logging

from longllava_hf import LongLLaVAConfig, LongLLaVAContext, LongLLaVAForConditionalGeneration

from .conftest import small_config


IMAGE, TOKENS, VOCABULARY = 5, 4, 120
ROTARY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
DECODERS = {
    "hybrid": {"num_hidden_layers": 6},
    "attention": {"num_hidden_layers": 2, "attn_layer_period": 1, "attn_layer_offset": 0},
    "mamba": {"num_hidden_layers": 3},
    "qwen2": {"model_type": "qwen2", **ROTARY},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, **ROTARY},
    "llama": {"model_type": "llama", **ROTARY},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 8, **ROTARY},
}
KINDS = ("own", "dynamic", "static", "offloaded")
EXAMPLES = int(os.environ.get("CONTEXT_EXAMPLES", "300"))


@pytest.fixture(autouse=True)
def no_progress():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@functools.cache
def build(decoder: str) -> LongLLaVAForConditionalGeneration:
    text, config = DECODERS[decoder], small_config()
    if "model_type" in text:
        config = LongLLaVAConfig(text_config=text, vision_config=config.vision_config.to_dict(), image_token_id=IMAGE)
    else:
        config = small_config(text_config=text)
    torch.manual_seed(0)
    return LongLLaVAForConditionalGeneration(config).eval()


def pictures(numbers: list[int]) -> torch.Tensor:
    """Pictures by number: the same number is the same picture."""
    return torch.stack([torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(n)) for n in numbers])


def flat(rows: list[list[int]]) -> torch.Tensor | None:
    numbers = [number for row in rows for number in row]
    return pictures(numbers) if numbers else None


class Truth:
    """The tokens, the padding and the pictures that should be in a context."""

    def __init__(self, rows: int):
        self.ids = torch.empty(rows, 0, dtype=torch.long)
        self.mask = torch.empty(rows, 0, dtype=torch.long)
        self.pictures: list[list[int]] = [[] for _ in range(rows)]

    def copy(self) -> "Truth":
        other = Truth(0)
        other.ids, other.mask, other.pictures = self.ids, self.mask, [list(row) for row in self.pictures]
        return other

    def add(self, ids, mask=None, numbers=None) -> None:
        self.ids = torch.cat([self.ids, ids], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(ids) if mask is None else mask], dim=1)
        self.pictures = [old + new for old, new in zip(self.pictures, numbers or [[] for _ in ids])]

    def logits(self, model, more: torch.Tensor) -> torch.Tensor:
        """Of the last positions, one for each of `more`, in one pass without a cache."""
        ids = torch.cat([self.ids, more], dim=1)
        mask = torch.cat([self.mask, torch.ones_like(more)], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return model(
            ids, attention_mask=mask, position_ids=positions, pixel_values=flat(self.pictures), use_cache=False
        ).logits[:, -more.shape[1] :]


@torch.no_grad()
def check(model, context: LongLLaVAContext, truth: Truth) -> None:
    """The context knows its tokens, and goes on as it should; in a branch, so that it stays as it is."""
    if truth.ids.shape[1] == 0:
        assert context.num_tokens == 0
        return
    assert torch.equal(context.input_ids, truth.ids)
    mask = torch.ones_like(truth.ids) if context.attention_mask is None else context.attention_mask
    assert torch.equal(mask, truth.mask)
    assert list(map(len, context.image_hashes)) == list(map(len, truth.pictures))
    more = torch.full((len(truth.ids), 2), 17)
    mask = torch.cat([truth.mask, torch.ones_like(more)], dim=1)
    found = model(
        more,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -2:],
        cache=context.branch().cache,
    ).logits
    torch.testing.assert_close(found, truth.logits(model, more), rtol=1e-4, atol=1e-4)


@st.composite
def prompts(draw, rows: int, is_first: bool):
    """Tokens of the same number in each row, pictures among them; the first may be padded on the left."""
    texts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    padding = draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows)) if is_first and rows > 1 else [0] * rows
    padding = [p - min(padding) for p in padding]
    ids, mask, numbers = [], [], []
    for row in range(rows):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
        tokens: list[int] = []
        shown = []
        for i, count in enumerate(texts):
            tokens += torch.randint(6, VOCABULARY, (count,), generator=generator).tolist()
            if i < len(texts) - 1:
                tokens += [IMAGE] * TOKENS
                shown.append(draw(st.integers(0, 9)))
        if draw(st.booleans()) and is_first and rows == 1:
            tokens, shown = [*tokens, *[IMAGE] * TOKENS], [*shown, draw(st.integers(0, 9))]
        ids.append([0] * padding[row] + tokens + [7] * (max(padding) - padding[row]))
        mask.append([0] * padding[row] + [1] * (len(tokens) + max(padding) - padding[row]))
        numbers.append(shown)
    return torch.tensor(ids), torch.tensor(mask), numbers


class NoStream:
    """Stands for a stream of a GPU where there is none: what is moved is there at once."""

    def wait_stream(self, other):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def new_cache(model, kind: str):
    text_config = model.config.get_text_config()
    if kind == "offloaded" and not all(DynamicCache(config=text_config).is_linear):
        return DynamicCache(config=text_config, offloading=True)
    if kind == "dynamic" and not all(DynamicCache(config=text_config).is_linear):
        return DynamicCache(config=text_config)  # without attention layers, older releases ask it for a length in vain
    if kind == "static" and any(t == "full_attention" for t in getattr(text_config, "layer_types", None) or [None]):
        return StaticCache(config=text_config, max_cache_len=400)
    return None


def run(model, data, kind: str) -> None:
    rows = data.draw(st.integers(1, 2), label="rows")
    context, truth = model.new_context(new_cache(model, kind)), Truth(rows)
    kept: list[tuple[LongLLaVAContext, Truth]] = []
    operations = ["append", "generate", "crop", "reorder", "branch", "save", "repeat"]
    for _ in range(data.draw(st.integers(2, 5), label="operations")):
        rows, is_first = len(truth.ids), truth.ids.shape[1] == 0
        operation = data.draw(st.sampled_from(operations[:2] if is_first else operations), label="operation")
        if operation in ("append", "generate"):
            ids, mask, numbers = data.draw(prompts(rows, is_first), label="prompt")
            repeats = data.draw(st.booleans(), label="repeats") and not is_first
            given, shown = Truth(rows), [list(row) for row in numbers]
            if repeats:
                given = truth.copy()
                if data.draw(st.booleans(), label="all pictures"):
                    shown = [old + new for old, new in zip(truth.pictures, numbers)]
            given.add(ids, mask)
            known = truth.ids.shape[1]  # what begins with all that is known is taken to repeat it
            assume(repeats or is_first or not torch.equal(given.ids[:, :known], truth.ids))
            arguments = {
                "pixel_values": flat(shown),
                "prefill_chunk_size": data.draw(st.sampled_from([None, 1, 3, 8]), label="chunk"),
            }
            if data.draw(st.booleans(), label="masked") or (mask == 0).any():
                arguments["attention_mask"] = given.mask
            if operation == "append":
                context = context.append(model, given.ids, **arguments)
                truth.add(ids, mask, numbers)
            else:
                said = answer(model, data, context, given, arguments)
                before = truth.copy()
                truth.add(ids, mask, numbers)
                compare(model, before, truth, said)
                truth.add(said["sequences"][:, given.ids.shape[1] : -1])
        elif operation == "crop":
            crop(data, context, truth)
        elif operation in ("reorder", "repeat"):
            if operation == "repeat" and rows == 1:
                index = torch.tensor([0, 0])
                context.batch_repeat_interleave(2)
            else:
                index = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=2)))
                context.reorder_cache(index)
            truth.ids, truth.mask = truth.ids[index], truth.mask[index]
            truth.pictures = [list(truth.pictures[i]) for i in index.tolist()]
        elif operation == "branch":
            kept.append((context, truth.copy()))
            context = context.branch()
        else:
            with tempfile.TemporaryDirectory() as folder:
                context.save(Path(folder) / "x", model)
                context = LongLLaVAContext.load(Path(folder) / "x", model)
        check(model, context, truth)
    for one in kept:
        check(model, *one)


def answer(model, data, context, given: Truth, arguments):
    way = data.draw(st.sampled_from(["greedy", "sample", "beams"]), label="way")
    options = {"greedy": {}, "sample": {"do_sample": True}, "beams": {"num_beams": 3}}[way]
    torch.manual_seed(data.draw(st.integers(0, 9), label="seed"))
    return model.generate(
        given.ids,
        cache=context,
        max_new_tokens=3,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=way != "beams",
        **{"do_sample": False, **options},
        **arguments,
    )


@torch.no_grad()
def compare(model, before: Truth, after: Truth, said) -> None:
    """Each step's logits with those of one pass."""
    if "logits" not in said:
        return
    new = torch.cat([after.ids[:, before.ids.shape[1] :], said["sequences"][:, -3:-1]], dim=1)
    whole = after.copy()
    whole.ids, whole.mask = whole.ids[:, :-1], whole.mask[:, :-1]
    expected = whole.logits(model, new[:, -3:])
    torch.testing.assert_close(torch.stack(said["logits"], dim=1), expected, rtol=1e-4, atol=1e-4)


def crop(data, context, truth: Truth) -> None:
    remove = data.draw(st.integers(1, 6), label="remove")
    has_states = any(context.cache.is_linear)
    left = truth.ids[:, :-remove]
    tokens = [(row == IMAGE).sum().item() for row in left]
    if has_states or remove >= truth.ids.shape[1] or any(n % TOKENS for n in tokens):
        with pytest.raises((ValueError, RuntimeError)):
            context.crop(-remove)
        return
    if left.shape[1] == 0 or not hasattr(context.cache.layers[0], "crop"):
        return
    context.crop(-remove)
    truth.ids, truth.mask = left, truth.mask[:, :-remove]
    truth.pictures = [row[: n // TOKENS] for row, n in zip(truth.pictures, tokens)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_any_sequence_of_operations(decoder, kind, monkeypatch):
    model = build(decoder)
    if kind == "offloaded" and not torch.cuda.is_available():
        monkeypatch.setattr(torch, "Stream", NoStream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: NoStream())

    @settings(
        max_examples=-(-EXAMPLES // (len(KINDS) * len(DECODERS))),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # a few operations are readable as they are
        report_multiple_bugs=False,
    )
    @given(st.data())
    def draws(data):
        run(model, data, kind)

    draws()
