"""A free instruction: any text, about a picture or none, as the model is to read it; it need have been no task's."""

from __future__ import annotations

import re

import numpy as np

from ofa_ds.data.example import Example
from ofa_ds.data.image import Picture, resize
from ofa_ds.tasks.boxes import bin_ids
from ofa_ds.tasks.context import Context, question
from ofa_ds.tasks.grounding import read_region

NAME = "instruction"
TEXT_IS = "the instruction; <mask> and, for a region of the picture, <box:x0,y0,x1,y1> in pixels may stand in it"

_SYMBOL = re.compile(r" ?<(mask|box:[^>]*)>")
"""A symbol of the vocabulary takes the blank before it along: the next word brings its own."""


def ask(ctx: Context, picture: Picture | None, text: str) -> Example:
    """The text as it stands, with one blank before it. picture: uint8 [h, w, 3] of any size.

    Raises ValueError: no text, too much of it for the model, or a region that is no box inside the picture.
    """
    text = text.strip()
    if not text:
        raise ValueError(f"{NAME} needs --text: {TEXT_IS}")
    source: list[int] = []
    boxes: list[np.ndarray] = []
    at = 0
    for match in _SYMBOL.finditer(f" {text}"):
        source += ctx.vocab.encode(f" {text}"[at : match.start()])
        at = match.end()
        if match[1] == "mask":
            source.append(ctx.vocab.mask)
            continue
        if picture is None:
            raise ValueError(f"--text: {match[0].strip()} is a region of a picture: give --image FILE")
        sides = np.array([ctx.config.image_size / n for n in picture.shape[1::-1]] * 2)
        boxes.append((np.array([read_region(match[1].removeprefix("box:"), picture)]) * sides).astype(np.float32))
        source += bin_ids(boxes[-1], ctx)[0]
    source += ctx.vocab.encode(f" {text}"[at:])
    side = ctx.config.image_size
    seen = {} if picture is None else {"image": resize(picture, side, side)}
    if boxes:
        seen["boxes"] = np.concatenate(boxes)
    example = question(ctx, f" {text}", source, **seen)
    if example.cut:
        raise ValueError(f"--text: longer than the {ctx.max_positions} positions of the model; shorten it")
    return example
