"""Which tokens a hypothesis may not repeat.

Legend: R rows, V vocabulary, L tokens so far, W windows of n tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ofa_ds.terms import PAD_ID


def forbid_repeats(logp_RV: Tensor, tokens_RL: Tensor, size: int) -> None:
    """Sets to -inf, in place, each token that would complete an n-gram of `size` that the row already has."""
    length = tokens_RL.shape[1]
    if length < size:
        return
    windows_RWn = tokens_RL.unfold(1, size, 1)
    repeats_RW = (windows_RWn[..., :-1] == tokens_RL[:, None, length - size + 1 :]).all(-1)
    logp_RV.scatter_(1, windows_RWn[..., -1].where(repeats_RW, PAD_ID), -torch.inf)  # pad is forbidden anyway
