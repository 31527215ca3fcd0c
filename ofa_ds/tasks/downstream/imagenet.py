"""Image classification: a picture in, the words of its class out (ImageNet-1K: the words of the synset)."""

from __future__ import annotations

import numpy as np

from ofa_ds.data.example import Example
from ofa_ds.data.image import Framed, Picture, load
from ofa_ds.data.strong_augment import strong_augment
from ofa_ds.tasks.context import Context, Row
from ofa_ds.tasks.downstream import scoring
from ofa_ds.tasks.downstream.frame import asked_row, best_answer, downstream_frame, picture_of, seen_by_the_network
from ofa_ds.tasks.kind import Decoding, Task

PROMPT = " what does the image describe?"


def build(row: Row, seen: Framed | None, rng: np.random.Generator, ctx: Context) -> Example:
    """Training sees a part of the picture, strongly augmented, unless data.augment says `none`."""
    best = best_answer(row)
    augmented = ctx.train and ctx.config.augment == "ofa"
    if augmented:
        image = strong_augment(load(row["image"], ctx.config.decode), ctx.config.image_size, rng)
    else:
        image = picture_of(row, ctx)
    if best is None:
        return downstream_frame(row, ctx, PROMPT, "", answer=(), image=image)
    return downstream_frame(row, ctx, PROMPT, f" {best[0]}", rng=rng, image=image)


def ask(ctx: Context, picture: Picture | None, text: str) -> Example:
    image = seen_by_the_network(picture, ctx)
    return downstream_frame(asked_row(picture, ""), ctx, PROMPT, "", answer=(), image=image)


def texts(row: Row) -> list[str]:
    return [PROMPT, *(f" {answer}" for answer, _ in row["answers"])]


IMAGENET = Task(
    name="imagenet", family="downstream", row_types=("imagenet",), build=build, texts=texts, ask=ask,
    columns={"image": 0, "answer": 2}, width=3, candidates="file", settings={"image_size": 480},
    decoding=Decoding(candidates=True, beams=5),
    metric=scoring.ACCURACY, judge=scoring.judge_label, constant=scoring.constant_label, hand_in=scoring.hand_in_answer,
)  # fmt: skip
