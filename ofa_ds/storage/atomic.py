"""Directories and files that appear when they are complete and durable, or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial_"
"""How the names begin of what is not complete yet."""


@contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """A hidden directory beside `destination` that takes its name when the block ends, or is removed where it fails."""
    if destination.exists() or destination.is_symlink():
        raise ValueError(f"{destination}: is there already; remove it, or give another name")
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f"{PARTIAL}{destination.name}_{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        yield partial
        sync(partial)
        _claim(partial, destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(destination.parent)


def _claim(partial: Path, destination: Path) -> None:
    """Give a directory its name. Raises ValueError where another process was quicker."""
    try:
        os.rename(partial, destination)  # onto an empty directory it would succeed, and nobody loses anything
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise ValueError(f"{destination}: appeared meanwhile, another process makes it too") from error
        raise


@contextmanager
def new_file(destination: Path) -> Iterator[Path]:
    """A hidden path beside `destination`; its file takes that name when the block ends, or is removed if it fails."""
    if destination.exists() or destination.is_symlink():
        raise ValueError(f"{destination}: is there already; remove it, or give another name")
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f"{PARTIAL}{destination.name}")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        os.rename(partial, destination)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(destination.parent)


def check_space(directory: Path, num_bytes: int, num_files: int) -> None:
    """Raises OSError where a file system has not that much room, in bytes or in names."""
    found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    if free < num_bytes:
        text = f"{free / 1e9:.1f} GB are free, {num_bytes / 1e9:.1f} GB are needed"
        raise OSError(errno.ENOSPC, text, str(directory))
    if found.f_files and found.f_favail < num_files:  # 0 where a file system does not count them
        raise OSError(errno.ENOSPC, f"{found.f_favail} more files fit, {num_files} are needed", str(directory))


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
