# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
A context: what a model has read, as a value that can be continued, branched, and kept in a file, so that a film is read
once and asked about many times.
"""

import copy
import hashlib
import json
import os
import struct
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from .cache_longllava import cache_rows, cached_length, is_empty, layer_tensors
from .compat_longllava import execution_device
from .files_longllava import atomic_write


# What a file of a context calls itself, and what releases before contexts were values of their own called it.
_FORMAT, _VERSION = "longllava_context", "2"
_OLD_FORMAT = "longllava_cache"

# Settings that change how a model computes, but not what.
_RUNTIME_SETTINGS = {
    "scan_implementation", "vision_batch_size", "vision_tower", "use_cache", "output_router_logits",
    "router_aux_loss_coef", "attention_dropout", "initializer_range", "patch_strategy", "image_grid_pinpoints",
    "text_config", "vision_config",
}  # fmt: skip


@dataclass(frozen=True)
class ContextInputs:
    """
    What was read into a context.

    input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): `None` where nothing was read.
    attention_mask (`torch.LongTensor` of shape `(batch, length)`, *optional*): 0 for padding; `None` where there is none.
    image_hashes (`list[list[str]]`): for each row, a hash of the pixels of each of its pictures, as the tower saw them.
    changes: of the cache, when it had read this.
    """

    input_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    image_hashes: list[list[str]] = field(default_factory=list)
    changes: tuple[int, ...] = ()


def _changes(cache: Cache) -> tuple[int, ...]:
    """How often each layer was changed; of layers that do not count, how many positions they hold."""
    return tuple(getattr(layer, "changes", cached_length(cache)) for layer in cache.layers)


class LongLLaVAContext:
    r"""
    What a model has read: a cache, and the tokens and pictures in it. `model.prefill(...)` makes one or continues one,
    `model.generate(..., cache=context)` answers and adds the question and the answer to it, all but the answer's last
    token. Inputs may repeat what is in it or leave it out.

    Args:
        cache ([`Cache`]): an empty one.
        image_token_id (`int`, *optional*): the id that stands for an image token, where there can be any.
        metadata (`dict`, *optional*): anything, in JSON's terms; it is kept in the file.

    Change the context, not its cache: `crop`, `reorder_cache`, `batch_repeat_interleave`, `batch_select_indices` and `reset`
    are the cache's own, and keep the tokens in step. A context whose cache was changed by anything else is refused.
    """

    def __init__(self, cache: Cache, image_token_id: int | None = None, metadata: dict[str, Any] | None = None):
        if not is_empty(cache):
            raise ValueError("A context knows its tokens, but the cache already holds some: begin with an empty one.")
        self.cache, self.image_token_id, self.metadata = cache, image_token_id, metadata or {}
        self._inputs = ContextInputs()

    # Each is replaced as a whole, so that an interruption leaves either what was or what is.
    input_ids = property(lambda self: self._inputs.input_ids)
    attention_mask = property(lambda self: self._inputs.attention_mask)
    image_hashes = property(lambda self: self._inputs.image_hashes)

    @property
    def num_tokens(self) -> int:
        """How many tokens it has read, padding included."""
        return 0 if self.input_ids is None else self.input_ids.shape[1]

    def __repr__(self) -> str:
        images = sum(map(len, self.image_hashes))
        return f"{type(self).__name__}({cache_rows(self.cache)} x {self.num_tokens} tokens, {images} images)"

    def check_unchanged(self) -> None:
        """
        Raises:
            ValueError: if the cache does not hold what was read through this context.
        """
        if not (is_empty(self.cache) if self.input_ids is None else _changes(self.cache) == self._inputs.changes):
            raise ValueError(
                f"The cache of this context was changed by something else after the context had read {self.num_tokens}"
                " tokens. Use `model.prefill` or `model.generate` with the context, and the context's own methods."
            )

    # Inputs

    def align(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[int, torch.Tensor | None]:
        """
        Args:
            input_ids (`torch.Tensor` of shape `(batch, length)`): what is new, or what was read before and what is new.
            attention_mask (`torch.Tensor`, *optional*): of `input_ids`, or of what was read before too.

        Returns:
            where in `input_ids` the new tokens begin, and the mask of all tokens, `None` where there is no padding.

        Raises:
            ValueError: if nothing is new, the number of rows differs, or the mask fits neither; or if a row does not end
                with a token, which prompts of different length do if they are padded on the left.
        """
        self.check_unchanged()
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError("A context's prompts must be padded on the left: each must end with a token.")
        known, length = self.input_ids, input_ids.shape[1]
        if known is None:
            return 0, None if attention_mask is None or attention_mask.all() else attention_mask
        if known.shape[0] != input_ids.shape[0]:
            raise ValueError(
                f"The cache holds {known.shape[0]} sequences, but {input_ids.shape[0]} are to be continued:"
                " `context.batch_repeat_interleave(n)` makes n of each."
            )
        past = known.shape[1]
        repeats = length >= past and torch.equal(input_ids[:, :past], known.to(input_ids.device))
        start = past if repeats else 0
        if length == start:
            raise ValueError(f"The cache holds {past} tokens, and the inputs, {length} tokens, add none to them.")
        new = attention_mask
        if attention_mask is not None and attention_mask.shape[1] not in (length, past + length - start):
            raise ValueError(
                f"`attention_mask` must be as long as the inputs, {length}, or as all tokens,"
                f" {past + length - start}, but its length is {attention_mask.shape[1]}."
            )
        before = self.attention_mask
        if before is None and (new is None or new[:, start - length :].all()):
            return start, None
        new = torch.ones_like(input_ids[:, start:]) if new is None else new[:, start - length :]
        before = torch.ones_like(known) if before is None else before
        return start, torch.cat([before.to(new), new], dim=1)

    def record(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_hashes: list[list[str]] | None = None,
    ) -> None:
        """
        Remember what the cache has read, at once.

        Args:
            input_ids (`torch.Tensor` of shape `(batch, new tokens)`): after what was read before.
            attention_mask (`torch.Tensor` of shape `(batch, all tokens)`, *optional*): as from [`~LongLLaVAContext.align`].
            image_hashes (`list[list[str]]`, *optional*): of each row's new pictures.
        """
        if self.input_ids is not None:
            input_ids = torch.cat([self.input_ids.to(input_ids.device), input_ids], dim=1)
        before = self.image_hashes or [[] for _ in input_ids]
        image_hashes = [old + new for old, new in zip(before, image_hashes or [[] for _ in input_ids])]
        self._inputs = ContextInputs(input_ids, attention_mask, image_hashes, _changes(self.cache))

    # As a value

    def branch(self) -> "LongLLaVAContext":
        """Another context with the same content; what happens to one does not happen to the other."""
        self.check_unchanged()
        return copy.deepcopy(self)

    def append(self, model: Any, input_ids: torch.Tensor, *args, **kwargs) -> "LongLLaVAContext":
        """Read more; `model.prefill(input_ids, ..., cache=context)`."""
        return model.prefill(input_ids, *args, cache=self, **kwargs)

    def reset(self) -> None:
        """Forget everything."""
        self._inputs = ContextInputs()
        self.cache.reset()
        self.metadata = {}

    def crop(self, tokens_to_remove: int) -> None:
        """
        Remove the last tokens.

        Args:
            tokens_to_remove (`int`): their number as a negative integer, as for [`Cache.crop`].

        Raises:
            ValueError: if there are fewer, the decoder has Mamba layers, or part of a picture would be left.
        """
        self.check_unchanged()
        if not -self.num_tokens < tokens_to_remove <= 0:
            raise ValueError(
                f"`tokens_to_remove` must be between {1 - self.num_tokens} and 0, but is {tokens_to_remove}."
            )
        if tokens_to_remove == 0:
            return
        ids, mask, hashes = self.input_ids[:, :tokens_to_remove], self.attention_mask, []
        for before, after, row in zip(self.input_ids, ids, self.image_hashes):
            tokens, left = (int((x == self.image_token_id).sum()) for x in (before, after))
            if left * len(row) % max(tokens, 1):
                raise ValueError(f"Removing {-tokens_to_remove} tokens would leave part of a picture.")
            hashes.append(row[: left * len(row) // max(tokens, 1)])
        mask = None if mask is None else mask[:, :tokens_to_remove]
        self.cache.crop(tokens_to_remove)
        self._inputs = ContextInputs(ids, mask, hashes, _changes(self.cache))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take these rows, in this order, as [`Cache.reorder_cache`]; a row may be taken several times or not at all."""
        self.check_unchanged()
        if self.input_ids is None:
            return
        index, mask = beam_idx.to(self.input_ids.device), self.attention_mask
        self.cache.reorder_cache(beam_idx)
        hashes = [self.image_hashes[i] for i in index.tolist()]
        mask = None if mask is None else mask[index]
        self._inputs = ContextInputs(self.input_ids[index], mask, hashes, _changes(self.cache))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row, as [`Cache.batch_repeat_interleave`]."""
        self.reorder_cache(torch.arange(cache_rows(self.cache)).repeat_interleave(repeats))  # type: ignore[arg-type]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, as [`Cache.batch_select_indices`]."""
        self.reorder_cache(torch.arange(cache_rows(self.cache))[indices.cpu()])  # type: ignore[arg-type]

    # In a file

    @property
    def inputs_digest(self) -> str:
        """What was read, tokens and pictures, as a hash."""
        digest = hashlib.sha256(json.dumps(self.image_hashes).encode())
        for tensor in (self.input_ids, self.attention_mask):
            digest.update(b"-" if tensor is None else tensor.cpu().long().numpy().tobytes())
        return digest.hexdigest()

    def save(self, file: str | os.PathLike, model: nn.Module, processor: Any = None) -> None:
        """
        Keep the context in one safetensors file, written whole or not at all.

        Args:
            file (`str` or `os.PathLike`): where.
            model ([`LongLLaVAForConditionalGeneration`]): that has read it.
            processor ([`LongLLaVAProcessor`], *optional*): that prepared it.

        Raises:
            ValueError: if there is nothing in it, or its cache was changed by something else.
        """
        self.check_unchanged()
        if self.input_ids is None:
            raise ValueError("The context is empty: 0 tokens were read, and there is nothing to keep.")
        length = cached_length(self.cache)
        tensors = {
            # Of keys and values allocated ahead only the positions that are in use.
            f"layers.{i}.{name}": x[..., :length, :] if name in ("keys", "values") else x
            for i, layer in enumerate(self.cache.layers)
            for name, x in layer_tensors(layer).items()
        }
        tensors["input_ids"] = self.input_ids
        if self.attention_mask is not None:
            tensors["attention_mask"] = self.attention_mask
        metadata = {
            "format": _FORMAT,
            "version": _VERSION,
            "model": model_fingerprint(model),
            "processor": "" if processor is None else processor_fingerprint(processor),
            "inputs": self.inputs_digest,
            "tokens": str(self.num_tokens),
            "image_hashes": json.dumps(self.image_hashes),
            "metadata": json.dumps(self.metadata),
        }
        with atomic_write(file) as temporary:
            save_file({name: x.detach().contiguous() for name, x in tensors.items()}, temporary, metadata=metadata)

    @classmethod
    def load(cls, file: str | os.PathLike, model: Any, processor: Any = None) -> "LongLLaVAContext":
        """
        The context that [`~LongLLaVAContext.save`] kept, each layer on the device where the model computes it.

        Args:
            file (`str` or `os.PathLike`): which.
            model ([`LongLLaVAForConditionalGeneration`]): the one that has read it.
            processor ([`LongLLaVAProcessor`], *optional*): checked too, if one was given then.

        Raises:
            ValueError: if it is of another model or processor, of another version, or no context at all.
            OSError: if it does not exist, or is damaged.
        """
        metadata = context_metadata(file)
        if metadata is None:
            raise ValueError(f"`{file}` is not a context that was kept.")
        if (metadata["format"], metadata.get("version")) != (_FORMAT, _VERSION):
            raise ValueError(
                f"The context `{file}` has version {metadata.get('version')} of the format `{metadata['format']}`, and"
                f" version {_VERSION} of `{_FORMAT}` is known. It does not say which pictures are in it; read them again."
            )
        pairs = [("model", model_fingerprint(model))]
        if processor is not None and metadata["processor"]:
            pairs.append(("processor", processor_fingerprint(processor)))
        for what, expected in pairs:
            if metadata[what] != expected:
                raise ValueError(
                    f"The context `{file}` is of another {what}: its fingerprint is {metadata[what][:12]}, and that of"
                    f" the {what} here {expected[:12]}. Read the pictures again."
                )
        try:
            with safe_open(file, framework="pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        except SafetensorError as error:
            raise OSError(f"The context `{file}` is damaged or truncated: {error}") from error
        context = model.new_context()
        context.metadata = json.loads(metadata["metadata"])
        for i, (layer, module) in enumerate(zip(context.cache.layers, model.get_decoder().layers)):
            prefix, device = f"layers.{i}.", execution_device(module)
            own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            _fill_layer(layer, {name: x.to(device) for name, x in own.items()})
        device, mask = execution_device(model.get_input_embeddings()), tensors.get("attention_mask")
        mask = None if mask is None else mask.to(device)
        context.record(tensors["input_ids"].to(device), mask, json.loads(metadata["image_hashes"]))
        return context


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
    return metadata if metadata.get("format") in (_FORMAT, _OLD_FORMAT) else None


def hash_image(pixel_values: torch.Tensor) -> str:
    """A hash of one picture's pixels, as the tower sees them."""
    data = pixel_values.detach().contiguous().cpu().view(torch.uint8).numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=16).hexdigest()


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
            positions = torch.arange(256, device=tensor.device) * 2_654_435_761 % tensor.numel()
            values = tensor.detach().flatten()[positions]
            digest.update(values.cpu().double().numpy().tobytes())
    return digest.hexdigest()


def processor_fingerprint(processor: Any) -> str:
    """A hash of what a processor makes of pictures and text."""
    image_processor = processor.image_processor
    names = [
        "size",
        "crop_size",
        "resample",
        "do_pad",
        "image_mean",
        "image_std",
        "rescale_factor",
        "image_seq_length",
    ]
    parts = [
        {name: repr(getattr(image_processor, name, None)) for name in names},
        processor.chat_template,
        sorted(processor.tokenizer.get_vocab().items()),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


__all__ = ["LongLLaVAContext", "context_metadata"]
