"""A picture of goodput against the checkpoint interval: one line a cluster, its 5th to 95th percentile shaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ofa_ds.plan.goodput import Search

SIZE = (900, 560)
LEFT, TOP, RIGHT, BOTTOM = 90, 50, 870, 490
COLOURS = ((31, 119, 180), (214, 96, 20), (44, 140, 60), (150, 60, 160), (120, 90, 70))
TICKS_S = {60: "1 min", 300: "5 min", 900: "15 min", 3600: "1 h", 4 * 3600: "4 h", 16 * 3600: "16 h", 64 * 3600: "64 h"}


def draw(searches: Sequence[Search], path: Path) -> None:
    """Write the picture. Raises ValueError where there is no curve: one interval alone."""
    if any(len(each.points) < 2 for each in searches):
        raise ValueError("a curve wants more than one interval: leave --interval out")
    times = [point.interval_s for each in searches for point in each.points]
    shares = [share for each in searches for point in each.points for share in (point.p5, point.p95)]
    axes = _Axes(min(times), max(times), min(shares), max(shares))
    picture = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(picture, "RGBA")
    font = ImageFont.load_default(15)
    axes.draw(pen, font)
    for i, each in enumerate(searches):
        colour = COLOURS[i % len(COLOURS)]
        upper = [axes.place(point.interval_s, point.p95) for point in each.points]
        lower = [axes.place(point.interval_s, point.p5) for point in each.points]
        pen.polygon([*upper, *reversed(lower)], fill=(*colour, 45))
        pen.line([axes.place(point.interval_s, point.p50) for point in each.points], fill=colour, width=3)
        x, y = axes.place(each.best.interval_s, each.best.p50)
        pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill=colour)
        pen.text((RIGHT - 330, BOTTOM - 25 * (len(searches) - i)), _legend(each), fill=colour, font=font)
    picture.save(path)


def _legend(search: Search) -> str:
    return f"{search.plan.gpus:,} GPUs: {search.best.p50:.2%} every {search.best.interval_s:,.0f} s"


class _Axes:
    """Time on a logarithmic scale to the right, goodput upwards."""

    def __init__(self, first_s: float, last_s: float, low: float, high: float) -> None:
        self.first, self.width = math.log(first_s), math.log(last_s / first_s)
        self.unit = 10 ** math.floor(math.log10(max(high - low, 1e-6)))
        self.low, self.high = math.floor(low / self.unit) * self.unit, min(1, math.ceil(high / self.unit) * self.unit)

    def place(self, time_s: float, share: float) -> tuple[float, float]:
        x = LEFT + (RIGHT - LEFT) * (math.log(time_s) - self.first) / self.width
        return x, BOTTOM - (BOTTOM - TOP) * (share - self.low) / (self.high - self.low)

    def draw(self, pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont) -> None:
        pen.rectangle((LEFT, TOP, RIGHT, BOTTOM), outline="gray")
        pen.text((LEFT, 18), "goodput (median; shaded: 5th to 95th percentile) by checkpoint interval", "black", font)
        for time_s, name in TICKS_S.items():
            if 0 <= math.log(time_s) - self.first <= self.width:
                x = self.place(time_s, self.low)[0]
                pen.line((x, TOP, x, BOTTOM), fill=(0, 0, 0, 40))
                pen.text((x - 20, BOTTOM + 10), name, "black", font)
        decimals = max(0, -round(math.log10(self.unit)) - 2)
        for k in range(round((self.high - self.low) / self.unit) + 1):
            share = self.low + k * self.unit
            y = self.place(math.exp(self.first), share)[1]
            pen.line((LEFT, y, RIGHT, y), fill=(0, 0, 0, 40))
            pen.text((15, y - 9), f"{share:.{decimals}%}", "black", font)
