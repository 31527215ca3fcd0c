"""`ofa-ds bench`: measures this machine for `ofa-ds plan --calibration`, and how far plans are from measurements."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ofa_ds.cli.parser import Commands, UsageError, command, group, positive

if TYPE_CHECKING:
    from ofa_ds.plan.calibration import Calibration

MAX_RANKS = 3
"""Of which plans on a CPU were checked."""


def add_bench(commands: Commands) -> None:
    """Add `bench step|memory|io|data|plan`."""
    actions = group(commands, "bench", "Measure this machine, so that a plan is of it and not of a data sheet.")
    step = command(
        actions, "step", _step,
        "Time a model's pieces on this machine, then real training steps on 1 to N ranks: costs of a step. It wants "
        "the machine for itself, for 4 minutes.",
        example="ofa-ds bench step --output cpu.json",
    )  # fmt: skip
    memory = command(
        actions, "memory", _memory,
        "What processes hold beside what arithmetic says, from training runs of small models with large blocks mapped "
        "(MALLOC_MMAP_THRESHOLD_=1048576), as plans have it; 6 minutes. It adds to "
        "the file of `bench step`.",
        example="ofa-ds bench memory --output cpu.json",
    )  # fmt: skip
    for parser in (step, memory):
        parser.add_argument("--ranks", type=_ranks, default=2, metavar="N", help="measure 1 to N ranks at once")
    io = command(
        actions, "io", _io, "Bytes a second of memory, and of files in a directory; writes 1 GiB there.",
        example="ofa-ds bench io --folder runs --output cpu.json",
    )  # fmt: skip
    io.add_argument("--folder", type=Path, metavar="DIR", help="where checkpoints are to go; else a temporary one")
    data = command(
        actions, "data", _data,
        "Seconds of a core that rows take to read, decode, augment and pack, by family: what a plan says of "
        "data.workers. Photographs of 480 x 360 are drawn, or your shards are read; half a minute.",
        example="ofa-ds bench data --shards data/shards --vocab data/vocab --output cpu.json",
    )  # fmt: skip
    data.add_argument("--shards", type=Path, metavar="DIR", help="of a pretraining run; else photographs are drawn")
    data.add_argument("--vocab", type=Path, metavar="DIR", help="its vocabulary")
    for parser in (step, memory, io, data):
        parser.add_argument("--output", type=Path, metavar="FILE", required=True, help="made, or added to")
    plan = command(
        actions, "plan", _plan,
        "Predict 11 training runs on this CPU that the file was not made from, run them, and say how far off each is; "
        "base on 2 ranks wants 14 GB and the machine for itself, all of it 15 minutes.",
        example="ofa-ds bench plan --calibration cpu.json",
    )  # fmt: skip
    plan.add_argument("--calibration", type=Path, metavar="FILE", required=True, help="of bench step and bench memory")
    plan.add_argument("--cases", type=_numbers, metavar="N,...", help="only these, from 1 on; else all")
    plan.add_argument("--only", choices=("step", "memory"), help="measure only the time, or only the memory")
    plan.add_argument("--keep-errors", action="store_true", help="write the largest errors into FILE, for its plans")
    plan.add_argument("--json", action="store_true", help="one JSON array, with the parts of each prediction")


def _step(options: argparse.Namespace) -> None:
    known = _known(options.output)
    if _on_gpu():
        from ofa_ds.bench.gpu_rates import bench_gpu

        found = bench_gpu()
    else:
        from ofa_ds.bench.calibrate import bench_step

        found = bench_step(range(1, options.ranks + 1))
    _write(options.output, known, found)


def _memory(options: argparse.Namespace) -> None:
    from ofa_ds.bench.calibrate import bench_memory

    known = _known(options.output)
    if known is None or not known.sizes:
        raise UsageError(f"{options.output}: has no pieces yet; first: ofa-ds bench step --output {options.output}")
    if known.device != "cpu":
        raise UsageError(f"{options.output}: is of {known.device}; memory of processes is measured on a CPU")
    _write(options.output, known, bench_memory(known, range(1, options.ranks + 1)))


def _io(options: argparse.Namespace) -> None:
    from ofa_ds.bench.calibrate import bench_io

    if options.folder is not None and not options.folder.is_dir():
        raise UsageError(f"--folder {options.folder}: no such directory")
    _write(options.output, _known(options.output), bench_io(options.folder))


def _data(options: argparse.Namespace) -> None:
    import dataclasses

    from ofa_ds.bench.calibrate import blank
    from ofa_ds.bench.loader import bench_feed, feed_table, fitted
    from ofa_ds.plan.feed import key

    if (options.shards is None) != (options.vocab is None):
        raise UsageError("--shards and --vocab: want both, or none")
    known = _known(options.output)
    try:
        found = bench_feed(options.shards, options.vocab, repeats=3)
    except ValueError as error:
        raise UsageError(error) from error
    print(feed_table(found))
    costs = {key(family): fitted(points) for family, points in found.items()}
    _write(options.output, known, dataclasses.replace(blank(), costs=costs))


def _plan(options: argparse.Namespace) -> None:
    from ofa_ds.bench.plan import CASES, WHAT, bench_plan, errors, table

    if wrong := [each for each in options.cases or () if each > len(CASES)]:
        raise UsageError(f"--cases: there are {len(CASES)}, got {wrong[0]}")
    calibration = _read(options.calibration)
    cases = CASES if options.cases is None else [CASES[number - 1] for number in options.cases]
    try:
        rows = bench_plan(calibration, cases, WHAT if options.only is None else (options.only,))
    except ValueError as error:
        raise UsageError(f"{options.calibration}: {error}") from error
    print(json.dumps(rows) if options.json else table(rows))
    if options.keep_errors:
        import dataclasses

        known = dataclasses.replace(calibration, errors=calibration.errors | errors(rows))
        _write(options.calibration, None, known, sys.stderr if options.json else None)


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _known(path: Path) -> Calibration | None:
    """What a file has already; it is refused before anything is measured, not after it."""
    if not path.exists():
        if not path.parent.is_dir():
            raise UsageError(f"--output {path}: there is no directory {str(path.parent)!r}")
        return None
    return _read(path)


def _read(path: Path) -> Calibration:
    from ofa_ds.plan.calibration import load_calibration

    try:
        return load_calibration(path)
    except ValueError as error:
        raise UsageError(error) from error


def _write(path: Path, known: Calibration | None, found: Calibration, said_to: TextIO | None = None) -> None:
    from ofa_ds.storage.atomic import replace_file

    try:
        both = found if known is None else known.merged(found)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
    replace_file(path, both.as_text())
    counts = f"{len(both.costs)} costs, {len(both.sizes)} sizes"
    print(f"{path}: {both.device}, {both.machine}, {both.date}; {counts}", file=said_to)


def _ranks(text: str) -> int:
    if (value := positive(text)) > MAX_RANKS:
        raise argparse.ArgumentTypeError(f"want at most {MAX_RANKS}, got {text!r}")
    return value


def _numbers(text: str) -> list[int]:
    return [positive(each) for each in text.split(",")]
