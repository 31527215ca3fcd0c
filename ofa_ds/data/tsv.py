"""OFA's TSV files, line by line: columns (docs/ofa.md, Data: columns) in, checked rows out.

A bad line is a ValueError "column: reason"; who reads the file puts "file:line: " before it. Lines end in "\\n" alone,
are read as bytes and decoded column by column, so that an offset is always a byte offset.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ofa_ds.data.picture import check_image, orientation
from ofa_ds.data.text import clean_caption, clean_question

COLUMNS = {
    "vision_language": ("uniq_id", "image", "caption", "question", "refs", "gt_objects", "dataset_name", "type"),
    "text": ("uniq_id", "text"),
    "image": ("uniq_id", "image", "code"),
    "detection": ("uniq_id", "image", "label"),
}
TYPES = ("caption", "qa", "visual_grounding")

NUM_CODES = 8192
PIXELS_PER_CODE = 8
BOX_OVERSHOOT = 0.5
"""Pixels by which a box may pass the edge of its picture, as rounding elsewhere leaves it; it is cut back."""

MAX_LINE_BYTES = 1 << 30
"""Longest line that is read. The largest picture that is decoded, with 16 bits a channel, is 0.7 GB in base64."""

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def parse(family: str, line: bytes) -> dict[str, Any]:
    """The row of one line, in the form that `Shards.row` gives back. Raises ValueError "column: reason"."""
    names = COLUMNS[family]
    columns = split(line, names)
    if len(columns) != len(names):
        raise ValueError(f"columns: want {len(names)} with tabs between ({' '.join(names)}), got {len(columns)}")
    fields = {name: decode_column(name, column) for name, column in zip(names, columns, strict=True) if name != "image"}
    if not fields["uniq_id"].strip():
        raise ValueError("uniq_id: is empty")
    image = decode_base64(columns[names.index("image")]) if "image" in names else None
    return checked_row(family, fields, image)


def checked_row(family: str, fields: dict[str, str], image: bytes | None) -> dict[str, Any]:
    """The row of one record. fields: text of each of COLUMNS[family] but the picture. Raises as `parse`."""
    if not fields["uniq_id"].strip():
        raise ValueError("uniq_id: is empty")
    if image is None:
        return _text(fields)
    width, height = check_image(image)
    head = {"id": fields["uniq_id"], "image": image}
    if family == "image":
        return head | {"codes": _codes(fields["code"], width, height)}
    head |= {"width": width, "height": height}
    return head | (_detection(fields, head) if family == "detection" else _vision_language(fields, head))


def split(line: bytes, names: Sequence[str]) -> list[bytes]:
    """The columns of a line. Raises ValueError for a carriage return. names: of the columns, for that message."""
    columns = line.split(b"\t")
    if b"\r" in line:
        at = next(k for k, column in enumerate(columns) if b"\r" in column)
        name = names[min(at, len(names) - 1)]
        raise ValueError(f"{name}: a carriage return is in the line; want LF line ends and no other line break")
    return columns


def decode_base64(text: bytes) -> bytes:
    """Standard or url-safe alphabet. Raises ValueError for anything else, and for wrong padding."""
    try:
        image = base64.b64decode(text.translate(_URL_SAFE), validate=True)
    except binascii.Error as error:
        raise ValueError(f"image: invalid base64: {error}") from error
    if not image:
        raise ValueError("image: is empty")
    return image


_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def decode_column(name: str, column: bytes) -> str:
    """The text of a column. Raises ValueError "name: reason"."""
    try:
        text = column.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: invalid UTF-8: {error.reason} at byte {error.start} of the column") from error
    if "\ufeff" in text[:1]:
        raise ValueError(f"{name}: starts with a byte order mark; save the file as UTF-8 without one")
    return text


def _text(fields: dict[str, str]) -> dict[str, Any]:
    if not fields["text"].strip():
        raise ValueError("text: is empty")
    return {"id": fields["uniq_id"], "text": fields["text"]}


def _codes(text: str, width: int, height: int) -> np.ndarray:
    """int16 [(side / 16)^2]: one code for each 8 x 8 pixels of the central half of a square picture."""
    side, left = divmod(width, 2 * PIXELS_PER_CODE)
    if width != height or left or not side:
        multiple = 2 * PIXELS_PER_CODE
        raise ValueError(f"image: want a square whose side is a multiple of {multiple}, got {width} x {height}")
    codes = text.split()
    if len(codes) != side * side:
        raise ValueError(f"code: want {side * side} codes for a picture of {width} x {height}, got {len(codes)}")
    return np.array(read_codes("code", text), np.int16)


def read_codes(name: str, text: str) -> list[int]:
    """The image codes of a column, blanks between. Raises ValueError for what is none."""
    codes = text.split()
    for place, code in enumerate(codes):
        if not (code.isascii() and code.isdigit() and len(code) <= 5) or int(code) >= NUM_CODES:
            raise ValueError(f"{name}: want whole numbers 0 ... {NUM_CODES - 1}, got {short(code)} at place {place}")
    return list(map(int, codes))


def _detection(fields: dict[str, str], head: dict[str, Any]) -> dict[str, Any]:
    boxes, cat_ids, cat_names = [], [], []
    for place, item in enumerate(fields["label"].split("&&")):
        parts = item.split(",", 5)
        if len(parts) != 6:
            raise ValueError(f"label: want x0,y0,x1,y1,id,name joined by &&, got {short(item)} at place {place}")
        if not parts[5].strip():
            raise ValueError(f"label: the name at place {place} is empty")
        boxes.append(read_box("label", parts[:4], head))
        cat_ids.append(parts[4])
        cat_names.append(parts[5])
    return {"boxes": np.array(boxes, np.float32), "cat_ids": cat_ids, "cat_names": cat_names}


def _vision_language(fields: dict[str, str], head: dict[str, Any]) -> dict[str, Any]:
    kind = fields["type"]
    if kind not in TYPES:
        raise ValueError(f"type: want {', '.join(TYPES)}, got {short(kind)}")
    if kind == "qa":
        if not clean_question(fields["question"]):
            raise ValueError("question: is empty, or nothing is left of it after cleaning")
    elif not clean_caption(fields["caption"]):
        raise ValueError("caption: is empty, or nothing is left of it after cleaning")
    return {
        "caption": fields["caption"],
        "question": fields["question"],
        "answers": read_answers("refs", fields["refs"]) if kind == "qa" else [],
        "box": read_box("refs", fields["refs"].split(","), head) if kind == "visual_grounding" else None,
        "gt_objects": read_objects("gt_objects", fields["gt_objects"]),
        "dataset": fields["dataset_name"],
        "type": kind,
    }


def read_objects(column: str, text: str) -> list[str]:
    """The names between &&; none where the column is empty. Raises ValueError "column: reason"."""
    objects = text.split("&&") if text else []
    if not all(name.strip() for name in objects):
        raise ValueError(f"{column}: a name between && is empty in {short(text)}")
    return objects


def read_answers(column: str, text: str) -> list[tuple[str, float]]:
    """(answer, confidence) of each `confidence|!+answer` between &&. Raises ValueError "column: reason"."""
    answers = []
    for item in text.split("&&"):
        parts = item.split("|!+")
        if len(parts) != 2:
            raise ValueError(f"{column}: want confidence|!+answer joined by &&, got {short(item)}")
        if not _NUMBER.fullmatch(parts[0].strip()) or not 0 <= float(parts[0]) <= 1:
            raise ValueError(f"{column}: want a confidence between 0 and 1, got {short(parts[0])}")
        if not parts[1].strip():
            raise ValueError(f"{column}: the answer is empty")
        answers.append((parts[1], float(parts[0])))
    return answers


def read_box(column: str, parts: list[str], head: dict[str, Any]) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) in pixels, as float32 keeps them. head: image, width, height of the row.

    Raises ValueError "column: reason": not four numbers, inverted, empty, outside the picture.
    """
    if len(parts) != 4 or not all(_NUMBER.fullmatch(part.strip()) for part in parts):
        raise ValueError(f"{column}: want a box x0,y0,x1,y1 in pixels, got {short(','.join(parts))}")
    x0, y0, x1, y1 = (float(part) for part in parts)
    width, height = head["width"], head["height"]
    if x1 <= x0 or y1 <= y0:
        raise ValueError(f"{column}: the box {short(','.join(parts))} is inverted or empty; want x0 < x1 and y0 < y1")
    if min(x0, y0) < -BOX_OVERSHOOT or x1 > width + BOX_OVERSHOOT or y1 > height + BOX_OVERSHOOT:
        raise ValueError(f"{column}: the box {short(','.join(parts))} is outside {_picture(head)}")
    inside = np.array([max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)], np.float32).tolist()
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        raise ValueError(f"{column}: the box {short(','.join(parts))} is outside {_picture(head)}")
    return tuple(inside)


def _picture(head: dict[str, Any]) -> str:
    turned = " as stored; EXIF data turn it for viewers, whose pixels these may be" * (orientation(head["image"]) != 1)
    return f"the picture of {head['width']} x {head['height']}{turned}"


def short(text: str) -> str:
    """Quoted, at most 60 characters of it."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
