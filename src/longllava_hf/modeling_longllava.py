# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
LongLLaVA (arXiv 2409.02889): a vision tower whose patches are pooled to a quarter, a projector, and a decoder. The
decoder may be any that Transformers knows; LongLLaVA's own is in `modeling_longllava_text`.
"""

import copy
import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    MoeCausalLMOutputWithPast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple

from .compat_longllava import accepts_cache, as_cache, execution_device, get_cache, is_instance
from .configuration_longllava import LongLLaVAConfig, has_own_decoder
from .generation_longllava import LongLLaVAGenerationMixin, check_image_tokens, check_no_image_tokens, image_batches
from .identity_longllava import is_finite
from .image_processing_longllava import LazyPixelValues
from .modeling_longllava_text import (
    LongLLaVATextModel,
    LongLLaVATextPreTrainedModel,
    check_cache,
    language_modeling_outputs,
    packed_sequences,
    positions_in_sequences,
)


@auto_docstring
@dataclass
class LongLLaVAModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    router_logits (`tuple(torch.Tensor)`, *optional*, returned with `output_router_logits=True`):
        Of each expert layer, `(batch * length, num_experts)`.
    image_hidden_states (`torch.Tensor` of shape `(image tokens, hidden_size)`, *optional*):
        The image tokens that went into the decoder.
    image_outputs (`BaseModelOutputWithPooling`, *optional*):
        What [`~LongLLaVAModel.get_image_features`] returns.
    """

    router_logits: tuple[torch.Tensor] | None = None
    image_hidden_states: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


@auto_docstring
@dataclass
class LongLLaVACausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    r"""
    loss (`torch.Tensor` of shape `(1,)`, *optional*):
        It includes the load-balancing loss `aux_loss`, if there is one.
    image_hidden_states (`torch.Tensor` of shape `(image tokens, hidden_size)`, *optional*):
        The image tokens that went into the decoder.
    image_outputs (`BaseModelOutputWithPooling`, *optional*):
        What [`~LongLLaVAModel.get_image_features`] returns.
    """

    image_hidden_states: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


def check_finite(pixel_values: torch.Tensor) -> None:
    """Raises `ValueError` for pictures with NaN or infinite values, unless the model is being compiled or planned."""
    if pixel_values.is_meta or torch.compiler.is_compiling():
        return
    if not is_finite(pixel_values):
        wrong = [i for i, image in enumerate(pixel_values) if not is_finite(image)]
        raise ValueError(
            f"`pixel_values` must be finite, but those of images {wrong} (of {len(pixel_values)}) are not."
        )


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


def project_patches(
    hidden_states: tuple[torch.Tensor, ...], projector: LongLLaVAMultiModalProjector, config: LongLLaVAConfig
) -> torch.Tensor:
    """
    What the decoder reads of pictures, from the hidden states of all layers of the tower, each of shape
    `(images, 1 + patches, hidden size of the tower)`, to `(images, image_seq_length, hidden_size)`.
    """
    features = hidden_states[config.vision_feature_layer]
    if config.vision_feature_select_strategy == "default":
        features = features[:, 1:]
    # Key difference to LLaVA: the patches are pooled; LongLLaVA does so before the projector, LongVA after it.
    if config.pooling_order == "before_projector":
        return projector(pool_patches(features, config.pooling_mode))
    return pool_patches(projector(features), config.pooling_mode)


def is_sharded(*modules: nn.Module) -> bool:
    """Whether weights are spread over processes that fetch them for each call: FSDP's, or DeepSpeed's ZeRO-3."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    is_wrapped = any(isinstance(p, (FSDPModule, FullyShardedDataParallel)) for m in modules for p in m.modules())
    return is_wrapped or any(hasattr(weight, "ds_id") for module in modules for weight in module.parameters())


class LongLLaVAPreTrainedModel(LongLLaVATextPreTrainedModel):
    config: LongLLaVAConfig
    input_modalities = ("image", "text")
    _keys_to_ignore_on_load_unexpected = None
    # Recorded by the decoder, whatever it is.
    _can_record_outputs: dict[str, Any] = {}


class LongLLaVAModel(LongLLaVAPreTrainedModel):
    """Tower, projector and decoder, without a language-modelling head."""

    def __init__(self, config: LongLLaVAConfig):
        super().__init__(config)
        # What was asked for the experts is for the decoder: towers have none, and some refuse to be asked.
        self.vision_tower = AutoModel.from_config(config.vision_config, experts_implementation=None)
        self._vision_tower_class = type(self.vision_tower)
        self.multi_modal_projector = LongLLaVAMultiModalProjector(config)
        # Without the Auto classes, which know nothing of it where the code comes with the checkpoint.
        build = LongLLaVATextModel._from_config if has_own_decoder(config) else AutoModel.from_config
        self.language_model = build(config.text_config)
        self.post_init()

    @functools.cached_property
    def _unread(self) -> tuple[str, ...]:
        """
        Modules and parameters of the tower, each with a dot behind it, that have no part in the hidden state that is used: of
        CLIP, the layers after it and the last norm. Told by the gradients in a tower of shapes alone.
        """
        config = copy.deepcopy(self.config.vision_config)
        config._attn_implementation = "eager"
        # Not from the Auto class, which would divide it among processes for ZeRO-3.
        with torch.device("meta"), torch.enable_grad():
            tower = self._vision_tower_class(config)
            names, weights = zip(*tower.named_parameters())
            pixel_values = torch.empty(1, 3, config.image_size, config.image_size, dtype=tower.dtype)
            used = tower(pixel_values, output_hidden_states=True).hidden_states[self.config.vision_feature_layer]
            grads = torch.autograd.grad(used.sum(), weights, allow_unused=True)

        def prefixes(name: str) -> list[str]:
            return [f"{part}." for part in itertools.accumulate(name.split("."), "{}.{}".format)]

        read = {prefix for name, grad in zip(names, grads) if grad is not None for prefix in prefixes(name)}
        unread = [prefixes(name) for name, grad in zip(names, grads) if grad is None]
        return tuple({next(prefix for prefix in found if prefix not in read) for found in unread})

    def train(self, mode: bool = True):
        """
        As [`~nn.Module.train`]. What the tower has beyond the hidden state that is used is frozen, adapters included: a gradient
        never comes to it, and `DistributedDataParallel` would wait for one.
        """
        super().train(mode)
        trained = [item for item in self.vision_tower.named_parameters() if item[1].requires_grad] if mode else []
        for name, parameter in trained:
            if f"{name}.".startswith(self._unread):
                parameter.requires_grad_(False)
        return self

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(images, 3, height, width)` or `LazyPixelValues`).

        Returns:
            [`BaseModelOutputWithPooling`]: the tower's output, its `pooler_output` replaced by one tensor
            `(image tokens, hidden_size)` for each image, ready for the decoder.
        """
        if is_instance(pixel_values, LazyPixelValues):
            pixel_values = pixel_values.load()  # type: ignore[attr-defined]
        batch_size = self.config.vision_batch_size
        if len(pixel_values) <= batch_size:
            return self._encode_images(pixel_values, **kwargs)
        parts = [self._encode_images(batch, **kwargs) for batch in image_batches(pixel_values, batch_size)]
        joined: dict[str, Any] = {"pooler_output": [feature for part in parts for feature in part.pooler_output]}
        for name in parts[0].keys() - joined:
            tensors = [part[name] for part in parts]
            is_layered = isinstance(tensors[0], tuple)
            joined[name] = tuple(map(torch.cat, zip(*tensors))) if is_layered else torch.cat(tensors)
        return BaseModelOutputWithPooling(**joined)

    def _encode_images(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        check_finite(pixel_values)
        tower = self.vision_tower
        # A tower that is kept elsewhere has hooks that take its inputs to where it runs.
        pixel_values = pixel_values.to(device=execution_device(tower), dtype=tower.dtype)
        requested = kwargs.pop("output_hidden_states", None)
        requested = self.config.output_hidden_states if requested is None else requested
        outputs = tower(pixel_values, return_dict=True, output_hidden_states=True, **kwargs)
        features = project_patches(outputs.hidden_states, self.multi_modal_projector, self.config)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=list(features),  # type: ignore[arg-type]
            hidden_states=outputs.hidden_states if requested else None,
            attentions=outputs.attentions,
        )

    def _missing_calls(self, images: int) -> int:
        """
        How many calls of the tower this process lacks, of several that train together. Where weights are spread, each call is
        an exchange in which all take part, so that all must make as many; and for DDP each must have gradients.
        """
        is_alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
        if is_alone or torch.distributed.get_world_size() == 1:
            # Where the decoder is frozen, as in the first stage, text alone would have nothing to go back to.
            needs_call = self.training and not images and torch.is_grad_enabled()
            return int(needs_call and not any(weight.requires_grad for weight in self.language_model.parameters()))
        calls, least = math.ceil(images / self.config.vision_batch_size), int(self.training)
        if not is_sharded(self.vision_tower, self.multi_modal_projector):
            return max(0, least - calls)
        most = torch.tensor(max(calls, least), device=self.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most) - calls

    def is_image_token(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Where image tokens go, `(batch, length)`, bool: by the ids, or without them where `inputs_embeds` hold the embedding
        of `config.image_token_id`.

        Raises:
            ValueError: without ids, if that id is outside the vocabulary and so has no embedding.
        """
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        if self.config.image_token_id >= self.config.get_text_config().vocab_size:
            raise ValueError(
                f"`image_token_id` ({self.config.image_token_id}) is outside the vocabulary, so embeddings do not tell"
                " where pictures go: give `input_ids` too, or `inputs_embeds` with the pictures in them."
            )
        token = torch.full((1,), self.config.image_token_id, device=inputs_embeds.device)  # type: ignore[union-attr]
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def get_text_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """
        `(batch, length)` to `(batch, length, hidden_size)`. The placeholder's embedding is to be overwritten, so its id need
        not be in the vocabulary.
        """
        token = self.config.image_token_id
        if token >= self.config.get_text_config().vocab_size:
            input_ids = input_ids.masked_fill(input_ids == token, 0)
        return self.get_input_embeddings()(input_ids)

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """
        Where image tokens go, as [`~LongLLaVAModel.is_image_token`].

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*).
            inputs_embeds (`torch.Tensor` of shape `(batch, length, hidden_size)`).
            image_features (`torch.Tensor` of shape `(image tokens, hidden_size)`).

        Returns:
            `torch.Tensor` of shape `(batch, length, 1)`, bool.

        Raises:
            ValueError: if there are more or fewer such positions than image tokens.
        """
        mask = self.is_image_token(input_ids, inputs_embeds)
        if not mask.is_meta:  # nothing to count where only shapes are computed
            check_image_tokens(int(mask.sum()), image_features.shape[0])
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    @auto_docstring
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
        pixel_values (`torch.Tensor` of shape `(images, 3, height, width)` or `LazyPixelValues`, *optional*):
            All images of the batch, in reading order; each fills `config.image_seq_length` placeholders, or it is a
            `ValueError`. So are placeholders without images.
        mm_encoder_outputs (`dict`, *optional*):
            Under `"image"`, what [`~LongLLaVAModel.get_image_features`] returned, in place of `pixel_values`.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        check_cache(cache)
        image_outputs: Any = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and image_outputs is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")

        images = 0 if pixel_values is None else len(pixel_values)
        missing_calls = 0 if cache is not None else self._missing_calls(images)
        if inputs_embeds is None:
            inputs_embeds = self.get_text_embeddings(input_ids)  # type: ignore[arg-type]
        if images:
            image_outputs = self.get_image_features(pixel_values, return_dict=True)
        image_features = None
        if image_outputs is not None:
            image_features = torch.cat(list(image_outputs.pooler_output)).to(inputs_embeds)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)
        elif input_ids is not None:  # pictures may be in embeddings already
            check_no_image_tokens(input_ids, self.config.image_token_id)
        for _ in range(missing_calls):
            side = self.config.vision_config.image_size
            blank = inputs_embeds.new_zeros(1, self.config.vision_config.num_channels, side, side)
            features = self.get_image_features(blank, return_dict=True).pooler_output[0]
            inputs_embeds = inputs_embeds + features[:0].sum().to(inputs_embeds)  # 0, with gradients that are 0

        if not isinstance(self.language_model, LongLLaVATextModel):
            # Other decoders tell packed sequences by their positions alone, and only without a mask and a cache.
            seq_idx = packed_sequences(inputs_embeds, attention_mask, position_ids, cache, kwargs)
            if seq_idx is not None:
                attention_mask, position_ids, kwargs["use_cache"] = None, positions_in_sequences(seq_idx), False
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **as_cache(cache),
            **kwargs,
        )
        return LongLLaVAModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=getattr(outputs, "router_logits", None),
            image_hidden_states=image_features,
            image_outputs=image_outputs,
            **as_cache(get_cache(outputs)),
        )


class LongLLaVAForConditionalGeneration(LongLLaVAGenerationMixin, LongLLaVAPreTrainedModel):
    """LongLLaVA with its language-modelling head: pictures and text in, text out."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: LongLLaVAConfig):
        super().__init__(config)
        self.model = LongLLaVAModel(config)
        text_config = config.get_text_config()
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """See [`LongLLaVAModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @auto_docstring
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
        pixel_values (`torch.Tensor` of shape `(images, 3, height, width)` or `LazyPixelValues`, *optional*):
            All images of the batch, in reading order.
        output_router_logits (`bool`, *optional*):
            Whether the routers' logits are returned, and the load-balancing loss added to the loss.
        mm_encoder_outputs (`dict`, *optional*):
            Under `"image"`, what [`~LongLLaVAModel.get_image_features`] returned, in place of `pixel_values`.

        Example:

        ```python
        >>> import longllava_hf
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor

        >>> processor = AutoProcessor.from_pretrained(longllava_hf.TINY)
        >>> model = AutoModelForImageTextToText.from_pretrained(longllava_hf.TINY)
        >>> block = {"type": "image", "path": "digit.png"}, {"type": "text", "text": "Which digit is this?"}
        >>> inputs = processor.apply_chat_template([{"role": "user", "content": block}], add_generation_prompt=True,
        ...     tokenize=True, return_dict=True, return_tensors="pt")
        >>> processor.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        '7'
        ```
        """
        text_config: Any = self.config.get_text_config()
        if output_router_logits is None:
            output_router_logits = getattr(text_config, "output_router_logits", False)
        if has_own_decoder(self.config):  # others need not know the word
            kwargs["output_router_logits"] = output_router_logits
        if use_cache is None and (self.training or labels is not None):
            use_cache = False  # nothing goes on from here
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
        return LongLLaVACausalLMOutputWithPast(
            **language_modeling_outputs(self, outputs, logits_to_keep, labels, attention_mask, **kwargs),
            image_hidden_states=outputs.image_hidden_states,
            image_outputs=outputs.image_outputs,
        )


# `Trainer` shifts the labels that it smooths for classes that are named here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[LongLLaVAConfig.model_type] = LongLLaVAForConditionalGeneration.__name__


__all__ = [
    "LongLLaVAForConditionalGeneration",
    "LongLLaVAModel",
    "LongLLaVAPreTrainedModel",
    "pool_patches",
    "project_patches",
]
