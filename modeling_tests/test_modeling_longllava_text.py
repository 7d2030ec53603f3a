"""The decoder against Transformers' Jamba with the same weights, and against itself in pieces."""

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, DynamicCache, JambaConfig, JambaForCausalLM, StaticCache

from longllava_hf import LongLLaVAForCausalLM, LongLLaVAForConditionalGeneration, LongLLaVATextConfig
from longllava_hf.compat_longllava import TorchDispatchMode
from longllava_hf.modeling_longllava_text import causal_attention

from .conftest import small_config


def small_text_config(**kwargs) -> LongLLaVATextConfig:
    config = {**small_config().text_config.to_dict(), **kwargs}
    return LongLLaVATextConfig(**{k: v for k, v in config.items() if k not in ("model_type", "transformers_version")})


@pytest.fixture
def model() -> LongLLaVAForCausalLM:
    torch.manual_seed(0)
    return LongLLaVAForCausalLM(small_text_config()).eval()


@pytest.fixture(scope="module")
def jamba(tmp_path_factory):
    torch.manual_seed(0)
    config = small_text_config().to_dict()
    names = set(JambaConfig().to_dict())
    config = JambaConfig(
        **{k: v for k, v in config.items() if k in names and k not in ("model_type", "architectures")}
    )
    folder = tmp_path_factory.mktemp("jamba")
    model = JambaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(6, 120, (2, 50), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_equals_jamba_and_loads_its_checkpoints(jamba, ids):
    theirs, folder = jamba
    ours = LongLLaVAForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    expected = theirs(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(ours(ids, attention_mask=mask).logits[mask.bool()], expected, rtol=1e-4, atol=1e-5)


def test_state_dict_has_jambas_names(jamba, model):
    """But experts are linear layers: flat, and with `.weight`."""

    def flat(name, shape):
        if len(shape) == 3 and ".experts." in name:
            return f"{name}.weight", (shape[0] * shape[1], shape[2])
        return name, tuple(shape)

    theirs, _ = jamba
    expected = dict(flat(name, tensor.shape) for name, tensor in theirs.state_dict().items())
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected


def test_gradients_equal_jambas(jamba, ids):
    theirs, folder = jamba
    ours = LongLLaVAForCausalLM.from_pretrained(folder)
    for model in (ours, theirs):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        name = name.removesuffix(".weight") if ".experts." in name else name
        grad = expected[name].grad
        scale = grad.abs().max().clamp(min=1e-6)
        assert ((parameter.grad.view_as(grad) - grad).abs().max() / scale) < 1e-3, name


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7, 49])
def test_chunks_give_the_logits_of_one_pass(model, ids, chunk):
    cache, pieces = DynamicCache(config=model.config), []
    for piece in ids.split(chunk, dim=1):
        pieces.append(model(piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("where", ["left", "right", "both", "holes"])
def test_padding_anywhere_leaves_no_trace(model, where, chunk):
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(6, 120, (n,), generator=generator) for n in (40, 23, 1)]
    mask = torch.zeros(3, 44, dtype=torch.long)
    for i, row in enumerate(rows):
        spare = 44 - len(row)
        if where == "holes":
            mask[i, torch.randperm(44, generator=generator)[: len(row)]] = 1
        else:
            begin = {"left": spare, "right": 0, "both": spare // 2}[where]
            mask[i, begin : begin + len(row)] = 1
    ids = torch.zeros(3, 44, dtype=torch.long)
    ids[mask.bool()] = torch.cat(rows)
    cache, pieces = DynamicCache(config=model.config), []
    for begin in range(0, 44, chunk):
        end = min(begin + chunk, 44)
        outputs = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
        pieces.append(outputs.logits)
    logits = torch.cat(pieces, dim=1)
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i][mask[i].bool()], model(row[None]).logits[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_may_hold_anything(model, ids):
    embeds = model.get_input_embeddings()(ids).clone()
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    clean = model(inputs_embeds=embeds, attention_mask=mask).logits[:, 5:]
    embeds[:, :5] = 1e4
    torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits[:, 5:], clean)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations(model, ids, implementation):
    expected = model(ids).logits
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "longllava"])
def test_experts_implementations(model, ids, implementation):
    assert model.config._experts_implementation == "longllava"
    model.set_experts_implementation("eager")
    expected = model(ids).logits
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_implementations_of_the_whole_model(ids, implementation):
    model = LongLLaVAForConditionalGeneration(small_config()).eval()
    expected = model(ids).logits
    model.set_experts_implementation(implementation)
    configs = (model.config, model.model.language_model.config)
    assert [config._experts_implementation for config in configs] == [implementation] * 2
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_experts_implementation_of_a_users_subclass(model):
    class Mine(LongLLaVAForCausalLM):
        pass

    mine = Mine(model.config)
    mine.set_experts_implementation("batched_mm")
    assert mine.model.config._experts_implementation == "batched_mm"


@torch.no_grad()
def test_beams_reorder_the_states(model, ids):
    beams = model.generate(ids[:1], num_beams=3, num_return_sequences=3, max_new_tokens=8, do_sample=False)
    scores = []
    for beam in beams:
        logits = model(beam[None]).logits[0].log_softmax(-1)
        scores.append(sum(logits[i - 1, beam[i]].item() for i in range(50, len(beam))))
    assert scores == sorted(scores, reverse=True)
    greedy = model.generate(ids[:1], max_new_tokens=8, do_sample=False)[0]
    logits = model(greedy[None]).logits[0].log_softmax(-1)
    assert scores[0] >= sum(logits[i - 1, greedy[i]].item() for i in range(50, len(greedy))) - 1e-4


def test_states_have_the_shapes_of_jambas(model, ids):
    cache = model(ids, use_cache=True).past_key_values
    layer = cache.layers[0]
    assert layer.conv_states[0].shape == (2, 64, 4)
    assert layer.recurrent_states[0].shape == (2, 64, 4)
    assert cache.get_seq_length() == 50


def test_gradient_checkpointing(model, ids):
    model.train()
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_gradients_reach_everything_through_a_cache(model, ids):
    cache = DynamicCache(config=model.config)
    model(ids[:, :20], past_key_values=cache)
    model(ids[:, 20:], past_key_values=cache).logits.sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == []


def test_router_logits_and_auxiliary_loss(model, ids):
    plain = model(ids, labels=ids)
    outputs = model(ids, labels=ids, output_router_logits=True, output_hidden_states=True)
    assert [tuple(r.shape) for r in outputs.router_logits] == [(100, 4)] * 4
    assert len(outputs.hidden_states) == 9 and plain.router_logits is None and plain.aux_loss is None
    expected = plain.loss + model.config.router_aux_loss_coef * outputs.aux_loss
    torch.testing.assert_close(outputs.loss, expected)
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    padded = model(ids, attention_mask=mask, output_router_logits=True).aux_loss
    assert torch.isfinite(padded) and padded != outputs.aux_loss


def test_bias_of_the_step_size_is_added_in_float32(ids):
    """In bfloat16 the step sizes are as exact as their inputs; a bias added before the scan would cost a percent."""
    torch.manual_seed(0)
    mixer = LongLLaVAForCausalLM(small_text_config()).model.layers[0].mamba.to(torch.bfloat16)
    x = torch.randn(2, 5, mixer.time_step_rank, dtype=torch.bfloat16)
    exact = torch.nn.functional.linear(x.double(), mixer.dt_proj.weight.double(), mixer.dt_proj.bias.double())
    found = mixer.dt_proj(x).double()
    rounded = torch.nn.functional.linear(x, mixer.dt_proj.weight, mixer.dt_proj.bias).double()
    assert (found - exact).abs().mean() < 0.2 * (rounded - exact).abs().mean()


def test_lora_on_every_projection_of_mamba_learns(model, ids):
    peft = pytest.importorskip("peft")
    targets = ["in_proj", "x_proj", "dt_proj", "out_proj", "q_proj", "v_proj"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False))
    wrapped(input_ids=ids, labels=ids).loss.backward()
    grads = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
    assert len(grads) == 2 * (7 * 4 + 2)
    assert all(g is not None and g.abs().sum() > 0 for g in grads.values())
    merged_logits = wrapped(input_ids=ids).logits
    torch.testing.assert_close(wrapped.merge_and_unload()(ids).logits, merged_logits, rtol=1e-3, atol=1e-4)


def test_assisted_decoding_is_refused(model, ids):
    with pytest.raises(ValueError, match="assisted"):
        model.generate(ids[:1], assistant_model=model, max_new_tokens=2)


def test_auto_class(model, tmp_path, ids):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LongLLaVAForCausalLM
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_exactly_one_input(model, ids):
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))


# Attention without masks


@pytest.mark.parametrize("past", [0, 1, 13])
@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_equals_its_definition(past, length, heads, needs_grad, dtype):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads[0], length, 8, generator=generator, dtype=torch.float64).to(dtype)
    key, value = torch.randn(2, 2, heads[1], past + length + 3, 8, generator=generator, dtype=torch.float64).to(dtype)
    key, value = key[:, :, : past + length], value[:, :, : past + length]  # with room behind, as in a cache
    inputs = [x.detach().requires_grad_(needs_grad) for x in (query, key, value)]
    output = causal_attention(*inputs, scaling=0.3)

    q, k, v = (x.detach().double().requires_grad_() for x in (query, key, value))
    group = heads[0] // heads[1]
    scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) * 0.3
    may_see = torch.arange(past + length)[None] <= past + torch.arange(length)[:, None]
    expected = scores.masked_fill(~may_see, float("-inf")).softmax(-1) @ v.repeat_interleave(group, 1)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(output.double(), expected, **tolerance)
    if needs_grad and dtype == torch.float64:
        weight = torch.randn_like(expected)
        (output * weight).sum().backward()
        (expected * weight).sum().backward()
        for found, wanted in zip(inputs, (q, k, v)):
            torch.testing.assert_close(found.grad, wanted.grad, **tolerance)


@torch.no_grad()
def test_no_mask_is_made_without_padding(model, ids, monkeypatch):
    def refuse(**kwargs):
        raise AssertionError("a mask was made")

    monkeypatch.setattr("longllava_hf.modeling_longllava_text.create_causal_mask", refuse)
    expected = model(ids).logits
    cache, pieces = DynamicCache(config=model.config), []
    for begin, end in ((0, 20), (20, 49), (49, 50)):
        mask = torch.ones_like(ids[:, :end])
        pieces.append(model(ids[:, begin:end], attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-4, atol=1e-4)


# Several sequences in a row

LENGTHS = (11, 1, 38)


def packed_arguments(how: str) -> dict:
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    if how == "position_ids":
        return {"position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]}
    if how == "seq_idx":
        return {"seq_idx": torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None].int()}
    # What Transformers' collator gives.
    bounds = bounds.int()
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 38, "max_length_k": 38}


@pytest.mark.parametrize(
    ("how", "implementation", "scan"),
    [
        ("position_ids", "sdpa", None),
        ("seq_idx", "sdpa", None),
        ("cu_seq_lens", "sdpa", None),
        ("seq_idx", "eager", None),
        ("seq_idx", "sdpa", "reference"),
        ("seq_idx", "sdpa", "triton"),
    ],
)
def test_packed_sequences_equal_each_alone(model, ids, how, implementation, scan):
    if scan == "triton":
        pytest.importorskip("triton")
    model.set_attn_implementation(implementation)
    model.config.scan_implementation = scan
    row, labels, losses = ids[:1], ids[:1].clone(), []
    labels[:, [0, 11, 12]] = -100  # nothing is to be foretold across a boundary
    packed = model(row, labels=labels, **packed_arguments(how))
    model.zero_grad()
    packed.loss.backward()
    gradient = model.model.layers[0].mamba.in_proj.weight.grad.clone()
    model.zero_grad()
    for logits, sample in zip(packed.logits.split(LENGTHS, dim=1), row.split(LENGTHS, dim=1)):
        alone = model(sample)
        torch.testing.assert_close(logits, alone.logits, rtol=1e-5, atol=1e-5)
        if sample.shape[1] > 1:
            losses.append(torch.nn.functional.cross_entropy(alone.logits[0, :-1], sample[0, 1:], reduction="sum"))
    total = sum(losses) / (sum(LENGTHS) - 3)
    torch.testing.assert_close(packed.loss, total, rtol=1e-5, atol=1e-5)
    total.backward()
    torch.testing.assert_close(gradient, model.model.layers[0].mamba.in_proj.weight.grad, rtol=1e-4, atol=1e-5)


def test_packed_rows_are_exact(model, ids):
    """Two rows, cut at other places: hidden states and all gradients are those of each sequence alone."""
    model.double().set_attn_implementation("sdpa")
    lengths = ((11, 1, 38), (30, 20))
    embeds = model.model.embed_tokens(ids).detach()
    seq_idx = torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in lengths])
    weight = torch.linspace(-1, 1, embeds.numel(), dtype=torch.float64).view_as(embeds)
    results = []
    for is_packed in (True, False):
        model.zero_grad()
        leaf = embeds.clone().requires_grad_()
        if is_packed:
            output = model.model(inputs_embeds=leaf, seq_idx=seq_idx).last_hidden_state
        else:
            rows = (row.split(n) for row, n in zip(leaf, lengths))
            alone = [[model.model(inputs_embeds=one[None]).last_hidden_state for one in row] for row in rows]
            output = torch.cat([torch.cat(row, dim=1) for row in alone])
        (output * weight).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}
        results.append({"output": output.detach(), "inputs": leaf.grad, **gradients})
    packed, alone = results
    assert packed.keys() == alone.keys() and len(packed) > 50
    for name in packed:
        torch.testing.assert_close(packed[name], alone[name], rtol=1e-6, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """How many values the largest tensor has that any operation gave."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        storages = (
            x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(result) if torch.is_tensor(x)
        )
        self.values = max(self.values, *storages, 0)
        return result


def test_memory_of_a_packed_row_is_linear(model):
    """A training step of it, with checkpointing and the load-balancing loss: nothing has a value for two tokens."""
    model.set_attn_implementation("sdpa")
    model.train().gradient_checkpointing_enable()
    largest = []
    for length in (1024, 2048):
        ids = torch.randint(6, 120, (1, length), generator=torch.Generator().manual_seed(0))
        positions = torch.arange(128).repeat(length // 128)[None]
        with LargestTensor() as mode:
            outputs = model(ids, position_ids=positions, labels=ids, output_router_logits=True)
            outputs.loss.backward()  # of which it is a part
        largest.append(mode.values)
    assert largest[1] < 150 * 2048  # the logits of 120 tokens are the widest
    assert largest[1] <= 2 * largest[0]


def test_the_collator_that_packs(model):
    """Transformers' own, with what it hands to the model."""
    from transformers import DataCollatorWithFlattening

    generator = torch.Generator().manual_seed(5)
    samples = [torch.randint(6, 120, (n,), generator=generator).tolist() for n in LENGTHS]
    for options in ({}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}):
        batch = DataCollatorWithFlattening(**options)([{"input_ids": sample} for sample in samples])
        outputs = model(**batch)
        assert torch.isfinite(outputs.loss)
        for logits, sample in zip(outputs.logits.split(LENGTHS, dim=1), samples):
            torch.testing.assert_close(logits, model(torch.tensor([sample])).logits, rtol=1e-5, atol=1e-5)


def test_packed_sequences_stand_alone(model, ids):
    assert model(ids, **packed_arguments("position_ids")).past_key_values is None
    for cache in (DynamicCache(config=model.config), model(ids[:1]).past_key_values):
        with pytest.raises(ValueError, match="cannot be combined with a cache"):
            model(ids[:1], past_key_values=cache, **packed_arguments("seq_idx"))
    mask = torch.ones_like(ids)
    torch.testing.assert_close(
        model(ids, attention_mask=mask, **packed_arguments("seq_idx")).logits,
        model(ids, **packed_arguments("seq_idx")).logits,
    )
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="cannot be combined with padding"):
        model(ids, attention_mask=mask, **packed_arguments("seq_idx"))


def test_positions_are_only_positions_where_there_is_a_cache(model, ids):
    cache = DynamicCache(config=model.config)
    outputs = model(ids, past_key_values=cache, **packed_arguments("position_ids"))
    torch.testing.assert_close(outputs.logits, model(ids).logits)
    said = model.generate(ids, max_new_tokens=3, do_sample=False)
    positions = packed_arguments("position_ids")["position_ids"].expand(2, -1)
    assert torch.equal(model.generate(ids, position_ids=positions, max_new_tokens=3, do_sample=False), said)


@torch.no_grad()
def test_autocast_continues_what_was_begun_without(model, ids):
    expected = model(ids).logits
    cache = DynamicCache(config=model.config)
    model(ids[:, :30], past_key_values=cache)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids[:, 30:], past_key_values=cache).logits
    assert (found.float() - expected[:, 30:]).abs().mean() < 0.02 * expected.abs().max()


# The token loop


@pytest.mark.parametrize("scan", ["torch", "triton", "reference"])
def test_scan_implementations_say_the_same(model, ids, scan):
    if scan == "triton":
        pytest.importorskip("triton")
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    model.config.scan_implementation = scan
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)
    model.config.scan_implementation = "mambo"
    with pytest.raises(ValueError, match="`scan_implementation` must be one of"):
        model(ids)


@torch.no_grad()
def test_a_token_is_one_graph(model, ids):
    """Nothing in the loop asks the device for a value, so it can be captured; the cache stays where it is."""
    static = StaticCache(config=model.config, max_cache_len=60)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)

    model.set_experts_implementation("batched_mm")  # those of this package are one graph on a GPU
    step = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    masks = {"full_attention": None, "linear_attention": None}
    model(ids, past_key_values=static)
    token, said = expected[:, 50:51], []
    addresses = set()
    for i in range(5):
        may_see = (torch.arange(60) <= 50 + i)[None, None, None].expand(2, 1, 1, 60)
        logits = step(token, past_key_values=static, attention_mask={**masks, "full_attention": may_see}).logits
        said.append(logits)
        token = expected[:, 51 + i : 52 + i]
        addresses.add((static.layers[4].keys.data_ptr(), static.layers[0].recurrent_states[0].data_ptr()))
    wanted = model(expected[:, :-1], use_cache=False).logits[:, 50:]
    torch.testing.assert_close(torch.cat(said, dim=1), wanted, rtol=1e-4, atol=1e-4)
    assert len(addresses) == 1
