"""Image infilling: a picture without its middle in, the image codes of the middle out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ofa_ds.data import image as pictures
from ofa_ds.data.example import Example
from ofa_ds.data.image import Framed, Picture
from ofa_ds.tasks import judges
from ofa_ds.tasks.context import PIXELS_PER_CODE, Context, Row, frame, question

PROMPT = " what is the image in the middle part?"


def build(row: Row, seen: Framed | None, rng: np.random.Generator, ctx: Context) -> Example:
    """Raises ValueError where the picture's size or the number of codes does not fit the configuration."""
    side, hole_side = ctx.config.infill_image_size, ctx.config.code_image_size
    picture = pictures.decode(row["image"])
    if picture.shape[:2] != (side, side):
        raise ValueError(
            f"image row {row['id']}: the picture is {picture.shape[1]} x {picture.shape[0]}, want {side} x {side} "
            "(data.infill_image_size): codes describe its centre, so it is never resized"
        )
    if len(row["codes"]) != ctx.num_codes:
        raise ValueError(
            f"image row {row['id']}: {len(row['codes'])} codes, want {ctx.num_codes} (data.code_image_size "
            f"{hole_side}, one per {PIXELS_PER_CODE} x {PIXELS_PER_CODE} pixels)"
        )
    codes = [ctx.vocab.code(int(code)) for code in row["codes"]]
    return frame(
        row, ctx, PROMPT, " ".join(f"<code_{code}>" for code in row["codes"]), target=codes, image=picture,
        hole=_hole(ctx), code=True, conf=ctx.config.extra_confidence,
    )  # fmt: skip


def _hole(ctx: Context) -> tuple[int, int, int, int]:
    side = ctx.config.code_image_size
    start = (ctx.config.infill_image_size - side) // 2
    return start, start, start + side, start + side


def ask(ctx: Context, picture: Picture | None, text: str) -> Example:
    side = ctx.config.infill_image_size
    return question(ctx, PROMPT, image=pictures.resize(picture, side, side), hole=_hole(ctx), code=True)


def texts(row: Row) -> list[str]:
    return [PROMPT]


def constant(asked: Sequence[Example]) -> judges.Scores:
    """The best constant token of each place."""
    return {judges.TOKEN_ACCURACY: judges.constant_sequence_share([example.target.tolist() for example in asked])}
