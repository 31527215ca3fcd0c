"""Writing a checkpoint: all of it, or nothing that anyone would take for one.

Every rank writes its file into a hidden directory and makes it durable; when all have reported their checksums, rank 0
writes the manifest, renames the directory and switches `latest`. A process killed at any instant leaves the checkpoints
before it as they were, and at most a hidden directory that the next save removes.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import ofa_ds
from ofa_ds.checkpoint.format import (
    FORMAT,
    LATEST,
    MANIFEST,
    VERSION,
    Manifest,
    directory_name,
    file_name,
    step_directories,
    write_manifest,
    write_tensors,
)

if TYPE_CHECKING:
    from ofa_ds.engine import Engine

_PARTIAL = ".partial_"
_TRASH = ".trash_"


def save(engine: Engine, run_dir: str | Path, step: int, extra: Mapping[str, Any], *, keep: int = 3) -> Path:
    """Write RUN_DIR/step_NNNNNNNN; every rank calls it, at the end of an optimizer step. Returns the directory.

    extra: JSON values of the caller (recipe, data fingerprint). keep: how many checkpoints stay, this one included.
    Raises RuntimeError on every rank where any rank failed; the checkpoints before stay as they were.
    """
    run_dir = Path(run_dir)
    partial, final = run_dir / f"{_PARTIAL}{directory_name(step)}", run_dir / directory_name(step)
    first = engine.ranks.rank == 0
    engine.agree_on_buffers()
    with _together(engine, final):
        if first:
            _remove_leftovers(run_dir)
            partial.mkdir(parents=True)
    report: dict[str, Any] = {}
    with _together(engine, final):
        try:
            report = _write_rank(engine, partial)
        except FileNotFoundError as error:
            raise OSError(f"{error}; run_dir must be on a file system that all hosts share") from error
    reports = engine.gather(report)
    with _together(engine, final):
        if first:
            write_manifest(partial / MANIFEST, _manifest(engine, step, extra, reports))
            _commit(run_dir, partial, final)
            _retire(run_dir, step, keep)
    return final


@contextmanager
def _together(engine: Engine, final: Path) -> Iterator[None]:
    """All ranks leave this block together; an OSError of one is a RuntimeError on all."""
    problem: str | None = None
    cause: OSError | None = None
    try:
        yield
    except OSError as error:
        problem, cause = f"rank {engine.ranks.rank}: {error}", error
    failed = [text for text in engine.gather(problem) if text]
    if failed:
        why = "; ".join(failed[:3])
        raise RuntimeError(f"{final} was not written ({why}); the checkpoints before it are untouched") from cause


def _write_rank(engine: Engine, partial: Path) -> dict[str, Any]:
    """Write this rank's file. Returns its manifest entry and the parts that no rule describes."""
    tensors: dict[str, Tensor] = {}
    parts: dict[str, tuple[int, int]] = {}
    shapes: dict[str, dict[str, Any]] = {}
    for piece in engine.pieces():
        shapes[piece.name] = {"shape": list(piece.shape), "trainable": piece.trainable}
        if not piece.even:
            parts[piece.name] = (piece.start, piece.numel)
        for kind, tensor in piece.tensors.items():
            tensors[f"{kind}|{piece.name}"] = tensor
    tensors |= {f"rng|{name}": state for name, state in engine.rng_states().items()}
    buffers = engine.buffers()
    if engine.ranks.rank == 0:
        tensors |= {f"buffer|{name}": buffer for name, buffer in buffers.items()}
    entry = write_tensors(partial / file_name(engine.ranks.rank), tensors)
    report = {"file": entry, "parts": parts}
    if engine.ranks.rank == 0:
        report |= {"tensors": shapes, "buffers": {name: list(buffer.shape) for name, buffer in buffers.items()}}
    return report


def _manifest(engine: Engine, step: int, extra: Mapping[str, Any], reports: list[dict[str, Any]]) -> Manifest:
    tensors: dict[str, dict[str, Any]] = {}
    for name, facts in reports[0]["tensors"].items():
        parts: str | list[list[int]] = "even"
        if name in reports[0]["parts"]:
            ranges = [[rank, *report["parts"][name]] for rank, report in enumerate(reports)]
            parts = sorted((part for part in ranges if part[2]), key=lambda part: part[1])
        tensors[name] = {**facts, "parts": parts}
    return {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "world_size": engine.ranks.world_size,
        "zero_stage": engine.stage,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "code": _code_version(),
        "state": engine.counters(),
        "extra": dict(extra),
        "files": [report["file"] for report in reports],
        "buffers": reports[0]["buffers"],
        "tensors": tensors,
    }


def _code_version() -> dict[str, str]:
    return {
        "ofa_ds": ofa_ds.__version__,
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "python": platform.python_version(),
    }


def _commit(run_dir: Path, partial: Path, final: Path) -> None:
    _sync_directory(partial)
    old = final.with_name(f"{final.name}.old")
    if final.exists():  # the same step again; a reader falls back to .old between the two renames
        if old.exists():
            _remove(old)
        os.rename(final, old)
    os.rename(partial, final)
    _sync_directory(run_dir)
    pointer = run_dir / f"{_PARTIAL}{LATEST}"
    with open(pointer, "w", encoding="utf-8") as file:
        file.write(f"{final.name}\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(pointer, run_dir / LATEST)
    _sync_directory(run_dir)


def _retire(run_dir: Path, step: int, keep: int) -> None:
    """Delete what is older than the newest `keep`; what claims a later step than this one is not ours to judge."""
    mine = [(at, path) for at, path in step_directories(run_dir) if at <= step]
    kept = {path for _, path in [item for item in mine if not item[1].name.endswith(".old")][:keep]}
    for _, path in mine:
        if path not in kept:
            _remove(path)


def _remove(directory: Path) -> None:
    """Out of sight first: a half-deleted checkpoint must not look like a damaged one."""
    trash = directory.with_name(f"{_TRASH}{directory.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(directory, trash)
    shutil.rmtree(trash)


def _remove_leftovers(run_dir: Path) -> None:
    for pattern in (f"{_PARTIAL}*", f"{_TRASH}*"):
        for path in run_dir.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
