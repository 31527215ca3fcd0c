"""Saving a running engine: all of a checkpoint, or nothing that anyone would take for one.

Every rank writes its file into a hidden directory and makes it durable; when all have reported their checksums, rank 0
writes the manifest, renames the directory and switches `latest`. A process killed at any instant leaves the checkpoints
before it as they were, and at most a hidden directory that the next save removes. What fails after the renaming - the
pointer, deleting old ones - is reported, and the save has succeeded. Rank 0 does all this under the lease of the
directory, which it looks at again before it publishes or deletes.

`save` does it while training waits; `BackgroundSaver` copies the state and lets another process write it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ofa_ds.checkpoint.format import (
    BEST,
    COUNTS,
    HEADER_BYTES_A_TENSOR,
    LATEST,
    MANIFEST,
    RUN,
    Cut,
    Facts,
    Part,
    Parts,
    TensorInfo,
    directory_name,
    file_name,
)
from ofa_ds.checkpoint.manifest import manifest_of, write_manifest
from ofa_ds.checkpoint.run_lease import RunLease, run_lease
from ofa_ds.checkpoint.runs import best_step, own, remove, remove_leftovers, report, retire, set_aside
from ofa_ds.checkpoint.snapshot import Snapshot, room
from ofa_ds.checkpoint.tensor_file import write_tensors
from ofa_ds.engine.partition import AVERAGE, KINDS
from ofa_ds.storage.atomic import PARTIAL, check_space, replace_file, sync
from ofa_ds.storage.direct import BLOCK_BYTES
from ofa_ds.storage.lease import LeaseError
from ofa_ds.storage.tensor_writer import FileEntry

if TYPE_CHECKING:
    from ofa_ds.engine.engine import Engine


def save(
    engine: Engine,
    run_dir: str | Path,
    step: int,
    extra: Mapping[str, Any],
    *,
    keep: int = 3,
    lease: RunLease | None = None,
    counts: bool = True,
) -> Path:
    """Write RUN_DIR/step_NNNNNNNN; every rank calls it, at the end of an optimizer step. Returns the directory.

    extra: JSON values of the caller (recipe, data fingerprint). keep: how many checkpoints stay, this one included.
    lease: the job's; None takes it for this save. counts: False where this one is not to make an older one superfluous.
    Raises RuntimeError on every rank where any rank failed; the checkpoints before stay as they were.
    """
    if lease is None:
        with run_lease(run_dir, engine.ranks.rank, engine.gather) as lease:
            return save(engine, run_dir, step, extra, keep=keep, lease=lease, counts=counts)
    share = Share.of(engine)
    target = prepare(engine, Target(Path(run_dir), step, keep, lease), share)
    entry: FileEntry | None = None
    with _together(engine, target):
        try:
            entry = write_tensors(target.partial / file_name(engine.ranks.rank), share.tensors)
        except FileNotFoundError as error:
            raise OSError(f"{error}; run_dir must be on a file system that all hosts share") from error
    assert entry is not None
    commit(engine, target, share, _facts(engine, step, extra, counts), entry)
    return target.final


def _facts(engine: Engine, step: int, extra: Mapping[str, Any], counts: bool) -> Facts:
    return Facts(step=step, state=_finite(engine.counters()), extra=_finite({**extra, COUNTS: counts}))


def _finite(value: Any) -> Any:
    """A JSON value in which None stands for what is no number of JSON's."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


WRITER_SHARE = 0.01
"""Of a core, for the writer beside each rank that trains on the CPU."""


class BackgroundSaver:
    """Saves without stopping: training waits for a copy of its state, another process writes and hashes it.

    One save at a time: the next one waits for it. All ranks call each method together, except `is_done`.
    """

    def __init__(self, engine: Engine, run_dir: str | Path, *, keep: int = 3, lease: RunLease | None = None) -> None:
        """lease: the job's; None takes it until `close`."""
        self._own_lease = None if lease else RunLease.take(Path(run_dir), engine.ranks.rank, engine.gather)
        self._lease = lease or self._own_lease
        self._engine = engine
        self._run_dir = Path(run_dir)
        self._keep = keep
        self._snapshot: Snapshot | None = self._new_snapshot()  # it claims its memory while training starts
        self._pending: tuple[Target, Share, Facts] | None = None
        self.failure: str | None = None
        """Why the last save that ended did not become a checkpoint."""

    def start(self, step: int, extra: Mapping[str, Any], *, counts: bool = True) -> None:
        """Copy the state of step `step` and have it written. Raises RuntimeError as `save` does."""
        self.finish()
        share = Share.of(self._engine)
        target = prepare(self._engine, Target(self._run_dir, step, self._keep, self._lease), share)
        facts = _facts(self._engine, step, extra, counts)
        if self._snapshot is None or not self._snapshot.is_alive():
            if self._snapshot is not None:
                self._snapshot.close()
            self._snapshot = self._new_snapshot()
        self._snapshot.take(share.tensors, target.partial / file_name(self._engine.ranks.rank))
        self._pending = target, share.without_tensors(), facts

    def _new_snapshot(self) -> Snapshot:
        engine = self._engine
        kinds = (*KINDS, AVERAGE) if engine.has_average else KINDS  # moments come with the first step
        size = sum((len(kinds) if piece.trainable else 1) * room(4 * piece.numel) for piece in engine.pieces())
        others = [*engine.buffers().values(), *engine.average_buffers().values(), *engine.rng_states().values()]
        size += sum(room(tensor.numel() * tensor.element_size()) for tensor in others)
        on_gpu = engine.device.type == "cuda"
        return Snapshot(size, share=1.0 if on_gpu else WRITER_SHARE, pin=on_gpu)

    @property
    def is_pending(self) -> bool:
        """Whether a save was started and not yet committed; the same on all ranks."""
        return self._pending is not None

    def is_done(self) -> bool:
        """Whether this rank's file is written, or failed to be."""
        return self._snapshot is None or self._snapshot.is_done()

    def finish(self) -> Path | None:
        """Wait for the pending save and commit it; None where there is none, or it failed: see `failure`.

        Raises LeaseError on all ranks where the directory is another job's by now.
        """
        if self._pending is None or self._snapshot is None:
            return None
        (target, share, facts), self._pending = self._pending, None
        self.failure = None
        try:
            with _together(self._engine, target):
                entry = self._snapshot.wait()
            commit(self._engine, target, share, facts, entry)
        except LeaseError:
            raise
        except RuntimeError as error:
            self.failure = str(error)
            return None
        return target.final

    def close(self) -> None:
        """End the writing process; a pending save is lost. Safe to call twice."""
        if self._snapshot is not None:
            self._snapshot.close()
        if self._own_lease is not None:
            self._own_lease.release()
        self._snapshot = self._pending = None


@dataclass(frozen=True)
class Target:
    """Where a checkpoint goes."""

    run_dir: Path
    step: int
    keep: int
    lease: RunLease
    token: str = ""
    """Another one for each attempt: a writer that outlives its killed trainer by a moment is in nobody's way."""

    @property
    def partial(self) -> Path:
        return self.run_dir / f"{PARTIAL}{directory_name(self.step)}_{self.token}"

    @property
    def final(self) -> Path:
        return self.run_dir / directory_name(self.step)


@dataclass(frozen=True)
class Share:
    """What one rank contributes: its tensors, in the order of its file, and what the manifest says of them."""

    tensors: dict[str, Tensor]
    infos: dict[str, TensorInfo]
    uneven: dict[str, tuple[int, int]]
    """(start, numel) of pieces that no rule describes."""
    buffers: dict[str, tuple[int, ...]]
    average_buffers: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, engine: Engine) -> Share:
        tensors: dict[str, Tensor] = {}
        infos: dict[str, TensorInfo] = {}
        uneven: dict[str, tuple[int, int]] = {}
        engine.agree_on_buffers()
        for piece in engine.pieces():
            infos[piece.name] = TensorInfo(shape=piece.shape, trainable=piece.trainable, kinds=piece.kinds)
            if not piece.even:
                uneven[piece.name] = (piece.start, piece.numel)
            for kind, tensor in piece.tensors.items():
                tensors[f"{kind}|{piece.name}"] = tensor
        tensors |= {f"rng|{name}": state for name, state in engine.rng_states().items()}
        shapes: list[dict[str, tuple[int, ...]]] = []
        for prefix, buffers in (("buffer", engine.buffers()), ("ema_buffer", engine.average_buffers())):
            shapes.append({name: tuple(buffer.shape) for name, buffer in buffers.items()})
            if engine.ranks.rank == 0:
                tensors |= {f"{prefix}|{name}": buffer for name, buffer in buffers.items()}
        return cls(tensors, infos, uneven, *shapes)

    def without_tensors(self) -> Share:
        return dataclasses.replace(self, tensors={})

    @property
    def num_bytes(self) -> int:
        """About what it takes on the disk; never less."""
        payload = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())
        return payload + HEADER_BYTES_A_TENSOR * len(self.tensors) + BLOCK_BYTES


def prepare(engine: Engine, target: Target, share: Share) -> Target:
    """Clear what killed saves left, see whether there is room, make the hidden directory. Returns the target of it."""
    sizes, tokens = zip(*engine.gather((share.num_bytes, secrets.token_hex(4))), strict=True)
    target = dataclasses.replace(target, token=tokens[0])
    with _together(engine, target):
        if engine.ranks.rank == 0:
            target.lease.check()
            remove_leftovers(target.run_dir)
            target.partial.mkdir(parents=True)
            check_space(target.partial, sum(sizes), engine.ranks.world_size + 2)
    return target


def commit(engine: Engine, target: Target, share: Share, facts: Facts, entry: FileEntry) -> None:
    """When every rank has its file: manifest, rename, `latest`; then delete what is older than `keep`."""
    reports = engine.gather((entry, share.uneven))
    with _together(engine, target):
        if engine.ranks.rank == 0:
            facts = dataclasses.replace(facts, extra={**facts.extra, RUN: target.lease.run})
            manifest = manifest_of(
                share.infos, _parts([uneven for _, uneven in reports], share.infos),
                files=[entry for entry, _ in reports], stage=engine.stage, facts=facts,
                buffers=share.buffers, ema_buffers=share.average_buffers,
            )  # fmt: skip
            write_manifest(target.partial / MANIFEST, manifest)
            _publish(target)
    if engine.ranks.rank == 0:
        _tidy(target, best_step(manifest))


def _parts(uneven: list[dict[str, tuple[int, int]]], infos: Mapping[str, TensorInfo]) -> Parts:
    """Who holds what of each tensor, put together from what each rank said."""
    parts: dict[str, Cut] = {}
    for name in infos:
        parts[name] = "even"
        if name in uneven[0]:
            ranges = [Part(rank, *report[name]) for rank, report in enumerate(uneven)]
            parts[name] = tuple(sorted((part for part in ranges if part.numel), key=lambda part: part.start))
    return parts


@contextmanager
def _together(engine: Engine, target: Target) -> Iterator[None]:
    """All ranks leave this block together; an OSError of one is a RuntimeError on all, a LeaseError one on all."""
    problem: str | None = None
    lost: str | None = None
    cause: Exception | None = None
    try:
        yield
    except LeaseError as error:
        lost, cause = str(error), error
    except OSError as error:
        problem, cause = f"rank {engine.ranks.rank}: {error}", error
    problems, losses = zip(*engine.gather((problem, lost)), strict=True)
    if any(losses):
        raise LeaseError(next(text for text in losses if text)) from cause
    failed = [text for text in problems if text]
    if failed:
        why = "; ".join(failed[:3])
        text = f"{target.final} was not written ({why}); the checkpoints before it are untouched"
        raise RuntimeError(text) from cause


def _publish(target: Target) -> None:
    """From here on it is a checkpoint."""
    final = target.final
    sync(target.partial)
    target.lease.check()
    if os.path.lexists(final):
        _make_way(final, target.lease.run)
    os.rename(target.partial, final)


def _make_way(final: Path, run: str) -> None:
    """The same step again: a reader falls back to .old until the new one is there. What is not ours is kept."""
    old = final.with_name(f"{final.name}.old")
    if own(final, run) is None:
        kept = set_aside(final, "aside")
        report(f"{final} was there, and is not a whole checkpoint of this run: it is kept as {kept.name}")
        return
    if os.path.lexists(old):
        if own(old, run) is None:
            set_aside(old, "aside")
        else:
            remove(old)
    os.rename(final, old)


def _tidy(target: Target, best: int | None) -> None:
    """`latest`, `best`, and what is older than `keep`. The checkpoint is there: what fails here is only told."""
    named = {LATEST: target.step} if best is None else {LATEST: target.step, BEST: best}
    try:
        sync(target.run_dir)
        for pointer, step in named.items():
            if (target.run_dir / directory_name(step)).is_dir():
                replace_file(target.run_dir / pointer, f"{directory_name(step)}\n")
    except OSError as error:
        report(f"{target.final} is whole, but {' and '.join(named)} may not name the right one: {error}")
    try:
        target.lease.check()
        retire(target.run_dir, target.step, target.keep, target.lease.run)
    except (OSError, LeaseError) as error:
        report(f"{target.final} is whole; older ones were not deleted: {error}")
