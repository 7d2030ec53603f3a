"""`longllava serve`: a real server process, asked by the unmodified `openai` client."""

import asyncio
import base64
import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longllava_hf import LIMITS, TINY
from longllava_hf.convert import convert_checkpoint

from .test_cli import fails
from .test_longllava_tiny import DIGITS, FILM, FILM_DIGIT
from .test_sources_longllava import send
from .test_sources_longllava import serve as files_server


pytest.importorskip("fastapi", reason="needs fastapi: longllava_hf[serve]")
pytest.importorskip("uvicorn", reason="needs uvicorn: longllava_hf[serve]")
openai = pytest.importorskip("openai", reason="needs openai: longllava_hf[serve]")
pytest.importorskip("av", reason="needs av: longllava_hf[serve]")

from longllava_hf.serving.server import RequestMiddleware, SingleModelManager, start_stream  # noqa: E402


ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
WHICH, WHICH_IN_FILM = "Which digit is this?", "Which digit appears in this film?"
LONG = "one two three four five six seven eight nine ten " * 1500


class Server:
    """A process that serves a model, its client and its log."""

    def __init__(self, folder: Path, *arguments: str):
        self.log_file = folder / "log.txt"
        command = [sys.executable, "-m", "longllava_hf.cli", "serve", *arguments, "--port", "0"]
        with open(self.log_file, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT)
        self.url = self.wait_for(r"served at (\S+),")[1]
        self.wait_for("startup complete")
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=120)
        self.model = self.client.models.list().data[0].id

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def wait_for(self, pattern: str, start: int = 0, seconds: float = 150) -> re.Match:
        """What matches in the log from a position on, once it is there."""
        ends = time.monotonic() + seconds
        while (found := re.search(pattern, self.log[start:])) is None:
            assert self.process.poll() is None and time.monotonic() < ends, f"no {pattern!r} in:\n{self.log}"
            time.sleep(0.05)
        return found

    def ask(self, content, messages=(), **options):
        messages = [*messages, {"role": "user", "content": content}]
        return self.client.chat.completions.create(model=self.model, messages=messages, **options)

    def answer(self, content, messages=(), **options) -> str:
        return self.ask(content, messages, **options).choices[0].message.content

    def post(self, body: bytes, path: str = "/v1/chat/completions", **headers) -> tuple[int, dict]:
        headers = {"Content-Type": "application/json", **headers}
        request = urllib.request.Request(self.url.removesuffix("/v1") + path, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    @property
    def memory(self) -> int:
        """Bytes that the process has in memory."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def running(folder: Path, *arguments: str):
    server = Server(folder, *arguments)
    try:
        yield server
    finally:
        server.process.terminate()
        assert server.process.wait(60) is not None


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("server")) as server:
        yield server


def data_url(file: str, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(Path(file).read_bytes()).decode()}"


def picture(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def film(url: str) -> dict:
    return {"type": "video_url", "video_url": {"url": url}}


def text(text: str) -> dict:
    return {"type": "text", "text": text}


THREE, SEVEN = (picture(data_url(DIGITS[name])) for name in ("three", "seven"))
FILM_PART = film(data_url(FILM, "video/mp4"))


# Right requests


@torch.inference_mode()
def test_text_as_transformers_answers_it(server, tiny_model, tiny_processor):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is this?"}]
    inputs = tiny_processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = tiny_model.generate(**inputs, max_new_tokens=20)
    expected = tiny_processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    found = server.ask("What is this?", messages[:1], max_completion_tokens=20)
    assert found.choices[0].message.content == expected
    assert found.usage.prompt_tokens == inputs["input_ids"].shape[1]


def test_pictures(server):
    assert server.answer([THREE, text(WHICH)]) == "3"
    question = text("Which digit is the third picture?")
    assert server.answer([THREE, THREE, SEVEN, question]) == "7"
    before = [{"role": "user", "content": [THREE, text(WHICH)]}, {"role": "assistant", "content": "3"}]
    assert server.answer([SEVEN, text(WHICH)], before) == "7"
    assert server.answer([THREE, text(WHICH)], [{"role": "system", "content": "You read digits."}]) == "3"


def test_a_film_has_128_frames(server, tiny_processor):
    found = server.ask([FILM_PART, text(WHICH_IN_FILM)])
    assert found.choices[0].message.content == FILM_DIGIT
    conversation = [{"role": "user", "content": [{"type": "video", "path": FILM}, text(WHICH_IN_FILM)]}]
    inputs = tiny_processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert found.usage.prompt_tokens == inputs["input_ids"].shape[1]
    fewer = server.ask([FILM_PART, text(WHICH_IN_FILM)], extra_body={"chat_template_kwargs": {"num_frames": 4}})
    assert fewer.usage.prompt_tokens < found.usage.prompt_tokens / 4


def test_streams(server):
    for content, answer in (([THREE, text(WHICH)], "3"), ([FILM_PART, text(WHICH_IN_FILM)], FILM_DIGIT)):
        chunks = list(server.ask(content, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].usage.completion_tokens > 0


def test_the_longest_answer(server):
    assert server.ask([THREE, text(WHICH)], max_tokens=1).choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_stop(server, stream):
    """The first stop string, which is in several tokens here, and what follows it are no part of an answer."""

    def answer(**options) -> tuple[str, str]:
        # A digit for each token, and no end.
        answer = server.ask("What is this?", logit_bias={"2": -100}, max_tokens=9, stream=stream, **options)
        chunks = list(answer) if stream else [answer]
        parts = [chunk.choices[0].delta if stream else chunk.choices[0].message for chunk in chunks]
        return "".join(part.content or "" for part in parts), chunks[-1].choices[0].finish_reason

    whole, reason = answer()
    assert re.fullmatch("[0-9]{9}", whole) and reason == "length"
    assert answer(stop=whole[2:5]) == (whole[: whole.index(whole[2:5])], "stop")
    assert answer(stop=["x", whole[6:8], whole[3:5]]) == (
        whole[: min(map(whole.index, (whole[6:8], whole[3:5])))],
        "stop",
    )
    assert answer(stop=[f"{whole[:3]}x", f"{whole[-2:]}x"]) == (whole, "length")


def test_sampling(server):
    draws = [[server.answer("A story", temperature=2, seed=seed, max_tokens=8) for seed in range(8)] for _ in range(2)]
    assert draws[0] == draws[1] and len(set(draws[0])) > 1
    assert server.answer([THREE, text(WHICH)], temperature=0, top_p=0.5) == "3"


def test_many_clients(server):
    """100 requests from 8 clients at once."""
    film_question = [FILM_PART, text(WHICH_IN_FILM)]
    kinds = [
        ([THREE, text(WHICH)], "3"),
        ([SEVEN, text(WHICH)], "7"),
        ([THREE, SEVEN, text("Which digit is the second picture?")], "7"),
        ([SEVEN, THREE, SEVEN, text("Which digit is the second picture?")], "3"),
    ]
    work = [kinds[i % 4] if i % 25 else (film_question, FILM_DIGIT) for i in range(100)]

    def ask(number: int) -> bool:
        content, answer = work[number]
        if number % 3:
            return server.answer(content) == answer
        return "".join(chunk.choices[0].delta.content or "" for chunk in server.ask(content, stream=True)) == answer

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(100)))


def test_a_film_is_read_once(server):
    start = len(server.log)
    assert server.answer([THREE, text(WHICH)]) == "3"
    for _ in range(2):
        assert server.answer([FILM_PART, text(WHICH_IN_FILM)]) == FILM_DIGIT
    more = [
        {"role": "user", "content": [FILM_PART, text(WHICH_IN_FILM)]},
        {"role": "assistant", "content": FILM_DIGIT},
    ]
    assert server.answer([SEVEN, text(WHICH)], more) == "7"
    assert server.answer([SEVEN, text(WHICH)]) == "7"  # as many tokens as for the first picture, and another picture
    assert server.answer([THREE, text(WHICH)]) == "3"
    server.wait_for("(?s)(answered with .*){6}", start)
    totals = [int(total) for total in re.findall(r"received, (\d+) tokens", server.log[start:])]
    known = [int(tokens) for tokens in re.findall(r"(\d+) of the prompt were known", server.log[start:])]
    assert known[1] == 0 and 0 < totals[1] - known[2] < 40
    assert known[3] == known[2] and known[4:] == [0, 0]


# URLs


@pytest.fixture(scope="module")
def local_server(tmp_path_factory):
    """One that reads the URLs of this machine, and serves the published layout in int8."""
    folder = tmp_path_factory.mktemp("server")
    convert_checkpoint(TINY, folder / "published", to="published")
    options = ("--quantization", "int8", "--allow-private-addresses")
    with running(folder, str(folder / "published"), *options) as server:
        yield server


def test_urls(local_server):
    contents = {"/three.png": DIGITS["three"], "/seven.png": DIGITS["seven"], "/film.mp4": FILM}

    def answer(handler):
        if handler.path in contents:
            send(handler, Path(contents[handler.path]).read_bytes())
        else:
            send(handler, b"", 404)

    with files_server(answer) as (url, asked):
        parts = [picture(f"{url}/three.png"), picture(f"{url}/seven.png"), text("Which digit is the second picture?")]
        assert local_server.answer(parts) == "7"
        assert local_server.answer([film(f"{url}/film.mp4"), text(WHICH_IN_FILM)]) == FILM_DIGIT
        assert asked == ["/three.png", "/seven.png", "/film.mp4"]
        with pytest.raises(openai.BadRequestError, match="Not Found"):
            local_server.answer([picture(f"{url}/none.png"), text(WHICH)])
    with pytest.raises(openai.BadRequestError, match="could not be read"):
        local_server.answer([picture(f"{url}/three.png"), text(WHICH)])


def test_private_addresses(server):
    with files_server(send) as (url, asked):
        for part in (picture(f"{url}/x.png"), film(f"{url}/x.mp4"), picture(url.replace("127.0.0.1", "localhost"))):
            for stream in (False, True):
                with pytest.raises(openai.BadRequestError, match="not a public one"):
                    server.answer([part, text(WHICH)], stream=stream)
        assert asked == []


# Malformed requests


def truncated(file: str, kind: str) -> str:
    data = Path(file).read_bytes()
    return f"data:{kind};base64,{base64.b64encode(data[: len(data) // 2]).decode()}"


USER = {"role": "user", "content": "x"}
MALFORMED = {
    "no messages": ({}, "messages"),
    "messages are none": ({"messages": "x"}, "messages"),
    "no message": ({"messages": []}, "messages"),
    "a message is none": ({"messages": ["x"]}, "messages.0"),
    "no role": ({"messages": [{"content": "x"}]}, "role"),
    "an unknown role": ({"messages": [{"role": "tool", "content": "x"}]}, "'tool'"),
    "a role is none": ({"messages": [{"role": 1, "content": "x"}]}, "role"),
    "a late system message": ({"messages": [USER, {"role": "system", "content": "x"}]}, "system"),
    "a named message": ({"messages": [{**USER, "name": "x"}]}, "messages.0.name"),
    "no content": ({"messages": [{"role": "user"}]}, "content"),
    "content is none": ({"messages": [{"role": "user", "content": 5}]}, "content"),
    "a part is none": ([5], "content.0"),
    "an unknown part": ([{"type": "input_audio", "input_audio": {}}], "input_audio"),
    "no text": ([{"type": "text"}], "text"),
    "text is none": ([{"type": "text", "text": 5}], "text"),
    "no URL": ([{"type": "image_url"}], "image_url"),
    "a URL is none": ([{"type": "image_url", "image_url": {"url": 5}}], "image_url.url"),
    "half a character": ([text("\ud800")], "surrogates not allowed"),
    "a control token": ([text("a <|endoftext|>")], "endoftext"),
    "a marker": ([text("<img>")], "<img>"),
    "a placeholder": ([text("<image>")], "<image>"),
    "broken base64": ([picture("data:image/png;base64,AA%%"), text(WHICH)], "base64"),
    "no picture": ([picture("data:image/png;base64," + "QUJD" * 40), text(WHICH)], "not a picture"),
    "an empty picture": ([picture("data:image/png;base64,"), text(WHICH)], "0 bytes"),
    "half a picture": ([picture(truncated(DIGITS["three"], "image/png")), text(WHICH)], "truncated"),
    "no film": ([film("data:video/mp4;base64," + "QUJD" * 40), text(WHICH)], "not a video"),
    "half a film": ([film(truncated(FILM, "video/mp4")), text(WHICH)], "not a video"),
    "a picture as a film": ([picture(data_url(FILM, "image/png")), text(WHICH)], "not a picture"),
    "a path": ([picture(DIGITS["three"]), text(WHICH)], "http"),
    "a URL of a file": ([picture(f"file://{DIGITS['three']}"), text(WHICH)], "http"),
    "a path as a film": ([film(FILM), text(WHICH)], "http"),
    "data that is a path": ([picture(f"data:{DIGITS['three']}"), text(WHICH)], "base64"),
    "another protocol": ([picture("ftp://example.com/x.png"), text(WHICH)], "http"),
    "no such host": ([picture("http://no-such-host.invalid/x.png"), text(WHICH)], "could not be read"),
    "an address of this machine": ([picture("http://[::1]:1/x.png"), text(WHICH)], "could not be read"),
    "a shown answer": ({"messages": [{"role": "assistant", "content": [THREE]}]}, "only the user"),
    "tool calls": ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "tool_calls"),
    "a path in other settings": ({"chat_template_kwargs": {"images": [DIGITS["three"]]}}, "chat_template_kwargs"),
    "another template": ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
    "no frames": ({"chat_template_kwargs": {"num_frames": 0}}, "num_frames"),
    "another configuration": ({"generation_config": "{}"}, "generation_config"),
    "a bias that is none": ({"logit_bias": {"2": "x"}}, "logit_bias"),
    "a bias of no token": ({"logit_bias": {"x": 1}}, "logit_bias"),
    "a bias of a token that is not there": ({"logit_bias": {"99999999": 1}}, "vocab"),
    "a stop of half a character": ({"stop": "\ud800"}, "surrogates not allowed"),
    "a stop that is none": ({"stop": [3]}, "stop.0"),
    "an empty stop": ({"stop": ""}, "stop.0"),
    "a long stop": ({"stop": "x" * 101}, "stop.0"),
    "many stops": ({"stop": list("abcde")}, "stop"),
    "several answers": ({"n": 2}, "`n`"),
    "penalties": ({"frequency_penalty": 0.5}, "frequency_penalty"),
    "tools": ({"tools": [{"type": "function"}]}, "tools"),
    "a format": ({"response_format": {"type": "json_object"}}, "response_format"),
    "an unknown option": ({"no_such_option": 1}, "no_such_option"),
    "a negative number of tokens": ({"max_tokens": -1}, "max_tokens"),
    "a fraction of tokens": ({"max_tokens": 1.5}, "max_tokens"),
    "a number as text": ({"max_tokens": "5"}, "max_tokens"),
    "truth as a number": ({"max_completion_tokens": True}, "max_completion_tokens"),
    "a temperature that is none": ({"temperature": float("nan")}, "temperature"),
    "a cold temperature": ({"temperature": -1}, "temperature"),
    "an infinite seed": ({"seed": 1 << 70}, "seed"),
    "a stream that is none": ({"stream": "yes"}, "stream"),
    "a model that is none": ({"model": 5}, "model"),
    "more tokens than the model takes": ([text(LONG * 3)], "tokens"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(server, case):
    given, reason = MALFORMED[case]
    body = (
        {"messages": [{"role": "user", "content": given}]}
        if isinstance(given, list)
        else {"messages": [USER], **given}
    )
    if case == "no messages":
        body = {}
    for stream in (False, True):
        status, answer = server.post(json.dumps({"stream": stream, **body}).encode())
        assert 400 <= status < 500, answer
        assert answer["error"]["type"] == "invalid_request_error"
        assert re.search(reason, answer["error"]["message"]), answer


BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "no object": b"[]",
    "no UTF-8": b'{"messages": "\xff"}',
    "deep": b'{"messages":' + b"[" * 100_000,
}


@pytest.mark.parametrize("case", BODIES)
def test_bodies_that_are_none(server, case):
    status, answer = server.post(BODIES[case])
    assert 400 <= status < 500 and answer["error"]["message"], answer


def test_other_places(server):
    """Routes of Transformers' server that load and unload models, or take prompts that nothing has looked at."""
    body = json.dumps({"model": server.model, "prompt": "x", "input": "x"}).encode()
    for path in (
        "/v1/completions",
        "/v1/responses",
        "/v1/systemone",
        "/v1/audio/transcriptions",
        "/load_model",
        "/reset",
    ):
        status, answer = server.post(body, path)
        assert status == 404 and "/v1/chat/completions" in answer["error"]["message"]
    status, answer = server.post(json.dumps({"model": "another", "messages": [USER]}).encode())
    assert status == 404 and "another" in answer["error"]["message"]
    status, answer = server.post(b"{}", "/v1/models")
    assert status == 405 and answer["error"]["message"]


def test_it_lives(server):
    """After all of the above."""
    assert server.answer([THREE, text(WHICH)]) == "3"
    assert "Traceback" not in server.log


def test_a_body_that_is_too_large(monkeypatch):
    """Through the middleware alone, as half a gigabyte is much for a test."""

    async def app(scope, receive, send):
        raise AssertionError("a request that was too large came through")

    async def ask(chunks: list[bytes], seconds: float = 0) -> list[dict]:
        sent: list[dict] = []

        async def receive():
            await asyncio.sleep(seconds)
            return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}

        async def keep(message):
            sent.append(message)

        await RequestMiddleware(app)({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, keep)
        return sent

    monkeypatch.setattr(LIMITS, "max_bytes", 100)
    start, body = asyncio.run(ask([bytes(60)] * 3))
    assert start["status"] == 413 and "100 bytes" in json.loads(body["body"])["error"]["message"]
    monkeypatch.setattr(LIMITS, "timeout", 0.1)
    start, body = asyncio.run(ask([b"x"], seconds=5))
    assert start["status"] == 408 and "0.1 seconds" in json.loads(body["body"])["error"]["message"]


# Clients that go away


def ask_without_waiting(server, content, **options) -> http.client.HTTPConnection:
    """A request whose client may go away by `close`, before there is an answer."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://").removesuffix("/v1"))
    body = {"messages": [{"role": "user", "content": content}], **options}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away(server, stream):
    """Its place is free at once, also while its prompt is read, and while it waits for another."""
    start, options = len(server.log), {"stream": stream, "logit_bias": {"2": -100}, "max_tokens": 4000}
    clients = [ask_without_waiting(server, LONG, **options) for _ in range(2)]
    server.wait_for("Prefilling, [0-9]+ of [0-9]+ tokens", start)
    server.wait_for("(?s)received, .*received, ", start)
    for client in clients:
        client.close()
    server.wait_for("(?s)cancelled.*cancelled", start)
    assert server.answer([THREE, text(WHICH)]) == "3"
    assert "Traceback" not in server.log and "answered with 4000" not in server.log


def test_a_stream_that_is_closed(server):
    start = len(server.log)
    stream = server.ask("What is this?", stream=True, logit_bias={"2": -100}, max_tokens=4000)
    for _, _ in zip(stream, range(3)):
        pass
    stream.close()
    server.wait_for("cancelled", start)
    assert server.answer([THREE, text(WHICH)]) == "3"


def test_clients_that_go_away_while_their_urls_are_read(local_server):
    """More of them than there are places."""
    answering = threading.Event()
    with files_server(lambda handler: answering.wait(60)) as (url, asked):
        try:
            clients = [ask_without_waiting(local_server, [picture(url), text(WHICH)]) for _ in range(20)]
            ends = time.monotonic() + 25
            while len(asked) < 16 and time.monotonic() < ends:
                time.sleep(0.05)
            assert len(asked) == 16
            for client in clients:
                client.close()
            impatient = local_server.client.with_options(timeout=LIMITS.timeout / 2)
            message = {"role": "user", "content": [THREE, text(WHICH)]}
            answer = impatient.chat.completions.create(model=local_server.model, messages=[message])
            assert answer.choices[0].message.content == "3"
        finally:
            answering.set()


def test_an_error_within_a_stream():
    """Is JSON, whatever it says."""

    async def collect() -> list[str]:
        generation = SimpleNamespace(error=None)

        async def chunks():
            yield "role"
            yield "text"
            generation.error = RuntimeError('out of "memory"')
            yield 'data: {"error": "out of "memory""}\n\n'

        return [chunk async for chunk in await start_stream(chunks(), generation)]

    *_, last = asyncio.run(collect())
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == 'out of "memory"'


# Memory


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the memory of a process is read from /proc")
@pytest.mark.parametrize("requests", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_memory_is_flat(server, requests):
    def ask(number: int) -> None:
        parts = [THREE, SEVEN][: 1 + number % 2]
        if number % 5 == 0:  # never the same twice
            server.post(json.dumps({"messages": [{"role": "user", "content": [*parts, {"type": "x"}]}]}).encode())
        for _ in server.ask([*parts, text(WHICH)], stream=True) if number % 3 else [server.ask([*parts, text(WHICH)])]:
            pass

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(30)))
        before = server.memory
        list(pool.map(ask, range(requests)))
    assert server.memory - before < 16 << 20


# How it begins


def test_what_cannot_be_served(server, capsys, monkeypatch):
    monkeypatch.setattr(LIMITS, "allow_local_files", True)  # which is set, and then set back
    port = server.url.split(":")[-1].removesuffix("/v1")
    assert "neither a folder nor a Hub id" in fails(capsys, "serve", "no/such/folder/here")
    assert "cuda:99" in fails(capsys, "serve", "--device", "cuda:99")
    for place in (port, "70000"):
        assert f"{place} cannot be listened at" in fails(capsys, "serve", "--port", place)


def test_without_the_extra(capsys, monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    monkeypatch.delitem(sys.modules, "longllava_hf.serving.server")
    assert "pip install 'longllava_hf[serve]'" in fails(capsys, "serve")


def test_a_folder_without_a_model(tmp_path):
    """Found before anything is served."""
    with pytest.raises((OSError, ValueError), match=re.escape(str(tmp_path))):
        SingleModelManager(str(tmp_path), "cpu", "none")


# What the documentation says


def test_snippets(server, monkeypatch):
    """Of the page about serving, one after the other."""
    page = Path(__file__).parents[1] / "docs" / "serving.md"
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(page.parents[1])
    monkeypatch.setattr(LIMITS, "max_bytes", LIMITS.max_bytes)
    served = []
    monkeypatch.setattr("longllava_hf.serving.server.serve", lambda *args, **kwargs: served.append((args, kwargs)))
    names: dict = {}
    for snippet in snippets:
        exec(snippet.replace("http://127.0.0.1:8000/v1", server.url), names)
    assert names["answer"] == FILM_DIGIT and names["streamed"] == "3" and len(served) == 1
