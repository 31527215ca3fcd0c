"""Out of memory, in one line that says what to change, and a report of what filled it.

The rank that has no more says so and ends with exit code 1; its connections break, which ends the others. No report
is worth more than that: whatever fails in here is left out of it.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ofa_ds.batch import Batch
from ofa_ds.config import Recipe
from ofa_ds.engine.ranks import Ranks
from ofa_ds.storage.sizes import size_text
from ofa_ds.train.live_tensors import Piece, by_kind, live_tensors, table
from ofa_ds.train.memory_limits import Room, host_memory, rooms
from ofa_ds.train.memory_plan import Plan, planned

if TYPE_CHECKING:
    from ofa_ds.engine.engine import Engine

FOLDER = "out_of_memory"
_RESERVE = 16 << 20
"""Bytes of address space that are given back for the report; no page of them is ever touched."""
_HISTORY = 200_000
"""Events that `train.memory_snapshot` remembers."""
MAX_SNAPSHOTS = 8
"""Of one failure: where all of 1,000 ranks have no more, their snapshots would fill the disk. Each has its report."""
_ONE_FAILURE_S = 600.0
_TEXTS = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|std::bad_alloc|CUBLAS_STATUS_ALLOC_FAILED"
    r"|CUDNN_STATUS_ALLOC_FAILED|unable to allocate",
    re.IGNORECASE,
)
_ASKED = re.compile(r"(?:tried to allocate|Unable to allocate)\s+([\d.]+)\s*(bytes|[KMGTP]iB)?", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "pib": 2**50}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is what torch, CUDA, numpy, Python or the system says where there is no more memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _TEXTS.search(str(error)) is not None


def asked_bytes(error: BaseException) -> float | None:
    """What did not fit, where the error says so."""
    match = _ASKED.search(str(error))
    return None if match is None else float(match[1].rstrip(".")) * _UNITS[(match[2] or "bytes").lower()]


class OutOfMemory:
    """This rank's watch over `explained` blocks."""

    def __init__(self, recipe: Recipe, ranks: Ranks) -> None:
        self._recipe, self._ranks = recipe, ranks
        self._reserve: bytearray | None = bytearray(_RESERVE)
        self._told: Exception | None = None
        self.engine: Engine | None = None
        """Once there is one."""
        self.vocab_size = 0
        """Once it is known: without it there is no plan."""
        self._has_history = False
        if recipe.train.memory_snapshot and ranks.device.type == "cuda":
            with suppress(Exception):  # an older torch
                torch.cuda.memory._record_memory_history(max_entries=_HISTORY)
                self._has_history = True

    @contextmanager
    def explained(self, when: str, batches: Sequence[Batch] = (), step: int = 0) -> Iterator[None]:
        """What runs out of memory inside raises RuntimeError: one line. batches: this rank's, of the step under way."""
        try:
            yield
        except Exception as error:
            if error is self._told or not is_out_of_memory(error):
                raise
            self._reserve = None
            self._told = told = RuntimeError(self._line(error, when, batches, step))
            raise told from error

    def _line(self, error: Exception, when: str, batches: Sequence[Batch], step: int) -> str:
        place = f"rank {self._ranks.rank} on {socket.gethostname()}: " if self._ranks.world_size > 1 else ""
        line = f"{place}out of memory {when}"
        asked, left = asked_bytes(error), rooms(self._ranks.device)
        if asked:
            line += f": {size_text(asked)} more were asked for"
        for room in left[:1]:
            line += (
                f"{',' if asked else ':'} {size_text(room.used)} of {size_text(room.limit)} of {room.what} are taken"
            )
        try:
            plan = planned(self._recipe, self._ranks, self.vocab_size, batches, left[0] if left else None, asked or 0.0)
        except Exception as problem:  # not even for this, or a recipe that nobody can plan
            plan = Plan(no_plan=f"{type(problem).__name__}: {problem}")
        line += f"; {plan.cheapest or 'take fewer rows a micro-batch (batch.micro_rows), or more ranks'}"
        written = self._written(error, when, step, left, plan)
        return f"{line}; {written}" if written else line

    def _written(self, error: Exception, when: str, step: int, left: list[Room], plan: Plan) -> str:
        """Write what there is to know; returns where it is."""
        folder = Path(self._recipe.run_dir) / FOLDER
        stem = f"step_{step:08d}.rank_{self._ranks.rank:05d}.{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            pieces = self._pieces()
            report = _report(error, when, self._ranks, left, plan, pieces)
            (folder / f"{stem}.txt").write_text(report, encoding="utf-8", errors="backslashreplace")
        except Exception as problem:
            return f"no report: {type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
        snapshot = self._snapshot(folder, step) if self._has_history else ""
        return f"what filled it: {folder / stem}.txt{snapshot}"

    def _snapshot(self, folder: Path, step: int) -> str:
        """Write one, where this rank is among the first; what is to be told of it."""
        place = None
        try:
            place = _free_place(folder, f"step_{step:08d}.snapshot_")
            if place is None:
                return f"; {MAX_SNAPSHOTS} other ranks have written snapshots"
            torch.cuda.memory._dump_snapshot(str(place))
            return f", {place.name} for pytorch.org/memory_viz"
        except Exception as problem:
            with suppress(OSError):
                if place is not None:
                    os.unlink(place)
            return f"; no snapshot: {' '.join(str(problem).split())[:200]}"

    def _pieces(self) -> list[Piece]:
        held = self.engine.held() if self.engine is not None else ()
        return live_tensors(held, saved=not self._recipe.model.activation_checkpointing)


def _free_place(folder: Path, stem: str) -> Path | None:
    """A new file that no other rank takes; None where MAX_SNAPSHOTS of this failure have one."""
    now_s = time.time()
    earlier = [each for each in folder.glob(f"{stem}*.pickle") if now_s - each.stat().st_mtime > _ONE_FAILURE_S]
    for number in range(len(earlier), len(earlier) + MAX_SNAPSHOTS):
        place = folder / f"{stem}{number}.pickle"
        with suppress(FileExistsError):
            place.touch(exist_ok=False)
            return place
    return None


def _report(error: Exception, when: str, ranks: Ranks, left: list[Room], plan: Plan, pieces: list[Piece]) -> str:
    device = ranks.device
    found = by_kind(pieces, device)
    lines = [
        f"Out of memory {when}: rank {ranks.rank} of {ranks.world_size} on {socket.gethostname()}, {device}, "
        f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}",
        "", f"{type(error).__name__}: {str(error).strip()}", "",
        *(f"{room.what}: {size_text(room.used)} of {size_text(room.limit)} are taken" for room in left),
        *(f"this process: {name} {size_text(size)}" for name, size in host_memory().items()),
    ]  # fmt: skip
    if device.type == "cuda":
        statistics = torch.cuda.memory_stats(device)
        for name in ("allocated", "active", "inactive_split", "reserved"):
            now, peak = (statistics.get(f"{name}_bytes.all.{kind}", 0) for kind in ("current", "peak"))
            lines.append(f"torch's allocator: {name} {size_text(now)}, at most {size_text(peak)}")
        again = statistics.get("num_alloc_retries", 0)
        lines.append(f"torch's allocator: {again} times memory was given back to the GPU and asked for again")
    lines += ["", *plan.lines(), "", f"What tensors hold on {device}, found now: {size_text(sum(found.values()))}"]
    lines += [f"{size / 2**20:>12,.1f} MiB  {kind}" for kind, size in found.items()]
    lines += ["", "The largest:", *table(pieces), ""]
    if not any(kind.startswith("saved") for kind in found):
        lines.append("What layers saved for their backward is not among them where they are computed again.")
    return "\n".join(lines) + "\n"
