"""Per-token losses to the sums that training divides and logs: by loss group (D9) and by task.

Legend: E examples, M target positions, G loss groups (`terms.GROUPS`), K tasks (`terms.TASKS`).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ofa_ds.terms import GROUPS, PAD_ID, TASKS

TASK_SUMS = ("loss", "nll", "correct", "count")
"""Columns of `task_sums`."""


class PackedTargets(Protocol):
    """What a loss reads of a `Batch` (see `ofa_ds.batch`)."""

    targets: Tensor
    decoder_offsets: Tensor
    loss_weight: Tensor
    task: Tensor
    group: Tensor


def group_sums(loss_M: Tensor, batch: PackedTargets) -> Tensor:
    """[G], at least fp32: the sum of loss_weight * loss of each group. Divide by the *global* `group_counts`."""
    weighted_M = torch.where(batch.targets != PAD_ID, loss_M * batch.loss_weight, 0.0)
    return _sums_by(batch.group, weighted_M, len(GROUPS), batch)


def group_counts(batch: PackedTargets) -> Tensor:
    """int64 [G]: targets of each group that have a loss."""
    return _sums_by(batch.group, (batch.targets != PAD_ID).long(), len(GROUPS), batch)


def task_sums(loss_M: Tensor, nll_M: Tensor, correct_M: Tensor, batch: PackedTargets) -> Tensor:
    """fp32 [K, 4], without gradient, for the log: each task's unweighted loss and nll, correct and counted tokens."""
    counted_M = batch.targets != PAD_ID
    columns = [loss_M.detach().float(), nll_M.detach().float(), correct_M.float(), counted_M.float()]
    values_4M = torch.where(counted_M, torch.stack(columns), 0.0)
    return torch.stack([_sums_by(batch.task, values_M, len(TASKS), batch) for values_M in values_4M], dim=1)


def _sums_by(label_E: Tensor, value_M: Tensor, num_labels: int, batch: PackedTargets) -> Tensor:
    """[num_labels] sums of value_M over the positions of the examples with each label.

    A masked sum a label, and not index_add: its atomics would add in another order each time on a GPU.
    """
    lengths_E = batch.decoder_offsets.diff().long()
    label_M = label_E.repeat_interleave(lengths_E, output_size=value_M.shape[0])
    labels = torch.arange(num_labels, device=value_M.device)
    return torch.where(label_M == labels[:, None], value_M, value_M.new_zeros(())).sum(1)
