# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
The token protocol (arXiv 2409.02889, section 3.2) and the chat template.

| input           | text                                                                                        |
|-----------------|---------------------------------------------------------------------------------------------|
| picture         | `<img>`, image tokens, `</img>`                                                             |
| high resolution | the same for the whole picture, a line break, and for the sub-images, a line for each row   |
| video           | `<vid>`, its frames as pictures joined by `<t>`, `</vid>`                                   |
| system message  | its text, a blank line, and the first user message's content                                |
"""

import contextlib
import copy
import json
import os
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.utils import is_jinja_available, logging
from transformers.video_utils import VideoInput

from .compat_longllava import merge_processor_kwargs
from .configuration_longllava import hub_arguments, named_errors
from .image_processing_longllava import LongLLaVAImageProcessor, LongLLaVAImageProcessorKwargs
from .video_longllava import Frames, VideoFile, check_num_frames


logger = logging.get_logger(__name__)

ROLES = ("system", "user", "assistant")

DEFAULT_NUM_FRAMES = 128

# What is put around pictures and turns. In the published tokenizer these are ordinary pieces, which cannot be told from
# the same typed by a user.
MARKERS = ("<img>", "</img>", "<vid>", "</vid>", "<t>", "<|User|>", "<|Assistant|>")

# What `from_pretrained` takes for the processor itself.
_OWN_KWARGS = ("image_processor", "tokenizer", "chat_template", "num_frames", "return_unused_kwargs")

# The piece of Jamba's vocabulary that becomes the image token: reserved, and so never met in training.
_RESERVED_PIECE = "<|reserved_0|>"


def add_image_token(tokenizer: PreTrainedTokenizerFast, image_token: str) -> PreTrainedTokenizerFast:
    """
    A tokenizer that knows `image_token` as one special token. In Jamba's vocabulary a reserved piece is renamed, so
    that its id, 516, is within the pretrained embeddings; elsewhere the token is added at the end.
    """
    vocabulary = tokenizer.get_vocab()
    if image_token in vocabulary:
        return tokenizer
    if _RESERVED_PIECE not in vocabulary or not tokenizer.is_fast:
        tokenizer.add_special_tokens({"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False)
        return tokenizer
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model_vocabulary = description["model"]["vocab"]
    model_vocabulary[image_token] = model_vocabulary.pop(_RESERVED_PIECE)
    for token in description["added_tokens"]:
        if token["content"] == _RESERVED_PIECE:
            token["content"] = image_token
    special_tokens = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)),
        **special_tokens,
        model_max_length=tokenizer.model_max_length,
        # What is generated is appended, so padding belongs in front.
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


class ChatTemplateError(ValueError):
    """A conversation that a chat template refuses."""


def default_chat_template() -> str:
    """The one that is installed with this package. Checkpoints have it too, and those that carry their code no other."""
    return Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


class LongLLaVABatchFeature(BatchFeature):
    """
    What the processor returns. `labels` that are put beside `input_ids` of the same shape ask for no image token: those
    places become -100 before anything is counted, as collators (TRL's, and most that people write) copy all ids.
    """

    image_token_id: int | None = None

    def __setitem__(self, key, value):
        ids = self.data.get("input_ids")
        if (
            key == "labels"
            and isinstance(value, torch.Tensor)
            and isinstance(ids, torch.Tensor)
            and self.image_token_id is not None
        ):
            # In place, as whoever has it may go on masking, unless it is the ids themselves.
            value = value.clone() if value.data_ptr() == ids.data_ptr() else value
            if value.shape == ids.shape:
                value[ids == self.image_token_id] = -100
        super().__setitem__(key, value)

    def __getstate__(self):
        return {**super().__getstate__(), "image_token_id": self.image_token_id}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.image_token_id = state.get("image_token_id")


class LongLLaVAProcessor(ProcessorMixin):
    r"""
    Pictures, videos and text to what [`LongLLaVAForConditionalGeneration`] takes.

    Args:
        image_processor ([`LongLLaVAImageProcessor`]): for pictures and frames.
        tokenizer ([`PreTrainedTokenizerFast`]): gets the token `<image>` if it has none.
        chat_template (`str`, *optional*): a Jinja template; LongLLaVA's own by default.
        num_frames (`int`, defaults to 128): frames that a video file is sampled by, unless a call says otherwise.

    `processor(images=None, text=None, videos=None, ...)`: in `text`, each `<image>` and `<video>` stands for the next
    picture or video. A video is a path, URL, bytes, a list of frames, or an array `(frames, height, width, 3)`; a file
    is sampled by `num_frames` (uniformly) or `fps`. `pixel_values` holds all pictures and frames of the batch, in reading
    order; with `lazy=True` they are decoded when the model asks for them (see [`LazyPixelValues`]).

    """

    image_token = "<image>"
    video_token = "<video>"
    unused_input_names = ["image_grids"]

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, num_frames: int = DEFAULT_NUM_FRAMES):
        tokenizer = add_image_token(tokenizer, self.image_token)
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.num_frames = num_frames
        super().__init__(image_processor, tokenizer, chat_template=chat_template or default_chat_template())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """
        As [`~ProcessorMixin.from_pretrained`]; reads published folders too. Settings of the image processor
        (`do_normalize=False`, `patch_strategy="best_fit"`, ...) win over the stored ones.
        """
        settings = {name: kwargs.pop(name) for name in LongLLaVAImageProcessorKwargs.__annotations__ if name in kwargs}
        own = {name: kwargs.pop(name) for name in _OWN_KWARGS if name in kwargs}
        hub_kwargs = hub_arguments(kwargs)
        with named_errors("The processor", pretrained_model_name_or_path):
            processor_dict, _ = cls.get_processor_dict(pretrained_model_name_or_path, **hub_kwargs)
            stored, _ = LongLLaVAImageProcessor.get_image_processor_dict(pretrained_model_name_or_path, **hub_kwargs)
            image_processor = LongLLaVAImageProcessor.from_dict({**stored, **settings})
            image_processor.check_settings()
            tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
            loaded = cls.from_args_and_dict([image_processor, tokenizer], processor_dict, **own)
            processor = loaded[0] if isinstance(loaded, tuple) else loaded
            check_num_frames(processor.num_frames)
            processor.tokenizer("?")  # which says what is wrong with its settings
            _check_template(processor)
        return loaded

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        videos: VideoInput | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """
        As [`~ProcessorMixin.__call__`]. A video's frames are pictures to the model, so pictures and videos go through the
        image processor together, in reading order.

        Raises:
            ValueError: where nothing is given, where placeholders and pictures or videos differ in number, and where
                truncation would cut into the tokens of a picture.
        """
        if kwargs.pop("audio", None) is not None:  # type: ignore[typeddict-item]
            raise ValueError("LongLLaVA has no audio input, but `audio` was given.")
        items, prompts = self._in_reading_order(images, text, videos, dict(kwargs))
        if prompts is None and not items:
            raise ValueError(f"You need to provide at least one input to call {type(self).__name__}.")
        settings = merge_processor_kwargs(self, dict(kwargs))
        image_inputs = self.image_processor(items, **settings["images_kwargs"]) if items else {}
        text_inputs: dict[str, Any] = {}
        if prompts is not None:
            per_tile = settings["images_kwargs"].get("image_seq_length") or self.image_processor.image_seq_length
            replacements = self._replacements(items, image_inputs.get("image_grids"), per_tile)
            prompts, spans = self.get_text_with_replacements(prompts, *replacements)
            text_inputs = self._tokenize(prompts, spans, settings)
        return_tensors = settings["text_kwargs"].get("return_tensors")
        data = LongLLaVABatchFeature(text_inputs, return_tensors, skip_tensor_conversion=self.skip_tensor_conversion)
        data.image_token_id = self.image_token_id
        # Of which the image processor has made tensors, or something that is none yet.
        data.update({name: x for name, x in image_inputs.items() if name not in self.unused_input_names})
        return data

    def _in_reading_order(self, images, text, videos, kwargs: dict) -> tuple[list, list[str] | None]:
        """Pictures and videos in the order of their placeholders. Raises `ValueError` where the counts differ."""
        if text is not None:
            text = [text] if isinstance(text, str) else list(text)
            if not all(isinstance(sample, str) for sample in text):
                raise ValueError("`text` must be a string or a list of strings.")
        pictures = _flatten_pictures(images)
        self._check_rows(images, text)
        films = [] if videos is None else [self._sampled(video, kwargs) for video in _flatten_videos(videos)]
        if text is None:
            return pictures + films, None

        for kind, token, given in (("image", self.image_token, pictures), ("video", self.video_token, films)):
            counts = [sample.count(token) for sample in text]
            if sum(counts) != len(given):
                where = f" (by prompt: {counts})" if len(counts) > 1 else ""
                raise ValueError(
                    f"The number of `{token}` tokens in the prompts should be the same as the number of {kind}s: found"
                    f" {sum(counts)} `{token}`{where} and {len(given)} {kind}s."
                )
        queues = {self.image_token: iter(pictures), self.video_token: iter(films)}
        placeholder = re.compile("|".join(map(re.escape, queues)))
        return [next(queues[token]) for sample in text for token in placeholder.findall(sample)], text

    def _check_rows(self, images, text) -> None:
        """Pictures that come in one list for each prompt are those of that prompt."""
        rows = images if isinstance(images, (list, tuple)) else [images]
        is_nested = all(row is None or isinstance(row, (list, tuple)) for row in rows)
        if text is None or not is_nested or len(rows) != len(text) or len(text) < 2:
            return
        for number, (row, sample) in enumerate(zip(images, text)):
            given, wanted = len(_flatten_pictures(row)), sample.count(self.image_token)
            if given != wanted:
                raise ValueError(
                    f"Prompt {number} has {wanted} `{self.image_token}`, but there are {given} images for it."
                )

    def _sampled(self, video, kwargs: dict) -> VideoFile | Frames:
        """A file with its sampling; frames as they are, or as many of them as asked for."""
        explicit = {**kwargs.get("videos_kwargs", {}), **kwargs}
        num_frames, fps = explicit.get("num_frames"), explicit.get("fps")
        if explicit.get("do_sample_frames") is False:
            num_frames = fps = None
        elif num_frames is None and fps is None and not isinstance(video, (Frames, np.ndarray, torch.Tensor)):
            num_frames = self.num_frames
        if isinstance(video, VideoFile):
            return video
        if isinstance(video, (str, os.PathLike, bytes, bytearray)):
            return VideoFile(video, num_frames=num_frames, fps=fps)
        frames = Frames(video)
        if not frames:
            raise ValueError("A video must have at least 1 frame, but a list of 0 frames was given.")
        if fps is not None:
            raise ValueError("`fps` needs a video file: decoded frames do not say when they are shown.")
        check_num_frames(num_frames)
        if num_frames is not None and num_frames < len(frames):
            frames = Frames(frames[i] for i in np.linspace(0, len(frames) - 1, num_frames).astype(int))
        return frames

    def _replacements(self, items: list, grids: np.ndarray | None, per_tile: int) -> tuple[list[str], list[str]]:
        """The texts that pictures, and those that videos become; `grids` are those of all pictures and frames."""
        tokens = f"<img>{self.image_token * per_tile}</img>"
        images, videos, position = [], [], 0
        for item in items:
            if isinstance(item, (VideoFile, Frames)):
                videos.append(f"<vid>{'<t>'.join([tokens] * len(item))}</vid>")
                position += len(item)
            else:
                rows, columns = (0, 0) if grids is None else grids[position].tolist()
                images.append("\n".join([tokens, *[tokens * columns] * rows]))
                position += 1
        return images, videos

    def _tokenize(self, prompts: list[str], spans: list, settings: dict) -> dict[str, Any]:
        """Token ids of the expanded prompts; `spans` says what was expanded."""
        text_kwargs = settings["text_kwargs"]
        names = ("return_text_replacement_offsets", "return_mm_token_type_ids")
        returns_spans, returns_types = (text_kwargs.pop(name, settings.get(name)) for name in names)
        inputs = dict(self.tokenizer(prompts, **text_kwargs))
        rows = [row if isinstance(row, list) else row.tolist() for row in inputs["input_ids"]]
        found = [row.count(self.image_token_id) for row in rows]
        wanted = [prompt.count(self.image_token) for prompt in prompts]
        if found != wanted:
            raise ValueError(
                f"The prompts have {wanted} tokens of pictures, and {found} of them are left in `input_ids`: truncation"
                f" must not cut into a picture. Give a larger `max_length` than {text_kwargs.get('max_length')}, or do not"
                " truncate (`max_length=None` in TRL's configurations, where 1,024 is the default)."
            )
        if returns_spans:
            inputs["text_replacement_offsets"] = spans
        elif "offset_mapping" in inputs and spans:
            # Into the text as it was given: releases that do not ask for the replacements (before 5.2x) take them for
            # that when they mark what the assistant said.
            inputs["offset_mapping"] = [_before_replacement(*row) for row in zip(inputs["offset_mapping"], spans)]
        if returns_types:
            inputs["mm_token_type_ids"] = self.create_mm_token_type_ids(rows)
        return inputs

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, "pixel_values"]

    def get_num_multimodal_tokens(self, image_sizes=None, video_frames=None, **kwargs) -> MultiModalData:
        """
        How many `<image>` tokens pictures and videos will take, without processing them.

        Args:
            image_sizes (`list[tuple[int, int]]`, *optional*): `(height, width)` of each picture.
            video_frames (`list[int]`, *optional*): number of sampled frames of each video.
            kwargs: `patch_strategy`, `image_grid_pinpoints` and `image_seq_length`, as for a call.

        Returns:
            `MultiModalData`: `num_image_tokens` and `num_image_patches` (tiles) for each picture, `num_video_tokens`.
        """
        kwargs = {**kwargs.pop("images_kwargs", {}), **kwargs}
        processor = self.image_processor
        per_tile = kwargs.get("image_seq_length") or processor.image_seq_length
        data: dict[str, list[int]] = {}
        if image_sizes is not None:
            tiles = [1] * len(image_sizes)
            if (kwargs.get("patch_strategy") or processor.patch_strategy) == "best_fit":
                pinpoints = kwargs.get("image_grid_pinpoints") or processor.image_grid_pinpoints
                crop_size = kwargs.get("crop_size") or processor.crop_size
                grids = [processor.best_grid(*size, crop_size["height"], pinpoints) for size in image_sizes]
                tiles = [1 + rows * columns for rows, columns in grids]
            data = {"num_image_tokens": [n * per_tile for n in tiles], "num_image_patches": tiles}
        if video_frames is not None:
            data["num_video_tokens"] = [n * per_tile for n in video_frames]
        return MultiModalData(**data)

    # What the host and vLLM call on every processor.
    _get_num_multimodal_tokens = get_num_multimodal_tokens

    def apply_chat_template(self, conversation, chat_template=None, **kwargs):
        """
        As [`~ProcessorMixin.apply_chat_template`]. Messages have the roles `user` and `assistant`; their content is a
        string or a list of blocks of type `text`, `image` and `video`, in any order and number. The first message may
        have the role `system` and only text: the text and a blank line come before the content of the user's message
        that follows it.

        A text is text: what would be read as a control token in it is refused, as the published tokenizer knows no other
        way to write some of them. A prompt that is given to the processor itself is a template, and means what it says.

        Raises:
            ValueError: for an empty conversation, one that the template refuses, an unknown role or block, a `system` message elsewhere, a `file:` URL,
                and for a text with `<image>` or `<video>`, a special token of the tokenizer, or a marker of pictures,
                videos or turns.
        """
        try:
            return super().apply_chat_template(self.checked(conversation), chat_template=chat_template, **kwargs)
        except Exception as error:
            # What a template refuses in so many words, and no subclass of it, such as that for its syntax.
            if type(error).__name__ != "TemplateError":
                raise
            raise ChatTemplateError(f"The chat template refuses the conversation: {error}") from error

    def checked(self, conversation, placeholders: bool = False):
        """
        A copy of one conversation or a batch of them, in which everything is known; raises `ValueError` as
        [`~LongLLaVAProcessor.apply_chat_template`] does. With `placeholders`, `<image>` and `<video>` may stand in a content
        that is a string: pictures and videos are given beside the conversation then, as data for training has them.
        """
        conversation = getattr(conversation, "messages", conversation)
        if not isinstance(conversation, (list, tuple)) or len(conversation) == 0:
            raise ValueError(f"A conversation must be a list of at least 1 message, but it is {conversation!r}.")
        if not isinstance(conversation[0], dict) and not hasattr(conversation[0], "role"):
            return [self.checked(one, placeholders) for one in conversation]
        messages, conversation = [], [_as_dict(message) for message in conversation]
        for index, message in enumerate(conversation):
            name = f"Message {index}"
            role = message.get("role")
            if role not in ROLES:
                raise ValueError(f"{name} has the role {role!r}, but it must be one of {list(ROLES)}.")
            following = conversation[index + 1].get("role") if index + 1 < len(conversation) else None
            if role == "system" and (index != 0 or following != "user"):
                raise ValueError(
                    f"{name} has the role 'system': it must be the first message, and the next one must have the role"
                    f" 'user', but {following!r} is next."
                )
            content = message.get("content")
            if isinstance(content, str):
                self._check_text(content, name, placeholders and role == "user")
            elif isinstance(content, (list, tuple)):
                blocks = enumerate(map(_as_dict, content))
                content = [self._checked_block(block, role, f"{name}, block {i},") for i, block in blocks]
                for is_text, run in groupby(content, lambda block: block["type"] == "text"):
                    texts = [block["text"] for block in run] if is_text else []
                    if len(texts) > 1:  # which the template joins; each alone was looked at
                        self._check_text("".join(texts), name)
            else:
                raise ValueError(f"{name} must have a string or a list of blocks as content, but it is {content!r}.")
            messages.append({**message, "content": content})
        return messages

    def _checked_block(self, block: Any, role: str, name: str) -> dict:
        if not isinstance(block, dict) or "type" not in block:
            raise ValueError(f"{name} must be a dict with a `type`, but it is {block!r}.")
        kind = "image" if block["type"] == "image_url" else block["type"]
        if kind == "text":
            if not isinstance(block.get("text"), str):
                raise ValueError(f"{name} has type `text`, so it must have a string under `text`, but is {block!r}.")
            self._check_text(block["text"], name)
        elif kind not in ("image", "video"):
            raise ValueError(f"{name} has the type {kind!r}, but it must be one of ['text', 'image', 'video'].")
        elif role != "user":
            raise ValueError(f"{name} has type `{kind}`, but only the user can show something.")
        if kind != "text" and (place := _local_url([value for key, value in block.items() if key != "path"])):
            raise ValueError(f"{name} has the URL of a local file, {place!r}; give a file by its `path`.")
        if kind == "video":
            # A list in one block is one video, its frames given as pictures of any kind.
            keys = [key for key in ("video", "url", "path") if isinstance(block.get(key), (list, tuple))]
            block = {**block, **{key: Frames(block[key]) for key in keys}}
        return copy.copy(block)

    def _check_text(self, text: str, name: str, placeholders: bool = False) -> None:
        if placeholders:
            text = text.replace(self.image_token, "").replace(self.video_token, "")
        for token in (self.image_token, self.video_token):
            if token in text:
                raise ValueError(
                    f"{name} has `{token}` in its text, which stands for a picture or video. Give those as blocks of"
                    f" their own, {{'type': '{token[1:-1]}', ...}}, or write the word in another way."
                )
        added = self.tokenizer.added_tokens_decoder.values()
        control = {*MARKERS, *self.tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
        if found := sorted(token for token in control if token and token in text):
            raise ValueError(
                f"{name} has {', '.join(f'`{token}`' for token in found)} in its text, which the model would not read as"
                " text: control tokens are for the chat template. Write them in another way, or give the whole prompt to"
                " the processor yourself."
            )


def _local_url(value: Any) -> str | None:
    """The first URL of a local file, at any depth."""
    if isinstance(value, (list, tuple, dict)):
        return next(filter(None, map(_local_url, value.values() if isinstance(value, dict) else value)), None)
    return value if isinstance(value, str) and value[:5].lower() == "file:" else None


def _as_dict(item: Any) -> Any:
    """A message or block as a dict, if it is an object with such attributes."""
    if isinstance(item, dict) or not hasattr(item, "__dict__"):
        return item
    return {name: value for name, value in item.__dict__.items() if value is not None}


def _check_template(processor: LongLLaVAProcessor) -> None:
    """Raises whatever a chat template does that cannot be rendered; what it refuses in so many words is its business."""
    if not is_jinja_available() or isinstance(processor.chat_template, dict):  # of several, a call says which
        return
    with contextlib.suppress(ChatTemplateError):
        processor.apply_chat_template([{"role": "user", "content": "?"}])


def _before_replacement(offsets, replacements: list[dict]) -> list[tuple[int, int]]:
    """Character spans in the expanded text as spans in the original; what replaced a placeholder is all of it."""

    def original(position: int, is_end: bool) -> int:
        shift = 0
        for replacement in replacements:
            (start, end), (new_start, new_end) = replacement["span"], replacement["new_span"]
            if position <= new_start:
                break
            if position < new_end:
                return end if is_end else start
            shift = new_end - end
        return position - shift

    return [(original(int(start), False), original(int(end), True)) for start, end in offsets]


def _is_array(item: Any, ndim: int) -> bool:
    return isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim == ndim


def _flatten_pictures(images) -> list:
    if images is None:
        return []
    if isinstance(images, (list, tuple)) or (isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim > 3):
        return [picture for item in images for picture in _flatten_pictures(item)]
    return [images]


def _flatten_videos(videos) -> list:
    """Videos in any nesting: a list of frames is one video, and text is always a file."""
    if isinstance(videos, (list, tuple)) and not isinstance(videos, Frames):
        is_frame = [isinstance(item, Image.Image) or _is_array(item, 3) or _is_array(item, 2) for item in videos]
        if videos and all(is_frame):
            return [Frames(videos)]
        return [video for item in videos for video in _flatten_videos(item)]
    if _is_array(videos, 5):
        return list(videos)
    if isinstance(videos, (str, os.PathLike, bytes, bytearray, VideoFile, Frames)) or _is_array(videos, 4):
        return [videos]
    raise ValueError(
        f"A video must be a path, a URL, bytes, a list of frames or an array (frames, height, width, channels), but it"
        f" is a {type(videos).__name__}."
    )


__all__ = ["LongLLaVAProcessor", "default_chat_template"]
