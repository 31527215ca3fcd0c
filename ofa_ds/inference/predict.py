"""The answers to all rows of shards, as a task's leaderboard takes them (docs/finetuning.md, Handing in).

Rows are answered in blocks, each a file of its own in a directory beside the result: what a killed process has finished
is not done again. Of any number of processes, which need share nothing but that directory, each does its own blocks,
and the last one puts them together: every row is there once, in the order of the shards. Where a table has the
numbers of rows and the rows no ids, these are the numbers of their lines in the source files, from 0 on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from ofa_ds.checkpoint.format import MANIFEST
from ofa_ds.data.example import Example
from ofa_ds.data.shards import Shards
from ofa_ds.inference.asking import AS_THE_TASK_SAYS, How, answers_to, asked_as, check_list, downstream_tasks
from ofa_ds.inference.loaded_model import LoadedModel, Told, untold
from ofa_ds.inference.share import ALONE, Share
from ofa_ds.progress import Progress
from ofa_ds.storage.atomic import new_file
from ofa_ds.tasks.context import Context
from ofa_ds.tasks.kind import Task
from ofa_ds.tasks.task import DOWNSTREAM, DOWNSTREAM_FAMILY, examples_of

BLOCK_ROWS = 64
"""Rows that are answered again at most, by each process, after a kill."""

SETTINGS = "settings.json"
_PATHS = ("shards", "vocab", "heldout", "workers")
"""Of [data], what says nothing about an answer."""


def check_out(out: Path, share: Share = ALONE) -> None:
    """Raises ValueError, before anything is loaded, for a file that is there, or cannot be."""
    if os.path.lexists(out) and share.rank == 0:
        raise ValueError(f"{out}: exists; give another --out or remove it")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no directory {str(out.parent)!r}")


def partial_directory(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def predict(
    model: LoadedModel, shards: Shards, name: str, out: Path, *, how: How = AS_THE_TASK_SAYS, average: bool = False,
    share: Share = ALONE, block_rows: int = BLOCK_ROWS, told: Told = untold,
) -> bool:  # fmt: skip
    """Write what `Task.hand_in` says of every row to `out`. Returns whether it is complete, with this process's part.

    told: called with the number of rows that are answered, after each few. average: `model` holds the moving average.
    What was begun with the same model, rows and settings is gone on with, also by another number of processes.
    Raises ValueError: no rows of the task, or what was begun is something else.
    """
    downstream_tasks(model, shards, [name])
    task, asked = DOWNSTREAM[name], asked_as(model, name, how)
    ctx = asked.context(shards)
    check_list(model, ctx, task, how, f"{shards.path}: build it with --answers FILE")
    rows = list(shards.rows_of_types(DOWNSTREAM_FAMILY, task.row_types))
    asked.pack([_example(shards, task, rows[0], ctx)])  # a setting that fits no row is told before anything is begun
    folder = partial_directory(out)
    if share.rank == 0:
        _tell_quarantined(shards, name)
    settings = _settings(asked, shards, task, ctx, how, average=average, block_rows=block_rows)
    try:
        _begin(folder, settings)
    except FileNotFoundError:  # another process has put all together meanwhile
        if not out.exists():
            raise
    blocks = [rows[at : at + block_rows] for at in range(0, len(rows), block_rows)]
    mine = [k for k in share.part(range(len(blocks))) if not _file(folder, k).exists()]
    total, cut = sum(len(blocks[k]) for k in mine), 0
    with contextlib.closing(Progress(total, f"answering {name}", "rows")) as progress:

        def both(count: int) -> None:
            progress.add(count)
            told(count)

        for k in mine:
            if _file(folder, k).exists() or out.exists():  # the same command runs twice at once
                continue
            examples = [_example(shards, task, row, ctx) for row in blocks[k]]
            answers = answers_to(asked, ctx, task, examples, how, both)
            _keep(_file(folder, k), task.hand_in(ctx, examples, answers), out)
            cut += sum(example.cut for example in examples)
    if cut:
        told_of = f"{cut} of the {total} rows answered here were cut to the {ctx.max_positions} positions of the model"
        print(f"{name}: {told_of}", file=sys.stderr)
    return _put_together(folder, out, task, [len(block) for block in blocks])


def _example(shards: Shards, task: Task, row: int, ctx: Context) -> Example:
    (example,) = examples_of(shards, [task.name], DOWNSTREAM_FAMILY, row, ctx)
    if task.hand_in_format != "tsv" or _has_ids(shards, task):
        return example
    line = shards.lines_before(DOWNSTREAM_FAMILY, row) + int(example.row_id) - 1
    return dataclasses.replace(example, row_id=str(line))


def _has_ids(shards: Shards, task: Task) -> bool:
    """Whether the rows' ids are their own, and not the numbers of their lines."""
    known = shards.manifest.families[DOWNSTREAM_FAMILY].own_ids
    return "id" in task.columns if known is None else known


def _tell_quarantined(shards: Shards, name: str) -> None:
    part = shards.manifest.families[DOWNSTREAM_FAMILY]
    if part.quarantined:
        files = ", ".join(f"{source.quarantined} of {source.file}" for source in part.sources if source.quarantined)
        told = f"the rows to hand in are not complete: {part.quarantined} bad lines were put into quarantine ({files})"
        print(f"{name}: {told}; {shards.path / 'quarantine'} has them", file=sys.stderr)


def _settings(
    model: LoadedModel, shards: Shards, task: Task, ctx: Context, how: How, *, average: bool, block_rows: int
) -> dict[str, Any]:
    """What the answers depend on, by names for messages."""
    manifest = Path(model.path) / MANIFEST
    decoding, candidates = how.decoding(task, ctx)
    data = {key: value for key, value in dataclasses.asdict(model.recipe.data).items() if key not in _PATHS}
    return {
        "model": xxhash.xxh3_64_hexdigest(manifest.read_bytes()) if model.path else "",
        "moving average": average,
        "precision": str(next(model.model.parameters()).dtype).removeprefix("torch."),
        "pixel norm": model.model.encoder.config.pixel_norm,
        "shards": shards.fingerprint,
        "vocabulary": model.vocab.fingerprint,
        "task": task.name,
        "decoding": dataclasses.asdict(decoding) | {"among a list": candidates is not None},
        "data": data,
        "rows of a block": block_rows,
    }


def _begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises ValueError where `folder` was begun with other settings."""
    folder.mkdir(exist_ok=True)
    path = folder / SETTINGS
    wanted = json.loads(json.dumps(settings))
    if not path.exists():
        try:
            with new_file(path) as partial:
                partial.write_text(json.dumps(wanted, indent=1))
        except ValueError:  # another process was faster
            if not path.exists():
                raise
    begun = _read(path, path.read_text(encoding="utf-8", errors="replace"))
    if not isinstance(begun, dict):
        raise RuntimeError(f"{path}: is damaged; remove {folder} to begin again")
    if other := [key for key, value in wanted.items() if begun.get(key) != value]:
        raise ValueError(f"{folder}: was begun with another {', '.join(other)}; remove it to begin again")


def _read(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RuntimeError(f"{path}: is damaged ({error}); remove it and run again") from error


def _keep(path: Path, records: Iterable[Any], out: Path) -> None:
    """Write a block, whole or not at all, also where another process writes the same one."""
    try:
        with new_file(path) as partial:
            partial.write_text("".join(f"{json.dumps(each, ensure_ascii=False)}\n" for each in records), "utf-8")
    except (FileNotFoundError, ValueError):  # another process was faster, and may have put all together already
        if not path.exists() and not out.exists():
            raise


def _file(folder: Path, block: int) -> Path:
    return folder / f"block-{block:06}.jsonl"


def _put_together(folder: Path, out: Path, task: Task, counts: list[int]) -> bool:
    """Whether all blocks are there; whoever sees that first writes `out` and removes them."""
    try:
        # in this order: blocks that are gone because all is put together were removed after `out` was there
        if not all(_file(folder, k).exists() for k in range(len(counts))) and not out.exists():
            return False
        with new_file(out) as partial, partial.open("w", encoding="utf-8") as file:
            file.writelines(_written(task, _records(folder, counts)))
    except (FileNotFoundError, ValueError):  # another process was faster
        if not out.exists():
            raise
    shutil.rmtree(folder, ignore_errors=True)
    return True


def _records(folder: Path, counts: list[int]) -> Iterator[Any]:
    for block, count in enumerate(counts):
        lines = _file(folder, block).read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        if len(lines) != count:
            raise RuntimeError(f"{_file(folder, block)}: want {count} rows, got {len(lines)}; remove it and run again")
        yield from (_read(_file(folder, block), line) for line in lines)


def _written(task: Task, records: Iterable[Any]) -> Iterator[str]:
    """The lines of the file in the task's format."""
    if task.hand_in_format == "lines":
        yield from (f"{record}\n" for record in records)
    elif task.hand_in_format == "tsv":
        yield "index\tprediction\n"
        yield from (f"{record['index']}\t{record['prediction']}\n" for record in records)
    else:
        for n, record in enumerate(records):
            yield ("[\n" if n == 0 else ",\n") + json.dumps(record, ensure_ascii=False)
        yield "\n]\n"
