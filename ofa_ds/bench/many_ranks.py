"""What the host does around a collective of one layer of the 6B, on many ranks: our calls beside DeepSpeed's, in turn.

No ranks are started: the buffer that a gather leaves is made here, with at most four elements of each tensor a rank, so
that calls are timed and not copies.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ofa_ds.engine import coalesced
from ofa_ds.model.config import preset
from ofa_ds.plan.parameters import parameters

RANKS = (8, 256, 1024)
LAYERS = {"encoder layer": "encoder.layers.0.", "decoder layer": "decoder.layers.0."}
KEPT_WHOLE = 250_000
"""`stage3_param_persistence_threshold` of the 6B's files: smaller tensors are not gathered."""


def bench_many_ranks(repeats: int) -> list[dict[str, Any]]:
    """Medians, in ms."""
    torch.set_num_threads(1)
    sizes = {each.name: math.prod(each.shape) for each in parameters(preset("6b"))}
    results = []
    for layer, prefix in LAYERS.items():
        numels = [numel for name, numel in sizes.items() if name.startswith(prefix)]
        for ranks in RANKS:
            results.append({"layer": layer, "ranks": ranks})
            for what, given in (("gather", numels), ("gather_large", [n for n in numels if n >= KEPT_WHOLE])):
                ways = {"ours": coalesced.wait, "deepspeed": coalesced._wait_row_by_row}
                for who, way in ways.items():
                    results[-1][f"{what}_{who}_ms"] = _median_ms(repeats, way, lambda: _gather(given, ranks))  # noqa: B023
            for who, way in {"ours": _rows, "deepspeed": _row_by_row}.items():
                tensors = [torch.zeros(min(numel, 4 * ranks)) for numel in numels]
                results[-1][f"reduce_{who}_ms"] = _median_ms(repeats, way, lambda: (tensors, ranks))  # noqa: B023
    return results


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| ms of the host | ranks | gather: DeepSpeed, ours | of matrices alone | reduction: DeepSpeed, ours |",
        "|---|---|---|---|---|",
    ]
    for each in results:
        cells = [
            f"{each[f'{what}_deepspeed_ms']:.2f}, {each[f'{what}_ours_ms']:.2f}"
            for what in ("gather", "gather_large", "reduce")
        ]
        lines.append(f"| {each['layer']} | {each['ranks']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _median_ms(repeats: int, way: Callable[[Any], Any], make: Callable[[], Any]) -> float:
    times = []
    for _ in range(repeats):
        given = make()
        began = time.perf_counter()
        way(given)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def _gather(numels: list[int], ranks: int) -> Any:
    """A gather that has ended, whose parameters are still to be put together."""
    given = []
    for numel in numels:
        numel = min(numel, 4 * ranks)
        own = torch.zeros(math.ceil(numel / ranks))
        own.ds_numel = own.numel()
        given.append(SimpleNamespace(
            ds_status=coalesced.partition_parameters.ZeroParamStatus.INFLIGHT, ds_tensor=own, ds_numel=numel,
            ds_shape=torch.Size((numel,)), data=None, ds_secondary_tensor_num_of_groups=1,
        ))  # fmt: skip
    row = sum(each.ds_tensor.ds_numel for each in given)
    flat = torch.zeros(row * ranks)
    return coalesced._Handle(
        allgather_handle=SimpleNamespace(wait=lambda: None), params=given, world_size=ranks,
        partitions=[flat.narrow(0, row * rank, row) for rank in range(ranks)],
    )  # fmt: skip


def _rows(given: tuple[list[Tensor], int]) -> Tensor:
    tensors, ranks = given
    return coalesced.rows_of(tensors, [math.ceil(tensor.numel() / ranks) for tensor in tensors], ranks)


def _row_by_row(given: tuple[list[Tensor], int]) -> Tensor:
    """What `reduce_scatter_coalesced` of DeepSpeed 0.19.8 does before its collective."""
    tensors, ranks = given
    pieces = []
    for rank in range(ranks):
        for tensor in tensors:
            count = math.ceil(tensor.numel() / ranks)
            piece = tensor.view(-1)[rank * count : rank * count + count]
            pieces.append(piece)
            if piece.numel() < count:
                pieces.append(torch.empty(count - piece.numel()))
    return torch.cat(pieces)
