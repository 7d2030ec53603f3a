"""What comes from outside: within limits of size, time and place, or refused with the reason."""

import gzip
import http.server
import io
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from longllava_hf import LIMITS, LongLLaVAImageProcessor
from longllava_hf.sources_longllava import download, is_public, read_source


@pytest.fixture
def limits(monkeypatch):
    """A function that changes limits for one test."""

    def change(**values):
        for name, value in values.items():
            monkeypatch.setattr(LIMITS, name, value)

    change(allow_private_addresses=True)
    return change


@contextmanager
def serve(answer):
    """A server on loopback that answers with a function of the handler; the URL, and the paths that were asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            answer(self)

        def log_message(self, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args):  # clients that hang up are what is tested
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()


def send(handler, body=b"", status=200, **headers):
    handler.send_response(status)
    for name, value in {"Content_Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def picture() -> tuple[Image.Image, bytes]:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return image, buffer.getvalue()


def test_a_picture_behind_a_url(limits):
    processor = LongLLaVAImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    image, data = picture()

    def answer(handler):
        send(handler, *((data,) if handler.path == "/picture%20%C3%A9.png" else (b"", 404)))

    with serve(answer) as (url, _):
        found = processor(f"{url}/picture \u00e9.png", return_tensors="pt")["pixel_values"]
        assert torch.equal(found, processor(image, return_tensors="pt")["pixel_values"])
        with pytest.raises(OSError, match=r"nothing\.png` could not be read: .*Not Found"):
            processor(f"{url}/nothing.png")


def test_private_addresses_are_refused_before_anything_is_sent(limits):
    limits(allow_private_addresses=False)
    with serve(lambda handler: send(handler, b"secret")) as (url, asked):
        for name in (url, url.replace("127.0.0.1", "localhost")):
            with pytest.raises(OSError, match=r"127\.0\.0\.1, which is not a public one.*allow_private_addresses"):
                download(name)
        assert asked == []


def test_each_redirect_is_checked(limits, monkeypatch):
    limits(allow_private_addresses=False)
    with serve(lambda handler: send(handler, b"secret")) as (inner, asked):
        with serve(lambda handler: send(handler, status=302, Location=inner)) as (outer, _):
            # The first of the two is taken for a public one.
            admitted = iter([True, False])
            monkeypatch.setattr("longllava_hf.sources_longllava.is_public", lambda address: next(admitted))
            with pytest.raises(OSError, match="not a public one"):
                download(outer)
    assert asked == []


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x", "gopher://x/"])
def test_a_redirect_leads_to_http_alone(limits, target):
    with serve(lambda handler: send(handler, status=302, Location=target)) as (url, _):
        with pytest.raises(OSError, match="could not be read"):
            download(url)


def test_redirects_are_counted(limits):
    def answer(handler):
        number = int(handler.path.strip("/"))
        send(handler, *((b"end",) if number == 0 else (b"", 302)), Location=f"/{number - 1}")

    with serve(answer) as (url, asked):
        assert download(f"{url}/5").read() == b"end"
        asked.clear()
        with pytest.raises(OSError, match="could not be read"):
            download(f"{url}/100")
        assert len(asked) <= 7


def test_the_body_of_a_redirect_is_not_read(limits):
    limits(timeout=3.0)
    sent = []

    def endless(handler):
        if handler.path == "/end":
            return send(handler, b"end")
        handler.send_response(302)
        handler.send_header("Location", "/end")
        handler.end_headers()
        for _ in range(10_000):
            handler.wfile.write(bytes(10_000))
            sent.append(10_000)

    with serve(endless) as (url, _):
        assert download(url).read() == b"end"
    assert sum(sent) < 50_000_000


def test_passwords_are_not_repeated(limits):
    with serve(lambda handler: send(handler, status=404)) as (url, _):
        with pytest.raises(OSError) as error:
            download(url.replace("://", "://user:secret@"))
    assert "secret" not in str(error.value).split("could not be read")[0]


def test_no_more_bytes_than_the_limit(limits):
    limits(max_bytes=100_000)
    sent = []

    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(10_000):
            handler.wfile.write(bytes(10_000))
            sent.append(10_000)

    with serve(endless) as (url, _), pytest.raises(OSError, match="more than 100000 bytes"):
        download(url)
    assert sum(sent) < 50_000_000
    with serve(lambda handler: send(handler, Content_Length="100001")) as (url, _):
        with pytest.raises(OSError, match="more than 100000 bytes"):
            download(url)
    with serve(lambda handler: send(handler, bytes(100_000))) as (url, _):
        assert len(download(url).getvalue()) == 100_000


def test_what_ends_early_is_not_taken_for_whole(limits):
    with serve(lambda handler: send(handler, b"abc", Content_Length="9")) as (url, _):
        with pytest.raises(OSError, match="could not be read"):
            download(url)


def test_nothing_is_unpacked(limits):
    bomb = gzip.compress(bytes(10_000_000))
    with serve(lambda handler: send(handler, bomb, Content_Encoding="gzip")) as (url, _):
        with pytest.raises(OSError, match="compressed"):
            download(url)


@pytest.mark.parametrize("where", ["status", "headers", "body"])
def test_the_time_is_that_of_the_whole(limits, where):
    limits(timeout=1.0)

    def trickle(handler):
        if where == "body":
            send(handler, Content_Length="1000000")
        else:
            handler.wfile.write(b"" if where == "status" else b"HTTP/1.1 200 OK\r\nX: ")
        for _ in range(100):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.1)

    started = time.monotonic()
    with serve(trickle) as (url, _), pytest.raises(OSError, match="more than 1 seconds"):
        download(url)
    assert time.monotonic() - started < 8  # the server goes on for ten


def test_a_connection_that_comes_late_is_cut_too(limits, monkeypatch):
    """Looking up a name takes what it takes; a server that trickles must not profit from it."""
    limits(timeout=0.5)
    find = socket.getaddrinfo
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: (time.sleep(0.8), find(*args, **kwargs))[1])

    def trickle(handler):
        send(handler, Content_Length="1000000")
        for _ in range(100):
            handler.wfile.write(b"x")
            time.sleep(0.1)

    started = time.monotonic()
    with serve(trickle) as (url, _), pytest.raises(OSError, match=r"more than 0\.5 seconds"):
        download(url)
    assert time.monotonic() - started < 8  # the server goes on for ten


PUBLIC = ["8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8"]
PRIVATE = [
    *("2002:7f00:1::", "64:ff9b:1::1", "fec0::1"),
    *("127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1"),
    *("::1", "fe80::1%eth0", "fd00::1", "ff02::1", "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1"),
]


@pytest.mark.parametrize("address", [*PUBLIC, *PRIVATE])
def test_public_addresses(address):
    assert is_public(address) is (address in PUBLIC)


def test_local_files(limits, tmp_path):
    file = tmp_path / "x.png"
    file.write_bytes(picture()[1])
    assert read_source(file) == read_source(file.as_uri()) == str(file)
    limits(allow_local_files=False)
    for name in (file, str(file), file.as_uri(), str(tmp_path)):
        with pytest.raises(OSError, match=r"LIMITS\.allow_local_files"):
            read_source(name)
    assert read_source(file.read_bytes()).read() == file.read_bytes()


def test_limits_are_one_object():
    assert replace(LIMITS) == LIMITS and read_source.__globals__["LIMITS"] is LIMITS
