"""The directory in which shards are built: beside the target, of one process at a time, kept until all is done."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from ofa_ds.storage import file_systems
from ofa_ds.storage.atomic import sync

BUILDING = ".building_"
JOURNAL = ".journal"
"""Directory in it of what is only for building: notes, and which pieces are done."""

ITEMS = "items"
"""How the names of files in the journal begin that pieces read from."""

CODES = f"{ITEMS}.codes"
"""How the names of those begin that hold image codes: long work, which is kept whatever else is done."""

PLAN = "plan"
"""File in the journal: which pieces there are, as one checksum."""


@contextmanager
def work_directory(out: str, given: Path | None) -> Iterator[Path]:
    """A hidden directory beside `out`, in which an earlier try may have left what it had done.

    given: where it is, of a remote `out`. It stays where the block fails, if something is done in it. Raises ValueError
    where another process builds there.
    """
    if file_systems.is_remote(out) != (given is not None):
        way = "want none, it is built beside it" if given else "want one, on a disk that all who build share"
        raise ValueError(f"--work, with --out {out}: {way}")
    target = file_systems.local_path(out)
    work = target.with_name(f"{BUILDING}{target.name}")
    if given is not None:  # a directory of the user's, who may have other things in it
        work = given / f"{BUILDING}{xxhash.xxh3_64_hexdigest(out.encode())}"
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor, work, out)
        try:
            (work / JOURNAL).mkdir(exist_ok=True)
            yield work
        finally:
            done = any((work / JOURNAL).glob("*.done")) and (file_systems.is_remote(out) or any(work.glob("*.arrow")))
            done = done or any((work / JOURNAL).glob(f"{CODES}*"))
            if work.is_dir() and not done:
                shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, work: Path, out: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{out}: another process builds it, in {work}; wait until it has ended") from error
    except OSError:
        pass  # a file system without locks, as some that are shared
    if not work.is_dir() or os.stat(work).st_ino != os.fstat(descriptor).st_ino:
        raise ValueError(f"{out}: appeared meanwhile: another process has built it")


def clear(folder: Path, keep: Collection[str]) -> None:
    """Remove all but these names: what a killed process had begun, and what no piece is of any more."""
    for path in folder.iterdir():
        if path.name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def place(work: Path, target: Path) -> None:
    """Give the finished directory its name, then drop the journal. Raises ValueError where something is there."""
    try:
        os.rename(work, target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise ValueError(f"{target}: appeared meanwhile; what was built is in {work}") from error
    sync(target.parent)
    shutil.rmtree(target / JOURNAL)


def was_placed(target: Path, plan: str) -> bool:
    """Whether an earlier try of the same plan was killed when only the journal was left to drop; it is dropped now."""
    try:
        same = (target / JOURNAL / PLAN).read_text(encoding="utf-8") == plan
    except OSError:
        return False
    if same:
        shutil.rmtree(target / JOURNAL)
    return same
