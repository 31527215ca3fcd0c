"""Losses far above those before them: judged before the weights change, from numbers that all ranks have alike."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

from torch import Tensor

LENGTH = 128
"""Steps that are remembered."""
LEAST = 32
"""Steps from which on a judgement is possible."""
SPREAD_FLOOR = 1e-3
"""Of the mean; losses that hardly differ make no spike of a small rise."""


class LossWindow:
    """The last losses from which something was learnt. Saved with each checkpoint, so that a run goes on as it would.

    A loss is a sum over all ranks, equal on each; the number of ranks changes it by rounding alone.
    """

    def __init__(self, sigma: float, losses: Iterable[float] = ()) -> None:
        """sigma: `train.max_spike_sigma`. losses: of the checkpoint that is gone on from."""
        self._sigma = sigma
        self._losses = deque((float(loss) for loss in losses), maxlen=LENGTH)

    @property
    def losses(self) -> list[float]:
        return list(self._losses)

    @property
    def highest(self) -> float:
        """A step of a finite loss above this is to be left out; infinite while there are too few to judge by."""
        if len(self._losses) < LEAST:
            return math.inf
        mean, spread = self._mean_and_spread()
        return mean + self._sigma * spread

    def is_spike(self, loss: Tensor) -> Tensor:
        """bool scalar on the device of loss, which nothing waits for. What is not finite is no spike."""
        return (loss > self.highest) & loss.isfinite()

    def spike(self, loss: float) -> str | None:
        """In words, why a step of this loss is left out; None where it is not."""
        if loss <= self.highest or not math.isfinite(loss):
            return None
        mean, spread = self._mean_and_spread()
        return (
            f"its loss {loss:.4g} is {(loss - mean) / spread:.1f} sigma above the mean {mean:.4g} of the last "
            f"{len(self._losses)} (train.max_spike_sigma is {self._sigma:g})"
        )

    def _mean_and_spread(self) -> tuple[float, float]:
        mean = statistics.fmean(self._losses)
        return mean, max(statistics.stdev(self._losses), SPREAD_FLOOR * abs(mean))

    def add(self, loss: float) -> None:
        """After a step from which something was learnt: one that was left out says nothing of where the run is."""
        self._losses.append(loss)
