"""The convolution against its reference, against PyTorch's own, and with adapters around it."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from longllava_hf import LongLLaVAForCausalLM, causal_conv1d_longllava
from longllava_hf.causal_conv1d_longllava import causal_conv1d

from .conftest import small_config
from .test_selective_scan_longllava import make_boundaries


def make_conv(channels=6, bias=True):
    torch.manual_seed(0)
    return torch.nn.Conv1d(channels, channels, kernel_size=4, groups=channels, bias=bias)


def causal_conv1d_reference(x, conv1d, initial_state=None, seq_idx=None):
    """Token by token and tap by tap."""
    length, width = x.shape[-1], conv1d.kernel_size[0]
    past = x.new_zeros(*x.shape[:2], width) if initial_state is None else initial_state.to(x.dtype)
    inputs = torch.cat([past, x], dim=-1)
    outputs = []
    for t in range(length):
        y = torch.zeros_like(x[..., 0])
        for back in range(width):
            tap = inputs[..., width + t - back] * conv1d.weight[:, 0, -1 - back]
            if seq_idx is not None:
                same = seq_idx[:, max(t - back, 0)] == seq_idx[:, t]
                tap = torch.where(same[:, None], tap, 0)
            y = y + tap
        outputs.append(y if conv1d.bias is None else y + conv1d.bias)
    return torch.stack(outputs, dim=-1)


def test_a_past_of_another_shape_is_refused():
    x, conv1d = torch.randn(2, 6, 5), make_conv()
    width = conv1d.kernel_size[0]
    with pytest.raises(ValueError, match=rf"`initial_state` must have the shape \(2, {x.shape[1]}, {width}\)"):
        causal_conv1d(x, conv1d, x.new_zeros(2, x.shape[1], width - 1))


def test_convolution_knows_its_past():
    conv1d, x = make_conv(), torch.randn(2, 6, 30)
    expected = conv1d(F.pad(x, (3, 0)))
    state, pieces = x.new_zeros(2, 6, 4), []
    for piece in x.split([1, 2, 3, 24], dim=-1):
        pieces.append(causal_conv1d(piece, conv1d, state))
        state = torch.cat([state, piece], dim=-1)[..., -4:]
    torch.testing.assert_close(torch.cat(pieces, dim=-1), expected)


@pytest.mark.parametrize("length", [1, 2, 5, 30])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("has_past", [True, False])
@pytest.mark.parametrize("boundaries", [True, False])
def test_convolution_equals_its_reference(length, bias, has_past, boundaries):
    conv1d = make_conv(bias=bias).double()
    seq_idx = make_boundaries(3, length) if boundaries else None
    found = []
    for convolve in (causal_conv1d, causal_conv1d_reference):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(3, 6, length, generator=generator, dtype=torch.float64, requires_grad=True)
        past = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        conv1d.zero_grad()
        y = convolve(x, conv1d, past if has_past else None, seq_idx)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        found.append([y, x.grad, *(p.grad.clone() for p in conv1d.parameters()), *([past.grad] if has_past else [])])
    for ours, reference in zip(*found):
        torch.testing.assert_close(ours, reference)


def test_what_another_sequence_holds_leaves_no_trace():
    conv1d, x = make_conv(), torch.randn(1, 6, 20)
    seq_idx = (torch.arange(20) >= 9).long()[None]
    expected = conv1d(F.pad(x[..., 9:], (3, 0)))
    x[..., :9] = float("inf")
    leaf = x.requires_grad_()
    y = causal_conv1d(leaf, conv1d, torch.full((1, 6, 4), float("inf")), seq_idx)
    torch.testing.assert_close(y[..., 9:], expected)
    y[..., 9:].sum().backward()
    assert torch.isfinite(leaf.grad).all() and not leaf.grad[..., :9].any()


@pytest.mark.parametrize("boundaries", [True, False])
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_gradients_of_some_inputs(frozen, boundaries):
    """As with an adapter, or the first layer: what is frozen gets none, and the rest what it gets otherwise."""
    found = []
    for convolve in (causal_conv1d, causal_conv1d_reference):
        conv1d, x = make_conv(), torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(1))
        x.requires_grad_(frozen != "x")
        conv1d.weight.requires_grad_(frozen != "weight")
        convolve(x, conv1d, None, make_boundaries(2, 20) if boundaries else None).square().sum().backward()
        found.append([x.grad, conv1d.weight.grad, conv1d.bias.grad])
    for ours, reference in zip(*found):
        assert (ours is None) == (reference is None)
        if ours is not None:
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


def test_causal_conv1d_is_called_as_it_wants(monkeypatch):
    """The package's documented demands, and its result from the reference."""
    conv1d = make_conv(8)
    calls = []

    def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None):
        assert weight.shape == (8, 4) and bias.shape == (8,)
        assert x.stride(1) == 1
        assert seq_idx is None or (initial_states is None and seq_idx.dtype == torch.int32 and seq_idx.is_contiguous())
        if initial_states is not None:
            assert initial_states.shape == (2, 8, 3) and initial_states.stride(1) == 1
            initial_states = F.pad(initial_states, (1, 0))
        calls.append(None)
        return causal_conv1d_reference(x, conv1d, initial_states, seq_idx)

    package = types.ModuleType("causal_conv1d")
    package.causal_conv1d_fn = causal_conv1d_fn
    monkeypatch.setitem(sys.modules, "causal_conv1d", package)
    monkeypatch.setattr(causal_conv1d_longllava, "_knows_causal_conv1d", lambda x, conv1d, has_both: not has_both)
    x, past, seq_idx = torch.randn(2, 8, 20), torch.randn(2, 8, 4), make_boundaries(2, 20)
    for arguments in ((None, None), (past, None), (None, seq_idx), (past, seq_idx)):
        torch.testing.assert_close(
            causal_conv1d(x, conv1d, *arguments), causal_conv1d_reference(x, conv1d, *arguments), rtol=1e-5, atol=1e-5
        )
    assert len(calls) == 3


@pytest.mark.filterwarnings("ignore:LoRA adapter added to")
def test_lora_on_the_convolution():
    """Called and trained, and still a function of a state: PEFT wants a rank that the groups divide, and cannot merge."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = LongLLaVAForCausalLM(small_config().text_config).eval()
    ids = torch.arange(6, 40)[None]
    with torch.no_grad():
        before = model(ids).logits
    rank = model.model.layers[0].mamba.conv1d.groups
    config = peft.LoraConfig(r=rank, target_modules=["conv1d"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    loss = model(ids, labels=ids).loss
    loss.backward()
    adapters = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
    assert any("lora_A" in name for name in adapters) and any("lora_B" in name for name in adapters)
    assert all(grad is not None and grad.abs().max() > 0 for grad in adapters.values())
    with torch.no_grad():
        whole = model(ids, use_cache=True)
        first = model(ids[:, :13], use_cache=True)
        second = model(ids[:, 13:], past_key_values=first.past_key_values).logits
        assert (whole.logits - before).abs().max() > 1e-3
        torch.testing.assert_close(torch.cat([first.logits, second], dim=1), whole.logits, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(model(ids).logits, before)
