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
