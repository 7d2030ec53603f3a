# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
A layer's experts on the CPU, against Transformers' implementations with the same weights and inputs, in one run.

    python benchmarks/experts.py [--tokens 4096] [--experts 16] [--hidden-size 512]
"""

import argparse
from pathlib import Path

import torch
from report import RESULTS, machine, print_table, time_side_by_side, write_json
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from longllava_hf import LongLLaVATextConfig
from longllava_hf.grouped_linear_longllava import quantize_rows
from longllava_hf.int8_longllava import LongLLaVAInt8Linear
from longllava_hf.modeling_longllava_text import LongLLaVAExperts


def build(sizes: dict, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """Transformers' experts, ours, and ours in int8, all with the same weights."""
    experts, hidden, intermediate = sizes["experts"], sizes["hidden_size"], sizes["intermediate_size"]
    torch.manual_seed(0)
    theirs = MixtralExperts(
        MixtralConfig(hidden_size=hidden, intermediate_size=intermediate, num_local_experts=experts)
    ).to(dtype)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    config = LongLLaVATextConfig(hidden_size=hidden, intermediate_size=intermediate, num_experts=experts)
    ours, int8 = LongLLaVAExperts(config).to(dtype), LongLLaVAExperts(config)
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(theirs, name).detach().flatten(0, 1)
        getattr(ours, name).weight.data.copy_(weight)
        layer = LongLLaVAInt8Linear(weight.shape[1], weight.shape[0])
        layer.weight.data, layer.weight_scale.data = quantize_rows(weight)
        setattr(int8, name, layer)
    return {"theirs": theirs, "ours": ours, "int8": int8}


@torch.no_grad()
def compare(sizes: dict, dtype: torch.dtype, rounds: int) -> list[dict]:
    modules = build(sizes, dtype)
    hidden_states = torch.randn(sizes["tokens"], sizes["hidden_size"]).to(dtype)
    router = torch.randn(sizes["tokens"], sizes["experts"]).softmax(-1)
    weights, index = router.topk(sizes["top_k"])
    weights = weights.to(dtype)

    def theirs(implementation: str):
        def run():
            modules["theirs"].config._experts_implementation = implementation
            return modules["theirs"](hidden_states, index, weights)

        return run

    candidates = {
        "Transformers, grouped_mm (its default)": theirs("grouped_mm"),
        "Transformers, eager": theirs("eager"),
        "ours": lambda: modules["ours"](hidden_states, index, weights),
        "ours, int8 weights": lambda: modules["int8"](hidden_states, index, weights),
    }
    expected = candidates["Transformers, eager"]().double()
    seconds = time_side_by_side(candidates, rounds)
    grouped, eager = (seconds[name]["minimum"] for name in list(candidates)[:2])
    rows = []
    for name, run in candidates.items():
        error = (run().double() - expected).abs().max() / expected.abs().max()
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "experts": name,
                "time / grouped_mm": seconds[name]["minimum"] / grouped,
                "time / eager": seconds[name]["minimum"] / eager,
                "median / eager": seconds[name]["median"] / seconds["Transformers, eager"]["median"],
                "largest error": error.item(),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--intermediate-size", type=int, help="default: 3.5 times the hidden size, as in the model")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    arguments = parser.parse_args()
    sizes = {
        "tokens": arguments.tokens,
        "experts": arguments.experts,
        "top_k": arguments.top_k,
        "hidden_size": arguments.hidden_size,
        "intermediate_size": arguments.intermediate_size or arguments.hidden_size * 7 // 2,
    }
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in compare(sizes, dtype, arguments.rounds)]
    print(", ".join(f"{name} {value}" for name, value in sizes.items()))
    print_table(rows)
    print(f"written: {write_json('experts_cpu', {**machine(), 'sizes': sizes, 'rows': rows}, arguments.output)}")


if __name__ == "__main__":
    main()
