"""
`longllava web` in a real browser. It needs Gradio and Selenium (`pip install -e ".[web]" selenium`), and Debian's Chromium
(`apt-get install chromium chromium-driver`). `python -m modeling_tests.test_web docs/web.png` takes the README's picture.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from longllava_hf import TINY

from .conftest import free_port
from .test_longllava_tiny import DIGITS, FILM


MISSING = [name for name in ("gradio", "selenium") if importlib.util.find_spec(name) is None]
MISSING += [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed")]

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1100,900"),
]
# Writes down where a process connects to, but for this machine.
WATCH = """
import sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = arguments[1][0] if event == "socket.connect" and isinstance(arguments[1], tuple) else arguments[0]
        if isinstance(host, str) and host not in ("127.0.0.1", "localhost", "::1", "0.0.0.0"):
            open({file!r}, "a").write(f"{{event}} {{host}}\\n")
sys.addaudithook(watch)
"""


@contextlib.contextmanager
def page_of(folder: Path, model: str = TINY, *options: str):
    """The address of a page that another process serves, and the file of the hosts that it connects to."""
    port, connections = free_port(), folder / "connections"
    connections.touch()
    (folder / "sitecustomize.py").write_text(WATCH.format(file=str(connections)))
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "GRADIO_TEMP_DIR": str(folder / "uploads")}
    command = [sys.executable, "-m", "longllava_hf.cli", "web", model, "--port", str(port), *options]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 120
        while "The page is at" not in (said := (folder / "log").read_text()):
            assert server.poll() is None and time.monotonic() < end, said
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", connections
    finally:
        server.terminate()
        server.wait(30)


@contextlib.contextmanager
def browser(folder: Path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in [*FLAGS, f"--user-data-dir={folder}"]:
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    def __init__(self, driver, url: str):
        self.driver = driver
        driver.get(url)
        self.wait(lambda: self.find("#question textarea"))

    def find(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def wait(self, condition, seconds: float = 120):
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(StaleElementReferenceException):
                if found := condition():
                    return found
            assert time.monotonic() < end, self.find("body")[0].text
            time.sleep(0.1)

    def upload(self, *files) -> None:
        self.wait(lambda: self.find("#files input[type=file]"))[0].send_keys("\n".join(map(str, files)))

    def press(self, selector: str) -> None:
        from selenium.common.exceptions import WebDriverException

        def pressed():
            with contextlib.suppress(WebDriverException):  # as long as something is in front of it
                return [button.click() for button in self.find(selector) if button.is_enabled()]

        self.wait(pressed)

    def ask(self, question: str) -> None:
        self.wait(lambda: [box for box in self.find("#question textarea") if box.is_enabled()])
        self.find("#question textarea")[0].send_keys(question)
        self.press("#ask")

    @property
    def answers(self) -> list[str]:
        return [element.text.strip() for element in self.find("#chat [data-testid=bot]")]

    def answer(self, number: int) -> str:
        """That of the turn with this number, once it is complete."""
        self.wait(lambda: len(self.answers) > number and self.find("#question textarea")[0].is_enabled())
        return self.answers[number]

    @property
    def facts(self) -> dict[str, float]:
        pairs = [element.text.splitlines() for element in self.find("#facts .facts div")]
        return {name: float(value.replace(",", "")) for value, name in pairs}

    def complaint(self) -> str:
        text = self.wait(lambda: (found := self.find(".toast-body")) and found[0].text)
        self.press(".toast-close")
        self.wait(lambda: not self.find(".toast-body"))
        assert "Traceback" not in text and "/" not in text.replace("N/A", ""), text
        return text


def foreign_requests(driver) -> list[str]:
    """What the browser asked others than this machine for."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith("http://127.0.0.1") for url in urls)
    return [url for url in urls if not url.startswith(("http://127.0.0.1", "data:", "blob:", "chrome:"))]


def test_pictures_films_and_errors(tmp_path):
    (tmp_path / "notes.png").write_text("These are notes, and no picture at all.\n" * 20)
    film = Path(FILM).read_bytes()
    (tmp_path / "damaged.mp4").write_bytes(film[: len(film) // 2])
    with page_of(tmp_path) as (url, connections), browser(tmp_path / "profile") as driver:
        page = Page(driver, url)
        page.upload(DIGITS["three"])
        page.wait(lambda: len(page.find("#strip figure")) == 1)
        page.ask("Which digit is this?")
        assert page.answer(0) == "3"
        assert page.facts["tokens reused"] == 0 and page.facts["tokens written"] >= 1

        page.press("#chat button[aria-label=Clear]")
        page.wait(lambda: not page.answers and not page.find("#strip figure"))
        page.upload(FILM)
        page.wait(lambda: len(page.find("#strip figure")) == 64)
        captions = [element.get_attribute("textContent") for element in page.find("#strip figure")]
        assert captions[0] == "0:00.00" and captions == sorted(captions) and len(set(captions)) == 64
        page.ask("Which digit appears in this film?")
        assert page.answer(0) == "5"
        first = page.facts
        assert first["tokens reused"] == 0 and first["tokens read"] > 64 and first["MB in memory"] > 50

        page.ask("Which digit appears in this film?")
        assert page.answer(1) == "5"
        second = page.facts
        assert second["tokens reused"] == first["tokens read"] + first["tokens written"] - 1
        assert second["tokens read"] < 64
        assert len(page.find("#strip figure")) == 64  # what the conversation is about

        page.upload(tmp_path / "notes.png")
        assert "notes.png is neither a picture nor a video" in page.complaint().replace("`", "")
        page.upload(tmp_path / "damaged.mp4")
        assert "`damaged.mp4` is not a video that FFmpeg can read" in page.complaint()
        page.press("#ask")
        assert "There is no question" in page.complaint()
        page.ask("What does <image> show?")
        assert "<image>" in page.answer(2) and page.answer(2).endswith("This is not part of the conversation.]")
        assert page.find("#question textarea")[0].get_property("value") == "What does <image> show?"
        page.find("#question textarea")[0].clear()
        page.ask("Which digit appears in this film?")
        assert page.answer(3) == "5" and page.facts["tokens reused"] > second["tokens reused"]

        assert foreign_requests(driver) == [] and connections.read_text() == ""
    assert "Traceback" not in (tmp_path / "log").read_text()


def wordy(folder: Path, least: int) -> str:
    """The small checkpoint, with answers of at least so many tokens."""
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "min_new_tokens": least}))
    return str(folder)


RECORD = """
window.lengths = [];
new MutationObserver(() => {
    const all = document.querySelectorAll("#chat [data-testid=bot]");
    if (all.length) window.lengths.push(all[all.length - 1].textContent.trim().length);
}).observe(document.querySelector("#chat"), {childList: true, subtree: true, characterData: true});
"""


def test_streams_stops_and_tabs(tmp_path):
    model = wordy(tmp_path / "wordy", 5000)
    with page_of(tmp_path, model, "--max-new-tokens", "5000") as (url, _), browser(tmp_path / "profile") as driver:
        page = Page(driver, url)
        page.upload(DIGITS["three"])
        page.wait(lambda: page.find("#strip figure"))
        driver.execute_script(RECORD)
        page.ask("Which digit is this?")
        page.wait(lambda: len(set(driver.execute_script("return window.lengths"))) > 5)  # as it grows
        page.press("#stop")
        assert page.answer(0).endswith("[The answer was stopped. This is not part of the conversation.]")
        assert not page.find("#facts .facts")
        # The question stands there again. A conversation that is thrown away while it is answered does not come back.
        page.press("#ask")
        page.wait(lambda: len(page.answers) == 2)
        page.press("#chat button[aria-label=Clear]")
        page.wait(lambda: not page.answers)
        # Another tab waits, until the first one goes away.
        page.ask("Which digit is this?")
        page.wait(lambda: len(page.answers) == 1)
        first = driver.current_window_handle
        driver.switch_to.new_window("tab")
        other = Page(driver, url)
        assert other.answers == []
        other.upload(DIGITS["seven"])
        other.wait(lambda: other.find("#strip figure"))
        other.ask("Which digit is this?")
        second = driver.current_window_handle
        driver.switch_to.window(first)
        driver.close()
        driver.switch_to.window(second)
        other.wait(lambda: other.answers and other.answers[0].startswith("7"))


@pytest.mark.parametrize("option", [("--port", "0"), ("--port", "70000"), ("--device", "xyz"), ("--num-frames", "0")])
def test_options_that_make_no_sense(capsys, option):
    from longllava_hf import cli

    assert cli.main(["web", *option]) == 2
    assert option[0].strip("-") in capsys.readouterr().err.replace("There is no device", "device")


def test_a_request_cannot_make_it_fetch_a_url(tmp_path):
    """Where a file belongs, or in any other input, a URL is refused before anything is looked up."""
    from gradio_client import Client

    with page_of(tmp_path) as (url, connections):
        client = Client(url, verbose=False)
        file = {"path": "http://example.org/x.png", "meta": {"_type": "gradio.FileData"}}
        with pytest.raises(Exception, match="URLs are not fetched"):
            client.predict([file], api_name="/look")
        assert connections.read_text() == ""


if __name__ == "__main__":
    with (
        tempfile.TemporaryDirectory() as name,
        page_of(Path(name)) as (url, _),
        browser(Path(name, "profile")) as driver,
    ):
        page = Page(driver, url)
        page.upload(FILM)
        digit = page.wait(lambda: page.find("#strip figure:nth-child(42)"))[0]
        for turn, question in enumerate(["Which digit appears in this film?", "Which digit is it?"]):
            page.ask(question)
            page.answer(turn)
        driver.set_window_size(1100, 1090)
        driver.execute_script("arguments[0].scrollIntoView({inline: 'center'}); scrollTo(0, 0)", digit)
        time.sleep(1)  # until the last shadows are drawn
        driver.save_screenshot(sys.argv[1])
