"""Types of the single values of a recipe and a model's configuration, and how a wrong one is told: in one line."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from datetime import date, datetime, time
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

STRICT = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)
"""Of every section: no unknown keys, defaults are checked too, no float is infinite or not a number."""

LARGEST_COUNT = 2**31 - 1
LARGEST_SEED = 2**64 - 1
"""Of torch's generators."""
SHOWN_CHARACTERS = 80
"""Longer values are shortened in messages."""


def _no_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("want a number")
    return value


def _seed(value: int) -> int:
    if not 0 <= value <= LARGEST_SEED:
        raise ValueError(f"want a whole number from 0 to {LARGEST_SEED} (64 bits)")
    return value


def _utf8(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("want text that is valid UTF-8") from error
    if "\0" in text:
        raise ValueError("want text without NUL characters")
    return text


def _no_blank(text: str) -> str:
    if text and not text.strip():
        raise ValueError("want more than blanks")
    return text


def _given(text: str) -> str:
    if not text:
        raise ValueError("want more than nothing")
    return text


def step_window(text: str) -> range:
    """The numbers of the steps of "FIRST:LAST", both included; none of "". Raises ValueError for any other text."""
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d{1,10}):(\d{1,10})", text, re.ASCII)
    if match is None or not 1 <= int(match[1]) <= int(match[2]) <= LARGEST_COUNT:
        raise ValueError("want FIRST:LAST, numbers of steps from 1 on, both included, such as 20:25")
    return range(int(match[1]), int(match[2]) + 1)


def _window(text: str) -> str:
    step_window(text)
    return text


Count = Annotated[int, BeforeValidator(_no_switch), Field(le=LARGEST_COUNT)]
"""A whole number; say its lower limit with `Field(..., ge=...)`."""
Seed = Annotated[int, BeforeValidator(_no_switch), AfterValidator(_seed)]
Real = Annotated[float, BeforeValidator(_no_switch), Field(allow_inf_nan=False)]
Text = Annotated[str, AfterValidator(_utf8), AfterValidator(_no_blank)]
"""A name or a path; empty where none is given."""
StepWindow = Annotated[str, AfterValidator(_window)]
"""`step_window` reads it."""
GivenText = Annotated[Text, AfterValidator(_given)]


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing."""
    match = difflib.get_close_matches(word[:SHOWN_CHARACTERS], list(known), n=1)
    return f"; did you mean {match[0]}?" if match else ""


def shown(value: Any) -> str:
    """A value as messages show it: on one line, not too long."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if isinstance(value, int) and value.bit_length() > 4 * SHOWN_CHARACTERS:
        return f"a number of {value.bit_length()} bits"  # Python refuses to write very long ones
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[: SHOWN_CHARACTERS - 20]}... ({len(text)} characters)"
    return text


def label(key: str) -> str:
    """A key as messages show it."""
    return key if key.isprintable() and len(key) <= SHOWN_CHARACTERS else shown(key)


def problem_within(key: str, problem: str) -> PydanticCustomError:
    """For a validator of a whole section: what is wrong with one of its keys."""
    return PydanticCustomError("within", "{problem}", {"key": key, "problem": problem})


def first_problem(error: ValidationError, *, without: Iterable[str] = ()) -> str:
    """The first of a validation's problems as `KEY: what was wanted, got VALUE`.

    without: parts of a place that are no keys.
    """
    problem = error.errors(include_url=False)[0]
    place = [str(part) for part in problem["loc"] if part not in without]
    if problem["type"] == "within":
        place.append(problem["ctx"]["key"])
    where = ".".join(label(part) for part in place)
    text = _WORDS.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    got = problem.get("input")
    if ", got " not in text and not (isinstance(got, Mapping) or is_dataclass(got)):
        text += f", got {shown(got)}"
    if problem["type"] == "string_type" and isinstance(got, (date, time, int, float)):
        text += "; put it in quotes"
    return f"{where}: {text}" if where else text


_WORDS = {
    "missing": "is missing",
    "tuple_type": 'want a list such as [0.9, 0.98] or ["data"]',
    "int_parsing_size": "want a smaller whole number",
    "finite_number": "want a finite number",
}
