# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
Peak host memory while a sharded checkpoint is loaded and quantised on the CPU, beside the quantised size and two shards.

    python benchmarks/loading.py [--gigabytes 2] [--quantization int8]
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from report import RESULTS, machine, print_table, write_json

from longllava_hf import LongLLaVAConfig, LongLLaVAForConditionalGeneration


def write_checkpoint(folder: Path, gigabytes: float, shard_megabytes: int) -> int:
    """A random checkpoint in bfloat16 of about that size; returns the size of its largest shard."""
    # Most of it experts, as in the model: four layers of 16.
    hidden_size = int((gigabytes * 1e9 / 2 / (4 * 16 * 3 * 3.5 + 7 * 6 + 4 * 10.5 + 16)) ** 0.5) // 64 * 64
    config = LongLLaVAConfig(
        text_config={
            "hidden_size": hidden_size,
            "intermediate_size": hidden_size * 7 // 2,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "num_experts": 16,
            "vocab_size": 8 * hidden_size,
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
        },
    )
    torch.set_default_dtype(torch.bfloat16)
    LongLLaVAForConditionalGeneration(config).save_pretrained(folder, max_shard_size=f"{shard_megabytes}MB")
    return max(file.stat().st_size for file in folder.glob("*.safetensors"))


MEASURE = """
import re, sys, torch, longllava_hf
from transformers import AutoModelForImageTextToText
from longllava_hf.int8_longllava import named_quantization
folder, quantization = sys.argv[1:]
config = named_quantization(quantization)
if quantization != "int8" and quantization != "none":
    import bitsandbytes
def memory(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
print("measured", memory("VmHWM") - before, model.get_memory_footprint())
"""


# Freed memory goes back to the system at once: by default glibc keeps more and more of it, now and then a third of the result.
ENVIRONMENT = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shard-megabytes", type=int, default=250)
    parser.add_argument("--quantization", nargs="+", default=["int8", "bnb-int8"])
    parser.add_argument("--json", action="store_true", help="print one line of JSON, and write nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        shard = write_checkpoint(Path(folder), arguments.gigabytes, arguments.shard_megabytes)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        for quantization in arguments.quantization:
            # In a process of its own, which has never held anything else.
            command = [sys.executable, "-c", MEASURE, folder, quantization]
            output = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout
            peak, footprint = map(int, re.search(r"measured (\d+) (\d+)", output).groups())
            row = {"quantization": quantization, "checkpoint": size, "shard": shard, "quantised": footprint}
            rows.append({**row, "peak": peak, "limit": footprint + 2 * shard})
    if arguments.json:
        print(json.dumps(rows[0]))
        return
    units = [{k: v / 1e9 if isinstance(v, int) else v for k, v in row.items()} for row in rows]
    print("GB; the limit is the quantised size and two shards")
    print_table([{**row, "peak / limit": row["peak"] / row["limit"]} for row in units])
    print(f"written: {write_json('loading', {**machine(), 'rows': rows}, arguments.output)}")


if __name__ == "__main__":
    main()
