"""Visual question answering: a picture and a question in, the answer out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ofa_ds.data.example import Example
from ofa_ds.data.image import Framed, Picture, resize
from ofa_ds.data.text import clean_question
from ofa_ds.tasks import judges
from ofa_ds.tasks.context import Context, Row, frame, question, sample_patches


def build(row: Row, seen: Framed | None, rng: np.random.Generator, ctx: Context) -> Example:
    asked = " " + clean_question(row["question"], ctx.config.max_source_words)
    answer, conf = best_answer(row)
    patches = sample_patches(rng, ctx)
    return frame(row, ctx, asked, " " + answer, image=seen.image, patches=patches, conf=conf)


def best_answer(row: Row) -> tuple[str, float]:
    """The answer of highest confidence, the first of equals."""
    return max(row["answers"], key=lambda answer: answer[1])


def ask(ctx: Context, picture: Picture | None, text: str) -> Example:
    side = ctx.config.image_size
    asked = " " + clean_question(text, ctx.config.max_source_words)
    return question(ctx, asked, image=resize(picture, side, side))


def texts(row: Row) -> list[str]:
    return [f" {clean_question(row['question'])}", *(f" {answer}" for answer, _ in row["answers"])]


def judge(ctx: Context, asked: Sequence[Example], answers: judges.Answers) -> judges.Scores:
    expected = [example.target_text for example in asked]
    return {"exact match": judges.mean(judges.exact(expected, judges.texts_of(ctx, answers)))}


def constant(asked: Sequence[Example]) -> judges.Scores:
    """The best constant answer of each question type."""
    types = judges.merged_types([question_type(example) for example in asked])
    return {"exact match": judges.constant_share([judges.plain(example.target_text) for example in asked], types)}


def question_type(example: Example) -> str:
    return judges.question_type(example.source_text)
