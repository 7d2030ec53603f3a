# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
What it costs to know exactly which model a context is of: every byte of the weights, hashed, beside SHA-256 of the same
bytes and beside a plain sum of them, which is how fast they can be read.

    python benchmarks/identity.py [--gigabytes 10]
"""

import argparse
import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch
from report import machine, print_table, time_side_by_side, write_json
from torch import nn

from longllava_hf import LongLLaVAConfig, LongLLaVAForConditionalGeneration
from longllava_hf.identity_longllava import model_fingerprint


def build(gigabytes: float) -> nn.Module:
    """A model of about that size in bfloat16: layers of experts, as most of the 53B is."""
    hidden_size = 1024
    a_layer = 16 * 3 * hidden_size * (7 * hidden_size // 2) * 2
    text = {
        "hidden_size": hidden_size,
        "intermediate_size": 7 * hidden_size // 2,
        "num_hidden_layers": max(2, 2 * round(gigabytes * 1e9 / a_layer)),
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_experts": 16,
        "vocab_size": 1024,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 64,
        "image_size": 28,
        "patch_size": 14,
    }
    config = LongLLaVAConfig(
        text_config=text, vision_config={"model_type": "clip_vision_model", **vision}, dtype="bfloat16"
    )
    with torch.device("meta"):
        model = LongLLaVAForConditionalGeneration(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            data = tensor.contiguous().view(-1).view(torch.uint8)
            data.copy_(
                torch.randint(0, 256, (1 << 16,), dtype=torch.uint8).repeat(-(-len(data) // (1 << 16)))[: len(data)]
            )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = build(args.gigabytes)
    tensors = [tensor.view(-1).view(torch.uint8) for tensor in model.state_dict().values()]
    size = sum(tensor.nbytes for tensor in tensors)

    def sha256(workers: int) -> None:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda tensor: hashlib.sha256(tensor.numpy()).digest(), tensors))

    def read() -> None:
        for tensor in tensors:
            whole = len(tensor) // 8 * 8
            tensor[:whole].view(torch.int64).sum()

    times = time_side_by_side(
        {
            "a plain sum (floor)": read,
            "model_fingerprint": lambda: model_fingerprint(model),
            "SHA-256, a thread for each core": lambda: sha256(torch.get_num_threads()),
        },
        args.rounds,
    )
    floor, peer = times["a plain sum (floor)"]["minimum"], times["SHA-256, a thread for each core"]["minimum"]
    rows = [
        {
            "what": name,
            "times the floor": round(t["minimum"] / floor, 2),
            "of SHA-256's time": round(t["minimum"] / peer, 2),
        }
        for name, t in times.items()
    ]
    print(f"{size / 1e9:.1f} GB of weights in {len(tensors)} tensors")
    print_table(rows)
    write_json(
        "identity_cpu", {**machine(), "gigabytes": size / 1e9, "tensors": len(tensors), "seconds": times, "rows": rows}
    )


if __name__ == "__main__":
    main()
