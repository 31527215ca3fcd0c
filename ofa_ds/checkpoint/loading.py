"""Reading checkpoints: into an engine of any ZeRO stage and world size, or as plain weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ofa_ds.checkpoint.format import NO_STEPS
from ofa_ds.checkpoint.manifest import FormatVersionError, Manifest, read_manifest
from ofa_ds.checkpoint.run_lease import RunLease
from ofa_ds.checkpoint.runs import WAY_OUT, find, look, own, report, set_aside, step_directories
from ofa_ds.checkpoint.state import Reader, StreamReader, TrainingState
from ofa_ds.checkpoint.stream import CheckedStream
from ofa_ds.checkpoint.verifying import check_files
from ofa_ds.checkpoint.writing import THREADS
from ofa_ds.engine.partition import AVERAGE
from ofa_ds.storage.safetensors_file import DamagedError

if TYPE_CHECKING:
    from ofa_ds.engine.engine import Engine

Accept = Callable[[Manifest], None]
Shapes = Mapping[str, "tuple[int, ...]"]


def resume(
    engine: Engine, run_dir: str | Path, accept: Accept | None = None, *, lease: RunLease | None = None
) -> Manifest | None:
    """Load the newest checkpoint whose every byte is right; None where there is none. All ranks call it together.

    accept: looks at the manifest of that checkpoint first, and raises ValueError where it is not to be gone on from.
    lease: the job's; a damaged checkpoint of this run then gets another name, so that nobody counts or deletes it.
    Raises ValueError where it is of another model, or where there are checkpoints and all are damaged; OSError and
    FormatVersionError where one cannot be read: it may be right, and is not to be passed over.
    """
    run_dir = Path(run_dir)
    names, problem = _names(run_dir) if engine.ranks.rank == 0 else ([], None)
    names, problem = engine.gather((names, problem))[0]
    if problem:
        raise RuntimeError(f"{run_dir}: {problem}; nothing is begun anew where checkpoints may be")
    problems: dict[str, str] = {}
    for name in names:
        try:
            manifest = load(engine, run_dir / name, accept)
        except DamagedError as error:
            problems[name] = str(error)
            continue
        for damaged, why in problems.items():  # only now: where all are damaged, the next start is to find them all
            _pass_over(run_dir / damaged, why, lease)
        return manifest
    if problems:
        raise ValueError(f"{run_dir}: none of its checkpoints can be used: {'; '.join(problems.values())}; {WAY_OUT}")
    return None


def _names(run_dir: Path) -> tuple[list[str], str | None]:
    """Of what has a checkpoint's name, newest first; or why nobody knows."""
    try:
        return [directory.name for _, directory in step_directories(run_dir)], None
    except OSError as error:
        return [], str(error)


def _pass_over(directory: Path, why: str, lease: RunLease | None) -> None:
    """Say so; and where the damage does not show in the manifest, have it show in the name."""
    kept = ""
    if lease is not None and lease.run and own(directory, lease.run) is not None:
        with suppress(OSError):
            kept = f", and kept as {set_aside(directory, 'damaged').name}"
    report(f"{why}; skipped{kept}")


def load(engine: Engine, path: str | Path, accept: Accept | None = None) -> Manifest:
    """Fill the engine from a checkpoint of any stage and world size; all ranks call it together. Returns the manifest.

    The checksums of each file are compared first, by one rank. Raises DamagedError where a file is wrong, ValueError
    where the checkpoint is of another model; the engine is then as it was.
    """
    reader = _open(engine, Path(path))
    if accept is not None:
        accept(reader.manifest)
    _compare_parameters(reader, engine.parameter_shapes(), set(engine.buffers()))
    if reader.has_average and not engine.has_average:
        report(f"{path}: its moving average is left out, optim.ema_decay is 0")
    if engine.has_average and not reader.has_average:
        report(f"{path}: has no moving average; one starts at its weights")
    read_average_buffer = reader.ema_buffer if reader.has_average else None
    engine.restore(reader.read, reader.buffer, reader.facts.state, read_average_buffer)
    if states := reader.rng(engine.ranks.rank):  # a rank that was not there: each step is seeded from its number anyway
        engine.set_rng_states(states)
    return reader.manifest


def start_at(engine: Engine, state: TrainingState, where: str, way_out: Callable[[Shapes], str] | None = None) -> None:
    """Start from the weights and buffers of a state; all ranks call it together.

    Moments and counters stay at 0. A BatchNorm may be frozen on one side only. where: its file, for messages. way_out:
    what to do where the state's names and shapes are not the model's, from what the state has.
    Raises ValueError where it is of another model.
    """
    saved = {name: info.shape for name, info in state.tensors.items()} | dict(state.buffers)
    buffers = {name: tuple(buffer.shape) for name, buffer in engine.buffers().items()}
    counted = {name for name in saved.keys() ^ (engine.parameter_shapes().keys() | buffers.keys()) if _is_count(name)}
    wanted = {name: shape for name, shape in (engine.parameter_shapes() | buffers).items() if name not in counted}
    found = {name: saved[name] for name in saved if name not in counted}
    _refuse_other_model(where, wanted, found, *([] if way_out is None or found == wanted else [way_out(found)]))

    def read_buffer(name: str) -> Tensor:
        if name in counted:
            return torch.zeros((), dtype=torch.int64)
        info = state.tensors.get(name)
        return state.buffer(name) if info is None else state.read(name, "weight", 0, info.numel).reshape(info.shape)

    def read(name: str, kind: str, start: int, numel: int) -> Tensor:
        if name in state.tensors:
            return state.read(name, kind, start, numel)
        return state.buffer(name).reshape(-1)[start : start + numel].float()

    engine.restore(read, read_buffer, NO_STEPS)


def _is_count(name: str) -> bool:
    """A frozen BatchNorm does not count its batches."""
    return name.endswith("num_batches_tracked")


def open_together(engine: Engine, path: str | Path) -> Reader:
    """A checkpoint, or the newest one of a run, every byte of it checked; all ranks call it together."""
    return _open(engine, find(path))


def _open(engine: Engine, directory: Path) -> Reader:
    """A checkpoint whose every byte is right. Where one rank found it wrong, all raise the same.

    Raises DamagedError; FormatVersionError; OSError: a rank cannot read it.
    """
    manifest, problem = _checked(engine, directory)
    found = [each for each in engine.gather(problem) if each]
    unread = [text for kind, text in found if kind != DamagedError.__name__]
    if unread:  # says nothing about the bytes: no reason to take another checkpoint
        version = [text for kind, text in found if kind == FormatVersionError.__name__]
        if version:
            raise FormatVersionError(version[0])
        raise OSError(f"{directory}: cannot be read, which does not mean that it is damaged: {unread[0]}")
    if manifest is None or found:
        raise DamagedError(found[0][1])
    return Reader(directory, manifest)


def _checked(engine: Engine, directory: Path) -> tuple[Manifest | None, tuple[str, str] | None]:
    """The manifest, and what is wrong with this rank's share of the files: (name of the error, text)."""
    rank, world_size = engine.ranks.rank, engine.ranks.world_size
    try:
        manifest = look(directory)
        problems = check_files(directory, manifest, range(rank, manifest.world_size, world_size), progress=False)
    except (DamagedError, FormatVersionError, OSError) as error:
        return None, (type(error).__name__, str(error))
    problems.sort(key=lambda problem: isinstance(problem, DamagedError))  # what could not be read first
    return manifest, (type(problems[0]).__name__, str(problems[0])) if problems else None


def _compare_parameters(reader: Reader, shapes: Shapes, buffers: set[str]) -> None:
    saved = {name: info.shape for name, info in reader.tensors.items()}
    wanted = {**shapes, **dict.fromkeys(buffers, ())}  # a buffer's shape is compared when it is copied
    _refuse_other_model(str(reader.directory), wanted, saved | dict.fromkeys(reader.buffers, ()))


def _refuse_other_model(
    where: str, wanted: Shapes, saved: Shapes, way_out: str = "use the recipe it was made with, or another run_dir"
) -> None:
    missing, extra = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    other = sorted(name for name in wanted.keys() & saved.keys() if wanted[name] != saved[name])
    if missing or extra or other:
        detail = [f"{len(missing)} tensors are missing ({', '.join(missing[:3])})"] if missing else []
        detail += [f"{len(extra)} are not the model's ({', '.join(extra[:3])})"] if extra else []
        detail += [f"{name} is {saved[name]}, the model's is {wanted[name]}" for name in other[:3]]
        detail += [f"{len(other) - 3} more of another shape"] if len(other) > 3 else []
        raise ValueError(f"{where}: holds another model: {'; '.join(detail)}; {way_out}")


def open_checked(path: str | Path) -> Reader:
    """A checkpoint, or the newest one of a run, every byte of it checked. Raises ValueError, DamagedError."""
    directory = find(path)
    manifest = read_manifest(directory)
    if problems := check_files(directory, manifest):
        raise problems[0]
    return Reader(directory, manifest)


@contextmanager
def open_stream(path: str | Path, kinds: Sequence[str]) -> Iterator[Reader]:
    """A checkpoint, or the newest one of a run, of which each tensor's `kinds` are read once and in order.

    Its bytes are checked as they are read, so that nothing is read twice.
    Raises ValueError, DamagedError.
    """
    directory = find(path)
    manifest = read_manifest(directory)
    with ThreadPoolExecutor(THREADS) as pool, closing(CheckedStream(directory, manifest, pool, kinds)) as stream:
        yield StreamReader(directory, manifest, stream)


def load_model_weights(path: str | Path, *, average: bool = False) -> dict[str, Tensor]:
    """Every parameter (fp32) and buffer by name, whole, on the CPU; needs no engine and no other process.

    path: a checkpoint, or a run directory (its newest one). average: the moving average in the place of the weights.
    Raises ValueError; DamagedError where a checksum is wrong.
    """
    reader = open_checked(path)
    if average and not reader.has_average:
        raise ValueError(f"{reader.directory}: has no moving average; it was trained without optim.ema_decay")
    weights = {}
    for name, info in reader.tensors.items():
        kind = AVERAGE if average and AVERAGE in info.kinds else "weight"
        weights[name] = reader.read(name, kind, 0, info.numel).reshape(info.shape)
    averaged = reader.ema_buffers if average else {}
    buffers = {name: reader.ema_buffer(name) if name in averaged else reader.buffer(name) for name in reader.buffers}
    return weights | buffers
