"""The command line under bad input, bad places and interruptions: one line on stderr, an exit code, and nothing lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from longllava_hf import LIMITS, TINY, cli
from longllava_hf.video_longllava import AnimationFile

from .test_longllava_tiny import DIGITS, FILM
from .test_sources_longllava import picture, send, serve


LONGLLAVA = [sys.executable, "-m", "longllava_hf.cli"]
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def run(*arguments, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 120, "env": OFFLINE, **options}
    return subprocess.run([*map(os.fsencode, (*LONGLLAVA, *arguments))], check=False, **options)


def fails(capsys, *arguments, code=2) -> str:
    """What a command says on stderr that must fail."""
    try:
        found = cli.main([str(argument) for argument in arguments])
    except SystemExit as exit_:  # argparse's
        found = exit_.code
    captured = capsys.readouterr()
    assert found == code, captured.err
    assert "Traceback" not in captured.err
    return captured.err


# Numbers, devices and words


NUMBERS = [
    *(
        ("--prefill-chunk-size", "-3"),
        ("--prefill-chunk-size", "0"),
        ("--max-new-tokens", "0"),
        ("--num-frames", "-1"),
    ),
    *(("--max-new-tokens", "9" * 30), ("--fps", "0"), ("--fps", "nan"), ("--fps", "inf"), ("--num-frames", "x")),
]


@pytest.mark.parametrize(("option", "value"), NUMBERS)
def test_numbers_that_make_no_sense(capsys, option, value):
    assert option in fails(capsys, "ask", DIGITS["three"], "?", option, value)


@pytest.mark.parametrize("device", ["xyz", "cuda:99", "cpu:x", "meta", ""])
def test_devices_that_are_not_there(capsys, device):
    if device:
        assert device.split(":")[0] in fails(capsys, "ask", DIGITS["three"], "?", "--device", device)


def test_a_question_is_missing(capsys):
    assert "There is no question" in fails(capsys, "ask", DIGITS["three"])


def test_what_is_not_utf_8(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.png"
    shutil.copy(DIGITS["three"], name)
    done = run("ask", name, "Which digit is this?", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["answer"] == "3", done.stderr
    for arguments in ((name, b"\xffWhich?"), (b"\xfe.png", b"?")):
        done = run("ask", *arguments)
        assert done.returncode == 2 and done.stderr.startswith(b"error: ") and b"Traceback" not in done.stderr
    assert b"must be UTF-8" in run("ask", name, b"\xffWhich?").stderr


# Places


def test_where_nothing_can_be_written(capsys, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(cli, "open_visual", lambda *_: read.append(1))
    for target, reason in (
        (tmp_path / "no" / "x", "does not exist"),
        (tmp_path, "is a folder"),
        ("/proc/x", "cannot be written"),
    ):
        assert reason in fails(capsys, "ask", FILM, "?", "--keep", target)
    monkeypatch.setattr("tempfile.TemporaryFile", full_disk)
    assert "cannot be written: No space left on device" in fails(capsys, "ask", FILM, "?", "--keep", tmp_path / "x")
    assert not read  # nor was the film


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_disk_that_fills_up(capsys, tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with open("/dev/full", "w") as full:
        done = run("ask", DIGITS["three"], "Which digit is this?", "--json", stdout=full)
    assert done.returncode == 2 and b"No space left" in done.stderr and b"Traceback" not in done.stderr


def test_a_closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    done = run("info", stdout=writer)
    os.close(writer)
    assert done.returncode in (0, 141) and done.stderr == b""


def test_a_model_that_is_nowhere(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        "longllava_hf.cli.HfApi", lambda: __import__("huggingface_hub").HfApi(endpoint="http://127.0.0.1:9")
    )
    for command in (["ask", DIGITS["three"], "?", "--model"], ["info"], ["plan"], ["convert"]):
        arguments = [*command, "someone/some-model", *([str(tmp_path / "x")] if command == ["convert"] else [])]
        started = time.monotonic()
        assert "the Hub cannot be asked" in fails(capsys, *arguments)
        assert time.monotonic() - started < 15
    assert "is neither a folder nor a Hub id" in fails(capsys, "info", "../nowhere/at/all")
    (tmp_path / "file").write_text("x")
    assert "is a file" in fails(capsys, "info", tmp_path / "file")


def test_urls_of_this_machine(capsys, monkeypatch):
    with serve(lambda handler: send(handler, picture()[1])) as (url, asked):
        assert "not a public one" in fails(capsys, "ask", f"{url}/x.png", "?")
        assert asked == []
        monkeypatch.setattr(LIMITS, "allow_private_addresses", False)
        arguments = ["ask", f"{url}/x.png", "Which digit is this?", "--allow-private-addresses", "--json"]
        assert cli.main(arguments) == 0
        assert asked == ["/x.png"]  # once
        assert json.loads(capsys.readouterr().out)["files"] == [{"path": f"{url}/x.png", "kind": "image"}]


# Pictures with pages, pictures that move


def test_pages_are_no_frames(tmp_path, capsys):
    pages = [Image.new("RGB", (60, 40), (40 * i,) * 3) for i in range(3)]
    for name, kind in (
        ("x.tiff", "image"),
        ("x.mpo", "image"),
        ("x.gif", "video"),
        ("x.png", "video"),
        ("x.webp", "video"),
    ):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        visual = cli.open_visual(str(tmp_path / name))
        assert visual.kind == kind, name
        if kind == "video":
            assert isinstance(visual.content, AnimationFile) and len(visual.content) == 3
    assert "x.tiff` has 3 pages, of which the first is read" in capsys.readouterr().err
    assert len(cli.open_visual(str(tmp_path / "x.gif"), num_frames=2).content) == 2


def test_an_animation_takes_the_memory_of_a_frame(tmp_path):
    from .test_image_processing_longllava import in_a_process

    noise = np.random.default_rng(0).integers(0, 2, (30, 1500, 1500), dtype=np.uint8)
    frames = [Image.fromarray(frame * 255).convert("P") for frame in noise]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    grown = in_a_process(f"""
        from longllava_hf.cli import open_visual
        processor = LongLLaVAImageProcessor()
        processor(Image.new("RGB", (300, 300)))
        begin()
        film = open_visual({str(tmp_path / "x.gif")!r}, num_frames=20).content
        assert len(film) == 20 and len(processor(film)["pixel_values"]) == 20
    """)
    assert grown < 120  # a frame in RGB takes 9


# Interruptions


class Chat:
    """A conversation in a process of its own, at a terminal's speed."""

    def __init__(self, *arguments):
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": OFFLINE}
        # Whatever started the tests may have signals ignored.
        script = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
        script += "; from longllava_hf.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", script, "chat", *arguments]
        self.process = subprocess.Popen(command, **options, start_new_session=True)
        self.watch = threading.Timer(120, self.process.kill)
        self.watch.start()

    def say(self, line: str) -> None:
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def read(self) -> str:
        return self.process.stdout.readline().decode()

    def interrupt(self) -> None:
        os.kill(self.process.pid, signal.SIGINT)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_twice_ends_a_chat():
    chat = Chat(DIGITS["three"], "--json")
    try:
        chat.say("Which digit is this?")
        assert json.loads(chat.read())["answer"] == "3"
        chat.interrupt()
        assert chat.read() == "\n" and "once more" in chat.read()
        chat.say("And now, which digit is this?")
        answer = json.loads(chat.read())
        assert answer["context_tokens"] > 0  # as before
        chat.interrupt()
        assert chat.read() == "\n" and "once more" in chat.read()
        chat.interrupt()
        assert chat.read() == "interrupted\n"
        assert chat.process.wait(timeout=20) == 130
    finally:
        chat.watch.cancel()
        chat.process.kill()


def test_ctrl_c_ends_an_answer_and_keeps_the_conversation(monkeypatch, capsys):
    """The question that was not answered can be asked again, about pictures that were to go with it too."""
    question, calls = "Which digit is this?", []
    lines = iter([question, f"/show {DIGITS['seven']}", question, question, "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    generate = cli.LongLLaVAForConditionalGeneration.generate

    def interrupted(self, *args, **kwargs):
        calls.append(kwargs["cache"].num_tokens)
        output = generate(self, *args, **kwargs)
        if len(calls) == 2:
            raise KeyboardInterrupt  # at the last moment
        return output

    monkeypatch.setattr(cli.LongLLaVAForConditionalGeneration, "generate", interrupted)
    assert cli.main(["chat", DIGITS["three"], "--json"]) == 0
    captured = capsys.readouterr()
    first, second = map(json.loads, captured.out.splitlines())
    assert first["answer"] == "3" and "once more" in captured.err
    assert calls[1] == calls[2] == second["context_tokens"]
    assert [file["path"] for file in second["files"]] == [DIGITS["seven"]]


def test_no_traceback_of_what_was_not_foreseen(monkeypatch, capsys):
    def fault(*_):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(cli, "describe_model", fault)
    assert "unforeseen: RuntimeError: a fault of ours" in fails(capsys, "info", TINY, code=1)
    monkeypatch.setenv("LONGLLAVA_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        cli.main(["info", TINY])


def test_a_line_that_is_no_text_loses_no_other(tmp_path):
    lines = b"Which digit is this?\n" + b"\xffWhich?\n" + b"Which digit is this?\n"
    done = run("chat", DIGITS["three"], "--json", input=lines)
    assert done.returncode == 0 and b"The question must be UTF-8" in done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_an_input_that_cannot_be_read(monkeypatch, capsys):
    def broken(prompt=""):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.input", broken)
    assert "Input/output error" in fails(capsys, "chat", DIGITS["three"])
