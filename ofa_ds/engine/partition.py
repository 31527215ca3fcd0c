"""Which elements of a tensor each rank holds, and what is kept of a parameter. Arithmetic only."""

from __future__ import annotations

from collections.abc import Mapping

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS)
"""Tensors of one trainable parameter; a frozen one has the weight alone. All fp32."""
AVERAGE = "ema"
"""One more, of a trainable parameter where a moving average is kept."""


def even_range(total: int, rank: int, world_size: int) -> tuple[int, int]:
    """(start, numel) of `rank` when `total` elements are cut into ceil(total / world_size) pieces."""
    part = -(-total // world_size)
    start = min(rank * part, total)
    return start, min(part, total - start)


def flat_parts(numels: Mapping[str, int], world_size: int) -> dict[str, list[list[int]]]:
    """How ZeRO stages 1 and 2 share trainable parameters out: one flat buffer, padded to 2 x ranks, cut evenly.

    Returns [rank, start, numel] per tensor, as a manifest lists them.
    """
    share = -(-sum(numels.values()) // (2 * world_size)) * 2
    result: dict[str, list[list[int]]] = {}
    at = 0
    for name, numel in numels.items():
        parts, start = [], 0
        while start < numel:
            rank = (at + start) // share
            count = min(numel - start, (rank + 1) * share - at - start)
            parts.append([rank, start, count])
            start += count
        result[name] = parts
        at += numel
    return result
