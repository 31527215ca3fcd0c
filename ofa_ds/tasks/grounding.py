"""Visual grounding, the box of a phrase, and grounded captioning, the phrase of a box: both of one row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ofa_ds.data.example import Example
from ofa_ds.data.image import Framed, Picture, resize
from ofa_ds.data.text import clean_caption
from ofa_ds.tasks import judges
from ofa_ds.tasks.boxes import bin_ids, boxes_of, readable_bins
from ofa_ds.tasks.context import Context, Row, frame, question, sample_patches

PHRASE_PROMPT = ' which region does the text " {} " describe?'
REGION_PROMPT = "  what does the region describe? region:"  # two leading spaces, as released models were trained


def build_box(row: Row, seen: Framed | None, rng: np.random.Generator, ctx: Context) -> Example:
    coordinates = bin_ids(seen.boxes, ctx)[0]
    phrase = clean_caption(row["caption"], ctx.config.max_source_words)
    return frame(
        row, ctx, PHRASE_PROMPT.format(phrase), readable_bins(coordinates, ctx), target=coordinates,
        image=seen.image, boxes=seen.boxes, patches=sample_patches(rng, ctx),
    )  # fmt: skip


def build_phrase(row: Row, seen: Framed | None, rng: np.random.Generator, ctx: Context) -> Example:
    coordinates = bin_ids(seen.boxes, ctx)[0]
    phrase = clean_caption(row["caption"], ctx.config.max_target_words)
    return frame(
        row, ctx, f"{REGION_PROMPT} {readable_bins(coordinates, ctx)}", " " + phrase,
        source=ctx.vocab.encode(REGION_PROMPT) + coordinates,
        image=seen.image, boxes=seen.boxes, patches=sample_patches(rng, ctx),
    )  # fmt: skip


def ask_box(ctx: Context, picture: Picture | None, text: str) -> Example:
    side = ctx.config.image_size
    source = PHRASE_PROMPT.format(clean_caption(text, ctx.config.max_source_words))
    return question(ctx, source, image=resize(picture, side, side))


def ask_phrase(ctx: Context, picture: Picture | None, text: str) -> Example:
    """text: the region "x0,y0,x1,y1" in pixels of the picture. Raises ValueError for any other."""
    side = ctx.config.image_size
    box = np.array([read_region(text, picture)], np.float32) * np.array([side / n for n in picture.shape[1::-1]] * 2)
    source = ctx.vocab.encode(REGION_PROMPT) + bin_ids(box, ctx)[0]
    seen = resize(picture, side, side)
    return question(ctx, f"{REGION_PROMPT} {text}", source, image=seen, boxes=box.astype(np.float32))


def read_region(text: str, picture: Picture) -> tuple[float, float, float, float]:
    """The box "x0,y0,x1,y1" in pixels of a picture. Raises ValueError for what is none, or not inside it."""
    height, width = picture.shape[:2]
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--text {text!r}: want a region x0,y0,x1,y1 in pixels") from error
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(f"--text {text!r}: not a region inside the picture, which is {width} x {height}")
    return x0, y0, x1, y1


def texts_box(row: Row) -> list[str]:
    return [PHRASE_PROMPT.format(clean_caption(row["caption"]))]


def texts_phrase(row: Row) -> list[str]:
    return [REGION_PROMPT, f" {clean_caption(row['caption'])}"]


def judge_box(ctx: Context, asked: Sequence[Example], answers: judges.Answers) -> judges.Scores:
    boxes = [next(iter(boxes_of(ctx, ids)), None) for ids in answers]
    return {"acc@IoU0.5": judges.mean(judges.found([tuple(example.boxes[0]) for example in asked], boxes))}


def constant_box(asked: Sequence[Example]) -> judges.Scores:
    """The one of the boxes that finds most others."""
    return {"acc@IoU0.5": judges.constant_box_share([tuple(example.boxes[0]) for example in asked])}
