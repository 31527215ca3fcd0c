"""Captioning: a picture in, its caption out."""

from __future__ import annotations

import numpy as np

from ofa_ds.data.example import Example
from ofa_ds.data.image import Framed, Picture, resize
from ofa_ds.data.text import clean_caption
from ofa_ds.tasks.context import Context, Row, frame, question, sample_patches
from ofa_ds.terms import PAD_ID

PROMPT = " what does the image describe?"
UNPENALISED_CC12M_TOKENS = 2


def build(row: Row, seen: Framed | None, rng: np.random.Generator, ctx: Context) -> Example:
    text = " " + clean_caption(row["caption"], ctx.config.max_target_words)
    example = frame(row, ctx, PROMPT, text, image=seen.image, patches=sample_patches(rng, ctx))
    if row["dataset"] == "cc12m":  # its captions begin with boilerplate; the original takes no loss on two tokens
        example.target[:UNPENALISED_CC12M_TOKENS] = PAD_ID
        example.target[-1] = ctx.vocab.eos
    return example


def ask(ctx: Context, picture: Picture | None, text: str) -> Example:
    side = ctx.config.image_size
    return question(ctx, PROMPT, image=resize(picture, side, side))


def texts(row: Row) -> list[str]:
    return [PROMPT, f" {clean_caption(row['caption'])}"]
