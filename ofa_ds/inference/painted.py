"""How far from the truth the middle of a picture is that a model paints (image infilling), beside painting blind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ofa_ds.data.example import Example
from ofa_ds.data.shards import Shards
from ofa_ds.inference.asking import answers_to
from ofa_ds.inference.evaluate import beside_blind, blinded, collect
from ofa_ds.inference.loaded_model import LoadedModel
from ofa_ds.inference.painting import check_codes
from ofa_ds.storage.atomic import new_content
from ofa_ds.tasks.context import Context
from ofa_ds.tasks.preview import filled
from ofa_ds.tasks.task import task_of
from ofa_ds.vision.coder import Coder
from ofa_ds.vision.scenes_coder import ScenesCoder

NAME = "image_infilling"
SHOWN = 8
"""Rows on the sheet."""

_SCALE, _GAP = 2, 4
Pixels = np.ndarray


def judge_painted(
    model: LoadedModel, shards: Shards, coder: Coder | ScenesCoder, *, rows: int, png: Path | None = None
) -> dict[str, Any]:
    """Codes are generated greedily, painted, and compared with the middle that was there.

    Returns {"examples", "colour_error": mean difference of a colour, 0 ... 255, as `beside_blind`, "right_codes": that
    of the rows' own codes, "token_accuracy": share of the generated codes that are the rows' own, likewise}. png: a
    sheet of rows: picture, hole, painted, painted about a grey picture.
    Raises ValueError: the shards have no such rows, or the VQGAN has not so many codes or pixels a code.
    """
    ctx, task = model.context(shards), task_of(model.recipe.data, NAME)
    if task.family not in shards.families or not (asked := collect(shards, ctx, [NAME], rows)[NAME]):
        raise ValueError(f"{shards.path}: has no row for {NAME}, only for {', '.join(shards.types or shards.families)}")
    check_codes(coder, ctx.vocab, "--model")
    views = {"own": asked} | {how: view for how in ("grey", "shuffled") if (view := blinded(asked, how)) is not None}
    codes = {how: [_codes(ctx, ids) for ids in answers_to(model, ctx, task, view)] for how, view in views.items()}
    own = [_codes(ctx, example.target[:-1]) for example in asked]
    holes = [_hole(example) for example in asked]
    painted = {how: coder.paint(each) for how, each in codes.items()}
    if png is not None:
        with new_content(png) as partial:
            _sheet(asked, painted).save(partial)
    return {
        "examples": len(asked),
        "colour_error": beside_blind({how: _error(holes, each) for how, each in painted.items()}, best=min),
        "right_codes": _error(holes, coder.paint(own)),
        "token_accuracy": beside_blind({how: float(np.mean(np.equal(each, own))) for how, each in codes.items()}),
    }


def _codes(ctx: Context, ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, np.int64) - ctx.vocab.code_start


def _hole(example: Example) -> Pixels:
    y0, x0, y1, x1 = example.hole
    return example.image[y0:y1, x0:x1]


def _error(holes: Sequence[Pixels], painted: Sequence[Pixels]) -> float:
    return float(np.mean([np.abs(a.astype(float) - b).mean() for a, b in zip(holes, painted, strict=True)]))


def _sheet(asked: Sequence[Example], painted: dict[str, list[Pixels]]) -> Image.Image:
    """A row for each of the first pictures: as it was, without its middle, with what was painted, and what blindly."""
    rows = []
    for k, example in enumerate(asked[:SHOWN]):
        middles = [None, *(painted[how][k] for how in ("own", "grey") if how in painted)]
        rows.append([example.image, *(filled(example, middle) for middle in middles)])
    columns = 2 * len(rows[0])
    height, width = (_SCALE * side + _GAP for side in rows[0][0].shape[:2])
    sheet = Image.new("RGB", (columns * width - _GAP, math.ceil(len(rows) / 2) * height - _GAP), "white")
    for k, pictures in enumerate(rows):
        for at, pixels in enumerate(pictures):
            large = pixels.repeat(_SCALE, 0).repeat(_SCALE, 1)
            sheet.paste(Image.fromarray(large), ((k % 2 * len(pictures) + at) * width, k // 2 * height))
    return sheet
