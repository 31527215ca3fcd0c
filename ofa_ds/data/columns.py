"""Arrow columns of each family, and a row's way into them and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyarrow as pa


def list_of(item: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", item, nullable=False))


BOX = pa.list_(pa.field("item", pa.float32(), nullable=False), 4)


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


_PICTURE = {"id": pa.utf8(), "image": pa.binary(), "width": pa.int32(), "height": pa.int32()}

SCHEMAS = {
    "vision_language": _schema(
        **_PICTURE, caption=pa.utf8(), question=pa.utf8(), answer_text=list_of(pa.utf8()),
        answer_confidence=list_of(pa.float64()), box=BOX, gt_objects=list_of(pa.utf8()), dataset=pa.utf8(),
        type=pa.utf8(),
    ),
    "text": _schema(id=pa.utf8(), text=pa.utf8()),
    "image": _schema(id=pa.utf8(), image=pa.binary(), codes=list_of(pa.int16())),
    "detection": _schema(**_PICTURE, boxes=list_of(BOX), cat_ids=list_of(pa.utf8()), cat_names=list_of(pa.utf8())),
    "downstream": _schema(
        **_PICTURE, image_id=pa.utf8(), text=pa.utf8(), text_pair=pa.utf8(), answer_text=list_of(pa.utf8()),
        answer_confidence=list_of(pa.float64()), box=BOX, objects=list_of(pa.utf8()), type=pa.utf8(),
    ),
}  # fmt: skip
"""Columns of each family. A box of NaN means none; so does an empty image of a downstream row."""

KEPT = {
    pa.utf8(): (1, 2), pa.binary(): (1, 2), pa.int32(): (1,), BOX: (2,), list_of(BOX): (1, 4),
    list_of(pa.utf8()): (1, 3, 4), list_of(pa.int16()): (1, 3), list_of(pa.float64()): (1, 3),
}  # fmt: skip
"""Which of a column's buffers have content: the others are validity bitmaps, absent as nothing is nullable."""

WITH_ANSWERS = ("vision_language", "downstream")
"""Families whose rows have answers with confidences, and one box or none."""


def to_columns(family: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as `Shards.row` gives it -> its Arrow columns."""
    columns = dict(row)
    if family in WITH_ANSWERS:
        answers = columns.pop("answers")
        columns["answer_text"] = [text for text, _ in answers]
        columns["answer_confidence"] = [confidence for _, confidence in answers]
        columns["box"] = columns["box"] or (math.nan,) * 4
    elif family == "detection":
        columns["boxes"] = columns["boxes"].tolist()
    return columns


def from_columns(family: str, columns: dict[str, Any]) -> dict[str, Any]:
    """The other way round. Takes `columns` over."""
    if family in WITH_ANSWERS:
        columns["answers"] = list(zip(columns.pop("answer_text"), columns.pop("answer_confidence"), strict=True))
        if math.isnan(columns["box"][0]):
            columns["box"] = None
    return columns
