"""`ofa-ds plan --goodput`: how much of a cluster's time will be training, and how often to save."""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING

from ofa_ds.cli.parser import UsageError, finite, from_zero, natural, positive

if TYPE_CHECKING:
    from ofa_ds.plan.goodput import Plan, Search

MAX_RUNS = 1_000_000
DAY_S, HOUR_S = 86_400, 3_600
SIZES = (256, 512, 1024)
"""GPUs, where none are said."""


def add_goodput(parser: argparse.ArgumentParser) -> None:
    """Options of `plan --goodput`."""
    of = parser.add_argument_group("of --goodput")
    of.add_argument("--days", type=finite, default=54.0, metavar="D", help="days of training without any loss")
    of.add_argument("--interval", type=finite, metavar="S", help="seconds from save to save; else the best is sought")
    of.add_argument("--step-seconds", type=finite, metavar="S", help="of a step: save_every is told as well")
    of.add_argument("--spares", type=natural, metavar="N", help="spare hosts; else there always is a replacement")
    of.add_argument(
        "--host-loss", type=from_zero, default=0.5, metavar="SHARE",
        help="with --spares: failures that take a host out",
    )  # fmt: skip
    of.add_argument(
        "--repair-hours", type=finite, default=24.0, metavar="H", help="with --spares: until such a host is back"
    )
    of.add_argument("--runs", type=_runs, default=10_000, metavar="N", help="simulated runs")
    of.add_argument("--seed", type=natural, default=0, metavar="N", help="the same seed draws the same failures")


def plan_goodput(options: argparse.Namespace) -> None:
    from ofa_ds.plan.goodput import fixed, for_sizes, search

    searches = []
    try:
        plans = for_sizes(_first(options), options.gpus or SIZES)
        for plan in plans:
            run = {"runs": options.runs, "seed": options.seed}
            found = search(plan, **run) if options.interval is None else fixed(plan, options.interval, **run)
            searches.append(found)
        if options.png:
            from ofa_ds.plan.curve import draw

            draw(searches, options.png)
    except ValueError as error:
        raise UsageError(error) from error
    if options.json:
        facts = {"runs": options.runs, "seed": options.seed, "clusters": [each.as_dict() for each in searches]}
        print(json.dumps(facts, allow_nan=False))
        return
    _print(searches, options)


def _first(options: argparse.Namespace) -> Plan:
    from ofa_ds.plan.goodput import LLAMA3_GPU_HOURS, Plan

    return Plan(
        gpus=(options.gpus or SIZES)[0], gpus_per_host=options.gpus_per_host or 8,
        gpu_hours=options.gpu_hours or LLAMA3_GPU_HOURS,
        work_s=options.days * DAY_S, stall_s=stall(options), write_s=write(options), detect_s=options.detect,
        stop_s=options.stop, restart_s=options.restart, spares=options.spares, host_loss=options.host_loss,
        repair_hours=options.repair_hours,
    )  # fmt: skip


def _print(searches: list[Search], options: argparse.Namespace) -> None:
    from ofa_ds.plan.goodput import first_order_waste

    lost = options.detect + options.stop + options.restart
    print(
        f"{options.days:g} days of training, {options.runs:,} runs, seed {options.seed}; save: {stall(options):g} s of "
        f"stall, whole after {write(options):g} s; {lost:g} s from a failure to training"
    )
    for each in searches:
        plan, best = each.plan, each.best
        every = f"{best.interval_s:,.0f} s"
        if options.step_seconds:
            every += f" (train.save_every={max(1, round(best.interval_s / options.step_seconds))})"
        low, high = each.as_good
        never = math.isinf(plan.failure_s)
        failures = "no failures" if never else f"a failure every {plan.failure_s / HOUR_S:,.1f} h"
        print(
            f"{plan.gpus:,} GPUs, {failures}: goodput p50 {best.p50:.2%}, "
            f"p5 {best.p5:.2%}, saved every {every}"
            + (f"; {low:,.0f} to {high:,.0f} s is as good" if len(each.points) > 1 else "")
            + f"; first order: {first_order_waste(plan, best.interval_s):.2%} lost"
        )
    if options.png:
        print(f"curve: {options.png}")


def stall(options: argparse.Namespace) -> float:
    """Seconds that training waits for a save, where no plan of a recipe says better."""
    return 1.0 if options.stall is None else options.stall


def write(options: argparse.Namespace) -> float:
    return 30.0 if options.write is None else options.write


def _runs(text: str) -> int:
    value = positive(text)
    if value > MAX_RUNS:
        raise argparse.ArgumentTypeError(f"want at most {MAX_RUNS:,}, got {text!r}")
    return value
