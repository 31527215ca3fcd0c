"""Learning rate as a pure function of the update number (docs/ofa.md, Training: optimiser and schedule)."""

from __future__ import annotations


def polynomial_lr(
    update: int, *, peak_lr: float, warmup_steps: int, num_steps: int, end_lr: float = 0.0, power: float = 1.0
) -> float:
    """Learning rate of the update with 0-based number `update`.

    Linear from 0 to `peak_lr` over `warmup_steps` (so the very first update has 0 when there is a warm-up, as in the
    original), then polynomial to `end_lr`, which holds from `num_steps` on.
    """
    if update < warmup_steps:
        return peak_lr * update / warmup_steps
    if update >= num_steps:
        return end_lr
    left = 1 - (update - warmup_steps) / (num_steps - warmup_steps)
    return (peak_lr - end_lr) * left**power + end_lr
