"""One micro-batch a GPU on more and more GPUs: how fast, and how much a slower or faster network would change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ofa_ds.config.architecture import ModelConfig
from ofa_ds.plan.calibration import Calibration
from ofa_ds.plan.hardware import Gpu, Network
from ofa_ds.plan.layout import Layout
from ofa_ds.plan.step_time import StepTime, step_time
from ofa_ds.plan.work import Work

GPUS = (256, 512, 1024)
FACTORS = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
"""Speeds of the network beside the named one's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    gpus: int
    network_factor: float
    step: StepTime
    weak_scaling: float
    """Tokens a second and GPU, as a share of the smallest cluster's on the network as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    gpu: Gpu
    network: Network
    points: tuple[Point, ...]

    @property
    def named(self) -> tuple[Point, ...]:
        """On the network as it is."""
        return tuple(each for each in self.points if each.network_factor == 1.0)


def scaling(
    config: ModelConfig, work: Work, layout: Layout, *, accumulation: int, gpu: Gpu, network: Network,
    gpus: Sequence[int] = GPUS, factors: Sequence[float] = FACTORS,
    calibration: Calibration | None = None, frozen_embedding: bool = False,
) -> Scaling:  # fmt: skip
    """work: one micro-batch of one rank, the same on every cluster. layout: of several hosts, as on one there
    is no second copy (hpZ); its hosts are set here.

    Raises ValueError: a number of GPUs that is no whole number of hosts.
    """
    for each in gpus:
        if each % layout.ranks_per_host:
            raise ValueError(f"--gpus {each} is no multiple of the {layout.ranks_per_host} GPUs of a host")
    found: list[tuple[int, float, StepTime]] = []
    for number in gpus:
        there = replace(layout, hosts=number // layout.ranks_per_host)
        for factor in sorted({*factors, 1.0}):
            changed = network._replace(host_bytes_per_s=network.host_bytes_per_s * factor)
            step = step_time(
                config, work, there, accumulation=accumulation, gpu=gpu, network=changed, calibration=calibration,
                frozen_embedding=frozen_embedding,
            )  # fmt: skip
            found.append((number, factor, step))
    smallest = min(gpus)
    (first,) = (step for number, factor, step in found if number == smallest and factor == 1.0)
    best = first.tokens_per_s / smallest
    return Scaling(gpu=gpu, network=network, points=tuple(
        Point(gpus=number, network_factor=factor, step=step, weak_scaling=step.tokens_per_s / number / best)
        for number, factor, step in found
    ))  # fmt: skip


def lines(found: Scaling) -> Iterator[str]:
    """For a terminal."""
    yield f"{'GPUs':>6}{'step s':>9}{'MFU':>8}{'HFU':>8}{'not hidden s':>14}{'tokens/s':>14}{'weak scaling':>14}"
    for each in found.named:
        step = each.step
        yield (
            f"{each.gpus:>6,}{step.total_s:>9.3f}{step.mfu:>8.1%}{step.hfu:>8.1%}{step.exposed_s:>14.3f}"
            f"{step.tokens_per_s:>14,.0f}{each.weak_scaling:>14.1%}"
        )
    yield f"MFU where a host's {found.network.host_bytes_per_s * 8e-9:,.0f} Gb/s ({found.network.name}) are times:"
    factors = sorted({each.network_factor for each in found.points})
    yield f"{'GPUs':>6}" + "".join(f"{factor:>8g}" for factor in factors)
    for gpus in dict.fromkeys(each.gpus for each in found.points):
        shares = {each.network_factor: each.step.mfu for each in found.points if each.gpus == gpus}
        yield f"{gpus:>6,}" + "".join(f"{shares[factor]:>8.1%}" for factor in factors)


def as_json(found: Scaling) -> list[dict[str, Any]]:
    return [
        {
            "gpus": each.gpus, "network_factor": each.network_factor, "step_s": each.step.total_s, "mfu": each.step.mfu,
            "hfu": each.step.hfu, "exposed_s": each.step.exposed_s, "tokens_per_s": each.step.tokens_per_s,
            "weak_scaling": each.weak_scaling,
        }
        for each in found.points
    ]  # fmt: skip


SIZE = (900, 560)
LEFT, TOP, RIGHT, BOTTOM = 90, 60, 860, 490
COLOURS = ((31, 119, 180), (214, 96, 20), (44, 140, 60), (150, 60, 160), (120, 90, 70))


def draw(found: Scaling, path: Path) -> None:
    """MFU against the speed of the network, one line a cluster; what a step may take more or less is shaded."""
    factors = sorted({each.network_factor for each in found.points})
    if len(factors) < 2:
        raise ValueError("a picture of the network's speed wants more than one speed")
    highest = max(each.step.mfu * each.step.total_s / each.step.low_s for each in found.points)
    top = math.ceil(highest * 10) / 10
    picture = Image.new("RGB", SIZE, "white")
    pen, font = ImageDraw.Draw(picture, "RGBA"), ImageFont.load_default(15)

    def place(factor: float, share: float) -> tuple[float, float]:
        along = math.log(factor / factors[0]) / math.log(factors[-1] / factors[0])
        return LEFT + (RIGHT - LEFT) * along, BOTTOM - (BOTTOM - TOP) * share / top

    _axes(pen, font, found, factors, top, place)
    for i, gpus in enumerate(dict.fromkeys(each.gpus for each in found.points)):
        colour = COLOURS[i % len(COLOURS)]
        own = sorted((each for each in found.points if each.gpus == gpus), key=lambda each: each.network_factor)
        upper = [place(each.network_factor, each.step.mfu * each.step.total_s / each.step.low_s) for each in own]
        lower = [place(each.network_factor, each.step.mfu * each.step.total_s / each.step.high_s) for each in own]
        pen.polygon([*upper, *reversed(lower)], fill=(*colour, 30))
        pen.line([place(each.network_factor, each.step.mfu) for each in own], fill=colour, width=3)
        (named,) = (each for each in own if each.network_factor == 1.0)
        x, y = place(1.0, named.step.mfu)
        pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill=colour)
        text = f"{gpus:,} GPUs: MFU {named.step.mfu:.1%}, weak scaling {named.weak_scaling:.1%}"
        pen.text((RIGHT - 360, BOTTOM - 25 * (4 - i)), text, fill=colour, font=font)
    picture.save(path)


def _axes(pen: Any, font: Any, found: Scaling, factors: Sequence[float], top: float, place: Any) -> None:
    pen.rectangle((LEFT, TOP, RIGHT, BOTTOM), outline="gray")
    title = f"MFU of {found.gpu.name} by network, Gb/s a host; dots: {found.network.name}"
    pen.text((LEFT, 18), title, "black", font)
    for factor in factors:
        x = place(factor, 0)[0]
        pen.line((x, TOP, x, BOTTOM), fill=(0, 0, 0, 40))
        pen.text((x - 20, BOTTOM + 10), f"{found.network.host_bytes_per_s * 8e-9 * factor:,.0f}", "black", font)
    for k in range(round(top * 10) + 1):
        y = place(factors[0], k / 10)[1]
        pen.line((LEFT, y, RIGHT, y), fill=(0, 0, 0, 40))
        pen.text((40, y - 9), f"{k / 10:.0%}", "black", font)
