"""Triton kernels of what attention's backward sums beside products: delta, and the gradient of the relative row.

The queries kernel leaves the gradient of every logit, dS, in 16 bits, for as many heads at a time as a fixed budget
holds. An entry of the row is the sum of dS over all pairs with one difference of codes. Examples of a batch share
positions, and along a diagonal of positions the difference stays the same, so a program of `row_sum_kernel` owns a
skewed tile of position pairs, adds up all examples in their order, then its diagonals, and only then adds to the row:
once or twice per diagonal instead of once per pair. Those few additions are of 64-bit integers, whose sum does not
depend on order, after scaling by a power of two that no sum can overflow.

Shapes: N query tokens, M key tokens, U and V positions, E examples, H heads, G heads of a group, D = H * d, R entries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ofa_kernels._launch import CompileCase

ROW_TILE = {"ROWS": 8, "LANES": 32}
"""Query positions and diagonals of a program."""
MOST_HEADS = 8
"""Heads that share a program's look-ups of tokens. Four of them fill the registers of a warp."""
DELTA_ROWS, FINISH_BLOCK, NUM_WARPS = 32, 1024, 4
_SPREAD = tl.constexpr(60)  # bits of the largest sum there can be: leaves one for rounding, and the sign


@triton.jit
def _longest(x_ptr, rows, row_mask, stride, head, longest_ptr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of one head [rows, BLOCK] in fp32; the largest of their squared lengths goes to longest_ptr, as bits."""
    column = tl.arange(0, BLOCK)
    address = x_ptr + head * HEAD_DIM + rows.to(tl.int64)[:, None] * stride + column[None, :]
    x = tl.load(address, mask=row_mask[:, None] & (column < HEAD_DIM)[None, :], other=0.0).to(tl.float32)
    if longest_ptr is not None:  # bits of numbers >= 0 are in the order of the numbers, and NaN is above all
        tl.atomic_max(longest_ptr + head, tl.max(tl.sum(x * x, 1).to(tl.int32, bitcast=True), 0), sem="relaxed")
    return x


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def delta_kernel(
    out_ptr, dout_ptr, v_ptr,  # inputs [N, D], [N, D], [M, D]
    delta_ptr, longest_ptr,  # outputs [H, N]; bits of the largest squared lengths [2, H] of dout and v, or None
    num_queries, num_keys, stride_v, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta: sum of out * dout over a head's columns. The programs after the queries' look at v."""
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    width = num_heads * HEAD_DIM
    num_tiles = tl.cdiv(num_queries, ROWS)
    if tl.program_id(0) >= num_tiles:
        key = (tl.program_id(0) - num_tiles) * ROWS + tl.arange(0, ROWS)
        _longest(v_ptr, key, key < num_keys, stride_v, head, longest_ptr + num_heads, HEAD_DIM, BLOCK)
        return
    query = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = query < num_queries
    dout = _longest(dout_ptr, query, valid, width, head, longest_ptr, HEAD_DIM, BLOCK)
    out = _longest(out_ptr, query, valid, width, head, None, HEAD_DIM, BLOCK)
    tl.store(delta_ptr + head.to(tl.int64) * num_queries + query, tl.sum(out * dout, 1), mask=valid)


@triton.jit
def _exponent(x):
    """The least e with |x| < 2**e, for finite fp32 numbers that are not denormal."""
    return ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 126


@triton.jit
def _power(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _fixed_point(longest_ptr, head_scale_ptr, head, num_heads, spare):
    """(e, whether all is finite): heads' gradients of logits times 2**e may be summed as 64-bit integers.

    |dlogit| <= 2 p |head scale| max |dout| max |v| / (1 - dropout), and the p of a query sum to 1: an entry is at most
    N times that. spare: bits that N, 2 and 1 / (1 - dropout) take.
    """
    dout = tl.load(longest_ptr + head).to(tl.float32, bitcast=True)
    v = tl.load(longest_ptr + num_heads + head).to(tl.float32, bitcast=True)
    scale = tl.load(head_scale_ptr + head).to(tl.float32)
    bits = spare + _exponent(scale) + ((_exponent(dout) + _exponent(v) + 1) >> 1)
    finite = (dout < float("inf")) & (v < float("inf")) & (tl.abs(scale) < float("inf"))
    return tl.minimum(tl.maximum(_SPREAD - bits, -100), 100), finite


@triton.jit(do_not_specialize=["first_head", "num_queries", "num_examples", "num_query_places", "num_key_places",
                               "num_entries", "spare"])  # fmt: skip
def row_sum_kernel(
    dlogits_ptr,  # [G, N, pitch]
    query_of_ptr, key_of_ptr, query_offsets_ptr, query_code_ptr, key_code_ptr,  # [E, U], [E, V], [E + 1], [U], [V]
    longest_ptr, head_scale_ptr,  # [2, H], [H]
    total_ptr,  # output [H, R] int64, added to
    first_head, num_heads, num_queries, num_examples, num_query_places, num_key_places, num_entries, pitch, spare,
    HEADS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """query_of and key_of: which token of an example, counted from its first, is at a position; -1 for none."""
    row = tl.arange(0, ROWS)
    query_place = tl.program_id(0) * ROWS + row
    key_place = tl.program_id(1) * LANES - (ROWS - 1) + row[:, None] + tl.arange(0, LANES)[None, :]
    query_there = query_place < num_query_places
    key_there = (key_place >= 0) & (key_place < num_key_places)
    query_code = tl.load(query_code_ptr + query_place, mask=query_there, other=0)
    entry = query_code[:, None] - tl.load(key_code_ptr + key_place, mask=key_there, other=0)
    counted = query_there[:, None] & key_there & (entry >= 0) & (entry < num_entries)
    if tl.max(tl.max(counted.to(tl.int32), 1), 0) == 0:
        return
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    dlogits_ptr += (head.to(tl.int64) * num_queries * pitch)[:, None, None]
    total = tl.zeros([HEADS, ROWS, LANES], tl.float32)
    for example in range(num_examples):
        query = tl.load(query_of_ptr + example * num_query_places + query_place, mask=query_there, other=-1)[:, None]
        key = tl.load(key_of_ptr + example * num_key_places + key_place, mask=counted, other=-1)
        both = (query >= 0) & (key >= 0)
        if CAUSAL:
            both &= query >= key
        if tl.max(tl.max(both.to(tl.int32), 1), 0) > 0:
            start = tl.load(query_offsets_ptr + example)
            # a pair that is not there reads the example's first pair, times 0: cheaper than a mask per load
            place = tl.where(both, (start + query) * pitch + key, start * pitch)
            values = tl.load(dlogits_ptr + place[None, :, :]).to(tl.float32)
            total += values * both.to(tl.float32)[None, :, :]
    head += first_head
    exponent, _ = _fixed_point(longest_ptr, head_scale_ptr, head, num_heads, spare)
    fixed = _power(exponent)[:, None]
    total_ptr += (head.to(tl.int64) * num_entries)[:, None]
    # within a diagonal an entry changes at most once where positions are a text, or a row of a grid
    last = tl.max(tl.where(counted, entry, -1), 0)
    first = tl.min(tl.where(counted, entry, num_entries), 0)
    for side in tl.static_range(2):
        own = last if side == 0 else first
        sums = tl.sum(tl.where((counted & (entry == own[None, :]))[None, :, :], total, 0.0), 1)
        mask = own >= 0 if side == 0 else first < last
        tl.atomic_add(total_ptr + own[None, :], (sums * fixed).to(tl.int64), mask=mask[None, :], sem="relaxed")
    rest = counted & (entry != last[None, :]) & (entry != first[None, :])
    if tl.max(tl.max(rest.to(tl.int32), 1), 0) > 0:
        amount = (total * fixed[:, :, None]).to(tl.int64)
        tl.atomic_add(total_ptr[:, :, None] + entry[None, :, :], amount, mask=rest[None, :, :], sem="relaxed")


@triton.jit(do_not_specialize=["num_entries", "spare"])
def row_finish_kernel(
    total_ptr, longest_ptr, head_scale_ptr, drow_ptr, num_entries, spare, BLOCK: tl.constexpr
):  # fmt: skip
    """drow [H, R] in fp32 from the integers; NaN where the gradients that came in were not finite."""
    entry, head = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    exponent, finite = _fixed_point(longest_ptr, head_scale_ptr, head, tl.num_programs(1), spare)
    place = head.to(tl.int64) * num_entries + entry
    total = tl.load(total_ptr + place, mask=entry < num_entries, other=0).to(tl.float32)
    tl.store(drow_ptr + place, tl.where(finite, total * _power(-exponent), float("nan")), mask=entry < num_entries)


def row_warps(heads: int) -> int:
    return max(1, heads // 4)


def delta_constants(head_dim: int) -> dict[str, int]:
    return {"HEAD_DIM": head_dim, "BLOCK": triton.next_power_of_2(head_dim), "ROWS": DELTA_ROWS}


def compile_cases(head_dims: tuple[int, ...]) -> list[CompileCase]:
    """The row's kernels do not know the head dim: they stand once for each, to be beside the others."""
    indices = ("query_of_ptr", "key_of_ptr", "query_offsets_ptr", "query_code_ptr", "key_code_ptr", "longest_ptr")
    types = dict.fromkeys(indices, "*i32") | {"total_ptr": "*i64", "delta_ptr": "*fp32", "drow_ptr": "*fp32"}

    def cases(size: int, dtype: torch.dtype) -> Iterator[CompileCase]:
        def case(name: str, function: object, constants: dict[str, object], num_warps: int, work: int) -> CompileCase:
            names = function.arg_names
            return CompileCase(
                kernel=f"attention {name}", function=function, size=size, dtype=dtype, constants=constants,
                arguments={each: types.get(each, "*x" if each.endswith("_ptr") else "i32") for each in names},
                num_warps=num_warps, aligned=("stride_v", "pitch"), work=work,
            )  # fmt: skip

        for heads, name in ((MOST_HEADS, "row"), (MOST_HEADS // 2, "row of fewer heads")):
            work = heads * ROW_TILE["ROWS"] * ROW_TILE["LANES"]
            for form, causal in (("encoder", False), ("decoder", True)):
                constants = {"HEADS": heads, "CAUSAL": causal} | ROW_TILE
                yield case(f"{name}, {form}", row_sum_kernel, constants, row_warps(heads), work)
        yield case("row finish", row_finish_kernel, {"BLOCK": FINISH_BLOCK}, NUM_WARPS, FINISH_BLOCK)
        yield case("delta", delta_kernel, delta_constants(size), NUM_WARPS, DELTA_ROWS * size)

    return [case for size in head_dims for dtype in (torch.bfloat16, torch.float16) for case in cases(size, dtype)]
