# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
The paper's efficiency table (arXiv 2409.02889, one 80 GB GPU, int8, 100,000 tokens) on this machine: prefill, decode and
peak memory of the published shapes with random int8 weights, the scan alone, and a prompt of 1,000 images. Needs CUDA and
the package's core dependencies, neither network nor checkpoints.

    python benchmarks/gpu_efficiency.py                    # both shapes
    python benchmarks/gpu_efficiency.py --tiny             # the same on the CPU with a tiny shape, to see that it runs
"""

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, machine, print_table, write_json
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from longllava_hf import LongLLaVAConfig, LongLLaVAForConditionalGeneration
from longllava_hf.causal_conv1d_longllava import is_installed
from longllava_hf.int8_longllava import LongLLaVAInt8Linear
from longllava_hf.plan import build_on_meta, published_shape
from longllava_hf.selective_scan_longllava import selective_scan


# Seconds to read 100,000 tokens, tokens a second after them, and GB: one A100 80 GB, vLLM, int8.
PAPER = {
    "53b": {"prefill s": 25.5, "tokens / s": 37.6, "peak GB": 79.1},
    "9b": {"prefill s": 16.5, "tokens / s": 62.1, "peak GB": 38.7},
}


def tiny_config() -> LongLLaVAConfig:
    return LongLLaVAConfig(
        text_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 4,
            "vocab_size": 1024,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
    )


class Device:
    """The few things that differ between a GPU and the CPU."""

    def __init__(self, name: str):
        self.name = name
        self.is_cuda = name == "cuda"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def time(self, run: Callable[[], Any]) -> float:
        self.synchronize()
        started = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - started

    def reset_peak(self) -> None:
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gigabytes(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 1e9 if self.is_cuda else None


def random_int8_model(config: LongLLaVAConfig, device: Device) -> LongLLaVAForConditionalGeneration:
    """The model with random weights, which are never anywhere but on the device, and never wider than they are kept."""
    model: Any = build_on_meta(config, int8=True).to_empty(device=device.name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():  # whatever no rule below knows of is finite at least
                parameter.normal_(std=0.02)
        for module in model.modules():
            if isinstance(module, LongLLaVAInt8Linear):
                module.weight.random_(-127, 128)
                # A standard deviation of 0.02: that of the integers is 73.3.
                module.weight_scale.fill_(0.02 / 73.3)
            elif not isinstance(module, nn.ModuleList):
                model._init_weights(module)
        for name, buffer in model.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    return model


def matrix_rate(device: Device, size: int) -> float:
    """Measured floating-point operations a second of a large bfloat16 product."""
    a, b = (torch.randn(size, size, device=device.name, dtype=torch.bfloat16) for _ in range(2))
    device.time(lambda: a @ b)
    return 2 * size**3 / min(device.time(lambda: a @ b) for _ in range(10))


def copy_bandwidth(device: Device, size: int) -> float:
    """Measured bytes a second of a large copy, read and written."""
    source = torch.empty(size, dtype=torch.uint8, device=device.name)
    target = torch.empty_like(source)
    device.time(lambda: target.copy_(source))
    return 2 * size / min(device.time(lambda: target.copy_(source)) for _ in range(10))


def work(model: LongLLaVAForConditionalGeneration, tokens: int) -> tuple[float, float]:
    """
    Floating-point operations of matrix products to read a prompt of so many tokens, and the bytes that a generated token
    reads after it.
    """
    text = model.config.get_text_config()
    active = text.num_experts_per_tok / text.num_experts if text.num_experts > 1 else 1.0
    operations = read = 0.0
    for name, module in model.model.language_model.named_modules():
        if isinstance(module, nn.Linear):
            share = active if ".experts." in name else 1.0
            operations += 2 * module.in_features * module.out_features * share * tokens
            read += share * sum(parameter.nbytes for parameter in module.parameters())
    read += model.lm_head.weight.nbytes
    attention = text.layer_types.count("full_attention")
    head_dim = text.hidden_size // text.num_attention_heads
    # Scores and values, half of them masked.
    operations += attention * 2 * 2 * text.num_attention_heads * head_dim * tokens**2 / 2
    read += attention * 2 * text.num_key_value_heads * head_dim * tokens * 2
    return operations, read


def generate(model, ids: torch.Tensor, count: int, chunk: int, **inputs) -> None:
    """Exactly so many tokens."""
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        prefill_chunk_size=chunk,
        do_sample=False,
        **inputs,
    )


@torch.inference_mode()
def measure_text(model, device: Device, tokens: int, new_tokens: int, chunk: int) -> dict[str, Any]:
    ids = torch.randint(600, model.config.get_text_config().vocab_size, (1, tokens), device=device.name)
    warm = ids[:, : min(tokens, 2 * chunk)]
    model.generate(input_ids=warm, max_new_tokens=4, prefill_chunk_size=chunk, do_sample=False)  # kernels are chosen
    device.reset_peak()
    cache = DynamicCache(config=model.config)
    prefill = device.time(lambda: generate(model, ids, 1, chunk, past_key_values=cache))
    # The cache holds the prompt; what follows is decoding alone, from whatever token.
    longer = torch.cat([ids, ids[:, :1]], dim=1)
    decode = device.time(lambda: generate(model, longer, new_tokens, chunk, past_key_values=cache))
    return {"prefill s": prefill, "tokens / s": new_tokens / decode, "peak GB": device.peak_gigabytes()}


@torch.inference_mode()
def measure_images(model, device: Device, images: int, new_tokens: int, chunk: int) -> dict[str, Any]:
    """The pictures' pixels stay on the host, and reach the device a batch at a time."""
    config = model.config
    size = config.vision_config.image_size
    device.reset_peak()
    pixels = torch.randn(images, 3, size, size, dtype=torch.bfloat16)
    image = [600, *[config.image_token_id] * config.image_seq_length, 601, 602]
    ids = torch.tensor([image * images + [603] * 32], device=device.name)
    results: dict[str, Any] = {}

    def encode() -> None:
        features = torch.cat(
            [torch.cat(list(model.get_image_features(part).pooler_output)) for part in pixels.split(64)]
        )
        results["pictures"] = {"image": BaseModelOutputWithPooling(pooler_output=[features])}

    def read() -> None:
        encoded = results.pop("pictures")
        results["context"] = model.prefill(ids, mm_encoder_outputs=encoded, prefill_chunk_size=chunk)

    tower, prefill = device.time(encode), device.time(read)
    context = results["context"]
    decode = device.time(lambda: generate(model, ids[:, -1:], new_tokens, chunk, past_key_values=context))
    return {
        "images": images,
        "prompt tokens": ids.shape[1],
        "tower s": tower,
        "prefill s": prefill,
        f"{new_tokens} tokens s": decode,
        "peak GB": device.peak_gigabytes(),
    }


@torch.inference_mode()
def measure_scan(device: Device, tokens: int, channels: int, bandwidth: float) -> list[dict[str, Any]]:
    """The scan alone, and its floor: the bytes that must move, or the exponentials that must be taken, if they are more."""
    states = 16
    long = [torch.randn(1, channels, tokens, device=device.name, dtype=torch.bfloat16) for _ in range(3)]
    wide = [torch.randn(1, states, tokens, device=device.name, dtype=torch.bfloat16) for _ in range(2)]
    A = -torch.arange(1.0, states + 1, device=device.name).repeat(channels, 1)
    D = torch.ones(channels, device=device.name)
    values = torch.randn(1 << 22, device=device.name)
    device.time(values.exp)
    exponentials = values.numel() / min(device.time(lambda: torch.exp(values, out=values)) for _ in range(10))
    moved = 4 * long[0].nbytes + 2 * wide[0].nbytes
    floor = max(moved / bandwidth, channels * tokens * states / exponentials)
    names = ["triton" if device.is_cuda else "torch"]
    names += ["mamba_ssm"] if device.is_cuda and is_installed("mamba_ssm") else []
    rows = []
    for name in names:

        def run(name=name) -> None:
            u, delta, z = long
            selective_scan(u, delta, A, *wide, D, z, implementation=name)

        device.time(run)
        seconds = min(device.time(run) for _ in range(5))
        rows.append(
            {"scan": name, "tokens": tokens, "d_inner": channels, "seconds": seconds, "of the floor": floor / seconds}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(PAPER), default=list(PAPER))
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--prefill-chunk-size", type=int, default=8192)
    parser.add_argument("--memory", type=float, default=80.0, help="GB of 10^9 bytes that the process may use")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, few tokens, and the CPU if there is no GPU")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    arguments = parser.parse_args()
    device = Device("cuda" if torch.cuda.is_available() else "cpu")
    if not device.is_cuda and not arguments.tiny:
        parser.error("there is no CUDA device; `--tiny` runs on the CPU")
    if not arguments.tiny and device.is_cuda:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.memory * 1e9 / whole))
    tokens, new_tokens, images, chunk = (
        (2000, 8, 12, 512)
        if arguments.tiny
        else (arguments.tokens, arguments.new_tokens, arguments.images, arguments.prefill_chunk_size)
    )
    logging.set_verbosity_error()

    rate = matrix_rate(device, 512 if arguments.tiny else 8192)
    bandwidth = copy_bandwidth(device, 2**22 if arguments.tiny else 2**32)
    where = machine(device.name)
    print(f"{where['device']}: {rate / 1e12:.4g} TFLOP/s in bfloat16, copies at {bandwidth / 1e9:.4g} GB/s, measured")
    text_rows, image_rows = [], []
    scan_rows = measure_scan(device, tokens, 64 if arguments.tiny else 8192, bandwidth)
    print_table(scan_rows)
    print()
    for shape in ["tiny"] if arguments.tiny else arguments.shapes:
        config = tiny_config() if arguments.tiny else published_shape(shape)
        model = random_int8_model(config, device)
        measured = measure_text(model, device, tokens, new_tokens, chunk)
        operations, read = work(model, tokens)
        text_rows.append(
            {
                "shape": shape,
                "tokens": tokens,
                **measured,
                "of the matrix rate": operations / measured["prefill s"] / rate,
                "of the bandwidth": read * measured["tokens / s"] / bandwidth,
            }
        )
        paper = PAPER.get(shape)
        if paper is not None:
            text_rows.append(
                {
                    "shape": f"{shape}, paper",
                    "tokens": 100_000,
                    **paper,
                    "of the matrix rate": None,
                    "of the bandwidth": None,
                }
            )
        try:
            image_rows.append({"shape": shape, **measure_images(model, device, images, 8, chunk)})
        except torch.OutOfMemoryError as error:
            print(f"{shape}: {images} images did not fit: {error}")
        del model
        device.reset_peak()
    print_table(text_rows)
    if image_rows:
        print()
        print_table(image_rows)
    content = {
        **where,
        "bf16_flops": rate,
        "copy_bytes_per_second": bandwidth,
        "prefill_chunk_size": chunk,
        "scan": scan_rows,
        "text": text_rows,
        "images": image_rows,
    }
    if device.is_cuda:
        print(f"written: {write_json('gpu_efficiency', content, arguments.output)}")
    else:
        print("These figures say that the benchmark runs, and nothing else.")
        # A time on a CPU says nothing about a GPU, and is not kept beside those that do.
        print(f"written: {write_json('gpu_efficiency_tiny_cpu', content, arguments.output)}")


if __name__ == "__main__":
    main()
