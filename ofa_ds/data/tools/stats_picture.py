"""Statistics of shards as a picture: a histogram of everything that was measured."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ofa_ds.data.tools.stats import Stats
from ofa_ds.data.tools.stats_report import quantile
from ofa_ds.storage.atomic import new_content

COLUMNS, CELL, BARS = 4, (300, 190), 40
COLOURS = ((31, 119, 180), (214, 96, 20), (44, 140, 60), (150, 60, 160), (120, 90, 70), (60, 130, 140))
_TOP, _SIDE, _BOTTOM = 34, 14, 24


def draw(stats: Stats, path: Path) -> None:
    """Write the picture. The last 0.5 % of the values of a histogram are in its last bar."""
    cells = [
        (f"{kind}, {name}", counts, COLOURS[number % len(COLOURS)])
        for number, (kind, rows) in enumerate(stats.kinds.items())
        for name, counts in sorted(rows.values.items())
    ]
    height = 40 + CELL[1] * -(-len(cells) // COLUMNS)
    picture = Image.new("RGB", (COLUMNS * CELL[0], height), "white")
    pen = ImageDraw.Draw(picture)
    rows = ", ".join(f"{kind} {each.rows:,}" for kind, each in stats.kinds.items())
    pen.text((_SIDE, 12), f"{stats.path}: {rows}", "black", ImageFont.load_default(14))
    for k, (title, counts, colour) in enumerate(cells):
        _histogram(pen, (k % COLUMNS * CELL[0], 40 + k // COLUMNS * CELL[1]), title, counts, colour)
    with new_content(path) as partial:
        picture.save(partial)


def _histogram(
    pen: ImageDraw.ImageDraw, corner: tuple[int, int], title: str, counts: Counter[int], colour: tuple[int, int, int]
) -> None:
    small = ImageFont.load_default(11)
    left, top = corner[0] + _SIDE, corner[1] + _TOP
    width, height = CELL[0] - 2 * _SIDE, CELL[1] - _TOP - _BOTTOM
    low, high = min(counts), max(quantile(counts, 0.995), min(counts))
    step = -(-(high - low + 1) // BARS)
    bars = [0] * (-(-(high - low + 1) // step))
    for value, count in counts.items():
        bars[min((value - low) // step, len(bars) - 1)] += count
    pen.text((left, corner[1] + 8), title, "black", small)
    for k, count in enumerate(bars):
        x0, x1 = left + k * width // len(bars), left + (k + 1) * width // len(bars) - 1
        if count:
            pen.rectangle((x0, top + height - max(1, height * count // max(bars)), max(x0, x1), top + height), colour)
    pen.line((left, top + height, left + width, top + height), "gray")
    pen.text((left, top + height + 4), f"{low:,}", "black", small)
    end = f"{high:,}{' ...' if high < max(counts) else ''}"
    pen.text((left + width - pen.textlength(end, small), top + height + 4), end, "black", small)
