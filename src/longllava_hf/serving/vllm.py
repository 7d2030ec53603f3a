# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
LongLLaVA in vLLM: its tower, pooling and projector before vLLM's own Jamba, pictures and films through its processor.
Only vLLM imports this module, when such a model is to be served.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, BatchFeature
from vllm.config import VllmConfig
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.jamba import JambaForCausalLM
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
)
from vllm.multimodal.processing.processor import PlaceholderFeaturesInfo
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from ..checkpoint_longllava import has_vision_tower, load_vision_tower
from ..configuration_longllava import LongLLaVAConfig, LongLLaVATextConfig
from ..image_processing_longllava import DEFAULT_GRID_PINPOINTS, LongLLaVAImageProcessor, picture_size
from ..modeling_longllava import LongLLaVAMultiModalProjector, project_patches
from ..processing_longllava import LongLLaVAProcessor
from ..video_longllava import Frames
from .vllm_plugin import VLLM_PREFIXES, to_vllm_name


if current_platform.is_cpu():
    from .vllm_cpu import fill_gaps

    fill_gaps()


class LongLLaVAProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about the model's inputs."""

    def get_hf_config(self) -> LongLLaVAConfig:
        return self.ctx.get_hf_config(LongLLaVAConfig)

    def get_hf_processor(self, **kwargs: Any) -> LongLLaVAProcessor:
        if pinpoints := kwargs.get("image_grid_pinpoints"):  # settings are hashed
            kwargs["image_grid_pinpoints"] = [tuple(pair) for pair in pinpoints]
        return self.ctx.get_hf_processor(LongLLaVAProcessor, **kwargs)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None, "video": None}

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        image_kwargs = set(self.get_hf_processor().image_processor.valid_kwargs.__annotations__)
        return {"text_kwargs": set(), "images_kwargs": image_kwargs, "videos_kwargs": {"num_frames"}}


class LongLLaVADummyInputsBuilder(BaseDummyInputsBuilder[LongLLaVAProcessingInfo]):
    """The largest inputs, which vLLM measures memory with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        processor = self.info.get_hf_processor()
        images, videos = mm_counts.get("image", 0), mm_counts.get("video", 0)
        return processor.image_token * images + processor.video_token * videos

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, MultiModalDummyOptions]
    ) -> MultiModalDataDict:
        processor = self.info.get_hf_processor()
        image_processor = processor.image_processor
        side, rows, columns = image_processor.crop_size["height"], 1, 1
        if image_processor.patch_strategy == "best_fit":
            grids = image_processor.image_grid_pinpoints or DEFAULT_GRID_PINPOINTS
            rows, columns = max(grids, key=lambda grid: grid[0] * grid[1])
        # What is between frames takes a few tokens, too.
        num_frames = max(1, min(processor.num_frames, seq_len // (image_processor.image_seq_length + 16)))
        return {
            "image": self._get_dummy_images(
                width=columns * side,
                height=rows * side,
                num_images=mm_counts.get("image", 0),
                overrides=mm_options.get("image"),
            ),
            "video": self._get_dummy_videos(
                width=side,
                height=side,
                num_frames=num_frames,
                num_videos=mm_counts.get("video", 0),
                overrides=mm_options.get("video"),
            ),
        }


class LongLLaVAMultiModalProcessor(BaseMultiModalProcessor[LongLLaVAProcessingInfo]):
    """From pictures, films and a prompt to pixels and token ids, both as [`LongLLaVAProcessor`] gives them."""

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        """
        Returns:
            `BatchFeature`: `pixel_values` of shape `(tiles, 3, height, width)`, and `image_grids` of shape `(images, 2)`, the
            rows and columns of each picture's sub-images; `pixel_values_videos` and `video_frames`, of shape `(videos,)`.
        """
        process, outputs = super()._call_hf_processor, {}
        if images := hf_data.get("images"):
            image_processor = self.info.get_hf_processor(**hf_kwargs).image_processor
            outputs["image_grids"] = torch.tensor([_grid(image_processor, image) for image in images])
            outputs["pixel_values"] = process({"images": images}, hf_kwargs)["pixel_values"]
        if videos := hf_data.get("videos"):
            films = [process({"videos": [video]}, hf_kwargs)["pixel_values"] for video in videos]
            outputs["video_frames"] = torch.tensor([len(film) for film in films])
            outputs["pixel_values_videos"] = torch.cat(films)
        return BatchFeature(outputs)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        tiles = _tiles(hf_inputs.get("image_grids", torch.empty(0, 2, dtype=torch.long)))
        frames = hf_inputs.get("video_frames", torch.empty(0, dtype=torch.long))
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", tiles),
            "image_grids": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            "pixel_values_videos": MultiModalFieldConfig.flat_from_sizes("video", frames),
            "video_frames": MultiModalFieldConfig.batched("video", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        processor = self.info.get_hf_processor(**hf_processor_mm_kwargs)
        token, per_tile = processor.image_token_id, processor.image_processor.image_seq_length

        def inside(item: Any, grids: Any = None) -> PromptUpdateDetails:
            """A picture's or film's first image token, its last one, and what is between them."""
            images, videos = processor._replacements([item], grids, per_tile)
            (text,) = images + videos
            ids = processor.tokenizer.encode(text, add_special_tokens=False)
            ids = ids[ids.index(token) : len(ids) - ids[::-1].index(token)]
            return PromptUpdateDetails.select_token_id(ids, token)

        def image(index: int) -> PromptUpdateDetails:
            return inside(None, out_mm_kwargs["image"][index]["image_grids"].data[None])

        def video(index: int) -> PromptUpdateDetails:
            return inside(Frames([None] * int(out_mm_kwargs["video"][index]["video_frames"].data)))

        return [PromptReplacement("image", [token], image), PromptReplacement("video", [token], video)]

    def _apply_prompt_updates(
        self, token_ids: list[int], mm_prompt_updates: Mapping[str, Sequence[Sequence[Any]]]
    ) -> tuple[list[int], Mapping[str, list[PlaceholderFeaturesInfo]]]:
        """
        As text: which tokens `<img>` becomes depends on what is before it, and `<video>` is several tokens.

        Raises:
            ValueError: where placeholders and pictures or videos differ in number, or `token_ids` are others than the
                tokenizer makes of their text.
        """
        processor, tokenizer = self.info.get_hf_processor(), self.info.get_tokenizer()
        prompt = tokenizer.decode(token_ids)
        if tokenizer.encode(prompt, add_special_tokens=False) != list(token_ids):
            raise ValueError(
                f"With pictures or videos, a prompt's token ids must be those that the tokenizer makes of its text, but"
                f" those of {prompt!r} are not; give the text."
            )
        modalities = {processor.image_token: "image", processor.video_token: "video"}
        order = [modalities[name] for name in re.findall("|".join(modalities), prompt)]
        for name, modality in modalities.items():
            found, given = order.count(modality), len(mm_prompt_updates.get(modality, ()))
            if found != given:
                raise ValueError(f"The prompt has {found} `{name}`, but {given} {modality}s were given.")
        # One image token for each picture and film, then what is to stand there.
        picture = f"<img>{processor.image_token}</img>"
        prompt = prompt.replace(processor.image_token, picture).replace(processor.video_token, f"<vid>{picture}</vid>")
        ids: list[int] = []
        placeholders: dict[str, list[PlaceholderFeaturesInfo]] = defaultdict(list)
        rest = iter(order)
        for token in processor.tokenizer.encode(prompt, add_special_tokens=False):
            if token != processor.image_token_id:
                ids.append(token)
                continue
            modality = next(rest)
            index = len(placeholders[modality])
            content = mm_prompt_updates[modality][index][0].content
            is_embed = content.is_embed(content.full)
            placeholders[modality].append(PlaceholderFeaturesInfo(modality, index, len(ids), content.full, is_embed))
            ids += content.full
        return ids, placeholders


def _grid(image_processor: LongLLaVAImageProcessor, image: Any) -> tuple[int, int]:
    """Rows and columns of a picture's sub-images."""
    if image_processor.patch_strategy != "best_fit":
        return 0, 0
    side, pinpoints = image_processor.crop_size["height"], image_processor.image_grid_pinpoints
    return image_processor.best_grid(*picture_size(image), side, pinpoints)


def _tiles(image_grids: torch.Tensor) -> torch.Tensor:
    """How many tiles the pictures with these rows and columns of sub-images are."""
    return 1 + image_grids.prod(-1)


@MULTIMODAL_REGISTRY.register_processor(
    LongLLaVAMultiModalProcessor, info=LongLLaVAProcessingInfo, dummy_inputs=LongLLaVADummyInputsBuilder
)
class LongLLaVAForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP, HasInnerState, IsHybrid):
    """LongLLaVA as vLLM runs it. Raises `ValueError` for a decoder other than LongLLaVA's own."""

    packed_modules_mapping = JambaForCausalLM.packed_modules_mapping
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix=VLLM_PREFIXES)

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return f"<{modality}>" if modality in ("image", "video") else None

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        return JambaForCausalLM.get_mamba_state_shape_from_config(_text_config(vllm_config))

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return JambaForCausalLM.get_mamba_state_dtype_from_config(_text_config(vllm_config))

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        return JambaForCausalLM.get_mamba_state_copy_func()

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        model_config = vllm_config.model_config
        self.config, self.checkpoint = model_config.hf_config, model_config.model
        config, text_config = self.config, self.config.text_config
        if not isinstance(text_config, LongLLaVATextConfig):
            raise ValueError(f"vLLM serves a `longllava_text` decoder, but this one is `{text_config.model_type}`.")
        if config.tie_word_embeddings:
            raise ValueError("vLLM's Jamba has a head of its own, but this model has `tie_word_embeddings=True`.")
        self.configure_mm_token_handling(text_config.vocab_size, [config.image_token_id])
        with self._mark_tower_model(vllm_config, {"image", "video"}):
            self.vision_tower = AutoModel.from_config(config.vision_config, dtype=model_config.dtype)
            self.multi_modal_projector = LongLLaVAMultiModalProjector(config)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config,
                hf_config=text_config,
                architectures=["JambaForCausalLM"],
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def _encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(tiles, 3, height, width)` to `(tiles, image_seq_length, hidden_size)`."""
        outputs = self.vision_tower(pixel_values, output_hidden_states=True)
        return project_patches(outputs.hidden_states, self.multi_modal_projector, self.config)

    def embed_multimodal(self, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """
        Args:
            pixel_values, pixel_values_videos (`torch.Tensor` of shape `(tiles, 3, height, width)`).
            image_grids (`torch.Tensor` of shape `(images, 2)`).
            video_frames (`torch.Tensor` of shape `(videos,)`).

        Returns:
            one `torch.Tensor` of shape `(image tokens, hidden_size)` for each picture or film.
        """
        embeddings: list[torch.Tensor] = []
        for name, pixels in kwargs.items():
            if name not in ("pixel_values", "pixel_values_videos"):
                continue
            features = torch.cat([self._encode_images(part) for part in pixels.split(self.config.vision_batch_size)])
            sizes = _tiles(kwargs["image_grids"]) if name == "pixel_values" else kwargs["video_frames"]
            embeddings += [item.flatten(0, 1) for item in features.split(sizes.flatten().tolist())]
        return tuple(embeddings)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | IntermediateTensors:
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Of a native or published checkpoint; a tower that it has not is taken from where its configuration says."""

        def renamed() -> Iterator[tuple[str, torch.Tensor]]:
            has_tower = False
            for name, tensor in weights:
                new_name = to_vllm_name(name, self.config)
                has_tower = has_tower or has_vision_tower([new_name])
                yield new_name, tensor
            if not has_tower:
                for name, tensor in load_vision_tower(self.config, self.checkpoint).items():
                    yield to_vllm_name(name, self.config), tensor

        return AutoWeightsLoader(self).load_weights(renamed())

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="multi_modal_projector", tower_model="vision_tower"
        )


def _text_config(vllm_config: VllmConfig) -> VllmConfig:
    """What vLLM's Jamba is to see: the decoder's configuration as the model's."""
    return vllm_config.with_hf_config(vllm_config.model_config.hf_config.text_config, ["JambaForCausalLM"])


__all__ = [
    "LongLLaVADummyInputsBuilder",
    "LongLLaVAForConditionalGeneration",
    "LongLLaVAMultiModalProcessor",
    "LongLLaVAProcessingInfo",
]
