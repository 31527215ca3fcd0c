"""How much of a cluster's time is training, where hosts fail: a discrete-event simulation, many runs at once.

One run does `work_s` seconds of training at full speed. Attempts follow one another:

    restart_s    the ranks start and load the checkpoint; nothing is done yet (the very first attempt starts at step 0
                 and is not charged for it)
    interval_s   training, then
    stall_s      training waits for the copy of its state; write_s later, beside training, the checkpoint is whole
    ...          until the work is done, which a last save ends, or until a failure; then
    detect_s + stop_s   somebody notices, and the ranks on all hosts are ended

A failure comes after an exponential time, at a rate of the GPUs in use / gpu_hours, whatever the attempt is doing: in a
restart, in a stall, while a checkpoint is being written. What was trained since the newest whole checkpoint is lost.
Goodput is work_s over the time that it took.

With `spares`, a share `host_loss` of failures takes the host out for `repair_hours`. A spare takes its place while
there is one; else the next attempts run on the hosts that are left, slower in proportion, until a later restart finds
one repaired. Without (None) there always is a replacement.

Units: seconds, but for gpu_hours and repair_hours. Shapes: R runs, F failures, H hosts that may be out at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
LLAMA3_GPU_HOURS = 16_384 * 54 * 24 / 419
"""Between unexpected interruptions: 419 of them in 54 days on 16,384 H100 (Llama 3's report, arXiv 2407.21783)."""
MAX_EVENTS = 20_000
"""Failures of one run, after which the plan is called hopeless."""
MAX_OUT = 64
"""Hosts that may be out at once."""
STEP = 1.15
"""Ratio of neighbouring intervals of a search."""
NEAR = 1.05
"""What wastes at most this much more than the best interval is as good."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One cluster and one way of saving."""

    gpus: int
    gpus_per_host: int = 8
    gpu_hours: float = LLAMA3_GPU_HOURS
    work_s: float = 54 * DAY_S
    stall_s: float = 1.0
    """Twice what docs/checkpoints.md plans for the 6B on 8 A100 (0.5 s); 0.17 s was measured for 173 M parameters."""
    write_s: float = 30.0
    """72 GB of the 6B's state at 2.4 GB/s, a slow shared file system."""
    detect_s: float = 15.0
    """What the supervisor promises for a lost host or a cut network; 4 s were measured, 0.1 s for a rank that dies."""
    stop_s: float = 10.0
    """What the supervisor promises for the end of every rank; about 2 s were measured."""
    restart_s: float = 275.0
    """The rest of a budget of 300 s. On two CPU cores nano trains again after 15 s; GPUs at size are not measured."""
    spares: int | None = None
    host_loss: float = 0.5
    """GPU and memory faults are 47 % of Llama 3's interruptions."""
    repair_hours: float = 24.0
    """Assumed: no source."""

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_host", "gpu_hours", "work_s", "repair_hours"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)}: want more than 0")
        for name in ("stall_s", "write_s", "detect_s", "stop_s", "restart_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)}: want 0 or more")
        if not (math.isfinite(self.work_s) and math.isfinite(self.repair_hours)):
            raise ValueError(f"work_s {self.work_s}, repair_hours {self.repair_hours}: want finite numbers")
        if not 0 <= self.host_loss <= 1:
            raise ValueError(f"host_loss {self.host_loss}: want a share from 0 to 1")
        if self.spares is not None and self.spares < 0:
            raise ValueError(f"spares {self.spares}: want 0 or more")

    @property
    def failure_s(self) -> float:
        """Seconds between failures of the whole cluster, on average."""
        return self.gpu_hours * HOUR_S / self.gpus

    @property
    def hosts(self) -> int:
        return -(-self.gpus // self.gpus_per_host)


def first_order_waste(plan: Plan, interval_s: float) -> float:
    """The share of time that is no training, by Young's and Daly's first order: good where it is small.

    stall / interval + (interval / 2 + write + detect + stop + restart) / time between failures
    """
    lost_s = interval_s / 2 + plan.write_s + plan.detect_s + plan.stop_s + plan.restart_s
    return plan.stall_s / interval_s + lost_s / plan.failure_s


def first_order_interval(plan: Plan) -> float:
    """sqrt(2 x stall x time between failures), where `first_order_waste` is least; not below what a save takes."""
    best = min(math.sqrt(2 * plan.stall_s) * math.sqrt(plan.failure_s), plan.work_s) if plan.stall_s else 0
    return max(best, shortest_interval(plan))


def shortest_interval(plan: Plan) -> float:
    """A save waits for the one before: a shorter interval saves no more often."""
    return max(plan.write_s, plan.stall_s, 1.0)


def simulate(plan: Plan, interval_s: float, *, runs: int, seed: int) -> np.ndarray:
    """Goodput of each run [R], from 0 to 1. The same seed gives the same failures at every interval.

    Raises ValueError for an interval that is shorter than a save, and where failures come faster than checkpoints.
    """
    if not shortest_interval(plan) <= interval_s < math.inf:
        least = shortest_interval(plan)
        raise ValueError(f"interval {interval_s:g} s: want at least {least:g} s, since a save waits for the one before")
    hosts = _Hosts(plan, runs)
    work_R, time_R = np.full(runs, plan.work_s), np.zeros(runs)
    starting_R = np.zeros(runs)  # the first attempt is not charged for its start
    running = np.arange(runs)
    for event in range(MAX_EVENTS):
        until_R, lost_R = _draw(plan, event, runs, seed)
        speed_R = hosts.speed(time_R, running)
        until_R = until_R[running] / speed_R
        start_R, left_R = starting_R[running], work_R[running]
        saves_R = np.maximum(np.ceil(left_R / speed_R / interval_s) - 1, 0)
        whole_R = start_R + left_R / speed_R + (saves_R + 1) * plan.stall_s + plan.write_s
        ends_R = until_R >= whole_R
        kept_R = np.floor((until_R - start_R - plan.write_s) / (interval_s + plan.stall_s))
        kept_R = np.clip(kept_R, 0, saves_R)
        work_R[running] = np.where(ends_R, 0, left_R - kept_R * interval_s * speed_R)
        time_R[running] += np.where(ends_R, whole_R, until_R + plan.detect_s + plan.stop_s)
        starting_R[running] = plan.restart_s
        hosts.fail(time_R, running[~ends_R], lost_R)
        running = running[~ends_R]
        if not running.size:
            return plan.work_s / time_R
    raise ValueError(
        f"{plan.gpus} GPUs, saved every {interval_s:g} s: {running.size} of {runs} runs were not done after "
        f"{MAX_EVENTS} failures, one every {plan.failure_s:.0f} s; save more often, or restart faster"
    )


def _draw(plan: Plan, event: int, runs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(seconds until the next failure of the whole cluster [R], whether that takes its host out [R])."""
    generator = np.random.default_rng((seed, event))
    until_R = generator.standard_exponential(runs) * plan.failure_s
    return until_R, generator.random(runs) < plan.host_loss


class _Hosts:
    """Which hosts are out, and until when."""

    def __init__(self, plan: Plan, runs: int) -> None:
        self.plan = plan
        self._total = 0 if plan.spares is None else plan.hosts + plan.spares
        self._back_RH = np.zeros((runs, min(self._total, MAX_OUT)))

    def speed(self, time_R: np.ndarray, running: np.ndarray) -> np.ndarray:
        """Share of the hosts that the attempts which begin now have, for those runs; waits where none is left."""
        if self.plan.spares is None:
            return np.ones(running.size)
        hosts, most = self.plan.hosts, self._back_RH.shape[1]
        out_R = (self._back_RH[running] > time_R[running, None]).sum(axis=1)
        none_left = running[out_R == most]
        if none_left.size and most < self._total:
            raise ValueError(f"{most} hosts are out at once; repair faster, or lower host_loss")
        time_R[none_left] = self._back_RH[none_left].min(axis=1)
        return np.minimum(np.maximum(self._total - out_R, 1), hosts) / hosts

    def fail(self, time_R: np.ndarray, failed: np.ndarray, lost_R: np.ndarray) -> None:
        """lost_R: of all runs; whether the host is out from now on."""
        if self.plan.spares is None:
            return
        rows = failed[lost_R[failed]]
        column = self._back_RH[rows].argmin(axis=1)  # one that is back, where there is one
        self._back_RH[rows, column] = time_R[rows] + self.plan.repair_hours * HOUR_S


@dataclass(frozen=True)
class Point:
    """One interval of a search."""

    interval_s: float
    mean: float
    p5: float
    p50: float
    p95: float


def point(plan: Plan, interval_s: float, *, runs: int, seed: int) -> Point:
    goodput_R = simulate(plan, interval_s, runs=runs, seed=seed)
    p5, p50, p95 = np.percentile(goodput_R, (5, 50, 95))
    return Point(interval_s, float(goodput_R.mean()), float(p5), float(p50), float(p95))


def intervals(plan: Plan) -> list[float]:
    """From an eighth of the first-order optimum to eight times it, as far as a save fits and the work reaches."""
    best, count = first_order_interval(plan), round(math.log(8) / math.log(STEP))
    grid = (best * STEP**k for k in range(-count, count + 1))
    return [each for each in grid if shortest_interval(plan) <= each <= max(plan.work_s, best)]


@dataclass(frozen=True)
class Search:
    """Every interval that was tried, and what is best."""

    plan: Plan
    points: tuple[Point, ...]
    best: Point

    @property
    def as_good(self) -> tuple[float, float]:
        """Between these intervals the waste is at most NEAR times the least."""
        limit = NEAR * (1 - self.best.mean)
        good = [each.interval_s for each in self.points if 1 - each.mean <= limit]
        return min(good), max(good)

    def as_dict(self) -> dict[str, Any]:
        """For JSON. NaN never; what is infinite (no failures) is None."""
        values = {name: value for name, value in vars(self.plan).items()}
        values |= {"failure_s": self.plan.failure_s}
        shown = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        first = first_order_interval(self.plan)
        closed = {"interval_s": first, "waste": first_order_waste(self.plan, first)}
        low, high = self.as_good
        return {
            "plan": shown, "best": vars(self.best), "as_good_s": [low, high], "first_order": closed,
            "points": [vars(each) for each in self.points],
        }  # fmt: skip


def search(plan: Plan, *, runs: int, seed: int, coarse_runs: int = 1000) -> Search:
    """The interval with the best mean goodput. All are tried with `coarse_runs`, those near the best with `runs`."""
    coarse = [point(plan, each, runs=min(runs, coarse_runs), seed=seed) for each in intervals(plan)]
    top = max(range(len(coarse)), key=lambda i: coarse[i].mean)
    near = range(max(top - 3, 0), min(top + 4, len(coarse)))
    fine = {i: point(plan, coarse[i].interval_s, runs=runs, seed=seed) for i in near}
    points = tuple(fine.get(i, each) for i, each in enumerate(coarse))
    return Search(plan, points, max(fine.values(), key=lambda each: each.mean))


def fixed(plan: Plan, interval_s: float, *, runs: int, seed: int) -> Search:
    """The one interval that was asked for."""
    only = point(plan, interval_s, runs=runs, seed=seed)
    return Search(plan, (only,), only)


def for_sizes(plan: Plan, sizes: Sequence[int]) -> list[Plan]:
    """The same plan on other numbers of GPUs."""
    return [replace(plan, gpus=gpus) for gpus in sizes]
