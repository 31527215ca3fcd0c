"""Held-out loss and scores of all eight tasks, each beside what is reached without looking.

Blind is the best of: a grey picture, the picture of another row, and the constant answer that is best in hindsight (of
each question type). A model that has learned the texts alone is as good blind as with its own picture.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ofa_ds.data.example import Example
from ofa_ds.data.shards import Shards
from ofa_ds.inference.answers import boxes_of, objects_of, sample_sheet
from ofa_ds.inference.loaded_model import Subject, generated, load_subject, token_scores
from ofa_ds.tasks import judges as scores
from ofa_ds.tasks.pretraining import Context, examples, matching_pair, row_generator
from ofa_ds.tasks.preview import ROW_TYPES
from ofa_ds.terms import TASKS

SEED = 0
"""Of the false statements of image-text matching and the masks of text infilling: every model is asked the same."""

GREY = 128
"""Pixel value of the grey picture: the middle of the normalised range."""

FAMILY_OF = {"text_infilling": "text", "image_infilling": "image", "detection": "detection"}
"""Where not from vision-language rows."""

Scores = dict[str, float | None]
Answers = Sequence[Sequence[int]]


def evaluate(
    checkpoint: str | Path, shards: str | Path, *, tasks: Sequence[str] | None = None, rows: int = 1000, beam: int = 1,
    png: str | Path | None = None, device: str | None = None, average: bool = False, vocab: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Judge a checkpoint, or the newest one of a run directory, on held-out shards.

    rows: examples of each task at most, the first of the shards. beam: 1 is greedy. png: a picture per task goes here.
    average: judge the moving average of the weights. vocab: as in `load_subject`.
    Returns {"checkpoint", "step", "shards", "beam", "seconds", "tasks": what `judge_tasks` returns}.
    """
    began = time.monotonic()
    data = Shards(shards)
    subject = load_subject(checkpoint, device, average=average, vocab=vocab)
    result = judge_tasks(subject, data, tasks=tasks, rows=rows, beam=beam)
    if png is not None:
        sample_sheet(subject, data, tasks=list(result), beam=beam).save(png)
    return {
        "checkpoint": subject.path, "step": subject.step, "shards": str(shards), "beam": beam,
        "seconds": round(time.monotonic() - began, 1), "tasks": result,
    }  # fmt: skip


def judge_tasks(
    subject: Subject, shards: Shards, *, tasks: Sequence[str] | None = None, rows: int = 1000, beam: int = 1
) -> dict[str, Any]:
    """{task: {"examples", "loss", "token_accuracy", "scores", "by_type" (vqa)}} of the tasks that the shards have.

    Shares are 0 ... 1, losses nats per token, each as in `beside_blind`. Raises ValueError: there is nothing to ask.
    """
    ctx = subject.context(shards.negatives)
    wanted = [task for task in TASKS if tasks is None or task in tasks]
    held_out = collect(shards, ctx, wanted, rows)
    if not any(held_out.values()):
        raise ValueError(f"{shards.path}: has no row for {', '.join(wanted)}")
    return {task: judge(subject, ctx, task, asked, beam=beam) for task, asked in held_out.items() if asked}


def collect(shards: Shards, ctx: Context, tasks: Sequence[str], limit: int) -> dict[str, list[Example]]:
    """The first `limit` examples of each task, in row order; image-text matching in pairs, the true one first."""
    found: dict[str, list[Example]] = {task: [] for task in TASKS}
    open_tasks = set(tasks)
    for family, count in shards.families.items():
        for index in range(count):
            missing = {task for task in open_tasks if FAMILY_OF.get(task, "vision_language") == family}
            if not missing:
                break
            row = shards.row(family, index)
            if family == "vision_language" and not any(row["type"] in ROW_TYPES[task] for task in missing):
                continue
            given = examples(family, row, row_generator(SEED, family, 0, index), ctx)
            if "itm" in missing and row.get("type") in ROW_TYPES["itm"]:
                given += matching_pair(row, row_generator(SEED, family, 1, index), ctx)
            for example in given:
                if example.task in open_tasks:
                    found[example.task].append(example)
            open_tasks -= {task for task in open_tasks if len(found[task]) >= limit}
    return {task: found[task][:limit] for task in tasks}


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


def judge(subject: Subject, ctx: Context, task: str, asked: list[Example], *, beam: int) -> dict[str, Any]:
    """Loss, token accuracy and scores of one task, with its own pictures and blind."""
    views = {"own": asked, "grey": blinded(asked, "grey"), "shuffled": blinded(asked, "shuffled")}
    views = {how: view for how, view in views.items() if view is not None}
    tokens = {how: token_scores(subject, view) for how, view in views.items()}
    result = {
        "examples": len(asked),
        "loss": beside_blind({how: value[0] for how, value in tokens.items()}, best=min),
        "token_accuracy": beside_blind(
            {how: value[1] for how, value in tokens.items()} | _constant_tokens(task, asked)
        ),
        "scores": {},
    }
    if task in JUDGES:
        judge_answers = JUDGES[task]
        answers = {how: generated(subject, view, beam=beam) for how, view in views.items()}
        by_view = {how: judge_answers(ctx, asked, answers[how]) for how in views}
        by_view["constant"] = CONSTANTS[task](asked)
        result["scores"] = {
            name: beside_blind({how: each.get(name) for how, each in by_view.items()}) for name in by_view["own"]
        }
        if task == "vqa":
            result["by_type"] = _by_type(ctx, asked, answers)
    return result


def beside_blind(values: Scores, best: Callable[..., float] = max) -> Scores:
    """{"own", "grey", "shuffled", "constant", "blind": best of those, "gain": own beside it}; None for none."""
    without = [values[how] for how in ("grey", "shuffled", "constant") if values.get(how) is not None]
    own, blind = values["own"], best(without) if without else None
    gain = None if blind is None or own is None else own - blind if best is max else blind - own
    return {how: values.get(how) for how in ("own", "grey", "shuffled", "constant")} | {"blind": blind, "gain": gain}


def _texts(ctx: Context, answers: Answers) -> list[str]:
    return [ctx.vocab.decode(ids) for ids in answers]


def _judge_texts(ctx: Context, asked: Sequence[Example], answers: Answers) -> Scores:
    return _text_scores([example.target_text for example in asked], _texts(ctx, answers))


def _text_scores(expected: Sequence[str], texts: Sequence[str]) -> Scores:
    return {"exact match": _mean(scores.exact(expected, texts)), "CIDEr": scores.cider(expected, texts)}


def _judge_answer(ctx: Context, asked: Sequence[Example], answers: Answers) -> Scores:
    return {"exact match": _mean(scores.exact([example.target_text for example in asked], _texts(ctx, answers)))}


def _judge_matching(ctx: Context, asked: Sequence[Example], answers: Answers) -> Scores:
    right = scores.exact([example.target_text for example in asked], _texts(ctx, answers))
    about = [example.source_text.startswith(" does the image") for example in asked]
    return {
        "accuracy": _mean(right),
        "accuracy, captions": _mean([hit for hit, caption in zip(right, about, strict=True) if caption]),
        "accuracy, answers": _mean([hit for hit, caption in zip(right, about, strict=True) if not caption]),
    }


def _judge_box(ctx: Context, asked: Sequence[Example], answers: Answers) -> Scores:
    boxes = [next(iter(boxes_of(ctx, ids)), None) for ids in answers]
    return {"acc@IoU0.5": _mean(scores.found([tuple(example.boxes[0]) for example in asked], boxes))}


def _judge_objects(ctx: Context, asked: Sequence[Example], answers: Answers) -> Scores:
    expected = [list(zip(map(tuple, example.boxes), example.labels, strict=True)) for example in asked]
    given = [objects_of(ctx, ids) for ids in answers]
    return {
        "F@IoU0.5": scores.f_measure(expected, given, named=False),
        "F@IoU0.5, named": scores.f_measure(expected, given, named=True),
    }


JUDGES: dict[str, Callable[[Context, Sequence[Example], Answers], Scores]] = {
    "caption": _judge_texts, "grounded_caption": _judge_texts, "vqa": _judge_answer, "itm": _judge_matching,
    "visual_grounding": _judge_box, "detection": _judge_objects,
}  # fmt: skip
"""Tasks whose generated answers are judged; the infilling tasks have their token accuracy."""


def _constant_text(asked: Sequence[Example]) -> Scores:
    expected = [scores.plain(example.target_text) for example in asked]
    return _text_scores(expected, [max(expected, key=expected.count)] * len(expected))


def _constant_answer(asked: Sequence[Example]) -> Scores:
    types = scores.merged_types([scores.question_type(example.source_text) for example in asked])
    return {"exact match": scores.constant_share([scores.plain(example.target_text) for example in asked], types)}


CONSTANTS: dict[str, Callable[[Sequence[Example]], Scores]] = {
    "caption": _constant_text,
    "grounded_caption": _constant_text,
    "vqa": _constant_answer,
    "itm": lambda asked: dict.fromkeys(("accuracy", "accuracy, captions", "accuracy, answers"), 0.5),
    "visual_grounding": lambda asked: {"acc@IoU0.5": scores.constant_box_share([tuple(e.boxes[0]) for e in asked])},
    "detection": lambda asked: {},
}
"""Scores of the best constant answer."""


def _constant_tokens(task: str, asked: Sequence[Example]) -> Scores:
    if task != "image_infilling":
        return {}
    return {"constant": scores.constant_sequence_share([example.target.tolist() for example in asked])}


def _by_type(ctx: Context, asked: Sequence[Example], answers: dict[str, Answers]) -> dict[str, dict[str, Any]]:
    """The exact match of each question type, most frequent first."""
    types = scores.merged_types([scores.question_type(example.source_text) for example in asked])
    expected = [scores.plain(example.target_text) for example in asked]
    right = {how: scores.exact(expected, _texts(ctx, given)) for how, given in answers.items()}
    result = {}
    for kind in sorted(set(types), key=lambda kind: (-types.count(kind), kind)):
        here = [i for i, each in enumerate(types) if each == kind]
        values = {how: _mean([hits[i] for i in here]) for how, hits in right.items()}
        values["constant"] = scores.constant_share([expected[i] for i in here])
        result[kind] = {"examples": len(here)} | beside_blind(values)
    return result


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
