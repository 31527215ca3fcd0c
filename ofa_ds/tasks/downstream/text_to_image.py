"""Text to image: a caption in, the codes of a whole picture out (docs/downstream.md)."""

from __future__ import annotations

import numpy as np

from ofa_ds.data.example import Example
from ofa_ds.data.image import Framed, Picture
from ofa_ds.tasks.context import PIXELS_PER_CODE, Context, Row
from ofa_ds.tasks.downstream import scoring
from ofa_ds.tasks.downstream.frame import asked_row, best_answer, downstream_frame
from ofa_ds.tasks.kind import Decoding, Task

PROMPT = " what is the complete image? caption: "


def _caption(text: str, ctx: Context) -> str:
    return " ".join(text.lower().split()[: ctx.config.max_source_words])


def build(row: Row, seen: Framed | None, rng: np.random.Generator, ctx: Context) -> Example:
    """No picture goes in, also where the row has one.

    Raises ValueError where the number of codes is not the configuration's, or one is outside the vocabulary's.
    """
    best, source = best_answer(row), PROMPT + _caption(row["text"], ctx)
    if best is None:
        return downstream_frame(row, ctx, source, "", answer=(), code=True)
    codes = [int(code) for code in best[0].split()]
    if len(codes) != ctx.num_codes:
        raise ValueError(
            f"{len(codes)} codes, want {ctx.num_codes}: data.code_image_size {ctx.config.code_image_size} has one for "
            f"each {PIXELS_PER_CODE} x {PIXELS_PER_CODE} pixels"
        )
    readable = "".join(f"<code_{code}>" for code in codes)
    return downstream_frame(row, ctx, source, readable, answer=[ctx.vocab.code(code) for code in codes], code=True)


def ask(ctx: Context, picture: Picture | None, text: str) -> Example:
    """Raises ValueError for more words than training reads of a caption."""
    limit = ctx.config.max_source_words
    if (words := len(text.split())) > limit:
        raise ValueError(f"--text: {words} words, want {limit} at most (data.max_source_words); shorten it")
    return downstream_frame(asked_row(None, text), ctx, PROMPT + _caption(text, ctx), "", answer=(), code=True)


def texts(row: Row) -> list[str]:
    return [PROMPT + " ".join(row["text"].lower().split())]


TEXT_TO_IMAGE = Task(
    name="text_to_image", family="downstream", row_types=("text_to_image",), build=build, texts=texts, ask=ask,
    needs_picture=False, text_is="the caption", columns={"id": 0, "codes": 1, "text": 2}, width=3,
    other_columns={2: {"id": 0, "text": 1}, 4: {"id": 0, "image": 1, "text": 2, "codes": 3}},
    settings={"max_source_words": 64, "code_image_size": 256},
    decoding=Decoding(codes=True, top_k=256), metric=scoring.EQUAL_CODES, judge=scoring.judge_codes,
    constant=scoring.constant_codes, hand_in=scoring.hand_in_codes,
)  # fmt: skip
"""The number of codes follows from data.code_image_size: 1,024 of 256 x 256 pixels."""
