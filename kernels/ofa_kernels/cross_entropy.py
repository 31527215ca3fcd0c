"""Label-smoothed cross-entropy of a linear layer's output, a piece of the logits at a time.

    x = h W^T, -inf where a class is not allowed,  p = softmax(x),  K allowed classes
    eps_i = eps / (V - 1), or eps / (K - 1 + 1e-6) under a constraint
    loss = (1 - eps - eps_i) * -log p[y] + eps_i * sum over allowed v of -log p[v]
    dx   = S p - (1 - eps) * onehot(y) - eps_i * (1 - onehot(y)) on the allowed classes, times dloss

S = 1 - eps + eps_i * (K - 1), which is 1 without a constraint and 1 - 1e-6 * eps_i with one: computed so, a row with
one allowed class has gradient 0 although its eps_i is eps * 1e6. Nothing is filtered: these are the exact gradients.

Shapes: M target tokens, D channels, V vocabulary, c tokens of a chunk. This is the plain-torch reference and the CPU
path, in chunks of rows; rows with y == ignore_index are left out of its products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ofa_kernels._cross_entropy_parts import NUM_ALWAYS_ALLOWED, SLACK, add_product_
from ofa_kernels._launch import product_dtype, use_triton

CHUNK_ELEMENTS = 6 << 20
"""Default size of a chunk of logits. The torch path has at most 12 bytes per element at once: 76 MB."""
WHOLE_CHUNKS = 3
"""Up to so many chunks' worth of logits are one chunk: its logits are kept for the backward, not computed again."""
PAYS_TOKENS = 1024
"""From here on "auto" is Triton on a GPU even where the logits fit one chunk."""


def linear_cross_entropy(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    target_M: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = 1,
    token_weight_M: Tensor | None = None,
    allowed: tuple[int, int] | Tensor | None = None,
    chunk: int | None = None,
    kernel: str = "auto",
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, nll, correct) of each token: two [M] in at least fp32, unreduced, and [M] bool; only loss has a gradient.

    A token is correct where no logit is larger than its target's. Ignored ones have loss, nll and gradient 0 and are
    not correct; a target that is not allowed has an infinite loss. Under autocast the products run in autocast's dtype.

    token_weight_M: factor of each token's loss, nll and gradient (OFA's conf). allowed: (start, end) for the ids 0 to 3
    and start <= id < end; bool [M, V] for a mask; None for every class. chunk: rows of logits held at once; None for
    what keeps memory beyond both gradients under 100 MB, or 1/256 of a GPU's memory where that holds half of the logits
    and saves a part of their second product. A 16-bit gradient of the weight is summed in fp32, in a tensor
    of its own, where one product does not make it: in Triton from 4,915 tokens of width 2560 on (16,384 of 768), in
    torch wherever there are several chunks. Up to 19 million logits torch has no chunks and takes up to 230 MB.
    kernel: see `ofa_kernels._launch.KERNELS`; "auto" is Triton on a GPU from 1024 tokens or several chunks on, which is
    arithmetic (kernels read logits once where torch passes over them ten times) and not yet measured.

    counted: int64 [N], the tokens that are not ignored, ascending, where the caller knows them; None to find them here,
    for which the torch path waits for a GPU.

    The gradient of the weight is computed in the backward, from the weight as it then is: under ZeRO-3 it exists only
    while its module is gathered. Raises ValueError where shapes disagree or `allowed` is not one of the above.
    """
    _check_shapes(hidden_MD, weight_VD, target_M, token_weight_M)
    num_tokens, vocab = target_M.shape[0], weight_VD.shape[0]
    mask_MV, id_range = _check_allowed(allowed, num_tokens, vocab)
    dtype = product_dtype(hidden_MD)
    several = num_tokens * vocab > WHOLE_CHUNKS * CHUNK_ELEMENTS
    if use_triton(kernel, hidden_MD, several or num_tokens >= PAYS_TOKENS, dtype):
        from ofa_kernels.cross_entropy_ops_triton import tiled_cross_entropy

        losses = tiled_cross_entropy(
            hidden_MD, weight_VD, target_M, mask_MV, id_range, label_smoothing, ignore_index, chunk, dtype
        )
    else:
        if chunk is None:
            chunk = max(1, CHUNK_ELEMENTS // vocab) if several else max(1, num_tokens)
        options = _Options(label_smoothing, ignore_index, id_range, chunk, dtype)
        losses = _LinearCrossEntropy.apply(hidden_MD, weight_VD, target_M, mask_MV, counted, options)
    loss_M, nll_M, correct_M = losses
    if token_weight_M is not None:
        token_weight_M = token_weight_M.detach().to(loss_M.dtype)
        loss_M, nll_M = loss_M * token_weight_M, nll_M * token_weight_M
    return loss_M, nll_M, correct_M


def linear_cross_entropy_ref(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    target_M: Tensor,
    label_smoothing: float,
    ignore_index: int,
    token_weight_M: Tensor | None = None,
    allowed: tuple[int, int] | Tensor | None = None,
) -> Tensor:
    """Oracle for the loss [M] in plain torch, in the dtype it is given, with all logits at once."""
    ignored_M = target_M == ignore_index
    logits_MV = hidden_MD @ weight_VD.T
    allowed_MV = torch.ones_like(logits_MV, dtype=torch.bool)
    eps_i = label_smoothing / (weight_VD.shape[0] - 1)
    if allowed is not None:
        if isinstance(allowed, tuple):
            allowed_MV[:, NUM_ALWAYS_ALLOWED : allowed[0]] = False
            allowed_MV[:, allowed[1] :] = False
        else:
            allowed_MV = allowed | ignored_M[:, None]  # a row without a class would give NaN to all of the weight
        eps_i = label_smoothing / (allowed_MV.sum(-1).to(logits_MV.dtype) - 1 + SLACK)
    logp_MV = logits_MV.masked_fill(~allowed_MV, -torch.inf).log_softmax(-1)
    nll_M = -logp_MV.gather(-1, target_M.masked_fill(ignored_M, 0)[:, None])[:, 0]
    loss_M = (1 - label_smoothing - eps_i) * nll_M - eps_i * logp_MV.masked_fill(~allowed_MV, 0.0).sum(-1)
    if token_weight_M is not None:
        loss_M = loss_M * token_weight_M
    return loss_M.masked_fill(ignored_M, 0.0)


def _check_shapes(hidden_MD: Tensor, weight_VD: Tensor, target_M: Tensor, token_weight_M: Tensor | None) -> None:
    if hidden_MD.shape[0] != target_M.shape[0] or hidden_MD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: want hidden [M, D], weight [V, D], target [M], got {tuple(hidden_MD.shape)}, "
            f"{tuple(weight_VD.shape)}, {tuple(target_M.shape)}"
        )
    if token_weight_M is not None and token_weight_M.shape != target_M.shape:
        raise ValueError(
            f"linear_cross_entropy: want a weight for each of {target_M.shape[0]} tokens, got "
            f"{tuple(token_weight_M.shape)}; repeat an example's conf for its tokens"
        )


def _check_allowed(
    allowed: tuple[int, int] | Tensor | None, num_tokens: int, vocab: int
) -> tuple[Tensor | None, tuple[int, int] | None]:
    """(mask, range), one of them None."""
    if isinstance(allowed, Tensor):
        if allowed.dtype != torch.bool or allowed.shape != (num_tokens, vocab):
            raise ValueError(
                f"linear_cross_entropy: want a mask of allowed classes, bool [{num_tokens}, {vocab}], got "
                f"{allowed.dtype} {tuple(allowed.shape)}"
            )
        return allowed, None
    if allowed is not None:
        start, end = allowed
        if not NUM_ALWAYS_ALLOWED <= start < end <= vocab:
            raise ValueError(
                f"linear_cross_entropy: range {start},{end}: want {NUM_ALWAYS_ALLOWED} <= start < end <= {vocab}"
            )
    return None, allowed


class _Options(NamedTuple):
    smoothing: float
    ignore_index: int
    id_range: tuple[int, int] | None
    chunk: int
    dtype: torch.dtype
    """Of the products."""

    def forbidden(self, mask_MV: Tensor | None, rows: Tensor, vocab: int) -> Tensor | None:
        """[c, V] or [V] bool, None where every class is allowed."""
        if mask_MV is not None:
            return mask_MV[rows].logical_not_()
        if self.id_range is None:
            return None
        forbidden_V = torch.ones(vocab, dtype=torch.bool, device=rows.device)
        forbidden_V[:NUM_ALWAYS_ALLOWED] = False
        forbidden_V[slice(*self.id_range)] = False
        return forbidden_V

    def smoothing_per_class(self, forbidden: Tensor | None, vocab: int) -> float | Tensor:
        """eps_i; [c, 1] where the number of allowed classes differs between rows."""
        if forbidden is None:
            return self.smoothing / (vocab - 1)
        if self.id_range is None:
            return self.smoothing / (vocab - forbidden.sum(-1, keepdim=True) - 1 + SLACK)
        start, end = self.id_range
        return self.smoothing / (NUM_ALWAYS_ALLOWED + end - start - 1 + SLACK)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        target_M: Tensor,
        mask_MV: Tensor | None,
        counted: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(options.dtype, torch.float32)
        loss_M, nll_M = (torch.zeros(target_M.shape, dtype=wide, device=target_M.device) for _ in range(2))
        correct_M = torch.zeros_like(target_M, dtype=torch.bool)
        kept = (target_M != options.ignore_index).nonzero()[:, 0] if counted is None else counted
        only_chunk = None
        with torch.autocast(hidden_MD.device.type, enabled=False):
            weight = weight_VD.to(options.dtype)
            for rows in kept.split(options.chunk):
                forbidden = options.forbidden(mask_MV, rows, weight_VD.shape[0])
                logits_cV = hidden_MD[rows].to(options.dtype) @ weight.T
                losses, logp_cV = _chunk_losses(logits_cV, target_M[rows], forbidden, options)
                loss_M[rows], nll_M[rows], correct_M[rows] = losses
                if len(kept) <= options.chunk:
                    only_chunk = logp_cV
                del logits_cV, logp_cV  # before the next chunk's are there
        ctx.save_for_backward(hidden_MD, weight_VD, target_M, mask_MV, kept, only_chunk)
        ctx.options = options
        ctx.mark_non_differentiable(nll_M, correct_M)
        return loss_M, nll_M, correct_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss_M: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_MD, weight_VD, target_M, mask_MV, kept, only_chunk = ctx.saved_tensors
        options: _Options = ctx.options
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dhidden_MD = torch.zeros_like(hidden_MD) if needs_hidden else None
        dweight = None
        with torch.autocast(hidden_MD.device.type, enabled=False):
            weight = weight_VD.to(options.dtype)
            for rows in kept.split(options.chunk):
                hidden_cD = hidden_MD[rows].to(options.dtype)
                forbidden = options.forbidden(mask_MV, rows, weight_VD.shape[0])
                if only_chunk is not None:
                    p_cV = only_chunk.exp()
                else:
                    p_cV = _mask(hidden_cD @ weight.T, forbidden, -torch.inf).softmax(-1, dtype=dloss_M.dtype)
                dlogits_cV = _dlogits_(p_cV, target_M[rows], dloss_M[rows], forbidden, options).to(options.dtype)
                del p_cV
                if needs_hidden:
                    dhidden_MD[rows] = (dlogits_cV @ weight).to(hidden_MD.dtype)
                if needs_weight and len(kept) <= options.chunk:
                    dweight = dlogits_cV.T @ hidden_cD
                elif needs_weight:
                    if dweight is None:
                        dweight = torch.zeros_like(weight, dtype=dloss_M.dtype)
                    add_product_(dweight, dlogits_cV.T, hidden_cD)
                del dlogits_cV
        return dhidden_MD, None if dweight is None else dweight.to(weight_VD.dtype), None, None, None, None


def _chunk_losses(
    logits_cV: Tensor, target_c: Tensor, forbidden: Tensor | None, options: _Options
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """((loss, nll, correct), log-probabilities, 0 or -inf where forbidden). Overwrites the logits."""
    wide = torch.promote_types(logits_cV.dtype, torch.float32)
    logp_cV = _mask(logits_cV, forbidden, -torch.inf).log_softmax(-1, dtype=wide)
    target_logp_c = logp_cV.gather(1, target_c[:, None])[:, 0]
    correct_c = target_logp_c >= logp_cV.amax(-1)  # argmax is several times slower on a CPU
    if not options.smoothing:
        return (-target_logp_c, -target_logp_c, correct_c), logp_cV
    eps_i = options.smoothing_per_class(forbidden, logp_cV.shape[1])
    if isinstance(eps_i, Tensor):
        eps_i = eps_i[:, 0]
    loss_c = (options.smoothing + eps_i - 1) * target_logp_c
    loss_c -= eps_i * _mask(logp_cV, forbidden, 0.0).sum(-1)
    return (loss_c, -target_logp_c, correct_c), logp_cV


def _dlogits_(p_cV: Tensor, target_c: Tensor, dloss_c: Tensor, forbidden: Tensor | None, options: _Options) -> Tensor:
    """The gradient of the logits, in place of their probabilities."""
    target_c1 = target_c[:, None]
    eps_i = options.smoothing_per_class(forbidden, p_cV.shape[1])
    if options.smoothing and forbidden is not None:
        p_cV.mul_(1 - SLACK * eps_i)
    at_target_c1 = p_cV.gather(1, target_c1) - (1 - options.smoothing)
    if options.smoothing:
        p_cV.sub_(eps_i)
    p_cV.scatter_(1, target_c1, at_target_c1)
    return _mask(p_cV, forbidden, 0.0).mul_(dloss_c[:, None])


def _mask(x_cV: Tensor, forbidden: Tensor | None, value: float) -> Tensor:
    """In place."""
    return x_cV if forbidden is None else x_cV.masked_fill_(forbidden, value)
