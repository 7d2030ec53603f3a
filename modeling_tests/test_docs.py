"""What the README and the pages say: their snippets and commands are run, and their links lead somewhere."""

import ast
import dataclasses
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tokenize
from glob import glob
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

import longllava_hf
from longllava_hf import LIMITS, cli
from longllava_hf.training.recipe import STAGES, read_recipe


ROOT = Path(__file__).parents[1]
FILM, THREE, SEVEN = (str(ROOT / "examples" / name) for name in ("film.mp4", "three.png", "seven.png"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]

# Read by the tests of what they need, with a server that is running: test_serve.py.
PYTHON_ELSEWHERE = {"serving.md"}
# Trusts the code of a checkpoint, which would stay in this process.
APART = {"hub.md"}
# That their options exist is checked all the same. The first two run until they are stopped, the third writes to the Hub;
# an export and a plan take seconds, and are run as Python and where a page shows what is printed.
NOT_RUN = ("serve", "web", "hub", "plan")

# The names that pages give to files, and what they are here.
FILES = {
    "holiday.mp4": FILM,
    "film.mp4": FILM,
    "more.mp4": FILM,
    "photo.jpg": THREE,
    "upside_down.png": SEVEN,
    "examples/film.mp4": FILM,
    "examples/three.png": THREE,
    "examples/seven.png": SEVEN,
    "examples/training/digits.json": ROOT / "examples/training/digits.json",
    "examples/training/digits.yaml": ROOT / "examples/training/digits.yaml",
}
MODELS = ("LongLLaVA-9B", "LongLLaVA-53B-A13B", "checkpoint", "published")

FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Python and commands are run, of `console` what is printed is compared too, `text` is compared with the value before it.
LANGUAGES = ("python", "bash", "console", "text", "json", "yaml", "bibtex", "")


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """The fenced blocks: the line that each begins at, its language, and what is in it."""
    text = page.read_text(encoding="utf-8")
    assert {m[1] for m in FENCE.finditer(text)} <= set(LANGUAGES), page
    return [(text[: m.start(2)].count("\n"), m[1], m[2]) for m in FENCE.finditer(text)]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if any(language == found for _, found, _ in blocks(page))]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A copy, as a page might write into it."""
    return shutil.copytree(longllava_hf.TINY, tmp_path_factory.mktemp("docs") / "checkpoint")


@pytest.fixture
def reader(tmp_path, monkeypatch, checkpoint):
    """A folder where all that the pages name is there; what a page sets for the process is undone."""
    for name, file in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / name)
    (tmp_path / "path" / "to").mkdir(parents=True)
    for name in MODELS:
        (tmp_path / "path" / "to" / name).symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    before = dataclasses.asdict(LIMITS)
    yield tmp_path
    for name, value in before.items():
        setattr(LIMITS, name, value)


def skip_if_absent(error: str) -> None:
    """Skips, with its name, what failed because an optional package is not there."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", project, re.MULTILINE | re.DOTALL)[1]
    for name in sorted(set(re.findall(r'"([\w-]+)[^"]*"', extras)) - {"longllava_hf"}):
        try:
            distribution(name)
        except PackageNotFoundError:
            if re.search(rf"\b{name}\b", error):
                pytest.skip(f"{name} is not installed")


# Python


def expected_values(code: str) -> dict[int, object]:
    """By line, what a comment at its end says that the value there is: `2 + 2  # 4`."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT and token.line[: token.start[1]].strip():
            try:
                found[token.start[0]] = ast.literal_eval(token.string[1:].strip())
            except (SyntaxError, ValueError):
                continue  # words
    return found


def run_snippet(code: str, names: dict, page: Path, line: int) -> object:
    """Run it a statement at a time, and compare what it says of values; returns the last one."""
    expected, value = expected_values(code), None
    for statement in ast.parse("\n" * line + code).body:
        is_value = isinstance(statement, ast.Expr)
        tree = ast.Expression(statement.value) if is_value else ast.Module([statement], [])
        value = eval(compile(tree, str(page), "eval" if is_value else "exec"), names)
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            value = names[statement.targets[0].id]
        where = statement.end_lineno - line
        if where in expected:
            assert value == expected.pop(where), f"{page.name}:{statement.lineno}"
    assert not expected, f"{page.name}:{line}: values of no statement: {expected}"
    return value


@pytest.mark.parametrize("page", pages_with("python"), ids=page_id)
def test_python(page, reader):
    """A block of text after a snippet is its last value."""
    if page.name in PYTHON_ELSEWHERE:
        pytest.skip("run by the test of that server")
    if page.name in APART:
        code = "\n".join(code for _, language, code in blocks(page) if language == "python")
        environment = {**os.environ, "HF_MODULES_CACHE": str(reader / "modules")}
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0 and not expected_values(code), run.stderr
        return
    names: dict = {"__name__": page.stem}
    before, value = "", None
    for line, language, code in blocks(page):
        if language == "python":
            try:
                value = run_snippet(code, names, page, line)
            except ImportError as error:
                skip_if_absent(str(error))
                raise
        elif language == "text" and before == "python":
            assert value == code, f"{page.name}:{line}"
        before = language


def test_a_wrong_snippet_is_found():
    page = Path("page.md")
    assert run_snippet("x = 1  # 1\nx + 1  # 2\nx  # a word\n", {}, page, 3) == 1
    with pytest.raises(AssertionError, match=r"page\.md:4"):
        run_snippet("2 + 2  # 5\n", {}, page, 3)
    with pytest.raises(AssertionError, match="no statement"):
        run_snippet("if True:\n    2 + 2  # 4\n    3\n", {}, page, 3)


# Commands


def commands(code: str) -> list[list[str]]:
    """The words of each command, continued lines and comments understood, `*.png` as a shell does."""
    lines = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()]
    parts = []
    for words in lines:
        while "&&" in words:
            parts.append(words[: words.index("&&")])
            words = words[words.index("&&") + 1 :]
        parts.append(words)
    return [[path for word in words for path in (sorted(glob(word)) or [word])] for words in parts if words]


def check_command(words: list[str]) -> None:
    """A command of ours, of a script here, or of pip: what it names is there."""
    program, *arguments = words
    program = program.rsplit("/", 1)[-1]
    if program == "longllava":
        cli.build_parser().parse_args(arguments)
    elif program.startswith("python") and arguments[0].endswith(".py"):
        script = (ROOT / arguments[0]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in script for word in arguments if word.startswith("--")), words
    elif program == "pip" or arguments[:2] == ["-m", "pip"]:
        project = (ROOT / "pyproject.toml").read_text()
        for extras in re.findall(r"^(?:\.|longllava_hf)\[(.+)\]$", "\n".join(words), re.MULTILINE):
            assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras.split(",")), words
    elif program.endswith(".sh"):
        assert (ROOT / words[0]).is_file(), words
    else:
        # Other programs, of whose options nothing is known here.
        assert program in ("hf", "vllm", "python", "python3"), words


@pytest.mark.parametrize("page", pages_with("bash"), ids=page_id)
def test_commands(page, reader, capsys):
    for words in [words for _, language, code in blocks(page) if language == "bash" for words in commands(code)]:
        try:
            check_command(words)
        except SystemExit:
            pytest.fail(f"{shlex.join(words)}: {capsys.readouterr().err}")
        if words[0].endswith("longllava") and not shlex.join(words[1:]).startswith(NOT_RUN):
            code, (out, err) = cli.main(words[1:]), capsys.readouterr()
            if code != 0:
                skip_if_absent(err)
            assert code == 0, f"{shlex.join(words)}: {err}"
            assert out.strip() == "5" or "Which digit appears in this film?" not in words


@pytest.mark.parametrize("page", pages_with("console"), ids=page_id)
def test_what_commands_print(page, reader, capsys):
    for prompt, output in [code.split("\n", 1) for _, language, code in blocks(page) if language == "console"]:
        (words,) = commands(prompt.removeprefix("$ "))
        code, (out, err) = cli.main(words[1:]), capsys.readouterr()
        if code != 0:
            skip_if_absent(err)
        assert words[0] == "longllava" and out == output, err


@pytest.mark.parametrize("page", GUIDES, ids=page_id)
def test_commands_in_a_sentence(page, capsys):
    """Placeholders and all: the command and its options are there."""
    for words in re.findall(r"`longllava ([^`]+)`", prose(page)):
        positional, *options = re.split(r"(--[a-z][a-z-]*)", words)
        with pytest.raises(SystemExit) as end:
            cli.main([*positional.split(), "--help"])
        assert end.value.code == 0, words
        known = re.findall(r"--[a-z-]+", capsys.readouterr().out)
        assert set(options[::2]) <= set(known), words


def test_recipes(tmp_path):
    """Those that are shown have keys and values that `longllava train` takes."""
    shown = [code for page in PAGES for _, language, code in blocks(page) if language == "yaml"]
    files = sorted((ROOT / "examples" / "training").glob("*.yaml"))
    assert shown and len(files) >= 4
    for code in [*shown, *(file.read_text() for file in files)]:
        file = tmp_path / "recipe.yaml"
        file.write_text(code.replace("bf16: true", "bf16: false"))  # which asks for a GPU
        recipe, arguments = read_recipe(file)
        assert recipe.stage in STAGES and arguments.learning_rate == STAGES[recipe.stage].learning_rate


# Links


def anchors(page: Path) -> set[str]:
    """Of its headings, where GitHub and MkDocs agree about them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", re.sub(r"\[(.+?)\]\(.+?\)", r"\1", heading)).strip().lower()
        github, mkdocs = plain.replace(" ", "-"), re.sub(r"[-\s]+", "-", plain)
        found |= {github} if github == mkdocs else set()
    return found


@pytest.mark.parametrize("page", [*GUIDES, ROOT / "CHANGELOG.md"], ids=page_id)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(file), target


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    assert sorted(re.findall(r"(\w+\.md)", navigation)) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_the_site_is_built_without_warnings(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    # Not `--quiet`, with which `--strict` finds nothing.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "index.html").is_file() and (tmp_path / "benchmarks/results/images_cpu.png").is_file()
