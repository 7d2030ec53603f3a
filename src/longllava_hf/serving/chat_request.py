# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""The body of a request to `/v1/chat/completions`: what OpenAI's API allows, less what LongLLaVA cannot do."""

import hashlib
import json
import reprlib
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ..image_processing_longllava import open_picture
from ..sources_longllava import LIMITS, read_source
from ..video_longllava import VideoFile


# Below it, logits divided by the temperature may overflow, and all but the largest have no chance anyway.
_COLDEST = 1e-3


def _check_unicode(text: str) -> str:
    """JSON can write half of a surrogate pair, which no tokenizer reads."""
    text.encode()
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]


class _Strict(BaseModel):
    """Converts no types, and raises for what it does not know. `null` is the same as nothing."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, body: Any) -> Any:
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body


class Source(_Strict):
    url: Annotated[str, Field(pattern="^(https?://|data:)")]
    detail: Literal["auto", "low", "high"] = "auto"  # without effect: pictures are seen as `patch_strategy` says


class TextPart(_Strict):
    type: Literal["text"]
    text: Text


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: Source


class VideoPart(_Strict):
    """Transformers' extension of the API."""

    type: Literal["video_url"]
    video_url: Source


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: Annotated[
        list[Part],
        BeforeValidator(lambda given: [{"type": "text", "text": given}] if isinstance(given, str) else given),
    ]


class TextFormat(_Strict):
    type: Literal["text"]


class ProcessorOptions(_Strict):
    """What else the processor is told: how films are sampled, and whether pictures are divided."""

    num_frames: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    fps: Annotated[float, Field(gt=0, le=1000)] | None = None
    patch_strategy: Literal["none", "best_fit"] | None = None


class ChatRequest(_Strict):
    """A request for an answer in a chat. [`ChatRequest.parse`] raises for whatever would not be done as it is asked for."""

    messages: Annotated[list[Message], Field(min_length=1)]
    model: str | None = None
    stream: bool = False
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] = 1024
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Annotated[
        list[Annotated[Text, Field(min_length=1, max_length=100)]],
        Field(max_length=4),
        BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
    ] = []
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] = {}
    chat_template_kwargs: ProcessorOptions = ProcessorOptions()

    # Only at the values that change nothing.
    n: Literal[1] = 1
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    presence_penalty: Annotated[float, Field(ge=0, le=0)] = 0
    logprobs: Literal[False] = False
    top_logprobs: Literal[0] = 0
    tools: Annotated[list, Field(max_length=0)] = []
    tool_choice: Literal["none", "auto"] = "auto"
    parallel_tool_calls: bool = True
    response_format: TextFormat = TextFormat(type="text")
    modalities: list[Literal["text"]] = ["text"]

    # Without effect on an answer.
    metadata: Any = None
    prompt_cache_key: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    stream_options: Any = None
    user: Any = None

    @classmethod
    def parse(cls, body: dict[str, Any]) -> "ChatRequest":
        """
        Args:
            body (`dict`): as it came.

        Raises:
            ValueError: that names each wrong field, what it should be and what it is.
        """
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise ValueError(
                "; ".join(
                    f"`{'.'.join(map(str, one['loc'])) or 'body'}`: {one['msg']}, but it is {reprlib.repr(one['input'])}"
                    for one in error.errors(include_url=False)
                )
            ) from None

    def read_messages(self, num_frames: int, check: Callable[[], None]) -> tuple[list[dict[str, Any]], list[str]]:
        """
        The messages with every picture and film read, all of them within [`LIMITS`].

        Args:
            num_frames (`int`): of a film, unless the request says otherwise.
            check (`Callable`): called before each is read, to end this by an exception.

        Returns:
            messages as Transformers' server takes them, with pictures as bytes and films as [`VideoFile`]s for URLs; and a
            hash of each picture and film with how it is processed, in reading order.

        Raises:
            ValueError, OSError: if one cannot be read, is none, or leads to where it must not.
        """
        messages, hashes, total = [message.model_dump(exclude_unset=True) for message in self.messages], [], 0
        options = self.chat_template_kwargs
        sampling = options.model_dump(include={"num_frames", "fps"}, exclude_none=True) or {"num_frames": num_frames}
        for i, message in enumerate(messages):
            for j, part in enumerate(message["content"]):
                if part["type"] == "text":
                    continue
                check()
                name, source = f"`messages.{i}.content.{j}`", part[part["type"]]
                data: Any = read_source(source["url"])
                data = data.getvalue()  # never a path, as those are no URLs
                if (total := total + len(data)) > LIMITS.max_bytes:
                    raise ValueError(
                        f"{name} is too large: up to it, pictures and films have {total} bytes, and the limit,"
                        f" `longllava_hf.LIMITS.max_bytes`, is {LIMITS.max_bytes}."
                    )
                settings = json.dumps([part["type"], sampling, options.patch_strategy]).encode()
                hashes.append(hashlib.sha256(settings + b"\0" + data).hexdigest())
                if part["type"] == "video_url":
                    source["url"] = VideoFile(data, name=name, **sampling)
                else:
                    open_picture(data, name).close()
                    source["url"] = data
        return messages, hashes

    def to_body(self, messages: list[dict[str, Any]], generation_config: Any) -> dict[str, Any]:
        """
        The request for Transformers' handler, in Transformers' terms where it would understand OpenAI's in another way.

        Args:
            messages (`list[dict]`): as from [`ChatRequest.read_messages`].
            generation_config ([`GenerationConfig`]): the model's.
        """
        config = generation_config.to_dict() | {"max_new_tokens": self.max_completion_tokens or self.max_tokens}
        if self.stop:
            config["stop_strings"] = self.stop
        if self.logit_bias:
            config["sequence_bias"] = [[[int(token)], bias] for token, bias in self.logit_bias.items()]
        if self.temperature is not None or self.top_p is not None:
            # As OpenAI has it: sampled from all tokens, unless the temperature is 0.
            temperature = 1.0 if self.temperature is None else self.temperature
            config["do_sample"] = temperature > _COLDEST
            if config["do_sample"]:
                config |= {"temperature": float(temperature), "top_p": float(self.top_p or 1.0), "top_k": 0}
        extra = self.chat_template_kwargs.model_dump(include={"patch_strategy"}, exclude_none=True)
        return {
            "messages": messages,
            "stream": self.stream,
            "generation_config": json.dumps(config),
            "chat_template_kwargs": extra,
        }


__all__ = ["ChatRequest"]
