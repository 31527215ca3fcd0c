"""Captioning: a picture in, a caption without punctuation out; its second stage is rewarded, not told (SCST)."""

from __future__ import annotations

import dataclasses

import numpy as np

from ofa_ds.data.example import Example
from ofa_ds.data.image import Framed, Picture
from ofa_ds.tasks import caption_scores
from ofa_ds.tasks.caption_scores import bare
from ofa_ds.tasks.context import Context, Row
from ofa_ds.tasks.downstream import scoring
from ofa_ds.tasks.downstream.frame import asked_row, downstream_frame, picture_of, seen_by_the_network
from ofa_ds.tasks.kind import Decoding, Task

PROMPTS = {"en": " what does the image describe?", "zh": "图片描述了什么内容?"}


def build(row: Row, seen: Framed | None, rng: np.random.Generator, ctx: Context) -> Example:
    """What is learnt is one caption, drawn where the row has several; it is cut. Elsewhere the first is the target, as
    it is, and all are references: of held-out rows, and where captions are rewarded."""
    captions = [text for text, _ in row["answers"] if bare(text)]
    source, image = PROMPTS[ctx.config.task.language], picture_of(row, ctx)
    if not captions:
        return downstream_frame(row, ctx, source, "", answer=(), image=image)
    if ctx.train and ctx.config.task.name != "caption_scst":
        chosen = captions[int(rng.integers(len(captions))) if len(captions) > 1 else 0]
        text = " ".join(bare(chosen).split()[: ctx.config.max_target_words])
    else:
        text = bare(" ".join(captions[0].split()))
    return downstream_frame(row, ctx, source, f" {text}", rng=rng, image=image)


def ask(ctx: Context, picture: Picture | None, text: str) -> Example:
    row, image = asked_row(picture, ""), seen_by_the_network(picture, ctx)
    return downstream_frame(row, ctx, PROMPTS[ctx.config.task.language], "", answer=(), image=image)


def texts(row: Row) -> list[str]:
    return [PROMPTS["en"], *(f" {bare(text)}" for text, _ in row["answers"])]


CAPTION = Task(
    name="caption", family="downstream", row_types=("caption",), build=build, texts=texts, ask=ask,
    columns={"id": 0, "image_id": 1, "captions": 2, "image": 4}, width=5,
    settings={"image_size": 480, "max_target_words": 20},
    decoding=Decoding(beams=5, max_len=16, no_repeat_ngram=3), metric=caption_scores.CIDER,
    judge=scoring.judge_caption, judge_slowly=scoring.judge_caption_slowly, constant=scoring.constant_caption,
    hand_in=scoring.hand_in_caption,
)  # fmt: skip

CAPTION_SCST = dataclasses.replace(CAPTION, name="caption_scst")
