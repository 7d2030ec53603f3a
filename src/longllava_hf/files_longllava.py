# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
Files that are whole or not there, whenever the process that writes them is killed.

What is not complete yet lies in a folder of its own, which its writer holds locked. The lock goes with the process, however
that ends, and so tells the next writer which of these folders were left behind.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from errno import EEXIST, EINVAL, EISDIR, ENOTEMPTY
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


fcntl: Any
try:
    import fcntl
except ImportError:  # Windows, where folders have no locks
    fcntl = None

# A folder under this name has all files of a save, and they only have to be moved to the folder that it is in.
_COMMIT = ".save.complete"
_COMMIT_NAMES = ".names.json"
_WEIGHTS = re.compile(r"(.+?)(?:-\d{5}-of-\d{5})?\.safetensors")


def hash_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as stream:
        while size := stream.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def sync(path: str | os.PathLike) -> None:
    """Have a file, or the names in a folder, on disk."""
    if fcntl is None and os.path.isdir(path):
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if fcntl is not None else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != EINVAL or not os.path.isdir(path):  # as file systems say who have no such thing for folders
            raise
    finally:
        os.close(descriptor)


def settle(folder: Path, mode: int | None = None) -> None:
    """
    Have all files below a folder on disk.

    Args:
        folder (`Path`).
        mode (`int`, *optional*): which they get; by default that of any new file, as some writers allow their owner alone.
    """
    if mode is None:
        new = folder / ".mode"
        new.touch()
        mode = stat.S_IMODE(new.stat().st_mode)
        new.unlink()
    for root, _, names in os.walk(folder):
        for path in (os.path.join(root, name) for name in names):
            if stat.S_IMODE(os.stat(path).st_mode) != mode:  # not all file systems have modes to change
                os.chmod(path, mode)
            sync(path)
        sync(root)


@contextlib.contextmanager
def locked(folder: str | os.PathLike, wait: bool = False) -> Iterator[bool]:
    """
    Hold a folder's lock, which no file stands for.

    Args:
        folder (`str` or `os.PathLike`).
        wait (`bool`, defaults to `False`): for another process that holds it.

    Yields:
        `bool`: whether there is such a lock; neither Windows nor some network file systems have any.

    Raises:
        BlockingIOError: if another holds it.
        FileNotFoundError: if the folder was removed or renamed meanwhile.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        has_locks = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            has_locks = False
        if not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            raise FileNotFoundError(f"`{folder}` is another folder than a moment ago.")
        yield has_locks
    finally:
        os.close(descriptor)


def _temporary_name(name: str) -> str:
    # File systems allow 255 bytes, and a letter takes up to four.
    return f".{name[:60]}.{secrets.token_hex(4)}.tmp"


def _remove_left_behind(parent: Path, name: str) -> None:
    """The folders of [`temporary_folder`] whose processes were killed."""
    pattern = re.compile(rf"\.{re.escape(name[:60])}\.[0-9a-f]{{8}}\.tmp", re.DOTALL)
    for path in (parent / found for found in os.listdir(parent) if pattern.fullmatch(found)):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError), locked(path) as is_locked:
                if is_locked:  # without locks nothing says whether its process is alive
                    shutil.rmtree(path)


@contextlib.contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder in `parent`, removed afterwards, and so are those of this name that killed processes have left."""
    _remove_left_behind(parent, name)
    with contextlib.ExitStack() as stack:
        while True:
            folder = parent / _temporary_name(name)
            folder.mkdir()
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            try:
                stack.enter_context(locked(folder))
            except (BlockingIOError, FileNotFoundError):
                continue  # another writer took it for left behind, as it was not locked yet
            break
        yield folder


@contextlib.contextmanager
def write_errors(target: str | os.PathLike) -> Iterator[None]:
    """`OSError` that names `target`, in place of what writers raise if the disk is full, or may not be written to."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = re.search(r"os error (\d+)", str(error))  # as safetensors says it
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        filename = getattr(error, "filename", None)
        beside = os.path.dirname(os.path.abspath(target))
        is_of_another = filename is not None and not os.path.abspath(os.fsdecode(filename)).startswith(beside)
        if number is None or is_of_another:
            raise
        raise OSError(number, f"Could not write, {os.strerror(number)}", os.fspath(target)) from error


@contextlib.contextmanager
def atomic_write(file: str | os.PathLike) -> Iterator[str]:
    """
    Write a file that is either as it was or complete.

    Yields:
        `str`: a path to write to. What is there afterwards takes the file's place once it is on disk, with the mode that
        `open(file, "w")` gives; a link is replaced, not followed. After an exception nothing is left of it.

    Raises:
        OSError: naming the file, if the disk is full or the folder may not be written to.
    """
    target = Path(file)
    with write_errors(file):
        with temporary_folder(target.parent, target.name) as folder:
            yield str(folder / target.name)
            is_there = target.is_file() and not target.is_symlink()
            settle(folder, stat.S_IMODE(target.stat().st_mode) if is_there else None)
            os.replace(folder / target.name, target)
        sync(target.parent)


def write_json(file: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write a file of JSON as [`atomic_write`] does; raises what that raises."""
    with atomic_write(file) as temporary:
        Path(temporary).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _superseded(target: Path, names: set[str]) -> list[Path]:
    """Weights of an earlier save to a folder, in other shards than those just saved."""
    stems = {found[1] for name in names if (found := _WEIGHTS.fullmatch(name))}
    earlier = {name for name in os.listdir(target) if (found := _WEIGHTS.fullmatch(name)) and found[1] in stems}
    for stem, _, variant in (stem.partition(".") for stem in stems):
        earlier.add(".".join(filter(None, (stem, "safetensors.index", variant, "json"))))
    return [path for name in sorted(earlier - names) if (path := target / name).is_file()]


def _move_in(target: Path) -> None:
    """From [`_COMMIT`] to the folder that it is in; begun anew if it was interrupted."""
    commit = target / _COMMIT
    manifest = commit / _COMMIT_NAMES
    names = set(json.loads(manifest.read_text(encoding="utf-8"))) if manifest.is_file() else set()
    for name in sorted(set(os.listdir(commit)) - {_COMMIT_NAMES}):
        os.replace(commit / name, target / name)
    for path in _superseded(target, names):
        path.unlink()
    sync(target)
    done = target / _temporary_name("save")
    os.rename(commit, done)
    shutil.rmtree(done, ignore_errors=True)


def has_unfinished_save(target: str | os.PathLike) -> bool:
    """Whether a process was killed, or is at work, between writing all files of a save and moving them to their place."""
    commit = Path(target, _COMMIT)
    return commit.is_dir() and not commit.is_symlink()


def finish_save(target: str | os.PathLike) -> None:
    """
    Complete a save of [`all_or_nothing`] that was interrupted after all of it was written, if there is one.

    Raises:
        OSError: if the folder may not be written to.
    """
    while has_unfinished_save(target):
        try:
            with locked(Path(target, _COMMIT), wait=True):
                _move_in(Path(target))
        except FileNotFoundError:
            continue  # its process is alive, and has completed it
        except OSError as error:
            message = (
                f"A save was interrupted and cannot be completed, {error.strerror}. Make the folder, or a copy of all"
                f" of it with `{_COMMIT}`, writable, and load from there"
            )
            raise OSError(error.errno, message, os.fspath(target)) from error


@contextlib.contextmanager
def all_or_nothing(target: Path) -> Iterator[Path]:
    """
    Put several files into a folder, in one step as far as a reader can tell who calls [`finish_save`] first.

    Yields:
        `Path`: a folder to write them to. Afterwards they replace those of the same names, and weights that they are a
        later state of; other files are left alone.
    """
    finish_save(target)
    with write_errors(target), temporary_folder(target, "save") as folder:
        yield folder
        if not (names := sorted(os.listdir(folder))):
            return  # such as on all processes but one
        if folders := [name for name in names if (target / name).is_dir()]:
            raise IsADirectoryError(EISDIR, "A folder is where a file is to be saved", os.fspath(target / folders[0]))
        settle(folder)
        (folder / _COMMIT_NAMES).write_text(json.dumps(names), encoding="utf-8")
        sync(folder / _COMMIT_NAMES)
        sync(folder)
        while True:
            try:
                os.rename(folder, target / _COMMIT)
                break
            except OSError as error:
                if error.errno not in (EEXIST, ENOTEMPTY):
                    raise
                finish_save(target)  # another process's
        sync(target)
        _move_in(target)


__all__ = [
    "all_or_nothing", "atomic_write", "finish_save", "hash_file", "locked", "settle", "sync", "write_errors", "write_json",
]  # fmt: skip
