"""`ofa-ds bench plan`: what a calibration predicts of real training runs on this CPU, beside what is measured of them.

None of the runs is one that a calibration is fitted on: other batches, other models, accumulation, activation
checkpointing, and a layer width (medium's) that was not measured. Each case is two runs: one as training is by default,
for its time, and one with large blocks mapped (`plan.cpu.MMAP_THRESHOLD`), for its memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ofa_ds.bench.calibrate import layout_of_case
from ofa_ds.bench.ranks_case import Case, Rows, measure
from ofa_ds.bench.step import progress
from ofa_ds.plan.calibration import Calibration
from ofa_ds.plan.cpu import memory_parts, step_parts

MIB = 1 << 20
WHAT = ("step", "memory")
_NANO = {"model": "nano", "vocab": 4096, "steps": 8}

CASES = (
    Case(**_NANO, rows=(Rows(count=8, side=128, source=20, target=10),), stage=0, ranks=1),
    Case(**_NANO, rows=(Rows(count=4, side=256, source=40, target=30),), stage=3, ranks=2, accumulation=2),
    Case(model="tiny", rows=(Rows(count=4, side=384, source=20, target=12),), stage=0, ranks=1),
    Case(
        model="tiny", rows=(Rows(count=3, side=256, source=60, target=40), Rows(count=2, side=0, source=90, target=70)),
        stage=1, ranks=2,
    ),
    Case(model="tiny", rows=(Rows(count=6, side=128, source=100, target=60),), stage=2, ranks=3),
    Case(model="tiny", rows=(Rows(count=4, side=256, source=40, target=20),), stage=3, ranks=2, checkpointing=True),
    Case(model="medium", rows=(Rows(count=2, side=256, source=50, target=25),), stage=2, ranks=1),
    Case(model="base", rows=(Rows(count=2, side=256, source=32, target=16),), stage=0, ranks=1),
    Case(model="base", rows=(Rows(count=1, side=384, source=40, target=20),), stage=1, ranks=1, checkpointing=True),
    Case(model="base", rows=(Rows(count=4, side=0, source=150, target=100),), stage=3, ranks=1),
    Case(model="base", rows=(Rows(count=1, side=256, source=40, target=20),), stage=3, ranks=2, checkpointing=True),
)  # fmt: skip


def bench_plan(
    calibration: Calibration, cases: Sequence[Case] = CASES, what: Sequence[str] = WHAT
) -> list[dict[str, Any]]:
    """Of each case: predicted and measured seconds of a step and bytes of the peak, and their relative difference."""
    rows = []
    for number, case in enumerate(cases, 1):
        progress(f"{number} of {len(cases)}: {case.name}")
        timed = measure([case])[0] if "step" in what else None
        held = measure([replace(case, steps=1)], mapped=True)[0] if "memory" in what else None
        rows.append(compared(calibration, case, timed, held))
    progress("")
    return rows


def compared(
    calibration: Calibration, case: Case, timed: dict[str, Any] | None, held: dict[str, Any] | None
) -> dict[str, Any]:
    """timed, held: what was measured by default, and with large blocks mapped; None: it was not."""
    row: dict[str, Any] = {"case": case.name, "ranks": case.ranks}
    known = (case.config, case.work(), layout_of_case(case), calibration)
    if timed is not None:
        seconds = step_parts(*known, case.accumulation)
        row |= {"predicted_s": sum(seconds.values()), "measured_s": timed["step_s"], "seconds": seconds}
        row["step_error"] = row["predicted_s"] / timed["step_s"] - 1
        row |= {"every_step_s": timed["seconds"], "bytes_by_default": timed["peak_bytes"]}
    if held is not None:
        parts = memory_parts(*known)
        row |= {"predicted_bytes": sum(parts.values()), "measured_bytes": held["peak_bytes"], "bytes": parts}
        row["memory_error"] = row["predicted_bytes"] / held["peak_bytes"] - 1
    return row


def errors(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """`Calibration.errors`: the largest of what was measured: of all (`step`), and by number of ranks (`step.2`)."""
    found: dict[str, float] = {}
    for row in rows:
        for what in WHAT:
            if f"{what}_error" in row:
                for key in (what, f"{what}.{row['ranks']}"):
                    found[key] = max(found.get(key, 0.0), abs(row[f"{what}_error"]))
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown. Of the peaks, the last column is that of the run whose time was measured."""
    lines = [
        "| model, ZeRO stage, ranks, rows of a micro-batch | step s: plan | measured | off | peak MiB: plan | measured "
        "| off | by default |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def cell(row: dict[str, Any], key: str, text: str, unit: float = 1.0) -> str:
        return text.format(row[key] / unit) if key in row else "-"

    for row in rows:
        cells = [
            row["case"], cell(row, "predicted_s", "{:.3f}"), cell(row, "measured_s", "{:.3f}"),
            cell(row, "step_error", "{:+.1%}"), cell(row, "predicted_bytes", "{:,.0f}", MIB),
            cell(row, "measured_bytes", "{:,.0f}", MIB), cell(row, "memory_error", "{:+.1%}"),
            cell(row, "bytes_by_default", "{:,.0f}", MIB),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
