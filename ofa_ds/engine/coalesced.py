"""What DeepSpeed does on the host around ZeRO-3's collectives, with as many calls for 1,024 ranks as for 2.

A layer's weights come as one buffer with a row per rank. DeepSpeed (0.19.8) cuts each tensor out of it row by row, and
puts its gradient together row by row: ranks x tensors calls. The elements are the same here, so are the collectives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ofa_ds.engine.deepspeed_import import deepspeed

dist, get_accelerator = deepspeed.comm, deepspeed.accelerator.get_accelerator
coalesced_collectives = deepspeed.runtime.comm.coalesced_collectives
partition_parameters, stage3 = deepspeed.runtime.zero.partition_parameters, deepspeed.runtime.zero.stage3

_Handle = partition_parameters.AllGatherCoalescedHandle
_AVAILABLE = partition_parameters.ZeroParamStatus.AVAILABLE
_wait_row_by_row = _Handle.wait


def install() -> None:
    """For all engines of this process; again is harmless."""
    _Handle.wait = wait
    stage3.reduce_scatter_coalesced = reduce_scatter


def wait(handle: Any, handle_dependency: bool = True) -> None:
    """Ends a gather: each parameter gets its elements, in memory of its own."""
    if handle.complete or handle.quantization:
        return _wait_row_by_row(handle, handle_dependency)
    handle.allgather_handle.wait()
    first = handle.partitions[0]
    rows = first.as_strided((handle.world_size, first.numel()), (first.numel(), 1))
    at = 0
    for parameter in handle.params:
        count = parameter.ds_tensor.ds_numel
        if handle.use_secondary_tensor:
            count *= parameter.ds_secondary_tensor_num_of_groups
        whole = rows[:, at : at + count].clone(memory_format=torch.contiguous_format).view(-1)
        parameter.data = whole[: parameter.ds_numel].view(parameter.ds_shape).to(parameter.ds_tensor.dtype)
        parameter.ds_status = _AVAILABLE
        at += count
    handle.complete = True
    if get_accelerator().is_synchronized_device():
        return
    if handle_dependency:
        first.record_stream(get_accelerator().current_stream())  # of the whole buffer
    else:
        _Handle.data_buffer.append([first])


@torch.no_grad()
def reduce_scatter(tensors: Sequence[Tensor], group: Any = None) -> list[Tensor]:
    """This rank's piece of the mean over ranks of each of these gradients, flat and without padding. One collective."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    counts = [math.ceil(tensor.numel() / ranks) for tensor in tensors]
    if len(tensors) == 1 and tensors[0].numel() % ranks == 0:
        rows = tensors[0].view(ranks, -1)
    else:
        rows = rows_of(tensors, counts, ranks)
    flat = rows.view(-1)
    flat.div_(ranks)
    own = rows[rank]
    coalesced_collectives._torch_reduce_scatter_fn(flat, own, group=group)
    pieces, at = [], 0
    for tensor, count in zip(tensors, counts, strict=True):
        pieces.append(own.narrow(0, at, max(0, min(count, tensor.numel() - rank * count))))
        at += count
    return pieces


def rows_of(tensors: Sequence[Tensor], counts: Sequence[int], ranks: int) -> Tensor:
    """[ranks, sum of counts]: in row r, piece r of each tensor, of `count` elements. What is no element is 0."""
    rows = tensors[0].new_zeros(ranks, sum(counts))
    at = 0
    for tensor, count in zip(tensors, counts, strict=True):
        flat = tensor.view(-1)
        full = flat.numel() // count
        rows[:full, at : at + count].copy_(flat[: full * count].view(full, count))
        if full * count < flat.numel():
            rows[full, at : at + flat.numel() - full * count].copy_(flat[full * count :])
        at += count
    return rows
