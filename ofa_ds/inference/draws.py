"""Samples of tokens: among which ones, and by whose random numbers.

Legend: R rows, V vocabulary, K tokens to draw among.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Draw = Callable[[Tensor, Sequence[int]], Tensor]
"""(weights [R, K], not normalised, which rows of all they are) -> the place int64 [R] that is drawn in each."""


class SeededDraw:
    """Draws of each row from a generator of its own, so that a sample is the same whatever is sampled beside it."""

    def __init__(self, seeds: Sequence[int | tuple[int, ...]]) -> None:
        """seeds: of each row, example-major; whole numbers of at least 0, or several of them together."""
        self._generators = [np.random.default_rng(seed) for seed in seeds]

    def __call__(self, weights_RK: Tensor, rows: Sequence[int]) -> Tensor:
        """By the inverse of the cumulated weights, in fp64 on any device."""
        uniform_R1 = torch.tensor([[self._generators[row].random()] for row in rows], dtype=torch.float64)
        cumulated_RK = weights_RK.double().cumsum(1)
        place_R1 = torch.searchsorted(cumulated_RK, uniform_R1.to(weights_RK.device) * cumulated_RK[:, -1:], right=True)
        return place_R1[:, 0].clamp(max=weights_RK.shape[1] - 1)


def most_probable(logp_RV: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities [R, K] and tokens [R, K], most probable first, of which to draw; -inf outside the top_p set.

    0 for no limit.
    """
    if top_k:
        return logp_RV.topk(min(top_k, logp_RV.shape[-1]))
    sorted_RV, index_RV = logp_RV.sort(dim=-1, descending=True, stable=True)
    if top_p:
        probable_RV = sorted_RV.exp()
        before_RV = probable_RV.cumsum(-1) - probable_RV
        least = max(top_p, torch.finfo(before_RV.dtype).tiny)  # the most probable one stays, before which is 0
        sorted_RV = sorted_RV.masked_fill(before_RV >= least, -torch.inf)
    return sorted_RV, index_RV
