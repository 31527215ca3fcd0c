"""The checkpoints of a run directory: which there are, which is the newest, which may go."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from ofa_ds.checkpoint.format import MANIFEST
from ofa_ds.checkpoint.manifest import read_manifest
from ofa_ds.storage.safetensors_file import DamagedError

_STEP_DIR = re.compile(r"step_(\d{8,})(\.old)?")
_TRASH = ".trash_"


def step_directories(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, directory) of all that looks like a checkpoint, newest first; a replaced one after its successor."""
    if not run_dir.is_dir():
        return []
    found = [(match, path) for path in run_dir.iterdir() if (match := _STEP_DIR.fullmatch(path.name)) and path.is_dir()]
    found.sort(key=lambda item: (-int(item[0][1]), item[0][2] is not None))
    return [(int(match[1]), path) for match, path in found]


def latest(run_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run whose manifest and file sizes are right; what is not is reported and skipped.

    Checksums are compared by `load`, `resume` and `verify`.
    """
    for _, directory in step_directories(Path(run_dir)):
        try:
            read_manifest(directory)
        except DamagedError as error:
            report(f"{error}; skipped")
            continue
        return directory
    return None


def find(path: str | Path) -> Path:
    """A checkpoint directory: `path`, or the newest one of the run directory `path`."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory; want a checkpoint or a run directory")
    if (path / MANIFEST).exists() or not step_directories(path):
        return path
    found = latest(path)
    if found is None:
        raise ValueError(f"{path}: holds no complete checkpoint")
    return found


def retire(run_dir: Path, step: int, keep: int) -> list[Path]:
    """Delete all but the newest `keep` of the checkpoints up to `step`; what claims a later step is not ours to judge.

    Returns what was deleted.
    """
    mine = [(at, path) for at, path in step_directories(run_dir) if at <= step]
    kept = {path for _, path in [item for item in mine if not item[1].name.endswith(".old")][:keep]}
    gone = [path for _, path in mine if path not in kept]
    for path in gone:
        remove(path)
    return gone


def prune(run_dir: str | Path, keep: int, *, dry_run: bool = False) -> list[Path]:
    """Delete all but the newest `keep` checkpoints that are whole by their manifest and sizes, and nothing else.

    Damaged ones count for nothing and go with the old ones, unless they are newer than every whole one. Returns what
    was deleted, or would be. Raises ValueError where there is no checkpoint.
    """
    found = step_directories(Path(run_dir))
    if not found:
        raise ValueError(f"{run_dir}: want a run directory with step_NNNNNNNN checkpoints, found none")
    kept: set[Path] = set()
    whole = 0
    for _, path in found:
        try:
            read_manifest(path)
        except DamagedError as error:
            report(str(error))
            if not whole:
                kept.add(path)  # newer than all that is whole: someone may want to look at it
            continue
        whole += 1
        if whole <= keep:
            kept.add(path)
    gone = [path for _, path in found if path not in kept]
    for path in gone:
        if not dry_run:
            remove(path)
    return gone


def remove(directory: Path) -> None:
    """Out of sight first: a half-deleted checkpoint must not look like a damaged one."""
    trash = directory.with_name(f"{_TRASH}{directory.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(directory, trash)
    shutil.rmtree(trash)


def remove_leftovers(run_dir: Path, partial: str) -> None:
    """What killed saves left: hidden names that begin with `partial`, and half-deleted checkpoints."""
    for pattern in (f"{partial}*", f"{_TRASH}*"):
        for path in run_dir.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)  # a writer that has not noticed yet may still add to it
            else:
                path.unlink()


def report(text: str) -> None:
    """One line for the user, from rank 0 alone. A process that has not imported torch has no ranks."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_initialized() or dist.get_rank() == 0:
        print(f"checkpoint: {text}", file=sys.stderr)
