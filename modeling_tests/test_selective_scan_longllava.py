"""The scan against a float64 reference that is written out here, and against Transformers' own."""

import pytest
import torch
import torch.nn.functional as F

from longllava_hf import selective_scan_longllava
from longllava_hf.selective_scan_longllava import causal_conv1d, selective_scan, selective_scan_reference


def make_inputs(batch=2, channels=6, states=3, length=17, dtype=torch.float32, seed=0, dt=0.0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "u": randn(batch, channels, length),
        "delta": randn(batch, channels, length) + dt,
        "A": -torch.exp(randn(channels, states)),
        "B": randn(batch, states, length),
        "C": randn(batch, states, length),
        "D": randn(channels),
        "z": randn(batch, channels, length),
        "delta_bias": randn(channels),
        "initial_state": randn(batch, channels, states),
    }
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


def by_hand(u, delta, A, B, C, D=None, z=None, delta_bias=None, initial_state=None):
    """Every state of every channel on its own, in Python loops over float64."""
    u, delta, A, B, C = (x.double() for x in (u, delta, A, B, C))
    bias = torch.zeros(u.shape[1]).double() if delta_bias is None else delta_bias.double()
    y, final = torch.zeros_like(u), torch.zeros(u.shape[0], *A.shape).double()
    for b in range(u.shape[0]):
        for d in range(u.shape[1]):
            for n in range(A.shape[1]):
                h = 0.0 if initial_state is None else initial_state[b, d, n].double()
                for t in range(u.shape[2]):
                    dt = F.softplus(delta[b, d, t] + bias[d])
                    h = torch.exp(dt * A[d, n]) * h + dt * B[b, n, t] * u[b, d, t]
                    y[b, d, t] += C[b, n, t] * h
                final[b, d, n] = h
            if D is not None:
                y[b, d] += D[d].double() * u[b, d]
            if z is not None:
                y[b, d] *= F.silu(z[b, d].double())
    return y, final


@pytest.mark.parametrize("scan", [selective_scan, selective_scan_reference])
@pytest.mark.parametrize(
    "options", [(), ("D",), ("z",), ("delta_bias",), ("initial_state",), ("D", "z", "initial_state")]
)
def test_equals_the_recurrence_written_out(scan, options):
    inputs = make_inputs(batch=2, channels=3, states=2, length=19)
    inputs = {k: v for k, v in inputs.items() if k in ("u", "delta", "A", "B", "C", *options)}
    y, state = scan(**inputs, delta_softplus=True, return_final_state=True)
    expected, expected_state = by_hand(**inputs)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.double(), expected_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 1000, 1025])
@pytest.mark.parametrize("batch", [1, 3])
def test_outputs_and_gradients_at_odd_lengths(length, batch, monkeypatch):
    monkeypatch.setattr(selective_scan_longllava, "_BLOCK_LENGTH", 300)  # several blocks, the last one odd
    exact = make_inputs(batch=batch, length=length, dtype=torch.float64)
    results = {}
    for scan, dtype in ((selective_scan_reference, torch.float64), (selective_scan, torch.float32)):
        inputs = {k: v.detach().clone().to(dtype).requires_grad_() for k, v in exact.items()}
        y, state = scan(**inputs, delta_softplus=True, return_final_state=True)
        weight = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
        ((y * weight).sum() + state.sin().sum()).backward()
        results[scan] = [y.detach(), state.detach(), *(inputs[k].grad for k in inputs)]
    for expected, found in zip(results[selective_scan_reference], results[selective_scan]):
        scale = expected.abs().max().clamp(min=1.0)
        assert ((found.double() - expected).abs().max() / scale) < 1e-5


def test_equals_transformers():
    mamba_selective_scan = pytest.importorskip("transformers.models.jamba.modeling_jamba").mamba_selective_scan
    inputs = make_inputs(length=40)
    inputs.pop("initial_state")
    theirs = {"u": "hidden_states", "delta": "dt"}
    expected, expected_state = mamba_selective_scan(
        **{theirs.get(k, k): v for k, v in inputs.items()}, delta_softplus=True, return_last_state=True
    )
    y, state = selective_scan(**inputs, delta_softplus=True, return_final_state=True)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuts", [[1], [7], [64, 65], [1, 2, 3, 99]])
def test_a_sequence_may_be_cut_anywhere(cuts):
    inputs = make_inputs(length=100, dtype=torch.float64)
    state = inputs.pop("initial_state")
    whole, final = selective_scan(**inputs, initial_state=state, delta_softplus=True, return_final_state=True)
    pieces = []
    for begin, end in zip([0, *cuts], [*cuts, 100]):
        piece = {k: v[..., begin:end] if v.ndim == 3 else v for k, v in inputs.items()}
        y, state = selective_scan(**piece, initial_state=state, delta_softplus=True, return_final_state=True)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=-1), whole)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("dt", [-40.0, 20.0, 200.0])
def test_extreme_step_sizes(dt):
    inputs = {k: v.requires_grad_() for k, v in make_inputs(length=200, dt=dt).items()}
    y, state = selective_scan(**inputs, delta_softplus=True, return_final_state=True)
    (y.sum() + state.sum()).backward()
    assert all(torch.isfinite(x).all() for x in (y, state, *(v.grad for v in inputs.values())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_state_in_float32(dtype):
    inputs = make_inputs(length=130, dtype=dtype)
    y, state = selective_scan(**inputs, delta_softplus=True, return_final_state=True)
    expected, expected_state = selective_scan_reference(
        **{k: v.double() for k, v in inputs.items()}, delta_softplus=True, return_final_state=True
    )
    assert y.dtype == dtype and state.dtype == torch.float32
    assert (y.double() - expected).abs().max() / expected.abs().max() < 1e-2
    torch.testing.assert_close(state.double(), expected_state, rtol=1e-4, atol=1e-4)


def test_memory_does_not_grow_with_the_states():
    """What autograd keeps for a long sequence is far less than one state for each token."""
    inputs = {k: v.requires_grad_() for k, v in make_inputs(batch=1, channels=8, states=16, length=6000).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        selective_scan(**inputs, delta_softplus=True)
    all_states = 8 * 16 * 6000
    assert max(kept) <= 8 * 6000 * 2
    assert sum(kept) < all_states * 2


def test_convolution_knows_its_past():
    torch.manual_seed(0)
    conv1d = torch.nn.Conv1d(6, 6, kernel_size=4, groups=6)
    x = torch.randn(2, 6, 30)
    expected = conv1d(F.pad(x, (3, 0)))
    state, pieces = x.new_zeros(2, 6, 4), []
    for piece in x.split([1, 2, 3, 24], dim=-1):
        pieces.append(causal_conv1d(piece, state, conv1d))
        state = torch.cat([state, piece], dim=-1)[..., -4:]
    torch.testing.assert_close(torch.cat(pieces, dim=-1), expected)
