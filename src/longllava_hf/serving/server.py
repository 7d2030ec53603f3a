# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
`longllava serve`: Transformers' own OpenAI-compatible server, with this package's model, limits and errors. Routes, answers,
streams and the thread that generates are Transformers'; what is here is given to it through public methods.

| here | what it is to the server |
|---|---|
| `register_for_serving` | how it finds the classes of a model type |
| `RequestMiddleware` | middleware: bounded bodies, and requests whose client has gone are cancelled |
| `ChatHandler` | its handler of chats: pictures and films are fetched outside the event loop, errors have a reason |
| `Generation`, `CancellableGenerateManager` | its manager of `generate`: can be cancelled, says how far it is, keeps a context |
"""

import asyncio
import contextlib
import inspect
import json
import logging as python_logging
import os
import socket
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging
from transformers.utils.import_utils import is_serve_available

from ..configuration_longllava import LlavaJambaConfig, LongLLaVAConfig
from ..int8_longllava import named_quantization
from ..modeling_longllava import LongLLaVAForConditionalGeneration
from ..sources_longllava import LIMITS


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

from .chat_request import ChatRequest


# Uvicorn's own log, which the server writes to anyway.
logger = python_logging.getLogger("uvicorn.error")

PATHS = ("/v1/chat/completions", "/v1/models", "/health")
# Requests that are read, fetched or waiting for the model at a time; others wait with their bodies unread.
_MAX_REQUESTS = 16
_ERROR_LENGTH = 2000
# Threads that read pictures and films. More than places: a URL that a client asked for who has gone is read to its end.
_READERS = 64


def register_for_serving() -> None:
    """
    Let Transformers' server find the kind of the model, in the table of models that see. In the table of multimodal ones
    too, the server would look for sound in films.
    """
    for config_class in (LongLLaVAConfig, LlavaJambaConfig):
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[config_class.model_type] = (
            LongLLaVAForConditionalGeneration.__name__
        )


def error_body(status: int, message: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    # Half a surrogate pair is no UTF-8, and a client knows what it wrote.
    message = message[:_ERROR_LENGTH].encode(errors="backslashreplace").decode()
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class RequestMiddleware:
    """
    ASGI middleware: reads at most [`LIMITS`]`.max_bytes` of a body within `LIMITS.timeout` seconds, lets a bounded number
    of requests in, and cancels those whose client has gone.
    """

    def __init__(self, app: Any):
        self.app, self.places = app, asyncio.Semaphore(_MAX_REQUESTS)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        async with self.places:
            try:
                body = await asyncio.wait_for(self.read_body(receive), LIMITS.timeout)
            except (ValueError, asyncio.TimeoutError) as error:
                late = f"The body took more than {LIMITS.timeout:g} seconds, which is `longllava_hf.LIMITS.timeout`."
                status, message = (413, str(error)) if isinstance(error, ValueError) else (408, late)
                headers = {"Connection": "close"}  # what is left of the body is not read
                return await JSONResponse(error_body(status, message), status, headers)(scope, receive, send)
            if body is not None:
                await self.answer(scope, body, receive, send)

    @staticmethod
    async def read_body(receive) -> bytes | None:
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

    async def answer(self, scope, body: bytes, receive, send) -> None:
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


GENERATION: ContextVar["Generation"] = ContextVar("generation")
"""What the task at hand waits for: Transformers' handler has no argument for it."""


class ChatHandler(ChatCompletionHandler):
    """Transformers' handler of chats, for requests that are checked and whose pictures and films are read."""

    model_manager: "SingleModelManager"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.readers = ThreadPoolExecutor(_READERS, thread_name_prefix="read")
        self.kept = KeptContext()

    async def handle_request(self, body: dict, request_id: str) -> StreamingResponse | JSONResponse:
        """
        As [`ChatCompletionHandler.handle_request`]. Whatever is wrong before the first token is known has a status and a
        reason, in a stream too, which begins with that token.
        """
        try:
            request = ChatRequest.parse(body)
            body.clear()
            name = self.model_manager.name
            if request.model not in (None, name):
                raise HTTPException(404, f"The model {request.model!r} is not served here, but {name!r} is.")
            model, processor = self.model_manager.load()
            generation = Generation(model, self.kept, request_id, request.seed, request.stop)
            GENERATION.set(generation)
            read = partial(request.read_messages, processor.num_frames, generation.check)
            try:
                reading = asyncio.get_running_loop().run_in_executor(self.readers, read)
                messages, generation.sources = await reading
            except asyncio.CancelledError:
                generation.cancel()
                raise
            body = {"model": name, **request.to_body(messages, model.generation_config)}
            del request, read  # with the text of pictures and films
            response = await super().handle_request(body, request_id)
            if isinstance(response, StreamingResponse):
                response.body_iterator = await start_stream(response.body_iterator, generation)
            return response
        except HTTPException:
            raise
        except (ValueError, OSError) as error:
            raise HTTPException(400, str(error)) from error
        except Exception as error:
            logger.exception("request %s failed", request_id)
            raise HTTPException(500, f"{type(error).__name__}: {error}") from error


async def start_stream(chunks: Any, generation: "Generation") -> AsyncIterator[str]:
    """A stream after its first token. Raises what went wrong before that."""
    first = [await anext(chunks), await anext(chunks)]  # the role, and what comes after it
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
    What stands for a progress bar: lines in the log, and the place where reading a prompt can be broken off.

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
            logger.info(
                "request %s: %s, %d of %d%s", self.generation.name, self.desc, self.done, self.total, self.unit
            )

    def close(self) -> None:
        pass


class KeptContext:
    """The one context that is kept: what the last prompt with pictures or films was, up to the last of them."""

    def __init__(self):
        self.forget()

    def forget(self) -> None:
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
            self.forget()  # before another one takes memory
            known = 0
        if known < end:
            new = pixel_values.skip(len(self.sources))
            self.context = model.prefill(input_ids[:, :end], new if len(new) else None, cache=self.context)
            self.sources = sources
        return self.context.branch(), known


class StopStringQueue:
    """
    The text of a stream up to the first stop string, which may be spread over several items.

    Args:
        queue (`asyncio.Queue`): of text, and what ends a stream.
        stop (`list[str]`): stop strings.
    """

    def __init__(self, queue: asyncio.Queue, stop: list[str]):
        self.queue, self.stop = queue, stop
        self.held = ""  # what may be the beginning of a stop string
        self.end: list[Any] = []

    async def get(self) -> Any:
        while not self.end:
            item = await self.queue.get()
            if not isinstance(item, str):
                text, self.end = self.held, [item]
            else:
                whole = self.held + item
                text = cut_at_stop(whole, self.stop)
                if text == whole:
                    ends = (n for n in range(len(whole)) if any(s.startswith(whole[n:]) for s in self.stop))
                    text = whole[: next(ends, len(whole))]
                else:
                    self.end = [None]
                self.held = whole[len(text) :]
            if text:
                return text
        return self.end[0]

    def get_nowait(self) -> Any:
        raise asyncio.QueueEmpty


def cut_at_stop(text: str, stop: list[str]) -> str:
    """What is before the first stop string."""
    return text[: min((text.find(one) for one in stop if one in text), default=len(text))]


class Generation:
    """
    The answer to one request. To Transformers' server it is the model, which it calls, and the streamer, which it cancels.

    Args:
        model ([`LongLLaVAForConditionalGeneration`]).
        kept ([`KeptContext`]).
        name (`str`): of the request, for the log.
        seed (`int`, *optional*): for what is drawn at random.
        stop (`list[str]`): stop strings.
    """

    def __init__(self, model: Any, kept: KeptContext, name: str, seed: int | None, stop: list[str]):
        self.model, self.kept, self.name, self.seed, self.stop = model, kept, name, seed, stop
        self.sources: list[str] = []  # what each picture and film is
        self.streamer: Any = None
        self.answer_ids: Any = None
        self.error: Exception | None = None
        self.is_cancelled = threading.Event()
        self.loop, self.finished = asyncio.get_running_loop(), asyncio.Event()

    @property
    def total_tokens(self) -> int:
        return self.streamer.total_tokens

    def cancel(self) -> None:
        self.is_cancelled.set()
        if self.streamer is not None:
            self.streamer.cancel()

    def check(self) -> None:
        """Raises [`GenerationCancelledError`] if nobody waits any more."""
        if self.is_cancelled.is_set():
            raise GenerationCancelledError

    def generate(self, input_ids, pixel_values=None, attention_mask=None, streamer=None, tokenizer=None, **kwargs):
        """As [`~LongLLaVAForConditionalGeneration.generate`], in the server's thread for it. `tokenizer` is the processor."""
        self.streamer, started, known = streamer, time.perf_counter(), 0
        previous = logging.set_tqdm_hook(lambda factory, args, kwargs: Progress(self, *args, **kwargs))
        try:
            self.check()
            if self.seed is not None:
                torch.manual_seed(self.seed)
            if self.sources:
                kwargs["cache"], known = self.kept.read(self.model, input_ids, pixel_values, self.sources)
            if self.stop:
                kwargs["tokenizer"] = tokenizer.tokenizer
            output = self.model.generate(input_ids=input_ids, streamer=streamer, **kwargs)
            self.answer_ids = output[0, input_ids.shape[1] :]
        except Exception as error:
            self.error = error
            if isinstance(error, torch.OutOfMemoryError):
                self.kept.forget()
            reason = " ".join(str(error).split())  # in one line, whatever a client wrote
            logger.info("request %s: %s", self.name, "cancelled" if self.is_cancelled.is_set() else reason)
            raise
        finally:
            logging.set_tqdm_hook(previous)
            self.loop.call_soon_threadsafe(self.finished.set)
        logger.info(
            "request %s: answered with %d tokens in %.1f seconds, %d of the prompt were known",
            *(self.name, len(self.answer_ids), time.perf_counter() - started, known),
        )
        return output


class CancellableGenerateManager(GenerateManager):
    """Transformers' thread in which one request after the other is answered, each of which can be cancelled."""

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, *args, **kwargs):
        """
        As [`GenerateManager.generate_streaming`].

        Raises:
            ValueError: if the prompt is longer than the model was made for.
        """
        generation: Any = GENERATION.get()
        length = inputs["input_ids"].shape[-1]
        most = model.config.get_text_config().max_position_embeddings - gen_config.max_new_tokens
        if length > most:
            raise ValueError(
                f"The messages have {length} tokens, and {gen_config.max_new_tokens} are to be generated, but the model takes"
                f" {most + gen_config.max_new_tokens} in all. Show fewer pictures or frames (`num_frames`)."
            )
        logger.info(
            "request %s: received, %d tokens, %d pictures and films", request_id, length, len(generation.sources)
        )
        queue, _ = super().generate_streaming(generation, processor, inputs, gen_config, request_id, *args, **kwargs)
        return StopStringQueue(queue, generation.stop) if generation.stop else queue, generation

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
        text = processor.decode(ids, skip_special_tokens=True)
        return cut_at_stop(text, generation.stop), inputs["input_ids"].shape[-1], ids


class SingleGenerationState(GenerationState):
    """Where Transformers' handler finds the one that generates."""

    def __init__(self):
        super().__init__()
        self.queue = CancellableGenerateManager()

    def get_manager(self, model_id: str, use_cb: bool = False) -> CancellableGenerateManager:
        return self.queue


class SingleModelManager(ModelManager):
    """
    Transformers' keeper of models, for one that is loaded from the beginning.

    Args:
        model (`str`): folder or Hub id.
        device (`str`).
        quantization (`str`): as for [`named_quantization`].
    """

    def __init__(self, model: str, device: str, quantization: str):
        self.name, self.quantization_config = model, named_quantization(quantization)
        super().__init__(device=device, force_model=model)

    def get_quantization_config(self) -> Any:
        return self.quantization_config

    def load(self) -> tuple[Any, Any]:
        """The model and its processor."""
        return self.load_model_and_processor(self.process_model_name(self.name))

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The one model; not what else is in the Hub's cache."""
        return [{"id": self.name, "object": "model", "owned_by": "", "created": 0}]

    get_gen_models = list_models  # as releases before 5.2x call it


def build_app(models: SingleModelManager) -> Any:
    """Transformers' application, with the routes and errors of this one."""
    state = SingleGenerationState()
    chats = ChatHandler(models, state, chat_template_kwargs={"lazy": True})
    given: dict[str, Any] = {"model_manager": models, "chat_handler": chats, "generation_state": state}
    parameters = inspect.signature(build_server).parameters
    others: dict[str, Any] = {
        name: None for name, p in parameters.items() if name.endswith("_handler") and name not in given
    }
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

    app.add_middleware(RequestMiddleware)
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
        if os.name != "nt":  # where it would let two servers listen at one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            raise OSError(
                f"{host}:{port} cannot be listened at: {getattr(error, 'strerror', None) or error}."
            ) from error
        register_for_serving()
        app = build_app(SingleModelManager(model, device, quantization))
        config = uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=10)
        listener.listen()
        at = f"[{host}]" if ":" in host else host
        print(f"`{model}` is served at http://{at}:{listener.getsockname()[1]}/v1, one request at a time.", flush=True)
        uvicorn.Server(config).run(sockets=[listener])


__all__ = ["build_app", "register_for_serving", "serve"]
