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
from .drawing import CSS, draw_facts, draw_strip


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
try:
    import gradio as gr
    from gradio import processing_utils
except ImportError as error:
    raise ImportError(f"`longllava web` needs Gradio: `pip install longllava_hf[web]` ({error}).") from None

_MAX_TABS = 64  # that are remembered; past them, the one that was left alone for longest begins anew
_FONTS = ["system-ui", "sans-serif"]  # none that are fetched


@dataclass
class Tab:
    """What one tab of a browser has: a conversation, and files that wait for a question, with their strips."""

    session: Session
    files: dict[str, tuple[Visual, str]] = field(default_factory=dict)
    chat: list[dict[str, str]] = field(default_factory=list)
    strip: str = ""
    stopped: threading.Event = field(default_factory=threading.Event)


def build_page(session: Session, name: str, num_frames: int | None = None) -> gr.Blocks:
    """The page, on which each tab has a conversation of its own, and one question is answered at a time."""
    tabs: OrderedDict[str | None, Tab] = OrderedDict()

    def tab_of(request: gr.Request) -> Tab:
        tab = tabs[request.session_hash] = tabs.pop(request.session_hash, None) or Tab(session.fork())
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
        gr.on([anew.click, chat.clear], begin_anew, None, [chat, facts, strip, files, question, stop], queue=False)
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
        theme=gr.themes.Soft(font=_FONTS, font_mono=["monospace"]),
    )  # fmt: skip
    print(f"The page is at {url}; Ctrl-C ends it.", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


__all__ = ["build_page", "open_page"]
