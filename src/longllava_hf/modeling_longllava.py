# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
LongLLaVA (arXiv 2409.02889): a vision tower whose patches are pooled to a quarter, a projector, and a decoder. The
decoder may be any that Transformers knows; LongLLaVA's own is in `modeling_longllava_text`.
"""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    MoeCausalLMOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .cache_longllava import LongLLaVACache, all_or_nothing, cache_rows, make_room
from .compat_longllava import CACHE, accepts_cache, get_cache, take_cache
from .configuration_longllava import LongLLaVAConfig
from .image_processing_longllava import LazyPixelValues
from .modeling_longllava_text import LongLLaVATextPreTrainedModel, router_aux_loss, select_positions


# Tokens of a prompt that are read at a time, unless told: enough to keep a device busy.
PREFILL_CHUNK_SIZES = {"cpu": 512, "cuda": 4096}
# Positions beyond the prompt that a cache has room for at first.
_ROOM_FOR_AN_ANSWER = 1024


@dataclass
class LongLLaVAModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    What a decoder without its head returns, and:

    router_logits (`tuple(torch.Tensor)`, *optional*): of each expert layer, `(batch * length, num_experts)`; returned
        with `output_router_logits=True`.
    image_hidden_states (`torch.Tensor`, *optional*): the image tokens that went into the decoder,
        `(image tokens, hidden_size)`.
    """

    router_logits: tuple[torch.Tensor] | None = None
    image_hidden_states: torch.Tensor | None = None


@dataclass
class LongLLaVACausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    r"""
    What a decoder returns (`loss` includes the load-balancing loss `aux_loss`, if there is one), and:

    image_hidden_states (`torch.Tensor` of shape `(image tokens, hidden_size)`, *optional*).
    """

    image_hidden_states: torch.Tensor | None = None


def pool_patches(patches: torch.Tensor, mode: str) -> torch.Tensor:
    """
    A quarter of the tokens (arXiv 2409.02889, section 3.1).

    Args:
        patches (`torch.Tensor` of shape `(images, patches, channels)`): a square map in raster order for `"2d"`.
        mode (`"2d"`, `"1d"` or `"none"`): halve both sides of the map bilinearly, which for even sides is the mean of
            2 x 2 patches; resize the sequence linearly; or leave it.

    Returns:
        `torch.Tensor` of shape `(images, patches // 4, channels)`; `(images, patches, channels)` for `"none"`.
    """
    if mode == "none":
        return patches
    channels_first = patches.transpose(1, 2)
    if mode == "1d":
        return F.interpolate(channels_first, size=patches.shape[1] // 4, mode="linear").transpose(1, 2)
    side = math.isqrt(patches.shape[1])
    square = channels_first.unflatten(-1, (side, side))
    return F.interpolate(square, size=(side // 2, side // 2), mode="bilinear").flatten(-2).transpose(1, 2)


class LongLLaVAMultiModalProjector(nn.Module):
    """From the tower's channels to the decoder's: two linear layers with an activation between them, or one."""

    def __init__(self, config: LongLLaVAConfig):
        super().__init__()
        hidden_size = config.get_text_config().hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, hidden_size)
        if config.projector_type == "mlp2x_gelu":
            self.act = ACT2FN[config.projector_hidden_act]
            self.linear_2 = nn.Linear(hidden_size, hidden_size)
        else:
            self.act = self.linear_2 = nn.Identity()

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(image_features)))


class LongLLaVAPreTrainedModel(LongLLaVATextPreTrainedModel):
    config: LongLLaVAConfig
    input_modalities = ("image", "text")
    # Recorded by the decoder, whatever it is.
    _can_record_outputs: dict[str, Any] = {}


def _batches(pixel_values: torch.Tensor | LazyPixelValues, size: int) -> Iterator[torch.Tensor]:
    """As many pictures as the tower sees at a time, with progress."""
    progress = logging.tqdm(total=len(pixel_values), desc="Encoding", unit=" images", delay=1.0, leave=False)
    for batch in pixel_values.split(size):
        count, held = len(batch), [batch]
        del batch
        yield held.pop()  # whoever takes it can let go of it before the next one is made
        progress.update(count)
    progress.close()


def _joined(features: Any) -> torch.Tensor:
    """The image tokens of all pictures, `(image tokens, hidden_size)`; where they are in one piece, that piece."""
    return features[0] if len(features) == 1 else torch.cat(list(features))


def _check_image_tokens(mask: torch.Tensor, image_features: torch.Tensor) -> None:
    if mask.is_meta:  # nothing to count where only shapes are computed
        return
    num_tokens, num_features = int(mask.sum()), image_features.shape[0]
    if num_tokens != num_features:
        raise ValueError(
            f"Image features and image tokens do not match, tokens: {num_tokens}, features: {num_features}"
        )


class LongLLaVAModel(LongLLaVAPreTrainedModel):
    """Tower, projector and decoder, without a language-modelling head."""

    def __init__(self, config: LongLLaVAConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LongLLaVAMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(images, 3, height, width)`).

        Returns:
            [`BaseModelOutputWithPooling`]: the tower's output, its `pooler_output` replaced by one tensor
            `(image tokens, hidden_size)` for each image, ready for the decoder.
        """
        if isinstance(pixel_values, LazyPixelValues):
            pixel_values = pixel_values.load()
        batch_size = self.config.vision_batch_size
        if len(pixel_values) > batch_size:
            batches = _batches(pixel_values, batch_size)
            parts = [self.get_image_features(batch, return_dict=True) for batch in batches]
            return BaseModelOutputWithPooling(
                last_hidden_state=torch.cat([part.last_hidden_state for part in parts]),
                pooler_output=[feature for part in parts for feature in part.pooler_output],  # type: ignore[arg-type]
            )
        pixel_values = pixel_values.to(self.vision_tower.device, self.vision_tower.dtype)
        requested = kwargs.pop("output_hidden_states", None) or self.config.output_hidden_states
        outputs = self.vision_tower(pixel_values, return_dict=True, output_hidden_states=True, **kwargs)
        features = outputs.hidden_states[self.config.vision_feature_layer]
        if self.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        # Key difference to LLaVA: the patches are pooled; LongLLaVA does so before the projector, LongVA after it.
        if self.config.pooling_order == "before_projector":
            features = self.multi_modal_projector(pool_patches(features, self.config.pooling_mode))
        else:
            features = pool_patches(self.multi_modal_projector(features), self.config.pooling_mode)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=list(features),  # type: ignore[arg-type]
            hidden_states=outputs.hidden_states if requested else None,
            attentions=outputs.attentions,
        )

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """
        Where image tokens go.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): where not given, the positions of
                `inputs_embeds` that hold the embedding of `config.image_token_id` are taken.
            inputs_embeds (`torch.Tensor` of shape `(batch, length, hidden_size)`).
            image_features (`torch.Tensor` of shape `(image tokens, hidden_size)`).

        Returns:
            `torch.Tensor` of shape `(batch, length, 1)`, bool.

        Raises:
            ValueError: if there are more or fewer such positions than image tokens.
        """
        if input_ids is None:
            token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        _check_image_tokens(mask, image_features)
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    def _embed_tokens(self, input_ids: Any) -> torch.Tensor:
        # The placeholder's embedding is overwritten, so its id need not be in the vocabulary.
        embeddings = self.get_input_embeddings()
        if self.config.image_token_id >= embeddings.num_embeddings:
            input_ids = torch.where(input_ids == self.config.image_token_id, 0, input_ids)
        return embeddings(input_ids)

    @accepts_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LongLLaVAModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): exactly one of it and `inputs_embeds`.
            pixel_values (`torch.Tensor` of shape `(images, 3, height, width)` or `LazyPixelValues`, *optional*):
                all images of the batch, in reading order; each fills `config.image_seq_length` placeholders.
            attention_mask (`torch.Tensor` of shape `(batch, past length + length)`, *optional*): 0 for padding.
            position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*).
            cache (`Cache`, *optional*).
            inputs_embeds (`torch.Tensor` of shape `(batch, length, hidden_size)`, *optional*).
            mm_encoder_outputs (`dict`, *optional*): under `"image"`, what [`~LongLLaVAModel.get_image_features`]
                returned, in place of `pixel_values`.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds`, and at most one of `pixel_values` and
                `mm_encoder_outputs`, is given; or if image tokens and image features do not match.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        image_outputs: Any = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and image_outputs is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")

        if inputs_embeds is None:
            inputs_embeds = self._embed_tokens(input_ids)
        if pixel_values is not None and len(pixel_values):
            image_outputs = self.get_image_features(pixel_values, return_dict=True)
        image_features = None
        if image_outputs is not None:
            image_features = _joined(image_outputs.pooler_output).to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{CACHE: cache},
            **kwargs,
        )
        return LongLLaVAModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=getattr(outputs, "router_logits", None),
            image_hidden_states=image_features,
            **{CACHE: get_cache(outputs)},
        )


def default_chunk_size(device: str) -> int:
    """Tokens of a prompt that are read at a time on such a device, unless told."""
    return PREFILL_CHUNK_SIZES.get(device, PREFILL_CHUNK_SIZES["cuda"])


def _check_padding(attention_mask: torch.Tensor | None) -> None:
    if attention_mask is not None and not attention_mask[:, -1].all():
        raise ValueError(
            "A context's prompts of different length must be padded on the left: each must end with a token."
        )


class _NeverSaid(LogitsProcessor):
    """A token that is never generated."""

    def __init__(self, token_id: int):
        self.token_id = token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.token_id < scores.shape[-1]:
            scores = scores.index_fill(-1, torch.tensor([self.token_id], device=scores.device), float("-inf"))
        return scores  # type: ignore[return-value]


def _as_encoder_outputs(features: torch.Tensor) -> dict[str, BaseModelOutputWithPooling]:
    """Image tokens in the form that `mm_encoder_outputs` has."""
    return {"image": BaseModelOutputWithPooling(pooler_output=[features])}  # type: ignore[arg-type]


def _reorder_last(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """`tensor` of shape `(batch, length, ...)` with its last positions in the order `(batch, positions)`."""
    tensor = tensor.expand(order.shape[0], *tensor.shape[1:])
    index = order.view(*order.shape, *[1] * (tensor.ndim - 2)).expand(-1, -1, *tensor.shape[2:])
    positions = order.shape[1]
    return torch.cat([tensor[:, :-positions], tensor[:, -positions:].gather(1, index)], dim=1)


class LongLLaVAForConditionalGeneration(LongLLaVAPreTrainedModel, GenerationMixin):
    """LongLLaVA with its language-modelling head: pictures and text in, text out."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: LongLLaVAConfig):
        super().__init__(config)
        self.model = LongLLaVAModel(config)
        text_config = config.get_text_config()
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """See [`LongLLaVAModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @accepts_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LongLLaVACausalLMOutputWithPast:
        r"""
        As [`LongLLaVAModel.forward`], and:

        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): ids to predict, shifted inside; -100 is
                ignored.
            use_cache (`bool`, *optional*): return a cache, new if none was given.
            output_router_logits (`bool`, *optional*): return them, and add the load-balancing loss to the loss.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): how many of the last positions, or which, to
                compute logits for; 0 for all.

        Example:

        ```python
        >>> import longllava_hf
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor

        >>> processor = AutoProcessor.from_pretrained(longllava_hf.TINY)
        >>> model = AutoModelForImageTextToText.from_pretrained(longllava_hf.TINY)
        >>> messages = [{"role": "user", "content": [{"type": "image", "path": "digit.png"},
        ...     {"type": "text", "text": "Which digit is this?"}]}]
        >>> inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True,
        ...     return_dict=True, return_tensors="pt")
        >>> processor.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        '7'
        ```
        """
        text_config: Any = self.config.get_text_config()
        if output_router_logits is None:
            output_router_logits = getattr(text_config, "output_router_logits", False)
        if output_router_logits:  # a decoder without experts need not know the word
            kwargs["output_router_logits"] = True
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        logits = self.lm_head(select_positions(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=text_config.vocab_size, **kwargs)
        aux_loss = router_aux_loss(text_config, outputs.router_logits, attention_mask)
        if loss is not None and aux_loss is not None:
            loss = loss + text_config.router_aux_loss_coef * aux_loss.to(loss.device)
        return LongLLaVACausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            image_hidden_states=outputs.image_hidden_states,
            **{CACHE: get_cache(outputs)},
        )

    def generate(self, *args, **kwargs):
        """
        As [`~GenerationMixin.generate`], and:

        - `pixel_values` may be a [`LazyPixelValues`], whose pictures are decoded while those before are encoded;
          `pixel_values=None` means that there are none. The tower sees `config.vision_batch_size` at a time.
        - a prompt is read in chunks of `prefill_chunk_size` tokens (by default 4,096, on a CPU 512).
        - `cache` (`past_key_values`) may hold the beginning of the conversation, which the inputs repeat or leave out. If anything
          goes wrong, or is interrupted, it is left as it was.
        """
        kwargs.update(zip(list(inspect.signature(GenerationMixin.generate).parameters)[1:], args))
        images = ("pixel_values", "mm_encoder_outputs")
        kwargs = {name: value for name, value in kwargs.items() if value is not None or name not in images}
        cache, attention_mask = take_cache(kwargs), kwargs.get("attention_mask")
        if cache is not None:
            kwargs[CACHE] = cache
        if isinstance(cache, LongLLaVACache):
            _check_padding(attention_mask)
        was_empty = cache is not None and cache.get_seq_length() == 0
        with all_or_nothing(cache):
            with torch.no_grad():
                features = self._encode_images(kwargs)
            inputs_embeds = kwargs.get("inputs_embeds")
            if features is not None and inputs_embeds is not None:
                # Only embeddings say where pictures go: put them there before anything is cut or copied.
                features = features.to(inputs_embeds.device, inputs_embeds.dtype)
                mask = self.model.get_placeholder_mask(None, inputs_embeds, features)
                kwargs["inputs_embeds"] = inputs_embeds.masked_scatter(mask, features)
            elif features is not None:
                kwargs["mm_encoder_outputs"] = _as_encoder_outputs(features)
            # Said, the placeholder would stand for a picture that is not there.
            never = _NeverSaid(self.config.image_token_id)
            kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or []), never])
            outputs = super().generate(**kwargs)
            if isinstance(cache, LongLLaVACache):
                sequences = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
                known = inputs_embeds is None and (was_empty or cache.input_ids is not None)
                input_ids = kwargs.get("input_ids", kwargs.get("inputs")) if known else None
                cache.note_answer(input_ids, sequences, features, attention_mask)
        return outputs

    @accepts_cache
    @torch.no_grad()
    def prefill(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor | LazyPixelValues | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: LongLLaVACache | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        prefill_chunk_size: int | None = None,
    ) -> LongLLaVACache:
        """
        Read a prompt and answer nothing yet.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): what to read; with `cache`, only what
                comes after it, or all of it again.
            pixel_values, attention_mask, mm_encoder_outputs: as for [`~LongLLaVAForConditionalGeneration.forward`].
            cache ([`LongLLaVACache`], *optional*): a context that is to be continued, in place.
            prefill_chunk_size (`int`, *optional*): tokens to read at a time (by default 4,096, on a CPU 512).

        Returns:
            [`LongLLaVACache`]: for `generate(cache=...)`, which adds to it; `copy.deepcopy` branches it. It can
            be kept with [`~LongLLaVACache.save`].

        Raises:
            ValueError: as `forward`, or if there is nothing to read. The context is then as it was.
        """
        _check_padding(attention_mask)
        cache = LongLLaVACache(config=self.config) if cache is None else cache
        model_kwargs = {
            "pixel_values": pixel_values,
            "mm_encoder_outputs": mm_encoder_outputs,
            "attention_mask": attention_mask,
            CACHE: cache,
            "use_cache": True,
        }
        generation_config = GenerationConfig(prefill_chunk_size=prefill_chunk_size)
        with all_or_nothing(cache):
            features = self._encode_images(model_kwargs)
            if features is not None:
                model_kwargs["mm_encoder_outputs"] = _as_encoder_outputs(features)
            self._prefill(input_ids, generation_config, model_kwargs)
            cache.note_inputs(input_ids, features, attention_mask)
        return cache

    def _encode_images(self, model_kwargs: dict[str, Any]) -> torch.Tensor | None:
        """
        Take the pictures out of `generate`'s arguments, as pixels or already encoded: `(image tokens, hidden_size)`. Of
        the tower's outputs nothing else stays in memory.
        """
        image_outputs = (model_kwargs.pop("mm_encoder_outputs", None) or {}).get("image")
        pixel_values = model_kwargs.pop("pixel_values", None)
        if pixel_values is not None and len(pixel_values) == 0:
            pixel_values = None
        if pixel_values is not None and image_outputs is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        if pixel_values is None:
            return None if image_outputs is None else _joined(image_outputs.pooler_output)
        features: Any = None
        done = 0
        for batch in _batches(pixel_values, self.config.vision_batch_size):
            outputs: Any = self.get_image_features(batch, return_dict=True)
            encoded = torch.stack(outputs.pooler_output)
            if features is None:
                features = encoded.new_empty(len(pixel_values), *encoded.shape[1:])
            features[done : done + len(batch)] = encoded
            done += len(batch)
            del batch, outputs, encoded
        if done != len(pixel_values):
            raise ValueError(f"`pixel_values` should hold {len(pixel_values)} pictures, but {done} came.")
        return features.flatten(0, 1)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # Key difference to most models: the first dimension of `pixel_values` is not the batch. Each copy of a row needs
        # all of that row's images again, in their order; encoded, they are only referred to several times.
        features = None
        if expand_size > 1:
            features = self._encode_images(model_kwargs)
        if features is not None:
            is_image = input_ids == self.config.image_token_id
            _check_image_tokens(is_image, features)
            rows = features.split(is_image.sum(-1).tolist())
            features = torch.cat([row for row in rows for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if features is not None:
            model_kwargs["mm_encoder_outputs"] = _as_encoder_outputs(features)
        return input_ids, model_kwargs

    @staticmethod
    def _place_after(model_kwargs: dict[str, Any], attention_mask, past_length: int, length: int) -> None:
        """`generate` counts from 0 where inputs are only what is new; decoders that embed positions go on from the past."""
        position_ids = model_kwargs.get("position_ids")
        if not past_length or position_ids is None or position_ids.shape[-1] != length or position_ids.min() > 0:
            return
        if attention_mask is not None:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        else:
            positions = torch.arange(past_length + length, device=position_ids.device)[None]
        model_kwargs["position_ids"] = positions.expand(position_ids.shape[0], -1)

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        """
        As [`~GenerationMixin._prefill`], with three differences: chunks know which images are theirs, on every
        Transformers release; a cache that already holds the beginning of the conversation is continued, whether the
        inputs repeat that beginning or not; and only images that are not in that cache yet are used.
        """
        cache = model_kwargs.get(CACHE)
        if cache is None or not is_first_iteration:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

        features = self._encode_images(model_kwargs)
        inputs_embeds, attention_mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
        sequence = input_ids if inputs_embeds is None else inputs_embeds
        length, past_length = sequence.shape[1], cache.get_seq_length()
        if past_length and cache_rows(cache) != sequence.shape[0]:
            raise ValueError(
                f"The cache holds {cache_rows(cache)} sequences, but {sequence.shape[0]} are to be continued (beams and"
                " `num_return_sequences` are sequences, too)."
            )
        if attention_mask is not None:
            total = attention_mask.shape[1]
        else:
            total = getattr(generation_config, "_mask_length", past_length + length)
        # Inputs as long as the mask repeat what is cached; shorter ones are only what is new. A context that knows its
        # tokens can tell by them.
        start = past_length if total == length or inputs_embeds is not None else 0
        if isinstance(cache, LongLLaVACache) and cache.input_ids is not None and inputs_embeds is None:
            start = past_length if cache.is_repeated_by(input_ids) else 0
            total = past_length - start + length
            if attention_mask is None and cache.attention_mask is not None:
                attention_mask = torch.ones_like(input_ids[:, start:])
            if attention_mask is not None and attention_mask.shape[1] < total:
                attention_mask = torch.cat([cache.mask_of(attention_mask), attention_mask], dim=1)
                model_kwargs["attention_mask"] = attention_mask
        if length <= start:
            raise ValueError(
                f"The cache holds {past_length} tokens, and the inputs, {length} tokens, add none to them."
            )
        self._place_after(model_kwargs, attention_mask, past_length if start == 0 else 0, length)
        if attention_mask is not None and attention_mask.all():
            # Said once, so that nobody looks at it for every token.
            attention_mask = None
            model_kwargs.pop("attention_mask")
        if attention_mask is not None and not attention_mask[:, -1].all():
            # What is generated follows the last position, so among the new positions padding goes before tokens.
            order = torch.argsort(attention_mask[:, start - length :].bool(), dim=-1, stable=True)
            if inputs_embeds is None:
                input_ids = _reorder_last(input_ids, order)
            for name in ("inputs_embeds", "attention_mask", "position_ids"):
                if model_kwargs.get(name) is not None:
                    model_kwargs[name] = _reorder_last(model_kwargs[name], order)
        model_kwargs = dict(model_kwargs)
        inputs_embeds = model_kwargs.pop("inputs_embeds", None)
        attention_mask = model_kwargs.pop("attention_mask", None)
        position_ids = model_kwargs.pop("position_ids", None)

        if features is not None:
            is_image = input_ids == self.config.image_token_id
            if int(is_image.sum()) != features.shape[0]:  # then they must be those of the new part alone
                is_image[:, :start] = False
            _check_image_tokens(is_image, features)
            if isinstance(cache, LongLLaVACache) and len(is_image) == 1:
                cache.check_images(features[: int(is_image[:, :start].sum())])
            row_of = is_image.flatten().cumsum(0).view_as(is_image) - 1

        if getattr(generation_config, "num_beams", 1) in (None, 1):  # beams are reordered, which is a copy anyway
            room = min(getattr(generation_config, "max_length", None) or length, length + _ROOM_FOR_AN_ANSWER)
            make_room(cache, past_length - start + room)
        step = generation_config.prefill_chunk_size or default_chunk_size(sequence.device.type)
        progress = logging.tqdm(
            total=length - start, desc="Prefilling", unit=" tokens", leave=False, disable=step >= length - start
        )
        for begin in range(start, length, step):
            end = min(begin + step, length)
            seen = past_length + end - start
            chunk_kwargs = dict(model_kwargs)
            if inputs_embeds is not None:
                chunk_kwargs["inputs_embeds"] = inputs_embeds[:, begin:end]
            if attention_mask is not None:
                chunk_kwargs["attention_mask"] = attention_mask[:, :seen]
            if position_ids is not None:
                chunk_kwargs["position_ids"] = position_ids[..., :seen]
            chunk = input_ids[:, begin:end] if inputs_embeds is None else input_ids
            model_inputs = self.prepare_inputs_for_generation(chunk, is_first_iteration=True, **chunk_kwargs)
            if features is not None:
                mine = features[row_of[:, begin:end][is_image[:, begin:end]]]
                if len(mine):
                    model_inputs["mm_encoder_outputs"] = _as_encoder_outputs(mine)
            outputs = self(**model_inputs, return_dict=True)
            progress.update(end - begin)
        progress.close()
        return outputs


__all__ = ["LongLLaVAForConditionalGeneration", "LongLLaVAModel", "LongLLaVAPreTrainedModel", "pool_patches"]
