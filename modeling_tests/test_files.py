"""Files that are whole or not there: whatever is killed, breaks off, or happens twice at once."""

import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import stat
import time
import traceback
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import longllava_hf
from longllava_hf import LongLLaVAForConditionalGeneration, LongLLaVAInt8Config
from longllava_hf.convert import convert_checkpoint
from longllava_hf.files_longllava import (
    atomic_write,
    finish_save,
    has_unfinished_save,
    hash_file,
    locked,
    temporary_folder,
)

from .conftest import FIXTURES, published
from .test_checkpoint_longllava import in_shards, same_weights


resource = pytest.importorskip("resource", reason="processes are forked, limited and killed")

# How many processes are killed in all; 40 were for each change of the code.
KILLS = int(os.environ.get("LONGLLAVA_KILLS", "10"))
load = AutoModelForImageTextToText.from_pretrained


def snapshot(folder):
    """Every file and folder below, with what is in it and its mode."""
    return {
        str(path.relative_to(folder)): (hash_file(path), oct(path.stat().st_mode)) if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def in_child(work, seconds=None):
    """Run it in a forked process, which is killed after so many seconds. Returns its exit code, -9 if it was killed."""
    gc.collect()  # nothing that has threads is left for the child to clean up
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    end = time.monotonic() + (60 if seconds is None else seconds)
    while time.monotonic() < end:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.0005)
    else:
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(work, count):
    """A work that kills its process in place of its `count`-th change of a name in the file system."""

    def limited():
        left = [count]

        def wrap(function):
            def wrapper(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return wrapper

        for name in ("mkdir", "rename", "replace", "rmdir", "unlink"):
            setattr(os, name, wrap(getattr(os, name)))
        work()

    return limited


@pytest.fixture
def umask():
    earlier = os.umask(0o022)
    yield os.umask
    os.umask(earlier)


def write(file, text="new"):
    with atomic_write(file) as temporary:
        Path(temporary).write_text(text)


def test_hash(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "b").write_bytes(b"x" * (3 << 20))
    assert hash_file(tmp_path / "a") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert hash_file(str(tmp_path / "b")) == hashlib.sha256(b"x" * (3 << 20)).hexdigest()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_mode_is_that_of_any_file(tmp_path, umask, mask):
    umask(mask)
    with atomic_write(tmp_path / "a.safetensors") as temporary:
        save_file({"x": torch.zeros(2)}, temporary)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask
    (tmp_path / "a.safetensors").chmod(0o640)  # who may read a file is the user's choice
    write(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_link_is_replaced(tmp_path):
    (tmp_path / "other").write_text("old")
    (tmp_path / "link").symlink_to("other")
    write(tmp_path / "link")
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "other").read_text() == "old"


@pytest.mark.parametrize("name", ["a", "a b.[x]*", "ä" * 127, "x" * 255, ".hidden", "line\nbreak"])
def test_all_kinds_of_names(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    in_child(lambda: killed_while_writing(name))
    assert len(os.listdir()) == 1
    write(name)
    assert os.listdir() == [name] and Path(name).read_text() == "new"


def killed_while_writing(file):
    with atomic_write(file) as temporary:
        Path(temporary).write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("no"), SafetensorError("of no file"), SystemExit])
def test_nothing_is_left_after_an_exception(tmp_path, error):
    write(tmp_path / "a", "old")
    with pytest.raises(error if isinstance(error, type) else type(error)):
        with atomic_write(tmp_path / "a") as temporary:
            Path(temporary).write_text("half")
            raise error
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_full_disk(tmp_path):
    """Which a limit on a file's size is much like."""

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(OSError, match=r"File too large.*/a'") as raised:
            write(tmp_path / "a", "x" * 2000)
        assert raised.value.filename == str(tmp_path / "a")
        with pytest.raises(OSError, match=r"File too large.*/b'"):
            with atomic_write(tmp_path / "b") as temporary:
                save_file({"x": torch.zeros(1000)}, temporary)

    assert in_child(work) == 0
    assert os.listdir(tmp_path) == []


def test_folders_that_cannot_be_written_to(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"No such file.*nowhere/a"):
        write(tmp_path / "nowhere" / "a")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        write(tmp_path / "folder")
    if os.getuid() == 0:  # who may write anywhere

        def mkdir(path, *args, **kwargs):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(os, "mkdir", mkdir)
    else:
        tmp_path.chmod(0o555)
    with pytest.raises(PermissionError, match=r"Permission denied.*/a'"):
        write(tmp_path / "a")


def test_what_killed_writers_leave_is_removed_and_no_more(tmp_path):
    for file in ("a", "a", "b"):
        assert in_child(lambda file=file: killed_while_writing(tmp_path / file)) == -9
    (tmp_path / ".a.0123.tmp").mkdir()  # not ours
    with temporary_folder(tmp_path, "a") as alive:
        write(tmp_path / "a")
        assert alive.is_dir()
        names = sorted(os.listdir(tmp_path))
        assert len(names) == 4 and {"a", ".a.0123.tmp", alive.name} < set(names)
    assert sorted(name[:3] for name in os.listdir(tmp_path)) == [".a.", ".b.", "a"]


def test_without_locks(tmp_path, monkeypatch):
    """As on Windows, and as on some network file systems."""

    def flock(*args):
        raise OSError(9, "Bad file descriptor")

    assert in_child(lambda: killed_while_writing(tmp_path / "a")) == -9
    monkeypatch.setattr("fcntl.flock", flock)
    write(tmp_path / "a")
    monkeypatch.setattr("longllava_hf.files_longllava.fcntl", None)
    write(tmp_path / "a", "newer")
    assert (tmp_path / "a").read_text() == "newer" and len(os.listdir(tmp_path)) == 2  # nobody knows who is alive


def test_file_systems_that_sync_no_folders(tmp_path, monkeypatch):
    fsync = os.fsync

    def fsync_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_files)
    write(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "new"


def write_often(file, value):
    for _ in range(60):
        with atomic_write(file) as temporary:
            save_file({"x": torch.full((10_000,), value)}, temporary)


def test_many_writers_of_one_file(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_often, args=(tmp_path / "a", float(i))) for i in range(4)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        with contextlib.suppress(FileNotFoundError):
            x = load_file(tmp_path / "a")["x"]
            assert x.numel() == 10_000 and (x == x[0]).all()
    assert [process.exitcode for process in processes] == [0] * 4
    assert os.listdir(tmp_path) == ["a"]


@pytest.fixture(scope="module")
def quantized():
    return load(longllava_hf.TINY, quantization_config=LongLLaVAInt8Config())


def changed(model, value):
    """The same model with another bias, which tells two states apart."""
    model.model.multi_modal_projector.linear_1.bias.data.fill_(value)
    return model


def state_of(folder):
    return load(folder).model.multi_modal_projector.linear_1.bias[0].item()


def test_a_save_leaves_other_files_alone(tmp_path, small_model, umask):
    others = ["README.md", "optimizer.pt", "tokenizer.json", "model.fp16.safetensors", "model-best.safetensors"]
    for name in others:
        (tmp_path / name).write_text(name)
    small_model.save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(path.name for path in tmp_path.glob("model-0*"))
    assert len(shards) > 2 and state_of(tmp_path) == small_model.model.multi_modal_projector.linear_1.bias[0]
    small_model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert 1 < len(list(tmp_path.glob("model-0*"))) < len(shards)
    changed(small_model, 7).save_pretrained(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted(
        [*others, "config.json", "generation_config.json", "model.safetensors"]
    )
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {"0o644"}
    changed(small_model, 8).save_pretrained(tmp_path, max_shard_size="100KB")  # no model.safetensors that hides them
    assert state_of(tmp_path) == 8 and all((tmp_path / name).read_text() == name for name in others)


def test_a_save_has_the_hosts_semantics(tmp_path, small_model, caplog):
    small_model.save_pretrained(tmp_path / "new" / "folder", variant="fp16")
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == [
        "config.json",
        "generation_config.json",
        "model.fp16.safetensors",
    ]
    small_model.save_pretrained(tmp_path / "new" / "folder", True, None, False, "100KB", "fp16")
    names = os.listdir(tmp_path / "new" / "folder")
    assert "model.safetensors.index.fp16.json" in names and "model.fp16.safetensors" not in names
    assert same_weights(load(tmp_path / "new" / "folder", variant="fp16"), small_model)
    small_model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert os.listdir(tmp_path / "none") == []
    weights = {name: x + 1 for name, x in small_model.state_dict().items()}
    small_model.save_pretrained(tmp_path / "given", state_dict=dict(weights))
    assert torch.equal(load(tmp_path / "given").state_dict()["lm_head.weight"], weights["lm_head.weight"])
    (tmp_path / "file").write_text("x")
    small_model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x" and sorted(os.listdir(tmp_path)) == ["file", "given", "new", "none"]


def test_a_save_of_an_adapter(tmp_path, small_model):
    peft = pytest.importorskip("peft")
    small_model.save_pretrained(tmp_path)
    before = snapshot(tmp_path)
    try:
        small_model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    except ValueError as error:
        pytest.skip(str(error))  # for its release
    small_model.save_pretrained(tmp_path)
    names = {"adapter_config.json", "adapter_model.safetensors"}
    assert set(os.listdir(tmp_path)) == names | set(before)
    assert {name: found for name, found in snapshot(tmp_path).items() if name in before} == before
    assert same_weights(load(tmp_path), small_model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_save_that_breaks_off(tmp_path, small_model, monkeypatch, error):
    changed(small_model, 1).save_pretrained(tmp_path)
    before = snapshot(tmp_path)

    def save(*args, **kwargs):
        raise error

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", save)
    with pytest.raises(
        error if isinstance(error, type) else OSError, match=None if isinstance(error, type) else str(tmp_path)
    ):
        changed(small_model, 2).save_pretrained(tmp_path)
    assert snapshot(tmp_path) == before


def interrupted_commit(model, folder, **kwargs):
    """A save whose process is killed when all is written and half of it moved."""

    def work():
        moved, replace = [], os.replace

        def kill(source, target):
            moved.append(target)
            if len(moved) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = kill
        model.save_pretrained(folder, **kwargs)

    assert in_child(work) == -9 and has_unfinished_save(folder)


def test_an_interrupted_commit_is_completed_by_loading(tmp_path, quantized):
    """Also where an Auto class has read the configuration of the earlier state before."""
    load(longllava_hf.TINY).save_pretrained(tmp_path / "a")
    changed(quantized, 3).save_pretrained(tmp_path / "b", max_shard_size="2MB")
    interrupted_commit(quantized, tmp_path / "a", max_shard_size="2MB")
    model = load(tmp_path / "a", vision_batch_size=3)
    assert same_weights(model, quantized) and model.config.vision_batch_size == 3
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_an_interrupted_commit_is_completed_before_anything_else(tmp_path, quantized):
    changed(quantized, 1).save_pretrained(tmp_path / "a")
    for value in (2, 3):
        interrupted_commit(changed(quantized, value), tmp_path / "a", max_shard_size="2MB")
        assert value == 3 or LongLLaVAForConditionalGeneration.from_pretrained(tmp_path / "a")
    changed(quantized, 4).save_pretrained(tmp_path / "a")
    changed(quantized, 4).save_pretrained(tmp_path / "b")
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b") and state_of(tmp_path / "a") == 4


def test_a_source_of_a_conversion_is_completed_first(tmp_path, quantized):
    changed(quantized, 1).save_pretrained(tmp_path / "a")
    interrupted_commit(changed(quantized, 2), tmp_path / "a", max_shard_size="2MB")
    convert_checkpoint(str(tmp_path / "a"), str(tmp_path / "b"))
    assert not has_unfinished_save(tmp_path / "a") and same_weights(load(tmp_path / "b"), quantized)


def test_a_folder_that_cannot_be_completed(tmp_path, quantized, monkeypatch):
    changed(quantized, 1).save_pretrained(tmp_path)
    interrupted_commit(changed(quantized, 2), tmp_path, max_shard_size="2MB")

    def replace(*args):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(OSError, match=r"interrupted and cannot be completed, Read-only.*writable") as raised:
            load(tmp_path)
    assert raised.value.filename.rstrip("/") == str(tmp_path) and state_of(tmp_path) == 2


def test_a_link_is_no_unfinished_save(tmp_path, small_model):
    """Else a folder from elsewhere could move any other folder's files into itself."""
    (tmp_path / "private").mkdir()
    write(tmp_path / "private" / "letter")
    small_model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / ".save.complete").symlink_to(tmp_path / "private")
    load(tmp_path / "model")
    assert os.listdir(tmp_path / "private") == ["letter"]


def save_often(model, folder, value):
    for _ in range(5):
        changed(model, value).save_pretrained(folder, max_shard_size="50KB" if value % 2 else "100KB")


def test_many_saves_to_one_folder(tmp_path, small_model):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=save_often, args=(small_model, tmp_path, i)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    value = state_of(tmp_path)
    changed(small_model, value).save_pretrained(tmp_path / "alone", max_shard_size="50KB" if value % 2 else "100KB")
    alone = snapshot(tmp_path / "alone")
    shutil.rmtree(tmp_path / "alone")
    assert snapshot(tmp_path) == alone


class Conversion:
    """The last good state is the source, and that there is no destination."""

    def __init__(self, to):
        self.to = to

    def prepare(self, folder):
        shutil.copytree(published("moe").parent, folder, copy_function=shutil.copyfile)
        for file in (FIXTURES / "jamba-tokenizer").iterdir():
            shutil.copyfile(file, folder / "checkpoint" / file.name)
        in_shards(folder / "checkpoint", 4)
        if self.to == "published":
            convert_checkpoint(str(folder / "checkpoint"), str(folder / "native"))
        self.source = folder / ("native" if self.to == "published" else "checkpoint")
        self.result, self.before = folder / "result", snapshot(self.source)

    def work(self):
        convert_checkpoint(str(self.source), str(self.result), to=self.to)

    def again(self):
        with contextlib.suppress(FileExistsError):
            self.work()

    def check(self):
        assert snapshot(self.source) == self.before
        if self.result.exists():
            load(self.result)


class QuantizedSave:
    """The last good state is in fewer shards."""

    def __init__(self, model):
        self.model = model

    def prepare(self, folder):
        self.result = folder
        changed(self.model, 1).save_pretrained(folder, max_shard_size="4MB")
        write(folder / "optimizer.pt", "another's")
        changed(self.model, 2)

    def work(self):
        self.model.save_pretrained(self.result, max_shard_size="2MB")

    again = work

    def check(self):
        model = load(self.result)
        value = model.model.multi_modal_projector.linear_1.bias[0].item()
        assert value in (1, 2) and same_weights(model, changed(self.model, value))
        changed(self.model, 2)


class ContextSave:
    """The last good state is a file of the same name."""

    def prepare(self, folder):
        folder.mkdir()
        self.result, self.file = folder, folder / "context.safetensors"
        self.states = [{"x": torch.full((2_000_000,), value)} for value in (1.0, 2.0)]
        self.save(0)

    def save(self, state):
        with atomic_write(self.file) as temporary:
            save_file(self.states[state], temporary, metadata={"version": "1"})

    def work(self):
        self.save(1)

    again = work

    def check(self):
        assert any(torch.equal(load_file(self.file)["x"], state["x"]) for state in self.states)


WORKS = ("native", "published", "quantized", "context")


@pytest.fixture
def make(request, quantized):
    def make(kind):
        if kind == "quantized":
            return QuantizedSave(quantized)
        return ContextSave() if kind == "context" else Conversion(kind)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("kind", WORKS)
def test_kills_at_any_moment(tmp_path, make, kind):
    task, folder = make(kind), tmp_path / "work"  # always the same: a configuration names the tower's path
    task.prepare(folder)
    start = time.monotonic()
    assert in_child(task.work) == 0
    duration, expected = time.monotonic() - start, snapshot(folder)
    chance, killed = random.Random(kind), 0
    kills = len(range(WORKS.index(kind), KILLS, len(WORKS)))
    while killed < kills:
        shutil.rmtree(folder)
        task.prepare(folder)
        # Each in a part of its own of the time that the work takes.
        if in_child(task.work, duration * (killed + chance.random()) / kills) == -9:
            killed += 1
        else:
            duration *= 0.8  # it is faster than it was at first
        task.check()
        assert in_child(task.again) == 0
        task.check()
        assert snapshot(folder) == expected, killed


@pytest.mark.slow
@pytest.mark.parametrize("kind", WORKS)
def test_kills_at_each_change_of_a_name(tmp_path, make, kind):
    task, folder = make(kind), tmp_path / "work"  # always the same: a configuration names the tower's path
    task.prepare(folder)
    assert in_child(task.work) == 0
    expected = snapshot(folder)
    # Not all of the many changes, and fewer unless more kills are asked for.
    stride = {"native": 4, "published": 4, "quantized": 1, "context": 1}[kind] * (1 if KILLS >= 40 else 5)
    for count in range(1, 1000, 1 if kind == "context" else stride):
        shutil.rmtree(folder)
        task.prepare(folder)
        code = in_child(killed_at(task.work, count))
        task.check()
        assert in_child(task.again) == 0
        assert snapshot(folder) == expected, count
        if code == 0:
            break
    assert count > 3


def test_a_lock_goes_with_its_process(tmp_path):
    with locked(tmp_path) as is_locked:
        assert is_locked
        with pytest.raises(BlockingIOError):
            with locked(tmp_path):
                pass
    assert in_child(lambda: locked(tmp_path).__enter__()) == 0
    with locked(tmp_path):
        pass
    finish_save(tmp_path)  # nothing to do
    assert json.dumps(os.listdir(tmp_path)) == "[]"
