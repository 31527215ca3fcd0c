"""Histograms of each tensor's weights and first moments, where they lie: no tensor is gathered, whatever the stage.

Each rank counts its own share into bins that all have alike, and one sum over ranks makes them whole. The first moment
is the gradient's moving mean; gradients themselves are gone by the end of a step.

Bins: for either sign, quarters of powers of two from 2^-40 to 2^20; what is smaller counts as 0, what is larger as the
largest. NaN and infinities are in no bin, and are counted apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ofa_ds.engine.engine import Engine
from ofa_ds.engine.partition import MOMENTS

KINDS = {"weight": "weight", MOMENTS[0]: "gradient_mean"}
"""What there is of a parameter -> how its tags begin."""
_PER_POWER, _LEAST, _MOST = 4, -40, 20
_SIDE = (_MOST - _LEAST) * _PER_POWER
NUM_BINS = 2 * _SIDE + 1
_COLUMNS = NUM_BINS + 3
"""Bins; not finite; sum; sum of squares."""
_PART = 1 << 22
"""Elements that are looked at together: what is made of them on the way must fit on a GPU that is nearly full."""


class Histogram(NamedTuple):
    counts: np.ndarray
    """float64 [NUM_BINS]"""
    not_finite: int
    total: float
    total_of_squares: float

    @property
    def num(self) -> int:
        return int(self.counts.sum())


def upper_edges() -> np.ndarray:
    """Of each bin, ascending: float64 [NUM_BINS]."""
    powers = 2.0 ** (np.arange(_SIDE) / _PER_POWER + _LEAST)
    return np.concatenate([-powers[::-1], [powers[0]], powers * 2.0 ** (1 / _PER_POWER)])


def of_tensor(x: Tensor) -> Tensor:
    """float64 [_COLUMNS] on its device."""
    parts = (_of_part(part) for part in x.detach().flatten().split(_PART))
    return sum(parts, torch.zeros(_COLUMNS, dtype=torch.float64, device=x.device))


def _of_part(x: Tensor) -> Tensor:
    x = x.float()
    finite = torch.isfinite(x)
    x = torch.where(finite, x, 0.0)
    place = ((x.abs().log2() - _LEAST) * _PER_POWER).floor().clamp(-1, _SIDE - 1) + 1  # 0: as good as nothing
    place = torch.where(x < 0, -place, place).long() + _SIDE
    place = torch.where(finite, place, NUM_BINS)
    found = x.new_zeros(_COLUMNS, dtype=torch.float64)
    found[: NUM_BINS + 1] = torch.bincount(place, minlength=NUM_BINS + 1)
    found[-2], found[-1] = x.double().sum(), x.double().square().sum()
    return found


def of_state(engine: Engine) -> dict[str, Histogram]:
    """By tag, over all ranks, which call it together between two steps."""
    tags, rows = [], []
    for piece in engine.pieces():
        for kind, tag in KINDS.items():
            if kind in piece.kinds:
                tags.append(f"{tag}/{piece.name}")
                part = piece.tensors.get(kind)
                empty = torch.zeros(_COLUMNS, dtype=torch.float64)
                rows.append(empty if part is None else of_tensor(part).cpu())  # of an offloaded state it is there
    if not rows:
        return {}
    sums = engine.all_reduce(torch.stack(rows).to(engine.device)).cpu().numpy()
    return {tag: _histogram(row) for tag, row in zip(tags, sums, strict=True)}


def _histogram(row: np.ndarray) -> Histogram:
    return Histogram(row[:NUM_BINS], int(row[NUM_BINS]), float(row[-2]), float(row[-1]))


def buckets(histogram: Histogram) -> Iterator[tuple[float, float]]:
    """(upper edge, count) from the first bin that has something to the last; a bin before, so that its width shows."""
    used = np.flatnonzero(histogram.counts)
    if len(used):
        edges = upper_edges()
        counts = histogram.counts
        for place in range(max(int(used[0]) - 1, 0), int(used[-1]) + 1):
            if counts[place] or counts[place + 1]:  # of a run of empty ones, the last
                yield float(edges[place]), float(counts[place])


def span(histogram: Histogram) -> tuple[float, float]:
    """Of the values, to a bin's width; NaN where there are none."""
    used = np.flatnonzero(histogram.counts)
    if not len(used):
        return math.nan, math.nan
    edges = upper_edges()
    low = edges[used[0] - 1] if used[0] else -(2.0**_MOST)
    return float(low), float(edges[used[-1]])
