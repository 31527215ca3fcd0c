"""What an objective hands to the engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ofa_ds.batch import Batch, pack
from ofa_ds.data.example import Example
from ofa_ds.train.criteria import Criterion
from ofa_ds.train.objective import TaskLoss


class Forward(Exception):
    """In place of a model."""


class NoModel:
    device, num_updates = torch.device("cpu"), 0

    def __call__(self, batch: Batch, **_: object) -> None:
        raise Forward


@pytest.mark.parametrize(("rdrop_alpha", "moves"), [(0.0, 1), (1.0, 2)])
def test_a_batch_is_moved_once_and_one_of_two_copies_beside_it(monkeypatch, rdrop_alpha: float, moves: int) -> None:
    ids = np.arange(4, 9)
    batch = pack([Example(task="caption", source=ids, target=ids, prev=ids)], [], 16, 42)
    moved = []
    monkeypatch.setattr(Batch, "to", lambda batch, device: moved.append(batch) or batch)
    objective, engine = TaskLoss(Criterion(encouraging=True, rdrop_alpha=rdrop_alpha)), NoModel()
    (prepared,) = objective.prepare(engine, [batch])
    with pytest.raises(Forward):
        objective.loss(engine, prepared, torch.ones(1))
    assert len(moved) == moves
