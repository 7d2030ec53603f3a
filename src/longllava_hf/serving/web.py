# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""A page to look at: pictures or a film, a question, and the answer as it comes. `longllava web` opens it."""

import base64
import html
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from ..cache_longllava import layer_tensors
from ..image_processing_longllava import load_picture
from ..session import AnswerStoppedError, Session, Visual, open_visual
from ..sources_longllava import LIMITS


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
try:
    import gradio as gr
    from gradio import processing_utils
except ImportError as error:
    raise ImportError(f"`longllava web` needs Gradio: `pip install longllava_hf[web]` ({error}).") from None

# Tabs that are remembered; past them, the one that was left alone for longest begins anew.
_MAX_TABS = 64
_THUMBNAIL = 144  # pixels
_FONTS = ["system-ui", "sans-serif"]
_CSS = """
.strip {display: flex; gap: 6px; overflow-x: auto; padding: 4px 0}
.strip figure {margin: 0; flex: none; text-align: center; font-size: 11px; color: var(--body-text-color-subdued)}
.strip img {height: 84px; border-radius: 6px; display: block; margin: 0}
.facts {display: flex; gap: 8px; flex-wrap: wrap}
.facts div {background: var(--background-fill-secondary); border-radius: 8px; padding: 6px 12px}
.facts b {display: block; font-size: 16px} .facts span {font-size: 11px; color: var(--body-text-color-subdued)}
"""


@dataclass
class Tab:
    """What one tab of a browser has: a conversation, and files that wait for a question, with their strips."""

    session: Session
    files: dict[str, tuple[Visual, str]] = field(default_factory=dict)
    chat: list[dict[str, str]] = field(default_factory=list)
    strip: str = ""
    stopped: threading.Event = field(default_factory=threading.Event)


def draw_strip(visual: Visual) -> str:
    """A picture, or the sampled frames of a film with their times, small, as HTML."""
    content, captions = visual.content, [html.escape(os.path.basename(visual.path))]
    if visual.kind == "video":
        times = content.timestamps or [None] * len(content)
        captions = ["" if t is None else f"{int(t // 60)}:{t % 60:05.2f}" for t in times]
    figures = []
    for image, caption in zip(content if visual.kind == "video" else [load_picture(content)], captions):
        file = io.BytesIO()
        image.thumbnail((2 * _THUMBNAIL, _THUMBNAIL))
        image.convert("RGB").save(file, "JPEG")
        data = base64.b64encode(file.getvalue()).decode()
        figures.append(f'<figure><img src="data:image/jpeg;base64,{data}">{caption}</figure>')
    return "".join(figures)


def draw_facts(result: dict[str, Any], session: Session) -> str:
    """Tokens, seconds and bytes of an answer, as HTML."""
    cuda = session.model.device.type == "cuda"
    used = torch.cuda.max_memory_allocated(session.model.device) if cuda else psutil.Process().memory_info().rss
    kept = sum(x.nbytes for layer in session.context.cache.layers for x in layer_tensors(layer).values())
    facts = {
        "tokens reused": f"{result['context_tokens']:,}",
        "tokens read": f"{result['prompt_tokens']:,}",
        "tokens written": f"{result['new_tokens']:,}",
        "seconds": f"{sum(result['seconds'].values()):.2f}",
        "MB on the GPU, peak" if cuda else "MB in memory": f"{used / 1e6:,.0f}",
        "MB of them kept for the next question": f"{kept / 1e6:,.1f}",
    }
    return f'<div class="facts">{"".join(f"<div><b>{v}</b><span>{k}</span></div>" for k, v in facts.items())}</div>'


def build_page(session: Session, name: str, num_frames: int | None = None) -> gr.Blocks:
    """
    The page, on which each tab has a conversation of its own, and one question is answered at a time.

    Args:
        session ([`Session`]): whose model and settings are used.
        name (`str`): of the model.
        num_frames (`int`, *optional*): of each film, by default 128.
    """
    tabs: OrderedDict[str | None, Tab] = OrderedDict()

    def tab_of(request: gr.Request) -> Tab:
        tab = tabs.pop(request.session_hash, None) or Tab(session.fork())
        tabs[request.session_hash] = tab
        if len(tabs) > _MAX_TABS:
            tabs.popitem(last=False)[1].stopped.set()
        return tab

    def forget(request: gr.Request) -> None:
        if (tab := tabs.pop(request.session_hash, None)) is not None:
            tab.stopped.set()

    def stop_answer(request: gr.Request) -> None:
        tab_of(request).stopped.set()

    def complain(error: Exception) -> None:
        known = isinstance(error, (ValueError, OSError, ImportError, AnswerStoppedError))
        said = str(error) if known else f"Something unforeseen went wrong: {type(error).__name__}: {error}"
        gr.Warning(html.escape(said), duration=None, title="This did not work")

    def look(paths: list[str] | None, request: gr.Request) -> Any:
        tab, good = tab_of(request), {}
        for path in paths or []:
            try:
                if (seen := tab.files.get(path)) is None:
                    visual = open_visual(path, num_frames, name=os.path.basename(path))
                    seen = visual, draw_strip(visual)
                good[path] = seen
            except Exception as error:
                complain(error)
        tab.files = good
        kept = gr.skip() if len(good) == len(paths or []) else list(good) or None
        return kept, f'<div class="strip">{"".join(strip for _, strip in good.values()) or tab.strip}</div>'

    def begin(text: str, request: gr.Request) -> Any:
        if not text.strip():
            raise gr.Error("There is no question: write one first.", title="This did not work", print_exception=False)
        tab, tab.stopped = tab_of(request), threading.Event()
        names = ", ".join(os.path.basename(path) for path in tab.files)
        tab.chat.append({"role": "user", "content": f"[{names}]\n{text}" if names else text})
        return tab.chat, gr.update(value="", interactive=False), gr.update(interactive=True)

    def answer(text: str, paths: list[str] | None, request: gr.Request) -> Iterator[dict[Any, Any]]:
        tab = tab_of(request)
        reply, done = {"role": "assistant", "content": ""}, {}
        try:
            visuals = [tab.files[path][0] for path in paths or []]
            for result in tab.session.stream(visuals, text, tab.stopped):
                reply["content"] = result["answer"]
                yield {chat: [*tab.chat, reply]}
            if visuals:
                tab.strip, tab.files = "".join(strip for _, strip in tab.files.values()), {}
            done = {facts: draw_facts(result, tab.session), files: None}
        except Exception as error:  # the conversation is as it was before the question, which can be asked again
            complain(error)
            reply["content"] += " [not part of the conversation]"
            done = {question: gr.update(value=text, interactive=True)}
        tab.chat.append(reply)
        yield {question: gr.update(interactive=True), stop: gr.update(interactive=False), chat: tab.chat, **done}

    def begin_anew(request: gr.Request) -> Any:
        forget(request)
        return [], "", "", None, gr.update(value="", interactive=True), gr.update(interactive=False)

    with gr.Blocks(title="LongLLaVA", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"## LongLLaVA\n`{os.path.basename(name.rstrip(os.sep))}`")
        files = gr.File(label="Drop pictures or a film", file_count="multiple", height=130, elem_id="files")
        strip, facts = gr.HTML(elem_id="strip"), gr.HTML(elem_id="facts", render=False)
        chat = gr.Chatbot(show_label=False, height=300, render_markdown=False, buttons=[], elem_id="chat")
        facts.render()
        with gr.Row():
            question = gr.Textbox(
                placeholder="Ask about them, and ask again", show_label=False, scale=6, elem_id="question"
            )
            ask, stop = gr.Button("Ask", variant="primary", elem_id="ask"), gr.Button("Stop", interactive=False)
            anew = gr.Button("New conversation")
        asked = gr.State()
        gr.on([files.upload, files.delete, files.clear], look, files, [files, strip])
        # What was asked is kept apart, as the box is empty by the time it is answered.
        gr.on([ask.click, question.submit], lambda text: text, question, asked, queue=False).then(
            begin, asked, [chat, question, stop], queue=False
        ).success(answer, [asked, files], [chat, facts, files, question, stop], show_progress_on=[chat])
        stop.click(stop_answer, queue=False)
        anew.click(begin_anew, None, [chat, facts, strip, files, question, stop], queue=False)
        page.unload(forget)
    return page


async def _refuse_url(url: str, cache_dir: str) -> str:
    raise gr.Error("Files are uploaded; URLs are not fetched.", print_exception=False)


def open_page(session: Session, name: str, host: str, port: int, num_frames: int | None = None) -> None:
    """
    Serve the page until the program is interrupted.

    Raises:
        OSError: if nothing can listen there.
    """
    # A request could say a URL where a file belongs, and Gradio would fetch it without our limits.
    processing_utils.async_ssrf_protected_download = _refuse_url
    page = build_page(session, name, num_frames)
    _, url, _ = page.launch(
        server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False, ssr_mode=False, pwa=False,
        enable_monitoring=False, run_history=False, footer_links=[], max_file_size=LIMITS.max_bytes, css=_CSS,
        theme=gr.themes.Soft(font=_FONTS, font_mono=["monospace"]),
    )  # fmt: skip
    print(f"The page is at {url}; Ctrl-C ends it.", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


__all__ = ["build_page", "draw_facts", "draw_strip", "open_page"]
