"""What a step has by its number alone: learning rate (docs/ofa.md, Training: optimiser and schedule) and randomness."""

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


def generator_seed(seed: int, step: int, rank: int) -> int:
    """Of torch's generator in a step on a rank, for dropout: 63 bits that differ for any two (seed, step, rank).

    splitmix64 over the three, and not numpy's SeedSequence: these bits are part of what a run resumes to, and runs that
    were begun long ago go on with them.
    """
    value = 0
    for part in (seed, step, rank):
        value = (value + part + 0x9E3779B97F4A7C15) & (2**64 - 1)
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        value ^= value >> 31
    return value >> 1
