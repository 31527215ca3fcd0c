"""OFA's attention over packed examples, all three kinds, in one function.

    logits = scale * q.k + scale * pos_q.pos_k + row[key code - query code],  out = c_attn * softmax(logits) v

The positional vectors exist once per *position*, not per token, and are shared by all layers; `row` is one line per
head and layer that holds both of OFA's relative tables (docs/ofa.md, Model: relative buckets; the codes are those of
`ofa_ds.model.positions`). Tokens of different examples never see each other. `plan_attention` is called once per
batch and kind, `position_logits` once per forward, `attention` in every layer.

On a GPU that is the Triton kernels of `attention_triton.py`, chosen when the plan is made. Here is the plain-torch
reference and the CPU path: it pads inside the call, into buckets of examples of similar length. Shapes: N query tokens,
M key tokens, E examples, H heads, d head dim, U and V rows of query and key positions, R entries of `row`; inside a
bucket b examples of Q queries and K keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ofa_kernels._launch import product_dtype, use_triton
from ofa_kernels.attention_plan import MASKED, AttentionPlan, Bucket, RelativeCodes, Tokens, plan_padded

if TYPE_CHECKING:
    from ofa_kernels.attention_plan_triton import TritonPlan

    Plan = AttentionPlan | TritonPlan

__all__ = [
    "AttentionPlan",
    "RelativeCodes",
    "Tokens",
    "attention",
    "plan_attention",
    "position_logits",
    "position_terms",
    "relative_logits",
]


def plan_attention(
    queries: Tokens,
    keys: Tokens,
    *,
    relative: RelativeCodes | None,
    causal: bool,
    kind: Tensor | None = None,
    kernel: str = "auto",
    like: Tensor | None = None,
) -> Plan:
    """Once per batch and kind of attention: where tokens go, for the implementation that will run.

    kind [E]: the reference pads examples of different kinds apart. For self-attention pass the same object as queries
    and keys. kernel: see `ofa_kernels._launch.KERNELS`; like: a tensor on the device and in the dtype of q, without
    which "auto" is torch.
    Raises ValueError for an example that has queries but no keys (the kernels give it zeros, without looking).
    """
    like = queries.position if like is None else like
    if use_triton(kernel, like, dtype=product_dtype(like)):
        from ofa_kernels.attention_plan_triton import plan_triton

        return plan_triton(queries, keys, relative=relative, causal=causal)
    return plan_padded(queries, keys, relative=relative, causal=causal, kind=kind)


def position_terms(pos_q_UD: Tensor, pos_k_VD: Tensor, num_heads: int, scale: float, plan: Plan) -> tuple[Tensor, ...]:
    """What `attention` wants as `positions`, once per forward: the kernels never hold the logits.

    They get the vectors, and again in fp32, so that the gradients of all layers add up there.
    """
    if isinstance(plan, AttentionPlan):
        return position_logits(pos_q_UD, pos_k_VD, num_heads, scale)
    return _wide(pos_q_UD), _wide(pos_k_VD), pos_q_UD.detach(), pos_k_VD.detach()


def position_logits(pos_q_UD: Tensor, pos_k_VD: Tensor, num_heads: int, scale: float) -> tuple[Tensor]:
    """The absolute term as the reference wants it: (logits [H, U, V] in at least fp32,)."""
    q_HUd = _wide(pos_q_UD).view(pos_q_UD.shape[0], num_heads, -1).transpose(0, 1)
    k_HdV = _wide(pos_k_VD).view(pos_k_VD.shape[0], num_heads, -1).permute(1, 2, 0)
    return (torch.matmul(q_HUd, k_HdV) * scale,)


def relative_logits(row_HR: Tensor, codes: RelativeCodes) -> Tensor:
    """The relative term of every pair of positions, [H, U, V], for a caller that does not use `attention`."""
    return _look_up(row_HR, codes.row_index()).view(row_HR.shape[0], len(codes.query), len(codes.key))


def attention(
    qkv: tuple[Tensor, Tensor, Tensor],
    plan: Plan,
    positions: tuple[Tensor, ...],
    row_HR: Tensor | None,
    head_scale_H: Tensor,
    *,
    scale: float,
    dropout: float,
) -> Tensor:
    """Attention of each example over itself or over its own keys -> [N, H * d], in the dtype of q.

    qkv: q [N, H * d], k and v [M, H * d]. positions: from `position_terms`, or () for none. row_HR: the relative
    term of this layer, or None. Softmax runs in at least fp32. Raises ValueError where shapes and plan disagree.
    """
    q_ND, k_MD, v_MD = qkv
    if q_ND.shape[0] != plan.num_queries or k_MD.shape[0] != plan.num_keys:
        raise ValueError(
            f"attention: the plan is for {plan.num_queries} queries and {plan.num_keys} keys, got q "
            f"{tuple(q_ND.shape)} and k {tuple(k_MD.shape)}; plan again for this batch"
        )
    if (row_HR is None) == plan.is_relative:
        raise ValueError(
            "attention: want a relative row exactly where the plan has relative codes; pass both or neither"
        )
    if not isinstance(plan, AttentionPlan):
        from ofa_kernels.attention_ops_triton import attention_triton

        return attention_triton(qkv, plan, positions, row_HR, head_scale_H, scale=scale, dropout=dropout)
    absolute_HUV = positions[0] if positions else None
    return _PackedAttention.apply(q_ND, k_MD, v_MD, absolute_HUV, row_HR, head_scale_H, (plan, scale, dropout))


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_ND: Tensor,
        k_MD: Tensor,
        v_MD: Tensor,
        absolute_HUV: Tensor | None,
        row_HR: Tensor | None,
        head_scale_H: Tensor,
        settings: tuple[AttentionPlan, float, float],
    ) -> Tensor:
        plan, scale, dropout = settings
        num_heads = head_scale_H.shape[0]
        q, k, v = (
            _pad(x, gather) for x, gather in ((q_ND, plan.query_token), (k_MD, plan.key_token), (v_MD, plan.key_token))
        )
        bias_HX = _bias(absolute_HUV, row_HR, plan)
        out = q.new_empty(q.shape[0], num_heads, q.shape[1] // num_heads)
        saved: list[Tensor | None] = []
        for bucket in plan.buckets:
            q_h, k_h, v_h = bucket.queries(q, num_heads), bucket.keys(k, num_heads), bucket.keys(v, num_heads)
            probs = _logits(q_h, k_h, bias_HX, bucket, scale).softmax(-1)
            kept = None
            if dropout:
                kept = torch.empty_like(probs).bernoulli_(1 - dropout).div_(1 - dropout)
            o_h = torch.bmm(probs if kept is None else probs * kept, v_h)
            bucket.put_queries(out, o_h)
            saved += [q_h, k_h, v_h, probs, kept]
        out_NHd = out.index_select(0, plan.query_slot)
        ctx.save_for_backward(out_NHd, head_scale_H, *saved)
        ctx.plan, ctx.scale, ctx.dtype = plan, scale, q_ND.dtype
        ctx.bias_meta = [None if x is None else (x.shape, x.dtype) for x in (absolute_HUV, row_HR)]
        return (out_NHd * head_scale_H[:, None]).flatten(1).to(q_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_ND: Tensor) -> tuple[Tensor | None, ...]:
        out_NHd, head_scale_H, *saved = ctx.saved_tensors
        plan: AttentionPlan = ctx.plan
        num_heads = head_scale_H.shape[0]
        dout_NHd = _wide(dout_ND).view_as(out_NHd)
        dhead_H = (dout_NHd * out_NHd).sum((0, 2)).to(head_scale_H.dtype)
        with_zero = dout_NHd.new_zeros(plan.num_queries + 1, *dout_NHd.shape[1:])
        torch.mul(dout_NHd, head_scale_H[:, None], out=with_zero[:-1])
        dout = with_zero.flatten(1).index_select(0, plan.query_source)
        dq, dk, dv = (
            dout.new_empty(token.shape[0], *out_NHd.shape[1:]) for token in (plan.query_token, *[plan.key_token] * 2)
        )
        has_bias = any(meta is not None for meta in ctx.bias_meta)
        dbias_HX = dout.new_zeros(num_heads, plan.num_position_pairs) if has_bias else None
        for i, bucket in enumerate(plan.buckets):
            q_h, k_h, v_h, probs, kept = saved[5 * i : 5 * i + 5]
            do_h = bucket.queries(dout, num_heads)
            dv_h = torch.bmm((probs if kept is None else probs * kept).transpose(1, 2), do_h)
            dprobs = torch.bmm(do_h, v_h.transpose(1, 2))
            if kept is not None:
                dprobs.mul_(kept)
            dlogits = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype)
            bucket.put_queries(dq, torch.baddbmm(q_h, dlogits, k_h, beta=0, alpha=ctx.scale))
            bucket.put_keys(dk, torch.baddbmm(k_h, dlogits.transpose(1, 2), q_h, beta=0, alpha=ctx.scale))
            bucket.put_keys(dv, dv_h)
            if dbias_HX is not None:
                bucket.add_bias_grad(dbias_HX, dlogits)
        dq_ND = dq.flatten(1).index_select(0, plan.query_slot).to(ctx.dtype)
        dk_MD, dv_MD = (x.flatten(1).index_select(0, plan.key_slot).to(ctx.dtype) for x in (dk, dv))
        return dq_ND, dk_MD, dv_MD, *_bias_grads(dbias_HX, plan, ctx.bias_meta), dhead_H, None


def _wide(x: Tensor) -> Tensor:
    """In fp32 where it is narrower."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _pad(x_ND: Tensor, token: Tensor) -> Tensor:
    """Rows on the padded axis; a pad repeats row 0, which the mask then hides."""
    return _wide(x_ND.index_select(0, token))


def _bias(absolute_HUV: Tensor | None, row_HR: Tensor | None, plan: AttentionPlan) -> Tensor | None:
    """Both positional terms for every pair of positions -> [H, U * V], or None where there is neither."""
    bias_HX = None if absolute_HUV is None else absolute_HUV.flatten(1)
    if row_HR is None:
        return bias_HX
    relative_HX = _look_up(row_HR, plan.row_index)
    return relative_HX if bias_HX is None else relative_HX.add_(bias_HX)


def _look_up(row_HR: Tensor, row_index: Tensor) -> Tensor:
    with_zero = torch.nn.functional.pad(_wide(row_HR), (0, 1))  # pairs of different kinds point at the last entry
    return with_zero.index_select(1, row_index)


def _bias_grads(dbias_HX: Tensor | None, plan: AttentionPlan, metas: list[Any]) -> tuple[Tensor | None, Tensor | None]:
    absolute, row = metas
    dabsolute = drow = None
    if absolute is not None:
        dabsolute = dbias_HX.view(absolute[0]).to(absolute[1])
    if row is not None:
        num_heads, num_entries = row[0]
        with_zero = dbias_HX.new_zeros(num_heads, num_entries + 1)
        with_zero.scatter_add_(1, plan.row_index.expand(num_heads, -1), dbias_HX)
        drow = with_zero[:, :-1].to(row[1])
    return dabsolute, drow


def _logits(q_h: Tensor, k_h: Tensor, bias_HX: Tensor | None, bucket: Bucket, scale: float) -> Tensor:
    """[H * b, Q, K]. The bias is laid down first and the product accumulates onto it: one pass less."""
    num_heads = q_h.shape[0] // bucket.num_examples
    shape = (num_heads, bucket.num_examples, bucket.num_queries, bucket.num_keys)
    base = None
    if bias_HX is not None:
        base = bias_HX if bucket.bias_index is None else bias_HX.index_select(1, bucket.bias_index)
        base = base.view(num_heads, -1, *shape[2:])
    if bucket.causal_mask is not None:
        base = q_h.new_zeros(1, 1, *shape[2:]) if base is None else base
        base = base.masked_fill(bucket.causal_mask, MASKED)
    if bucket.key_mask is not None:
        key_mask = bucket.key_mask.to(q_h.dtype)
        base = key_mask if base is None else base + key_mask
    if base is None:
        return torch.baddbmm(q_h.new_empty(()), q_h, k_h.transpose(1, 2), beta=0, alpha=scale)
    if base is bias_HX or base.shape != shape or base._is_view():  # written to below: it must be a copy, and whole
        base = base.expand(shape).clone(memory_format=torch.contiguous_format)
    return base.view(-1, *shape[2:]).baddbmm_(q_h, k_h.transpose(1, 2), alpha=scale)
