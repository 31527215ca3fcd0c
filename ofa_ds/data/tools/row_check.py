"""What a row of shards must hold, as `data.tsv` and `data.task_rows` let it in: who made the shards does not matter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ofa_ds.data.picture import check_image
from ofa_ds.data.tsv import NUM_CODES, PIXELS_PER_CODE, TYPES

_BOX_SLACK = 1e-3
"""Pixels; of float32 at the far edge of the largest picture."""


def row_problems(family: str, row: Mapping[str, Any]) -> Iterator[str]:
    """Each "column: reason". row: as `Shards.row` gives it; its picture is decoded to its end."""
    if not row["id"].strip():
        yield "id: is empty"
    if "image" in row and (row["image"] or family != "downstream"):
        try:
            size = check_image(row["image"])
        except ValueError as error:
            yield str(error)
        else:
            yield from _size_problems(row, size)
    if family == "text" and not row["text"].strip():
        yield "text: is empty"
    if family == "detection":
        yield from _detection_problems(row)
    if "box" in row:
        yield from _box_problems("box", np.array([row["box"] or ()], np.float64).reshape(-1, 4), row)
        yield from _answer_problems(row)
    if family == "vision_language":
        yield from _type_problems(row)


def _size_problems(row: Mapping[str, Any], size: tuple[int, int]) -> Iterator[str]:
    if "codes" in row:
        yield from _code_problems(row["codes"], size)
    elif (row["width"], row["height"]) != size:
        yield f"image: is {size[0]} x {size[1]}, the row says {row['width']} x {row['height']}"


def _code_problems(codes: np.ndarray, size: tuple[int, int]) -> Iterator[str]:
    side = size[0] // (2 * PIXELS_PER_CODE)
    if size[0] != size[1] or len(codes) != side * side or not len(codes):
        yield f"codes: {len(codes)} of them are not those of a picture of {size[0]} x {size[1]}"
    wrong = np.flatnonzero((codes < 0) | (codes >= NUM_CODES))
    if wrong.size:
        yield f"codes: want 0 ... {NUM_CODES - 1}, got {codes[wrong[0]]} at place {wrong[0]}"


def _detection_problems(row: Mapping[str, Any]) -> Iterator[str]:
    counts = [len(row[name]) for name in ("boxes", "cat_ids", "cat_names")]
    if len(set(counts)) > 1 or not counts[0]:
        yield f"boxes: want as many boxes as ids and names, and one at least, got {counts}"
    yield from _box_problems("boxes", row["boxes"].astype(np.float64), row)


def _box_problems(column: str, boxes_N4: np.ndarray, row: Mapping[str, Any]) -> Iterator[str]:
    width, height = row["width"], row["height"]
    x0, y0, x1, y1 = boxes_N4.T
    inside = (x0 >= 0) & (y0 >= 0) & (x1 <= width + _BOX_SLACK) & (y1 <= height + _BOX_SLACK)
    good = inside & (x0 < x1) & (y0 < y1)  # NaN is not
    if not good.all():
        place = int(np.argmin(good))
        box = ",".join(f"{value:g}" for value in boxes_N4[place])
        yield f"{column}: {box} at place {place} is not a box inside the picture of {width} x {height}"


def _answer_problems(row: Mapping[str, Any]) -> Iterator[str]:
    for text, confidence in row["answers"]:
        if not text.strip():
            yield "answers: one is empty"
        if not 0 <= confidence <= 1:
            yield f"answers: want confidences between 0 and 1, got {confidence}"


def _type_problems(row: Mapping[str, Any]) -> Iterator[str]:
    kind = row["type"]
    if kind not in TYPES:
        yield f"type: want {', '.join(TYPES)}, got {kind[:40]!r}"
    elif not row["question" if kind == "qa" else "caption"].strip():
        yield f"{'question' if kind == 'qa' else 'caption'}: is empty"
    if (row["box"] is not None) != (kind == "visual_grounding"):
        yield f"box: a row of type {kind[:40]!r} has {'none' if row['box'] is None else 'one'}"
    if bool(row["answers"]) != (kind == "qa"):
        yield f"answers: a row of type {kind[:40]!r} has {len(row['answers'])}"
