"""Label-smoothed cross-entropy of a linear layer's output, in chunks of rows.

    x = h W^T,  eps_i = eps / (V - 1)
    loss = (1 - eps - eps_i) * (lse(x) - x[y]) + eps_i * sum_v (lse(x) - x[v])
    dx   = softmax(x) - (1 - eps - eps_i) * onehot(y) - eps_i            times dloss

Shapes: M target tokens, D channels, V vocabulary. Rows with y == ignore_index have loss 0 and no gradient, and are left
out of the products. At most `chunk` rows of logits exist at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""Default size of a chunk of logits: 64 MiB in fp32."""


def linear_cross_entropy(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    target_M: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = 1,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, nll, correct) of each token: two [M] in at least fp32, unreduced, and [M] bool; only loss has a gradient.

    chunk: rows of logits held at once; None for what fits 64 MiB. The gradient of the weight is computed in the
    backward and accumulated in at least fp32. Raises ValueError where shapes disagree.
    """
    if hidden_MD.shape[0] != target_M.shape[0] or hidden_MD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: want hidden [M, D], weight [V, D], target [M], got {tuple(hidden_MD.shape)}, "
            f"{tuple(weight_VD.shape)}, {tuple(target_M.shape)}"
        )
    chunk = chunk or max(1, CHUNK_ELEMENTS // weight_VD.shape[0])
    return _LinearCrossEntropy.apply(hidden_MD, weight_VD, target_M, label_smoothing, ignore_index, chunk)


def linear_cross_entropy_ref(
    hidden_MD: Tensor, weight_VD: Tensor, target_M: Tensor, label_smoothing: float, ignore_index: int
) -> Tensor:
    """Oracle for the loss [M] in plain torch, in the dtype it is given, with all logits at once."""
    logp_MV = (hidden_MD @ weight_VD.T).log_softmax(-1)
    eps_i = label_smoothing / (weight_VD.shape[0] - 1)
    ignored_M = target_M == ignore_index
    nll_M = -logp_MV.gather(-1, target_M.masked_fill(ignored_M, 0)[:, None])[:, 0]
    loss_M = (1 - label_smoothing - eps_i) * nll_M - eps_i * logp_MV.sum(-1)
    return loss_M.masked_fill(ignored_M, 0.0)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        target_M: Tensor,
        smoothing: float,
        ignore_index: int,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(hidden_MD.dtype, torch.float32)
        loss_M, nll_M = (torch.zeros(target_M.shape, dtype=wide, device=target_M.device) for _ in range(2))
        correct_M = torch.zeros_like(target_M, dtype=torch.bool)
        kept = (target_M != ignore_index).nonzero()[:, 0]
        eps_i = smoothing / (weight_VD.shape[0] - 1)
        logp_cV = None
        for rows in kept.split(chunk):
            logp_cV = (hidden_MD[rows] @ weight_VD.T).to(wide).log_softmax(-1)
            target_logp_c = logp_cV.gather(1, target_M[rows, None])[:, 0]
            nll_M[rows] = -target_logp_c
            loss_c = (smoothing + eps_i - 1) * target_logp_c
            if smoothing:
                loss_c -= eps_i * logp_cV.sum(-1)
            loss_M[rows] = loss_c
            correct_M[rows] = target_logp_c >= logp_cV.amax(-1)  # argmax is several times slower on a CPU
        only_chunk = logp_cV if len(kept) <= chunk else None  # saves computing it again
        ctx.save_for_backward(hidden_MD, weight_VD, target_M, kept, only_chunk)
        ctx.smoothing, ctx.chunk = smoothing, chunk
        ctx.mark_non_differentiable(nll_M, correct_M)
        return loss_M, nll_M, correct_M

    @staticmethod
    def backward(ctx: Any, dloss_M: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_MD, weight_VD, target_M, kept, only_chunk = ctx.saved_tensors
        wide = dloss_M.dtype
        eps_i = ctx.smoothing / (weight_VD.shape[0] - 1)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dhidden_MD = torch.zeros_like(hidden_MD) if needs_hidden else None
        dweight_VD = None
        for rows in kept.split(ctx.chunk):
            hidden_cD = hidden_MD[rows]
            if only_chunk is not None:
                dlogits_cV = only_chunk.exp()
            else:
                dlogits_cV = (hidden_cD @ weight_VD.T).to(wide).softmax(-1)
            if ctx.smoothing:
                dlogits_cV.sub_(eps_i)
            hit_c1 = torch.full_like(rows[:, None], ctx.smoothing + eps_i - 1, dtype=wide)
            dlogits_cV.scatter_add_(1, target_M[rows, None], hit_c1)
            dlogits_cV = dlogits_cV.mul_(dloss_M[rows, None]).to(weight_VD.dtype)
            if needs_hidden:
                dhidden_MD[rows] = dlogits_cV @ weight_VD
            if needs_weight:
                part_VD = (dlogits_cV.T @ hidden_cD).to(wide)
                dweight_VD = part_VD if dweight_VD is None else dweight_VD.add_(part_VD)
        if needs_weight:
            dweight_VD = torch.zeros_like(weight_VD) if dweight_VD is None else dweight_VD.to(weight_VD.dtype)
        return dhidden_MD, dweight_VD, None, None, None, None
