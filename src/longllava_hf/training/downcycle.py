# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""From a mixture of experts to a dense model: one MLP made of all experts of a layer, or one of them taken."""

import math
import os
import re
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from transformers.utils import logging

from ..checkpoint_longllava import (
    checkpoint_files,
    has_vision_tower,
    load_vision_tower,
    published_names,
    read_lazily,
    to_native_name,
)
from ..configuration_longllava import LongLLaVAConfig, has_own_decoder
from ..convert import check_source, local_folder, shard_name, write_index, write_settings
from ..files_longllava import settle, sync, temporary_folder, write_errors


_EXPERT = re.compile(r"(.+\.feed_forward)\.experts\.(\d+)\.(.+)")
_ROUTER = re.compile(r".+\.feed_forward\.router\..+")

# Bytes of a file, and about as much is held in memory.
_SHARD_SIZE = 4 * 10**9


def spherical_mean(gram: torch.Tensor, steps: int = 50) -> torch.Tensor:
    """
    The mean of directions on a sphere (Karcher's, in whose tangent the vectors cancel), at the mean of the lengths.

    Args:
        gram (`torch.Tensor` of shape `(experts, experts)`, float64): products of the vectors with each other.
        steps (`int`, defaults to 50): at most; it converges in a few.

    Returns:
        `torch.Tensor` of shape `(experts,)`: of which multiples of the vectors the mean is the sum.
    """
    lengths = gram.diagonal().sqrt()
    cosines = gram / lengths[:, None] / lengths
    mean = torch.full_like(lengths, 1 / len(lengths))  # in multiples of the directions
    mean = mean / (mean @ cosines @ mean).sqrt()
    for _ in range(steps):
        # To the tangent at the mean, there their average, and back to the sphere.
        to_mean = (cosines @ mean).clamp(-1, 1)
        angles = torch.arccos(to_mean)
        stretch = torch.where(angles < 1e-6, 1.0, angles / torch.sin(angles).clamp_min(1e-12))
        tangent = (stretch - mean * (stretch * to_mean).sum()) / len(lengths)
        step = (tangent @ cosines @ tangent).clamp_min(0).sqrt()
        if step < 1e-12:
            break
        mean = torch.cos(step) * mean + torch.sin(step) * tangent / step
    return mean * lengths.mean() / lengths


def _mean(matrices: list[torch.Tensor], method: str) -> torch.Tensor:
    """One matrix of all experts' `(rows, columns)`."""
    shares = torch.full((len(matrices),), 1 / len(matrices), dtype=torch.float64)
    if method == "spherical":
        gram = torch.zeros(len(matrices), len(matrices), dtype=torch.float64)
        for i, one in enumerate(matrices):
            vector = one.double().flatten()
            for j, other in enumerate(matrices[: i + 1]):
                gram[i, j] = gram[j, i] = vector @ other.double().flatten()
        if not gram.diagonal().all():
            raise ValueError("The spherical mean of experts needs weights other than zero.")
        shares = spherical_mean(gram)
    total = torch.zeros_like(matrices[0], dtype=torch.float32)
    for share, matrix in zip(shares.tolist(), matrices):
        total.add_(matrix.float(), alpha=share)
    return total.to(matrices[0].dtype)


def downcycle(
    source: str,
    destination: str,
    method: Literal["expert", "arithmetic", "spherical"] = "expert",
    expert: int | None = None,
    down_scale: float = 1.0,
) -> Path:
    """
    Make a dense checkpoint of one with experts, as LongLLaVA-9B was made of Jamba (arXiv 2409.02889v3). It is to be
    trained further. Memory is that of a file of 4 GB and of one matrix of each expert.

    Args:
        source (`str`): a folder or Hub id, in the native or a published layout.
        destination (`str`): a folder that does not exist yet, for the native layout.
        method (`"expert"`, `"arithmetic"` or `"spherical"`, defaults to `"expert"`): take one expert, or of each matrix
            their mean, or the mean of their directions at their mean length.
        expert (`int`, *optional*): which one to take, by default the first.
        down_scale (`float`, defaults to 1): what the last matrix of each MLP is multiplied with. The authors' script has
            0.045, of which their paper says nothing.

    Returns:
        `Path`: the new folder.

    Raises:
        ValueError: for a checkpoint without experts, or that has no such expert; for a method that is unknown.
        OSError: if the destination exists, or the weights cannot be read or written.
    """
    target = Path(destination)
    if os.path.lexists(target):
        raise FileExistsError(f"The destination `{target}` exists already.")
    if method not in ("expert", "arithmetic", "spherical"):
        raise ValueError(f"`method` must be 'expert', 'arithmetic' or 'spherical', but is {method!r}.")
    if method != "expert" and expert is not None:
        raise ValueError(f"A mean is of all experts, so `expert` ({expert}) goes with the method 'expert' alone.")
    if not math.isfinite(down_scale):
        raise ValueError(f"`down_scale` must be finite, but is {down_scale}.")
    expert = expert or 0
    folder = local_folder(source)
    config = LongLLaVAConfig.from_pretrained(folder)
    text: Any = config.text_config
    if not has_own_decoder(config) or max(text.layers_num_experts) == 1:
        raise ValueError(f"`{source}` has no experts.")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"The experts of `{source}` are quantised: dequantise it first, and save it.")
    if not 0 <= expert < text.num_experts:
        raise ValueError(f"`expert` must be from 0 to {text.num_experts - 1}, but is {expert}.")
    names, files = published_names(config), checkpoint_files(folder)
    check_source(source, files, config, names)
    tensors = {to_native_name(name, names): tensor for name, tensor in read_lazily(files).items()}
    if not has_vision_tower(tensors):
        tensors.update({to_native_name(n, names): t for n, t in load_vision_tower(config, folder).items()})
    num_experts, text.num_experts, text.num_experts_per_tok = text.num_experts, 1, 1

    with temporary_folder(target.parent, target.name) as partial, write_errors(target):
        written: list[Path] = []
        shard: dict[str, torch.Tensor] = {}
        weight_map: dict[str, int] = {}
        size = total_size = 0

        def flush() -> None:
            nonlocal shard, size
            written.append(partial / f"shard-{len(written)}")
            save_file(shard, written[-1], metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(shard, len(written)))
            shard, size = {}, 0

        for name in logging.tqdm(tensors, desc="Downcycling", unit=" weights"):
            found = _EXPERT.fullmatch(name)
            if _ROUTER.fullmatch(name) or (found and int(found[2])):
                continue
            if found:
                name = f"{found[1]}.{found[3]}"
                parts = [f"{found[1]}.experts.{i}.{found[3]}" for i in range(num_experts)]
                if method == "expert":
                    tensor = tensors[parts[expert]][...].contiguous()
                else:
                    tensor = _mean([tensors[part][...] for part in parts], method)
                if found[3].startswith("down_proj") and down_scale != 1:
                    tensor = tensor * down_scale
            else:
                tensor = tensors[name][...].contiguous()
            shard[name] = tensor
            size += tensor.nbytes
            total_size += tensor.nbytes
            if size >= _SHARD_SIZE:
                flush()
        if shard:
            flush()
        final = [shard_name(number, len(written)) for number in range(1, len(written) + 1)]
        for path, name in zip(written, final):
            path.rename(partial / name)
        write_index(partial, {name: final[number - 1] for name, number in weight_map.items()}, total_size)
        write_settings(folder, partial, config, "native", keep={Path(file).name for file in files})
        settle(partial)
        os.replace(partial, target)
    sync(target.parent)
    return target


__all__ = ["downcycle", "spherical_mean"]
