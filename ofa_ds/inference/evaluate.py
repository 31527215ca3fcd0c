"""Held-out loss and scores of each task, every one beside what is reached without looking.

Blind is the best of: a grey picture, the picture of another row, and the constant answer that is best in hindsight (of
each question type). A model that has learned the texts alone is as good blind as with its own picture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ofa_ds.data.example import Example
from ofa_ds.data.shards import Shards
from ofa_ds.inference.answers import sample_sheet
from ofa_ds.inference.loaded_model import LoadedModel, generated, load_model, token_scores
from ofa_ds.progress import Progress
from ofa_ds.tasks import judges
from ofa_ds.tasks.context import Context
from ofa_ds.tasks.task import TABLE, Task, asked_for, held_out_examples

GREY = 128
"""Pixel value of the grey picture: the middle of the normalised range."""


def evaluate(
    checkpoint: str | Path, shards: str | Path, *, tasks: Sequence[str] | None = None, rows: int = 1000, beam: int = 1,
    png: str | Path | None = None, device: str | None = None, average: bool = False, vocab: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Judge a checkpoint, or the newest one of a run directory, on held-out shards.

    rows: examples of each task at most, the first of the shards. beam: 1 is greedy. png: a picture per task goes here.
    average: judge the moving average of the weights. vocab: as in `load_model`.
    Returns {"checkpoint", "step", "shards", "beam", "seconds", "tasks": what `judge_tasks` returns}.
    """
    began = time.monotonic()
    data = Shards(shards)
    model = load_model(checkpoint, device, average=average, vocab=vocab)
    result = judge_tasks(model, data, tasks=tasks, rows=rows, beam=beam)
    if png is not None:
        sample_sheet(model, data, tasks=list(result), beam=beam).save(png)
    return {
        "checkpoint": model.path, "step": model.step, "shards": str(shards), "beam": beam,
        "seconds": round(time.monotonic() - began, 1), "tasks": result,
    }  # fmt: skip


def judge_tasks(
    model: LoadedModel, shards: Shards, *, tasks: Sequence[str] | None = None, rows: int = 1000, beam: int = 1
) -> dict[str, Any]:
    """{task: {"examples", "loss", "token_accuracy", "scores", "by_type" (vqa)}} of the tasks that the shards have.

    tasks: those that the model's recipe trains, where not given. Shares are 0 ... 1, losses nats per token, each as in
    `beside_blind`. Raises ValueError: there is nothing to ask.
    """
    ctx = model.context(shards.negatives)
    trained = asked_for(ctx.config)
    wanted = [task for task in TABLE if task in (trained if tasks is None else tasks)]
    held_out = collect(shards, ctx, wanted, rows)
    if not any(held_out.values()):
        raise ValueError(f"{shards.path}: has no row for {', '.join(wanted)}")
    for name, asked in held_out.items():
        if cut := sum(example.cut for example in asked):
            what = f"{cut} of {len(asked)} examples cut to the {ctx.max_positions} positions of the model"
            print(f"{name}: {what}", file=sys.stderr)
    return {name: judge(model, ctx, TABLE[name], asked, beam=beam) for name, asked in held_out.items() if asked}


def collect(shards: Shards, ctx: Context, tasks: Sequence[str], limit: int) -> dict[str, list[Example]]:
    """The first `limit` examples of each task, in row order; image-text matching in pairs, the true one first."""
    found: dict[str, list[Example]] = {task: [] for task in tasks}
    for family in dict.fromkeys(TABLE[task].family for task in tasks):
        missing, start = [task for task in tasks if TABLE[task].family == family], 0
        while missing:
            types = [TABLE[task].row_types for task in missing]
            union = set().union(*types) if all(types) else ()
            for index in shards.rows_of_types(family, union, start=start):
                for example in _examples_of(shards, missing, family, index, ctx):
                    found[example.task].append(example)
                if any(len(found[task]) >= limit for task in missing):
                    break
            else:
                break
            start = index + 1
            missing = [task for task in missing if len(found[task]) < limit]
    return {task: found[task][:limit] for task in tasks}


def _examples_of(shards: Shards, tasks: Sequence[str], family: str, index: int, ctx: Context) -> list[Example]:
    """Raises ValueError or RuntimeError that names the row, where it does not fit the settings or is damaged."""
    row = None
    try:
        row = shards.row(family, index)
        return held_out_examples(tasks, row, index, ctx)
    except Exception as error:
        raise shards.at_row(family, index, row, error) from error


def blinded(asked: Sequence[Example], how: str) -> list[Example] | None:
    """The same questions about a "grey" picture or that of another row ("shuffled"); None where there is none."""
    if any(example.image is None for example in asked):
        return None
    if how == "grey":
        pictures = {example.image.shape: np.full_like(example.image, GREY) for example in asked}
        return [dataclasses.replace(example, image=pictures[example.image.shape]) for example in asked]
    others = [*asked[2:], *asked[:2]]  # by two: the examples of a matching pair are of one row
    if any(a.row_id == b.row_id for a, b in zip(asked, others, strict=True)):
        return None
    return [dataclasses.replace(a, image=b.image) for a, b in zip(asked, others, strict=True)]


def judge(model: LoadedModel, ctx: Context, task: Task, asked: list[Example], *, beam: int) -> dict[str, Any]:
    """Loss, token accuracy and scores of one task, with its own pictures and blind."""
    views = {"own": asked, "grey": blinded(asked, "grey"), "shuffled": blinded(asked, "shuffled")}
    views = {how: view for how, view in views.items() if view is not None}
    answers: dict[str, judges.Answers] = {}
    passes = len(views) * (1 if task.judge is None else 2)
    with contextlib.closing(Progress(passes * len(asked), f"judging {task.name}", "examples")) as progress:
        tokens = {how: token_scores(model, view, progress.add) for how, view in views.items()}
        if task.judge is not None:
            answers = {how: generated(model, view, beam=beam, told=progress.add) for how, view in views.items()}
    constant = task.constant(asked)
    constant_tokens = {"constant": constant.get(judges.TOKEN_ACCURACY)}
    result: dict[str, Any] = {
        "examples": len(asked),
        "loss": beside_blind({how: value[0] for how, value in tokens.items()}, best=min),
        "token_accuracy": beside_blind({how: value[1] for how, value in tokens.items()} | constant_tokens),
        "scores": {},
    }
    if task.judge is not None:
        by_view = {how: task.judge(ctx, asked, given) for how, given in answers.items()} | {"constant": constant}
        result["scores"] = {
            name: beside_blind({how: each.get(name) for how, each in by_view.items()}) for name in by_view["own"]
        }
        if task.kind is not None:
            result["by_type"] = _by_type(ctx, asked, answers, [task.kind(example) for example in asked])
    return result


def beside_blind(values: judges.Scores, best: Callable[..., float] = max) -> judges.Scores:
    """{"own", "grey", "shuffled", "constant", "blind": best of those, "gain": own beside it}; None for none."""
    without = [values[how] for how in ("grey", "shuffled", "constant") if values.get(how) is not None]
    own, blind = values["own"], best(without) if without else None
    gain = None if blind is None or own is None else own - blind if best is max else blind - own
    return {how: values.get(how) for how in ("own", "grey", "shuffled", "constant")} | {"blind": blind, "gain": gain}


def _by_type(
    ctx: Context, asked: Sequence[Example], answers: dict[str, judges.Answers], kinds: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The exact match of each kind of question, most frequent first."""
    types = judges.merged_types(kinds)
    expected = [judges.plain(example.target_text) for example in asked]
    right = {how: judges.exact(expected, judges.texts_of(ctx, given)) for how, given in answers.items()}
    result = {}
    for kind in sorted(set(types), key=lambda kind: (-types.count(kind), kind)):
        here = [i for i, each in enumerate(types) if each == kind]
        values = {how: judges.mean([hits[i] for i in here]) for how, hits in right.items()}
        values["constant"] = judges.constant_share([expected[i] for i in here])
        result[kind] = {"examples": len(here)} | beside_blind(values)
    return result
