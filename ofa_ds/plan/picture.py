"""A forecast as a picture: what fills a GPU, beside what it has, and what a step's time goes into."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from ofa_ds.plan.report import GIB, Report, time_parts

WIDTH, LEFT, RIGHT = 1000, 40, 960
BAR, LINE, COLUMNS = 56, 24, 3
COLOURS = (
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75), (227, 119, 194),
    (127, 127, 127), (188, 189, 34), (23, 190, 207), (174, 199, 232), (255, 187, 120), (152, 223, 138),
    (255, 152, 150), (197, 176, 213), (196, 156, 148),
)  # fmt: skip


class _Bar(NamedTuple):
    title: str
    parts: list[tuple[str, float]]
    """The largest first, in the bar's unit."""
    unit: str
    limit: float
    """A line across the bar; 0: none."""


def draw(report: Report, path: Path) -> None:
    """Write the picture."""
    planned, step = report.planned, report.step
    gpu, bars = planned.cluster.gpu, []
    verdict = "fits" if planned.fits else "does not fit"
    if planned.memory.gpu:
        has = gpu.memory_bytes / GIB
        used = planned.memory.gpu_total / GIB
        title = f"memory of one {gpu.name}: {used:,.1f} of {has:,.1f} GiB, {verdict}"
        bars.append(_bar(title, planned.memory.gpu, GIB, "GiB", has))
    has, used = planned.cluster.host_bytes / GIB, planned.memory.host_total / GIB
    bars.append(_bar(f"memory of a host: {used:,.1f} of {has:,.0f} GiB", planned.memory.host, GIB, "GiB", has))
    title = f"time of a step: {step.total_s * 1e3:,.0f} ms ({step.low_s * 1e3:,.0f} to {step.high_s * 1e3:,.0f})"
    bars.append(_bar(title + (f", MFU {step.mfu:.1%}" if step.mfu else ""), time_parts(step), 1e-3, "ms", 0.0))
    heights = [_height(bar) for bar in bars]
    picture = Image.new("RGB", (WIDTH, 60 + sum(heights)), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    cluster = planned.cluster
    what = f"{planned.run.name}: {cluster.hosts} x {cluster.ranks_per_host} {gpu.name}, ZeRO {planned.layout.stage}"
    pen.text((LEFT, 16), f"{what}, {planned.run.recipe.batch.micro_rows} rows a micro-batch", "black", font)
    top = 50
    for bar, height in zip(bars, heights, strict=True):
        _draw_bar(pen, font, bar, top)
        top += height
    picture.save(path)


def _bar(title: str, parts: Mapping[str, float], unit: float, name: str, limit: float) -> _Bar:
    shown = sorted(((part, value / unit) for part, value in parts.items() if value > 0), key=lambda each: -each[1])
    return _Bar(title, shown, name, limit)


def _height(bar: _Bar) -> int:
    return 30 + BAR + 12 + LINE * -(-len(bar.parts) // COLUMNS) + 24


def _draw_bar(pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont, bar: _Bar, top: int) -> None:
    pen.text((LEFT, top), bar.title, "black", font)
    total = sum(value for _, value in bar.parts)
    scale = (RIGHT - LEFT) / (max(total, bar.limit) or 1.0)
    x, y = float(LEFT), top + 28
    for i, (name, value) in enumerate(bar.parts):
        colour = COLOURS[i % len(COLOURS)]
        pen.rectangle((x, y, x + value * scale, y + BAR), fill=colour)
        x += value * scale
        row, column = divmod(i, COLUMNS)
        at = LEFT + column * (RIGHT - LEFT) // COLUMNS, y + BAR + 12 + row * LINE
        pen.rectangle((at[0], at[1] + 3, at[0] + 12, at[1] + 15), fill=colour)
        pen.text((at[0] + 20, at[1]), f"{name[:28]} {value:,.1f} {bar.unit}", "black", font)
    pen.rectangle((LEFT, y, LEFT + max(total, bar.limit) * scale, y + BAR), outline="gray")
    if bar.limit:
        limit = LEFT + bar.limit * scale
        pen.line((limit, y - 6, limit, y + BAR + 6), fill="black", width=3)
