"""Which ids a constrained target may have: training and generation forbid the others alike."""

from __future__ import annotations

import torch
from torch import Tensor

from ofa_ds.terms import NUM_SPECIAL_IDS


def allowed_ids(num_classes: int, id_range: tuple[int, int], device: torch.device) -> Tensor:
    """bool [V]: the special ids and start <= id < end."""
    start, end = id_range
    if not NUM_SPECIAL_IDS <= start < end <= num_classes:
        raise ValueError(f"constraint_range {start},{end}: want {NUM_SPECIAL_IDS} <= start < end <= {num_classes}")
    ids_V = torch.arange(num_classes, device=device)
    return (ids_V < NUM_SPECIAL_IDS) | ((ids_V >= start) & (ids_V < end))


def allowed_mask(ids_A: Tensor, offsets: Tensor, position_N: Tensor, num_classes: int) -> Tensor:
    """bool [N, V]: what may come at these positions; every id where a position names none.

    ids_A: int64, position after position; offsets: int64 [M + 1], position m names ids_A[offsets[m] : offsets[m + 1]].
    """
    num_positions, count_M = len(position_N), offsets.diff()
    row_M = torch.full_like(count_M, num_positions)  # of the others: a row too many, cut off again
    row_M[position_N] = torch.arange(num_positions, device=ids_A.device)
    row_A = row_M.repeat_interleave(count_M, output_size=len(ids_A))
    free_N = torch.nn.functional.pad(count_M[position_N] == 0, (0, 1))
    mask_NV = free_N[:, None].repeat(1, num_classes)
    return mask_NV.index_put_((row_A, ids_A), mask_NV.new_ones(()))[:num_positions]
