# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
What a model remembers of what it has read: keys and values of the attention layers, in memory that is allocated ahead,
and the Mamba layers' states. It can be kept in a file, so that a film is read once and asked about many times.
"""

import hashlib
import json
import os
import struct
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


# What a file of a kept context calls itself.
_FORMAT, _VERSION = "longllava_cache", "1"

# What a context knows of its inputs.
_KNOWN = ("input_ids", "attention_mask", "image_sums")

# Settings that change how a model computes, but not what.
_RUNTIME_SETTINGS = {
    "scan_implementation",
    "vision_batch_size",
    "vision_tower",
    "use_cache",
    "output_router_logits",
    "router_aux_loss_coef",
    "attention_dropout",
    "initializer_range",
    "patch_strategy",
    "image_grid_pinpoints",
    "text_config",
    "vision_config",
}


class PreallocatedLayer(DynamicLayer):
    """
    Keys and values that grow within memory allocated ahead, so that a generated token copies one position and not all.

    Args:
        capacity (`int`, defaults to 0): positions to allocate at once. Past them, an eighth more each time.
    """

    def __init__(self, capacity: int = 0):
        super().__init__()
        self.capacity = capacity
        self.rooms: dict[str, torch.Tensor] = {}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """As [`DynamicLayer.update`]."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)  # autograd needs the past as it was
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", key_states)
        self.values = self._append("values", value_states)
        return self.keys, self.values

    def _append(self, name: str, new: torch.Tensor) -> torch.Tensor:
        past: Any = getattr(self, name)
        room: Any = self.rooms.get(name)
        used = past.shape[-2] if past.numel() else 0
        total = used + new.shape[-2]
        # Cropped, the past still begins where its room does; reordered or moved, it is another tensor.
        at_home = room is not None and (not used or past.data_ptr() == room.data_ptr()) and room.device == new.device
        if not at_home or total > room.shape[-2] or room.shape[:2] != new.shape[:2]:
            size = max(self.capacity, total + (total // 8 if used else 0))
            room = new.new_empty(*new.shape[:2], size, new.shape[-1])
            if used:
                room[..., :used, :] = past
            self.rooms[name] = room
        room[..., used:total, :] = new
        return room[..., :total, :]

    def reset(self) -> None:
        """As [`DynamicLayer.reset`]: empty, on every Transformers release."""
        self.rooms = {}
        if self.is_initialized:
            keys: Any = self.keys
            self.lazy_initialization(keys, keys)


def make_room(cache: Cache, capacity: int) -> None:
    """Let the attention layers of `cache` grow in memory allocated ahead, `capacity` positions at first."""
    if getattr(cache, "offloading", False):
        return  # moves its tensors back and forth
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            roomy = PreallocatedLayer()
            vars(roomy).update(vars(layer))
            cache.layers[i] = layer = roomy
        if isinstance(layer, PreallocatedLayer):
            layer.capacity = capacity


def _copy_of_states(layer: Any) -> dict[str, Any]:
    """The attributes of a layer; what is written in place is copied, keys and values are only referred to."""

    def kept(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return value if name == "rooms" else {key: kept("", entry) for key, entry in value.items()}
        return value.clone() if isinstance(value, torch.Tensor) and name not in ("keys", "values") else value

    return {name: kept(name, value) for name, value in vars(layer).items()}


@contextmanager
def all_or_nothing(cache: Cache | None):
    """Whatever goes wrong or is interrupted inside leaves the cache as it was."""
    layers = [] if cache is None else list(cache.layers)
    states = [_copy_of_states(layer) for layer in layers]
    try:
        yield
    except BaseException:
        if cache is not None:
            cache.layers[:] = layers
        for layer, state in zip(layers, states):
            vars(layer).clear()
            vars(layer).update(state)
        raise


def cache_rows(cache: Cache) -> int:
    """How many sequences a cache holds; 0 if it is empty."""
    return next((x.shape[0] for layer in cache.layers for _, x in _tensors_of(layer)), 0)


class LongLLaVACache(DynamicCache):
    r"""
    A cache that knows what is in it, and can be kept in a file.

    Args:
        config ([`PreTrainedConfig`]): of the model.

    Attributes:
        input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): the tokens it holds, so that inputs which
            repeat them can be told from inputs which continue them.
        attention_mask (`torch.LongTensor` of shape `(batch, length)`, *optional*): 0 for padding among them.
        image_sums (`torch.Tensor` of shape `(image tokens,)`, *optional*): of the features of each image token, which tell
            pictures apart and are a thousandth of them.
        notes (`dict`): anything, in JSON's terms.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        make_room(self, 0)
        self.input_ids: torch.Tensor | None = None
        self.attention_mask: torch.Tensor | None = None
        self.image_sums: torch.Tensor | None = None
        self.notes: dict[str, Any] = {}

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.input_ids = self.attention_mask = self.image_sums = None
        self.notes = {}

    @property
    def inputs_digest(self) -> str:
        """What was read, tokens and pictures, as a hash."""
        digest = hashlib.sha256()
        for tensor in (getattr(self, name) for name in _KNOWN):
            digest.update(b"-" if tensor is None else tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def is_repeated_by(self, input_ids: torch.Tensor) -> bool:
        """Whether inputs begin with what is in here, and go on."""
        beginning = self.input_ids
        return (
            beginning is not None
            and input_ids.shape[1] > beginning.shape[1]
            and input_ids.shape[0] == beginning.shape[0]
            and torch.equal(input_ids[:, : beginning.shape[1]], beginning.to(input_ids.device))
        )

    def mask_of(self, like: torch.Tensor) -> torch.Tensor:
        """The mask of the tokens it knows of, `(batch, length)`, of the same kind as `like`."""
        known: Any = torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask  # type: ignore[arg-type]
        return known.to(like)

    def note_inputs(
        self, input_ids: torch.Tensor, image_features: torch.Tensor | None, attention_mask: torch.Tensor | None = None
    ) -> None:
        """Remember what was read: all of it, or what came after what was there before."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.input_ids is not None and not self.is_repeated_by(input_ids):
            if mask.shape[1] == input_ids.shape[1]:
                mask = torch.cat([self.mask_of(mask), mask], dim=1)
            input_ids = torch.cat([self.input_ids.to(input_ids.device), input_ids], dim=1)
        self.input_ids = input_ids
        self.attention_mask = None if mask.all() else mask
        if image_features is not None:
            sums = image_features.detach().float().sum(-1)
            known = self.image_sums
            is_image_repeated = (
                known is not None and len(sums) > len(known) and self._are_same(sums[: len(known)], known)
            )
            self.image_sums = sums if known is None or is_image_repeated else torch.cat([known.to(sums.device), sums])

    @staticmethod
    def _are_same(sums: torch.Tensor, known: torch.Tensor) -> bool:
        """Whether they are of the same pictures: encoded again, in other batches, they differ by rounding."""
        known = known.to(sums.device)
        spread = (known - known.mean()).abs().mean()
        return sums.shape == known.shape and bool(
            (sums - known).abs().mean() <= 0.1 * spread + 1e-6 * known.abs().mean()
        )

    def check_images(self, image_features: torch.Tensor) -> None:
        """Raises `ValueError` if pictures that are given once more, `(image tokens, hidden_size)`, are not those in here."""
        if self.image_sums is None or len(image_features) != len(self.image_sums):
            return
        if not self._are_same(image_features.float().sum(-1), self.image_sums):
            raise ValueError(
                "The inputs repeat the context's tokens, but not its pictures: give it those it was made of, or only new"
                " ones, or read the others into a context of their own."
            )

    def note_answer(
        self,
        input_ids: torch.Tensor | None,
        sequences: torch.Tensor,
        image_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> None:
        """
        Remember what `generate` has read and written: all but the last token is in here.

        Args:
            input_ids (`torch.Tensor` of shape `(batch, length)`, *optional*): what it was given; nothing is known any more
                where that is not known.
            sequences (`torch.Tensor` of shape `(batch, length + answer)`): what it returned.
            image_features (`torch.Tensor`, *optional*): of the pictures it was given.
            attention_mask (`torch.Tensor`, *optional*): of the inputs, or of what was there before too.
        """
        if input_ids is None or sequences.shape[0] != input_ids.shape[0]:
            self.input_ids = self.attention_mask = self.image_sums = None
            return
        before = 0 if self.input_ids is None or self.is_repeated_by(sequences) else self.input_ids.shape[1]
        sequences = sequences[:, : self.get_seq_length() - before]
        if attention_mask is not None:  # what was generated are tokens
            is_of_all = attention_mask.shape[1] > input_ids.shape[1]
            missing = sequences.shape[1] + (before if is_of_all else 0) - attention_mask.shape[1]
            attention_mask = torch.nn.functional.pad(attention_mask, (0, missing), value=1)
        self.note_inputs(sequences, image_features, attention_mask)

    def save(self, file: str | os.PathLike, model: nn.Module, processor: Any = None) -> None:
        """
        Keep the context in one safetensors file, written whole or not at all.

        Args:
            file (`str` or `os.PathLike`): where.
            model ([`LongLLaVAForConditionalGeneration`]): that has read it.
            processor ([`LongLLaVAProcessor`], *optional*): that prepared it.

        Raises:
            ValueError: if there is nothing in it.
        """
        if self.get_seq_length() == 0:
            raise ValueError("The context is empty: 0 tokens were read, and there is nothing to keep.")
        tensors = {f"layers.{i}.{name}": x for i, layer in enumerate(self.layers) for name, x in _tensors_of(layer)}
        for name in _KNOWN:
            if getattr(self, name) is not None:
                tensors[name] = getattr(self, name)
        metadata = {
            "format": _FORMAT,
            "version": _VERSION,
            "model": model_fingerprint(model),
            "processor": "" if processor is None else processor_fingerprint(processor),
            "inputs": self.inputs_digest,
            "tokens": str(self.get_seq_length()),
            "notes": json.dumps(self.notes),
        }
        temporary = f"{os.fspath(file)}.tmp"
        try:
            save_file({name: x.detach().contiguous() for name, x in tensors.items()}, temporary, metadata=metadata)
            os.replace(temporary, file)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)

    @classmethod
    def load(cls, file: str | os.PathLike, model: nn.Module, processor: Any = None) -> "LongLLaVACache":
        """
        The context that [`~LongLLaVACache.save`] kept, on the model's device.

        Args:
            file (`str` or `os.PathLike`): which.
            model ([`LongLLaVAForConditionalGeneration`]): the one that has read it.
            processor ([`LongLLaVAProcessor`], *optional*): checked too, if one was given then.

        Raises:
            ValueError: if it is of another model or processor, or no context at all.
            OSError: if it does not exist, or is damaged.
        """
        metadata = context_metadata(file)
        if metadata is None:
            raise ValueError(f"`{file}` is not a context that was kept.")
        if metadata.get("version") != _VERSION:
            raise ValueError(f"The context `{file}` has version {metadata.get('version')}, and {_VERSION} is known.")
        pairs = [("model", model_fingerprint(model))]
        if processor is not None and metadata["processor"]:
            pairs.append(("processor", processor_fingerprint(processor)))
        for what, expected in pairs:
            if metadata[what] != expected:
                raise ValueError(
                    f"The context `{file}` is of another {what}: its fingerprint is {metadata[what][:12]}, and that of"
                    f" the {what} here {expected[:12]}. Read the pictures again."
                )
        cache = cls(config=model.config)  # type: ignore[arg-type]
        try:
            with safe_open(file, framework="pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        except SafetensorError as error:
            raise OSError(f"The context `{file}` is damaged or truncated: {error}") from error
        device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        for name in _KNOWN:
            if name in tensors:
                setattr(cache, name, tensors.pop(name).to(device))
        cache.notes = json.loads(metadata["notes"])
        for i, layer in enumerate(cache.layers):
            prefix = f"layers.{i}."
            mine = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            _fill_layer(layer, {name: x.to(device) for name, x in mine.items()})
        return cache


def _tensors_of(layer: Any) -> list[tuple[str, torch.Tensor]]:
    """What a layer holds, by name."""
    tensors = [(name, getattr(layer, name, None)) for name in ("keys", "values")]
    for name in ("conv_states", "recurrent_states"):
        tensors += [(f"{name}.{i}", state) for i, state in getattr(layer, name, {}).items()]
    return [(name, x) for name, x in tensors if isinstance(x, torch.Tensor) and x.numel()]


def _fill_layer(layer: Any, tensors: dict[str, torch.Tensor]) -> None:
    if "keys" in tensors:
        layer.update(tensors["keys"], tensors["values"])
    for name, update in (("conv_states", "update_conv_state"), ("recurrent_states", "update_recurrent_state")):
        for key, x in tensors.items():
            if key.startswith(f"{name}."):
                getattr(layer, update)(x, state_idx=int(key.rsplit(".", 1)[1]))


def context_metadata(file: str | os.PathLike) -> dict[str, str] | None:
    """
    What a kept context says of itself; `None` for any other file.

    Raises:
        OSError: if it does not exist, or is a safetensors file that is damaged within its header.
    """
    with open(file, "rb") as stream:
        start = stream.read(9)
        # A length, then JSON: nothing that is a picture or a film begins so.
        if len(start) < 9 or start[8:] != b"{" or not 2 <= (size := struct.unpack("<Q", start[:8])[0]) < 1 << 27:
            return None
        header = start[8:] + stream.read(size - 1)
    try:
        metadata = json.loads(header).get("__metadata__", {})
    except ValueError as error:
        raise OSError(f"`{file}` is damaged or truncated: its header cannot be read ({error}).") from error
    return metadata if metadata.get("format") == _FORMAT else None


def _settings(config: Any) -> dict[str, Any]:
    """What a configuration's own class adds to those of all models, without what does not change results."""
    classes = [c for c in type(config).__mro__ if issubclass(c, PreTrainedConfig) and c is not PreTrainedConfig]
    names = sorted({name for c in classes for name in vars(c).get("__annotations__", {})} - _RUNTIME_SETTINGS)
    return {name: repr(getattr(config, name, None)) for name in names}


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """A hash of a model's settings, and of every weight's name, shape, dtype and some of its values."""
    config: Any = model.config
    parts = [config, config.get_text_config(), getattr(config, "vision_config", None)]
    digest = hashlib.sha256(json.dumps([_settings(part) for part in parts if part is not None]).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel() and not tensor.is_meta:
            # Spread over rows and columns alike, whatever their number.
            places = torch.arange(256, device=tensor.device) * 2_654_435_761 % tensor.numel()
            values = tensor.detach().flatten()[places]
            digest.update(values.cpu().double().numpy().tobytes())
    return digest.hexdigest()


def processor_fingerprint(processor: Any) -> str:
    """A hash of what a processor makes of pictures and text."""
    image_processor = processor.image_processor
    names = (
        "size",
        "crop_size",
        "resample",
        "do_pad",
        "image_mean",
        "image_std",
        "rescale_factor",
        "image_seq_length",
    )
    parts = [
        {name: repr(getattr(image_processor, name, None)) for name in names},
        processor.chat_template,
        sorted(processor.tokenizer.get_vocab().items()),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


__all__ = [
    "LongLLaVACache",
    "PreallocatedLayer",
    "all_or_nothing",
    "cache_rows",
    "context_metadata",
    "make_room",
    "model_fingerprint",
    "processor_fingerprint",
]
