"""`ofa-ds shards build`: TSV files, here or remote, become a directory of shards."""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ofa_ds.cli.parser import Commands, UsageError, command, positive
from ofa_ds.terms import DOWNSTREAM_TASKS, PRETRAINING_FAMILIES, ROWS_PER_SHARD, SHARD_BYTES

if TYPE_CHECKING:
    from ofa_ds.data.manifest import Manifest

WARNINGS_SHOWN = 5
"""On the console; all are in the directory."""

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def add_build(shards: Commands) -> None:
    build = command(
        shards, "build", _shards_build, "Turn TSV files into Arrow shards, every line checked.",
        example="ofa-ds shards build --out data/shards --vision-language vl.tsv --text text.tsv --on-error quarantine",
    )  # fmt: skip
    build.add_argument("--out", type=str, required=True, metavar="DIR", help="directory to make, or s3://...")
    for family in ("vision-language", "text", "image", "detection"):
        build.add_argument(
            f"--{family}", type=str, nargs="+", default=[], metavar="TSV", help=f"files of {family} rows"
        )
    build.add_argument(
        "--negatives", type=Path, metavar="DIR", help="OFA's negative_sample: wrong captions and answers"
    )
    build.add_argument("tsv", type=str, nargs="*", default=[], metavar="TSV", help="with --task: its files")
    build.add_argument(
        "--task", choices=DOWNSTREAM_TASKS, metavar="TASK", help=f"a downstream task: {', '.join(DOWNSTREAM_TASKS)}"
    )
    build.add_argument("--answers", type=Path, metavar="FILE", help="with --task: its possible answers, text or JSON")
    build.add_argument(
        "--columns", type=columns, default={}, metavar="NAME=N,...",
        help="with --task: which column, from 0, holds what, where not as in the original's files",
    )  # fmt: skip
    build.add_argument(
        "--no-references", action="store_true", help="with --task: rows to predict; what is right is not read"
    )
    build.add_argument(
        "--held-out", action="store_true", help="with --task: keep rows whose answer is not among --answers, to judge"
    )
    add_shard_bytes(build)
    build.add_argument(
        "--rows-per-shard", type=positive, default=ROWS_PER_SHARD, metavar="N", help="rows of one Arrow file, at most"
    )
    add_how(build)
    build.add_argument("--strict", action="store_true", help="a line that looks like a mistake is a bad line")


def add_shard_bytes(parser: argparse.ArgumentParser) -> None:
    about = "of one Arrow file, about: 512M, 4G"
    parser.add_argument("--shard-bytes", type=num_bytes, default=SHARD_BYTES, metavar="N", help=about)


def add_how(parser: argparse.ArgumentParser) -> None:
    """What all that builds is told alike."""
    parser.add_argument("--work", type=Path, metavar="DIR", help="with a remote --out: where to build, on a local disk")
    add_workers(parser)
    parser.add_argument("--on-error", choices=("stop", "quarantine"), default="stop", help="what a bad record does")


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=positive, default=2, metavar="N", help="processes")


def num_bytes(given: str) -> int:
    """`4G`, `512M`, `100k`, `4096`, for argparse."""
    digits, unit = given.rstrip("kKmMgG"), given.lstrip("0123456789").lower()
    if not (digits.isascii() and digits.isdigit()) or unit not in _UNITS or not int(digits):
        raise argparse.ArgumentTypeError(f"want bytes such as 4096, 100k, 512M, 4G, got {given!r}")
    return int(digits) * _UNITS[unit]


def columns(given: str) -> dict[str, int]:
    """`text=0,label=1` -> where everything is, for argparse."""
    from ofa_ds.data.task_rows import READERS

    found: dict[str, int] = {}
    for item in given.split(","):
        name, _, place = item.partition("=")
        if name not in READERS or name in found or not (place.isascii() and place.isdigit()):
            raise argparse.ArgumentTypeError(
                f"want NAME=N,... with each of {', '.join(READERS)} once at most and N counted from 0, got {item!r}"
            )
        found[name] = int(place)
    return found


def _shards_build(options: argparse.Namespace) -> None:
    from ofa_ds.data.building.build import build_shards

    families = {name: getattr(options, name) for name in PRETRAINING_FAMILIES}
    how = {
        name: getattr(options, name)
        for name in ("rows_per_shard", "shard_bytes", "workers", "on_error", "strict", "work")
    }
    if options.task:
        from ofa_ds.tasks.task_shards import build_task_shards

        if any(families.values()) or options.negatives:
            raise UsageError(f"--task {options.task}: its TSV files come alone, without an option before them")
        manifest = build_task_shards(
            options.out, options.task, options.tsv, answers=options.answers, columns=options.columns,
            references=not options.no_references, held_out=options.held_out, **how,
        )  # fmt: skip
    else:
        if options.tsv or options.answers or options.columns or options.no_references or options.held_out:
            raise UsageError("files without an option, --answers, --columns, --no-references, --held-out: want --task")
        manifest = build_shards(options.out, negatives=options.negatives, **families, **how)
    print_manifest(options.out, manifest)


def print_manifest(out: str, manifest: Manifest) -> None:
    """What was built into `out`, a line a family; the first warnings before it."""
    from ofa_ds.storage.file_systems import is_remote, local_path

    count = sum(part.warnings for part in manifest.families.values())
    if not is_remote(out):
        _print_warnings(local_path(out) / "warnings", count)
    for family, part in manifest.families.items():
        counts = {
            "bad lines in quarantine": part.quarantined, "without an answer": part.unanswered,
            "answered outside --answers": part.unlisted,
        }  # fmt: skip
        more = "".join(f", {count} {what}" for what, count in counts.items() if count)
        print(f"{family:16} {part.rows:>10} rows{more}{f', warnings: {part.warnings}' if part.warnings else ''}")
    print(f"shards in {out}")


def _print_warnings(folder: Path, count: int) -> None:
    """The first few of them."""
    shown = 0
    for log in sorted(folder.glob("*.log")):
        with log.open(encoding="utf-8") as lines:
            for line in islice(lines, WARNINGS_SHOWN - shown):
                print(f"warning: {line.rstrip()}", file=sys.stderr)
                shown += 1
    if count > shown:
        print(f"warning: {count - shown} more in {folder}", file=sys.stderr)
