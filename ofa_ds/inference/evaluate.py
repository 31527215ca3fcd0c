"""Held-out loss and scores of each task, every one beside what is reached without looking.

Blind is the best of: a grey picture, the picture of another row, and the constant answer that is best in hindsight (of
each question type). A model that has learned the texts alone is as good blind as with its own picture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ofa_ds.data.answer_list import best_answer
from ofa_ds.data.example import Example
from ofa_ds.data.shards import Shards
from ofa_ds.inference.answering import samples
from ofa_ds.inference.answers import sample_sheet
from ofa_ds.inference.asking import (
    AS_THE_TASK_SAYS,
    How,
    answers_to,
    asked_as,
    check_list,
    downstream_tasks,
    with_settings,
)
from ofa_ds.inference.loaded_model import LoadedModel, load_model, token_sums
from ofa_ds.inference.painted_scores import PaintedScores
from ofa_ds.inference.painting import that_paints
from ofa_ds.inference.share import ALONE, Share
from ofa_ds.progress import Progress
from ofa_ds.storage.atomic import new_content
from ofa_ds.tasks import judges
from ofa_ds.tasks.context import Context
from ofa_ds.tasks.kind import Task
from ofa_ds.tasks.task import DOWNSTREAM, DOWNSTREAM_FAMILY, asked_for, examples_of, table_of
from ofa_ds.terms import PICTURE_SCORES
from ofa_ds.vision.picture_scores import NO_FILES, ScoreFiles

GREY = 128
"""Pixel value of the grey picture: the middle of the normalised range."""
CARDS = 6
"""Rows on the picture of a downstream task."""


def evaluate(
    checkpoint: str | Path, shards: str | Path, *, tasks: Sequence[str] | None = None, rows: int = 1000,
    how: How = AS_THE_TASK_SAYS, png: str | Path | None = None, device: str | torch.device | None = None,
    average: bool = False, vocab: Path | None = None, codes_model: Path | None = None,
    score_files: ScoreFiles = NO_FILES, share: Share = ALONE,
) -> dict[str, Any]:  # fmt: skip
    """Judge a checkpoint, or the newest one of a run directory, on held-out shards.

    rows: examples of each task at most, the first of the shards. how: answers are found; pretraining tasks are answered
    greedily where it says no number of beams. png: a picture per task goes here. average: judge the moving average of
    the weights. vocab: as in `load_model`. codes_model: the VQGAN that paints image codes in `png`. score_files:
    weights that judge what it paints. share: this process's part; rank 0 paints and draws.
    Returns {"checkpoint", "step", "shards", "beam", "decoding", "seconds", "tasks": what `judge_tasks` returns}.
    """
    began = time.monotonic()
    data = Shards(shards, task=next((name for name in tasks or () if name in DOWNSTREAM), ""))
    model = load_model(checkpoint, device, average=average, vocab=vocab, precision=how.precision)
    model, painted = _painting(model, data, codes_model, score_files, share)
    result = judge_tasks(model, data, tasks=tasks, rows=rows, how=how, slowly=True, painted=painted, share=share)
    if png is not None and share.rank == 0:
        rows = CARDS // len(result) if DOWNSTREAM_FAMILY in data.families else 1
        with new_content(png) as partial:
            sample_sheet(model, data, tasks=list(result), rows=rows, how=how).save(partial)
    return {
        "checkpoint": model.path, "step": model.step, "shards": str(shards), "beam": how.beams,
        "decoding": how.search, "seconds": round(time.monotonic() - began, 1), "tasks": result,
    }  # fmt: skip


def _painting(
    model: LoadedModel, shards: Shards, codes_model: Path | None, files: ScoreFiles, share: Share
) -> tuple[LoadedModel, PaintedScores | None]:
    """On rank 0 with what paints and what judges it. All together raise what is wrong there: none waits for rank 0."""
    painted, problem = None, None
    if share.rank == 0:
        try:
            model = that_paints(model, codes_model)
            print(model.describe(), file=sys.stderr)
            painted = _painted_scores(model, shards, files)
        except (ValueError, OSError) as error:
            problem = error
    told = share.gather("" if problem is None else str(problem))[0]
    if problem is not None:
        raise problem
    if told:
        raise ValueError(told)
    return model, painted


def _painted_scores(model: LoadedModel, shards: Shards, files: ScoreFiles) -> PaintedScores | None:
    """None where no row asks for a picture, and where nothing paints it, which is said.

    Raises ValueError: files judge pictures of which there will be none, or one is wrong.
    """
    if not any(name in DOWNSTREAM and DOWNSTREAM[name].decoding.codes for name in shards.types):
        if files != NO_FILES:
            raise ValueError(f"{shards.path}: asks for no pictures of texts; leave --clip and --inception out")
        return None
    if model.paint is None:
        what = f"no {', '.join(PICTURE_SCORES)}: say what paints the codes, --codes-model DIR"
        print(f"{what}, and with what they are judged, --clip and --inception", file=sys.stderr)
        return None
    return PaintedScores(model, files)


def judge_tasks(
    model: LoadedModel, shards: Shards, *, tasks: Sequence[str] | None = None, rows: int = 1000,
    how: How = AS_THE_TASK_SAYS, blind: bool = True, slowly: bool = False, painted: PaintedScores | None = None,
    share: Share = ALONE,
) -> dict[str, Any]:  # fmt: skip
    """{task: {"examples", "loss", "token_accuracy", "scores", "by_type" (vqa)}} of the tasks that the shards have.

    tasks: those that the model's recipe trains, where not given. blind False: only with its own pictures. slowly: the
    scores of `Task.judge_slowly` too. painted: judges what tasks paint; rank 0 alone has it. share: of several
    processes that hold the same model, each of which calls this; all return the same, but for the slow scores and those
    of pictures, which rank 0 alone has. Shares are 0 ... 1, losses nats per token, each as in `beside_blind`.
    Raises ValueError: there is nothing to ask, or nothing says what is right.
    """
    table = table_of(shards.families)
    if DOWNSTREAM_FAMILY in shards.families:
        models = {name: asked_as(model, name, how) for name in downstream_tasks(model, shards, tasks)}
    else:
        model = with_settings(model, how.settings)
        trained = asked_for(model.recipe.data)
        models = {name: model for name in table if name in (trained if tasks is None else tasks)}
    if how.samples > 1 and not any(table[name].decoding.codes for name in models):
        raise ValueError(f"--samples: none of {', '.join(models)} paints; leave it out")
    contexts = {name: each.context(shards) for name, each in models.items()}
    held_out = _collected(shards, contexts, rows)
    if not any(held_out.values()):
        raise ValueError(f"{shards.path}: has no row for {', '.join(tasks or asked_for(model.recipe.data))}")
    for name, asked in held_out.items():
        check_list(model, contexts[name], table[name], how, f"{shards.path}: build it with --answers FILE")
        _check(shards, table[name], contexts[name], asked, rank=share.rank)
    answered = {
        name: _answered(models[name], contexts[name], table[name], asked, how=how, blind=blind, share=share)
        for name, asked in held_out.items()
        if asked
    }
    share.leave()
    slowly, painted = (slowly, painted) if share.rank == 0 else (False, None)
    return {
        name: _judged(contexts[name], table[name], each, blind=blind, slowly=slowly, painted=painted)
        for name, each in answered.items()
    }


def _collected(shards: Shards, contexts: dict[str, Context], rows: int) -> dict[str, list[Example]]:
    """The examples of each task; those of pretraining, which share rows and a context, together."""
    if DOWNSTREAM_FAMILY in shards.families:
        return {name: collect(shards, ctx, [name], rows)[name] for name, ctx in contexts.items()}
    return collect(shards, next(iter(contexts.values())), list(contexts), rows) if contexts else {}


def _check(shards: Shards, task: Task, ctx: Context, asked: Sequence[Example], *, rank: int) -> None:
    """Tells what is cut. Raises ValueError for downstream rows that do not say what is right."""
    if task.family == DOWNSTREAM_FAMILY:
        unknown = [example for example in asked if not example.references and example.region is None]
        if unknown:
            raise ValueError(
                f"{shards.path}: row id {unknown[0].row_id!r} and {len(unknown) - 1} more of {len(asked)} do not say "
                f"what is right, so nothing can be judged; `ofa-ds predict` answers them"
            )
    if ctx.candidates is not None and ctx.config.task.constrained and rank == 0:
        listed = set(ctx.candidates.answers)
        if outside := sum(best_answer(example.references) not in listed for example in asked if example.references):
            what = f"of {outside} of {len(asked)} examples the right answer is not in the list: their loss is infinite"
            print(f"{task.name}: {what}", file=sys.stderr)
    if (cut := sum(example.cut for example in asked)) and rank == 0:
        what = f"{cut} of {len(asked)} examples cut to the {ctx.max_positions} positions of the model"
        print(f"{task.name}: {what}", file=sys.stderr)


def collect(shards: Shards, ctx: Context, tasks: Sequence[str], limit: int) -> dict[str, list[Example]]:
    """The first `limit` examples of each task, in row order; image-text matching in pairs, the true one first."""
    found: dict[str, list[Example]] = {task: [] for task in tasks}
    table = table_of(shards.families)
    for family in dict.fromkeys(table[task].family for task in tasks):
        missing, start = [task for task in tasks if table[task].family == family], 0
        while missing:
            types = [table[task].row_types for task in missing]
            union = set().union(*types) if all(types) else ()
            for index in shards.rows_of_types(family, union, start=start):
                for example in examples_of(shards, missing, family, index, ctx):
                    found[example.task].append(example)
                if any(len(found[task]) >= limit for task in missing):
                    break
            else:
                break
            start = index + 1
            missing = [task for task in missing if len(found[task]) < limit]
    return {task: found[task][:limit] for task in tasks}


def blinded(asked: Sequence[Example], how: str) -> list[Example] | None:
    """The same questions about a "grey" picture or that of another row ("shuffled"); None where there is none.

    Where pictures are the answers, "shuffled" are the captions.
    """
    if asked and all(example.code and example.image is None for example in asked):
        others = [*asked[len(asked) // 2 :], *asked[: len(asked) // 2]]
        pairs = zip(asked, others, strict=True)
        return None if how == "grey" or len(asked) < 2 else [dataclasses.replace(a, source=b.source) for a, b in pairs]
    if any(example.image is None for example in asked):
        return None
    if how == "grey":
        pictures = {example.image.shape: np.full_like(example.image, GREY) for example in asked}
        return [dataclasses.replace(example, image=pictures[example.image.shape]) for example in asked]
    pictures_of = [example.image_id or example.row_id for example in asked]
    for shift in (2, 3, len(asked) // 3, len(asked) // 2):  # by two: the examples of a matching pair are of one row
        others = [*asked[shift:], *asked[:shift]]
        if all(a != (b.image_id or b.row_id) for a, b in zip(pictures_of, others, strict=True)):
            return [dataclasses.replace(a, image=b.image) for a, b in zip(asked, others, strict=True)]
    return None


class _Answered(NamedTuple):
    """What a model says of examples, with its own pictures and blind."""

    asked: list[Example]
    tokens: dict[str, tuple[float, float]]
    """Of each view loss and accuracy."""
    answers: dict[str, judges.Answers]
    """None of a task without a judge."""
    samples: list[judges.Answers]
    """Several answers of each example, where they were asked for, with its own picture; the first is in `answers`."""


def _answered(
    model: LoadedModel, ctx: Context, task: Task, asked: list[Example], *, how: How, blind: bool, share: Share
) -> _Answered:
    """All processes together."""
    views = {"own": asked}
    if blind:
        found = {kind: blinded(asked, kind) for kind in ("grey", "shuffled")}
        views |= {kind: view for kind, view in found.items() if view is not None}
    views = {kind: share.part(view) for kind, view in views.items()}
    answers: dict[str, judges.Answers] = {}
    several: list[judges.Answers] = []
    total = len(views) * (1 if task.judge is None else 2) * len(views["own"])
    with contextlib.closing(Progress(total, f"judging {task.name}", "examples")) as progress:
        tokens = {kind: _token_scores(model, view, share, progress.add) for kind, view in views.items()}
        if task.judge is not None:
            for kind, view in views.items():
                if kind == "own" and how.samples > 1 and task.decoding.codes:
                    several = share.whole(samples(model, view, task, how.samples, progress.add))
                    answers[kind] = [each[0] for each in several]
                else:
                    answers[kind] = share.whole(answers_to(model, ctx, task, view, how, progress.add))
    return _Answered(asked, tokens, answers, several)


def _judged(
    ctx: Context, task: Task, found: _Answered, *, blind: bool, slowly: bool, painted: PaintedScores | None
) -> dict[str, Any]:
    """Loss, token accuracy and scores of one task."""
    asked, answers = found.asked, found.answers
    constant = task.constant(asked) if blind else {}
    constant_tokens = {"constant": constant.get(judges.TOKEN_ACCURACY)}
    result: dict[str, Any] = {
        "examples": len(asked),
        "loss": beside_blind({kind: value[0] for kind, value in found.tokens.items()}, best=min),
        "token_accuracy": beside_blind({kind: value[1] for kind, value in found.tokens.items()} | constant_tokens),
        "scores": {},
    }
    if task.judge is not None:
        by_view = {kind: task.judge(ctx, asked, given) for kind, given in answers.items()} | {"constant": constant}
        if slowly and task.judge_slowly is not None:
            for kind, given in answers.items():
                by_view[kind] |= task.judge_slowly(ctx, asked, given)
        if painted is not None and task.decoding.codes:
            for kind, given in answers.items():
                several = found.samples if kind == "own" and found.samples else [[ids] for ids in given]
                by_view[kind] |= painted(asked, several, all_scores=kind == "own")
        result["scores"] = {
            name: beside_blind({kind: each.get(name) for kind, each in by_view.items()}) for name in by_view["own"]
        }
        if task.kind is not None and blind:
            result["by_type"] = _by_type(ctx, task, asked, answers)
    return result


def _token_scores(
    model: LoadedModel, asked: Sequence[Example], share: Share, told: Callable[[int], object]
) -> tuple[float, float]:
    """Mean loss and accuracy per target token over the parts of all processes."""
    sums = np.sum(share.gather(token_sums(model, asked, told)), axis=0)
    return float(sums[0] / max(sums[2], 1)), float(sums[1] / max(sums[2], 1))


def beside_blind(values: judges.Scores, best: Callable[..., float] = max) -> judges.Scores:
    """{"own", "grey", "shuffled", "constant", "blind": best of those, "gain": own beside it}; None for none."""
    without = [values[how] for how in ("grey", "shuffled", "constant") if values.get(how) is not None]
    own, blind = values["own"], best(without) if without else None
    gain = None if blind is None or own is None else own - blind if best is max else blind - own
    gain = None if gain is None or math.isnan(gain) else gain  # of two infinite losses
    return {how: values.get(how) for how in ("own", "grey", "shuffled", "constant")} | {"blind": blind, "gain": gain}


def _by_type(
    ctx: Context, task: Task, asked: Sequence[Example], answers: dict[str, judges.Answers]
) -> dict[str, dict[str, Any]]:
    """What the answers to each kind of question are worth, most frequent first: a constant of its own to each."""
    types = judges.merged_types([task.kind(example) for example in asked])
    result = {}
    for kind in sorted(set(types), key=lambda kind: (-types.count(kind), kind)):
        here = [i for i, each in enumerate(types) if each == kind]
        examples = [asked[i] for i in here]
        found = {view: task.judge(ctx, examples, [given[i] for i in here]) for view, given in answers.items()}
        name = next(iter(found["own"]))
        values = {view: scores[name] for view, scores in found.items()} | {"constant": task.constant(examples)[name]}
        result[kind] = {"examples": len(here)} | beside_blind(values)
    return result
