# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""A page to look at: pictures or a film, a question, and the answer as it comes. `longllava web` opens it."""

import html
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..session import AnswerStoppedError, Session, Visual, open_visual
from ..sources_longllava import LIMITS
from .drawing import CSS, draw_facts, draw_message, draw_strip


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
try:
    import gradio as gr
    from gradio import processing_utils
except ImportError as error:
    raise ImportError(f"`longllava web` needs Gradio: `pip install longllava_hf[web]` ({error}).") from None

_MAX_TABS = 64  # that are remembered; past them, the one that was left alone for longest begins anew


@dataclass
class Tab:
    """What one tab of a browser has: a conversation, and files that wait for a question, with their strips."""

    session: Session
    files: dict[str, tuple[Visual, str]] = field(default_factory=dict)
    chat: list[dict[str, str]] = field(default_factory=list)
    strip: str = ""  # of what was asked about last
    stopped: threading.Event = field(default_factory=threading.Event)


def explain(error: Exception) -> str:
    known = isinstance(error, (ValueError, OSError, ImportError, AnswerStoppedError))
    return str(error) if known else f"Something unforeseen went wrong, {error!r}."


def build_page(session: Session, name: str, num_frames: int | None = None) -> gr.Blocks:
    """The page, on which each tab has a conversation of its own, and one question is answered at a time."""
    tabs: OrderedDict[str | None, Tab] = OrderedDict()

    def tab_of(request: gr.Request) -> Tab:
        tab = tabs.get(request.session_hash) or Tab(session.fork())
        tabs[request.session_hash] = tab
        tabs.move_to_end(request.session_hash)
        if len(tabs) > _MAX_TABS:
            tabs.popitem(last=False)[1].stopped.set()
        return tab

    def stop_answer(request: gr.Request) -> None:
        tab_of(request).stopped.set()

    def forget(request: gr.Request) -> None:
        if (tab := tabs.pop(request.session_hash, None)) is not None:
            tab.stopped.set()

    def open_file(tab: Tab, path: str) -> tuple[Visual, str]:
        if path not in tab.files:
            visual = open_visual(path, num_frames, name=os.path.basename(path))
            tab.files[path] = visual, draw_strip(visual)
        return tab.files[path]

    def look(paths: list[str] | None, request: gr.Request) -> tuple[list[str] | None, str]:
        tab, opened = tab_of(request), {}
        for path in paths or []:
            try:
                opened[path] = open_file(tab, path)
            except Exception as error:
                gr.Warning(html.escape(explain(error)), duration=None)
        tab.files = opened
        return list(opened) or None, "".join(strip for _, strip in opened.values()) or tab.strip

    def answer(text: str, paths: list[str] | None, request: gr.Request) -> Iterator[dict[Any, Any]]:
        if not text.strip():
            gr.Warning("There is no question: write one first.", duration=None)
            return
        tab, paths, reply = tab_of(request), paths or [], ""
        tab.stopped = threading.Event()
        names = ", ".join(os.path.basename(path) for path in paths)
        tab.chat.append(draw_message("user", f"[{names}]\n{text}" if names else text))
        yield {chat: tab.chat, question: gr.update(value="", interactive=False), stop: gr.update(interactive=True)}
        try:
            opened = [open_file(tab, path) for path in paths]
            for result in tab.session.stream([visual for visual, _ in opened], text, tab.stopped):
                reply = result["answer"]
                if not tab.stopped.is_set():
                    yield {chat: [*tab.chat, draw_message("assistant", reply)]}
            tab.strip = "".join(strip for _, strip in opened) or tab.strip
            for path in paths:
                tab.files.pop(path, None)
            done = {facts: draw_facts(result, tab.session), files: list(tab.files) or None}
        except Exception as error:  # the conversation is as it was before the question, which can be asked again
            reply += f" [{explain(error)} This is not part of the conversation.]"
            done = {question: gr.update(value=text, interactive=True)}
        tab.chat.append(draw_message("assistant", reply))
        if tabs.get(request.session_hash) is not tab:  # else Gradio shows the last update of what was thrown away
            tab, done = tab_of(request), {}
        yield {chat: tab.chat, question: gr.update(interactive=True), stop: gr.update(interactive=False), **done}

    def begin_anew(request: gr.Request) -> Any:
        forget(request)
        return [], "", "", None, gr.update(value="", interactive=True), gr.update(interactive=False)

    with gr.Blocks(title="LongLLaVA", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"## LongLLaVA\n`{os.path.basename(name.rstrip(os.sep))}`")
        files = gr.File(label="Drop pictures or a film", file_count="multiple", height=130, elem_id="files")
        strip = gr.HTML(elem_id="strip")
        chat = gr.Chatbot(show_label=False, height=340, render_markdown=False, buttons=[], elem_id="chat")
        with gr.Row():
            question = gr.Textbox(placeholder="Ask, and ask again", show_label=False, scale=6, elem_id="question")
            ask = gr.Button("Ask", variant="primary", elem_id="ask")
            stop = gr.Button("Stop", interactive=False, elem_id="stop")
        facts = gr.HTML(elem_id="facts")
        gr.on([files.upload, files.delete, files.clear], look, files, [files, strip])
        told = [chat, facts, files, question, stop]
        gr.on([ask.click, question.submit], answer, [question, files], told, show_progress_on=[chat])
        stop.click(stop_answer)
        chat.clear(begin_anew, None, [chat, facts, strip, files, question, stop])
        page.unload(forget)
    return page


async def _refuse_url(url: str, cache_dir: str) -> str:
    raise gr.Error("Files are uploaded; URLs are not fetched.", print_exception=False)


def open_page(session: Session, name: str, host: str, port: int, num_frames: int | None = None) -> None:
    """Serve the page until the program is interrupted. Raises `OSError` if nothing can listen there."""
    # A request could say a URL where a file belongs, and Gradio would fetch it without our limits.
    processing_utils.async_ssrf_protected_download = _refuse_url
    page = build_page(session, name, num_frames)
    _, url, _ = page.launch(
        server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False, ssr_mode=False, pwa=False,
        enable_monitoring=False, run_history=False, footer_links=[], max_file_size=LIMITS.max_bytes, css=CSS,
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # none that are fetched
    )  # fmt: skip
    print(f"The page is at {url}; Ctrl-C ends it.", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


__all__ = ["build_page", "open_page"]
