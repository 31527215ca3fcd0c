"""Lines that are well formed and look like a mistake: each a warning "column: reason", an error with `--strict`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from ofa_ds.data.picture import orientation
from ofa_ds.data.text import clean_caption
from ofa_ds.data.tsv import COLUMNS

if TYPE_CHECKING:
    from ofa_ds.data.task_rows import TaskLines

MISSING = ("nan", "NaN", "NAN", "None", "null", "NULL", "NaT", "<NA>")
"""What pandas, numpy, Python and SQL write for a value that is not there. "none" is a word, and an answer."""

Row = Mapping[str, Any]


def doubts(family: str, line: bytes, row: Row) -> list[str]:
    """What looks wrong in a good line. row: what `tsv.parse` made of it."""
    names = COLUMNS[family]
    columns = dict(zip(names, line.split(b"\t"), strict=True))
    quoted = [name for name in names if name != "image" and _is_quoted(columns[name])]
    if quoted == ["text"] and b'""' not in columns["text"][1:-1]:
        quoted = []  # running text often is direct speech; a program that quotes all of it quotes the ids too
    found = [f"{name}: {_QUOTED}" for name in quoted]
    found += _missing(family, row)
    if "image" in columns:
        found += _padding(columns["image"], row["image"])
        found += _turned(row)
    found += _normalised(family, row)
    return found


def task_doubts(lines: TaskLines, line: bytes, row: Row) -> list[str]:
    """The same of a line of a downstream task. row: what `task_rows.parse` made of it."""
    columns = dict(zip(lines.names, line.split(b"\t"), strict=True))
    quoted = [name for name in lines.reads if name != "image" and _is_quoted(columns[name])]
    if set(quoted) <= {"text", "text_pair"} and not any(b'""' in columns[name][1:-1] for name in quoted):
        quoted = []  # sentences of direct speech
    found = [f"{name}: {_QUOTED}" for name in quoted]
    for name in lines.reads:
        texts = {"objects": row["objects"], "text": [row["text"]], "text_pair": [row["text_pair"]]}.get(name)
        if name in ("answers", "captions", "answer"):
            texts = [text for text, _ in row["answers"]]
        if name == "answers" and (blank := next((text for text in texts if text != text.strip()), None)):
            found.append(f"{name}: {blank[:60]!r} begins or ends with a blank, which no generated answer does")
        found += _missing_in(name, texts or ())
    if "image" in lines.columns:
        found += _padding(columns["image"], row["image"])
        found += _turned(row)
        found += _within_one("box", row["box"], row)
    return found


_QUOTED = "stands in quotation marks, as pandas and csv write, and they are kept; join plain fields with tabs instead"


def _is_quoted(column: bytes) -> bool:
    """As a csv writer quotes: marks at both ends, and those inside doubled."""
    return len(column) > 1 and column[:1] == column[-1:] == b'"' and b'"' not in column[1:-1].replace(b'""', b"")


def _missing(family: str, row: Row) -> Iterator[str]:
    texts = {
        "vision_language": [("caption", [row.get("caption", "")]), ("question", [row.get("question", "")]),
                            ("refs", [text for text, _ in row.get("answers", ())]),
                            ("gt_objects", row.get("gt_objects", ()))],
        "text": [("text", [row.get("text", "")])],
        "image": [],
        "detection": [("label", row.get("cat_names", ()))],
    }[family]  # fmt: skip
    for column, values in texts:
        yield from _missing_in(column, values)


def _missing_in(column: str, values: Iterable[str]) -> Iterator[str]:
    """The first of them that is none."""
    for value in values:
        if value.strip() in MISSING:
            yield f"{column}: {value.strip()!r} is what programs write for a missing value; leave such rows out"
            break


def _padding(column: bytes, image: bytes) -> Iterator[str]:
    surplus = len(column) - 4 * -(-len(image) // 3)
    if surplus:
        yield f"image: {surplus} characters of base64 padding too many; was the column cut and put together?"


def _turned(row: Row) -> Iterator[str]:
    if (turn := orientation(row["image"])) != 1:
        yield (
            f"image: EXIF data turn it for viewers (orientation {turn}); training sees it as stored, and takes boxes "
            "and codes to be of that; turn the pixels: PIL.ImageOps.exif_transpose"
        )


def _normalised(family: str, row: Row) -> Iterator[str]:
    if family == "detection":
        yield from _within_one("label", row["boxes"], row)
    elif family == "vision_language":
        yield from _within_one("refs", row["box"], row)


def _within_one(column: str, boxes: Sequence[float] | np.ndarray | None, row: Row) -> Iterator[str]:
    """Nothing that is worth a box is within the first pixel of its picture."""
    if boxes is not None and np.max(boxes) <= 1 and max(row["width"], row["height"]) > 1:
        yield f"{column}: all of it is within 0 ... 1, as of coordinates relative to the picture; want pixels"


def without_negative_caption(captions: Sequence[str]) -> str | None:
    """What is wrong where image-text matching will find no wrong caption for some row."""
    first = clean_caption(captions[0]) if captions else None
    if any(clean_caption(captions[i]) != first for i in range(1, len(captions))):
        return None
    reads = "no caption is there to draw it from" if first is None else f"all captions read {first[:40]!r}"
    return f"caption: no negative caption can be made: {reads}; give --negatives with two different ones"


def without_negative_answer(type2ans: Mapping[str, Sequence[str]]) -> str | None:
    """The same of wrong answers."""
    answers = {text.strip().lower() for text in chain.from_iterable(type2ans.values())}
    if len(answers) > 1:
        return None
    reads = f"all answers read {min(answers)[:40]!r}" if answers else "no answer is there to draw it from"
    return f"refs: no negative answer can be made: {reads}; give --negatives with two different ones"
