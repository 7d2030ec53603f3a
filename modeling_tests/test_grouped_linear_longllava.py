"""Grouped linear layers and experts: every path against a readable reference in float64."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from longllava_hf import LongLLaVATextConfig
from longllava_hf.experts_longllava import (
    ExpertWeights,
    experts_grouped,
    experts_loop,
    experts_reference,
)
from longllava_hf.grouped_linear_longllava import (
    grouped_linear,
    grouped_linear_triton,
    quantize_rows,
    routed_mlp_triton,
    scaled_linear,
)
from longllava_hf.modeling_longllava_text import LongLLaVAExperts

from .conftest import expert_matrix


# Interpreted on the CPU, compiled where there is a GPU.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
GROUPS = 4

triton = pytest.importorskip("triton")


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if expected.numel() == 0:
        return float(actual.shape != expected.shape)
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-9)).item()


def split(rows: int, how: str) -> torch.Tensor:
    """Where each group's rows end."""
    if how == "all in one":
        counts = [0, 0, rows, 0]
    elif how == "one alone":
        counts = [rows - 1, 0, 1, 0] if rows else [0] * 4
    else:  # spread, with a group that gets none
        counts = [rows // 2, 0, rows // 3, rows - rows // 2 - rows // 3]
    return torch.tensor(counts, device=DEVICE).cumsum(0)


def matrices(dtype, is_int8: bool, rows: int = 72, columns: int = 40, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(GROUPS, rows, columns, generator=generator) / columns**0.5).to(DEVICE, dtype)
    return quantize_rows(weight) if is_int8 else (weight, None)


def grouped_linear_reference(x, weight, offsets, scale=None):
    """Each row with its group's matrix, all of them written out."""
    weight = weight.to(x.dtype) if scale is None else weight.to(x.dtype) * scale.to(x.dtype)[..., None]
    group_of_row = torch.searchsorted(offsets, torch.arange(len(x), device=x.device), right=True)
    return torch.einsum("rk,rnk->rn", x, weight[group_of_row])


@pytest.mark.parametrize("kernel", [grouped_linear_triton, grouped_linear])
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("how", ["spread", "all in one", "one alone"])
@pytest.mark.parametrize("rows", [1, 63, 128, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_linear(kernel, is_int8, how, rows, dtype):
    weight, scale = matrices(dtype, is_int8)
    offsets = split(rows, how)
    x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    expected = grouped_linear_reference(exact, weight if is_int8 else weight.double(), offsets, scale)
    actual = kernel(x, weight, offsets, scale)
    assert actual.dtype == dtype
    assert relative(actual, expected) < TOLERANCE[dtype]
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    actual.backward(grad)
    expected.backward(grad.double())
    assert relative(x.grad, exact.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("kernel", [grouped_linear_triton, grouped_linear])
def test_grouped_linear_has_gradients_for_its_weight(kernel):
    weight = matrices(torch.float32, False)[0].requires_grad_()
    exact = weight.detach().double().requires_grad_()
    offsets = split(63, "spread")
    x = torch.randn(63, 40, device=DEVICE)
    kernel(x, weight, offsets).square().sum().backward()
    grouped_linear_reference(x.double(), exact, offsets).square().sum().backward()
    assert relative(weight.grad, exact.grad) < 1e-5


@pytest.mark.parametrize("kernel", [grouped_linear_triton, grouped_linear])
def test_grouped_linear_without_rows(kernel):
    weight, scale = matrices(torch.float32, True)
    assert kernel(torch.zeros(0, 40, device=DEVICE), weight, split(0, "spread"), scale).shape == (0, 72)


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 2), (7, 2), (3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routed_mlp(is_int8, tokens, top_k, dtype):
    gate_up, gate_up_scale = matrices(dtype, is_int8, rows=2 * 56, columns=40)
    down, down_scale = matrices(dtype, is_int8, rows=40, columns=56, seed=1)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 40, generator=generator).to(DEVICE, dtype)
    weights, index = torch.randn(tokens, GROUPS, generator=generator).to(DEVICE).softmax(-1).topk(top_k)
    exact = [ExpertWeights(gate_up, gate_up_scale), ExpertWeights(down, down_scale)]
    if not is_int8:
        exact = [ExpertWeights(part.weight.double()) for part in exact]
    expected = experts_reference(x.double(), index, weights.double(), *exact, F.silu)
    actual = routed_mlp_triton(x, index, weights.to(dtype), gate_up, down, gate_up_scale, down_scale)
    assert actual.dtype == dtype
    assert relative(actual, expected) < 2 * TOLERANCE[dtype]  # what is between the two products is rounded as well


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 33])
@pytest.mark.parametrize("shape", [(64, 96), (72, 40), (32, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scaled_linear(rows, shape, dtype):
    weight, scale = quantize_rows(torch.randn(*shape))
    x = torch.randn(2, rows, shape[1], dtype=dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    actual = scaled_linear(x, weight, scale)
    expected = F.linear(exact, weight.double() * scale.double()[:, None])
    tolerance = TOLERANCE.get(dtype, 1e-9)
    assert relative(actual, expected) < tolerance
    actual.sum().backward()
    expected.sum().backward()
    assert relative(x.grad, exact.grad) < tolerance


def test_quantize_rows():
    weight = torch.randn(5, 40)
    weight[2] = 0
    values, scale = quantize_rows(weight)
    assert values.dtype == torch.int8 and scale.dtype == torch.float32
    assert values.abs().amax(1).tolist() == [127, 127, 0, 127, 127]
    assert ((values * scale[:, None] - weight).abs() <= scale[:, None] / 2 + 1e-7).all()
    assert torch.isfinite(scale).all()


# Experts as a whole


def expert_inputs(tokens: int, dtype: torch.dtype, how: str = "spread"):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, 40, generator=generator).to(dtype)
    logits = torch.randn(tokens, GROUPS, generator=generator)
    if how == "some idle":
        logits[:, 1:3] = -torch.inf
    weights, index = logits.softmax(-1).topk(2)
    return x, index, weights.to(dtype)


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("how", ["spread", "some idle"])
@pytest.mark.parametrize("tokens", [1, 63, 128, 1000])
@pytest.mark.parametrize("experts", [experts_loop, experts_grouped])
def test_experts(experts, tokens, how, is_int8):
    gate_up, gate_up_scale = matrices(torch.float32, is_int8, rows=2 * 56, columns=40)
    down, down_scale = matrices(torch.float32, is_int8, rows=40, columns=56, seed=1)
    gate_up, down = (None if t is None else t.cpu() for t in (gate_up, down))
    scales = [None if t is None else t.cpu() for t in (gate_up_scale, down_scale)]
    x, index, weights = expert_inputs(tokens, torch.float32, how)
    x, exact = x.requires_grad_(), x.detach().double().requires_grad_()
    weights, exact_weights = weights.requires_grad_(), weights.detach().double().requires_grad_()
    ours = [ExpertWeights(gate_up, scales[0]), ExpertWeights(down, scales[1])]
    dense = [ExpertWeights(torch.stack([expert_matrix(w, e, torch.float64) for e in range(GROUPS)])) for w in ours]
    actual = experts(x, index, weights, *ours, F.silu)
    expected = experts_reference(exact, index, exact_weights, *dense, F.silu)
    assert relative(actual, expected) < 1e-5
    actual.square().sum().backward()
    expected.square().sum().backward()
    assert relative(x.grad, exact.grad) < 1e-5
    assert relative(weights.grad, exact_weights.grad) < 1e-5


@pytest.mark.parametrize("implementation", [None, "eager", "longllava", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_equal_transformers(dtype, implementation):
    torch.manual_seed(0)
    theirs = MixtralExperts(MixtralConfig(hidden_size=40, intermediate_size=56, num_local_experts=GROUPS)).to(dtype)
    theirs.config._experts_implementation = "eager"
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    config = LongLLaVATextConfig(hidden_size=40, intermediate_size=56, num_experts=GROUPS)
    config._experts_implementation = implementation
    ours = LongLLaVAExperts(config).to(dtype)
    for name in ("gate_up_proj", "down_proj"):
        getattr(ours, name).weight.data.copy_(getattr(theirs, name).detach().flatten(0, 1))
    x, index, weights = expert_inputs(130, dtype)
    actual, expected = ours(x, index, weights), theirs(x, index, weights)
    assert relative(actual, expected) < TOLERANCE[dtype]
    actual.sum().backward()
    expected.sum().backward()
    for name in ("gate_up_proj", "down_proj"):
        theirs_grad = getattr(theirs, name).grad.flatten(0, 1)
        assert relative(getattr(ours, name).weight.grad, theirs_grad) < 2 * TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("is_int8", [False, True])
def test_decoding_is_captured_by_a_graph(is_int8):
    gate_up, gate_up_scale = matrices(torch.bfloat16, is_int8, rows=2 * 256, columns=128)
    down, down_scale = matrices(torch.bfloat16, is_int8, rows=128, columns=256)
    x = torch.randn(1, 128, device="cuda", dtype=torch.bfloat16)
    weights, index = torch.randn(1, GROUPS, device="cuda").softmax(-1).topk(2)
    arguments = (x, index, weights.bfloat16(), gate_up, down, gate_up_scale, down_scale)
    expected = routed_mlp_triton(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = routed_mlp_triton(*arguments)
    x.neg_()
    graph.replay()
    assert relative(output, routed_mlp_triton(*arguments)) == 0
    x.neg_()
    graph.replay()
    assert relative(output, expected) == 0


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import longllava_hf.grouped_linear_longllava as kernels


def build(kernel, capability, types, constants, integers):
    while hasattr(kernel, "configs"):  # the autotuner around it
        kernel = kernel.fn
    types = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name not in constants and (name.endswith("_ptr") or name in integers)
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    return compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]


pointers = {"scale_ptr": "*fp32", "offsets_ptr": "*i64", "index_ptr": "*i64"}
for capability in (80, 90):
    for scaled, weight in ((0, "*bf16"), (1, "*i8"), (2, "*i8")):
        activations = dict.fromkeys(("x_ptr", "out_ptr", "weights_ptr"), "*bf16")
        types = {**pointers, **activations, "w_ptr": weight}
        constants = {
            "GROUPS": 16, "ROWS_A_GROUP": 512, "SCALED": scaled, "IEEE": False,
            "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "stride_wn" if scaled == 2 else "stride_wk": 1,
        }
        strides = ("N", "K", "stride_xm", "stride_wg", "stride_wn", "stride_wk", "stride_sg")
        ptx = build(kernels._grouped_linear_kernel, capability, types, constants, strides)
        # The tensor cores are used, also where a weight is int8.
        assert ("wgmma" if capability == 90 else "mma.sync") in ptx, (capability, scaled)
        constants = {"TOP_K": 2, "SCALED": bool(scaled), "BLOCK_N": 16, "BLOCK_K": 512}
        for kernel in (kernels._routed_gate_up_kernel, kernels._routed_down_kernel):
            build(kernel, capability, types, constants, ("H", "I"))
print("compiled")
"""


@pytest.mark.slow
def test_kernels_compile_for_gpus(tmp_path):
    """For an A100 and an H200, which need not be there for that."""
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, env=environment)
    assert run.stdout.strip() == "compiled", run.stderr[-2000:]
