# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
`longllava serve`: Transformers' own OpenAI-compatible server, with this package's model, limits and errors. Routes, answers,
streams and the thread that generates are Transformers'; what is here is given to it through public methods.

| here | what it is to the server |
|---|---|
| `register_for_serving` | how it finds the classes of a model type |
| `Gate` | middleware: bounded bodies, and requests whose client has gone are cancelled |
| `ChatRequest` | a request as it came, looked at before anything is done |
| `ChatHandler` | its handler of chats: pictures and films are fetched outside the event loop, errors have a reason |
| `Generation`, `GenerationQueue` | its manager of `generate`: can be cancelled, says how far it is, keeps a context |
"""

import asyncio
import contextlib
import hashlib
import inspect
import json
import logging as python_logging
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging
from transformers.utils.import_utils import is_serve_available

from ..configuration_longllava import LlavaJambaConfig, LongLLaVAConfig
from ..image_processing_longllava import open_picture
from ..int8_longllava import named_quantization
from ..modeling_longllava import LongLLaVAForConditionalGeneration
from ..processing_longllava import DEFAULT_NUM_FRAMES
from ..sources_longllava import LIMITS, read_source
from ..video_longllava import VideoFile


if not is_serve_available():
    raise ImportError("Serving needs FastAPI, Uvicorn and openai: `pip install 'longllava_hf[serve]'`.")

import uvicorn
from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState


# Uvicorn's own log, which the server writes to anyway.
log = python_logging.getLogger("uvicorn.error")

PATHS = ("/v1/chat/completions", "/v1/models", "/health")
# Requests that are read, fetched or waiting for the model at a time; others wait with their bodies unread.
_PLACES = 16
_DEFAULT_MAX_TOKENS = 1024
# Options that are numbers: whether they are whole, the least and the most.
_NUMBERS: dict[str, tuple[bool, float, float]] = {
    "max_tokens": (True, 1, 1 << 20),
    "max_completion_tokens": (True, 1, 1 << 20),
    "temperature": (False, 0, 2),
    "top_p": (False, 1e-6, 1),
    "seed": (True, -(1 << 63), (1 << 63) - 1),
}
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
    "metadata",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "stream_options",
    "user",
)


def register_for_serving() -> None:
    """
    Let Transformers' server find the model: a class by the name in `architectures`, and its kind in the table of models
    that see. In the table of multimodal ones too, the server would look for sound in films.
    """
    name = LongLLaVAForConditionalGeneration.__name__
    for architecture in (name, "LlavaJambaForCausalLM"):  # native, and as published
        setattr(transformers, architecture, LongLLaVAForConditionalGeneration)
    for config_class in (LongLLaVAConfig, LlavaJambaConfig):
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[config_class.model_type] = name


def error_body(status: int, message: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    message = message.encode(errors="backslashreplace").decode()  # half a surrogate pair is no UTF-8
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class Gate:
    """
    ASGI middleware: reads at most [`LIMITS`]`.max_bytes` of a body within `LIMITS.timeout` seconds, lets a bounded number
    of requests in, and cancels those whose client has gone.
    """

    def __init__(self, app: Any):
        self.app, self.places = app, asyncio.Semaphore(_PLACES)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        async with self.places:
            try:
                body = await asyncio.wait_for(self._body(receive), LIMITS.timeout)
            except (ValueError, asyncio.TimeoutError) as error:
                late = f"The body took more than {LIMITS.timeout:g} seconds, which is `longllava_hf.LIMITS.timeout`."
                status, message = (413, str(error)) if isinstance(error, ValueError) else (408, late)
                headers = {"Connection": "close"}  # what is left of the body is not read
                return await JSONResponse(error_body(status, message), status, headers)(scope, receive, send)
            if body is not None:
                await self._answer(scope, body, receive, send)

    @staticmethod
    async def _body(receive) -> bytes | None:
        """The whole body; `None` if the client has gone. Raises `ValueError` if it is too large."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > LIMITS.max_bytes:
                raise ValueError(
                    f"The body has more than {LIMITS.max_bytes} bytes, which is `longllava_hf.LIMITS.max_bytes`."
                )
            if not message.get("more_body"):
                return bytes(body)

    async def _answer(self, scope, body: bytes, receive, send) -> None:
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        del body
        leaving = asyncio.ensure_future(receive())  # which returns when the client goes

        async def replay():
            return messages.pop() if messages else await asyncio.shield(leaving)

        answer = asyncio.ensure_future(self.app(scope, replay, send))
        try:
            await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not answer.done():
                answer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await answer


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
        generation ([`Generation`], *optional*): once it has begun.
    """

    messages: list[dict[str, Any]]
    settings: dict[str, Any]
    sampling: dict[str, Any]
    patch_strategy: str | None
    seed: int | None
    stream: bool
    sources: list[str] = field(default_factory=list)
    generation: "Generation | None" = None
    is_cancelled: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def parse(cls, body: dict[str, Any]) -> "ChatRequest":
        """Raises `ValueError` for anything that is malformed, or that would not be done as it is asked for."""
        body = {name: value for name, value in body.items() if value is not None}
        if not isinstance(body.get("model", ""), str):
            raise ValueError(f"`model` must be a string, but is {body['model']!r}.")
        messages = body.pop("messages", None)
        if not isinstance(messages, list) or not messages:
            raise ValueError("`messages` must be a list of at least 1 message.")
        if not isinstance(stream := body.pop("stream", False), bool):
            raise ValueError(f"`stream` must be true or false, but is {stream!r}.")
        extra = body.pop("chat_template_kwargs", {})
        if not isinstance(extra, dict) or extra.keys() - {"num_frames", "fps", "patch_strategy"}:
            raise ValueError(
                f"`chat_template_kwargs` may have `num_frames`, `fps` and `patch_strategy`, but is {extra!r}."
            )
        numbers = {name: body.pop(name) for name in _NUMBERS if name in body}
        for name, value in numbers.items():
            _check_number(name, value, *_NUMBERS[name])
        sampling = {name: extra[name] for name in ("num_frames", "fps") if extra.get(name) is not None}
        if "num_frames" in sampling:
            _check_number("num_frames", sampling["num_frames"], True, 1, 1 << 20)
        if "fps" in sampling:
            _check_number("fps", sampling["fps"], False, 1e-6, 1000)
        if (strategy := extra.get("patch_strategy")) not in (None, "none", "best_fit"):
            raise ValueError(f"`patch_strategy` must be 'none' or 'best_fit', but is {strategy!r}.")
        settings = {"max_new_tokens": numbers.get("max_completion_tokens", numbers.get("max_tokens"))}
        settings["max_new_tokens"] = settings["max_new_tokens"] or _DEFAULT_MAX_TOKENS
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
        sampling = sampling or {"num_frames": DEFAULT_NUM_FRAMES}
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


REQUEST: ContextVar[ChatRequest] = ContextVar("request")
"""What the task at hand answers."""


class ChatHandler(ChatCompletionHandler):
    """Transformers' handler of chats, for requests that are whole."""

    async def handle_request(self, body: dict, request_id: str) -> StreamingResponse | JSONResponse:
        """
        As [`ChatCompletionHandler.handle_request`]. Whatever is wrong before the first token is known has a status and a
        reason, in a stream too, which begins with that token.
        """
        try:
            model = self.model_manager.force_model
            if body.get("model", model) != model:
                raise HTTPException(404, f"The model {body['model']!r} is not served here, but {model!r} is.")
            request = ChatRequest.parse(body)
            body.clear()  # with all pictures and films as text
            REQUEST.set(request)
            try:
                await asyncio.to_thread(request.fetch)
            except asyncio.CancelledError:
                request.is_cancelled.set()
                raise
            generation_config = self.model_manager.load().generation_config
            response = await super().handle_request(request.to_body(model, generation_config), request_id)
            if isinstance(response, StreamingResponse):
                response.body_iterator = await _begun(response.body_iterator, request)
            return response
        except HTTPException:
            raise
        except (ValueError, OSError) as error:
            raise HTTPException(400, str(error)) from error
        except Exception as error:
            log.exception("request %s failed", request_id)
            raise HTTPException(500, f"{type(error).__name__}: {error}") from error


async def _begun(chunks: Any, request: ChatRequest) -> AsyncIterator[str]:
    """A stream after its first token. Raises what went wrong before that."""
    first = [await anext(chunks), await anext(chunks)]  # the role, and what comes after it
    generation: Any = request.generation
    if generation.error is not None:
        raise generation.error

    async def stream():
        async with contextlib.aclosing(chunks):
            for chunk in first:
                yield chunk
            async for chunk in chunks:
                error = generation.error
                yield chunk if error is None else f"data: {json.dumps(error_body(500, str(error)))}\n\n"

    return stream()


class GenerationCancelledError(Exception):
    """The client has gone, or the server stops."""


class Progress:
    """
    What stands for a progress bar: lines in the log, and the place where reading can be broken off.

    Args:
        generation ([`Generation`]): whose.
        total (`int`): of what is to be done, in `unit`s.
        desc, unit (`str`).
        kwargs: what else bars have.
    """

    def __init__(self, generation: "Generation", total: int = 0, desc: str = "", unit: str = "", **kwargs):
        self.generation, self.total, self.desc, self.unit = generation, total, desc, unit
        self.done = self.said = 0

    def update(self, n: int = 1) -> None:
        self.done += n
        self.generation.check()
        # A line for each tenth; none for what is done in one step.
        if self.done < self.total and self.done * 10 // self.total > self.said * 10 // self.total:
            self.said = self.done
            log.info("request %s: %s, %d of %d%s", self.generation.name, self.desc, self.done, self.total, self.unit)

    def close(self) -> None:
        pass


class KeptContext:
    """The one context that is kept: what the last prompt with pictures or films was, up to the last of them."""

    def __init__(self):
        self.context: Any = None
        self.sources: list[str] = []

    def read(self, model: Any, input_ids: torch.Tensor, pixel_values: Any, sources: list[str]) -> tuple[Any, int]:
        """
        Args:
            model ([`LongLLaVAForConditionalGeneration`]).
            input_ids (`torch.LongTensor` of shape `(1, length)`): of the whole prompt.
            pixel_values ([`LazyPixelValues`]): of all pictures and films.
            sources (`list[str]`): what each of them is.

        Returns:
            a context of the prompt up to the last image token, for the caller alone, and how many tokens were known.
        """
        # What is after an image token is tokenised alike, whatever is before it.
        end = int((input_ids[0] == model.config.image_token_id).nonzero()[-1]) + 1
        known = 0 if self.context is None else self.context.num_tokens
        is_prefix = known <= end and self.sources == sources[: len(self.sources)]
        if not known or not is_prefix or not torch.equal(self.context.input_ids, input_ids[:, :known]):
            self.context, self.sources, known = None, [], 0  # before another one takes memory
        if known < end:
            new = pixel_values.skip(len(self.sources))
            self.context = model.prefill(input_ids[:, :end], new if len(new) else None, cache=self.context)
            self.sources = sources
        return self.context.branch(), known


class Generation:
    """
    One call of `generate`: to Transformers' server it is the model, which it calls, and the streamer, which it cancels.

    Args:
        model ([`LongLLaVAForConditionalGeneration`]).
        kept ([`KeptContext`]).
        request ([`ChatRequest`]).
        name (`str`): of the request, for the log.
    """

    def __init__(self, model: Any, kept: KeptContext, request: ChatRequest, name: str):
        self.model, self.kept, self.request, self.name = model, kept, request, name
        self.streamer: Any = None
        self.answer_ids: Any = None
        self.error: Exception | None = None
        self.loop, self.finished = asyncio.get_running_loop(), asyncio.Event()

    @property
    def total_tokens(self) -> int:
        return self.streamer.total_tokens

    def cancel(self) -> None:
        self.request.is_cancelled.set()
        if self.streamer is not None:
            self.streamer.cancel()

    def check(self) -> None:
        """Raises [`GenerationCancelledError`] if nobody waits any more."""
        if self.request.is_cancelled.is_set():
            raise GenerationCancelledError

    def generate(self, input_ids, pixel_values=None, attention_mask=None, streamer=None, tokenizer=None, **kwargs):
        """As [`~LongLLaVAForConditionalGeneration.generate`]."""
        self.streamer, started, known = streamer, time.perf_counter(), 0
        previous = logging.set_tqdm_hook(lambda factory, args, kwargs: Progress(self, *args, **kwargs))
        try:
            self.check()
            if self.request.seed is not None:
                torch.manual_seed(self.request.seed)
            if self.request.sources:
                context, known = self.kept.read(self.model, input_ids, pixel_values, self.request.sources)
                kwargs["cache"] = context
            output = self.model.generate(input_ids=input_ids, streamer=streamer, **kwargs)
            self.answer_ids = output[0, input_ids.shape[1] :]
        except Exception as error:
            self.error = error
            reason = " ".join(str(error).split())  # in one line, whatever a client wrote
            log.info("request %s: %s", self.name, "cancelled" if self.request.is_cancelled.is_set() else reason)
            raise
        finally:
            logging.set_tqdm_hook(previous)
            self.loop.call_soon_threadsafe(self.finished.set)
        log.info(
            "request %s: %d tokens, of which %d known, and %d pictures and films, answered with %d in %.1f seconds",
            *(self.name, input_ids.shape[1], known, len(self.request.sources), len(self.answer_ids)),
            time.perf_counter() - started,
        )
        return output


class GenerationQueue(GenerateManager):
    """Transformers' thread in which one request after the other is answered, each of which can be cancelled."""

    def __init__(self):
        super().__init__()
        self.kept = KeptContext()

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, *args, **kwargs):
        """
        As [`GenerateManager.generate_streaming`].

        Raises:
            ValueError: if the prompt is longer than the model was made for.
        """
        request, length = REQUEST.get(), inputs["input_ids"].shape[-1]
        most = model.config.get_text_config().max_position_embeddings - gen_config.max_new_tokens
        if length > most:
            raise ValueError(
                f"The messages have {length} tokens, and {gen_config.max_new_tokens} are to be generated, but the model takes"
                f" {most + gen_config.max_new_tokens} in all. Show fewer pictures or frames (`num_frames`)."
            )
        generation = request.generation = Generation(model, self.kept, request, request_id)
        queue, _ = super().generate_streaming(generation, processor, inputs, gen_config, request_id, *args, **kwargs)
        return queue, generation

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        """As [`GenerateManager.generate_non_streaming`]."""
        _, generation = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        try:
            await generation.finished.wait()
        except asyncio.CancelledError:
            generation.cancel()
            raise
        if generation.error is not None:
            raise generation.error
        ids = generation.answer_ids
        return processor.decode(ids, skip_special_tokens=True), inputs["input_ids"].shape[-1], ids


class OneQueue(GenerationState):
    """Where Transformers' handler finds the one that generates."""

    def __init__(self):
        super().__init__()
        self.queue = GenerationQueue()

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerationQueue:
        return self.queue


class OneModel(ModelManager):
    """
    Transformers' keeper of models, for one that is loaded from the beginning.

    Args:
        model (`str`): folder or Hub id.
        device (`str`).
        quantization (`str`): as for [`named_quantization`].
    """

    def __init__(self, model: str, device: str, quantization: str):
        self.quantization_config = named_quantization(quantization)
        super().__init__(device=device, force_model=model)

    def get_quantization_config(self) -> Any:
        return self.quantization_config

    def load(self) -> Any:
        """The model."""
        return self.load_model_and_processor(self.process_model_name(self.force_model))[0]

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The one model; not what else is in the Hub's cache."""
        return [{"id": self.force_model, "object": "model", "owned_by": "", "created": 0}]

    get_gen_models = list_models  # as releases before 5.2x call it


def build_app(models: OneModel) -> Any:
    """Transformers' application, with the routes and errors of this one."""
    state = OneQueue()
    chats = ChatHandler(models, state, chat_template_kwargs={"lazy": True})
    given = {"model_manager": models, "chat_handler": chats, "generation_state": state}
    parameters = inspect.signature(build_server).parameters
    others = {name: None for name, p in parameters.items() if name.endswith("_handler") and name not in given}
    app = build_server(**given, **others)
    # The others would load any model, unload this one, or take prompts that no processor has looked at.
    app.router.routes[:] = [route for route in app.routes if getattr(route, "path", None) in PATHS]

    @app.exception_handler(StarletteHTTPException)
    async def refuse(request, error):
        detail = f"{error.detail}: here are {', '.join(PATHS)}." if error.detail == "Not Found" else str(error.detail)
        return JSONResponse(error_body(error.status_code, detail), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request, error):
        reasons = "; ".join(f"{one['msg']} {one.get('ctx', {}).get('error', '')}".strip() for one in error.errors())
        return JSONResponse(error_body(400, f"The body must be a JSON object: {reasons}."), 400)

    app.add_middleware(Gate)
    return app


def serve(model: str, device: str, quantization: str = "none", host: str = "127.0.0.1", port: int = 8000) -> None:
    """
    Serve a model until interrupted.

    Args:
        model (`str`): folder or Hub id.
        device (`str`): where to run.
        quantization (`str`): of the weights, while they are loaded; as for [`named_quantization`].
        host (`str`), port (`int`): where to listen; at port 0 on one that is free.

    Raises:
        OSError, ValueError: if the model cannot be loaded, or the address cannot be listened at.
    """
    LIMITS.allow_local_files = False  # a client's text is no path
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            raise OSError(
                f"{host}:{port} cannot be listened at: {getattr(error, 'strerror', None) or error}."
            ) from error
        register_for_serving()
        app = build_app(OneModel(model, device, quantization))
        config = uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=10)
        listener.listen()
        at = f"[{host}]" if ":" in host else host
        print(f"`{model}` is served at http://{at}:{listener.getsockname()[1]}/v1, one request at a time.", flush=True)
        uvicorn.Server(config).run(sockets=[listener])


__all__ = ["build_app", "register_for_serving", "serve"]
