"""OFA's criteria on logits: label-smoothed cross entropy and the encouraging loss (docs/ofa.md, Training: criteria).

Legend: B rows, L target positions, V vocabulary, N positions that have a loss. All are sums: the caller divides.
Logits are materialised, so training comes here only for what needs them (the encouraging loss, R-Drop), with those of
positions that have a loss (`selected_loss`); all else is the chunked loss inside the model.

    p = softmax over the allowed classes, K of them; lp = conf * log p
    token loss = (1 - eps - eps_i) * -lp[target] + eps_i * sum over allowed of -lp,  eps_i = eps / (K - 1)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ofa_ds.model.allowed_ids import allowed_ids
from ofa_ds.terms import EOS_ID, NUM_SPECIAL_IDS, PAD_ID

_MIN_REST = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class Criterion:
    """What a fine-tuning recipe chooses; the defaults are plain cross entropy."""

    label_smoothing: float = 0.0
    constraint_range: tuple[int, int] | None = None
    """Allowed are the four special ids and start <= id < end."""
    ignore_prefix_tokens: int = 0
    """Positions at the start of each target that have no loss."""
    ignore_eos: bool = False
    drop_worst_ratio: float = 0.0
    """Share of the tokens left out because their loss is largest, after `drop_worst_after` updates."""
    drop_worst_after: int = 0
    rdrop_alpha: float = 0.0
    """Weight of R-Drop. If > 0 the logits have 2 B rows: the batch twice, under different dropout."""
    encouraging: bool = False
    """Add the bonus of the encouraging loss, ln(1 - p)."""
    log_end: float = 0.75
    """Where the bonus goes on as its tangent; 1 for nowhere."""
    drop_best_ratio: float | None = None
    """Share left out because their loss is smallest, after `drop_best_after` updates. 0 keeps all, ordered by loss:
    with R-Drop the two halves are then paired by rank, which is what the original's encouraging loss does. Above 0
    the halves stay pairs."""
    drop_best_after: int = 0

    @property
    def needs_logits(self) -> bool:
        """Whether each token's whole distribution is looked at, and not only its loss."""
        return self.encouraging or self.rdrop_alpha > 0

    @property
    def copies(self) -> int:
        """How often an example goes through the model."""
        return 2 if self.rdrop_alpha else 1

    def kept(self, num_tokens: int, update_num: int) -> tuple[int, int]:
        """Of so many tokens that have a loss: (how many drop_worst leaves, and drop_best of those); no loss is needed.

        update_num: updates that were made before this one.
        """
        left = num_tokens
        if self.drop_worst_ratio > 0 and update_num > self.drop_worst_after:
            left = int(left * (1 - self.drop_worst_ratio))
        best = left
        if self.drop_best_ratio is not None and update_num > self.drop_best_after:
            best = int(left * (1 - self.drop_best_ratio))
        return left, best


class TokenLosses(NamedTuple):
    """[N] each, without gradient."""

    loss_N: Tensor
    nll_N: Tensor
    correct_N: Tensor


class Loss(NamedTuple):
    """Sums over the tokens that were kept."""

    loss: Tensor
    nll: Tensor
    num_correct: Tensor
    """int64; before anything is dropped."""
    num_tokens: int
    tokens: TokenLosses
    """Of each token, before anything is dropped; for logs."""


class _Tokens(NamedTuple):
    """Positions that have a loss. logp is multiplied by conf; allowed is None where every class is."""

    logp_NV: Tensor
    target_N: Tensor
    loss_N: Tensor
    nll_N: Tensor
    allowed_NV: Tensor | None

    def take(self, index_K: Tensor) -> _Tokens:
        return _Tokens(*(None if tensor is None else tensor[index_K] for tensor in self))


def criterion_loss(
    logits_BLV: Tensor,
    target_BL: Tensor,
    criterion: Criterion,
    *,
    update_num: int = 0,
    conf_B: Tensor | None = None,
    constraint_mask_BLV: Tensor | None = None,
) -> Loss:
    """The sums of `criterion` over the positions whose target is not pad; in fp32, or the logits' precision if higher.

    conf_B scales an example's log-probabilities; constraint_mask_BLV (bool) marks the allowed classes of each position.
    """
    rows, copies = target_BL.shape[0], criterion.copies
    if logits_BLV.ndim != 3 or logits_BLV.shape[:2] != (rows * copies, target_BL.shape[1]):
        want = f"[{copies * rows}, {target_BL.shape[1]}, V]" + (", the batch twice for R-Drop" if copies == 2 else "")
        raise ValueError(f"want logits {want}, got {tuple(logits_BLV.shape)}")
    if constraint_mask_BLV is not None and criterion.constraint_range is not None:
        raise ValueError("a constraint mask and a constraint_range were given; want one of them")
    keep_BL = _has_loss(target_BL, criterion).repeat(copies, 1)
    conf_N = None if conf_B is None else conf_B.repeat(copies)[:, None].expand_as(keep_BL)[keep_BL]
    return selected_loss(
        logits_BLV[keep_BL],
        target_BL.repeat(copies, 1)[keep_BL],
        criterion,
        update_num=update_num,
        conf_N=conf_N,
        allowed_NV=_allowed(keep_BL, logits_BLV.shape[-1], criterion.constraint_range, constraint_mask_BLV, copies),
    )


def selected_loss(
    logits_NV: Tensor,
    target_N: Tensor,
    criterion: Criterion,
    *,
    update_num: int = 0,
    conf_N: Tensor | None = None,
    allowed_NV: Tensor | None = None,
) -> Loss:
    """The same of positions that all have a loss; for R-Drop all of them once, then once more in the same order.

    Chosen before the softmax: a position whose classes are all forbidden (of a prompt) would give NaN.
    """
    conf_N1 = None if conf_N is None else conf_N[:, None]
    tokens = _token_losses(logits_NV, target_N, allowed_NV, conf_N1, criterion)
    correct_N = tokens.logp_NV.argmax(-1) == target_N
    per_token = TokenLosses(tokens.loss_N.detach(), tokens.nll_N.detach(), correct_N)
    tokens = _dropped(tokens, criterion, update_num)
    loss = tokens.loss_N.sum()
    if criterion.encouraging:
        loss = loss + _bonus(tokens.logp_NV, tokens.target_N, criterion)
    if criterion.rdrop_alpha:
        loss = loss + criterion.rdrop_alpha * _symmetric_divergence(tokens)
    return Loss(loss, tokens.nll_N.sum(), correct_N.sum(), tokens.loss_N.shape[0], per_token)


def kept_tokens(loss_N: Tensor, criterion: Criterion, update_num: int) -> Tensor:
    """int64 [K]: which tokens drop_worst and drop_best leave, by their losses."""
    worst, best = criterion.kept(loss_N.shape[0], update_num)
    index = loss_N.detach().topk(worst, largest=False).indices
    return index if best == worst else index[loss_N.detach()[index].topk(best).indices]


def _has_loss(target_BL: Tensor, criterion: Criterion) -> Tensor:
    keep_BL = target_BL != PAD_ID
    if criterion.ignore_eos:
        keep_BL = keep_BL & (target_BL != EOS_ID)
    if criterion.ignore_prefix_tokens:
        position_L = torch.arange(target_BL.shape[1], device=target_BL.device)
        keep_BL = keep_BL & (position_L >= criterion.ignore_prefix_tokens)
    return keep_BL


def _allowed(
    keep_BL: Tensor, num_classes: int, id_range: tuple[int, int] | None, mask_BLV: Tensor | None, copies: int
) -> Tensor | None:
    """Allowed classes [N, V] of the positions that are kept, None where all are."""
    if mask_BLV is not None:
        return mask_BLV.repeat(copies, 1, 1)[keep_BL]
    if id_range is None:
        return None
    return allowed_ids(num_classes, id_range, keep_BL.device).expand(int(keep_BL.sum()), num_classes)


def _token_losses(
    logits_NV: Tensor, target_N: Tensor, allowed_NV: Tensor | None, conf_N1: Tensor | None, criterion: Criterion
) -> _Tokens:
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    if allowed_NV is not None:
        logits_NV = logits_NV.masked_fill(~allowed_NV, -torch.inf)
    logp_NV = logits_NV.log_softmax(-1, dtype=dtype)
    if conf_N1 is not None:
        logp_NV = logp_NV * conf_N1.to(dtype)
    nll_N = -logp_NV.gather(-1, target_N[:, None])[:, 0]
    smoothing, num_classes = criterion.label_smoothing, logits_NV.shape[-1]
    if allowed_NV is None:
        smooth_N = -logp_NV.sum(-1)
        eps_i = smoothing / (num_classes - 1)
    else:
        smooth_N = -logp_NV.masked_fill(~allowed_NV, 0.0).sum(-1)
        eps_i = _smoothing_per_class(allowed_NV, criterion)
    loss_N = (1 - smoothing - eps_i) * nll_N + eps_i * smooth_N
    return _Tokens(logp_NV, target_N, loss_N, nll_N, allowed_NV)


def _smoothing_per_class(allowed_NV: Tensor, criterion: Criterion) -> Tensor | float:
    """eps / (K - 1) under constraints; 1e-6 keeps it finite where one class is allowed, as in the original.

    A mask's counts give fp32 whatever the logits' precision: the original's golden numbers have that rounding in them.
    """
    if criterion.constraint_range is None:
        return criterion.label_smoothing / (allowed_NV.sum(-1) - 1 + 1e-6)
    start, end = criterion.constraint_range
    return criterion.label_smoothing / (NUM_SPECIAL_IDS + end - start - 1 + 1e-6)


def _dropped(tokens: _Tokens, criterion: Criterion, update_num: int) -> _Tokens:
    """The tokens that drop_worst and drop_best leave."""
    num_tokens = tokens.loss_N.shape[0] // criterion.copies
    worst, best = criterion.kept(num_tokens, update_num)
    if criterion.drop_worst_ratio > 0 and update_num > criterion.drop_worst_after:
        tokens = _of_halves(tokens, tokens.loss_N[:num_tokens].detach().topk(worst, largest=False).indices, criterion)
    if criterion.drop_best_ratio is None or update_num <= criterion.drop_best_after:
        return tokens
    if criterion.drop_best_ratio == 0:
        return tokens.take(tokens.loss_N.detach().topk(tokens.loss_N.shape[0]).indices)
    return _of_halves(tokens, tokens.loss_N[:worst].detach().topk(best).indices, criterion)


def _of_halves(tokens: _Tokens, index_K: Tensor, criterion: Criterion) -> _Tokens:
    """The halves of R-Drop are the same tokens: chosen by the first, taken from both."""
    half = tokens.loss_N.shape[0] // criterion.copies
    return tokens.take(torch.cat([index_K + half * copy for copy in range(criterion.copies)]))


def _bonus(logp_NV: Tensor, target_N: Tensor, criterion: Criterion) -> Tensor:
    """Sum over tokens of (1 - eps) * b(p[target]) + eps / V * sum over classes of b(p), b(p) = ln(1 - p) <= 0."""
    p_NV = logp_NV.exp()
    bonus_NV = (1 - p_NV).clamp(min=_MIN_REST).log()
    end = criterion.log_end
    if end != 1:
        tangent_NV = math.log(1 - end) - (p_NV - end) / (1 - end)
        bonus_NV = torch.where(p_NV > end, tangent_NV, bonus_NV)
    eps = criterion.label_smoothing
    target_N1 = target_N[:, None]
    return (1 - eps) * bonus_NV.gather(-1, target_N1).sum() + eps / logp_NV.shape[-1] * bonus_NV.sum()


def _symmetric_divergence(tokens: _Tokens) -> Tensor:
    """Mean of KL(q || p) and KL(p || q), summed over tokens and allowed classes; p and q are the halves."""
    first_NV, second_NV = tokens.logp_NV.chunk(2)
    if tokens.allowed_NV is not None:
        forbidden_NV = ~tokens.allowed_NV
        first_NV, second_NV = tokens.logp_NV.masked_fill(forbidden_NV, 0.0).chunk(2)
    forward = F.kl_div(first_NV, second_NV, reduction="sum", log_target=True)
    backward = F.kl_div(second_NV, first_NV, reduction="sum", log_target=True)
    return 0.5 * (forward + backward)
