"""Where a run moves to; light enough to import while tests are collected."""

from __future__ import annotations

HOPS = ((2, 3), (3, 1), (1, 2), (4, 3))
"""(ranks, ZeRO stage)."""
ACCUMULATION = (3, 2, 1, 1)
FIRST_STEPS = 3
STEPS_A_HOP = 2
