# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""From rows of conversations to batches, with the labels of the authors' code."""

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.utils.chat_template_utils import render_jinja_template

from ..image_processing_longllava import LazyPixelValues
from ..processing_longllava import LongLLaVAProcessor
from ..video_longllava import Frames


IGNORE_INDEX = -100
"""The label of a token that is not learned."""

# Where the source of a picture or video is found, in a block or in an item of `images` and `videos`.
_SOURCES = ("bytes", "path", "url", "image", "video", "base64", "image_url")

# What the processor may be called with for a row.
_ROW_SETTINGS = ("patch_strategy", "image_grid_pinpoints", "num_frames", "fps", "do_sample_frames")


@dataclass
class Sample:
    """
    One conversation as the model reads it.

    input_ids, labels (`torch.Tensor` of shape `(length,)`).
    pixel_values (`torch.Tensor` of shape `(tiles, 3, height, width)` or `LazyPixelValues`, *optional*).
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor | LazyPixelValues | None


@contextmanager
def named_sample(row: Any, number: int) -> Iterator[None]:
    """Errors inside are `ValueError`s that say which sample they are of: its `id`, or its number in the batch or the data."""
    name = row.get("id") if isinstance(row, dict) else None
    try:
        yield
    except Exception as error:
        raise ValueError(f"Sample {number if name is None else repr(name)}: {error}") from error


def _without_none(value: Any) -> Any:
    """Arrow fills in what a row does not have; of what has keys, the `None`s are dropped."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _source(item: Any, is_video: bool) -> Any:
    """
    A picture or video: what `datasets` stores of one that it has not decoded, a block's, a video's frames, or itself.
    `None` where it names none.
    """
    if isinstance(item, dict):
        source = next((item[name] for name in _SOURCES if item.get(name) is not None), None)
        return source if source is None else _source(source, is_video)
    if is_video and isinstance(item, (list, tuple, Frames)):
        return Frames(_source(frame, False) for frame in item)
    return item


def _as_list(value: Any) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def check_turns(messages: list[Any]) -> None:
    """Raises `ValueError` unless user and assistant alternate, from one to the other, after at most one `system`."""
    roles = [message.get("role") if isinstance(message, dict) else type(message).__name__ for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(
            "The messages must be by 'user' and 'assistant' in turn and end with the assistant's, but their roles are"
            f" {roles}."
        )


def _blocks(message: dict) -> list[dict]:
    """Of pictures and videos, in reading order: those of a list, or the placeholders of a string."""
    content = message["content"]
    if isinstance(content, str):
        return [{"type": kind} for kind in re.findall("<(image|video)>", content)]
    return [block for block in content if block["type"] != "text"]


def conversation(row: dict, processor: LongLLaVAProcessor) -> tuple[list[dict], list, list]:
    """
    What is said and shown in a row.

    Args:
        row (`dict`): `messages`, whose pictures and videos are blocks with a source of their own, or the next of
            `images` and `videos` for a block without one and for `<image>` and `<video>` in a content that is a string.
            Where there is no such place at all, `images` come before the first user's text, as in TRL.
        processor ([`LongLLaVAProcessor`]).

    Returns:
        The messages, and the sources of pictures and of videos in reading order.

    Raises:
        ValueError: for a row without `messages`, turns that do not alternate, what the processor refuses, and where
            places for pictures or videos and their sources differ in number.
    """
    if not isinstance(row, dict) or "messages" not in row:
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(
            f"A row must have `messages`, but it has {found}. `Trainer` removes columns that the model does not take,"
            " unless its arguments say `remove_unused_columns=False`."
        )
    messages = _without_none(_as_list(row["messages"]))
    check_turns(messages)
    messages = processor.checked(messages, placeholders=True)
    given = {kind: _as_list(row.get(f"{kind}s")) for kind in ("image", "video")}
    if given["image"] and not any(block["type"] != "video" for message in messages for block in _blocks(message)):
        first = next(message for message in messages if message["role"] == "user")
        text = [{"type": "text", "text": first["content"]}] if isinstance(first["content"], str) else first["content"]
        first["content"] = [{"type": "image"}] * len(given["image"]) + text
    shown: dict[str, list] = {"image": [], "video": []}
    places = {"image": 0, "video": 0}
    for block in (block for message in messages for block in _blocks(message)):
        kind = "video" if block["type"] == "video" else "image"
        source = _source({name: value for name, value in block.items() if name != "type"}, kind == "video")
        if source is None:
            if places[kind] < len(given[kind]):
                source = _source(given[kind][places[kind]], kind == "video")
                if source is None:
                    raise ValueError(f"Item {places[kind]} of `{kind}s` has no `bytes` and no `path`.")
            places[kind] += 1
        shown[kind].append(source)
    for kind, items in given.items():
        if len(items) != places[kind]:
            raise ValueError(
                f"There are {places[kind]} places for {kind}s in `messages` that name no file, but {len(items)} `{kind}s`."
            )
    return messages, shown["image"], shown["video"]


class LongLLaVADataCollator:
    """
    Rows of conversations to what [`LongLLaVAForConditionalGeneration`] is trained on: a `data_collator` for `Trainer`
    (with `remove_unused_columns=False`) and TRL's `SFTTrainer`, and for the workers of any `DataLoader`.

    What the assistant says is learned, and the end of text after it. As in the authors' code a turn that is not the
    last one is followed by a line break, and yet the end of text is its label, so that every answer teaches to end.

    A row has `messages` and, for their places that name no file, `images` and `videos`, as in TRL; in a content that is a
    string, `<image>` and `<video>` are such places. It may have an `id`, for errors, and `processor_kwargs` with some of
    `patch_strategy`, `image_grid_pinpoints`, `num_frames`, `fps` and `do_sample_frames` for it. A list of rows in place of
    a row is packed, as [`PackedDataset`] gives them.

    Args:
        processor ([`LongLLaVAProcessor`]).
        max_length (`int`, *optional*): in tokens, of a row; not of what is packed, which [`PackedDataset`] has seen to.
        truncation (`bool`, defaults to `False`): whether a row that is longer is cut, in front of the picture, frame or
            sub-image that would be cut in two. Otherwise it is an error.
        lazy (`bool`, defaults to `False`): leave the decoding to the model, which does it batch by batch for its tower.
            Without it, it is done here, in a worker if there is one.
        pad_to_multiple_of (`int`, *optional*): of the length of a batch that is not packed.

    Returns:
        `dict`: `input_ids`, `labels` and `attention_mask` of shape `(batch, length)`, padded on the right, and
        `pixel_values` of all pictures and frames, in reading order. Of packed rows, all in one: `(1, length)`, with
        `position_ids` that begin anew with each in place of the mask.

    Raises:
        ValueError: for a row that is no such conversation or that has nothing to learn, for one that is too long, and
            for pictures that cannot be read. It names the sample.
    """

    def __init__(
        self,
        processor: LongLLaVAProcessor,
        max_length: int | None = None,
        truncation: bool = False,
        lazy: bool = False,
        pad_to_multiple_of: int | None = None,
    ):
        if processor.tokenizer.pad_token_id is None or processor.tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer must have a `pad_token` and an `eos_token`.")
        self.processor, self.max_length, self.truncation = processor, max_length, truncation
        self.lazy, self.pad_to_multiple_of = lazy, pad_to_multiple_of

    def __call__(self, rows: list) -> dict[str, Any]:
        is_packed = any(isinstance(row, (list, tuple)) for row in rows)
        if is_packed:
            rows = [row for bin_of_rows in rows for row in bin_of_rows]
        samples = [self.encode(row, number) for number, row in enumerate(rows)]
        batch = self._in_one_row(samples) if is_packed else self._padded(samples)
        pictures: list[Any] = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
        if pictures:
            batch["pixel_values"] = LazyPixelValues.cat(pictures) if self.lazy else torch.cat(pictures)
        return batch

    def _in_one_row(self, samples: list[Sample]) -> dict[str, Any]:
        return {
            "input_ids": torch.cat([sample.input_ids for sample in samples])[None],
            "labels": torch.cat([sample.labels for sample in samples])[None],
            "position_ids": torch.cat([torch.arange(len(sample.input_ids)) for sample in samples])[None],
        }

    def _padded(self, samples: list[Sample]) -> dict[str, Any]:
        multiple = self.pad_to_multiple_of or 1
        length = -(-max(len(sample.input_ids) for sample in samples) // multiple) * multiple

        def pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
            stacked = pad_sequence(rows, batch_first=True, padding_value=value)
            return torch.nn.functional.pad(stacked, (0, length - stacked.shape[1]), value=value)

        return {
            "input_ids": pad([sample.input_ids for sample in samples], self.processor.tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(sample.input_ids) for sample in samples], 0),
            "labels": pad([sample.labels for sample in samples], IGNORE_INDEX),
        }

    def encode(self, row: dict, number: int = 0) -> Sample:
        """One row; `number` names it where it has no `id`."""
        with named_sample(row, number):
            sample = self._cut(self._encode(row, lazy=self.lazy))
            if not (sample.labels != IGNORE_INDEX).any():
                within = f" within `max_length` ({self.max_length}) tokens" if self.max_length else ""
                raise ValueError(f"Nothing that the assistant says is there to be learned{within}.")
            return sample

    def length(self, row: dict, number: int = 0) -> int:
        """How many tokens a row has, without decoding its pictures; at most `max_length` with `truncation`."""
        return self.measure(row, number)[0]

    def measure(self, row: dict, number: int = 0) -> tuple[int, int]:
        """The length of a row, and a checksum of what is said in it."""
        with named_sample(row, number):
            # A token for each tile is enough to count them.
            sample = self._encode(row, lazy=True, image_seq_length=1)
            checksum = zlib.crc32(sample.input_ids.numpy().tobytes())
            tiles = 0 if sample.pixel_values is None else len(sample.pixel_values)
            length = len(sample.input_ids) + tiles * (self.processor.image_processor.image_seq_length - 1)
            if self.max_length is not None and length > self.max_length:
                length = len(self._cut(self._encode(row, lazy=True)).input_ids)
            return length, checksum

    def _encode(self, row: dict, **settings) -> Sample:
        messages, images, videos = conversation(row, self.processor)
        row_settings = _without_none(row.get("processor_kwargs") or {})
        if unknown := sorted(set(row_settings) - set(_ROW_SETTINGS)):
            raise ValueError(f"`processor_kwargs` may have {list(_ROW_SETTINGS)}, but has {unknown}.")
        tokenizer = self.processor.tokenizer
        template: Any = self.processor.chat_template
        rendered: Any = render_jinja_template(
            [messages],
            chat_template=template["default"] if isinstance(template, dict) else template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        texts, spans_of_texts = rendered
        inputs: Any = self.processor(
            images=images or None,
            text=texts,
            videos=videos or None,
            add_special_tokens=False,
            return_offsets_mapping=True,
            **row_settings,
            **settings,
        )
        input_ids = torch.tensor(inputs["input_ids"][0])
        labels, offsets = torch.full_like(input_ids, IGNORE_INDEX), torch.tensor(inputs["offset_mapping"][0])
        for start, end in spans_of_texts[0]:
            said = ((offsets[:, 1] > start) & (offsets[:, 0] < end)).nonzero()[:, 0]
            labels[said] = input_ids[said]
            # What the input has there is a line break, unless it is the last turn.
            labels[said[-1]] = tokenizer.eos_token_id
        pixel_values = inputs.get("pixel_values")
        if pixel_values is not None and not isinstance(pixel_values, LazyPixelValues):
            pixel_values = torch.as_tensor(pixel_values)
        return Sample(input_ids, labels, pixel_values)

    def _cut(self, sample: Sample) -> Sample:
        """To at most `max_length` tokens, without cutting into a picture."""
        length = len(sample.input_ids)
        if self.max_length is None or length <= self.max_length:
            return sample
        if not self.truncation:
            raise ValueError(
                f"It has {length} tokens, and `max_length` is {self.max_length}. Give a larger one, or `truncation=True`."
            )
        is_image = sample.input_ids == self.processor.image_token_id
        pixel_values, length = sample.pixel_values, self.max_length
        if pixel_values is not None:
            per_tile = int(is_image.sum()) // len(pixel_values)
            tiles = int(is_image[:length].sum()) // per_tile
            places = is_image.nonzero()[:, 0]
            if tiles < len(pixel_values):
                length = min(length, int(places[tiles * per_tile]))
            pixel_values = pixel_values[:tiles] if tiles else None
        return Sample(sample.input_ids[:length], sample.labels[:length], pixel_values)


__all__ = ["IGNORE_INDEX", "LongLLaVADataCollator", "Sample", "check_turns", "conversation", "named_sample"]
