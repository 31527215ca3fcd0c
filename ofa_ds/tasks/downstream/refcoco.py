"""Visual grounding on RefCOCO, RefCOCO+ and RefCOCOg: a picture and a phrase in, the box of the phrase out."""

from __future__ import annotations

import dataclasses

import numpy as np

from ofa_ds.data.example import Example
from ofa_ds.data.image import Framed, Picture, scale_boxes
from ofa_ds.data.text import clean_caption
from ofa_ds.tasks.boxes import bin_ids, readable_bins
from ofa_ds.tasks.context import Context, Row
from ofa_ds.tasks.downstream import scoring
from ofa_ds.tasks.downstream.frame import asked_row, downstream_frame, picture_of, seen_by_the_network
from ofa_ds.tasks.kind import Decoding, Task

PROMPTS = {"en": ' which region does the text " {} " describe?', "zh": '这段文字" {} "描述的是哪个区域？'}


def _source(text: str, ctx: Context) -> str:
    return PROMPTS[ctx.config.task.language].format(clean_caption(text, ctx.config.max_source_words))


def build(row: Row, seen: Framed | None, rng: np.random.Generator, ctx: Context) -> Example:
    """The box moves with the picture and ends at its edge, so that every coordinate has a bin."""
    image = picture_of(row, ctx)
    if row["box"] is None:
        return downstream_frame(row, ctx, _source(row["text"], ctx), "", answer=(), image=image)
    box_14 = _scaled(row, ctx)
    bins = bin_ids(box_14, ctx)[0]
    return downstream_frame(
        row, ctx, _source(row["text"], ctx), readable_bins(bins, ctx), answer=bins, rng=rng, image=image, boxes=box_14
    )


def _scaled(row: Row, ctx: Context) -> np.ndarray:
    """The row's box in pixels of the network's picture, float32 [1, 4], none outside it."""
    shape = np.broadcast_to(np.uint8(0), (row["height"], row["width"], 3))
    return scale_boxes(Framed(shape, np.array([row["box"]], np.float32)), *[ctx.config.image_size] * 2)


def ask(ctx: Context, picture: Picture | None, text: str) -> Example:
    row, image = asked_row(picture, text), seen_by_the_network(picture, ctx)
    return downstream_frame(row, ctx, _source(text, ctx), "", answer=(), image=image)


def texts(row: Row) -> list[str]:
    return [PROMPTS["en"].format(clean_caption(row["text"]))]


REFCOCO = Task(
    name="refcoco", family="downstream", row_types=("refcoco",), build=build, texts=texts, ask=ask,
    text_is="the phrase to find", columns={"id": 0, "image_id": 1, "text": 2, "box": 3, "image": 4}, width=5,
    settings={"image_size": 512}, decoding=Decoding(beams=5, min_len=4, max_len=4, bins_only=True), shows="boxes",
    metric=scoring.ACC_IOU, judge=scoring.judge_box, constant=scoring.constant_box, hand_in=scoring.hand_in_box,
)  # fmt: skip

REFCOCOPLUS = dataclasses.replace(REFCOCO, name="refcocoplus")
REFCOCOG = dataclasses.replace(REFCOCO, name="refcocog")
