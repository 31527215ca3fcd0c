"""Steps whose loss or gradient is not finite, or whose loss is far above the last ones: told, counted, and not endured
for ever. The engine has skipped them."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from ofa_ds.data.corrupt import CorruptRecord
from ofa_ds.engine.engine import Engine
from ofa_ds.train.micro_batches import MicroBatches

SHOWN_PEAKS = 2
"""Of how many micro-batches a loss that is too high is explained."""
SHOWN_ROWS = 12
"""How many rows of a bad step are named."""


class BadSteps:
    """Watches the steps of a run. All ranks call `judge` after each; it costs nothing where the step was good."""

    def __init__(self, engine: Engine, source: MicroBatches, *, limit: int, run_dir: Path) -> None:
        """limit: `train.max_bad_steps`. source: says which rows a micro-batch holds."""
        self._engine, self._source, self._limit, self._run_dir = engine, source, limit, run_dir
        self.in_a_row = 0
        self._spikes = False
        """One of these was skipped for its height alone."""

    @property
    def too_many(self) -> bool:
        return self.in_a_row >= self._limit

    def judge(self, step: int, losses: Sequence[Tensor], spike: str | None = None) -> None:
        """After optimizer step number `step` (from 1 on).

        losses: of this rank's micro-batches. spike: why it was skipped although all is finite, in words.
        """
        engine = self._engine
        if not engine.skipped:
            self.in_a_row, self._spikes = 0, False
            return
        rank, world_size = engine.ranks.rank, engine.ranks.world_size
        mine = [(float(loss), k * world_size + rank) for k, loss in enumerate(losses)]
        everyone = list(itertools.chain(*engine.gather(mine)))
        numbers = sorted(number for loss, number in everyone if not math.isfinite(loss))
        if engine.rescaled and not numbers:  # at most as often as the scale can be halved
            self._tell(f"step {step} is skipped: the gradient overflowed fp16; loss scale is now {engine.loss_scale:g}")
            return
        self.in_a_row += 1
        what = f"the loss of micro-batch {_listed(numbers)}" if numbers else "the gradient (of finite losses)"
        what = f"{what} is not finite"
        if spike:
            numbers = [number for _, number in sorted(everyone, reverse=True)[:SHOWN_PEAKS]]
            what = f"{spike}; the largest share is that of micro-batch {_listed(numbers)}"
            self._spikes = True
        if rank == 0:
            rows = self._source.rows(step - 1, numbers or None)
            names = [f"{family} row {index} ({self._id(family, index)})" for family, index in rows[:SHOWN_ROWS]]
            self._tell(
                f"step {step} is skipped, nothing is learnt from it: {what}; rows: {', '.join(names)}"
                f"{_more(len(rows))}; {self.in_a_row} in a row, at {self._limit} (train.max_bad_steps) the run stops"
            )

    def _id(self, family: str, index: int) -> str:
        try:
            return str(self._source.shards.row(family, index)["id"])
        except CorruptRecord:
            return "corrupt"

    def error(self, step: int, good: Path | None) -> RuntimeError:
        """Why the run stops after step `step`. good: the last checkpoint from before the bad steps."""
        where = f"the last good checkpoint is {good}" if good else f"{self._run_dir} has no good checkpoint"
        high = ", or a loss far above the last ones" if self._spikes else ""
        return RuntimeError(
            f"{self.in_a_row} steps in a row, up to step {step}, had a loss or a gradient that is not finite{high}; "
            f"the weights are those of step {step - self.in_a_row}; {where}; look at the rows named above, or lower "
            "optim.peak_lr"
        )

    def _tell(self, text: str) -> None:
        if self._engine.ranks.rank == 0:
            print(text, file=sys.stderr, flush=True)


def _listed(things: Iterable[object]) -> str:
    names = [str(thing) for thing in things]
    return ", ".join(names[:SHOWN_ROWS]) + _more(len(names))


def _more(count: int) -> str:
    return f" and {count - SHOWN_ROWS} more" if count > SHOWN_ROWS else ""
