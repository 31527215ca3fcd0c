"""Triton kernels of OFA's attention: the same function as `attention.py`, without a tensor of queries x keys.

Each output is owned by one program, so that nothing depends on the order in which programs run:

    forward    64 queries of one example and head, a loop over its keys         -> out, lse
    queries    64 queries, a loop over the keys                                 -> dq, dpq, head scale
    keys       64 keys, a loop over the queries                                 -> dk, dv, dpk
    row        64 queries, a loop over the keys                                 -> relative row

The gradient of the relative row is the one that many programs share. It is summed in 64-bit integers, whose sum does
not depend on order, after scaling by a power of two that no sum can overflow; or, `deterministic` off, in fp32 atomics.
`gather_sum_kernel` sums positional gradients from tokens to positions, in a fixed order. `attention_ops_triton`
launches all of them.

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
_MASKED = tl.constexpr(-1e30)  # finite: a row without keys gives no NaN
_LOG2_E = tl.constexpr(1.4426950408889634)


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
def _load_pieces(base, rows, row_mask, stride, FIRST: tl.constexpr, SECOND: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Both pieces; where there is one, it stands for the second too, and nothing reads that."""
    first = _load_piece(base, rows, row_mask, stride, 0, FIRST, HEAD_DIM)
    second = first
    if SECOND > 0:
        second = _load_piece(base, rows, row_mask, stride, FIRST, SECOND, HEAD_DIM)
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
def forward_kernel(
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
    q, q2 = _load_pieces(q_base, query, valid, stride_q, FIRST, SECOND, HEAD_DIM)
    if POSITIONS:
        pq_ptr += head * HEAD_DIM
        pk_ptr += head * HEAD_DIM
        position = tl.load(query_position_ptr + query_start + query, mask=valid, other=0)
        pq, pq2 = _load_pieces(pq_ptr, position, valid, stride_p, FIRST, SECOND, HEAD_DIM)
    if RELATIVE:
        row_ptr += head * num_entries
        query_code = tl.load(query_code_ptr + query_start + query, mask=valid, other=0)
    highest = tl.full([OWNED], _MASKED, tl.float32)
    total = tl.zeros([OWNED], tl.float32)
    out, out2 = _zeros(OWNED, FIRST, SECOND)
    end = tl.minimum(key_length, first + OWNED) if CAUSAL else key_length
    for start in range(0, end, STEP):
        key = start + tl.arange(0, STEP)
        key_valid = key < key_length
        k, k2 = _load_pieces(k_base, key, key_valid, stride_k, FIRST, SECOND, HEAD_DIM)
        logits = _products(q, q2, k, k2, SECOND)
        if POSITIONS:
            key_position = tl.load(key_position_ptr + key_start + key, mask=key_valid, other=0)
            pk, pk2 = _load_pieces(pk_ptr, key_position, key_valid, stride_p, FIRST, SECOND, HEAD_DIM)
            logits += _products(pq, pq2, pk, pk2, SECOND)
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
        v, v2 = _load_pieces(v_base, key, key_valid, stride_v, FIRST, SECOND, HEAD_DIM)
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
    tl.store(lse_ptr + head.to(tl.int64) * num_queries + query_start + query, lse, mask=valid)


@triton.jit
def delta_kernel(out_ptr, dout_ptr, delta_ptr, num_queries, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """delta [H, N]: sum of out * dout over a head's columns."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    address = (row * tl.num_programs(1) + head) * HEAD_DIM + column
    out = tl.load(out_ptr + address, mask=column < HEAD_DIM, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + address, mask=column < HEAD_DIM, other=0.0).to(tl.float32)
    tl.store(delta_ptr + head.to(tl.int64) * num_queries + row, tl.sum(out * dout))


@triton.jit
def queries_kernel(
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
    dout, dout2 = _load_pieces(dout_base, query, valid, width, FIRST, SECOND, HEAD_DIM)
    q, q2 = _load_pieces(q_base, query, valid, stride_q, FIRST, SECOND, HEAD_DIM)
    if POSITIONS:
        pq_ptr += head * HEAD_DIM
        pk_ptr += head * HEAD_DIM
        position = tl.load(query_position_ptr + query_start + query, mask=valid, other=0)
        pq, pq2 = _load_pieces(pq_ptr, position, valid, stride_p, FIRST, SECOND, HEAD_DIM)
    if RELATIVE:
        row_ptr += head * num_entries
        query_code = tl.load(query_code_ptr + query_start + query, mask=valid, other=0)
    if CONTENT_GRAD:
        dscale = tl.zeros([OWNED], tl.float32)
        dq, dq2 = _zeros(OWNED, FIRST, SECOND)
    if POSITION_GRAD:
        dpq, dpq2 = _zeros(OWNED, FIRST, SECOND)
    if ROW_GRAD:
        drow_ptr += head * num_entries
        if DETERMINISTIC:
            fixed = tl.load(fixed_ptr)
    end = tl.minimum(key_length, first + OWNED) if CAUSAL else key_length
    for start in range(0, end, STEP):
        key = start + tl.arange(0, STEP)
        key_valid = key < key_length
        k, k2 = _load_pieces(k_base, key, key_valid, stride_k, FIRST, SECOND, HEAD_DIM)
        logits = _products(q, q2, k, k2, SECOND)
        if POSITIONS:
            key_position = tl.load(key_position_ptr + key_start + key, mask=key_valid, other=0)
            pk, pk2 = _load_pieces(pk_ptr, key_position, key_valid, stride_p, FIRST, SECOND, HEAD_DIM)
            logits += _products(pq, pq2, pk, pk2, SECOND)
        logits = logits * (scale * _LOG2_E)
        if RELATIVE:
            key_code = tl.load(key_code_ptr + key_start + key, mask=key_valid, other=0)
            entry, inside, bias = _row_entries(row_ptr, query_code[:, None], key_code[None, :], num_entries)
            logits += bias
        logits = tl.where(_seen(query[:, None], key[None, :], key_valid[None, :], CAUSAL), logits, _MASKED)
        probs = tl.exp2(logits - lse[:, None])
        v, v2 = _load_pieces(v_base, key, key_valid, stride_v, FIRST, SECOND, HEAD_DIM)
        dprobs = _products(dout, dout2, v, v2, SECOND)
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
            dq, dq2 = _add_products(dq, dq2, low, k, k2, SECOND)
        if POSITION_GRAD:
            dpq, dpq2 = _add_products(dpq, dpq2, low, pk, pk2, SECOND)
    if CONTENT_GRAD:
        tl.store(dscale_ptr, tl.sum(dscale))
        dq_base = _base(dq_ptr, query_start, width, head, HEAD_DIM)
        _store_pieces(dq_base, dq * scale, dq2 * scale, query, valid, width, FIRST, SECOND, HEAD_DIM)
    if POSITION_GRAD:
        dpq_base = _base(dpq_ptr, query_start, width, head, HEAD_DIM)
        _store_pieces(dpq_base, dpq * scale, dpq2 * scale, query, valid, width, FIRST, SECOND, HEAD_DIM)


@triton.jit
def keys_kernel(
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
    k, k2 = _load_pieces(k_base, key, valid, stride_k, FIRST, SECOND, HEAD_DIM)
    v, v2 = _load_pieces(v_base, key, valid, stride_v, FIRST, SECOND, HEAD_DIM)
    if POSITIONS:
        pq_ptr += head * HEAD_DIM
        pk_ptr += head * HEAD_DIM
        position = tl.load(key_position_ptr + key_start + key, mask=valid, other=0)
        pk, pk2 = _load_pieces(pk_ptr, position, valid, stride_p, FIRST, SECOND, HEAD_DIM)
    if RELATIVE:
        row_ptr += head * num_entries
        key_code = tl.load(key_code_ptr + key_start + key, mask=valid, other=0)
    if CONTENT_GRAD:
        dk, dk2 = _zeros(OWNED, FIRST, SECOND)
        dv, dv2 = _zeros(OWNED, FIRST, SECOND)
    if POSITION_GRAD:
        dpk, dpk2 = _zeros(OWNED, FIRST, SECOND)
    for start in range(first if CAUSAL else 0, query_length, STEP):
        query = start + tl.arange(0, STEP)
        query_valid = query < query_length
        q, q2 = _load_pieces(q_base, query, query_valid, stride_q, FIRST, SECOND, HEAD_DIM)
        logits = _products(k, k2, q, q2, SECOND)
        if POSITIONS:
            query_position = tl.load(query_position_ptr + query_start + query, mask=query_valid, other=0)
            pq, pq2 = _load_pieces(pq_ptr, query_position, query_valid, stride_p, FIRST, SECOND, HEAD_DIM)
            logits += _products(pk, pk2, pq, pq2, SECOND)
        logits = logits * (scale * _LOG2_E)
        if RELATIVE:
            query_code = tl.load(query_code_ptr + query_start + query, mask=query_valid, other=0)
            entry, inside, bias = _row_entries(row_ptr, query_code[None, :], key_code[:, None], num_entries)
            logits += bias
        if CAUSAL:
            logits = tl.where(query[None, :] >= key[:, None], logits, _MASKED)
        lse = tl.load(lse_ptr + statistics + query, mask=query_valid, other=-_MASKED)
        probs = tl.exp2(logits - lse[None, :])  # owned rows that do not exist hold anything: they are not stored
        dout, dout2 = _load_pieces(dout_base, query, query_valid, width, FIRST, SECOND, HEAD_DIM)
        dprobs = _products(v, v2, dout, dout2, SECOND)
        if DROPOUT:
            kept = _kept(seed_ptr, example, num_heads, head, query[None, :], key[:, None], key_length, dropout)
            dprobs = dprobs * kept
        delta = tl.load(delta_ptr + statistics + query, mask=query_valid, other=0.0)
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
    if POSITION_GRAD:
        dpk_base = _base(dpk_ptr, key_start, width, head, HEAD_DIM)
        _store_pieces(dpk_base, dpk * scale, dpk2 * scale, key, valid, width, FIRST, SECOND, HEAD_DIM)


@triton.jit
def gather_sum_kernel(x_ptr, order_ptr, starts_ptr, out_ptr, width, BLOCK: tl.constexpr):
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
class Form:
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
            "HEAD_DIM": self.head_dim, "FIRST": first, "SECOND": second, "OWNED": OWNED, "STEP": step,
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
        for case in _compile_form(Form(head_dim, **flags), name, dtype)
    ]


def _compile_form(form: Form, name: str, dtype: torch.dtype) -> list[CompileCase]:
    def case(kernel: str, function: object, step: int, **constants: object) -> CompileCase:
        return CompileCase(
            kernel=f"attention {kernel}, {name}", function=function, size=form.head_dim, dtype=dtype,
            arguments={argument: _type_of(argument, constants) for argument in function.arg_names},
            constants=form.constants(step) | constants, num_warps=NUM_WARPS, num_stages=NUM_STAGES, tensor_cores=True,
            aligned=("stride_q", "stride_k", "stride_v", "stride_p"),
        )  # fmt: skip

    cases = [case("forward", forward_kernel, form.forward_step())]
    for deterministic in (True, False):
        for step, grads in form.query_passes(deterministic):
            if grads["ROW_GRAD"]:
                kernel = "row" if deterministic else "row, fast"
                cases.append(case(kernel, queries_kernel, step, **grads))
            elif deterministic:
                cases.append(case("queries", queries_kernel, step, **grads))
    for grads in form.key_passes():
        kernel = "keys" if grads["CONTENT_GRAD"] else "keys, positions"
        cases.append(case(kernel, keys_kernel, form.keys_step(), **grads))
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
