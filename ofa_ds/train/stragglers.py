"""Which rank makes all others wait: found from the pace of each in the last steps, named with its host.

Under ZeRO every rank waits for the slowest many times a step, so all steps take equally long; what differs is how long
a rank is busy itself (`ofa_ds.engine.own_time`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

STEPS = 16
"""That are looked back on."""
LEAST = 0.05
"""How much slower than the median rank, in the middle of these steps."""
SPREADS = 5.0
"""How many times the uncertainty of that figure it has to be: the larger of the rank's own and the usual one."""
OFTEN = 15
"""In how many of these steps it has to be slower than the median rank at all."""
RECOVERED = 0.03
TOLD_AGAIN_STEPS = 1000


class Stragglers:
    """Named is who was slower than the median rank in the last STEPS: nearly always, by LEAST, beyond the noise."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """hosts: of each rank."""
        self._hosts = hosts
        self._logs: deque[np.ndarray] = deque(maxlen=STEPS)
        self._told: dict[int, int] = {}
        """When a rank was named."""
        self.slowest: tuple[int, float] | None = None
        """The slowest rank of the last STEPS steps, and by what share it is slower than the median; None: too early."""

    def add(self, step: int, paces: Sequence[float]) -> list[str]:
        """After step `step`: what is to be told. paces: time per work of each rank, 0 where it is not known."""
        if len(paces) < 2 or min(paces) <= 0 or not all(map(math.isfinite, paces)):
            return []
        pace_R = np.asarray(paces)
        middle = np.sort(pace_R)[(len(paces) - 1) // 2]  # of two, the faster
        self._logs.append(np.log(pace_R / middle))
        if len(self._logs) < STEPS:
            return []
        log_SR = np.stack(self._logs)
        middle_R = np.median(log_SR, 0)
        spread_R = 1.4826 * np.median(np.abs(log_SR - middle_R), 0) * 1.2533 / math.sqrt(STEPS)
        spread_R = np.maximum(spread_R, np.median(spread_R))
        slow_R = ((log_SR > 0).sum(0) >= OFTEN) & (middle_R > np.maximum(math.log1p(LEAST), SPREADS * spread_R))
        excess_R = np.expm1(middle_R)
        rank = int(excess_R.argmax())
        self.slowest = rank, float(excess_R[rank])
        return [*self._named(step, slow_R, excess_R), *self._recovered(step, excess_R)]

    def _named(self, step: int, slow_R: np.ndarray, excess_R: np.ndarray) -> list[str]:
        lines = []
        for rank in np.flatnonzero(slow_R).tolist():
            if step - self._told.get(rank, -TOLD_AGAIN_STEPS) >= TOLD_AGAIN_STEPS:
                self._told[rank] = step
                lines.append(
                    f"step {step}: rank {rank} on {self._hosts[rank]} is {excess_R[rank]:.0%} slower than the median "
                    f"rank over the last {STEPS} steps; all others wait for it"
                )
        return lines

    def _recovered(self, step: int, excess_R: np.ndarray) -> list[str]:
        lines = []
        for rank in [rank for rank in self._told if excess_R[rank] < RECOVERED]:
            del self._told[rank]
            lines.append(f"step {step}: rank {rank} on {self._hosts[rank]} is as fast as the others again")
        return lines
