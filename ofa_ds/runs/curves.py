"""The numbers of `metrics.jsonl` by name, and where those of two runs part. Broken lines are counted, not feared."""

from __future__ import annotations

import json
import math
from array import array
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ofa_ds.storage.sizes import size_text

TAIL = 0.1
"""Share of the steps that both have, the last, over which a mean is taken."""
_MAX_LINE = 1 << 20
"""Bytes; a longer line is none of ours."""
_MAX_NAME = 200


@dataclass(slots=True)
class Curve:
    """Steps rise; where nothing finite was written (null), the value is NaN."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, step: float, value: float) -> None:
        """A step that was there before, or later ones, are written again by a run that goes on."""
        if self.steps and step <= self.steps[-1]:
            end = bisect_left(self.steps, step)
            del self.steps[end:], self.values[end:]
        self.steps.append(step)
        self.values.append(value)

    def mean(self, first: float, last: float) -> float:
        """Of the finite values at those steps, both included; NaN where there are none."""
        begin, end = bisect_left(self.steps, first), bisect_left(self.steps, math.nextafter(last, math.inf))
        finite = [value for value in self.values[begin:end] if math.isfinite(value)]
        return math.fsum(finite) / len(finite) if finite else math.nan


@dataclass(slots=True)
class Metrics:
    curves: dict[str, Curve] = field(default_factory=dict)
    num_broken: int = 0
    """Lines that are no record: half-written, torn, of something else."""
    problem: str = ""
    """Why there is nothing; empty where there is."""

    @property
    def last_step(self) -> int:
        return int(max((curve.steps[-1] for curve in self.curves.values()), default=0))


def read_metrics(path: Path) -> Metrics:
    """Never raises for what is in the file, or for a file that is not there."""
    found = Metrics()
    try:
        with open(path, "rb") as file:
            while line := file.readline(_MAX_LINE):
                _take(found, line)
    except OSError as error:
        found.problem = f"{path}: {error.strerror or error}"
        return found
    if not found.curves:
        found.problem = f"{path}: has no records"
    return found


def _take(found: Metrics, line: bytes) -> None:
    if not line.strip():
        return
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    step = _number(record.get("step")) if isinstance(record, dict) else None
    if step is None or not math.isfinite(step) or step < 0:
        found.num_broken += 1
        return
    for name, value in record.items():
        number = math.nan if value is None else _number(value)
        if name != "step" and number is not None and len(name) <= _MAX_NAME:
            found.curves.setdefault(name, Curve()).add(step, number)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One curve of two runs, over the steps that both have."""

    name: str
    first: float
    last: float
    means: tuple[float, float]
    """Over the last TAIL of them; NaN where a run has nothing finite there."""
    common: int
    """Steps that both have logged."""
    parted: float | None
    """The first of these at which they differ, or one alone is finite; None: nowhere."""
    largest: float
    """Absolute difference there or later."""

    @property
    def change(self) -> float:
        """Of B against A; NaN where it cannot be said."""
        one, other = self.means
        return (other - one) / abs(one) if one else (0.0 if other == one else math.nan)


def pairs(one: Metrics, other: Metrics) -> list[Pair]:
    """Of what both have at steps that overlap, losses first."""
    found = [_pair(name, one.curves[name], other.curves[name]) for name in one.curves if name in other.curves]
    return sorted((each for each in found if each is not None), key=lambda each: order(each.name))


def order(name: str) -> tuple[int, str]:
    """Losses, then what held-out rows gave, the gradient, the speed, the rest."""
    firsts = ("loss", "heldout/", "grad_norm", "lr", "mfu", "tokens_per_s", "examples_per_s", "step_ms")
    return next((i for i, first in enumerate(firsts) if name.startswith(first)), len(firsts)), name


def _pair(name: str, one: Curve, other: Curve) -> Pair | None:
    first, last = max(one.steps[0], other.steps[0]), min(one.steps[-1], other.steps[-1])
    if first > last:
        return None
    there = dict(zip(other.steps, other.values, strict=True))
    both = [
        (step, _difference(value, there[step]))
        for step, value in zip(one.steps, one.values, strict=True)
        if step in there
    ]
    tail = last - TAIL * (last - first)
    return Pair(
        name=name, first=first, last=last, means=(one.mean(tail, last), other.mean(tail, last)), common=len(both),
        parted=next((step for step, difference in both if difference), None),
        largest=max((difference for _, difference in both if math.isfinite(difference)), default=0.0),
    )  # fmt: skip


def _difference(one: float, other: float) -> float:
    """Infinite where one of them alone is finite."""
    if math.isnan(one) or math.isnan(other):
        return 0.0 if math.isnan(one) == math.isnan(other) else math.inf
    return abs(one - other)


def text_of(name: str, value: float) -> str:
    """A number of a curve as people read it."""
    if math.isnan(value):
        return "-"
    if name.endswith("_bytes"):
        return size_text(value)
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def only_in(one: Iterable[str], other: Iterable[str]) -> list[str]:
    return sorted(set(one) - set(other), key=order)
