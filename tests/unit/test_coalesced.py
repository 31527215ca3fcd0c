"""What is put together after a gather and before a reduction is what DeepSpeed itself puts together, in fewer calls."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ofa_ds.engine.coalesced as coalesced

SHAPES = ((40, 24), (24,), (1,), (7, 3), (3,), (64,))
INFLIGHT = coalesced.partition_parameters.ZeroParamStatus.INFLIGHT


def parameters(ranks: int, groups: int) -> list[SimpleNamespace]:
    """As they are while their elements travel; groups: of ranks that hold a second copy each."""
    made = []
    for shape in SHAPES:
        numel = math.prod(shape)
        own = torch.zeros(math.ceil(numel / (ranks * groups)))
        own.ds_numel = own.numel()
        made.append(SimpleNamespace(
            ds_status=INFLIGHT, ds_tensor=own, ds_numel=numel, ds_shape=torch.Size(shape), data=torch.empty(0),
            ds_secondary_tensor_num_of_groups=groups,
        ))  # fmt: skip
    return made


def handle(ranks: int, groups: int) -> coalesced._Handle:
    given = parameters(ranks, groups)
    row = sum(each.ds_tensor.ds_numel * groups for each in given)
    flat = torch.arange(float(row * ranks))
    return coalesced._Handle(
        allgather_handle=SimpleNamespace(wait=lambda: None), params=given, world_size=ranks,
        partitions=[flat.narrow(0, row * rank, row) for rank in range(ranks)], use_secondary_tensor=groups > 1,
    )  # fmt: skip


@pytest.mark.parametrize("ranks, groups", [(1, 1), (2, 1), (3, 1), (8, 1), (8, 4), (1024, 1)])
def test_gathered_parameters_are_those_that_deepspeed_makes(ranks, groups):
    ours, theirs = handle(ranks, groups), handle(ranks, groups)
    coalesced.wait(ours)
    coalesced._wait_row_by_row(theirs)
    assert ours.complete and all(each.ds_status == coalesced._AVAILABLE for each in ours.params)
    for one, other in zip(ours.params, theirs.params, strict=True):
        assert one.data.shape == one.ds_shape and torch.equal(one.data, other.data)
        assert one.data.is_contiguous()
    storages = {each.data.untyped_storage().data_ptr() for each in ours.params} | {ours.partitions[0].data_ptr()}
    assert len(storages) == len(SHAPES) + 1, "each in memory of its own, which is freed alone"


def deepspeeds_rows(tensors: list[Tensor], ranks: int) -> Tensor:
    """As `reduce_scatter_coalesced` has them, with zeros for what it leaves as it is."""
    rows = []
    for rank in range(ranks):
        for tensor in tensors:
            count = math.ceil(tensor.numel() / ranks)
            piece = tensor.view(-1)[rank * count : rank * count + count]
            rows += [piece, torch.zeros(count - piece.numel())]
    return torch.cat(rows).view(ranks, -1)


@pytest.mark.parametrize("ranks", [2, 3, 8, 100, 1024])
def test_gradients_are_cut_into_the_pieces_that_deepspeed_cuts(ranks):
    tensors = [torch.randn(shape) for shape in SHAPES]
    counts = [math.ceil(tensor.numel() / ranks) for tensor in tensors]
    assert torch.equal(coalesced.rows_of(tensors, counts, ranks), deepspeeds_rows(tensors, ranks))


class Calls(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


def test_1024_ranks_take_as_many_calls_as_two():
    numbers = []
    for ranks in (2, 1024):
        each, tensors = handle(ranks, 1), [torch.randn(shape) for shape in SHAPES]
        with Calls() as calls:
            coalesced.wait(each)
            coalesced.rows_of(tensors, [math.ceil(tensor.numel() / ranks) for tensor in tensors], ranks)
        numbers.append(calls.number)
    assert numbers[1] <= numbers[0] + 4 * len(SHAPES) < 100
