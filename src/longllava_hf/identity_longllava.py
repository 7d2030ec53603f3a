# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
Which model, which processor, which picture: hashes that differ when anything differs that can change an answer, and do not
when a model is moved, offloaded or loaded again.
"""

import hashlib
import inspect
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .compat_longllava import align_module_device


# Settings that change how a model computes, but not what.
_RUNTIME_SETTINGS = {
    "scan_implementation", "vision_batch_size", "vision_tower", "use_cache", "output_router_logits",
    "router_aux_loss_coef", "attention_dropout", "initializer_range", "patch_strategy", "image_grid_pinpoints",
    "text_config", "vision_config",
}  # fmt: skip
# Of an image processor, what says who it is, or when it works, and not what comes out.
_NO_PIXEL_SETTINGS = {
    "image_processor_type",
    "processor_class",
    "lazy",
    "return_tensors",
    "disable_grouping",
    "device",
}
# Words of 8 bytes on a side of the squares that tensors are cut into.
_SIDE = 256
_SQUARE_BYTES = 8 * _SIDE * _SIDE
# Squares that are summed at a time.
_PART = 128
_FINITE_PART = 1 << 16


@torch.no_grad()
def hash_tensor(tensor: torch.Tensor) -> str:
    """
    A hash of a tensor's shape, dtype and every bit, at the speed of memory, on whatever device it is.

    Its bytes are taken for squares of integers. Of each square the sums of rows, of columns and of diagonals, modulo 2^64, go
    through SHA-256: no single value can change without those of its row, column and diagonal, nor can two rows or columns
    change places, and a change that keeps all sums has to be made on purpose. This tells mistakes from the right thing; it
    does not stop someone who crafts weights.
    """
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = len(data) - len(data) % _SQUARE_BYTES
    if whole:
        words = data[:whole]
        words = words.clone() if words.data_ptr() % 8 or words.storage_offset() % 8 else words
        for squares in words.view(torch.int64).view(-1, _SIDE, _SIDE).split(_PART):
            diagonals = squares.flatten(1)[:, :-1].unflatten(1, (_SIDE - 1, _SIDE + 1))
            sums = torch.cat([squares.sum(1), squares.sum(2), diagonals.sum(1)], dim=1)
            digest.update(sums.cpu().numpy().tobytes())
    digest.update(data[whole:].cpu().numpy().tobytes())
    return digest.hexdigest()


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of floats has neither NaN nor infinite values, without another one of its size."""
    parts = tensor.detach().reshape(-1).split(_FINITE_PART)
    # The sum of what is finite is finite, unless it overflows.
    dtype = tensor.dtype if tensor.dtype.itemsize > 2 else torch.float32
    sums = torch.stack([part.sum(dtype=dtype) for part in parts]) if parts else torch.zeros(0)
    return bool(sums.isfinite().all()) or all(bool(part.isfinite().all()) for part in parts)


def hash_image(pixel_values: torch.Tensor) -> str:
    """A hash of one picture's pixels, as the tower sees them."""
    data = pixel_values.detach().contiguous().cpu().view(torch.uint8).numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=16).hexdigest()


def _is_adapted(module: nn.Module) -> bool:
    """Whether PEFT put a layer of its own in the place of one."""
    return hasattr(module, "active_adapters") and hasattr(module, "adapter_layer_names")


def _adapter_settings(module: Any, adapter: str) -> str:
    """What a layer of PEFT's does with an adapter's weights, such as its scaling."""
    values = ((name, getattr(module, name, None)) for name in sorted(module.other_param_names))
    found = {name: value[adapter] for name, value in values if isinstance(value, dict) and adapter in value}
    return repr({name: value for name, value in found.items() if isinstance(value, (bool, int, float, str))})


def _identify(name: str, adapted: dict[str, Any]) -> str | None:
    """What a weight is called, whatever it was wrapped in; `None` for one of an adapter that is not at work."""
    path = name.split(".")
    for depth in range(len(path) - 2, -1, -1):
        module = adapted.get(".".join(path[:depth]))
        if module is None or path[depth] not in (*module.adapter_layer_names, "modules_to_save"):
            continue
        adapter, active = path[depth + 1], module.active_adapters
        if adapter not in active or adapter in module.merged_adapters or module.disable_adapters:
            return None
        path[depth + 1] = f"{active.index(adapter)} {_adapter_settings(module, adapter)}"
        break
    name = ".".join(part for part in path if part not in ("base_layer", "original_module"))
    return name.removeprefix("base_model.model.")


def _stored_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that `state_dict` has, quantisers' scales too; what accelerate keeps elsewhere is fetched for the moment."""
    state, parts = model.state_dict(keep_vars=False), dict(model.named_modules())
    elsewhere: dict[str, list[str]] = {}
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_meta:
            path = name.rpartition(".")[0]
            while path not in parts:
                path = path.rpartition(".")[0]
            elsewhere.setdefault(path, []).append(name)
        elif isinstance(tensor, torch.Tensor):
            yield name, tensor
    del state
    for path, names in elsewhere.items():
        with align_module_device(parts[path]):
            fetched = parts[path].state_dict(prefix=f"{path}." if path else "")
            for name in names:
                if fetched[name].is_meta:
                    raise ValueError(f"The model's weight `{name}` has no value: it is on the device `meta`.")
                yield name, fetched[name]
            del fetched


def _settings(config: Any) -> dict[str, Any]:
    """What a configuration's own class adds to those of all models, without what does not change results."""
    classes = [c for c in type(config).__mro__ if issubclass(c, PreTrainedConfig) and c is not PreTrainedConfig]
    names = sorted({name for c in classes for name in inspect.get_annotations(c)} - _RUNTIME_SETTINGS)
    return {name: getattr(config, name, None) for name in names}


def model_fingerprint(model: nn.Module) -> str:
    """
    A hash of a model's settings and of every value of its weights, those of quantisers and active adapters included. It is
    computed each time, as weights can be changed in ways that leave no trace.
    """
    config: Any = model.config
    parts = [config, config.get_text_config(), getattr(config, "vision_config", None)]
    hashes = []
    adapted = {path: module for path, module in model.named_modules() if _is_adapted(module)}
    for name, tensor in _stored_tensors(model):
        if (identity := _identify(name, adapted)) is not None:
            hashes.append((identity, hash_tensor(tensor)))
    described = [[_settings(part) for part in parts if part is not None], sorted(hashes)]
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=repr).encode()).hexdigest()


def processor_fingerprint(processor: Any) -> str:
    """A hash of every setting of a processor that changes a pixel or a token."""
    pixels = {k: v for k, v in processor.image_processor.to_dict().items() if k not in _NO_PIXEL_SETTINGS}
    tokenizer = processor.tokenizer
    if tokenizer.is_fast:
        tokens = json.loads(tokenizer.backend_tokenizer.to_str())
        for state in ("truncation", "padding"):  # of the last call
            tokens.pop(state, None)
    else:
        tokens = sorted(tokenizer.get_vocab().items())
    more = [tokenizer.special_tokens_map, tokenizer.padding_side, processor.chat_template, processor.num_frames]
    described = json.dumps([pixels, tokens, more], sort_keys=True, default=repr)
    return hashlib.sha256(described.encode()).hexdigest()


__all__ = ["hash_image", "hash_tensor", "is_finite", "model_fingerprint", "processor_fingerprint"]
