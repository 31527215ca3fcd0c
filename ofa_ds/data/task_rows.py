"""Downstream tasks' TSV files, line by line: the original's columns in, checked rows out, one schema for all tasks.

As in `ofa_ds.data.tsv` a bad line is a ValueError "column: reason". Which column of the file holds what the task says
(`Task.columns`), or the user (`--columns`), in the words of `READERS`.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ofa_ds.data import tsv
from ofa_ds.data.answer_list import best_answer
from ofa_ds.data.picture import check_image
from ofa_ds.data.text import clean_caption

ANSWERING = ("answers", "captions", "answer", "label", "box", "codes")
"""Kinds of columns that hold what is right; not read of rows to predict."""


@dataclass(frozen=True, kw_only=True)
class TaskLines:
    """How lines of one task's file read."""

    type: str
    """Of its rows: `Task.row_types`."""
    columns: Mapping[str, int]
    """Name in `READERS` -> place in the line, from 0."""
    width: int
    """Columns of a line."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What stands in a label column -> the answer."""
    needs: Sequence[str] = ()
    """Of READERS, what the task asks about: a file must have these."""
    answering: Collection[str] = ANSWERING
    """Of ANSWERING, those that say what is right of this task."""
    references: bool = True
    """Read what is right too. False: rows to predict, which may leave it empty."""
    listed: bool = False
    """The answer that is trained on must be in the list of answers, where there is one."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.columns) - set(READERS))
        if unknown:
            raise ValueError(f"columns: want names of {', '.join(READERS)}, got {unknown[0]!r}")
        places = list(self.columns.values())
        if len(set(places)) < len(places):
            raise ValueError(f"columns: two names stand for one column: {_listed(self.columns)}")
        if max(places, default=-1) >= self.width:
            raise ValueError(f"columns: the file has {self.width} columns, counted from 0; got {_listed(self.columns)}")
        if missing := next((name for name in self.needs if name not in self.columns), None):
            raise ValueError(f"columns: rows of {self.type} need {missing}=N; got {_listed(self.columns)}")
        right = [name for name in self.columns if name in ANSWERING]
        if self.references and not right:
            raise ValueError(
                f"columns: none holds what is right ({', '.join(self.answering)}); --no-references says so"
            )
        if self.references and (len(right) > 1 or right[0] not in self.answering):
            raise ValueError(
                f"columns: what is right of {self.type} is one of {', '.join(self.answering)}; got {', '.join(right)}"
            )

    @property
    def names(self) -> list[str]:
        """Of each column of a line, for messages; those that are not read have their number."""
        known = {place: name for name, place in self.columns.items()}
        return [known.get(place, f"column {place}") for place in range(self.width)]

    @property
    def reads(self) -> list[str]:
        """Names of the columns that are read, the picture before what is measured by it."""
        return [name for name in READERS if name in self.columns and (self.references or name not in ANSWERING)]


def parse(lines: TaskLines, line: bytes, number: int, listed: Collection[str] = ()) -> dict[str, Any]:
    """The row of line `number`, in the form that `Shards.row` gives back. Raises ValueError "column: reason".

    listed: the list of answers; empty where there is none. A row without an id column has its line number as id.
    """
    columns = tsv.split(line, lines.names)
    if len(columns) != lines.width:
        raise ValueError(
            f"columns: want {lines.width} with tabs between ({', '.join(lines.names)}), got {len(columns)}; "
            "say where each is with --columns if the file is laid out otherwise"
        )
    row: dict[str, Any] = {
        "id": str(number), "image": b"", "width": 0, "height": 0, "image_id": "", "text": "", "text_pair": "",
        "answers": [], "box": None, "objects": [], "type": lines.type,
    }  # fmt: skip
    for name in lines.reads:
        column = columns[lines.columns[name]]
        READERS[name](row, column if name == "image" else tsv.decode_column(name, column), lines)
    if lines.labels and row["answers"]:
        _a_label(row, lines)
    if lines.listed and listed and row["answers"]:
        _in_the_list(row, lines, listed)
    return row


def is_answered(row: Mapping[str, Any]) -> bool:
    """The row says what is right."""
    return bool(row["answers"]) or row["box"] is not None


def _a_label(row: dict[str, Any], lines: TaskLines) -> None:
    labels = dict.fromkeys(lines.labels.values())
    if wrong := next((answer for answer, _ in row["answers"] if answer not in labels), None):
        name = next(name for name in ANSWERING if name in lines.columns)
        raise ValueError(f"{name}: want {', '.join(labels)}, got {tsv.short(wrong)}; a head line is no row")


def _in_the_list(row: dict[str, Any], lines: TaskLines, listed: Collection[str]) -> None:
    answer = best_answer(row["answers"])
    if answer not in listed:
        name = next(name for name in ANSWERING if name in lines.columns)
        raise ValueError(
            f"{name}: the answer {tsv.short(answer)} is not among the {len(listed)} of --answers, where training would "
            "have an infinite loss; --held-out keeps such rows, to evaluate on"
        )


def _image(row: dict[str, Any], column: bytes, lines: TaskLines) -> None:
    row["image"] = tsv.decode_base64(column)
    row["width"], row["height"] = check_image(row["image"])


def _id(row: dict[str, Any], text: str, lines: TaskLines) -> None:
    if not text.strip():
        raise ValueError("id: is empty")
    row["id"] = text


def _image_id(row: dict[str, Any], text: str, lines: TaskLines) -> None:
    if not text.strip():
        raise ValueError("image_id: is empty")
    row["image_id"] = text


def _text(name: str) -> Callable[[dict[str, Any], str, TaskLines], None]:
    def read(row: dict[str, Any], text: str, lines: TaskLines) -> None:
        # What is said of a picture is cleaned before it is asked; sentences alone are asked as they are.
        if not (clean_caption(text) if "image" in lines.columns else text.strip()):
            raise ValueError(f"{name}: is empty, or nothing is left of it after cleaning")
        row[name] = text

    return read


def _answers(row: dict[str, Any], text: str, lines: TaskLines) -> None:
    row["answers"] = tsv.read_answers("answers", text)
    texts = [answer for answer, _ in row["answers"]]
    if twice := next((answer for k, answer in enumerate(texts) if answer in texts[:k]), None):
        raise ValueError(f"answers: {tsv.short(twice)} is there twice; which confidence is meant?")


def _captions(row: dict[str, Any], text: str, lines: TaskLines) -> None:
    captions = text.split("&&")
    if not all(caption.translate(_NO_PUNCTUATION).strip() for caption in captions):
        raise ValueError(f"captions: one is empty, or nothing but punctuation, in {tsv.short(text)}")
    row["answers"] = [(caption, 1.0) for caption in captions]


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _answer(row: dict[str, Any], text: str, lines: TaskLines) -> None:
    if not text.strip():
        raise ValueError("answer: is empty")
    row["answers"] = [(text, 1.0)]


def _label(row: dict[str, Any], text: str, lines: TaskLines) -> None:
    if text not in lines.labels:
        raise ValueError(f"label: want {', '.join(lines.labels)}, got {tsv.short(text)}; a head line is no row")
    row["answers"] = [(lines.labels[text], 1.0)]


def _box(row: dict[str, Any], text: str, lines: TaskLines) -> None:
    row["box"] = tsv.read_box("box", text.split(","), row)


def _codes(row: dict[str, Any], text: str, lines: TaskLines) -> None:
    codes = tsv.read_codes("codes", text)
    if not codes or math.isqrt(len(codes)) ** 2 != len(codes):
        raise ValueError(f"codes: want as many as a square has, row by row, such as 1024, got {len(codes)}")
    row["answers"] = [(" ".join(map(str, codes)), 1.0)]


def _objects(row: dict[str, Any], text: str, lines: TaskLines) -> None:
    row["objects"] = tsv.read_objects("objects", text)


READERS: dict[str, Callable[[dict[str, Any], Any, TaskLines], None]] = {
    "id": _id, "image_id": _image_id, "image": _image, "text": _text("text"), "text_pair": _text("text_pair"),
    "objects": _objects, "answers": _answers, "captions": _captions, "answer": _answer, "label": _label, "box": _box,
    "codes": _codes,
}  # fmt: skip
"""What a column may hold; each reads its text (of a picture: its bytes) into the row.

answers `confidence|!+answer` joined by &&; captions `a&&b`, each right; answer as it stands; label through
`TaskLines.labels`; box `x0,y0,x1,y1` in pixels of the picture, which comes before it; objects `a&&b`, may be empty;
codes of a square picture, row by row, with blanks between.
"""


def _listed(columns: Mapping[str, int]) -> str:
    return ",".join(f"{name}={place}" for name, place in columns.items())
