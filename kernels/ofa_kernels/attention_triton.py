"""Triton kernels of OFA's attention: the same function as `attention.py`, without a tensor of queries x keys.

Each output is owned by one program, so that nothing depends on the order in which programs run:

    forward    64 queries of one example and head, a loop over its keys         -> out, lse
    queries    64 queries, a loop over the keys                                 -> dq, dpq, head scale
    keys       64 keys, a loop over the queries                                 -> dk, dv, dpk
    row        64 queries, a loop over the keys                                 -> relative row

The gradient of the relative row is the one that many programs share. It is summed in 64-bit integers, whose sum does
not depend on order, after scaling by a power of two that no sum can overflow (`_fixed_point`); or, `deterministic`
off, in fp32 atomics. `_gather_sum_kernel` sums positional gradients from tokens to positions, in a fixed order.

A head dim that is no power of two is two pieces, such as 80 = 64 + 16. Softmax runs in base 2: lse is log2 of the sum.
Shapes: N query tokens, M key tokens, U and V positions, E examples, H heads, D = H * d, R row entries, T tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ofa_kernels._launch import CompileCase
from ofa_kernels.attention_plan import RelativeCodes, Tokens

_MASKED = tl.constexpr(-1e30)  # finite: a row without keys gives no NaN
_LOG2_E = tl.constexpr(1.4426950408889634)
_OWNED = 64
"""Rows that a program owns. With four warps each product is one wgmma on Hopper; 32 rows would do the work twice."""


@dataclass(frozen=True, slots=True)
class Side:
    """Queries or keys of a batch, all int32 on the device."""

    offsets: Tensor
    """[E + 1]."""
    tiles: Tensor
    """[T, 2]: example and first row of each group of owned rows; example E where there are fewer groups than T."""
    position: Tensor
    """[N]."""
    code: Tensor
    """[N] relative code, or empty."""
    order: Tensor
    """[N] tokens sorted by position, those of one position in their order."""
    starts: Tensor
    """[U + 1]: tokens order[starts[u] : starts[u + 1]] have position u."""

    def tensors(self) -> list[Tensor]:
        return [self.offsets, self.tiles, self.position, self.code, self.order, self.starts]


@dataclass(frozen=True, slots=True)
class TritonPlan:
    num_queries: int
    num_keys: int
    queries: Side
    keys: Side
    num_entries: int
    """Of the relative row; 0 for none."""
    causal: bool
    deterministic: bool
    """Whether the gradient of the relative row has the same bits in every run."""

    @property
    def is_relative(self) -> bool:
        return self.num_entries > 0


def plan_triton(
    queries: Tokens, keys: Tokens, *, relative: RelativeCodes | None, causal: bool, deterministic: bool
) -> TritonPlan:
    """Made on the device without waiting for it. An example that has queries but no keys gets zeros."""
    query_side = _side(queries, None if relative is None else relative.query)
    same = queries is keys and relative is None
    return TritonPlan(
        num_queries=len(queries.position),
        num_keys=len(keys.position),
        queries=query_side,
        keys=query_side if same else _side(keys, None if relative is None else relative.key),
        num_entries=0 if relative is None else relative.num_entries,
        causal=causal,
        deterministic=deterministic,
    )


def _side(tokens: Tokens, code_U: Tensor | None) -> Side:
    position = tokens.position
    order = position.argsort(stable=True)
    starts = torch.searchsorted(position[order], torch.arange(tokens.num_positions + 1, device=position.device))
    code = position.new_zeros(0) if code_U is None else code_U.to(position.device)[position]
    offsets = tokens.offsets.to(position.device)
    parts = (offsets, _tiles(offsets, len(position)), position, code, order, starts)
    return Side(*(part.to(torch.int32).contiguous() for part in parts))


def _tiles(offsets: Tensor, num_tokens: int) -> Tensor:
    """As many as there can be: sum of ceil(length / owned) <= num_tokens / owned + E."""
    num_examples = len(offsets) - 1
    counts = (offsets.diff() + _OWNED - 1) // _OWNED
    ends = counts.cumsum(0)
    tile = torch.arange(num_tokens // _OWNED + num_examples, device=offsets.device)
    example = torch.searchsorted(ends, tile, right=True)
    first = torch.cat([ends - counts, ends[-1:]])[example]
    return torch.stack([example, (tile - first) * _OWNED], 1)


@triton.jit
def _columns(START: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(columns of one piece of a head, which of them exist)."""
    column = START + tl.arange(0, SIZE)
    return column, column < HEAD_DIM


@triton.jit
def _load_piece(base, rows, row_mask, stride, START: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[rows, SIZE] of one head, zero where a row or column does not exist. base: where the head's row 0 begins."""
    column, exists = _columns(START, SIZE, HEAD_DIM)
    address = base + rows[:, None] * stride + column[None, :]
    if START + SIZE > HEAD_DIM:
        return tl.load(address, mask=row_mask[:, None] & exists[None, :], other=0.0)
    return tl.load(address, mask=row_mask[:, None], other=0.0)


@triton.jit
def _store_piece(base, value, rows, row_mask, stride, START: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    column, exists = _columns(START, SIZE, HEAD_DIM)
    address = base + rows[:, None] * stride + column[None, :]
    mask = row_mask[:, None] & exists[None, :] if START + SIZE > HEAD_DIM else row_mask[:, None]
    tl.store(address, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _base(pointer, start, stride, head, HEAD_DIM: tl.constexpr):
    """Where a head of an example's first row begins. 64 bits once here: rows within an example fit 32."""
    return pointer + start.to(tl.int64) * stride + head * HEAD_DIM


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _tile_of(tiles_ptr, own_offsets_ptr, other_offsets_ptr, OWNED: tl.constexpr):
    """(example, first owned row, owned rows, owned start, owned length, other start, other length)."""
    tile = tl.program_id(0)
    example = tl.load(tiles_ptr + 2 * tile)
    first = tl.load(tiles_ptr + 2 * tile + 1)
    own_start = tl.load(own_offsets_ptr + example)
    other_start = tl.load(other_offsets_ptr + example)
    own_length = tl.load(own_offsets_ptr + example + 1) - own_start
    other_length = tl.load(other_offsets_ptr + example + 1) - other_start
    return example, first, first + tl.arange(0, OWNED), own_start, own_length, other_start, other_length


@triton.jit
def _row_entries(row_ptr, query_code, key_code, num_entries):
    """(entry of each pair, whether it has one, bias in base 2); queries and keys come as broadcastable codes."""
    entry = query_code - key_code
    inside = (entry >= 0) & (entry < num_entries)
    return entry, inside, tl.load(row_ptr + entry, mask=inside, other=0.0) * _LOG2_E


@triton.jit
def _seen(query, key, key_valid, CAUSAL: tl.constexpr):
    seen = key_valid  # one return: two of different shapes do not compile
    if CAUSAL:
        seen = key_valid & (query >= key)
    return seen


@triton.jit
def _kept(seed_ptr, example, num_heads, head, query, key, num_keys, dropout):
    """Dropout factor of each pair: 0 or 1 / (1 - rate), a function of seed, example, head and pair."""
    seed = tl.load(seed_ptr) + (example * num_heads + head)
    return tl.where(tl.rand(seed, query * num_keys + key) >= dropout, 1.0 / (1.0 - dropout), 0.0)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, pq_ptr, pk_ptr, row_ptr, head_scale_ptr, seed_ptr,  # inputs
    query_offsets_ptr, key_offsets_ptr, tiles_ptr, query_position_ptr, key_position_ptr, query_code_ptr, key_code_ptr,
    out_ptr, lse_ptr,  # outputs [N, D], [H, N]
    num_examples, num_queries, stride_q, stride_k, stride_v, stride_p, num_entries, scale, dropout,
    HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, OWNED: tl.constexpr, STEP: tl.constexpr,
    POSITIONS: tl.constexpr, RELATIVE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    if tl.load(tiles_ptr + 2 * tl.program_id(0)) >= num_examples:
        return
    example, first, query, query_start, query_length, key_start, key_length = _tile_of(
        tiles_ptr, query_offsets_ptr, key_offsets_ptr, OWNED
    )
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    valid = query < query_length
    q_base = _base(q_ptr, query_start, stride_q, head, HEAD_DIM)
    k_base = _base(k_ptr, key_start, stride_k, head, HEAD_DIM)
    v_base = _base(v_ptr, key_start, stride_v, head, HEAD_DIM)
    q = _load_piece(q_base, query, valid, stride_q, 0, FIRST, HEAD_DIM)
    if SECOND > 0:
        q2 = _load_piece(q_base, query, valid, stride_q, FIRST, SECOND, HEAD_DIM)
    if POSITIONS:
        pq_ptr += head * HEAD_DIM
        pk_ptr += head * HEAD_DIM
        position = tl.load(query_position_ptr + query_start + query, mask=valid, other=0)
        pq = _load_piece(pq_ptr, position, valid, stride_p, 0, FIRST, HEAD_DIM)
        if SECOND > 0:
            pq2 = _load_piece(pq_ptr, position, valid, stride_p, FIRST, SECOND, HEAD_DIM)
    if RELATIVE:
        row_ptr += head * num_entries
        query_code = tl.load(query_code_ptr + query_start + query, mask=valid, other=0)
    highest = tl.full([OWNED], _MASKED, tl.float32)
    total = tl.zeros([OWNED], tl.float32)
    out = tl.zeros([OWNED, FIRST], tl.float32)
    if SECOND > 0:
        out2 = tl.zeros([OWNED, SECOND], tl.float32)
    end = tl.minimum(key_length, first + OWNED) if CAUSAL else key_length
    for start in range(0, end, STEP):
        key = start + tl.arange(0, STEP)
        key_valid = key < key_length
        k = _load_piece(k_base, key, key_valid, stride_k, 0, FIRST, HEAD_DIM)
        logits = _dot(q, tl.trans(k))
        if SECOND > 0:
            k2 = _load_piece(k_base, key, key_valid, stride_k, FIRST, SECOND, HEAD_DIM)
            logits += _dot(q2, tl.trans(k2))
        if POSITIONS:
            key_position = tl.load(key_position_ptr + key_start + key, mask=key_valid, other=0)
            pk = _load_piece(pk_ptr, key_position, key_valid, stride_p, 0, FIRST, HEAD_DIM)
            logits += _dot(pq, tl.trans(pk))
            if SECOND > 0:
                pk2 = _load_piece(pk_ptr, key_position, key_valid, stride_p, FIRST, SECOND, HEAD_DIM)
                logits += _dot(pq2, tl.trans(pk2))
        logits = logits * (scale * _LOG2_E)
        if RELATIVE:
            key_code = tl.load(key_code_ptr + key_start + key, mask=key_valid, other=0)
            entry, inside, bias = _row_entries(row_ptr, query_code[:, None], key_code[None, :], num_entries)
            logits += bias
        logits = tl.where(_seen(query[:, None], key[None, :], key_valid[None, :], CAUSAL), logits, _MASKED)
        new_highest = tl.maximum(highest, tl.max(logits, 1))
        probs = tl.exp2(logits - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(probs, 1)
        highest = new_highest
        if DROPOUT:
            probs = probs * _kept(seed_ptr, example, num_heads, head, query[:, None], key[None, :], key_length, dropout)
        v = _load_piece(v_base, key, key_valid, stride_v, 0, FIRST, HEAD_DIM)
        out = out * shrink[:, None] + _dot(probs.to(v.dtype), v)
        if SECOND > 0:
            v2 = _load_piece(v_base, key, key_valid, stride_v, FIRST, SECOND, HEAD_DIM)
            out2 = out2 * shrink[:, None] + _dot(probs.to(v2.dtype), v2)
    some = total > 0.0  # false only for an example without keys
    factor = tl.load(head_scale_ptr + head).to(tl.float32) / tl.where(some, total, 1.0)
    width = num_heads * HEAD_DIM
    out_base = _base(out_ptr, query_start, width, head, HEAD_DIM)
    _store_piece(out_base, out * factor[:, None], query, valid, width, 0, FIRST, HEAD_DIM)
    if SECOND > 0:
        _store_piece(out_base, out2 * factor[:, None], query, valid, width, FIRST, SECOND, HEAD_DIM)
    lse = tl.where(some, highest + tl.log2(tl.where(some, total, 1.0)), -_MASKED)
    tl.store(lse_ptr + head.to(tl.int64) * num_queries + query_start + query, lse, mask=valid)


@triton.jit
def _delta_kernel(out_ptr, dout_ptr, delta_ptr, num_queries, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """delta [H, N]: sum of out * dout over a head's columns."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    address = (row * tl.num_programs(1) + head) * HEAD_DIM + column
    out = tl.load(out_ptr + address, mask=column < HEAD_DIM, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + address, mask=column < HEAD_DIM, other=0.0).to(tl.float32)
    tl.store(delta_ptr + head.to(tl.int64) * num_queries + row, tl.sum(out * dout))


@triton.jit
def _queries_kernel(
    q_ptr, k_ptr, v_ptr, pq_ptr, pk_ptr, row_ptr, head_scale_ptr, seed_ptr, dout_ptr, lse_ptr, delta_ptr, fixed_ptr,
    query_offsets_ptr, key_offsets_ptr, tiles_ptr, query_position_ptr, key_position_ptr, query_code_ptr, key_code_ptr,
    dq_ptr, dpq_ptr, drow_ptr, dscale_ptr,  # outputs [N, D], [N, D], [H, R], [H, T]
    num_examples, num_queries, stride_q, stride_k, stride_v, stride_p, num_entries, scale, dropout,
    HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, OWNED: tl.constexpr, STEP: tl.constexpr,
    POSITIONS: tl.constexpr, RELATIVE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    CONTENT_GRAD: tl.constexpr, POSITION_GRAD: tl.constexpr, ROW_GRAD: tl.constexpr,  # dq and dscale; dpq; drow
    DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    dscale_ptr += head * tl.num_programs(0) + tl.program_id(0)
    if tl.load(tiles_ptr + 2 * tl.program_id(0)) >= num_examples:
        if CONTENT_GRAD:
            tl.store(dscale_ptr, 0.0)
        return
    example, first, query, query_start, query_length, key_start, key_length = _tile_of(
        tiles_ptr, query_offsets_ptr, key_offsets_ptr, OWNED
    )
    valid = query < query_length
    width = num_heads * HEAD_DIM
    dout_base = _base(dout_ptr, query_start, width, head, HEAD_DIM)
    q_base = _base(q_ptr, query_start, stride_q, head, HEAD_DIM)
    k_base = _base(k_ptr, key_start, stride_k, head, HEAD_DIM)
    v_base = _base(v_ptr, key_start, stride_v, head, HEAD_DIM)
    statistics = head.to(tl.int64) * num_queries + query_start
    lse = tl.load(lse_ptr + statistics + query, mask=valid, other=-_MASKED)  # rows that do not exist have p = 0
    delta = tl.load(delta_ptr + statistics + query, mask=valid, other=0.0)
    head_scale = tl.load(head_scale_ptr + head).to(tl.float32)
    dout = _load_piece(dout_base, query, valid, width, 0, FIRST, HEAD_DIM)
    q = _load_piece(q_base, query, valid, stride_q, 0, FIRST, HEAD_DIM)
    if SECOND > 0:
        dout2 = _load_piece(dout_base, query, valid, width, FIRST, SECOND, HEAD_DIM)
        q2 = _load_piece(q_base, query, valid, stride_q, FIRST, SECOND, HEAD_DIM)
    if POSITIONS:
        pq_ptr += head * HEAD_DIM
        pk_ptr += head * HEAD_DIM
        position = tl.load(query_position_ptr + query_start + query, mask=valid, other=0)
        pq = _load_piece(pq_ptr, position, valid, stride_p, 0, FIRST, HEAD_DIM)
        if SECOND > 0:
            pq2 = _load_piece(pq_ptr, position, valid, stride_p, FIRST, SECOND, HEAD_DIM)
    if RELATIVE:
        row_ptr += head * num_entries
        query_code = tl.load(query_code_ptr + query_start + query, mask=valid, other=0)
    if CONTENT_GRAD:
        dscale = tl.zeros([OWNED], tl.float32)
        dq = tl.zeros([OWNED, FIRST], tl.float32)
        if SECOND > 0:
            dq2 = tl.zeros([OWNED, SECOND], tl.float32)
    if POSITION_GRAD:
        dpq = tl.zeros([OWNED, FIRST], tl.float32)
        if SECOND > 0:
            dpq2 = tl.zeros([OWNED, SECOND], tl.float32)
    if ROW_GRAD:
        drow_ptr += head * num_entries
        if DETERMINISTIC:
            fixed = tl.load(fixed_ptr)
    end = tl.minimum(key_length, first + OWNED) if CAUSAL else key_length
    for start in range(0, end, STEP):
        key = start + tl.arange(0, STEP)
        key_valid = key < key_length
        k = _load_piece(k_base, key, key_valid, stride_k, 0, FIRST, HEAD_DIM)
        logits = _dot(q, tl.trans(k))
        if SECOND > 0:
            k2 = _load_piece(k_base, key, key_valid, stride_k, FIRST, SECOND, HEAD_DIM)
            logits += _dot(q2, tl.trans(k2))
        if POSITIONS:
            key_position = tl.load(key_position_ptr + key_start + key, mask=key_valid, other=0)
            pk = _load_piece(pk_ptr, key_position, key_valid, stride_p, 0, FIRST, HEAD_DIM)
            logits += _dot(pq, tl.trans(pk))
            if SECOND > 0:
                pk2 = _load_piece(pk_ptr, key_position, key_valid, stride_p, FIRST, SECOND, HEAD_DIM)
                logits += _dot(pq2, tl.trans(pk2))
        logits = logits * (scale * _LOG2_E)
        if RELATIVE:
            key_code = tl.load(key_code_ptr + key_start + key, mask=key_valid, other=0)
            entry, inside, bias = _row_entries(row_ptr, query_code[:, None], key_code[None, :], num_entries)
            logits += bias
        logits = tl.where(_seen(query[:, None], key[None, :], key_valid[None, :], CAUSAL), logits, _MASKED)
        probs = tl.exp2(logits - lse[:, None])
        v = _load_piece(v_base, key, key_valid, stride_v, 0, FIRST, HEAD_DIM)
        dprobs = _dot(dout, tl.trans(v))
        if SECOND > 0:
            v2 = _load_piece(v_base, key, key_valid, stride_v, FIRST, SECOND, HEAD_DIM)
            dprobs += _dot(dout2, tl.trans(v2))
        if DROPOUT:
            dprobs = dprobs * _kept(
                seed_ptr, example, num_heads, head, query[:, None], key[None, :], key_length, dropout
            )
        if CONTENT_GRAD:
            dscale += tl.sum(probs * dprobs, 1)
        dlogits = probs * (dprobs * head_scale - delta[:, None])
        if ROW_GRAD:
            counted = inside & (dlogits != 0.0)  # masked pairs would add nothing, at the price of an atomic
            if DETERMINISTIC:
                tl.atomic_add(drow_ptr + entry, (dlogits * fixed).to(tl.int64), mask=counted, sem="relaxed")
            else:
                tl.atomic_add(drow_ptr + entry, dlogits, mask=counted, sem="relaxed")
        low = dlogits.to(k.dtype)
        if CONTENT_GRAD:
            dq += _dot(low, k)
            if SECOND > 0:
                dq2 += _dot(low, k2)
        if POSITION_GRAD:
            dpq += _dot(low, pk)
            if SECOND > 0:
                dpq2 += _dot(low, pk2)
    if CONTENT_GRAD:
        tl.store(dscale_ptr, tl.sum(dscale))
        dq_base = _base(dq_ptr, query_start, width, head, HEAD_DIM)
        _store_piece(dq_base, dq * scale, query, valid, width, 0, FIRST, HEAD_DIM)
        if SECOND > 0:
            _store_piece(dq_base, dq2 * scale, query, valid, width, FIRST, SECOND, HEAD_DIM)
    if POSITION_GRAD:
        dpq_base = _base(dpq_ptr, query_start, width, head, HEAD_DIM)
        _store_piece(dpq_base, dpq * scale, query, valid, width, 0, FIRST, HEAD_DIM)
        if SECOND > 0:
            _store_piece(dpq_base, dpq2 * scale, query, valid, width, FIRST, SECOND, HEAD_DIM)


@triton.jit
def _keys_kernel(
    q_ptr, k_ptr, v_ptr, pq_ptr, pk_ptr, row_ptr, head_scale_ptr, seed_ptr, dout_ptr, lse_ptr, delta_ptr,
    query_offsets_ptr, key_offsets_ptr, tiles_ptr, query_position_ptr, key_position_ptr, query_code_ptr, key_code_ptr,
    dk_ptr, dv_ptr, dpk_ptr,  # outputs [M, D] each
    num_examples, num_queries, stride_q, stride_k, stride_v, stride_p, num_entries, scale, dropout,
    HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, OWNED: tl.constexpr, STEP: tl.constexpr,
    POSITIONS: tl.constexpr, RELATIVE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    CONTENT_GRAD: tl.constexpr, POSITION_GRAD: tl.constexpr,  # dk and dv; dpk
):  # fmt: skip
    if tl.load(tiles_ptr + 2 * tl.program_id(0)) >= num_examples:
        return
    example, first, key, key_start, key_length, query_start, query_length = _tile_of(
        tiles_ptr, key_offsets_ptr, query_offsets_ptr, OWNED
    )
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    valid = key < key_length
    width = num_heads * HEAD_DIM
    q_base = _base(q_ptr, query_start, stride_q, head, HEAD_DIM)
    dout_base = _base(dout_ptr, query_start, width, head, HEAD_DIM)
    k_base = _base(k_ptr, key_start, stride_k, head, HEAD_DIM)
    v_base = _base(v_ptr, key_start, stride_v, head, HEAD_DIM)
    statistics = head.to(tl.int64) * num_queries + query_start
    head_scale = tl.load(head_scale_ptr + head).to(tl.float32)
    k = _load_piece(k_base, key, valid, stride_k, 0, FIRST, HEAD_DIM)
    v = _load_piece(v_base, key, valid, stride_v, 0, FIRST, HEAD_DIM)
    if SECOND > 0:
        k2 = _load_piece(k_base, key, valid, stride_k, FIRST, SECOND, HEAD_DIM)
        v2 = _load_piece(v_base, key, valid, stride_v, FIRST, SECOND, HEAD_DIM)
    if POSITIONS:
        pq_ptr += head * HEAD_DIM
        pk_ptr += head * HEAD_DIM
        position = tl.load(key_position_ptr + key_start + key, mask=valid, other=0)
        pk = _load_piece(pk_ptr, position, valid, stride_p, 0, FIRST, HEAD_DIM)
        if SECOND > 0:
            pk2 = _load_piece(pk_ptr, position, valid, stride_p, FIRST, SECOND, HEAD_DIM)
    if RELATIVE:
        row_ptr += head * num_entries
        key_code = tl.load(key_code_ptr + key_start + key, mask=valid, other=0)
    if CONTENT_GRAD:
        dk = tl.zeros([OWNED, FIRST], tl.float32)
        dv = tl.zeros([OWNED, FIRST], tl.float32)
        if SECOND > 0:
            dk2 = tl.zeros([OWNED, SECOND], tl.float32)
            dv2 = tl.zeros([OWNED, SECOND], tl.float32)
    if POSITION_GRAD:
        dpk = tl.zeros([OWNED, FIRST], tl.float32)
        if SECOND > 0:
            dpk2 = tl.zeros([OWNED, SECOND], tl.float32)
    for start in range(first if CAUSAL else 0, query_length, STEP):
        query = start + tl.arange(0, STEP)
        query_valid = query < query_length
        q = _load_piece(q_base, query, query_valid, stride_q, 0, FIRST, HEAD_DIM)
        logits = _dot(k, tl.trans(q))
        if SECOND > 0:
            q2 = _load_piece(q_base, query, query_valid, stride_q, FIRST, SECOND, HEAD_DIM)
            logits += _dot(k2, tl.trans(q2))
        if POSITIONS:
            query_position = tl.load(query_position_ptr + query_start + query, mask=query_valid, other=0)
            pq = _load_piece(pq_ptr, query_position, query_valid, stride_p, 0, FIRST, HEAD_DIM)
            logits += _dot(pk, tl.trans(pq))
            if SECOND > 0:
                pq2 = _load_piece(pq_ptr, query_position, query_valid, stride_p, FIRST, SECOND, HEAD_DIM)
                logits += _dot(pk2, tl.trans(pq2))
        logits = logits * (scale * _LOG2_E)
        if RELATIVE:
            query_code = tl.load(query_code_ptr + query_start + query, mask=query_valid, other=0)
            entry, inside, bias = _row_entries(row_ptr, query_code[None, :], key_code[:, None], num_entries)
            logits += bias
        if CAUSAL:
            logits = tl.where(query[None, :] >= key[:, None], logits, _MASKED)
        lse = tl.load(lse_ptr + statistics + query, mask=query_valid, other=-_MASKED)
        probs = tl.exp2(logits - lse[None, :])  # owned rows that do not exist hold anything: they are not stored
        dout = _load_piece(dout_base, query, query_valid, width, 0, FIRST, HEAD_DIM)
        dprobs = _dot(v, tl.trans(dout))
        if SECOND > 0:
            dout2 = _load_piece(dout_base, query, query_valid, width, FIRST, SECOND, HEAD_DIM)
            dprobs += _dot(v2, tl.trans(dout2))
        if DROPOUT:
            kept = _kept(seed_ptr, example, num_heads, head, query[None, :], key[:, None], key_length, dropout)
            dprobs = dprobs * kept
        delta = tl.load(delta_ptr + statistics + query, mask=query_valid, other=0.0)
        dlogits = (probs * (dprobs * head_scale - delta[None, :])).to(q.dtype)
        if CONTENT_GRAD:
            if DROPOUT:
                probs = probs * kept
            low = probs.to(dout.dtype)
            dv += _dot(low, dout)
            dk += _dot(dlogits, q)
            if SECOND > 0:
                dv2 += _dot(low, dout2)
                dk2 += _dot(dlogits, q2)
        if POSITION_GRAD:
            dpk += _dot(dlogits, pq)
            if SECOND > 0:
                dpk2 += _dot(dlogits, pq2)
    if CONTENT_GRAD:
        dk_base = _base(dk_ptr, key_start, width, head, HEAD_DIM)
        dv_base = _base(dv_ptr, key_start, width, head, HEAD_DIM)
        _store_piece(dk_base, dk * scale, key, valid, width, 0, FIRST, HEAD_DIM)
        _store_piece(dv_base, dv * head_scale, key, valid, width, 0, FIRST, HEAD_DIM)
        if SECOND > 0:
            _store_piece(dk_base, dk2 * scale, key, valid, width, FIRST, SECOND, HEAD_DIM)
            _store_piece(dv_base, dv2 * head_scale, key, valid, width, FIRST, SECOND, HEAD_DIM)
    if POSITION_GRAD:
        dpk_base = _base(dpk_ptr, key_start, width, head, HEAD_DIM)
        _store_piece(dpk_base, dpk * scale, key, valid, width, 0, FIRST, HEAD_DIM)
        if SECOND > 0:
            _store_piece(dpk_base, dpk2 * scale, key, valid, width, FIRST, SECOND, HEAD_DIM)


@triton.jit
def _gather_sum_kernel(x_ptr, order_ptr, starts_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """out[u] = sum of x[order[starts[u] : starts[u + 1]]], in that order: [N, D] -> [U, D], fp32."""
    position = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.load(starts_ptr + position), tl.load(starts_ptr + position + 1)):
        row = tl.load(order_ptr + i).to(tl.int64)
        total += tl.load(x_ptr + row * width + column, mask=mask, other=0.0)
    tl.store(out_ptr + position.to(tl.int64) * width + column, total, mask=mask)


@dataclass(frozen=True, slots=True)
class _Form:
    """What of the attention is there, as the kernels' constants."""

    head_dim: int
    positions: bool
    relative: bool
    causal: bool
    dropout: bool

    def pieces(self) -> tuple[int, int]:
        """Two powers of two, of at least 16, that cover the head dim; the second may be 0."""
        first = 1 << max(self.head_dim.bit_length() - 1, 4)
        left = self.head_dim - first
        return first, 0 if left <= 0 else max(16, 1 << (left - 1).bit_length())

    def constants(self, step: int) -> dict[str, object]:
        first, second = self.pieces()
        return {
            "HEAD_DIM": self.head_dim, "FIRST": first, "SECOND": second, "OWNED": _OWNED, "STEP": step,
            "POSITIONS": self.positions, "RELATIVE": self.relative, "CAUSAL": self.causal, "DROPOUT": self.dropout,
        }  # fmt: skip

    def forward_step(self) -> int:
        """Keys that a loop step takes: the most without a spill on both targets (kernels/README.md)."""
        if self.head_dim <= 64:
            return 64
        return 16 if self.dropout and self.head_dim > 80 else 32

    def queries_step(self) -> int:
        return 32 if self.head_dim <= 64 else 16

    def row_step(self) -> int:
        return 32 if self.head_dim <= 80 else 16

    def keys_step(self) -> int:
        return 32 if self.head_dim <= 64 and not self.dropout else 16

    def query_passes(self, deterministic: bool) -> list[tuple[int, dict[str, bool]]]:
        """(step, what it computes) of each launch of the queries kernel.

        The row has one of its own: its atomics need the registers that dq and dpq hold.
        """
        off = {"CONTENT_GRAD": False, "POSITION_GRAD": False, "ROW_GRAD": False, "DETERMINISTIC": deterministic}
        passes = [(self.queries_step(), off | {"CONTENT_GRAD": True, "POSITION_GRAD": self.positions})]
        return [*passes, (self.row_step(), off | {"ROW_GRAD": True})] if self.relative else passes

    def key_passes(self) -> list[dict[str, bool]]:
        """What each launch of the keys kernel computes: dk, dv and dpk at once where they fit the registers."""
        if self.positions and self.head_dim > 96:
            return [{"CONTENT_GRAD": True, "POSITION_GRAD": False}, {"CONTENT_GRAD": False, "POSITION_GRAD": True}]
        return [{"CONTENT_GRAD": True, "POSITION_GRAD": self.positions}]


def _form(q: Tensor, head_scale: Tensor, pq: Tensor, num_entries: int, causal: bool, dropout: float) -> _Form:
    return _Form(q.shape[1] // head_scale.shape[0], pq.numel() > 0, num_entries > 0, causal, dropout > 0)


def _launch(kernel: object, side: Side, num_heads: int, arguments: list[object], constants: dict[str, object]) -> None:
    kernel[len(side.tiles), num_heads](*arguments, **constants, num_warps=_OWNED // 16, num_stages=2)


@torch.library.custom_op("ofa_kernels::attention_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, pq: Tensor, pk: Tensor, pq_low: Tensor, pk_low: Tensor, row: Tensor,
    head_scale: Tensor, seed: Tensor, sides: list[Tensor], num_entries: int, causal: bool, scale: float,
    dropout: float, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [N, D] in the dtype of q, lse [H, N]).

    pq [U, D] and pk [V, D] carry the gradient in fp32, *_low are their values in the dtype of q.
    """
    num_heads, form = head_scale.shape[0], _form(q, head_scale, pq_low, num_entries, causal, dropout)
    queries, keys = Side(*sides[:6]), Side(*sides[6:])
    out = q.new_empty(q.shape)
    lse = q.new_empty(num_heads, q.shape[0], dtype=torch.float32)
    arguments = [
        q, k, v, pq_low, pk_low, row, head_scale, seed, queries.offsets, keys.offsets, queries.tiles,
        queries.position, keys.position, queries.code, keys.code, out, lse, len(queries.offsets) - 1, q.shape[0],
        q.stride(0), k.stride(0), v.stride(0), q.shape[1], num_entries, scale, dropout,
    ]  # fmt: skip
    _launch(_forward_kernel, queries, num_heads, arguments, form.constants(form.forward_step()))
    return out, lse


@_forward.register_fake
def _forward_fake(q: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    head_scale = others[7]
    return q.new_empty(q.shape), q.new_empty(head_scale.shape[0], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("ofa_kernels::attention_backward", mutates_args=())
def _backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, pq: Tensor, pk: Tensor, row: Tensor,
    head_scale: Tensor, seed: Tensor, sides: list[Tensor], num_entries: int, causal: bool, scale: float,
    dropout: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, pq [U, D] and pk [V, D] in fp32, row [H, R], head_scale [H]."""
    num_heads, form = head_scale.shape[0], _form(q, head_scale, pq, num_entries, causal, dropout)
    queries, keys = Side(*sides[:6]), Side(*sides[6:])
    dq, dk, dv = (q.new_empty(x.shape) for x in (q, k, v))
    dpq, dpk = (q.new_empty(x.shape if form.positions else (0,), dtype=torch.float32) for x in (q, k))
    fixed = _fixed_point(dout, v, head_scale, dropout) if form.relative and deterministic else lse
    drow = row.new_zeros(row.shape, dtype=torch.int64 if deterministic else torch.float32)
    dscale = lse.new_empty(num_heads, len(queries.tiles))
    delta = torch.empty_like(lse)
    block = triton.next_power_of_2(form.head_dim)
    _delta_kernel[len(q), num_heads](out, dout, delta, len(q), HEAD_DIM=form.head_dim, BLOCK=block, num_warps=1)
    inputs = [q, k, v, pq, pk, row, head_scale, seed, dout, lse, delta]
    places = [queries.position, keys.position, queries.code, keys.code]
    numbers = [
        len(queries.offsets) - 1, q.shape[0], q.stride(0), k.stride(0), v.stride(0), q.shape[1], num_entries, scale,
        dropout,
    ]  # fmt: skip
    arguments = [*inputs, fixed, queries.offsets, keys.offsets, queries.tiles, *places, dq, dpq, drow, dscale, *numbers]
    for step, grads in form.query_passes(deterministic):
        _launch(_queries_kernel, queries, num_heads, arguments, form.constants(step) | grads)
    arguments = [*inputs, queries.offsets, keys.offsets, keys.tiles, *places, dk, dv, dpk, *numbers]
    for grads in form.key_passes():
        _launch(_keys_kernel, keys, num_heads, arguments, form.constants(form.keys_step()) | grads)
    if deterministic and form.relative:
        drow = drow.double() / fixed
    dpq_UD, dpk_VD = (_sum_of_positions(x, side) if form.positions else x for x, side in ((dpq, queries), (dpk, keys)))
    return dq, dk, dv, dpq_UD, dpk_VD, drow.to(row.dtype), dscale.sum(1).to(head_scale.dtype)


@_backward.register_fake
def _backward_fake(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, pq: Tensor, pk: Tensor, *others: object
) -> tuple[Tensor, ...]:
    wide = (x.new_empty(x.shape, dtype=torch.float32) for x in (pq, pk))
    return *(x.new_empty(x.shape) for x in (q, k, v)), *wide, *(x.new_empty(x.shape) for x in others[:2])


def _fixed_point(dout: Tensor, v: Tensor, head_scale: Tensor, dropout: float) -> Tensor:
    """The power of two [1] by which gradients of logits are multiplied to be summed as 64-bit integers.

    |dlogit| <= 2 max |head scale| max |dout| max |v| / (1 - dropout), and an entry sums at most N * M of them: 2**60
    over that leaves no sum above 2**61 and, at 4096 tokens, 36 bits below the largest gradient there could be.
    """
    num_heads = head_scale.shape[0]
    longest = [
        torch.linalg.vector_norm(x.view(x.shape[0], num_heads, -1), dim=-1, dtype=torch.float32).amax()
        for x in (dout, v)
    ]
    bound = 2 * head_scale.float().abs().amax() * longest[0] * longest[1] / (1 - dropout)
    exponent = (60 - torch.log2(bound) - torch.log2(bound.new_tensor(dout.shape[0] * v.shape[0]))).floor()
    return torch.exp2(exponent.clamp(max=100.0)).reshape(1)


def _sum_of_positions(x_ND: Tensor, side: Side) -> Tensor:
    width = x_ND.shape[1]
    out_UD = x_ND.new_empty(len(side.starts) - 1, width)
    block = min(1024, triton.next_power_of_2(width))
    grid = (out_UD.shape[0], triton.cdiv(width, block))
    _gather_sum_kernel[grid](x_ND, side.order, side.starts, out_UD, width, BLOCK=block)
    return out_UD


def _setup_context(ctx: object, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, _, _, pq_low, pk_low, row, head_scale, seed, sides, *ctx.settings = inputs
    ctx.save_for_backward(*output, q, k, v, pq_low, pk_low, row, head_scale, seed, *sides)


def _autograd(ctx: object, dout: Tensor, _: Tensor) -> tuple:
    saved = ctx.saved_tensors
    dq, dk, dv, dpq, dpk, drow, dscale = _backward(dout.contiguous(), *saved[:10], list(saved[10:]), *ctx.settings)
    sides = [None] * len(saved[10:])
    return dq, dk, dv, dpq, dpk, None, None, drow, dscale, None, sides, *[None] * len(ctx.settings)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def attention_triton(
    qkv: tuple[Tensor, Tensor, Tensor],
    plan: TritonPlan,
    positions: tuple[Tensor, ...],
    row_HR: Tensor | None,
    head_scale_H: Tensor,
    *,
    scale: float,
    dropout: float,
) -> Tensor:
    """`attention` of a TritonPlan. positions: (pos_q [U, D], pos_k [V, D]) or (), fp32 where q is narrower.

    Raises ValueError for fp64.
    """
    q = qkv[0]
    if q.dtype == torch.float64:
        raise ValueError("attention: kernel 'triton' computes in fp32; for float64 choose 'torch'")
    q, k, v = (x.to(q.dtype) if x.stride(-1) == 1 else x.to(q.dtype).contiguous() for x in qkv)
    if not len(q):
        return q
    if not len(k):
        return torch.zeros_like(q)
    nothing = q.new_empty(0, dtype=torch.float32)
    pq, pk = positions or (nothing, nothing)
    pq_low, pk_low = (x.detach().to(q.dtype) for x in (pq, pk))
    row = nothing if row_HR is None else row_HR.float().contiguous()
    # on the device, so that nothing waits for it; drawn only where it is needed, to leave the generator alone
    seed = torch.randint(2**62, (1,), device=q.device) if dropout else q.new_zeros(1, dtype=torch.int64)
    sides = [*plan.queries.tensors(), *plan.keys.tensors()]
    settings = (plan.num_entries, plan.causal, scale, dropout, plan.deterministic)
    return _forward(q, k, v, pq, pk, pq_low, pk_low, row, head_scale_H, seed, sides, *settings)[0]


HEAD_DIMS = (64, 80)
"""Of OFA's sizes: 80 is huge's and the 6B's."""
MORE_HEAD_DIMS = (88, 96, 128)


def compile_cases(every: bool = False) -> list[CompileCase]:
    """Every form of the model's attention: self, causal self and cross, with and without dropout.

    every: at head dims that no preset has as well.
    """
    forms = {
        "encoder": dict(positions=True, relative=True, causal=False, dropout=False),
        "decoder": dict(positions=True, relative=True, causal=True, dropout=False),
        "cross": dict(positions=True, relative=False, causal=False, dropout=False),
        "encoder, dropout": dict(positions=True, relative=True, causal=False, dropout=True),
    }
    return [
        case
        for head_dim in HEAD_DIMS + (MORE_HEAD_DIMS if every else ())
        for name, flags in forms.items()
        for dtype in (torch.bfloat16, torch.float16)
        for case in _compile_form(_Form(head_dim, **flags), name, dtype)
    ]


def _compile_form(form: _Form, name: str, dtype: torch.dtype) -> list[CompileCase]:
    def case(kernel: str, function: object, step: int, **constants: object) -> CompileCase:
        return CompileCase(
            kernel=f"attention {kernel}, {name}", function=function, size=form.head_dim, dtype=dtype,
            arguments={argument: _type_of(argument, constants) for argument in function.arg_names},
            constants=form.constants(step) | constants, num_warps=_OWNED // 16, num_stages=2, tensor_cores=True,
            aligned=("stride_q", "stride_k", "stride_v", "stride_p"),
        )  # fmt: skip

    cases = [case("forward", _forward_kernel, form.forward_step())]
    for deterministic in (True, False):
        for step, grads in form.query_passes(deterministic):
            if grads["ROW_GRAD"]:
                kernel = "row" if deterministic else "row, fast"
                cases.append(case(kernel, _queries_kernel, step, **grads))
            elif deterministic:
                cases.append(case("queries", _queries_kernel, step, **grads))
    for grads in form.key_passes():
        kernel = "keys" if grads["CONTENT_GRAD"] else "keys, positions"
        cases.append(case(kernel, _keys_kernel, form.keys_step(), **grads))
    return cases


def _type_of(argument: str, constants: dict[str, object]) -> str:
    wide = ("row_ptr", "lse_ptr", "delta_ptr", "fixed_ptr", "dpq_ptr", "dpk_ptr", "dscale_ptr")
    if argument == "drow_ptr":
        return "*i64" if constants["DETERMINISTIC"] else "*fp32"
    if argument == "seed_ptr":
        return "*i64"
    if argument in wide:
        return "*fp32"
    if any(part in argument for part in ("offsets", "tiles", "position", "code")):
        return "*i32"
    if argument.endswith("_ptr"):
        return "*x"
    return "fp32" if argument in ("scale", "dropout") else "i32"
