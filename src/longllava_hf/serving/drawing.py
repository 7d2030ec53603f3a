# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""What the page shows, as HTML: messages, the strip of pictures and frames, and what an answer took."""

import base64
import html
import io
import os
from typing import Any

import psutil
import torch

from ..cache_longllava import layer_tensors
from ..image_processing_longllava import load_picture
from ..session import Session, Visual


_THUMBNAIL = 144  # pixels
CSS = """
.strip {display: inline-flex; max-width: 100%; gap: 6px; overflow-x: auto; padding: 4px 0}
.strip figure {margin: 0; flex: none; text-align: center; font-size: 11px; color: var(--body-text-color-subdued)}
.strip img {height: 84px; border-radius: 6px; display: block; margin: 0}
.facts {display: flex; gap: 8px; flex-wrap: wrap}
.facts div {background: var(--background-fill-secondary); border-radius: 8px; padding: 6px 12px}
.facts b {display: block; font-size: 16px} .facts span {font-size: 11px; color: var(--body-text-color-subdued)}
"""


def draw_message(role: str, text: str) -> dict[str, str]:
    """A message of the chat, which takes what it is given for HTML, with `render_markdown=False` too."""
    return {"role": role, "content": html.escape(text, quote=False)}


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
    return f'<div class="strip">{"".join(figures)}</div>'


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
        "MB kept for the next question": f"{kept / 1e6:,.1f}",
    }
    return f'<div class="facts">{"".join(f"<div><b>{v}</b><span>{k}</span></div>" for k, v in facts.items())}</div>'


__all__ = ["CSS", "draw_facts", "draw_message", "draw_strip"]
