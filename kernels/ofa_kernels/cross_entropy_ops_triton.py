"""The loss of `cross_entropy` by the kernels of `cross_entropy_triton`, a tile of logits at a time.

Here are its tiles, products and launches, its autograd function and, for torch.compile, its operators. Eager calls go
through the `autograd.Function`, which costs the host a third of a torch.library operator.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ofa_kernels import cross_entropy_triton as kernels
from ofa_kernels._cross_entropy_parts import add_product_
from ofa_kernels._launch import in_graph

TILE_AND_SUM_BYTES = 84 << 20
"""Of a tile and of the fp32 gradients of its tokens. With a partial product (8 MiB) and the state it stays < 100 MB."""
DEVICE_SHARE = 256
"""One part in so many of a GPU's memory may be logits where that saves a good part of a product: 160 MiB of 40 GiB.
Of all its memory and not of what is free: the tiles decide the order of sums, so they are the same in every run."""
SUM_BYTES = 48 << 20
"""Of these gradients at most: it limits the tokens of a group (16,384 at width 768, 4,915 at 2560)."""


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
    budget = _device_budget(hidden_MD.device)
    tile = tile_shape(target_M.shape[0], *weight_VD.shape, dtype.itemsize, chunk, budget)
    inputs = (
        hidden_MD, weight_VD, target_M, mask_MV, list(id_range or ()), float(smoothing), ignore_index, list(tile), dtype
    )  # fmt: skip
    return _forward_op(*inputs)[:3] if in_graph(hidden_MD) else _Loss.apply(*inputs)


@torch.compiler.assume_constant_result
@functools.cache
def _device_budget(device: torch.device) -> int:
    """Bytes of logits that a GPU may hold, the same in every run; without one, tiles are those of any device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    return torch.cuda.get_device_properties(device).total_memory // DEVICE_SHARE


def tile_shape(
    num_tokens: int, vocab: int, dim: int, item_bytes: int, chunk: int | None, budget: int = 0
) -> tuple[int, int]:
    """(tokens, columns) of the largest tile that the memory has room for; all tiles have about one size.

    budget: bytes for a tile where twice as many hold all logits: about half of them are kept then, or all, which is 3
    to 3.7 products for forward and backward. More tokens take 4 and less than 100 MB, as they do without a budget.
    """
    all_columns = -(-vocab // kernels.COLUMN_MULTIPLE) * kernels.COLUMN_MULTIPLE
    all_bytes = all_columns * num_tokens * item_bytes
    limit = max(budget, TILE_AND_SUM_BYTES) if chunk is None and all_bytes <= 2 * budget else TILE_AND_SUM_BYTES
    if chunk is not None:
        rows = min(num_tokens, chunk)
    elif all_bytes <= limit:
        rows = num_tokens
    else:
        rows = _even_share(num_tokens, max(kernels.ROW_MULTIPLE, SUM_BYTES // (4 * dim)), kernels.ROW_MULTIPLE)
    row_bytes = max(rows, 1) * item_bytes
    sum_bytes = 4 * dim * rows if item_bytes < 4 and row_bytes * all_columns > limit else 0
    columns = (limit - sum_bytes) // row_bytes // kernels.COLUMN_MULTIPLE * kernels.COLUMN_MULTIPLE
    return max(rows, 1), _even_share(vocab, max(columns, kernels.COLUMN_MULTIPLE), kernels.COLUMN_MULTIPLE)


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
            kernels.forward_kernel[(logits_rw.shape[0],)](
                *pointers, loss_M[group], nll_M[group], correct_M[group].view(torch.uint8),
                *_settings(logits_rw, classes, weight_VD.shape[0], mask_MV, id_range, smoothing, ignore_index),
                BLOCK=kernels.BLOCK, num_warps=kernels.NUM_WARPS, enable_fp_fusion=True,
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
    state_MS = hidden_MD.new_empty(num_tokens, kernels.STATE, dtype=torch.float32)
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
            kernels.backward_kernel[(dlogits_rw.shape[0], triton.cdiv(dlogits_rw.shape[1], kernels.BLOCK))](
                *pointers, *_settings(dlogits_rw, classes, vocab, mask_MV, id_range, smoothing, ignore_index),
                BLOCK=kernels.BLOCK, num_warps=kernels.NUM_WARPS, enable_fp_fusion=True,
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
    constraint = kernels.MASK if mask_MV is not None else kernels.RANGE if id_range else kernels.NO_CONSTRAINT
    padded = -(-logits_rw.shape[1] // kernels.COLUMN_MULTIPLE) * kernels.COLUMN_MULTIPLE
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
    ctx.mark_non_differentiable(nll_M, correct_M)
    ctx.set_materialize_grads(False)


def _autograd(
    ctx: Any, dloss_M: Tensor | None, *_: Tensor | None, run: Any = _backward_op
) -> tuple[Tensor | None, ...]:
    if dloss_M is None:
        return (None,) * 9
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    dhidden_MD, dweight_VD = run(dloss_M.contiguous(), *ctx.saved_tensors, *ctx.options[:3], needs_hidden, needs_weight)
    return dhidden_MD if needs_hidden else None, dweight_VD if needs_weight else None, *(None,) * 7


_forward_op.register_autograd(_autograd, setup_context=_save)


class _Loss(torch.autograd.Function):
    """The same past torch.library, for eager calls: a third of the host's time."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output[:3]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return _autograd(ctx, *gradients, run=_backward_in_place)


def _backward_in_place(*inputs: Any) -> tuple[Tensor, Tensor]:
    """`_backward`, and torch told that the buffer is another one now."""
    gradients = _backward(*inputs)
    torch.autograd.graph.increment_version(inputs[6])
    return gradients
