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
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from .cache_longllava import cache_rows, cached_length, is_empty, layer_tensors, restored_on_error
from .compat_longllava import execution_device
from .configuration_longllava import has_own_decoder
from .files_longllava import atomic_write
from .identity_longllava import hash_tensor, is_finite, model_fingerprint, processor_fingerprint


# What a file of a context calls itself. All that it says of itself stands under one name, as safetensors writes several in
# any order; up to version 2 each had a name of its own, and before contexts were values of their own another format.
_FORMAT, _VERSION = "longllava_context", "3"
_OLD_FORMATS = ("longllava_cache", "longllava_context")
_MAX_HEADER_BYTES, _MAX_FACTS_BYTES = 1 << 26, 1 << 24
_TEXTS = ("version", "model", "processor", "inputs", "checksum")


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
    Whatever fails or is interrupted leaves the whole context as it was.
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

    def restored_on_error(self) -> restored_on_error:
        """Whatever goes wrong or is interrupted inside leaves the context as it was, cache and books."""
        before, metadata = self._inputs, self.metadata

        def undo() -> None:
            self._inputs, self.metadata = before, metadata

        return restored_on_error(self.cache, undo)

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
        with self.restored_on_error():
            self.cache.reset()
            self._inputs, self.metadata = ContextInputs(), {}

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
        with self.restored_on_error():
            self.cache.crop(tokens_to_remove)
            self._inputs = ContextInputs(ids, mask, hashes, _changes(self.cache))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take these rows, in this order, as [`Cache.reorder_cache`]; a row may be taken several times or not at all."""
        self.check_unchanged()
        if self.input_ids is None:
            return
        index, mask = beam_idx.to(self.input_ids.device), self.attention_mask
        hashes = [self.image_hashes[i] for i in index.tolist()]
        mask = None if mask is None else mask[index]
        with self.restored_on_error():
            self.cache.reorder_cache(beam_idx)
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
        tensors = {name: x.detach().contiguous() for name, x in tensors.items()}
        try:
            metadata = json.loads(json.dumps(self.metadata))  # as it will be read
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"`metadata` must be something that JSON can say: {error}") from error
        facts: dict[str, Any] = {
            "version": _VERSION,
            "model": model_fingerprint(model),
            "processor": "" if processor is None else processor_fingerprint(processor),
            "inputs": self.inputs_digest,
            "image_hashes": self.image_hashes,
            "metadata": metadata,
        }
        facts["checksum"] = _checksum(facts, tensors)
        # The same context makes the same bytes.
        written = json.dumps(facts, sort_keys=True)
        if len(written) > _MAX_FACTS_BYTES:
            raise ValueError(
                f"`metadata` is too large: with it a context says {len(written)} bytes of itself, and the limit is"
                f" {_MAX_FACTS_BYTES}."
            )
        with atomic_write(file) as temporary:
            save_file(dict(sorted(tensors.items())), temporary, metadata={_FORMAT: written})

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
        facts, tensors = read_context(file)
        pairs = [("model", model_fingerprint(model))]
        if processor is not None and facts["processor"]:
            pairs.append(("processor", processor_fingerprint(processor)))
        for what, expected in pairs:
            if facts[what] != expected:
                raise ValueError(
                    f"The context `{file}` is of another {what}: its fingerprint is {facts[what][:12]}, and that of"
                    f" the {what} here {expected[:12]}. Read the pictures again."
                )
        context = model.new_context()
        context.metadata = facts["metadata"]
        for i, (layer, module) in enumerate(zip(context.cache.layers, model.get_decoder().layers)):
            prefix, device = f"layers.{i}.", execution_device(module)
            names = [name for name in tensors if name.startswith(prefix)]
            own = {name.removeprefix(prefix): tensors.pop(name).to(device) for name in names}
            if problem := _problem_of_layer(layer, own, tensors["input_ids"], model.config.get_text_config()):
                raise OSError(f"The context `{file}` is damaged: layer {i} {problem}.")
            _fill_layer(layer, own)
        ids, mask = tensors.pop("input_ids"), tensors.pop("attention_mask", None)
        if tensors:
            raise OSError(f"The context `{file}` is damaged: nothing is known of {sorted(tensors)}.")
        if problem := _problem_of_ids(ids, facts["image_hashes"], context.image_token_id, model.config):
            raise OSError(f"The context `{file}` is damaged: {problem}.")
        device = execution_device(model.get_input_embeddings())
        context.record(ids.to(device), None if mask is None else mask.to(device), facts["image_hashes"])
        return context


def _checksum(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """Of everything in a file but itself."""
    others = {name: value for name, value in facts.items() if name not in ("checksum", "format")}
    content = [others, [(name, hash_tensor(tensors[name])) for name in sorted(tensors)]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_context(file: str | os.PathLike) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """
    What a kept context says of itself, and its tensors, whole: of the right kinds and shapes among each other, finite, and
    with the right checksum. Whose they are is not looked at.

    Raises:
        ValueError: if it is no context, or one of another version.
        OSError: if it does not exist, or is damaged.
    """
    facts = context_metadata(file)
    if facts is None:
        raise ValueError(f"`{file}` is not a context that was kept.")
    if facts["version"] != _VERSION:
        raise ValueError(
            f"The context `{file}` has version {facts['version']} of the format `{facts['format']}`, and version"
            f" {_VERSION} of `{_FORMAT}` is known. Read the pictures again."
        )
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise OSError(f"The context `{file}` is damaged or truncated: {error}") from error
    if problem := _problem(facts, tensors):
        raise OSError(f"The context `{file}` is damaged or truncated: {problem}.")
    return facts, tensors


def _problem(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str | None:
    """What is wrong with the content of a file, whatever model it is of."""
    ids, mask = tensors.get("input_ids"), tensors.get("attention_mask")
    if not all(isinstance(facts.get(name), str) for name in _TEXTS) or not isinstance(facts.get("metadata"), dict):
        return f"it does not say all of {[*_TEXTS, 'metadata']}"
    if ids is None or ids.dtype != torch.int64 or ids.ndim != 2 or not ids.numel():
        return "it has no `input_ids` of shape (rows, tokens) in int64"
    if mask is not None and (
        mask.shape != ids.shape or mask.is_floating_point() or not ((mask == 0) | (mask == 1)).all()
    ):
        return f"its `attention_mask` is not of the shape {tuple(ids.shape)}, with 0 and 1"
    hashes = facts.get("image_hashes")
    if not isinstance(hashes, list) or [type(row) for row in hashes] != [list] * len(ids):
        return f"its `image_hashes` are not {len(ids)} lists"
    for name, tensor in tensors.items():
        if tensor is ids or tensor is mask:
            continue
        if not tensor.is_floating_point() or tensor.ndim < 2 or len(tensor) != len(ids):
            return f"`{name}` is {tensor.dtype} of shape {tuple(tensor.shape)}, where {len(ids)} rows of floats belong"
        if not is_finite(tensor):
            return f"`{name}` is not finite"
    if _checksum(facts, tensors) != facts["checksum"]:
        return "its checksum is another"
    return None


def _problem_of_layer(layer: Any, tensors: dict[str, torch.Tensor], ids: torch.Tensor, config: Any) -> str | None:
    """What is wrong with the content of one layer of a model's cache."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    rows, length = ids.shape
    expected: dict[str, tuple] = {}
    if isinstance(layer, DynamicLayer):
        keys = shapes.get("keys", (0, 0, 0, 0))
        positions = keys[2] if isinstance(layer, DynamicSlidingWindowLayer) and len(keys) == 4 else length
        expected |= {name: (rows, *keys[1:2], positions, *shapes.get(name, keys)[3:]) for name in ("keys", "values")}
    is_own = has_own_decoder(config)
    if is_own and expected:
        head_dim = config.hidden_size // config.num_attention_heads
        expected = dict.fromkeys(expected, (rows, config.num_key_value_heads, length, head_dim))
    elif is_own:
        channels = config.mamba_expand * config.hidden_size
        expected = {
            "conv_states.0": (rows, channels, config.mamba_d_conv),
            "recurrent_states.0": (rows, channels, config.mamba_d_state),
        }
    elif isinstance(layer, LinearAttentionCacheLayerMixin):
        kinds = {f"{kind}.{i}" for kind in ("conv_states", "recurrent_states") for i in getattr(layer, kind)}
        expected |= {name: shape for name, shape in shapes.items() if name in kinds}
    return None if shapes == expected else f"should hold {expected}, but holds {shapes}"


def _problem_of_ids(ids: torch.Tensor, hashes: list[list[str]], image_token_id: int | None, config: Any) -> str | None:
    """What is wrong with the tokens and pictures that a file says it is of."""
    if ids.min() < 0 or ids.max() >= config.get_text_config().vocab_size:
        return f"its tokens, {int(ids.min())} to {int(ids.max())}, are not all in the vocabulary"
    if image_token_id is None:
        return None
    tokens = (ids == image_token_id).sum(-1).tolist()
    if tokens != [config.image_seq_length * len(row) for row in hashes]:
        return f"its rows have {tokens} image tokens, and hashes of {[len(row) for row in hashes]} pictures"
    return None


def _fill_layer(layer: Any, tensors: dict[str, torch.Tensor]) -> None:
    if "keys" in tensors:
        layer.update(tensors["keys"], tensors["values"])
    for name, update in (("conv_states", "update_conv_state"), ("recurrent_states", "update_recurrent_state")):
        for key, x in tensors.items():
            if key.startswith(f"{name}."):
                getattr(layer, update)(x, state_idx=int(key.rsplit(".", 1)[1]))


def context_metadata(file: str | os.PathLike) -> dict[str, Any] | None:
    """
    What a kept context says of itself, which [`read_context`] compares with its content; `None` for any other file.

    Raises:
        OSError: if it does not exist, or is a safetensors file that is damaged within its header.
    """
    with open(file, "rb") as stream:
        start = stream.read(9)
        # A length, then JSON: nothing that is a picture or a film begins so.
        if len(start) < 9 or start[8:] != b"{":
            return None
        if not 2 <= (size := struct.unpack("<Q", start[:8])[0]) < _MAX_HEADER_BYTES:
            return None
        header = start[8:] + stream.read(size - 1)
    try:
        metadata = json.loads(header).get("__metadata__") or {}
        if metadata.get("format") in _OLD_FORMATS:
            return {"format": metadata["format"], "version": str(metadata.get("version"))}
        if _FORMAT not in metadata:
            return None
        facts = {**json.loads(metadata[_FORMAT]), "format": _FORMAT}
        return {**facts, "version": str(facts["version"])}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"`{file}` is damaged or truncated: its header cannot be read ({error}).") from error


__all__ = ["LongLLaVAContext", "context_metadata", "read_context"]
