# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
How a prompt is read, and how it is answered. `prefill` is the only reader: pictures go through the tower once, into the
embeddings of the prompt, and these through `forward` in chunks. `generate` reads all but the last token, and hands the
cache to Transformers' own `generate`, which goes on from there.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation import GenerationConfig, GenerationMixin, TextStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging
from transformers.utils.import_utils import is_torchdynamo_compiling

from .cache_longllava import LongLLaVACache, cache_rows, cached_length, is_empty, restored_on_error
from .compat_longllava import CACHE, EXPANDS_ENCODER_OUTPUTS, accepts_cache, as_cache, execution_device, take_cache
from .configuration_longllava import has_own_decoder
from .context_longllava import LongLLaVAContext
from .identity_longllava import hash_image
from .image_processing_longllava import LazyPixelValues


# Tokens of a prompt that are read at a time, unless told: enough to keep a device busy.
PREFILL_CHUNK_SIZES = {"cpu": 512, "cuda": 4096}
# Positions beyond the prompt that are allocated at first.
_ANSWER_CAPACITY = 1024
_PARAMETERS = tuple(inspect.signature(GenerationMixin.generate).parameters)[1:]


def default_chunk_size(device: str) -> int:
    """Tokens of a prompt that are read at a time on such a device, unless told."""
    return PREFILL_CHUNK_SIZES.get(device, PREFILL_CHUNK_SIZES["cuda"])


def image_batches(pixel_values: torch.Tensor | LazyPixelValues, size: int) -> Iterator[torch.Tensor]:
    """As many pictures as the tower sees at a time, with progress."""
    progress = logging.tqdm(total=len(pixel_values), desc="Encoding", unit=" images", delay=1.0, leave=False)
    for batch in pixel_values.split(size):
        count, held = len(batch), [batch]
        del batch
        yield held.pop()  # whoever takes it can let go of it before the next one is made
        progress.update(count)
    progress.close()


def check_image_tokens(tokens: int, features: int) -> None:
    """Raises `ValueError` if there are more or fewer places for image tokens than image tokens."""
    if tokens != features:
        raise ValueError(
            f"Image features and image tokens do not match, tokens: {tokens}, features: {features}. (In training on a"
            " stream, Accelerate cuts batches by rows unless `accelerator_config={'dispatch_batches': False}`.)"
        )


def check_no_image_tokens(input_ids: torch.Tensor, image_token_id: int | None) -> None:
    """
    Raises `ValueError` for image tokens where there are no pictures. A single token on another device than a CPU is not
    looked at, as the host would have to wait for it; those that `generate` makes are none.
    """
    is_looked_at = input_ids.shape[-1] > 1 or input_ids.device.type == "cpu"
    if image_token_id is None or input_ids.is_meta or is_torchdynamo_compiling() or not is_looked_at:
        return
    if tokens := int((input_ids == image_token_id).sum()):
        raise ValueError(
            f"There are {tokens} image tokens (id {image_token_id}) in `input_ids`, but no pictures for them. Give their"
            " `pixel_values` to a model with a vision tower; of pipelines, `image-text-to-text` takes pictures."
        )


@dataclass
class _Prompt:
    """
    Tokens that are to be read.

    input_ids (`(batch, length)`), inputs_embeds (`(batch, length, hidden_size)`): either or both; pictures are in the
        latter, which goes first.
    attention_mask (`(batch, past length + length)`): `None` where there is no padding.
    position_ids (`(batch, length)`): `None` for those that follow from the mask.
    image_hashes: of each row's pictures, where a context asks for them.
    """

    input_ids: torch.Tensor | None
    inputs_embeds: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    image_hashes: list[list[str]] | None = None

    @property
    def length(self) -> int:
        tokens: Any = self.input_ids if self.inputs_embeds is None else self.inputs_embeds
        return tokens.shape[1]

    def map(self, function: Callable) -> "_Prompt":
        """Each tensor through a function."""
        tensors = (self.input_ids, self.inputs_embeds, self.attention_mask, self.position_ids)
        return _Prompt(*(x if x is None else function(x) for x in tensors), image_hashes=self.image_hashes)  # type: ignore[misc, arg-type]

    def columns(self, begin: int, end: int) -> "_Prompt":
        """Some of the tokens, with the mask up to them."""
        ids, embeds = (x if x is None else x[:, begin:end] for x in (self.input_ids, self.inputs_embeds))
        mask, positions = self.attention_mask, self.position_ids
        mask = mask if mask is None else mask[:, : mask.shape[1] - self.length + end]
        if positions is not None:  # of all tokens, or of the last ones alone
            before = positions.shape[1] - self.length
            positions = positions[:, before + begin : before + end]
        return _Prompt(ids, embeds, mask, positions)

    def padding_first(self) -> "_Prompt":
        """What is generated follows the last position, so padding goes before tokens, in each row."""
        mask, length = self.attention_mask, self.length
        if mask is None or mask[:, -1].all():
            return self
        order = torch.argsort(mask[:, -length:].bool(), dim=-1, stable=True)

        def reorder(x: torch.Tensor) -> torch.Tensor:
            x = x.expand(order.shape[0], *x.shape[1:])
            index = order.view(*order.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
            return torch.cat([x[:, :-length], x[:, -length:].gather(1, index)], dim=1)

        return self.map(reorder)


class _Placeholders:
    """
    Where image tokens go, and which of the pictures that are given are in the cache already.

    Args:
        is_image (`torch.Tensor` of shape `(batch, length)`, bool): where the prompt has image tokens.
        start (`int`): where the prompt's new tokens begin.
        tokens_per_image (`int`).
        context ([`LongLLaVAContext`], *optional*): whose pictures are to be known by their hashes.
    """

    def __init__(self, is_image: torch.Tensor, start: int, tokens_per_image: int, context: Any = None):
        self.tokens_per_image, self.context = tokens_per_image, context
        self.index = is_image[:, start:].flatten().nonzero()[:, 0]
        self.known, self.new = (
            [row // tokens_per_image for row in part.sum(-1).tolist()]
            for part in (is_image[:, :start], is_image[:, start:])
        )
        self.hashes: list[list[str]] | None = None if context is None else [[] for _ in is_image]
        # Row of each picture that is given, and its number among those of that row that are known.
        self.pictures: list[tuple[int, int | None]] = []

    def expect(self, num_images: int) -> None:
        """Raises `ValueError` unless so many pictures are those of all the prompt, or of its new part."""
        given = num_images * self.tokens_per_image
        repeated = [0] * len(self.known) if given == len(self.index) else self.known
        check_image_tokens(len(self.index) + sum(repeated) * self.tokens_per_image, given)
        for row, (old, new) in enumerate(zip(repeated, self.new)):
            self.pictures += [(row, number) for number in range(old)] + [(row, None)] * new

    def select_new(self, numbers: range, images: torch.Tensor) -> torch.Tensor:
        """
        Of the pictures of these numbers those that are new, `(images, ...)`.

        Raises:
            ValueError: if another one is not what the context holds.
        """
        new = []
        for i, (row, known) in enumerate(self.pictures[numbers.start : numbers.stop]):
            if known is None:
                new.append(i)
            if self.hashes is None:
                continue
            digest = hash_image(images[i])
            if known is None:
                self.hashes[row].append(digest)
            elif digest != self.context.image_hashes[row][known]:
                raise ValueError(
                    "The inputs repeat the context's tokens, but not its pictures: give it those it was made of, or only"
                    " new ones, or read the others into a context of their own."
                )
        return images if len(new) == len(images) else images[new]

    def write(self, inputs_embeds: torch.Tensor, features: Iterable[torch.Tensor]) -> None:
        """Put image tokens, `(images, tokens, hidden_size)` at a time, where they belong in `(batch, length, hidden_size)`."""
        flat, done = inputs_embeds.view(-1, inputs_embeds.shape[-1]), 0
        for some in features:
            rows = some.flatten(0, 1).to(flat)
            if done + len(rows) <= len(self.index):
                flat.index_copy_(0, self.index[done : done + len(rows)], rows)
            done += len(rows)
        check_image_tokens(len(self.index), done)


class LongLLaVAGenerationMixin(GenerationMixin):
    """`prefill`, and a `generate` that begins with it."""

    # Of the model that this is part of.
    config: Any
    model: Any
    get_image_features: Any
    get_input_embeddings: Any

    @accepts_cache
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        unread_tokens: int | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        """
        As [`~GenerationMixin.prepare_inputs_for_generation`], and:

        Args:
            unread_tokens (`int`, *optional*): how many of the first iteration's tokens the cache does not hold yet. Only
                `generate` knows, as the length of a cache does not say how much was read.
        """
        if is_first_iteration and unread_tokens is not None:
            next_sequence_length = unread_tokens
        # For whoever reads the prompt: an assistant does so in an iteration that is not called the first.
        encoded, use_cache = kwargs.pop("mm_encoder_outputs", None), kwargs.get("use_cache", True)
        reads_prompt = is_first_iteration or is_empty(cache) or not use_cache
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **as_cache(cache),
            **kwargs,
        )
        if encoded is not None and reads_prompt:
            model_inputs["mm_encoder_outputs"] = encoded
        if self._is_wrapped() and cache is not None:
            model_inputs["past_key_values"] = cache  # PEFT 0.21 knows no other name
        return model_inputs

    @accepts_cache
    @torch.no_grad()
    def prefill(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor | LazyPixelValues | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: LongLLaVAContext | Cache | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        prefill_chunk_size: int | None = None,
    ) -> LongLLaVAContext:
        """
        Read a prompt and answer nothing yet.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): what to read; of a context that is continued, what
                comes after it, or all of it again.
            pixel_values, attention_mask, mm_encoder_outputs: as for [`~LongLLaVAForConditionalGeneration.forward`].
            cache ([`LongLLaVAContext`] or [`Cache`], *optional*): a context that is to be continued, in place, or an empty
                cache to use for a new one.
            prefill_chunk_size (`int`, *optional*): tokens to read at a time; by default 4,096, on a CPU 512, and all at
                once by other decoders than LongLLaVA's own.

        Returns:
            [`LongLLaVAContext`]: for `generate(cache=...)`, which adds to it; `branch()` makes another one of it.

        Raises:
            ValueError: as `forward`, or if there is nothing to read. The context is then as it was.
        """
        context: LongLLaVAContext = cache if isinstance(cache, LongLLaVAContext) else self.new_context(cache)
        start, mask = context.align(input_ids, attention_mask)
        with context.restored_on_error():
            prompt = _Prompt(input_ids, attention_mask=mask)
            new = self._embed(prompt, start, pixel_values, mm_encoder_outputs, context)
            self._read(new, context.cache, prefill_chunk_size, _ANSWER_CAPACITY)
            context.record(new.input_ids, new.attention_mask, new.image_hashes)  # type: ignore[arg-type]
        return context

    def new_context(self, cache: Cache | None = None) -> LongLLaVAContext:
        """An empty context, with an empty [`Cache`] of a kind that `generate` takes, or one of its own."""
        cache = LongLLaVACache(self.config) if cache is None else cache
        takes_images = hasattr(self.config, "image_seq_length")
        return LongLLaVAContext(cache, self.config.image_token_id if takes_images else None)

    def init_continuous_batching(self, *args, **kwargs):
        """Raises `NotImplementedError`, whatever the arguments: nor do `generate_batch` and the context manager work."""
        raise NotImplementedError(
            f"{type(self).__name__} has no continuous batching: Transformers' paged cache holds keys and values of text alone,"
            " and neither Mamba's states nor pictures. Give `generate` a batch, or serve the model with vLLM."
        )

    # Pictures

    def _embed(
        self,
        prompt: _Prompt,
        start: int,
        pixel_values: torch.Tensor | LazyPixelValues | None,
        mm_encoder_outputs: dict[str, Any] | None,
        context: LongLLaVAContext | None = None,
    ) -> _Prompt:
        """
        A prompt from `start` on, with its pictures in its embeddings: those that are given are of the whole prompt, or of
        that part. What the cache holds already is compared with what `context` knows of it, and not encoded again.
        """
        device = execution_device(self.get_input_embeddings())
        whole = prompt.map(lambda x: x.to(device))
        ids, embeds, new = whole.input_ids, whole.inputs_embeds, whole.columns(start, prompt.length)
        outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and outputs is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        if outputs is None and (pixel_values is None or len(pixel_values) == 0):
            if new.inputs_embeds is None:  # which may have pictures in them
                check_no_image_tokens(new.input_ids, getattr(self.config, "image_token_id", None))  # type: ignore[arg-type]
            return new
        if not hasattr(self.model, "vision_tower"):
            raise ValueError(f"{type(self).__name__} has no vision tower, but pictures were given.")
        is_image = self.model.is_image_token(ids if embeds is None else None, embeds)
        if embeds is None:
            new.inputs_embeds = self.model.get_text_embeddings(new.input_ids)
        else:
            new.inputs_embeds = new.inputs_embeds.clone(memory_format=torch.contiguous_format)  # type: ignore[union-attr]
        placeholders = _Placeholders(is_image, start, self.config.image_seq_length, context)
        placeholders.write(new.inputs_embeds, self._features(pixel_values, outputs, placeholders))  # type: ignore[arg-type]
        new.image_hashes = placeholders.hashes
        return new

    def _features(self, pixel_values: Any, outputs: Any, placeholders: _Placeholders) -> Iterator[torch.Tensor]:
        """
        The image tokens of the new pictures, from what the tower returned or as many at a time as it sees; nothing else
        stays in memory.
        """
        if outputs is not None:
            features = torch.cat(list(outputs.pooler_output))
            if len(features) % placeholders.tokens_per_image:
                check_image_tokens(len(placeholders.index), len(features))
            features = features.unflatten(0, (-1, placeholders.tokens_per_image))
            placeholders.expect(len(features))
            yield placeholders.select_new(range(len(features)), features)
            return
        placeholders.expect(len(pixel_values))
        done = 0
        for batch in image_batches(pixel_values, self.config.vision_batch_size):
            numbers, done = range(done, done + len(batch)), done + len(batch)
            batch = placeholders.select_new(numbers, batch.to(dtype=self.model.vision_tower.dtype))
            if len(batch):
                yield torch.stack(tuple(self.get_image_features(batch, return_dict=True).pooler_output))
            del batch
        if done != len(pixel_values):
            raise ValueError(f"`pixel_values` should hold {len(pixel_values)} pictures, but {done} came.")

    # Reading

    def _read(self, prompt: _Prompt, cache: Cache, chunk_size: int | None, answer_capacity: int = 0) -> None:
        """A prompt through `forward`, a chunk at a time."""
        length = prompt.length
        if prompt.position_ids is None and prompt.attention_mask is not None:
            # As Transformers counts; padding has no position, so any will do.
            positions = (prompt.attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            prompt = dataclasses.replace(prompt, position_ids=positions[:, positions.shape[1] - length :])
        if chunk_size is None:
            is_own = has_own_decoder(self.config)
            device = execution_device(self.get_input_embeddings())
            chunk_size = default_chunk_size(device.type) if is_own else max(length, 1)
        if chunk_size < 1:
            raise ValueError(f"`prefill_chunk_size` must be at least 1, but is {chunk_size}.")
        for layer in cache.layers:
            if hasattr(layer, "capacity"):
                layer.capacity = cached_length(cache) + length + answer_capacity
        is_short = chunk_size >= length
        progress = logging.tqdm(total=length, desc="Prefilling", unit=" tokens", leave=False, disable=is_short)
        for begin in range(0, length, chunk_size):
            chunk = prompt.columns(begin, min(begin + chunk_size, length))
            self(
                input_ids=chunk.input_ids if chunk.inputs_embeds is None else None,
                inputs_embeds=chunk.inputs_embeds,
                attention_mask=chunk.attention_mask,
                position_ids=chunk.position_ids,
                use_cache=True,
                logits_to_keep=1,
                return_dict=True,
                **as_cache(cache),
            )
            progress.update(chunk.length)
        progress.close()

    # Answering

    @torch.no_grad()
    def generate(self, *args, **kwargs):
        """
        As [`~GenerationMixin.generate`], and:

        - `pixel_values` may be a [`LazyPixelValues`], whose pictures are decoded while those before are encoded;
          `pixel_values=None` means that there are none. The tower sees `config.vision_batch_size` at a time.
        - a prompt is read in chunks of `prefill_chunk_size` tokens (by default 4,096, on a CPU 512, and all at once by
          other decoders than LongLLaVA's own), or at once where hidden states or attentions are to be returned.
        - `cache` (`past_key_values`) may be a [`LongLLaVAContext`], which the inputs repeat or go on from, and which then
          holds the answer too, but for its last token. If anything goes wrong, or is interrupted, it is left as it was.
        - a [`TextStreamer`] is ended by an error too, so that whoever reads it in another thread does not wait for ever.
        """
        kwargs.update(zip(_PARAMETERS, args))
        try:
            return self._generate_prompt(**kwargs)
        except BaseException:
            # Other streamers are of callers that see to errors, as Transformers' server does.
            if isinstance(streamer := kwargs.get("streamer"), TextStreamer):
                streamer.end()
            raise

    def _generate_prompt(self, **kwargs):
        """`generate` without its arguments by position."""
        cache, config = take_cache(kwargs), self._resolve_config(kwargs)
        context = cache if isinstance(cache, LongLLaVAContext) else None
        cache = cache if context is None else context.cache
        names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
        prompt, inputs = _Prompt(*(kwargs.pop(name, None) for name in names)), kwargs.pop("inputs", None)
        if inputs is not None and prompt.input_ids is not None:
            raise ValueError("You cannot specify both `inputs` and `input_ids` at the same time.")
        prompt.input_ids = prompt.input_ids if inputs is None else inputs
        if prompt.input_ids is None and prompt.inputs_embeds is None:
            if cache is not None:
                raise ValueError("A cache can only be continued with `input_ids` or `inputs_embeds`.")
            return super().generate(generation_config=config, **kwargs)  # which begins with the first token there is
        if self._is_wrapped() and config.use_cache is not False and all(LongLLaVACache(self.config).is_linear):
            raise ValueError(
                "PEFT goes by the number of cached positions, of which a decoder without attention layers has none: generate"
                " with `use_cache=False`."
            )
        images = kwargs.pop("pixel_values", None), kwargs.pop("mm_encoder_outputs", None)
        if context is None:
            with restored_on_error(cache):
                return self._generate(config, prompt, cache, images, kwargs)
        with context.restored_on_error():
            return self._generate_with_context(config, prompt, context, images, kwargs)

    def _resolve_config(self, kwargs: dict[str, Any]) -> GenerationConfig:
        """The generation configuration with all that was said about it, which is taken out of the arguments."""
        config = copy.deepcopy(kwargs.pop("generation_config", None) or GenerationConfig())
        config.update(**self.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
        unused = config.update(**kwargs)
        for name in kwargs.keys() - unused.keys():
            kwargs.pop(name)
        # Said, the placeholder would stand for a picture that is not there.
        if (token := getattr(self.config, "image_token_id", None)) is not None:
            config.suppress_tokens = sorted({token, *(config.suppress_tokens or ())})
        return config

    def _generate(self, config: GenerationConfig, prompt: _Prompt, cache: Cache | None, images, kwargs):
        """With a cache that knows no tokens, or none."""
        if prompt.attention_mask is None and prompt.inputs_embeds is None:
            prompt.attention_mask = _infer_mask(prompt.input_ids, config)  # type: ignore[arg-type]
        start = self._start(prompt, cache)
        tokens: Any = prompt.input_ids if prompt.inputs_embeds is None else prompt.inputs_embeds
        expand = max(config.num_beams or 1, config.num_return_sequences or 1)
        if not is_empty(cache) and cache_rows(cache) != tokens.shape[0] * expand:  # type: ignore[arg-type]
            raise ValueError(
                f"The cache holds {cache_rows(cache)} sequences, but {tokens.shape[0] * expand} are to be continued"  # type: ignore[arg-type]
                " (beams and `num_return_sequences` are sequences, too)."
            )
        if cache is None and config.use_cache is not False and not _rolls_back(config, kwargs):
            cache = self._make_cache(config, prompt.length)
        ordered = prompt.padding_first()
        new = self._embed(ordered, start, *images)
        outputs = self._answer(config, ordered, new, cache, kwargs)
        if ordered is not prompt and prompt.input_ids is not None:
            sequences = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
            rows = prompt.input_ids.repeat_interleave(len(sequences) // len(prompt.input_ids), dim=0)
            sequences[:, : rows.shape[1]] = rows.to(sequences)
        return outputs

    def _generate_with_context(self, config, prompt: _Prompt, context: LongLLaVAContext, images, kwargs):
        """Its tokens are compared with the prompt's; then it holds these and the answer's too."""
        if prompt.input_ids is None or prompt.inputs_embeds is not None or prompt.position_ids is not None:
            raise ValueError("A context knows its tokens: continue it with `input_ids`, a mask and pictures alone.")
        if (returned := config.num_return_sequences or 1) > 1:
            raise ValueError(
                f"The cache holds {len(prompt.input_ids)} sequences, but {returned * len(prompt.input_ids)} are to be"
                f" continued: `context.batch_repeat_interleave({returned})` makes {returned} of each."
            )
        if config.use_cache is False or config.cache_implementation is not None:
            raise ValueError("A context has a cache of its own: leave out `use_cache` and `cache_implementation`.")
        start, mask = context.align(prompt.input_ids, prompt.attention_mask)
        whole = _Prompt(prompt.input_ids, attention_mask=mask)
        pixel_values, encoded = images
        new = self._embed(whole, start, pixel_values, encoded, context)
        if mask is None:
            whole.attention_mask = prompt.input_ids.new_ones(len(prompt.input_ids), context.num_tokens + new.length)
        if _rolls_back(config, kwargs):
            raise ValueError("Assisted decoding rolls its cache back, which no context follows: use a plain cache.")
        has_beams = (config.num_beams or 1) > 1
        outputs = self._answer(config, whole, new, context.cache, kwargs, keeps_cache=has_beams)
        sequences = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
        said = sequences[:, prompt.length : -1].to(new.input_ids.device)  # type: ignore[union-attr]
        if mask is not None:
            mask = F.pad(new.attention_mask, (0, said.shape[1]), value=1)  # type: ignore[arg-type]
        if has_beams:  # of which the cache does not hold the best, so that is read
            read = 0 if self._reads_whole(config, kwargs) else new.length - 1
            self._read(new.columns(read, new.length), context.cache, None)
            self._read(_Prompt(said, attention_mask=mask), context.cache, config.prefill_chunk_size)
        context.record(torch.cat([new.input_ids, said], dim=1), mask, new.image_hashes)  # type: ignore[list-item]
        return outputs

    @staticmethod
    def _start(prompt: _Prompt, cache: Cache | None) -> int:
        """
        Where in a prompt the tokens begin that a cache does not hold. As everywhere in Transformers: inputs as long as
        the mask, and embeddings, repeat what is cached; shorter ones are only what is new.
        """
        past, length, mask = cached_length(cache), prompt.length, prompt.attention_mask
        repeats = prompt.inputs_embeds is not None or mask is None or mask.shape[1] == length
        start = past if repeats else 0
        if length <= start:
            raise ValueError(f"The cache holds {past} tokens, and the inputs, {length} tokens, add none to them.")
        if past and mask is not None and mask.shape[1] != past + length - start:
            raise ValueError(
                f"`attention_mask` must be as long as all tokens, {past + length - start}, but its length is"
                f" {mask.shape[1]}."
            )
        return start

    def _make_cache(self, config: GenerationConfig, length: int) -> Cache | None:
        """The cache that `cache_implementation` asks for; `None` for those that only Transformers makes."""
        text_config, kind = self.config.get_text_config(decoder=True), config.cache_implementation
        if kind in (None, "dynamic"):
            return LongLLaVACache(text_config)
        if kind == "offloaded":
            return DynamicCache(config=text_config, offloading=True)
        if kind in ("static", "offloaded_static"):
            if config.max_new_tokens is not None:
                total = length + config.max_new_tokens
            else:
                total = length + 20 if config.max_length is None else config.max_length
            total = max(total - 1, config.max_cache_len or 0)  # type: ignore[attr-defined]
            cache = StaticCache(config=text_config, max_cache_len=total, offloading=kind != "static")
            return LongLLaVACache(text_config) if all(cache.is_linear) else cache
        return None

    def _answer(
        self,
        config: GenerationConfig,
        prompt: _Prompt,
        new: _Prompt,
        cache: Cache | None,
        kwargs: dict[str, Any],
        keeps_cache: bool = False,
    ):
        """
        Transformers' `generate` after what comes before its first token was read: all of `new` but the last token, where
        that changes nothing of what is returned. `prompt` is what it is given, so that processors and streamers see it.
        """
        arguments = {**kwargs, "input_ids": prompt.input_ids, "inputs_embeds": prompt.inputs_embeds}
        arguments.update(attention_mask=prompt.attention_mask, position_ids=prompt.position_ids)
        reads_whole = cache is None or self._reads_whole(config, kwargs)
        last, expand = new.inputs_embeds, max(config.num_beams or 1, config.num_return_sequences or 1)
        if prompt.inputs_embeds is not None:
            # Only what is unread is looked at.
            arguments["inputs_embeds"] = F.pad(last, (0, 0, prompt.length - new.length, 0))  # type: ignore[arg-type]
        elif last is not None and reads_whole:
            copies, size = 1 if EXPANDS_ENCODER_OUTPUTS else expand, self.config.image_seq_length
            masks = new.input_ids == self.config.image_token_id
            features = [image for row, mask in zip(last, masks) for image in row[mask].split(size) * copies]  # type: ignore[arg-type]
            arguments["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}  # type: ignore[arg-type]
        elif last is not None and (new.input_ids[:, -1] == self.config.image_token_id).any():  # type: ignore[index]
            arguments["inputs_embeds"] = last[:, -1:].expand(-1, prompt.length, -1)
        if cache is None:
            return super().generate(generation_config=config, **arguments)

        chunk_size, config.prefill_chunk_size, config.cache_implementation = config.prefill_chunk_size, None, None
        rows = (prompt.input_ids if prompt.inputs_embeds is None else prompt.inputs_embeds).shape[0]  # type: ignore[union-attr]
        before = 1 if is_empty(cache) else cache_rows(cache) // rows
        if not reads_whole:
            read = new.columns(0, new.length - 1).map(lambda x: x if before == 1 else x.repeat_interleave(before, 0))
            self._read(read, cache, chunk_size, min(_ANSWER_CAPACITY, config.max_new_tokens or _ANSWER_CAPACITY))
        if keeps_cache:
            cache = copy.deepcopy(cache)
        if expand > before:
            cache.reorder_cache(torch.arange(rows).repeat_interleave(expand // before))  # type: ignore[arg-type]
        arguments[CACHE] = cache
        if not is_empty(cache):
            arguments["unread_tokens"] = new.length if reads_whole else 1
        return super().generate(generation_config=config, **arguments)

    def _reads_whole(self, config: GenerationConfig, kwargs: dict[str, Any]) -> bool:
        """Whether Transformers' `generate` has to read the prompt, as it does so in a way of its own."""
        return_states = config.return_dict_in_generate and (config.output_hidden_states or config.output_attentions)
        is_asked = any(kwargs.get(name) for name in ("custom_generate", "synced_gpus"))
        return bool(return_states or is_asked or self._is_wrapped() or _rolls_back(config, kwargs))

    def _is_wrapped(self) -> bool:
        """Whether PEFT put a method of its own here, which gives `forward` a prompt or a prefix besides."""
        return "prepare_inputs_for_generation" in vars(self)


def _rolls_back(config: GenerationConfig, kwargs: dict[str, Any]) -> bool:
    """Whether this is assisted decoding, of which the cache is Transformers' own business."""
    return bool(kwargs.get("assistant_model") or config.prompt_lookup_num_tokens or config.is_assistant)  # type: ignore[attr-defined]


def _infer_mask(input_ids: torch.Tensor, config: GenerationConfig) -> torch.Tensor | None:
    """Without a mask Transformers takes padding tokens for padding, unless they end sequences too."""
    pad, eos = config.pad_token_id, config.eos_token_id
    if pad is None or pad in (eos if isinstance(eos, (list, tuple)) else (eos,)) or not (input_ids == pad).any():
        return None
    return (input_ids != pad).long()


__all__ = ["LongLLaVAGenerationMixin"]
