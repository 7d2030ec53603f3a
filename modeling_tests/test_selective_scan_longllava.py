"""The scan against a float64 reference that is written out here, and against Transformers' own."""

import itertools
import os
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from longllava_hf import scan_blocked_longllava, scan_triton_longllava, selective_scan_longllava
from longllava_hf.selective_scan_longllava import choose_scan, selective_scan


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ["torch", "triton"]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several groups of channels and blocks of tokens, the last of each an odd one."""
    monkeypatch.setattr(scan_blocked_longllava, "_BUSY_STATES", 12)
    monkeypatch.setattr(scan_blocked_longllava, "_BLOCK_VALUES", 12 * 60)
    monkeypatch.setattr(scan_triton_longllava, "_KERNEL_CHANNELS", 8)


def make_inputs(batch=2, channels=6, states=3, length=17, dtype=torch.float32, seed=0, dt=0.0, device="cpu"):
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
        "initial_state": randn(batch, channels, states),
    }
    return {name: tensor.to(device, dtype) for name, tensor in inputs.items()}


def make_boundaries(batch, length):
    """Sequences of a few tokens, at other places in every row; one of them right at the second token."""
    generator = torch.Generator().manual_seed(length)
    seq_idx = (torch.rand(batch, length, generator=generator) < 0.1).cumsum(-1)
    if length > 1:
        seq_idx[0, 1:] += 1
    return seq_idx


def by_hand(u, delta, A, B, C, D, z, initial_state=None, seq_idx=None):
    """Every state of every channel on its own, in Python loops over float64."""
    u, delta, A, B, C = (x.double() for x in (u, delta, A, B, C))
    y, final = torch.zeros_like(u), torch.zeros(u.shape[0], *A.shape).double()
    for b in range(u.shape[0]):
        for d in range(u.shape[1]):
            for n in range(A.shape[1]):
                h = 0.0 if initial_state is None else initial_state[b, d, n].double()
                for t in range(u.shape[2]):
                    if seq_idx is not None and t > 0 and seq_idx[b, t] != seq_idx[b, t - 1]:
                        h = 0.0
                    dt = F.softplus(delta[b, d, t])
                    h = torch.exp(dt * A[d, n]) * h + dt * B[b, n, t] * u[b, d, t]
                    y[b, d, t] += C[b, n, t] * h
                final[b, d, n] = h
            y[b, d] = (y[b, d] + D[d].double() * u[b, d]) * F.silu(z[b, d].double())
    return y, final


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("options", [(), ("initial_state",), ("seq_idx",), ("initial_state", "seq_idx")])
def test_equals_the_recurrence_written_out(implementation, options):
    inputs = {**make_inputs(batch=2, channels=3, states=2, length=19), "seq_idx": make_boundaries(2, 19)}
    inputs = {k: v for k, v in inputs.items() if k in ("u", "delta", "A", "B", "C", "D", "z", *options)}
    expected, expected_state = by_hand(**inputs)
    inputs = {k: v.to(DEVICE) for k, v in inputs.items()}
    y, state = selective_scan(**inputs, implementation=implementation)
    torch.testing.assert_close(y.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.double().cpu(), expected_state, rtol=1e-5, atol=1e-5)


def results(inputs, seq_idx=None, **options):
    """Output, final state, and the gradients of a sum of both."""
    inputs = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    y, state = selective_scan(**inputs, seq_idx=seq_idx, **options)
    weight = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64).view_as(y)
    ((y.double() * weight).sum() + state.double().sin().sum()).backward()
    found = {"y": y.detach(), "final_state": state.detach()}
    return {**found, **{f"gradient of {k}": v.grad for k, v in inputs.items()}}


def check(inputs, seq_idx, implementation, tolerance, **options):
    exact = {k: v.double() for k, v in inputs.items()}
    expected = results(exact, seq_idx, implementation="reference", **options)
    for name, found in results(inputs, seq_idx, implementation=implementation, **options).items():
        scale = expected[name].abs().max().clamp(min=1.0)
        error = ((found.double() - expected[name]).abs().max() / scale).item()
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("length", "batch", "boundaries"),
    [(*case, boundaries) for case in itertools.product([1, 2, 63, 64, 65], [1, 3]) for boundaries in (False, True)]
    + [(1000, 1, False), (1000, 3, True)],  # the interpreter of Triton kernels takes its time
)
def test_outputs_and_gradients_at_odd_lengths(length, batch, boundaries, implementation):
    inputs = make_inputs(batch=batch, length=length, device=DEVICE)
    seq_idx = make_boundaries(batch, length).to(DEVICE) if boundaries else None
    check(inputs, seq_idx, implementation, 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_without_a_state(implementation, dtype):
    inputs = make_inputs(length=65, dtype=dtype, device=DEVICE)
    inputs.pop("initial_state")
    check(inputs, make_boundaries(2, 65).to(DEVICE), implementation, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("length", "batch"), [*itertools.product([1, 2, 63, 64, 65], [1, 3]), (1000, 1)])
def test_half_precision(dtype, implementation, length, batch):
    inputs = make_inputs(batch=batch, length=length, dtype=dtype, device=DEVICE)
    # The output's gradient is rounded too, and A's adds up over the tokens.
    check(inputs, None, implementation, 1e-2 if length < 1000 else 2e-2)
    # A sum of bfloat16 states would be off by percents; those of float32 are not.
    state = inputs.pop("initial_state").float()
    options = {"initial_state": state}
    y, final_state = selective_scan(**inputs, **options, implementation=implementation)
    exact = {k: v.double() for k, v in inputs.items()}
    expected = selective_scan(**exact, **options, implementation="reference")[1]
    assert y.dtype == dtype and final_state.dtype == torch.float32
    torch.testing.assert_close(final_state.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("batch", [1, 2])
def test_strides_do_not_matter(implementation, batch, monkeypatch):
    """As the mixer has them: transposed views, the gate being half of a tensor. None of them is written to."""
    monkeypatch.setattr(scan_blocked_longllava, "_BUSY_STATES", 1 << 16)  # all channels at once: views of whole rows
    inputs = make_inputs(batch=batch, length=33, device=DEVICE)
    expected = results(inputs, implementation=implementation)
    both = torch.cat([inputs["u"], inputs["z"]], dim=1).transpose(1, 2).contiguous().transpose(1, 2)
    inputs["u"], inputs["z"] = both.chunk(2, dim=1)
    for name in ("delta", "B", "C"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    leaf = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    before = {k: v.clone() for k, v in inputs.items()}
    y, state = selective_scan(**leaf, implementation=implementation)
    weight = torch.linspace(-1, 1, y.numel(), device=DEVICE, dtype=torch.float64).view(y.shape)
    ((y.double() * weight).sum() + state.double().sin().sum()).backward()
    found = {"y": y, "final_state": state, **{f"gradient of {k}": v.grad for k, v in leaf.items()}}
    for name in found:
        torch.testing.assert_close(found[name], expected[name])
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)
    grad = torch.ones(y.shape, device=DEVICE).transpose(1, 2).contiguous().transpose(1, 2)
    torch.autograd.grad(selective_scan(**leaf, implementation=implementation)[0], [leaf["u"]], grad)
    assert torch.equal(grad, torch.ones_like(grad))


@pytest.mark.parametrize("channels", [3, 17])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_states_that_are_no_power_of_two(implementation, channels):
    check(make_inputs(channels=channels, states=5, length=70, device=DEVICE), None, implementation, 1e-5)


def test_equals_transformers():
    mamba_selective_scan = pytest.importorskip("transformers.models.jamba.modeling_jamba").mamba_selective_scan
    inputs = make_inputs(length=40)
    inputs.pop("initial_state")
    theirs = {"u": "hidden_states", "delta": "dt"}
    expected, expected_state = mamba_selective_scan(
        **{theirs.get(k, k): v for k, v in inputs.items()}, delta_softplus=True, return_last_state=True
    )
    y, state = selective_scan(**inputs)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuts", [[1], [7], [64, 65], [1, 2, 3, 99]])
def test_a_sequence_may_be_cut_anywhere(cuts):
    inputs = make_inputs(length=100, dtype=torch.float64)
    state = inputs.pop("initial_state")
    whole, final = selective_scan(**inputs, initial_state=state)
    pieces = []
    for begin, end in zip([0, *cuts], [*cuts, 100]):
        piece = {k: v[..., begin:end] if v.ndim == 3 else v for k, v in inputs.items()}
        y, state = selective_scan(**piece, initial_state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=-1), whole)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_sequences_equal_each_alone(implementation):
    inputs = make_inputs(batch=1, length=60, device=DEVICE)
    inputs.pop("initial_state")
    seq_idx = torch.tensor([[0] * 7 + [1] * 1 + [2] * 52], device=DEVICE)
    options = {"implementation": implementation}
    y, state = selective_scan(**inputs, seq_idx=seq_idx, **options)
    for begin, end in ((0, 7), (7, 8), (8, 60)):
        alone = {k: v[..., begin:end] if v.ndim == 3 else v for k, v in inputs.items()}
        expected, expected_state = selective_scan(**alone, **options)
        torch.testing.assert_close(y[..., begin:end], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dt", [-200.0, -40.0, 20.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_step_sizes(dt, implementation, dtype):
    found = results(make_inputs(length=100, dt=dt, dtype=dtype, device=DEVICE), implementation=implementation)
    assert all(torch.isfinite(x).all() for x in found.values())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_step_of_minus_infinity_is_none(implementation):
    """How padding is skipped: neither state nor gradients know of it."""
    inputs = make_inputs(length=20, device=DEVICE)
    inputs["delta"][..., 10:] = float("-inf")
    found = results(inputs, implementation=implementation)
    assert all(torch.isfinite(x).all() for x in found.values())
    short = {k: v[..., :10] if v.ndim == 3 and k != "initial_state" else v for k, v in inputs.items()}
    final = selective_scan(**short, implementation=implementation)[1]
    torch.testing.assert_close(found["final_state"], final)
    assert not found["gradient of delta"][..., 10:].any()


@pytest.mark.parametrize("length", [1, 70])
def test_autocast_changes_nothing(length):
    inputs = make_inputs(length=length)
    expected = selective_scan(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = selective_scan(**inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))
    if length > 1:
        expected = results(inputs)
        with torch.autocast("cpu", torch.bfloat16):
            assert all(torch.equal(x, expected[name]) for name, x in results(inputs).items())


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_scan(batch, length, implementation):
    inputs = make_inputs(batch=batch, length=length, device=DEVICE)
    y, state = selective_scan(**inputs, implementation=implementation)
    assert y.shape == (batch, 6, length) and torch.equal(state, inputs["initial_state"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("wanted", [("u",), ("A", "C"), ("initial_state",), ("D", "z")])
def test_gradients_of_some_inputs(implementation, wanted):
    inputs = make_inputs(length=33, device=DEVICE)
    expected = results(inputs, implementation="reference")
    leaves = {k: v.requires_grad_(k in wanted) for k, v in inputs.items()}
    y, state = selective_scan(**leaves, implementation=implementation)
    weight = torch.linspace(-1, 1, y.numel(), device=DEVICE, dtype=torch.float64).view_as(y)
    ((y.double() * weight).sum() + state.double().sin().sum()).backward()
    for name, leaf in leaves.items():
        if name in wanted:
            torch.testing.assert_close(leaf.grad, expected[f"gradient of {name}"], rtol=1e-4, atol=1e-4)
        else:
            assert leaf.grad is None


def test_memory_does_not_grow_with_the_states(monkeypatch):
    """What autograd keeps for a long sequence is far less than one state for each token."""
    monkeypatch.undo()
    inputs = {k: v.requires_grad_() for k, v in make_inputs(batch=1, channels=8, states=16, length=6000).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        selective_scan(**inputs)
    all_states = 8 * 16 * 6000
    assert max(kept) <= 8 * 6000 * 2
    assert sum(kept) < all_states * 2


def test_the_dispatcher(monkeypatch):
    u = torch.empty(1, 8, 4)
    assert choose_scan(u) == ("triton" if u.is_cuda else "torch")
    assert choose_scan(u, requested="reference") == "reference"
    assert choose_scan(u.to("meta").double().float()) == "triton"  # plans are for a GPU
    with pytest.raises(
        ValueError, match=r"must be one of \['reference', 'torch', 'triton', 'mamba_ssm'\], but is 'x'"
    ):
        choose_scan(u, requested="x")
    with pytest.raises(ValueError, match="needs the package mamba-ssm"):
        choose_scan(u, requested="mamba_ssm")
    with pytest.raises(ValueError, match="float32, but the input is float64"):
        choose_scan(u.double(), requested="triton")
    monkeypatch.setattr(selective_scan_longllava, "is_installed", lambda package: True)
    on_a_gpu = types.SimpleNamespace(
        is_cuda=True, device=torch.device("cuda"), dtype=torch.bfloat16, is_meta=False, shape=u.shape
    )
    assert choose_scan(on_a_gpu) == "mamba_ssm"
    assert choose_scan(on_a_gpu, requested="triton") == "triton"
    for limits in ({"has_state": True}, {"has_boundaries": True}):  # which the package does not know
        assert choose_scan(on_a_gpu, **limits) == choose_scan(on_a_gpu, **limits, requested="mamba_ssm") == "triton"
    on_a_gpu.dtype = torch.float64
    assert choose_scan(on_a_gpu) == "torch"


def test_mamba_ssm_is_called_as_it_wants(monkeypatch):
    """Its documented signature, computed by Transformers' scan."""
    jamba = pytest.importorskip("transformers.models.jamba.modeling_jamba")

    def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
    ):
        assert u.dtype == delta.dtype == B.dtype == C.dtype == z.dtype
        assert A.dtype == D.dtype == torch.float32 and delta_bias is None and delta_softplus
        return jamba.mamba_selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state=return_last_state
        )

    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.setattr(selective_scan_longllava, "choose_scan", lambda *args: "mamba_ssm")
    inputs = make_inputs(length=12)
    inputs.pop("initial_state")
    y, state = selective_scan(**inputs)
    expected, expected_state = selective_scan_longllava.selective_scan_reference(*inputs.values(), None, None)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-5)


def test_compiled_whole():
    """With outputs that lie token by token in memory, as a model's do."""
    inputs = make_inputs(length=9)
    for name in ("u", "delta", "z"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    scan = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    arguments = {**inputs, "implementation": "torch"}
    with torch.no_grad():
        torch.testing.assert_close(scan(**arguments), selective_scan(**arguments))


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import longllava_hf.scan_triton_longllava as scan

for capability in (80, 90):
    for long in ("*bf16", "*fp32"):
        for kernel in (scan._scan_kernel, scan._scan_backward_kernel):
            constants = {name: True for name in kernel.arg_names if name.startswith("HAS_") or name == "SAVE"}
            constants |= {"BLOCK": 32, "STATES": 16, "CHUNK": 64}
            typed = ("u", "delta", "B", "C", "z", "y", "grad_y", "grad_u", "grad_delta", "grad_z")
            types = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
            types |= {f"{name}_ptr": long for name in typed} | {"resets_ptr": "*i8"}
            types = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
            aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")}
            source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
            ptx = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1}).asm["ptx"]
            # The states of a channel are one thread's: their sum needs no exchange between threads.
            assert kernel is scan._scan_backward_kernel or "shfl" not in ptx
            # States never leave the registers for want of room.
            assert "st.local" not in ptx
print("compiled")
"""


@pytest.mark.slow
def test_kernels_compile_for_gpus(tmp_path):
    """For an A100 and an H200, which need not be there for that."""
    pytest.importorskip("triton")
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, env=environment)
    assert run.stdout.strip() == "compiled", run.stderr[-2000:]
