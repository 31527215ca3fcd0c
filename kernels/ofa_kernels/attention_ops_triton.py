"""Launches of the kernels in `attention_triton`: the plan of a batch and the torch.library operators.

Fake versions give shapes alone, so torch.compile and fake tensors see through the operators. Shapes as in the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ofa_kernels import attention_triton as kernels
from ofa_kernels.attention_plan import RelativeCodes, Tokens


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
    counts = (offsets.diff() + kernels.OWNED - 1) // kernels.OWNED
    ends = counts.cumsum(0)
    tile = torch.arange(num_tokens // kernels.OWNED + num_examples, device=offsets.device)
    example = torch.searchsorted(ends, tile, right=True)
    first = torch.cat([ends - counts, ends[-1:]])[example]
    return torch.stack([example, (tile - first) * kernels.OWNED], 1)


def _form(q: Tensor, head_scale: Tensor, pq: Tensor, num_entries: int, causal: bool, dropout: float) -> kernels.Form:
    return kernels.Form(q.shape[1] // head_scale.shape[0], pq.numel() > 0, num_entries > 0, causal, dropout > 0)


def _launch(kernel: object, side: Side, num_heads: int, arguments: list[object], constants: dict[str, object]) -> None:
    kernel[len(side.tiles), num_heads](
        *arguments, **constants, num_warps=kernels.NUM_WARPS, num_stages=kernels.NUM_STAGES
    )


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
    _launch(kernels.forward_kernel, queries, num_heads, arguments, form.constants(form.forward_step()))
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
    kernels.delta_kernel[len(q), num_heads](out, dout, delta, len(q), HEAD_DIM=form.head_dim, BLOCK=block, num_warps=1)
    inputs = [q, k, v, pq, pk, row, head_scale, seed, dout, lse, delta]
    places = [queries.position, keys.position, queries.code, keys.code]
    numbers = [
        len(queries.offsets) - 1, q.shape[0], q.stride(0), k.stride(0), v.stride(0), q.shape[1], num_entries, scale,
        dropout,
    ]  # fmt: skip
    arguments = [*inputs, fixed, queries.offsets, keys.offsets, queries.tiles, *places, dq, dpq, drow, dscale, *numbers]
    for step, grads in form.query_passes(deterministic):
        _launch(kernels.queries_kernel, queries, num_heads, arguments, form.constants(step) | grads)
    arguments = [*inputs, queries.offsets, keys.offsets, keys.tiles, *places, dk, dv, dpk, *numbers]
    for grads in form.key_passes():
        _launch(kernels.keys_kernel, keys, num_heads, arguments, form.constants(form.keys_step()) | grads)
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
    kernels.gather_sum_kernel[grid](x_ND, side.order, side.starts, out_UD, width, BLOCK=block)
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
