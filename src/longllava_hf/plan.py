# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
What a run takes on its device, before it is started. Nothing here is a table of sizes: weights are counted on the model
itself, and activations by running it, both on the `meta` device, which has shapes and no data.
"""

import copy
import os
import weakref
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .cache_longllava import LongLLaVACache, PreallocatedLayer, layer_tensors
from .compat_longllava import TorchDispatchMode
from .configuration_longllava import LongLLaVAConfig, has_own_decoder
from .files_longllava import atomic_write
from .generation_longllava import default_chunk_size
from .grouped_linear_longllava import planned_device
from .int8_longllava import BITS, bits_of, convertible_layers, replace_linear_layers, stored_quantization, weight_bytes
from .modeling_longllava import LongLLaVAForConditionalGeneration


# What is around the pictures in a prompt: two tags and a line break each, and a question.
_TOKENS_AROUND_AN_IMAGE = 6
_TOKENS_OF_A_QUESTION = 64


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in any nesting of lists, tuples and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value] if isinstance(value, torch.Tensor) else []


class MemoryTracker(TorchDispatchMode):
    """
    Bytes of all tensors that are created while it is active: `live` of those that still exist, and their `peak`. What a
    kernel allocates inside is not seen.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen: weakref.WeakSet = weakref.WeakSet()

    def _free(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in _tensors([args, kwargs or {}])}
        for tensor in _tensors(outputs):
            storage = tensor.untyped_storage()
            if storage in self.seen or id(storage) in given:
                continue
            self.seen.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, storage.nbytes())
        return outputs


class _FusedAttention(TorchFunctionMode):
    """On `meta`, attention would be spelled out with all its scores; on a device one kernel does without them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, _, value = args[:3]
        return query.new_empty(*query.shape[:-1], value.shape[-1])


@dataclass
class MemoryPlan:
    """
    weights (`dict`): bytes by dtype; those of scales apart.
    items (`dict`): bytes of everything else, at the moment when most of it is there.
    images, tokens: of the prompt; tokens includes those to be generated.
    memory: bytes of the device.
    """

    weights: dict[str, int]
    items: dict[str, int]
    images: int
    tokens: int
    memory: int
    max_images: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + sum(self.items.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.memory

    def to_dict(self) -> dict[str, Any]:
        plan = asdict(self)
        total = {"weights_total": sum(self.weights.values()), "total": self.total, "fits": self.fits}
        return {**plan.pop("settings"), **plan, **total}


def build_on_meta(
    config: LongLLaVAConfig, dtype: torch.dtype = torch.bfloat16, int8: bool = False
) -> LongLLaVAForConditionalGeneration:
    """The model without its weights' values, unquantised or in this package's int8, whatever its checkpoint is in."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model: Any = LongLLaVAForConditionalGeneration(config)
    model = model.to(dtype).eval()
    if int8:
        replace_linear_layers(model)
    return model


def _layer_bytes(layer: Any) -> int:
    """Bytes of all tensors in one layer of a cache, and of the buffers that they are part of."""
    storages = {id(x.untyped_storage()): x.untyped_storage().nbytes() for x in layer_tensors(layer).values()}
    return sum(storages.values())


class MemoryPlanner:
    """
    Plans for one model and device.

    Args:
        config ([`LongLLaVAConfig`]): of the model, with its decoder.
        quantization (`str`): `"none"`, `"int8"` or `"nf4"`; by default what the checkpoint is quantised with.
        dtype (`torch.dtype`): of whatever is not quantised.
        memory (`int`): bytes of the device; 80 GB are 80e9.
        max_new_tokens (`int`): tokens to generate.
        prefill_chunk_size (`int`, *optional*): tokens of the prompt that are read at a time; `generate`'s default.
        device (`"cuda"` or `"cpu"`): they differ in kernels.

    Raises:
        ValueError: for any of these that makes no sense.
    """

    def __init__(
        self,
        config: LongLLaVAConfig,
        quantization: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        memory: int = int(80e9),
        max_new_tokens: int = 256,
        prefill_chunk_size: int | None = None,
        device: str = "cuda",
    ):
        quantization = bits_of(stored_quantization(config)) if quantization is None else quantization
        if quantization not in BITS:
            raise ValueError(f"`quantization` must be one of {', '.join(BITS)}, but is {quantization!r}.")
        prefill_chunk_size = default_chunk_size(device) if prefill_chunk_size is None else prefill_chunk_size
        self.settings = {
            "quantization": quantization,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device,
            "max_new_tokens": max_new_tokens,
            "prefill_chunk_size": prefill_chunk_size,
        }
        for name, least in (("prefill_chunk_size", 1), ("max_new_tokens", 0)):
            if self.settings[name] < least:
                raise ValueError(f"`{name}` must be at least {least}, but is {self.settings[name]}.")
        if memory < 1:
            raise ValueError(f"`memory` must be at least 1 byte, but is {memory}.")
        self.config, self.quantization, self.dtype, self.memory = copy.deepcopy(config), quantization, dtype, memory
        self.max_new_tokens, self.prefill_chunk_size, self.device = max_new_tokens, prefill_chunk_size, device
        self.weights = weight_bytes(build_on_meta(self.config, dtype), quantization)
        # A layer's activations are gone when the next one of its kind starts, so one of each kind will do.
        self.model = build_on_meta(self._smallest_config(), dtype, int8=quantization == "int8")
        self._kv_bytes_a_token, self._state_bytes = self._measure_cache()
        self._plans: dict[int, MemoryPlan] = {}

    def _smallest_config(self) -> LongLLaVAConfig:
        if not has_own_decoder(self.config):
            return self.config
        text = self.config.get_text_config()
        kinds = list(zip(text.layer_types, text.layers_num_experts))
        layers = max(kinds.index(kind) for kind in set(kinds)) + 1
        config = copy.deepcopy(self.config)
        config.text_config.num_hidden_layers = layers
        config.text_config.layer_types = config.text_config.layer_types[:layers]
        return config

    def tokens(self, images: int) -> int:
        """Tokens of a prompt with so many images, and of its answer."""
        per_image = self.config.image_seq_length + _TOKENS_AROUND_AN_IMAGE
        return images * per_image + _TOKENS_OF_A_QUESTION + self.max_new_tokens

    def _measure_cache(self) -> tuple[int, int]:
        cache = LongLLaVACache(self.model.config)
        with torch.no_grad(), self._as_on_the_device():
            self.model(inputs_embeds=self._embeddings(1), cache=cache, use_cache=True)
        kinds = getattr(self.config.get_text_config(), "layer_types", None) or ["full_attention"] * len(cache.layers)
        sizes = {"full_attention": 0.0, "linear_attention": 0.0}
        for layer, kind in zip(cache.layers, kinds):
            sizes[kind] += _layer_bytes(layer) * kinds.count(kind) / kinds[: len(cache.layers)].count(kind)
        return round(sizes["full_attention"]), round(sizes["linear_attention"])

    @contextmanager
    def _as_on_the_device(self):
        # Experts in 4 bits take one path on all devices.
        token = planned_device.set("cpu" if self.quantization == "nf4" else self.device)
        try:
            with _FusedAttention():
                yield
        finally:
            planned_device.reset(token)

    def _embeddings(self, length: int) -> torch.Tensor:
        hidden_size = self.config.get_text_config().hidden_size
        return torch.empty(1, length, hidden_size, dtype=self.dtype, device="meta")

    def tower_peak(self, images: int) -> int:
        """Bytes of the vision tower's and the projector's largest activations."""
        if images == 0:
            return 0
        images = min(images, self.config.vision_batch_size)  # they see no more at a time
        size = self.config.vision_config.image_size
        pixels = torch.empty(images, 3, size, size, dtype=self.dtype, device="meta")
        with torch.no_grad(), MemoryTracker() as tracker, self._as_on_the_device():
            outputs: Any = self.model.get_image_features(pixels, return_dict=True)
            torch.stack(tuple(outputs.pooler_output))
        return tracker.peak

    def prefill_peak(self, images: int) -> int:
        """Bytes of the decoder's largest activations, while it reads the last chunk of a prompt with so many images."""
        tokens = self.tokens(images)
        chunk = min(tokens, self.prefill_chunk_size)
        # With pictures a chunk is part of the prompt's embeddings, which are counted apart.
        inputs = {"inputs_embeds": self._embeddings(chunk)} if images else {}
        cache = LongLLaVACache(self.model.config, capacity=tokens)
        with torch.no_grad(), MemoryTracker() as tracker, self._as_on_the_device():
            self.model(inputs_embeds=self._embeddings(1), cache=cache, use_cache=True)
            for layer in cache.layers:
                if isinstance(layer, PreallocatedLayer):
                    layer.keys, layer.values = (x[..., : tokens - chunk, :] for x in layer.buffers.values())
            tracker.peak = tracker.live
            inputs = inputs or {"input_ids": torch.empty(1, chunk, dtype=torch.long, device="meta")}
            self.model(**inputs, cache=cache, use_cache=True, logits_to_keep=1)
            kept = sum(map(_layer_bytes, cache.layers))
        return tracker.peak - kept + (self._largest_matrix() if self.quantization == "nf4" else 0)

    def _largest_matrix(self) -> int:
        """Bytes of the largest weight that is dequantised at a time: a layer's, but only one expert's."""
        experts = getattr(self.config.get_text_config(), "num_experts", 1)
        return max(
            module.weight.nbytes // (experts if ".experts." in name else 1)
            for name, module in convertible_layers(self.model)
        )

    def _plan(self, images: int) -> MemoryPlan:
        if images in self._plans:
            return self._plans[images]
        config, tokens = self.config, self.tokens(images)
        element, prompt = self.dtype.itemsize, tokens - self.max_new_tokens
        cache = {"KV cache": self._kv_bytes_a_token * tokens, "Mamba states": self._state_bytes}
        items = {
            "pixel values": images * 3 * config.vision_config.image_size**2 * element,
            "prompt embeddings": prompt * config.get_text_config().hidden_size * element if images else 0,
            "token ids and mask": 2 * 8 * tokens,
            **cache,
            # While the tower works nothing is cached yet.
            "largest activation": max(self.prefill_peak(images), self.tower_peak(images) - sum(cache.values())),
        }
        self._plans[images] = MemoryPlan(self.weights, items, images, tokens, self.memory, settings=self.settings)
        return self._plans[images]

    def plan(self, images: int) -> MemoryPlan:
        """
        What a prompt with so many images takes, and how many would fit.

        Raises:
            ValueError: if `images` is negative.
        """
        if images < 0:
            raise ValueError(f"The number of images must be at least 0, but is {images}.")
        plan = self._plan(images)
        plan.max_images = self._max_images(plan)
        return plan

    def _max_images(self, plan: MemoryPlan) -> int:
        """The most images that fit. What a run takes grows with them, and is all but linear in them."""
        low, high = self._plan(0), plan
        if not low.fits:
            return 0
        while high.fits:
            bytes_an_image = max(1, (high.total - low.total) // max(1, high.images - low.images))
            guess = high.images + (self.memory - high.total) // bytes_an_image + 1
            low, high = high, self._plan(max(2 * high.images, guess, self.config.vision_batch_size))
        while high.images - low.images > 1:
            share = (self.memory - low.total) / (high.total - low.total)
            guess = low.images + min(max(int(share * (high.images - low.images)), 1), high.images - low.images - 1)
            found = self._plan(guess)
            if found.fits and not self._plan(guess + 1).fits:
                return guess
            low, high = (found, high) if found.fits else (low, found)
        return low.images


def draw_plan(planner: MemoryPlanner, plan: MemoryPlan, file: str | os.PathLike) -> None:
    """
    Draw memory against the number of images, item by item.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing needs matplotlib: `pip install 'longllava_hf[plot]'`.") from error

    most = max(plan.images, round(plan.max_images * 1.2), planner.config.vision_batch_size)
    images = [round(most * i / 4) for i in range(5)]
    plans = [planner._plan(number) for number in images]
    heights = {f"weights, {kind}": [point.weights[kind] / 1e9 for point in plans] for kind in plan.weights}
    heights.update({item: [point.items[item] / 1e9 for point in plans] for item in plan.items})
    heights = {name: values for name, values in heights.items() if max(values) > 0.002 * plan.total / 1e9}
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.stackplot(images, *heights.values(), labels=list(heights))
    axes.axhline(plan.memory / 1e9, color="black", linestyle="--", label=f"{plan.memory / 1e9:g} GB")
    axes.axvline(plan.images, color="grey", linewidth=0.8)
    if plan.max_images:
        axes.annotate(f"{plan.max_images:,} images", (plan.max_images, plan.memory / 1e9), ha="center", va="bottom")
    axes.set_xlim(images[0], images[-1])
    axes.set_xlabel("images")
    axes.set_ylabel("GB")
    axes.set_title(f"Memory, {planner.quantization} weights, chunks of {planner.prefill_chunk_size:,} tokens")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="lower right", fontsize="small")
    with atomic_write(file) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


SHAPES = {"53b": {}, "9b": {"num_experts": 1}}
"""The published shapes, as differences from [`LongLLaVATextConfig`]'s defaults."""


def published_shape(name: str) -> LongLLaVAConfig:
    """The configuration of LongLLaVA-53B-A13B (`"53b"`) or LongLLaVA-9B (`"9b"`)."""
    return LongLLaVAConfig(text_config=dict(SHAPES[name]))


__all__ = ["SHAPES", "MemoryPlan", "MemoryPlanner", "MemoryTracker", "draw_plan", "published_shape"]
