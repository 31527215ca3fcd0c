"""A downstream task's TSV files -> shards: what the task says of its lines, put together with what the user says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ofa_ds.data.answer_list import read_answers_file
from ofa_ds.data.building.build import build_shards
from ofa_ds.data.building.tsv_source import width_of
from ofa_ds.data.manifest import Manifest
from ofa_ds.data.shards import Shards
from ofa_ds.data.task_rows import ANSWERING, TaskLines
from ofa_ds.storage import file_systems
from ofa_ds.tasks.kind import Task
from ofa_ds.tasks.task import DOWNSTREAM, DOWNSTREAM_FAMILY
from ofa_ds.terms import PRETRAINING_TASKS


def build_task_shards(
    out: Path | str, name: str, files: Sequence[Path | str], *, answers: Path | str | None = None,
    columns: Mapping[str, int] | None = None, references: bool = True, held_out: bool = False, **options: Any,
) -> Manifest:  # fmt: skip
    """`build_shards` for the files of downstream task `name`, with its `options`.

    answers: file with the list of answers (`read_answers_file`). columns: where everything is, where not where the
    original has it. references False: rows to predict, what is right is not read. held_out: a row whose answer is not
    in the list is kept, to be judged; else it is a bad line, as training would meet an infinite loss there.
    Raises ValueError as `build_shards`, and for a task that takes no list of answers.
    """
    task = DOWNSTREAM[name]
    if answers is not None and task.candidates != "file":
        kind = "its answers are its labels" if task.candidates == "labels" else "its answers are free"
        raise ValueError(f"--answers: {name} takes no list of answers, {kind}")
    paths = file_systems.expand(files)
    if not paths:
        raise ValueError(f"--task {name}: give at least one TSV file")
    width = width_of(paths[0]) if columns or task.other_columns else task.width
    known = columns or task.other_columns.get(width)
    lines = TaskLines(
        type=task.row_types[0], columns=known or task.columns, labels=task.labels, references=references,
        width=width if known else task.width, listed=references and not held_out,
        needs=needed_by(task), answering=answering_of(task),
    )  # fmt: skip
    listed = () if answers is None else read_answers_file(Path(answers))
    return build_shards(out, downstream=paths, lines=lines, answers=listed, **options)


def needed_by(task: Task) -> list[str]:
    """Names of columns without which a task cannot be asked; what goes with a picture and a text may be left out."""
    pair = () if "image" in task.columns else ("text_pair",)
    return [kind for kind in ("image", "text", *pair) if kind in task.columns]


def answering_of(task: Task) -> tuple[str, ...]:
    """Names of columns that may say what is right of a task, its own first: a box, codes, or answers in any form."""
    own = tuple(kind for kind in ANSWERING if kind in task.columns)
    if own in (("box",), ("codes",)):
        return own
    free = [kind for kind in ANSWERING if kind not in (*own, "box", "codes") and (kind != "label" or task.labels)]
    return (*own, *free)


def tasks_of(shards: Shards) -> list[str]:
    """The downstream tasks that have their rows here, most often one; none for shards of pretraining."""
    if DOWNSTREAM_FAMILY not in shards.families:
        return []
    return [name for name, task in DOWNSTREAM.items() if any(kind in shards.types for kind in task.row_types)]


def task_shown(shards: Shards, asked: str | None) -> str:
    """The downstream task to show of these shards; "" where they are of pretraining.

    Raises ValueError where the one that is asked for has no rows here.
    """
    here = tasks_of(shards)
    if asked and (here or asked not in PRETRAINING_TASKS) and asked not in here:
        raise ValueError(f"{shards.path}: has no rows of {asked}, but of {', '.join(here or PRETRAINING_TASKS)}")
    return asked or here[0] if here else ""
