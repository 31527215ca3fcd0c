"""The curves of two runs as one picture: a panel for each, A blue, B orange."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ofa_ds.runs.curves import Curve, Metrics, order, text_of
from ofa_ds.storage.atomic import new_content

COLUMNS, WIDTH, HEIGHT, HEAD = 3, 440, 250, 50
LEFT, TOP, RIGHT, BOTTOM = 70, 34, 14, 28
MAX_PANELS = 30
COLOURS = ((31, 119, 180), (214, 96, 20))
_OUTLIER = 3.0
"""A span this many times that of the middle 98 % is cut to it: a spike would flatten all else."""


def draw(one: Metrics, other: Metrics, names: tuple[str, str], path: Path) -> str:
    """What is drawn, in words. names: of A and B. Raises ValueError where neither has a curve."""
    shown = sorted({*one.curves, *other.curves}, key=order)
    if not shown:
        raise ValueError("neither run has a curve to draw")
    panels = shown[:MAX_PANELS]
    rows = -(-len(panels) // COLUMNS)
    picture = Image.new("RGB", (COLUMNS * WIDTH, HEAD + rows * HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    font, small = ImageFont.load_default(15), ImageFont.load_default(11)
    for i, (letter, name) in enumerate(zip("AB", names, strict=True)):
        text = name if len(name) <= 75 else f"...{name[-72:]}"
        pen.text((LEFT + i * COLUMNS * WIDTH // 2, 16), f"{letter}: {text}", COLOURS[i], font)
    for i, name in enumerate(panels):
        corner = (i % COLUMNS * WIDTH, HEAD + i // COLUMNS * HEIGHT)
        curves = [metrics.curves.get(name, Curve()) for metrics in (one, other)]
        _panel(pen, corner, name, curves, font, small)
    with new_content(path) as partial:
        picture.save(partial)
    return f"{len(panels)} of {len(shown)} curves" if len(panels) < len(shown) else f"{len(panels)} curves"


def _panel(
    pen: ImageDraw.ImageDraw, corner: tuple[int, int], name: str, curves: list[Curve], font: ImageFont.ImageFont,
    small: ImageFont.ImageFont,
) -> None:  # fmt: skip
    x0, y0 = corner[0] + LEFT, corner[1] + TOP
    x1, y1 = corner[0] + WIDTH - RIGHT, corner[1] + HEIGHT - BOTTOM
    pen.text((x0, corner[1] + 10), name, "black", font)
    pen.rectangle((x0, y0, x1, y1), outline=(190, 190, 190))
    first = min(curve.steps[0] for curve in curves if curve.steps)
    last = max(curve.steps[-1] for curve in curves if curve.steps)
    columns = x1 - x0
    drawn = [_columns(curve, first, last, columns) for curve in curves]
    values = sorted(value for points in drawn for _, value in points if not math.isnan(value))
    pen.text((x0, y1 + 6), f"step {first:.0f}", "gray", small)
    pen.text((x1 - 60, y1 + 6), f"{last:.0f}", "gray", small)
    if not values:
        pen.text((x0 + 20, (y0 + y1) // 2), "nothing finite", "gray", small)
        return
    low, high = _range(values)
    pen.text((corner[0] + 6, y0 - 4), text_of(name, high), "gray", small)
    pen.text((corner[0] + 6, y1 - 10), text_of(name, low), "gray", small)
    for colour, points in zip(COLOURS, drawn, strict=True):
        for run in _unbroken(points):
            line = [(x0 + x, y1 - (y1 - y0) * (min(max(value, low), high) - low) / (high - low)) for x, value in run]
            if len(line) == 1:
                x, y = line[0]
                pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
            else:
                pen.line(line, fill=colour, width=2)


def _columns(curve: Curve, first: float, last: float, columns: int) -> list[tuple[int, float]]:
    """(column, mean of the finite values in it), NaN where there are only others: at most a point a pixel."""
    sums: dict[int, list[float]] = defaultdict(list)
    for step, value in zip(curve.steps, curve.values, strict=True):
        sums[round((step - first) / max(last - first, 1) * columns)].append(value)
    points = []
    for column, values in sums.items():
        finite = [value for value in values if math.isfinite(value)]
        points.append((column, sum(finite) / len(finite) if finite else math.nan))
    return points


def _unbroken(points: Iterable[tuple[int, float]]) -> Iterable[list[tuple[int, float]]]:
    """Runs without a NaN."""
    run: list[tuple[int, float]] = []
    for point in points:
        if math.isnan(point[1]):
            if run:
                yield run
            run = []
        else:
            run.append(point)
    if run:
        yield run


def _range(values: list[float]) -> tuple[float, float]:
    """Lowest and highest shown, of sorted values; NaN is not among them."""
    low, high = values[0], values[-1]
    inner_low, inner_high = values[len(values) // 100], values[-1 - len(values) // 100]
    if high - low > _OUTLIER * (inner_high - inner_low) > 0:
        low, high = inner_low, inner_high
    if high > low:
        return low, high
    return low - max(abs(low), 1) * 0.05, high + max(abs(high), 1) * 0.05
