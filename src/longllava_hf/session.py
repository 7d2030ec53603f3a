# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""A conversation about pictures and films: what the command line and the page do with a model."""

import contextlib
import copy
import io
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import TextIteratorStreamer

from .context_longllava import LongLLaVAContext
from .image_processing_longllava import open_picture
from .processing_longllava import DEFAULT_NUM_FRAMES
from .sources_longllava import NotAPictureError, NotAVideoError, read_source
from .video_longllava import ANIMATIONS, AnimationFile, VideoFile


@dataclass
class Visual:
    """A picture or a video, once it is known which of the two a file holds."""

    path: str
    kind: str
    content: Any

    @property
    def block(self) -> dict[str, Any]:
        return {"type": self.kind, self.kind: self.content}

    def describe(self) -> dict[str, Any]:
        frames = {"frames": len(self.content)} if self.kind == "video" else {}
        return {"path": self.path, "kind": self.kind, **frames}


def open_visual(path: str, num_frames: int | None = None, fps: float | None = None, name: str | None = None) -> Visual:
    """
    A picture or a video, told by its content and not by its name.

    Args:
        path (`str`): a path or URL.
        num_frames, fps: which frames of a video, as for [`VideoFile`]; 128 frames unless told.
        name (`str`, *optional*): what to call it in errors, by default `path`.

    Raises:
        ValueError: if it is neither, empty or damaged.
        OSError: if it does not exist.
    """
    name, num_frames = f"`{name or path}`", DEFAULT_NUM_FRAMES if num_frames is None and fps is None else num_frames
    file = read_source(path)
    content = file.getvalue() if isinstance(file, io.BytesIO) else path  # what was fetched is fetched once
    try:
        with open_picture(content, name) as image:
            kind, pages = image.format, getattr(image, "n_frames", 1)
    except NotAPictureError as not_a_picture:
        try:
            return Visual(path, "video", VideoFile(content, num_frames=num_frames, fps=fps, name=name))
        except NotAVideoError as not_a_video:
            raise ValueError(
                f"{name} is neither a picture nor a video. As a picture: {not_a_picture} As a video: {not_a_video}"
            ) from None
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"{name} is damaged or truncated: {error}") from error
    if pages > 1 and kind in ANIMATIONS:
        return Visual(path, "video", AnimationFile(content, num_frames=num_frames, fps=fps, name=name))
    if pages > 1 and kind == "TIFF":
        print(f"{name} has {pages} pages, of which the first is read.", file=sys.stderr)
    return Visual(path, "image", content)


class AnswerStoppedError(Exception):
    """An answer was stopped before its end."""


@contextlib.contextmanager
def _stopped_by(event: threading.Event | None, model: Any) -> Iterator[None]:
    """Raise [`AnswerStoppedError`] at the next step once the event is set: a batch of pictures, a chunk, a token."""

    def check(*_) -> None:
        if event.is_set():  # type: ignore[union-attr]
            raise AnswerStoppedError("The answer was stopped.")

    modules = [] if event is None else [model, model.get_submodule("model.vision_tower")]
    handles = [module.register_forward_pre_hook(check) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Session:
    """
    A model, its processor, and one conversation, of which only what is new is computed each turn.

    Args:
        model ([`LongLLaVAForConditionalGeneration`]): several sessions may share it, one at a time.
        processor ([`LongLLaVAProcessor`]): its own.
        max_new_tokens (`int`, defaults to 256): of an answer.
        prefill_chunk_size (`int`, *optional*): as for `model.prefill`.
        high_resolution (`bool`, defaults to `False`): whether large pictures are also cut into sub-images.
        context (`str`, *optional*): file of a kept context, which the conversation then begins with.

    Raises:
        ValueError: if the context is of another model or processor, or was not kept by `longllava`.
        OSError: if there is no such file, or it is damaged.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        max_new_tokens: int = 256,
        prefill_chunk_size: int | None = None,
        high_resolution: bool = False,
        context: str | None = None,
    ):
        self.model, self.processor = model, processor
        self.max_new_tokens, self.prefill_chunk_size = max_new_tokens, prefill_chunk_size
        self.settings = {"lazy": True, **({"patch_strategy": "best_fit"} if high_resolution else {})}
        self.context = self.model.new_context()
        if context is not None:
            self.context = LongLLaVAContext.load(context, self.model, self.processor)
            if self.context.metadata.get("last") not in ("image", "video"):
                raise ValueError(
                    f"The context `{context}` does not say what it ends with: `longllava` did not keep it."
                )

    def fork(self) -> "Session":
        """Another conversation with the same model and settings, from the same beginning."""
        session = copy.copy(self)
        session.context = self.context.branch()
        return session

    def _prepare(self, content: list[dict[str, Any]]) -> Any:
        """What the model takes for a message of the user."""
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=self.settings,
        )

    def _after_visual(self, kind: str, content: list[dict[str, Any]]) -> tuple[torch.Tensor, Any]:
        """Ids and pictures of a message that goes on after the last image token of a picture or film of that kind."""
        side = self.processor.image_processor.crop_size["height"]
        stand_in = Image.new("RGB", (side, side))
        block = {"type": kind, kind: [stand_in] if kind == "video" else stand_in}
        alone = int((self._prepare([block])["input_ids"] == self.processor.image_token_id).sum())
        inputs = self._prepare([block, *content])
        ids, pixel_values = inputs["input_ids"], inputs["pixel_values"].skip(1)
        placeholders = (ids[0] == self.processor.image_token_id).nonzero()[:, 0]
        return ids[:, int(placeholders[alone - 1]) + 1 :], pixel_values if len(pixel_values) else None

    def _line_break(self) -> torch.Tensor:
        """What stands between an answer and the next turn."""
        bos = self.processor.tokenizer.bos_token
        ids = self.processor.tokenizer(f"x\n{bos}", add_special_tokens=False)["input_ids"]
        return torch.tensor([ids[1:-1]])

    def _new_inputs(self, content: list[dict[str, Any]]) -> tuple[torch.Tensor, Any]:
        """Ids and pictures of the next message, without what is known already."""
        if (kind := self.context.metadata.get("last")) is not None:
            return self._after_visual(kind, content)
        inputs = self._prepare(content)
        before = [self._line_break()] if self.context.num_tokens else []
        return torch.cat([*before, inputs["input_ids"]], dim=1), inputs.get("pixel_values")

    def show(self, visuals: list[Visual]) -> None:
        """Read pictures and films before anything is asked about them."""
        ids, pixel_values = self._new_inputs([*(v.block for v in visuals), {"type": "text", "text": "?"}])
        # Tokens after an image token do not depend on what is before it, so here is where to stop.
        end = int((ids[0] == self.processor.image_token_id).nonzero()[-1, 0]) + 1
        ids, shown = ids[:, :end].to(self.model.device), self.context.metadata.get("files", [])
        with self.context.restored_on_error():
            self.model.prefill(ids, pixel_values, cache=self.context, prefill_chunk_size=self.prefill_chunk_size)
            self.context.metadata = {"last": visuals[-1].kind, "files": [*shown, *(v.describe() for v in visuals)]}

    def ask(
        self,
        visuals: list[Visual],
        question: str,
        streamer: Any = None,
        stopped: threading.Event | None = None,
    ) -> dict[str, Any]:
        """
        Answer one turn; the conversation so far is kept. Whatever goes wrong leaves it as it was.

        Args:
            visuals (`list[Visual]`): what is shown with the question.
            question (`str`).
            streamer ([`TextStreamer`], *optional*): as for `generate`.
            stopped (`threading.Event`, *optional*): ends the answer once it is set.

        Returns:
            `dict`: the answer, the files that it is about, how many tokens were known (`context_tokens`), read
                (`prompt_tokens`) and written (`new_tokens`), and seconds.

        Raises:
            ValueError: if a file is damaged, or the question has control tokens in it.
            AnswerStoppedError: if `stopped` was set.
        """
        started = time.perf_counter()
        content = [*(visual.block for visual in visuals), {"type": "text", "text": question}]
        ids, pixel_values = self._new_inputs(content)
        known = self.context.num_tokens
        files = [*self.context.metadata.get("files", []), *(visual.describe() for visual in visuals)]
        prepared = time.perf_counter()
        with torch.inference_mode(), self.context.restored_on_error(), _stopped_by(stopped, self.model):
            output = self.model.generate(
                input_ids=ids.to(self.model.device),
                pixel_values=pixel_values,
                cache=self.context,
                max_new_tokens=self.max_new_tokens,
                prefill_chunk_size=self.prefill_chunk_size,
                streamer=streamer,
                do_sample=False,
            )
            self.context.metadata = {}
        generated, answer_ids = time.perf_counter(), output[0, ids.shape[1] :]
        return {
            "answer": self.processor.decode(answer_ids, skip_special_tokens=True).strip(),
            "files": files,
            "context_tokens": known,
            "prompt_tokens": ids.shape[1],
            "new_tokens": len(answer_ids),
            "seconds": {"prepare": round(prepared - started, 3), "generate": round(generated - prepared, 3)},
        }

    def stream(
        self, visuals: list[Visual], question: str, stopped: threading.Event | None = None
    ) -> Iterator[dict[str, Any]]:
        """
        As [`~Session.ask`], as the answer grows: `{"answer": ...}` with what there is so far, then all that `ask` returns.
        To give the iterator up stops the answer.
        """
        stopped = threading.Event() if stopped is None else stopped
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with ThreadPoolExecutor(1) as executor:
            answer = executor.submit(self.ask, visuals, question, streamer, stopped)
            # Also where it fails, of which a streamer knows nothing.
            answer.add_done_callback(lambda _: streamer.text_queue.put(streamer.stop_signal))
            so_far = ""
            try:
                for text in streamer:
                    so_far += text
                    yield {"answer": so_far}
                yield answer.result()
            finally:
                stopped.set()


__all__ = ["AnswerStoppedError", "Session", "Visual", "open_visual"]
