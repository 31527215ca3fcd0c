"""What it takes to bring a step's rows to training: cores that read, decode, augment and pack, and what is waited for.

Workers make the next batches while a step computes, so training waits only where they are slower than it. A row costs
so many seconds of a core, and so many a pixel that its picture has when the model sees it, by family.
"""

from __future__ import annotations

from dataclasses import dataclass

from ofa_ds.config.schema import Recipe
from ofa_ds.plan.calibration import Calibration
from ofa_ds.terms import PRETRAINING_FAMILIES

ASSUMED = {
    "vision_language": (2.0e-3, 1.2e-8),
    "text": (0.9e-3, 0.0),
    "image": (0.0, 1.4e-8),
    "detection": (3.1e-3, 0.6e-8),
}
"""Seconds a row and seconds a pixel, of one core: `python -m ofa_ds.bench loader` on photographs of 480 x 360 (Intel
Xeon with AVX-512, 2026-11-29). Reading is from the page cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """Of one rank's share of an optimizer step."""

    core_s: float
    """Seconds of one core."""
    workers: int
    """`data.workers`."""
    is_measured: bool
    """On such a machine, by `ofa-ds bench data`; else assumed."""

    def wait_s(self, step_s: float) -> float:
        """Training waits so long in a step that computes for `step_s`."""
        if not self.workers:
            return self.core_s
        return max(self.core_s / self.workers - step_s, 0.0)

    def cores(self, step_s: float) -> float:
        """That are busy all the time where nothing is waited for."""
        return self.core_s / step_s


def key(family: str) -> str:
    """Of a calibration's costs."""
    return f"feed.{family}"


def feed_of(recipe: Recipe, world_size: int, calibration: Calibration | None) -> Feed | None:
    """None where nothing is known of it: a downstream task's rows, or a CPU that was not measured."""
    weights = recipe.data.weights()
    drawn = {family: weight for family, weight in weights.items() if weight}
    if not drawn.keys() <= set(PRETRAINING_FAMILIES):
        return None
    known = calibration.costs if calibration is not None else {}
    is_measured = all(len(known.get(key(family), ())) == 2 for family in drawn)
    if not is_measured and calibration is not None and calibration.device == "cpu":
        return None
    costs = {family: known[key(family)] if is_measured else ASSUMED[family] for family in drawn}
    rows = recipe.batch.global_rows / world_size / sum(drawn.values())
    core_s = sum(rows * weight * _row_s(costs[family], recipe, family) for family, weight in drawn.items())
    return Feed(core_s=core_s, workers=recipe.data.workers, is_measured=is_measured)


def _row_s(cost: tuple[float, ...] | list[float], recipe: Recipe, family: str) -> float:
    side = recipe.data.image_size if family == "vision_language" else recipe.data.infill_image_size
    return cost[0] + cost[1] * side * side
