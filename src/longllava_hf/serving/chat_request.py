# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""A request for a chat, as OpenAI's clients write it: looked at before anything is done, then its pictures and films read."""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from typing import Any

from ..image_processing_longllava import open_picture
from ..sources_longllava import LIMITS, read_source
from ..video_longllava import VideoFile


_DEFAULT_MAX_TOKENS = 1024
# Options that are numbers: whether they are whole, the least and the most.
_NUMBERS: dict[str, tuple[bool, float, float]] = {
    "max_tokens": (True, 1, 1 << 20),
    "max_completion_tokens": (True, 1, 1 << 20),
    "temperature": (False, 0, 2),
    "top_p": (False, 1e-6, 1),
    "seed": (True, -(1 << 63), (1 << 63) - 1),
}
# The same of how films are sampled, under `chat_template_kwargs`.
_SAMPLING: dict[str, tuple[bool, float, float]] = {"num_frames": (True, 1, 1 << 20), "fps": (False, 1e-6, 1000)}
# Options that are known, with the only values that they may have.
_FIXED: dict[str, tuple] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "stop": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
# Options that tell the server something which it has no use for.
_WITHOUT_EFFECT = (
    "metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "stream_options", "user",
)  # fmt: skip


@dataclass
class ChatRequest:
    """
    What a client asks for.

    Args:
        messages (`list[dict]`): in Transformers' terms for its server; pictures as bytes and films as [`VideoFile`], once
            they are fetched.
        settings (`dict`): of the generation.
        sampling (`dict`): of films, `num_frames` or `fps`.
        patch_strategy (`str`, *optional*): of pictures.
        seed (`int`, *optional*): for what is drawn at random.
        stream (`bool`).
        sources (`list[str]`): what each picture and film is, as a hash, in reading order.
        is_cancelled (`threading.Event`): set when nobody waits for the answer any more.
    """

    messages: list[dict[str, Any]]
    settings: dict[str, Any]
    sampling: dict[str, Any]
    patch_strategy: str | None
    seed: int | None
    stream: bool
    sources: list[str] = field(default_factory=list)
    is_cancelled: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def parse(cls, body: dict[str, Any], num_frames: int) -> "ChatRequest":
        """
        Args:
            body (`dict`): as it came.
            num_frames (`int`): of a film, unless the request says otherwise.

        Raises:
            ValueError: for anything that is malformed, or that would not be done as it is asked for.
        """
        body = {name: value for name, value in body.items() if value is not None}
        if not isinstance(body.get("model", ""), str):
            raise ValueError(f"`model` must be a string, but is {body['model']!r}.")
        messages = body.pop("messages", None)
        if not isinstance(messages, list) or not messages:
            raise ValueError("`messages` must be a list of at least 1 message.")
        if not isinstance(stream := body.pop("stream", False), bool):
            raise ValueError(f"`stream` must be true or false, but is {stream!r}.")
        extra = body.pop("chat_template_kwargs", {})
        if not isinstance(extra, dict) or extra.keys() - {*_SAMPLING, "patch_strategy"}:
            raise ValueError(
                f"`chat_template_kwargs` may have `num_frames`, `fps` and `patch_strategy`, but is {extra!r}."
            )
        numbers = {name: body.pop(name) for name in _NUMBERS if name in body}
        for name, value in numbers.items():
            _check_number(name, value, *_NUMBERS[name])
        sampling = {name: extra[name] for name in _SAMPLING if extra.get(name) is not None}
        for name, value in sampling.items():
            _check_number(name, value, *_SAMPLING[name])
        if (strategy := extra.get("patch_strategy")) not in (None, "none", "best_fit"):
            raise ValueError(f"`patch_strategy` must be 'none' or 'best_fit', but is {strategy!r}.")
        max_tokens = numbers.get("max_tokens", _DEFAULT_MAX_TOKENS)
        settings: dict[str, Any] = {"max_new_tokens": numbers.get("max_completion_tokens", max_tokens)}
        if bias := body.pop("logit_bias", None):
            settings["sequence_bias"] = _token_biases(bias)
        if "temperature" in numbers or "top_p" in numbers:
            # As OpenAI has it: sampled from all tokens, unless the temperature is 0.
            temperature, settings["do_sample"] = numbers.get("temperature", 1.0), numbers.get("temperature") != 0
            if temperature:
                settings.update(temperature=float(temperature), top_p=float(numbers.get("top_p", 1.0)), top_k=0)
        for name, value in body.items():
            if name in _FIXED and value not in _FIXED[name]:
                values = " or ".join(map(json.dumps, _FIXED[name]))
                raise ValueError(f"`{name}` is not supported: it may be left out or be {values}, but is {value!r}.")
            if name not in (*_FIXED, *_WITHOUT_EFFECT, "model"):
                raise ValueError(f"`{name}` is not supported.")
        messages = [_checked_message(message, f"Message {i}") for i, message in enumerate(messages)]
        sampling = sampling or {"num_frames": num_frames}
        return cls(messages, settings, sampling, strategy, numbers.get("seed"), stream)

    def fetch(self) -> None:
        """
        Read every picture and film, all of them within [`LIMITS`].

        Raises:
            ValueError, OSError: if one cannot be read, is none, or leads to where it must not.
        """
        total = 0
        for i, message in enumerate(self.messages):
            content = message["content"]
            for j, part in enumerate(content if isinstance(content, list) else []):
                if part["type"] == "text":
                    continue
                if self.is_cancelled.is_set():
                    raise OSError("The client has gone.")
                name, kind = f"Message {i}, part {j},", part["type"]
                url = part[kind]["url"]
                data: Any = read_source(url)
                data = data.getvalue()
                if (total := total + len(data)) > LIMITS.max_bytes:
                    raise ValueError(
                        f"{name} is too large: up to it, pictures and films have {total} bytes, and the limit,"
                        f" `longllava_hf.LIMITS.max_bytes`, is {LIMITS.max_bytes}."
                    )
                settings = [kind, self.sampling if kind == "video_url" else self.patch_strategy]
                self.sources.append(hashlib.sha256(json.dumps(settings).encode() + b"\0" + data).hexdigest())
                if kind == "video_url":
                    data = VideoFile(data, name=f"{name} a film,", **self.sampling)
                else:
                    open_picture(data, f"{name} a picture,").close()
                part[kind] = {"url": data}

    def to_body(self, model: str, generation_config: Any) -> dict[str, Any]:
        """The request for Transformers' handler: what it would understand in another way, in Transformers' own terms."""
        config = {**generation_config.to_dict(), **self.settings}
        extra = {} if self.patch_strategy is None else {"patch_strategy": self.patch_strategy}
        return {
            "model": model,
            "messages": self.messages,
            "stream": self.stream,
            "generation_config": json.dumps(config),
            "chat_template_kwargs": extra,
        }


def _check_number(name: str, value: Any, is_whole: bool, least: float, most: float) -> None:
    kinds = (int,) if is_whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value <= most:
        what = "a whole number" if is_whole else "a number"
        raise ValueError(f"`{name}` must be {what} from {least:g} to {most:g}, but is {value!r}.")


def _token_biases(biases: Any) -> list:
    """What is added to logits, by ids of tokens, as Transformers takes it."""
    if not isinstance(biases, dict) or not all(key.isascii() and key.isdigit() and len(key) < 10 for key in biases):
        raise ValueError(f"`logit_bias` must be an object with ids of tokens as keys, but is {biases!r}.")
    for key, value in biases.items():
        _check_number(f"logit_bias.{key}", value, False, -100, 100)
    return [[[int(key)], float(value)] for key, value in biases.items()]


def _check_unicode(text: str, name: str) -> None:
    """JSON can say half of a surrogate pair, a tokenizer cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has half a character at position {error.start} of its text.") from None


def _checked_message(message: Any, name: str) -> dict[str, Any]:
    """A message with what is known in it alone; roles and texts are the processor's to check."""
    if not isinstance(message, dict):
        raise ValueError(f"{name} must be an object, but is a {type(message).__name__}.")
    unknown = {key for key, value in message.items() if value} - {"role", "content", "name", "refusal"}
    if unknown:
        raise ValueError(f"{name} has {sorted(unknown)}, which is not supported.")
    content = message.get("content")
    if not isinstance(role := message.get("role"), str):
        raise ValueError(f"{name} must have a string as `role`, but it is {role!r}.")
    if isinstance(content, list):
        content = [_checked_part(part, f"{name}, part {i},") for i, part in enumerate(content)]
    elif isinstance(content, str):
        _check_unicode(content, name)
    else:
        raise ValueError(f"{name} must have a string or a list of parts as `content`, but it is {content!r}.")
    return {"role": role, "content": content}


def _checked_part(part: Any, name: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{name} has the type 'text', so it must have a string under `text`.")
        _check_unicode(part["text"], name)
        return {"type": "text", "text": part["text"]}
    if kind not in ("image_url", "video_url"):
        raise ValueError(
            f"{name} must be an object with a `type`, which is 'text', 'image_url' or 'video_url', but is {kind!r}."
        )
    url = part.get(kind)
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str) or not url.startswith(("http://", "https://", "data:")):
        raise ValueError(f"{name} must have a URL that begins with http://, https:// or data: under `{kind}.url`.")
    return {"type": kind, kind: {"url": url}}


__all__ = ["ChatRequest"]
