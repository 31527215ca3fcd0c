"""Directories and files that appear when they are complete and durable, or not at all."""

from __future__ import annotations

import errno
import fcntl
import filecmp
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ofa_ds.storage.sizes import size_text

PARTIAL = ".partial_"
"""How the names begin of a run's checkpoints that are not complete yet."""
_NEW = ".new_"
"""How those begin of what is made here: a run deletes what it left over itself, and nothing of this."""
_HELD = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


@contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """A hidden directory beside `destination` that takes its name when the block ends; its files are durable by then.

    Where the block fails it is removed; what a killed process left of it goes with the next try. `destination` may be
    an empty directory. Of two processes that make the same one, the first to end has it. Raises ValueError: something
    is there, before or after the block.
    """
    _refuse(destination, or_empty=True)
    with _hidden(destination) as partial:
        yield partial
        sync(partial)
        try:
            os.rename(partial, destination)
        except OSError as error:
            if error.errno not in _HELD:
                raise
            raise _appeared(destination) from error
    sync(destination.parent)


@contextmanager
def new_file(destination: Path) -> Iterator[Path]:
    """A path in a hidden directory; its file becomes `destination` as `new_directory` does it."""
    _refuse(destination)
    with _hidden(destination) as partial:
        yield partial / destination.name
        sync(partial / destination.name)
        place_file(partial / destination.name, destination)


@contextmanager
def new_files(folder: Path, name: str) -> Iterator[Path]:
    """A hidden directory in `folder`; when the block ends its files stand in `folder`, each whole, none overwritten.

    name: what is made; of two that make the same, each is alone. A file that is there with the same content stays,
    which is told on stderr: a killed process's work is completed so. Raises ValueError, and places none, where one is
    there with another content.
    """
    is_own = not folder.exists()
    try:
        with _hidden(folder / name) as partial:
            yield partial
            places = {path: folder / path.relative_to(partial) for path in sorted(partial.rglob("*")) if path.is_file()}
            made = [path for path, place in places.items() if not _is_there(place, path)]
            for path in made:
                sync(path)
            for path in made:
                place_file(path, places[path])
    except BaseException:
        with suppress(OSError):
            if is_own:
                folder.rmdir()
        raise


def _is_there(place: Path, like: Path) -> bool:
    """Whether a file is there that is like that one. Raises ValueError where another is."""
    if not os.path.lexists(place):
        return False
    if not place.is_file() or not filecmp.cmp(place, like, shallow=False):
        raise ValueError(f"{place}: is there already, and is another; remove it, or give another directory")
    print(f"{place}: is there already, as it would be made", file=sys.stderr)
    return True


def place_file(path: Path, place: Path) -> None:
    """Give a durable file of a hidden directory its name."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, place)  # a rename would replace another process's
    except FileExistsError as error:
        raise _appeared(place) from error
    except OSError:  # a file system without links
        _refuse(place)
        os.rename(path, place)
    sync(place.parent)


def refuse_inside(destination: Path, *sources: Path) -> None:
    """Raises ValueError where a new place is one of those that are read, or lies in one, by whatever way."""
    target = destination.resolve()
    for source in sources:
        if source.resolve() in (target, *target.parents):
            raise ValueError(f"{destination}: is in {source}, which is read; give a place outside of it")


def _refuse(destination: Path, *, or_empty: bool = False) -> None:
    if destination.is_symlink():
        raise ValueError(f"{destination}: is a symbolic link; remove it, or give the place that it leads to")
    is_empty = or_empty and destination.is_dir() and not any(destination.iterdir())
    if destination.exists() and not is_empty:
        raise ValueError(f"{destination}: is there already; remove it, or give another name")


def _appeared(destination: Path) -> ValueError:
    return ValueError(f"{destination}: appeared meanwhile, another process made it too; what this one made is removed")


@contextmanager
def _hidden(destination: Path) -> Iterator[Path]:
    """A new directory beside `destination`, locked while its process lives, and gone after the block."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(destination)
    descriptor = None
    while descriptor is None:
        partial = destination.with_name(f"{_NEW}{destination.name}_{secrets.token_hex(4)}")
        partial.mkdir()
        descriptor = _locked(partial)  # None: someone took it for a leftover before it was locked
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(descriptor)


def _remove_leftovers(destination: Path) -> None:
    """What killed processes left of the same destination: nobody holds its lock."""
    name = re.compile(f"{re.escape(_NEW + destination.name)}_[0-9a-f]{{8}}")
    for path in destination.parent.iterdir():
        if name.fullmatch(path.name) and (descriptor := _locked(path, only_where_known=True)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)


def _locked(path: Path, *, only_where_known: bool = False) -> int | None:
    """A descriptor of a directory that holds its lock; None where it is gone, or another process holds that.

    only_where_known: None also where the file system has no such locks, as some that are shared.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = path.exists()
    except OSError as error:
        is_ours = error.errno != errno.EWOULDBLOCK and not only_where_known
    if is_ours:
        return descriptor
    os.close(descriptor)
    return None


@contextmanager
def new_content(path: Path) -> Iterator[Path]:
    """A path with the same suffix: what the block writes there is that of `path` when it ends.

    The old content stays until then, and where the block fails, as on a full disk. Where `path` leads to another file,
    that is meant. A pipe or a device, such as /dev/stdout, is written to as it is: another file would be its end.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    place = path.resolve()
    partial = place.with_name(f"{PARTIAL}{path.name}")
    try:
        yield partial
        sync(partial)
        os.replace(partial, place)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(place.parent)


def replace_file(path: Path, text: str) -> None:
    """Give a small file another content, as `new_content` does."""
    with new_content(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_space(directory: Path, num_bytes: int, num_files: int) -> None:
    """Raises OSError where a file system has not that much room, in bytes or in names."""
    found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    if free < num_bytes:
        text = f"{size_text(free)} are free, {size_text(num_bytes)} are needed"
        raise OSError(errno.ENOSPC, text, str(directory))
    if found.f_files and found.f_favail < num_files:  # 0 where a file system does not count them
        raise OSError(errno.ENOSPC, f"{found.f_favail} more files fit, {num_files} are needed", str(directory))


def sync_tree(directory: Path) -> None:
    """Make a directory and all below it durable."""
    for path in [*directory.rglob("*"), directory]:
        sync(path)


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
