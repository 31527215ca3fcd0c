"""The softmax of `cross_entropy`'s loss in Triton kernels; the formulas are there, products and launches in
`cross_entropy_ops_triton`.

Logits exist one tile at a time, r tokens by w classes, and the products that make and use a tile are cuBLAS'. The
forward walks a group of tokens through the vocabulary with a running softmax; of each token it keeps the five numbers
of `STATE`. With them the gradient of a logit needs no other logit, so the backward takes the tiles in any order: it
turns each in place into the gradient, which makes a *complete* slice of the weight's gradient where all tokens are one
group (no wider copy of it is needed then), and adds to a fp32 [r, D] for the tokens'. The last tile of the forward is
kept for the backward, which starts with it and computes the others again.

A tile's rows are padded to a multiple of 64 columns, so that the odd OFA vocabulary still loads 16 bytes at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ofa_kernels._cross_entropy_parts import NUM_ALWAYS_ALLOWED, SLACK
from ofa_kernels._launch import CompileCase

COLUMN_MULTIPLE, ROW_MULTIPLE = 64, 16
"""Rows too, so that pointers to a later group's tokens are as aligned as those to the first."""
BLOCK = 4096
"""Columns that a program holds at once."""
NUM_WARPS = 16
STATE = 5
"""Floats per token: largest logit so far; sum of exp(x - it); sum of (it - x); the target's logit; allowed classes.
Behind the last tile the second and third are log of the sum, and eps_i."""
NO_CONSTRAINT, RANGE, MASK = range(3)

_ALWAYS_ALLOWED = tl.constexpr(NUM_ALWAYS_ALLOWED)
_SLACK = tl.constexpr(SLACK)
_STATE = tl.constexpr(STATE)
_RANGE, _MASK = tl.constexpr(RANGE), tl.constexpr(MASK)


@triton.jit
def _is_allowed(ids, inside, mask_row_ptr, start_id, end_id, CONSTRAINT: tl.constexpr):
    if CONSTRAINT == _MASK:
        return tl.load(mask_row_ptr + ids, mask=inside, other=0) != 0
    if CONSTRAINT == _RANGE:
        return inside & ((ids < _ALWAYS_ALLOWED) | ((ids >= start_id) & (ids < end_id)))
    return inside


@triton.jit(do_not_specialize=["width", "vocab", "start_id", "end_id", "ignore_index"])
def forward_kernel(
    logits_ptr, target_ptr, mask_ptr,  # inputs [r, stride], [r] int64, [r, V] uint8 or None
    state_ptr,  # in and out [r, STATE]
    loss_ptr, nll_ptr, correct_ptr,  # outputs [r] fp32, fp32, uint8, written behind the last tile
    first, width, padded, stride, vocab,  # the tile is columns first .. first + width; a row may be read up to padded
    start_id, end_id, smoothing, ignore_index,
    CONSTRAINT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # row * stride and row * vocab pass 2^31
    logits_ptr += row * stride
    state_ptr += row * _STATE
    if CONSTRAINT == _MASK:
        mask_ptr += row * vocab
    later = first > 0
    largest = tl.load(state_ptr, mask=later, other=float("-inf"))
    total = tl.load(state_ptr + 1, mask=later, other=0.0)
    below = tl.load(state_ptr + 2, mask=later, other=0.0)
    target_logit = tl.load(state_ptr + 3, mask=later, other=float("-inf"))
    num_allowed = tl.load(state_ptr + 4, mask=later, other=0.0)
    for at in range(0, padded, BLOCK):
        column = at + tl.arange(0, BLOCK)
        # Loaded by the padded width and masked by value: a mask of an odd width would load element by element.
        x = tl.load(logits_ptr + column, mask=column < padded, other=0.0).to(tl.float32)
        counts = _is_allowed(first + column, column < width, mask_ptr, start_id, end_id, CONSTRAINT)
        x = tl.where(counts, x, float("-inf"))
        new = tl.maximum(largest, tl.max(x, 0))
        base = tl.where(new == float("-inf"), 0.0, new)  # nothing allowed so far: exp(-inf - 0) is 0, not NaN
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(x - base), 0)
        below += tl.where(num_allowed > 0, num_allowed * (new - largest), 0.0)
        below += tl.sum(tl.where(counts, base - x, 0.0), 0)
        done = first + tl.minimum(at + BLOCK, width)
        if CONSTRAINT == _MASK:
            num_allowed += tl.sum(counts.to(tl.float32), 0)
        elif CONSTRAINT == _RANGE:
            in_range = tl.minimum(tl.maximum(done - start_id, 0), end_id - start_id)
            num_allowed = (tl.minimum(done, _ALWAYS_ALLOWED) + in_range).to(tl.float32)
        else:
            num_allowed = done.to(tl.float32)
        largest = new
    target = tl.load(target_ptr + row)
    place = target - first
    here = (place >= 0) & (place < width)
    allowed = _is_allowed(target, here, mask_ptr, start_id, end_id, CONSTRAINT)
    target_logit = tl.where(allowed, tl.load(logits_ptr + place, mask=here, other=0.0).to(tl.float32), target_logit)
    if first + width == vocab:
        spread = num_allowed - 1.0
        if CONSTRAINT != 0:
            spread += _SLACK
        eps_i = smoothing / spread
        gap = largest - target_logit
        total = tl.log(total)
        nll = gap + total  # not (largest + total) - target_logit: that cancels where logits are large
        loss = (1.0 - smoothing - eps_i) * nll + eps_i * (below + num_allowed * total)
        below = eps_i
        kept = target != ignore_index
        tl.store(loss_ptr + row, tl.where(kept, loss, 0.0))
        tl.store(nll_ptr + row, tl.where(kept, nll, 0.0))
        tl.store(correct_ptr + row, (kept & (gap <= 0.0)).to(tl.uint8))
    tl.store(state_ptr, largest)
    tl.store(state_ptr + 1, total)
    tl.store(state_ptr + 2, below)
    tl.store(state_ptr + 3, target_logit)
    tl.store(state_ptr + 4, num_allowed)


@triton.jit(do_not_specialize=["width", "vocab", "start_id", "end_id", "ignore_index"])
def backward_kernel(
    logits_ptr,  # in [r, stride], out their gradient
    target_ptr, dloss_ptr, mask_ptr, state_ptr,  # inputs [r] int64, [r] fp32, [r, V] uint8 or None, [r, STATE]
    first, width, padded, stride, vocab,
    start_id, end_id, smoothing, ignore_index,
    CONSTRAINT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits_ptr += row * stride + column
    if CONSTRAINT == _MASK:
        mask_ptr += row * vocab
    inside = column < padded
    target = tl.load(target_ptr + row)
    dloss = tl.load(dloss_ptr + row)
    largest = tl.load(state_ptr + row * _STATE)
    log_total = tl.load(state_ptr + row * _STATE + 1)
    eps_i = tl.load(state_ptr + row * _STATE + 2)
    # No element needs another one, so that overwriting them needs no barrier.
    x = tl.load(logits_ptr, mask=inside, other=0.0).to(tl.float32)
    p = tl.exp((x - largest) - log_total)
    if CONSTRAINT != 0:
        p *= 1.0 - _SLACK * eps_i
    ids = first + column
    dlogits = (p - tl.where(ids == target, 1.0 - smoothing, eps_i)) * dloss
    counts = _is_allowed(ids, column < width, mask_ptr, start_id, end_id, CONSTRAINT)
    dlogits = tl.where(counts & (target != ignore_index), dlogits, 0.0)
    tl.store(logits_ptr, dlogits.to(logits_ptr.dtype.element_ty), mask=inside)


def compile_cases() -> list[CompileCase]:
    """All that is launched for the preset vocabulary; the width is that of its padded rows."""
    size = -(-59457 // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    types = dict.fromkeys("first width padded stride vocab start_id end_id ignore_index".split(), "i32")
    types |= {"smoothing": "fp32", "logits_ptr": "*x", "target_ptr": "*i64"}
    types |= dict.fromkeys(("state_ptr", "loss_ptr", "nll_ptr", "dloss_ptr"), "*fp32")
    types |= dict.fromkeys(("mask_ptr", "correct_ptr"), "*u8")
    names = {NO_CONSTRAINT: "", RANGE: ", range", MASK: ", mask"}
    kernels = {"vocabulary loss forward": forward_kernel, "vocabulary loss backward": backward_kernel}
    return [
        CompileCase(
            kernel=kernel + names[constraint],
            function=function,
            size=size,
            dtype=dtype,
            arguments={name: types[name] for name in function.arg_names if name in types},
            constants={"CONSTRAINT": constraint, "BLOCK": BLOCK} | ({} if constraint == MASK else {"mask_ptr": None}),
            num_warps=NUM_WARPS,
            aligned=("first", "padded", "stride"),
            work=BLOCK,
        )
        for kernel, function in kernels.items()
        for constraint in names
        for dtype in (torch.bfloat16, torch.float16)
    ]
