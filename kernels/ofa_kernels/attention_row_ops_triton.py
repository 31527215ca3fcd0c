"""Launches of the kernels in `attention_row_triton`, in the order in which attention's backward needs them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ofa_kernels import attention_row_triton as kernels
from ofa_kernels._launch_triton import Constants, launch
from ofa_kernels.attention_plan_triton import TritonPlan

DLOGITS_BYTES = 128 << 20
"""What the gradients of logits may take at a time, unless one head takes more: as much as a tile of the vocabulary
loss' logits, which are gone by then."""
_PITCH = 64
"""The rows of dlogits are multiples of it, so that no step over keys leaves one."""


@functools.cache
def _delta_constants(head_dim: int) -> Constants:
    return Constants(kernels.delta_constants(head_dim) | {"num_warps": kernels.NUM_WARPS})


@functools.cache
def _sum_constants(heads: int, causal: bool) -> Constants:
    return Constants({"HEADS": heads, "CAUSAL": causal, "num_warps": kernels.row_warps(heads)} | kernels.ROW_TILE)


_FINISH = Constants(BLOCK=kernels.FINISH_BLOCK, num_warps=kernels.NUM_WARPS)


def launch_delta(out_ND: Tensor, dout_ND: Tensor, v_MD: Tensor, delta_HN: Tensor, longest: Tensor | None) -> None:
    """delta and, unless longest is None, `RowSum.longest`."""
    num_heads, num_queries = delta_HN.shape
    num_keys = 0 if longest is None else v_MD.shape[0]
    tiles = sum(-(-rows // kernels.DELTA_ROWS) for rows in (num_queries, num_keys))
    arguments = [out_ND, dout_ND, v_MD, delta_HN, longest, num_queries, num_keys, v_MD.stride(0)]
    launch(kernels.delta_kernel, (tiles, num_heads), arguments, _delta_constants(out_ND.shape[1] // num_heads))


class RowSum:
    """The gradient of the relative row [H, R] in fp32, summed as the queries kernel goes through groups of heads."""

    def __init__(self, q_ND: Tensor, head_scale_H: Tensor, plan: TritonPlan, dropout: float) -> None:
        self.plan, self.head_scale = plan, head_scale_H
        self.num_queries, self.num_heads = q_ND.shape[0], head_scale_H.shape[0]
        self.pitch = -(-plan.relative.key_of.shape[1] // _PITCH) * _PITCH
        self.group = heads_at_once(self.num_heads, self.num_queries * self.pitch * q_ND.element_size())
        self.spare = 1 + self.num_queries.bit_length() + math.ceil(-math.log2(1 - dropout))
        place = self.num_heads + self.num_heads % 2  # of 8 bytes: what comes behind is aligned to 16
        buffer = q_ND.new_zeros(place + self.num_heads * plan.num_entries, dtype=torch.int64)
        self.longest = buffer[: self.num_heads].view(torch.int32)
        """[2, H] bits of the largest squared lengths of dout and v, in fp32."""
        self.total = buffer[place:]
        """[H * R]."""
        self.dlogits = q_ND.new_empty((self.group, self.num_queries, self.pitch))

    def groups(self) -> Iterator[tuple[int, int]]:
        """(first head, heads) that `dlogits` holds at a time; call `add` for each before the next."""
        return ((first, self.group) for first in range(0, self.num_heads, self.group))

    def add(self, first: int, count: int) -> None:
        plan, relative = self.plan, self.plan.relative
        heads = math.gcd(count, kernels.MOST_HEADS)
        (num_examples, query_places), key_places = relative.query_of.shape, relative.key_of.shape[1]
        rows, lanes = kernels.ROW_TILE["ROWS"], kernels.ROW_TILE["LANES"]
        grid = (-(-query_places // rows), -(-(key_places + rows - 1) // lanes), count // heads)
        arguments = [
            self.dlogits, relative.query_of, relative.key_of, plan.queries.offsets, relative.query_place_code,
            relative.key_place_code, self.longest, self.head_scale, self.total, first, self.num_heads,
            self.num_queries, num_examples, query_places, key_places, plan.num_entries, self.pitch, self.spare,
        ]  # fmt: skip
        launch(kernels.row_sum_kernel, grid, arguments, _sum_constants(heads, plan.causal))

    def finish(self) -> Tensor:
        num_entries = self.plan.num_entries
        drow = self.head_scale.new_empty((self.num_heads, num_entries), dtype=torch.float32)
        grid = (-(-num_entries // kernels.FINISH_BLOCK), self.num_heads)
        arguments = [self.total, self.longest, self.head_scale, drow, num_entries, self.spare]
        launch(kernels.row_finish_kernel, grid, arguments, _FINISH)
        return drow


def heads_at_once(num_heads: int, bytes_per_head: int) -> int:
    """The most heads of equal groups that stay under DLOGITS_BYTES."""
    most = max(1, DLOGITS_BYTES // bytes_per_head)
    return max(n for n in range(1, min(num_heads, most) + 1) if num_heads % n == 0)
