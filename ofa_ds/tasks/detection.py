"""Detection: a picture in, boxes and names of its objects out. Legend: N boxes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ofa_ds.data import image as pictures
from ofa_ds.data.example import Example
from ofa_ds.data.image import Framed, Picture
from ofa_ds.tasks import judges
from ofa_ds.tasks.boxes import bin_ids, objects_of, readable_bins
from ofa_ds.tasks.context import Context, Row, frame, question

PROMPT = " what are the objects in the image?"
BINS_A_BOX = 4


def build(row: Row, seen: Framed | None, rng: np.random.Generator, ctx: Context) -> Example:
    """Boxes and names of all objects in file order, as many as fit."""
    framed = _view(row, rng, ctx)
    visible_N = pictures.has_area(framed.boxes)
    most = ctx.max_positions // BINS_A_BOX + 1
    boxes_N4 = framed.boxes[visible_N][:most]
    names = [row["cat_names"][i] for i in np.flatnonzero(visible_N)[:most]]
    longest = ctx.max_positions - 1  # eos included; the original overran the position table here
    target: list[int] = []
    readable: list[str] = []
    for name, coordinates in zip(names, bin_ids(boxes_N4, ctx), strict=True):
        ids = coordinates + ctx.vocab.encode(f" {name}", longest)
        if len(target) + len(ids) + 1 > longest:
            break
        target += ids
        readable.append(f"{readable_bins(coordinates, ctx)} {name}")
    kept = len(readable)
    return frame(
        row, ctx, PROMPT, " ".join(readable), target=target, image=framed.image, boxes=boxes_N4[:kept],
        labels=tuple(names[:kept]), conf=ctx.config.extra_confidence, cut=bool(kept < visible_N.sum()),
    )  # fmt: skip


def _view(row: Row, rng: np.random.Generator, ctx: Context) -> Framed:
    boxes_N4 = np.asarray(row["boxes"], np.float32).reshape(-1, BINS_A_BOX)
    framed = Framed(pictures.load(row["image"], ctx.config.decode), boxes_N4)
    side = ctx.config.infill_image_size
    if ctx.train and rng.random() < 0.5:
        framed = pictures.flip(framed)
    if ctx.train and ctx.config.augment == "ofa":
        return pictures.large_scale_jitter(framed, side, rng)
    return pictures.resize_framed(framed, side, side)


def ask(ctx: Context, picture: Picture | None, text: str) -> Example:
    side = ctx.config.infill_image_size
    return question(ctx, PROMPT, image=pictures.resize(picture, side, side))


def texts(row: Row) -> list[str]:
    return [PROMPT, *(f" {name}" for name in row["cat_names"])]


def judge(ctx: Context, asked: Sequence[Example], answers: judges.Answers) -> judges.Scores:
    expected = [list(zip(map(tuple, example.boxes), example.labels, strict=True)) for example in asked]
    given = [objects_of(ctx, ids) for ids in answers]
    return {
        "F@IoU0.5": judges.f_measure(expected, given, named=False),
        "F@IoU0.5, named": judges.f_measure(expected, given, named=True),
    }
