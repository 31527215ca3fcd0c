"""Launches of the kernels in `attention_triton`, their autograd function and, for torch.compile, their operators.

Eager calls go through an `autograd.Function`, which costs the host a third of a torch.library operator; the operators
are for graphs: their fake versions give shapes alone. Shapes as in the kernels. A pointer that a form does not read is
None.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ofa_kernels import attention_triton as kernels
from ofa_kernels._launch import in_graph
from ofa_kernels._launch_triton import Constants, ceil_div, launch
from ofa_kernels.attention_plan_triton import Side, TritonPlan
from ofa_kernels.attention_row_ops_triton import RowSum, launch_delta

Vectors = tuple[Tensor | None, Tensor | None]
"""Positional vectors of queries [U, D] and keys [V, D] in the dtype of q, or None."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a call has beside its tensors with gradients."""

    plan: TritonPlan
    vectors: Vectors
    seed: Tensor | None
    """[1] int64 on the device; None without dropout."""
    scale: float
    dropout: float


@dataclass(frozen=True, slots=True)
class Launches:
    """Constants of every launch of one form."""

    form: kernels.Form
    forward: Constants
    queries: Constants
    keys: list[Constants]


@functools.cache
def _launches(
    device: torch.device, head_dim: int, positions: bool, relative: bool, causal: bool, dropout: bool
) -> Launches:
    arch = 10 * torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 80
    form = kernels.Form(head_dim, positions, relative, causal, dropout, arch)
    common = {"num_warps": kernels.NUM_WARPS, "num_stages": kernels.NUM_STAGES}
    return Launches(
        form,
        Constants(form.constants(form.forward_step()) | common),
        Constants(form.constants(form.queries_step()) | common),
        [Constants(form.constants(form.keys_step()) | grads | common) for grads in form.key_passes()],
    )


def _launches_of(call: Call, q: Tensor, num_heads: int) -> Launches:
    plan = call.plan
    return _launches(
        q.device, q.shape[1] // num_heads, call.vectors[0] is not None, plan.is_relative, plan.causal, call.dropout > 0
    )


def _inputs(q: Tensor, k: Tensor, v: Tensor, row: Tensor | None, head_scale: Tensor, call: Call) -> list[Any]:
    return [q, k, v, *call.vectors, row, head_scale, call.seed]


def _places(plan: TritonPlan) -> list[Tensor | None]:
    codes = (None, None) if plan.relative is None else (plan.relative.query_code, plan.relative.key_code)
    return [plan.queries.position, plan.keys.position, *codes]


def _numbers(q: Tensor, k: Tensor, v: Tensor, call: Call) -> list[float]:
    num_examples = call.plan.queries.offsets.shape[0] - 1
    strides = (q.stride(0), k.stride(0), v.stride(0), q.shape[1])
    return [num_examples, q.shape[0], *strides, call.plan.num_entries, call.scale, call.dropout]


def _prepare_row(row_HR: Tensor) -> Tensor:
    """The relative row as the kernels read it, fp32 [H, R + 2]: in base 2, then no bias, then the bias of no key."""
    no_bias = torch.nn.functional.pad(row_HR.float() * math.log2(math.e), (0, 1))
    return torch.nn.functional.pad(no_bias, (0, 1), value=kernels.MASKED)


def forward(
    q: Tensor, k: Tensor, v: Tensor, row: Tensor | None, head_scale: Tensor, call: Call
) -> tuple[Tensor, Tensor]:
    """(out [N, D] in the dtype of q, lse [H, N + 1]). row: from `_prepare_row`."""
    plan, num_heads = call.plan, head_scale.shape[0]
    out = q.new_empty(q.shape)
    lse = q.new_empty((num_heads, q.shape[0] + 1), dtype=torch.float32)
    arguments = [
        *_inputs(q, k, v, row, head_scale, call), plan.queries.offsets, plan.keys.offsets, plan.queries.tiles,
        *_places(plan), out, lse, *_numbers(q, k, v, call),
    ]  # fmt: skip
    with torch.cuda.device_of(q):
        grid = (plan.queries.tiles.shape[0], num_heads)
        launch(kernels.forward_kernel, grid, arguments, _launches_of(call, q, num_heads).forward)
    return out, lse


def backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, row: Tensor | None, head_scale: Tensor,
    call: Call,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of q, k, v, the vectors [U, D] and [V, D] and row [H, R] in fp32, head_scale [H]; None for none."""
    plan, num_heads, launches = call.plan, head_scale.shape[0], _launches_of(call, q, head_scale.shape[0])
    queries, keys, form = plan.queries, plan.keys, launches.form
    dq, dk, dv = (q.new_empty(x.shape) for x in (q, k, v))
    dpq = dpk = None
    if form.positions:
        dpq, dpk = (q.new_empty(x.shape, dtype=kernels.per_token(q.dtype)) for x in (q, k))
    dscale = lse.new_empty((num_heads, keys.tiles.shape[0]))
    delta = lse.new_empty((num_heads, q.shape[0]))
    row_sum = RowSum(q, head_scale, plan, call.dropout) if form.relative else None
    inputs = [*_inputs(q, k, v, row, head_scale, call), dout, lse, delta]
    places, numbers = _places(plan), _numbers(q, k, v, call)
    with torch.cuda.device_of(q):
        launch_delta(out, dout, v, delta, None if row_sum is None else row_sum.longest)
        dlogits, pitch = (None, 0) if row_sum is None else (row_sum.dlogits, row_sum.pitch)
        offsets = (queries.offsets, keys.offsets)
        for first, count in [(0, num_heads)] if row_sum is None else row_sum.groups():
            arguments = [
                *inputs, *offsets, queries.tiles, *places, dq, dpq, dlogits, first, num_heads, pitch, *numbers
            ]  # fmt: skip
            launch(kernels.queries_kernel, (queries.tiles.shape[0], count), arguments, launches.queries)
            if row_sum is not None:
                row_sum.add(first, count)
        arguments = [*inputs, *offsets, keys.tiles, *places, dk, dv, dpk, dscale, *numbers]
        for constants in launches.keys:
            launch(kernels.keys_kernel, (keys.tiles.shape[0], num_heads), arguments, constants)
        if form.positions:
            dpq, dpk = _sum_of_positions(dpq, queries), _sum_of_positions(dpk, keys)
        drow = None if row_sum is None else row_sum.finish()
    return dq, dk, dv, dpq, dpk, drow, dscale.sum(1).to(head_scale.dtype)


@functools.cache
def _gather_constants(width: int) -> Constants:
    return Constants(BLOCK=min(1024, triton.next_power_of_2(width)))


def _sum_of_positions(x_ND: Tensor, side: Side) -> Tensor:
    width = x_ND.shape[1]
    out_UD = x_ND.new_empty((side.starts.shape[0] - 1, width), dtype=torch.float32)
    constants = _gather_constants(width)
    grid = (out_UD.shape[0], ceil_div(width, constants["BLOCK"]))
    launch(kernels.gather_sum_kernel, grid, (x_ND, side.order, side.starts, out_UD, width), constants)
    return out_UD


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, pq: Tensor | None, pk: Tensor | None, row_HR: Tensor | None,
        head_scale: Tensor, call: Call,
    ) -> Tensor:  # fmt: skip
        """pq and pk carry the gradients of `call.vectors`."""
        row = None if row_HR is None else _prepare_row(row_HR)
        out, lse = forward(q, k, v, row, head_scale, call)
        ctx.save_for_backward(out, lse, q, k, v, row, head_scale)
        ctx.call, ctx.row_dtype = call, None if row_HR is None else row_HR.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dout = dout if dout.is_contiguous() else dout.contiguous()
        *grads, drow, dscale = backward(dout, *ctx.saved_tensors, ctx.call)
        return *grads, None if drow is None else drow.to(ctx.row_dtype), dscale, None


@torch.library.custom_op("ofa_kernels::attention_forward", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, pq: Tensor | None, pk: Tensor | None, row_HR: Tensor | None, head_scale: Tensor,
    pq_low: Tensor | None, pk_low: Tensor | None, seed: Tensor | None, plan: list[Tensor], num_entries: int,
    causal: bool, scale: float, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rebuilt = TritonPlan.from_tensors(plan, (len(q), len(k)), num_entries, causal)
    row = None if row_HR is None else _prepare_row(row_HR)
    return forward(q, k, v, row, head_scale, Call(rebuilt, (pq_low, pk_low), seed, scale, dropout))


@_forward_op.register_fake
def _forward_fake(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((others[5].shape[0], q.shape[0] + 1), dtype=torch.float32)


@torch.library.custom_op("ofa_kernels::attention_backward", mutates_args=())
def _backward_op(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, row_HR: Tensor | None, head_scale: Tensor,
    pq_low: Tensor | None, pk_low: Tensor | None, seed: Tensor | None, plan: list[Tensor], num_entries: int,
    causal: bool, scale: float, dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `backward`, with an empty tensor for no gradient, and the row's in its own dtype."""
    rebuilt = TritonPlan.from_tensors(plan, (len(q), len(k)), num_entries, causal)
    row = None if row_HR is None else _prepare_row(row_HR)
    call = Call(rebuilt, (pq_low, pk_low), seed, scale, dropout)
    *grads, drow, dscale = backward(dout, out, lse, q, k, v, row, head_scale, call)
    drow = None if drow is None else drow.to(row_HR.dtype)
    return tuple(lse.new_empty(0) if x is None else x for x in (*grads, drow, dscale))


@_backward_op.register_fake
def _backward_fake(dout: Tensor, out: Tensor, lse: Tensor, *others: Any) -> tuple[Tensor, ...]:
    q, k, v, row_HR, head_scale, *vectors = others[:7]
    wide = (lse.new_empty(0 if x is None else x.shape) for x in vectors)
    drow = lse.new_empty(0) if row_HR is None else row_HR.new_empty(row_HR.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v)), *wide, drow, head_scale.new_empty(head_scale.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, _, _, row_HR, head_scale, pq_low, pk_low, seed, plan, *ctx.settings = inputs
    ctx.save_for_backward(*output, q, k, v, row_HR, head_scale, pq_low, pk_low, seed, *plan)


def _autograd(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    grads = _backward_op(dout.contiguous(), *saved[:10], list(saved[10:]), *ctx.settings)
    none = (False, False, False, saved[7] is None, saved[7] is None, saved[5] is None, False)
    grads = [None if nothing else x for x, nothing in zip(grads, none, strict=True)]
    return *grads, None, None, None, [None] * len(saved[10:]), *[None] * len(ctx.settings)


_forward_op.register_autograd(_autograd, setup_context=_setup_context)


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
    """`attention` of a TritonPlan. positions: (pos_q [U, D], pos_k [V, D], the same two in the dtype of q) or ().

    The first two have the gradient, in fp32 where q is narrower. Raises ValueError for fp64.
    """
    dtype = qkv[0].dtype
    if dtype == torch.float64:
        raise ValueError("attention: kernel 'triton' computes in fp32; for float64 choose 'torch'")
    q, k, v = (x if x.dtype == dtype and x.stride(-1) == 1 else x.to(dtype).contiguous() for x in qkv)
    if not q.shape[0]:
        return q
    if not k.shape[0]:
        return torch.zeros_like(q)
    pq, pk, *low = positions or (None,) * 4
    vectors = tuple(x if x is None or x.dtype == dtype else x.to(dtype) for x in low)
    # on the device, so that nothing waits for it; drawn only where it is needed, to leave the generator alone
    seed = torch.randint(2**62, (1,), device=q.device) if dropout else None
    if in_graph(q):
        settings = (plan.num_entries, plan.causal, scale, dropout)
        return _forward_op(q, k, v, pq, pk, row_HR, head_scale_H, *vectors, seed, plan.tensors(), *settings)[0]
    return _Attention.apply(q, k, v, pq, pk, row_HR, head_scale_H, Call(plan, vectors, seed, scale, dropout))
