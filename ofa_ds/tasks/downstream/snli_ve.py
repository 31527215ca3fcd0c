"""Visual entailment: does a picture (with a premise, if asked so) imply a sentence: yes, no or maybe."""

from __future__ import annotations

from typing import Any

import numpy as np

from ofa_ds.data.example import Example
from ofa_ds.data.image import Framed, Picture
from ofa_ds.data.text import clean_caption
from ofa_ds.tasks.context import Context, Row
from ofa_ds.tasks.downstream import scoring
from ofa_ds.tasks.downstream.frame import (
    asked_row,
    asked_sentences,
    best_answer,
    downstream_frame,
    picture_of,
    seen_by_the_network,
)
from ofa_ds.tasks.kind import Decoding, Task

PROMPT = ' does the image describe " {} "?'
PROMPT_WITH_PREMISE = ' can image and text1 " {} " imply text2 " {} "?'


def _example(row: Row, ctx: Context, answer_text: str, **fields: Any) -> Example:
    hypothesis, premise = (clean_caption(row[column], ctx.config.max_source_words) for column in ("text", "text_pair"))
    with_premise = ctx.config.task.premise
    if with_premise and not premise:
        raise ValueError("there is no premise to the sentence; data.task.premise=false asks without one")
    source = PROMPT_WITH_PREMISE.format(premise, hypothesis) if with_premise else PROMPT.format(hypothesis)
    return downstream_frame(row, ctx, source, answer_text, **fields)


def build(row: Row, seen: Framed | None, rng: np.random.Generator, ctx: Context) -> Example:
    best = best_answer(row)
    if best is None:
        return _example(row, ctx, "", answer=(), image=picture_of(row, ctx))
    return _example(row, ctx, f" {best[0]}", rng=rng, image=picture_of(row, ctx))


def ask(ctx: Context, picture: Picture | None, text: str) -> Example:
    hypothesis, premise = asked_sentences(text, 2 if ctx.config.task.premise or "\t" in text else 1)
    row, image = asked_row(picture, hypothesis, premise), seen_by_the_network(picture, ctx)
    return _example(row, ctx, "", answer=(), image=image)


def texts(row: Row) -> list[str]:
    hypothesis, premise = clean_caption(row["text"]), clean_caption(row["text_pair"])
    answers = [f" {answer}" for answer, _ in row["answers"]]
    return [PROMPT.format(hypothesis), PROMPT_WITH_PREMISE.format(premise, hypothesis), *answers]


SNLI_VE = Task(
    name="snli_ve", family="downstream", row_types=("snli_ve",), build=build, texts=texts, ask=ask,
    text_is="the hypothesis, with the premise after a tab where the model was given it",
    columns={"id": 0, "image_id": 1, "image": 2, "text": 3, "text_pair": 4, "label": 5}, width=6,
    labels={"contradiction": "no", "entailment": "yes", "neutral": "maybe"}, candidates="labels",
    settings={"image_size": 480, "task.prompt": "prev_output", "task.premise": True},
    decoding=Decoding(candidates=True, beams=5),
    metric=scoring.ACCURACY, judge=scoring.judge_label, constant=scoring.constant_label, hand_in=scoring.hand_in_answer,
)  # fmt: skip
