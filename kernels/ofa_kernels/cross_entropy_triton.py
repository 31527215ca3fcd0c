"""The loss of `cross_entropy`, its softmax in Triton kernels; the formulas are there.

Logits exist one tile at a time, r tokens by w classes, and the products that make and use a tile are cuBLAS'. The
forward walks a group of tokens through the vocabulary with a running softmax; of each token it keeps the five numbers
of `STATE`. With them the gradient of a logit needs no other logit, so the backward takes the tiles in any order: it
turns each in place into the gradient, which makes a *complete* slice of the weight's gradient where all tokens are one
group (no wider copy of it is needed then), and adds to a fp32 [r, D] for the tokens'. The last tile of the forward is
kept for the backward, which starts with it and computes the others again.

A tile's rows are padded to a multiple of 64 columns, so that the odd OFA vocabulary still loads 16 bytes at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ofa_kernels._cross_entropy_parts import NUM_ALWAYS_ALLOWED, SLACK, add_product_
from ofa_kernels._launch import CompileCase

TILE_AND_SUM_BYTES = 84 << 20
"""Of a tile and of the fp32 gradients of its tokens. With a partial product (8 MiB) and the state it stays < 100 MB."""
SUM_BYTES = 48 << 20
"""Of these gradients at most: it limits the tokens of a group (16,384 at width 768, 4,915 at 2560)."""
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
def _forward_kernel(
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
def _backward_kernel(
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


def tiled_cross_entropy(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    target_M: Tensor,
    mask_MV: Tensor | None,
    id_range: tuple[int, int] | None,
    smoothing: float,
    ignore_index: int,
    chunk: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, nll, correct), see `linear_cross_entropy`; dtype is that of the products. Nothing waits for the GPU.

    The kept tile becomes its gradient in place, so that a second backward through the same graph raises torch's error
    for it. Ignored tokens are computed and thrown away: leave many of them out before. Raises ValueError for fp64.
    """
    if dtype == torch.float64:
        raise ValueError("linear_cross_entropy: kernel 'triton' computes in fp32; for float64 choose 'torch'")
    mask_MV = None if mask_MV is None else mask_MV.contiguous()
    target_M = target_M.to(torch.int64).contiguous()
    tile = tile_shape(target_M.shape[0], *weight_VD.shape, dtype.itemsize, chunk)
    return _forward_op(
        hidden_MD, weight_VD, target_M, mask_MV, list(id_range or ()), float(smoothing), ignore_index, list(tile), dtype
    )[:3]


def tile_shape(num_tokens: int, vocab: int, dim: int, item_bytes: int, chunk: int | None) -> tuple[int, int]:
    """(tokens, columns) of the largest tile that the memory has room for; all tiles have about one size."""
    if chunk is not None:
        rows = min(num_tokens, chunk)
    else:
        rows = _even_share(num_tokens, max(ROW_MULTIPLE, SUM_BYTES // (4 * dim)), ROW_MULTIPLE)
    row_bytes = max(rows, 1) * item_bytes
    sum_bytes = 4 * dim * rows if item_bytes < 4 and row_bytes * vocab > TILE_AND_SUM_BYTES else 0
    columns = (TILE_AND_SUM_BYTES - sum_bytes) // row_bytes // COLUMN_MULTIPLE * COLUMN_MULTIPLE
    return max(rows, 1), _even_share(vocab, max(columns, COLUMN_MULTIPLE), COLUMN_MULTIPLE)


def _even_share(total: int, most: int, multiple: int) -> int:
    """total over as few parts as have at most `most`, rounded up to a multiple, which divides `most`."""
    share = -(-total // max(1, -(-total // (most // multiple * multiple))))
    return -(-share // multiple) * multiple


def _forward(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    target_M: Tensor,
    mask_MV: Tensor | None,
    id_range: list[int],
    smoothing: float,
    ignore_index: int,
    tile: list[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, nll, correct, state [M, STATE], and the buffer with the last tile of logits. id_range: [] for none."""
    outputs = _forward_outputs(hidden_MD, weight_VD, target_M, mask_MV, id_range, smoothing, ignore_index, tile, dtype)
    loss_M, nll_M, correct_M, state_MS, buffer = outputs
    hidden_MD, weight_VD = hidden_MD.to(dtype), weight_VD.to(dtype)
    for group, classes in _tiles(target_M.shape[0], weight_VD.shape[0], tile):
        logits_rw = _logits(buffer, hidden_MD[group], weight_VD[classes])
        pointers = (logits_rw, target_M[group], _mask_pointer(mask_MV, group), state_MS[group])
        with torch.cuda.device_of(buffer):
            _forward_kernel[(logits_rw.shape[0],)](
                *pointers, loss_M[group], nll_M[group], correct_M[group].view(torch.uint8),
                *_settings(logits_rw, classes, weight_VD.shape[0], mask_MV, id_range, smoothing, ignore_index),
                BLOCK=BLOCK, num_warps=NUM_WARPS,
            )  # fmt: skip
    return outputs


def _forward_outputs(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    target_M: Tensor,
    mask_MV: Tensor | None,
    id_range: list[int],
    smoothing: float,
    ignore_index: int,
    tile: list[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `_forward` returns, not yet written; all that a fake tensor needs."""
    num_tokens = target_M.shape[0]
    loss_M, nll_M = (hidden_MD.new_empty(num_tokens, dtype=torch.float32) for _ in range(2))
    correct_M = hidden_MD.new_empty(num_tokens, dtype=torch.bool)
    state_MS = hidden_MD.new_empty(num_tokens, STATE, dtype=torch.float32)
    return loss_M, nll_M, correct_M, state_MS, hidden_MD.new_empty(*tile, dtype=dtype)


def _backward(
    dloss_M: Tensor,
    hidden_MD: Tensor,
    weight_VD: Tensor,
    target_M: Tensor,
    mask_MV: Tensor | None,
    state_MS: Tensor,
    buffer: Tensor,
    id_range: list[int],
    smoothing: float,
    ignore_index: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(dhidden, dweight), empty where not needed. buffer: as the forward left it; overwritten."""
    dtype, (rows, columns), (num_tokens, vocab) = buffer.dtype, buffer.shape, (len(hidden_MD), len(weight_VD))
    dhidden_MD, dweight_VD = _gradients(hidden_MD, weight_VD, buffer, needs_hidden, needs_weight)
    hidden, weight = hidden_MD.to(dtype), weight_VD.to(dtype)
    in_place = hidden_MD.dtype == torch.float32 or hidden_MD.dtype == dtype and columns >= vocab
    sums = None if in_place or not needs_hidden else dloss_M.new_empty(rows, hidden_MD.shape[1])
    for i, (group, classes) in enumerate(reversed(_tiles(num_tokens, vocab, [rows, columns]))):
        dlogits_rw = _logits(buffer, hidden[group], weight[classes], there=i == 0)
        pointers = (dlogits_rw, target_M[group], dloss_M[group], _mask_pointer(mask_MV, group), state_MS[group])
        with torch.cuda.device_of(buffer):
            _backward_kernel[(dlogits_rw.shape[0], triton.cdiv(dlogits_rw.shape[1], BLOCK))](
                *pointers, *_settings(dlogits_rw, classes, vocab, mask_MV, id_range, smoothing, ignore_index),
                BLOCK=BLOCK, num_warps=NUM_WARPS,
            )  # fmt: skip
        if needs_weight:
            add_product_(dweight_VD[classes], dlogits_rw.T, hidden[group], add=group.stop < num_tokens)
        if needs_hidden:
            sum_rD = dhidden_MD[group] if sums is None else sums[: dlogits_rw.shape[0]]
            add_product_(sum_rD, dlogits_rw, weight[classes], add=classes.stop < vocab)
            if classes.start == 0 and sums is not None:
                dhidden_MD[group] = sum_rD
    return dhidden_MD, dweight_VD.to(weight_VD.dtype)


def _gradients(
    hidden_MD: Tensor, weight_VD: Tensor, buffer: Tensor, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Not yet written, except where there is no token. The weight's is fp32 where several products add up to it."""
    one_product = len(hidden_MD) <= buffer.shape[0] and weight_VD.dtype == buffer.dtype
    dweight_VD = torch.empty_like(
        weight_VD if needs_weight else weight_VD[:0],
        dtype=weight_VD.dtype if one_product else torch.float32,
        memory_format=torch.contiguous_format,
    )
    dhidden_MD = torch.empty_like(hidden_MD if needs_hidden else hidden_MD[:0], memory_format=torch.contiguous_format)
    return dhidden_MD, dweight_VD if len(hidden_MD) else dweight_VD.zero_()


def _tiles(num_tokens: int, vocab: int, tile: list[int]) -> list[tuple[slice, slice]]:
    """(tokens, classes) of each."""
    rows, columns = tile
    return [
        (slice(at, min(at + rows, num_tokens)), slice(first, min(first + columns, vocab)))
        for at in range(0, num_tokens, rows)
        for first in range(0, vocab, columns)
    ]


def _logits(buffer: Tensor, hidden_rD: Tensor, weight_wD: Tensor, there: bool = False) -> Tensor:
    """The tile's part of the buffer [r, w], its product in it; `there`: it is in it already."""
    logits_rw = buffer[: hidden_rD.shape[0], : weight_wD.shape[0]]
    return logits_rw if there else torch.mm(hidden_rD, weight_wD.T, out=logits_rw)


def _mask_pointer(mask_MV: Tensor | None, group: slice) -> Tensor | None:
    return None if mask_MV is None else mask_MV[group].view(torch.uint8)


def _settings(
    logits_rw: Tensor,
    classes: slice,
    vocab: int,
    mask_MV: Tensor | None,
    id_range: list[int],
    smoothing: float,
    ignore_index: int,
) -> tuple[int | float, ...]:
    """What both kernels take behind their pointers, up to CONSTRAINT."""
    constraint = MASK if mask_MV is not None else RANGE if id_range else NO_CONSTRAINT
    padded = -(-logits_rw.shape[1] // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    place = (classes.start, logits_rw.shape[1], padded, logits_rw.stride(0), vocab)
    return *place, *(id_range or (0, 0)), smoothing, ignore_index, constraint


_forward_op = torch.library.custom_op("ofa_kernels::linear_cross_entropy", _forward, mutates_args=())
_forward_op.register_fake(_forward_outputs)
_backward_op = torch.library.custom_op(
    "ofa_kernels::linear_cross_entropy_backward", _backward, mutates_args=("buffer",)
)


@_backward_op.register_fake
def _backward_outputs(
    dloss_M: Tensor,
    hidden_MD: Tensor,
    weight_VD: Tensor,
    target_M: Tensor,
    mask_MV: Tensor | None,
    state_MS: Tensor,
    buffer: Tensor,
    id_range: list[int],
    smoothing: float,
    ignore_index: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    dhidden_MD, dweight_VD = _gradients(hidden_MD, weight_VD, buffer, needs_hidden, needs_weight)
    return dhidden_MD, dweight_VD.to(weight_VD.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # The weight is saved as the parameter that it is: under ZeRO-3 the backward finds what is gathered by then.
    hidden_MD, weight_VD, target_M, mask_MV, *ctx.options = inputs
    _, nll_M, correct_M, state_MS, buffer = output
    ctx.save_for_backward(hidden_MD, weight_VD, target_M, mask_MV, state_MS, buffer)
    ctx.mark_non_differentiable(nll_M, correct_M, state_MS, buffer)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dloss_M: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dloss_M is None:
        return (None,) * 9
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    dhidden_MD, dweight_VD = _backward_op(
        dloss_M.contiguous(), *ctx.saved_tensors, *ctx.options[:3], needs_hidden, needs_weight
    )
    return dhidden_MD if needs_hidden else None, dweight_VD if needs_weight else None, *(None,) * 7


_forward_op.register_autograd(_autograd, setup_context=_save)


def compile_cases() -> list[CompileCase]:
    """All that is launched for the preset vocabulary; the width is that of its padded rows."""
    size = -(-59457 // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    types = dict.fromkeys("first width padded stride vocab start_id end_id ignore_index".split(), "i32")
    types |= {"smoothing": "fp32", "logits_ptr": "*x", "target_ptr": "*i64"}
    types |= dict.fromkeys(("state_ptr", "loss_ptr", "nll_ptr", "dloss_ptr"), "*fp32")
    types |= dict.fromkeys(("mask_ptr", "correct_ptr"), "*u8")
    names = {NO_CONSTRAINT: "", RANGE: ", range", MASK: ", mask"}
    kernels = {"vocabulary loss forward": _forward_kernel, "vocabulary loss backward": _backward_kernel}
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
        )
        for kernel, function in kernels.items()
        for constraint in names
        for dtype in (torch.bfloat16, torch.float16)
    ]
