"""Triton kernels of OFA's attention: the same function as `attention.py`, without a tensor of queries x keys.

Each output is owned by one program, so that nothing depends on the order in which programs run:

    forward    64 queries of one example and head, a loop over its keys         -> out, lse
    queries    64 queries, a loop over the keys                                 -> dq, dpq, dlogits
    keys       64 keys, a loop over the queries                                 -> dk, dv, dpk, head scale

The gradient of the relative row is the one that many programs share: `attention_row_triton` makes it of dlogits, which
is kept for a few heads at a time. `gather_sum_kernel` sums positional gradients from tokens to positions, in a fixed
order. `attention_ops_triton` launches all of them.

A head dim that is no power of two is two pieces, such as 80 = 64 + 16. Softmax runs in base 2: lse is log2 of the sum.
Shapes: N query tokens, M key tokens, U and V positions, E examples, H heads, D = H * d, R row entries, T tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ofa_kernels._launch import CompileCase

OWNED = 64
"""Rows that a program owns. With four warps each product is one wgmma on Hopper; 32 rows would do the work twice."""
NUM_WARPS, NUM_STAGES = OWNED // 16, 2
MASKED = -1e30  # finite: a row without keys gives no NaN
_MASKED = tl.constexpr(MASKED)
_LOG2_E = tl.constexpr(1.4426950408889634)
_SIZES = ["num_examples", "num_queries", "num_entries", "first_head"]  # differ between calls: one build serves all


@triton.jit
def _columns(START: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(columns of one piece of a head, which of them exist)."""
    column = START + tl.arange(0, SIZE)
    return column, column < HEAD_DIM


@triton.jit
def _load_piece(base, rows, stride, START: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[rows, SIZE] of one head, zero where a column does not exist. base: where the head's row 0 begins."""
    column, exists = _columns(START, SIZE, HEAD_DIM)
    address = base + rows[:, None] * stride + column[None, :]
    if START + SIZE > HEAD_DIM:
        return tl.load(address, mask=exists[None, :], other=0.0)
    return tl.load(address)


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
def _load_pieces(base, rows, stride, FIRST: tl.constexpr, SECOND: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Both pieces; where there is one, it stands for the second too, and nothing reads that."""
    first = _load_piece(base, rows, stride, 0, FIRST, HEAD_DIM)
    second = first
    if SECOND > 0:
        second = _load_piece(base, rows, stride, FIRST, SECOND, HEAD_DIM)
    return first, second


@triton.jit
def _store_pieces(
    base, first, second, rows, row_mask, stride, FIRST: tl.constexpr, SECOND: tl.constexpr, HEAD_DIM: tl.constexpr
):
    _store_piece(base, first, rows, row_mask, stride, 0, FIRST, HEAD_DIM)
    if SECOND > 0:
        _store_piece(base, second, rows, row_mask, stride, FIRST, SECOND, HEAD_DIM)


@triton.jit
def _zeros(ROWS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """A sum's two pieces."""
    first = tl.zeros([ROWS, FIRST], tl.float32)
    second = first
    if SECOND > 0:
        second = tl.zeros([ROWS, SECOND], tl.float32)
    return first, second


@triton.jit
def _products(a, a2, b, b2, SECOND: tl.constexpr):
    """[rows of a, rows of b]: a b^T over the whole head."""
    out = _dot(a, tl.trans(b))
    if SECOND > 0:
        out += _dot(a2, tl.trans(b2))
    return out


@triton.jit
def _add_products(total, total2, a, b, b2, SECOND: tl.constexpr):
    """total + a b, piece by piece."""
    total += _dot(a, b)
    if SECOND > 0:
        total2 += _dot(a, b2)
    return total, total2


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
def _entries(query_code, key_code, last):
    """Entry of each pair of broadcastable codes, `last` for none: below 0 is far above it, without a sign."""
    return tl.minimum((query_code - key_code).to(tl.uint32, bitcast=True), last.to(tl.uint32, bitcast=True))


@triton.jit
def _kept(seed_ptr, example, num_heads, head, query, key, num_keys, dropout):
    """Dropout factor of each pair: 0 or 1 / (1 - rate), a function of seed, example, head and pair."""
    seed = tl.load(seed_ptr) + (example * num_heads + head)
    return tl.where(tl.rand(seed, query * num_keys + key) >= dropout, 1.0 / (1.0 - dropout), 0.0)


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, pq_ptr, pk_ptr, row_ptr, head_scale_ptr, seed_ptr,  # inputs
    query_offsets_ptr, key_offsets_ptr, tiles_ptr, query_position_ptr, key_position_ptr, query_code_ptr, key_code_ptr,
    out_ptr, lse_ptr,  # outputs [N, D], [H, N + 1]: the last lse is of a query that does not exist
    num_examples, num_queries, stride_q, stride_k, stride_v, stride_p, num_entries, scale, dropout,
    HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, OWNED: tl.constexpr, STEP: tl.constexpr,
    POSITIONS: tl.constexpr, RELATIVE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    lse_ptr += head.to(tl.int64) * (num_queries + 1)
    if tl.program_id(0) == 0:
        tl.store(lse_ptr + num_queries, -_MASKED)
    if tl.load(tiles_ptr + 2 * tl.program_id(0)) >= num_examples:
        return
    example, first, query, query_start, query_length, key_start, key_length = _tile_of(
        tiles_ptr, query_offsets_ptr, key_offsets_ptr, OWNED
    )
    valid, query_row = query < query_length, tl.minimum(query, query_length - 1)
    q_base = _base(q_ptr, query_start, stride_q, head, HEAD_DIM)
    k_base = _base(k_ptr, key_start, stride_k, head, HEAD_DIM)
    v_base = _base(v_ptr, key_start, stride_v, head, HEAD_DIM)
    q, q2 = _load_pieces(q_base, query_row, stride_q, FIRST, SECOND, HEAD_DIM)
    if POSITIONS:
        pq_ptr += head * HEAD_DIM
        pk_ptr += head * HEAD_DIM
        position = tl.load(query_position_ptr + query_start + query_row)
        pq, pq2 = _load_pieces(pq_ptr, position, stride_p, FIRST, SECOND, HEAD_DIM)
    if RELATIVE:
        row_ptr += head * (num_entries + 2)
        query_code = tl.load(query_code_ptr + query_start + query_row)
    highest = tl.full([OWNED], _MASKED, tl.float32)
    total = tl.zeros([OWNED], tl.float32)
    out, out2 = _zeros(OWNED, FIRST, SECOND)
    end = tl.minimum(key_length, first + OWNED) if CAUSAL else key_length
    for start in range(0, end, STEP):
        key = start + tl.arange(0, STEP)
        key_valid, key_row = key < key_length, tl.minimum(key, key_length - 1)
        k, k2 = _load_pieces(k_base, key_row, stride_k, FIRST, SECOND, HEAD_DIM)
        logits = _products(q, q2, k, k2, SECOND)
        if POSITIONS:
            key_position = tl.load(key_position_ptr + key_start + key_row)
            pk, pk2 = _load_pieces(pk_ptr, key_position, stride_p, FIRST, SECOND, HEAD_DIM)
            logits += _products(pq, pq2, pk, pk2, SECOND)
        logits = logits * (scale * _LOG2_E)
        if RELATIVE:  # codes are at most num_entries; a key that does not exist has a higher one, and the bias after it
            key_code = tl.load(key_code_ptr + key_start + key, mask=key_valid, other=num_entries + 1)
            last = tl.maximum(key_code, num_entries)
            entry = _entries(query_code[:, None], key_code[None, :], last[None, :])
            logits += tl.load(row_ptr + entry)
        if CAUSAL:
            logits = tl.where(query[:, None] >= key[None, :], logits, _MASKED)
        elif not RELATIVE:
            logits = tl.where(key_valid[None, :], logits, _MASKED)
        new_highest = tl.maximum(highest, tl.max(logits, 1))
        probs = tl.exp2(logits - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(probs, 1)
        highest = new_highest
        if DROPOUT:
            probs = probs * _kept(seed_ptr, example, num_heads, head, query[:, None], key[None, :], key_length, dropout)
        v, v2 = _load_pieces(v_base, key_row, stride_v, FIRST, SECOND, HEAD_DIM)
        out = out * shrink[:, None]
        if SECOND > 0:
            out2 = out2 * shrink[:, None]
        out, out2 = _add_products(out, out2, probs.to(v.dtype), v, v2, SECOND)
    some = total > 0.0  # false only for an example without keys
    factor = tl.load(head_scale_ptr + head).to(tl.float32) / tl.where(some, total, 1.0)
    width = num_heads * HEAD_DIM
    out_base = _base(out_ptr, query_start, width, head, HEAD_DIM)
    out, out2 = out * factor[:, None], out2 * factor[:, None]
    _store_pieces(out_base, out, out2, query, valid, width, FIRST, SECOND, HEAD_DIM)
    lse = tl.where(some, highest + tl.log2(tl.where(some, total, 1.0)), -_MASKED)
    tl.store(lse_ptr + query_start + query, lse, mask=valid)


@triton.jit(do_not_specialize=_SIZES)
def queries_kernel(
    q_ptr, k_ptr, v_ptr, pq_ptr, pk_ptr, row_ptr, head_scale_ptr, seed_ptr, dout_ptr, lse_ptr, delta_ptr,
    query_offsets_ptr, key_offsets_ptr, tiles_ptr, query_position_ptr, key_position_ptr, query_code_ptr, key_code_ptr,
    dq_ptr, dpq_ptr, dlogits_ptr,  # outputs [N, D], [N, D], [heads of this launch, N, pitch]
    first_head, num_heads, pitch,
    num_examples, num_queries, stride_q, stride_k, stride_v, stride_p, num_entries, scale, dropout,
    HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, OWNED: tl.constexpr, STEP: tl.constexpr,
    POSITIONS: tl.constexpr, RELATIVE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    head = first_head + tl.program_id(1)
    if tl.load(tiles_ptr + 2 * tl.program_id(0)) >= num_examples:
        return
    example, first, query, query_start, query_length, key_start, key_length = _tile_of(
        tiles_ptr, query_offsets_ptr, key_offsets_ptr, OWNED
    )
    valid, query_row = query < query_length, tl.minimum(query, query_length - 1)
    width = num_heads * HEAD_DIM
    dout_base = _base(dout_ptr, query_start, width, head, HEAD_DIM)
    q_base = _base(q_ptr, query_start, stride_q, head, HEAD_DIM)
    k_base = _base(k_ptr, key_start, stride_k, head, HEAD_DIM)
    v_base = _base(v_ptr, key_start, stride_v, head, HEAD_DIM)
    statistics = head.to(tl.int64) * num_queries + query_start
    lse_ptr += head.to(tl.int64) * (num_queries + 1)
    lse = tl.load(lse_ptr + tl.where(valid, query_start + query, num_queries))  # rows that do not exist have p = 0
    delta = tl.load(delta_ptr + statistics + query_row)
    head_scale = tl.load(head_scale_ptr + head).to(tl.float32)
    dout, dout2 = _load_pieces(dout_base, query_row, width, FIRST, SECOND, HEAD_DIM)
    q, q2 = _load_pieces(q_base, query_row, stride_q, FIRST, SECOND, HEAD_DIM)
    if POSITIONS:
        pq_ptr += head * HEAD_DIM
        pk_ptr += head * HEAD_DIM
        position = tl.load(query_position_ptr + query_start + query_row)
        pq, pq2 = _load_pieces(pq_ptr, position, stride_p, FIRST, SECOND, HEAD_DIM)
    if RELATIVE:
        row_ptr += head * (num_entries + 2)
        query_code = tl.load(query_code_ptr + query_start + query_row)
        first_row = tl.program_id(1).to(tl.int64) * num_queries + query_start + first
        dlogits_ptr += first_row * pitch + (query - first)[:, None] * pitch
    dq, dq2 = _zeros(OWNED, FIRST, SECOND)
    if POSITIONS:
        dpq, dpq2 = _zeros(OWNED, FIRST, SECOND)
    end = tl.minimum(key_length, first + OWNED) if CAUSAL else key_length
    for start in range(0, end, STEP):
        key = start + tl.arange(0, STEP)
        key_valid, key_row = key < key_length, tl.minimum(key, key_length - 1)
        k, k2 = _load_pieces(k_base, key_row, stride_k, FIRST, SECOND, HEAD_DIM)
        logits = _products(q, q2, k, k2, SECOND)
        if POSITIONS:
            key_position = tl.load(key_position_ptr + key_start + key_row)
            pk, pk2 = _load_pieces(pk_ptr, key_position, stride_p, FIRST, SECOND, HEAD_DIM)
            logits += _products(pq, pq2, pk, pk2, SECOND)
        logits = logits * (scale * _LOG2_E)
        if RELATIVE:  # codes are at most num_entries; a key that does not exist has a higher one, and the bias after it
            key_code = tl.load(key_code_ptr + key_start + key, mask=key_valid, other=num_entries + 1)
            last = tl.maximum(key_code, num_entries)
            entry = _entries(query_code[:, None], key_code[None, :], last[None, :])
            logits += tl.load(row_ptr + entry)
        if CAUSAL:
            logits = tl.where(query[:, None] >= key[None, :], logits, _MASKED)
        elif not RELATIVE:
            logits = tl.where(key_valid[None, :], logits, _MASKED)
        probs = tl.exp2(logits - lse[:, None])
        v, v2 = _load_pieces(v_base, key_row, stride_v, FIRST, SECOND, HEAD_DIM)
        dprobs = _products(dout, dout2, v, v2, SECOND)
        if DROPOUT:
            dprobs = dprobs * _kept(
                seed_ptr, example, num_heads, head, query[:, None], key[None, :], key_length, dropout
            )
        low = (probs * (dprobs * head_scale - delta[:, None])).to(k.dtype)
        dq, dq2 = _add_products(dq, dq2, low, k, k2, SECOND)
        if POSITIONS:
            dpq, dpq2 = _add_products(dpq, dpq2, low, pk, pk2, SECOND)
        if RELATIVE:  # zeros beyond the last key stay within the pitch
            if STEP > 16 and not DROPOUT:  # else ptxas waits after each wgmma; where not, it costs more
                tl.debug_barrier()
            tl.store(dlogits_ptr + key[None, :], low, mask=valid[:, None])
    dq_base = _base(dq_ptr, query_start, width, head, HEAD_DIM)
    _store_pieces(dq_base, dq * scale, dq2 * scale, query, valid, width, FIRST, SECOND, HEAD_DIM)
    if POSITIONS:
        dpq_base = _base(dpq_ptr, query_start, width, head, HEAD_DIM)
        _store_pieces(dpq_base, dpq * scale, dpq2 * scale, query, valid, width, FIRST, SECOND, HEAD_DIM)


@triton.jit(do_not_specialize=_SIZES)
def keys_kernel(
    q_ptr, k_ptr, v_ptr, pq_ptr, pk_ptr, row_ptr, head_scale_ptr, seed_ptr, dout_ptr, lse_ptr, delta_ptr,
    query_offsets_ptr, key_offsets_ptr, tiles_ptr, query_position_ptr, key_position_ptr, query_code_ptr, key_code_ptr,
    dk_ptr, dv_ptr, dpk_ptr, dscale_ptr,  # outputs [M, D], [M, D], [M, D], [H, T]
    num_examples, num_queries, stride_q, stride_k, stride_v, stride_p, num_entries, scale, dropout,
    HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, OWNED: tl.constexpr, STEP: tl.constexpr,
    POSITIONS: tl.constexpr, RELATIVE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    CONTENT_GRAD: tl.constexpr, POSITION_GRAD: tl.constexpr,  # dk, dv and dscale; dpk
):  # fmt: skip
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    dscale_ptr += head * tl.num_programs(0) + tl.program_id(0)
    if tl.load(tiles_ptr + 2 * tl.program_id(0)) >= num_examples:
        if CONTENT_GRAD:
            tl.store(dscale_ptr, 0.0)
        return
    example, first, key, key_start, key_length, query_start, query_length = _tile_of(
        tiles_ptr, key_offsets_ptr, query_offsets_ptr, OWNED
    )
    valid, key_row = key < key_length, tl.minimum(key, key_length - 1)
    width = num_heads * HEAD_DIM
    q_base = _base(q_ptr, query_start, stride_q, head, HEAD_DIM)
    dout_base = _base(dout_ptr, query_start, width, head, HEAD_DIM)
    k_base = _base(k_ptr, key_start, stride_k, head, HEAD_DIM)
    v_base = _base(v_ptr, key_start, stride_v, head, HEAD_DIM)
    statistics = head.to(tl.int64) * num_queries + query_start
    lse_ptr += head.to(tl.int64) * (num_queries + 1)
    head_scale = tl.load(head_scale_ptr + head).to(tl.float32)
    k, k2 = _load_pieces(k_base, key_row, stride_k, FIRST, SECOND, HEAD_DIM)
    v, v2 = _load_pieces(v_base, key_row, stride_v, FIRST, SECOND, HEAD_DIM)
    if POSITIONS:
        pq_ptr += head * HEAD_DIM
        pk_ptr += head * HEAD_DIM
        position = tl.load(key_position_ptr + key_start + key_row)
        pk, pk2 = _load_pieces(pk_ptr, position, stride_p, FIRST, SECOND, HEAD_DIM)
    if RELATIVE:
        row_ptr += head * (num_entries + 2)
        key_code = tl.load(key_code_ptr + key_start + key_row)
    if CONTENT_GRAD:
        dk, dk2 = _zeros(OWNED, FIRST, SECOND)
        dv, dv2 = _zeros(OWNED, FIRST, SECOND)
    if POSITION_GRAD:
        dpk, dpk2 = _zeros(OWNED, FIRST, SECOND)
    for start in range(first if CAUSAL else 0, query_length, STEP):
        query = start + tl.arange(0, STEP)
        query_valid, query_row = query < query_length, tl.minimum(query, query_length - 1)
        q, q2 = _load_pieces(q_base, query_row, stride_q, FIRST, SECOND, HEAD_DIM)
        logits = _products(k, k2, q, q2, SECOND)
        if POSITIONS:
            query_position = tl.load(query_position_ptr + query_start + query_row)
            pq, pq2 = _load_pieces(pq_ptr, query_position, stride_p, FIRST, SECOND, HEAD_DIM)
            logits += _products(pk, pk2, pq, pq2, SECOND)
        logits = logits * (scale * _LOG2_E)
        if RELATIVE:
            query_code = tl.load(query_code_ptr + query_start + query_row)
            logits += tl.load(row_ptr + _entries(query_code[None, :], key_code[:, None], num_entries))
        if CAUSAL:
            logits = tl.where(query[None, :] >= key[:, None], logits, _MASKED)
        lse = tl.load(lse_ptr + tl.where(query_valid, query_start + query, num_queries))
        probs = tl.exp2(logits - lse[None, :])  # owned rows that do not exist hold anything: they are not stored
        dout, dout2 = _load_pieces(dout_base, query_row, width, FIRST, SECOND, HEAD_DIM)
        dprobs = _products(v, v2, dout, dout2, SECOND)
        if DROPOUT:
            kept = _kept(seed_ptr, example, num_heads, head, query[None, :], key[:, None], key_length, dropout)
            dprobs = dprobs * kept
        delta = tl.load(delta_ptr + statistics + query_row)
        dlogits = (probs * (dprobs * head_scale - delta[None, :])).to(q.dtype)
        if CONTENT_GRAD:
            if DROPOUT:
                probs = probs * kept
            dv, dv2 = _add_products(dv, dv2, probs.to(dout.dtype), dout, dout2, SECOND)
            dk, dk2 = _add_products(dk, dk2, dlogits, q, q2, SECOND)
        if POSITION_GRAD:
            dpk, dpk2 = _add_products(dpk, dpk2, dlogits, pq, pq2, SECOND)
    if CONTENT_GRAD:
        dk_base = _base(dk_ptr, key_start, width, head, HEAD_DIM)
        dv_base = _base(dv_ptr, key_start, width, head, HEAD_DIM)
        _store_pieces(dk_base, dk * scale, dk2 * scale, key, valid, width, FIRST, SECOND, HEAD_DIM)
        _store_pieces(dv_base, dv * head_scale, dv2 * head_scale, key, valid, width, FIRST, SECOND, HEAD_DIM)
        # the sum of probs * dprobs, read again and once, where it costs the loop no registers
        v, v2 = _load_pieces(v_base, key_row, stride_v, FIRST, SECOND, HEAD_DIM)
        dscale = tl.sum(dv * v.to(tl.float32), 1)
        if SECOND > 0:
            dscale += tl.sum(dv2 * v2.to(tl.float32), 1)
        tl.store(dscale_ptr, tl.sum(tl.where(valid, dscale, 0.0)))
    if POSITION_GRAD:
        dpk_base = _base(dpk_ptr, key_start, width, head, HEAD_DIM)
        _store_pieces(dpk_base, dpk * scale, dpk2 * scale, key, valid, width, FIRST, SECOND, HEAD_DIM)


@triton.jit
def gather_sum_kernel(x_ptr, order_ptr, starts_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """out[u] = sum of x[order[starts[u] : starts[u + 1]]], in that order and in fp32: [N, D] -> [U, D] fp32."""
    position = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.load(starts_ptr + position), tl.load(starts_ptr + position + 1)):
        row = tl.load(order_ptr + i).to(tl.int64)
        total += tl.load(x_ptr + row * width + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + position.to(tl.int64) * width + column, total, mask=mask)


def per_token(dtype: torch.dtype) -> torch.dtype:
    """Of positional gradients before they are summed: in fp16 rounding them would double plain torch's own error."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


@dataclass(frozen=True, slots=True)
class Form:
    """What of the attention is there, as the kernels' constants."""

    head_dim: int
    positions: bool
    relative: bool
    causal: bool
    dropout: bool
    arch: int = 80
    """Of the GPU, 90 for sm_90: how many rows of the other side a loop step takes (kernels/README.md, Checked)."""

    def pieces(self) -> tuple[int, int]:
        """Two powers of two, of at least 16, that cover the head dim; the second may be 0."""
        first = 1 << max(self.head_dim.bit_length() - 1, 4)
        left = self.head_dim - first
        return first, 0 if left <= 0 else max(16, 1 << (left - 1).bit_length())

    def constants(self, step: int) -> dict[str, object]:
        first, second = self.pieces()
        return {
            "HEAD_DIM": self.head_dim, "FIRST": first, "SECOND": second, "OWNED": OWNED, "STEP": step,
            "POSITIONS": self.positions, "RELATIVE": self.relative, "CAUSAL": self.causal, "DROPOUT": self.dropout,
        }  # fmt: skip

    def forward_step(self) -> int:
        if self.head_dim <= (64 if self.dropout else 80):
            return 64
        return 16 if self.dropout and self.head_dim > 80 else 32

    def queries_step(self) -> int:
        return 32 if self.head_dim <= (80 if self.arch >= 90 else 64) else 16

    def keys_step(self) -> int:
        if self.dropout or self.head_dim > 80:
            return 16
        return 32 if self.arch >= 90 or self.relative and self.head_dim > 64 else 16

    def key_passes(self) -> list[dict[str, bool]]:
        """What each launch of the keys kernel computes: dk, dv and dpk at once where they fit the registers."""
        if self.positions and self.head_dim > 96:
            return [{"CONTENT_GRAD": True, "POSITION_GRAD": False}, {"CONTENT_GRAD": False, "POSITION_GRAD": True}]
        return [{"CONTENT_GRAD": True, "POSITION_GRAD": self.positions}]


HEAD_DIMS = (64, 80)
"""Of OFA's sizes: 80 is huge's and the 6B's."""
MORE_HEAD_DIMS = (88, 96, 128)


def compile_cases(every: bool, arch: int) -> list[CompileCase]:
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
        for case in _compile_form(Form(head_dim, **flags, arch=arch), name, dtype)
    ]


def _compile_form(form: Form, name: str, dtype: torch.dtype) -> list[CompileCase]:
    def case(kernel: str, function: object, step: int, **constants: object) -> CompileCase:
        return CompileCase(
            kernel=f"attention {kernel}, {name}", function=function, size=form.head_dim, dtype=dtype,
            arguments={argument: _type_of(argument, dtype) for argument in function.arg_names},
            constants=form.constants(step) | constants, num_warps=NUM_WARPS, num_stages=NUM_STAGES, tensor_cores=True,
            aligned=("stride_q", "stride_k", "stride_v", "stride_p", "pitch"), work=OWNED * step,
        )  # fmt: skip

    cases = [
        case("forward", forward_kernel, form.forward_step()),
        case("queries", queries_kernel, form.queries_step()),
    ]
    for grads in form.key_passes():
        kernel = "keys" if grads["CONTENT_GRAD"] else "keys, positions"
        cases.append(case(kernel, keys_kernel, form.keys_step(), **grads))
    return cases


def _type_of(argument: str, dtype: torch.dtype) -> str:
    wide = ("row_ptr", "lse_ptr", "delta_ptr", "dscale_ptr")
    if argument == "seed_ptr":
        return "*i64"
    if argument in wide or argument in ("dpq_ptr", "dpk_ptr") and per_token(dtype) != dtype:
        return "*fp32"
    if any(part in argument for part in ("offsets", "tiles", "position", "code")):
        return "*i32"
    if argument.endswith("_ptr"):
        return "*x"
    return "fp32" if argument in ("scale", "dropout") else "i32"
