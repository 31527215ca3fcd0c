"""How the vector of each place becomes a code: Gumbel logits, or the nearest row; and the loss that teaches it.

Legend: B pictures, E embed_dim, N n_embed, H, W places.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

COMMITMENT = 0.25
"""Weight of one of the two terms of `NearestCodebook`."""


class Quantized(NamedTuple):
    vectors: Tensor
    """[B, E, H, W]: rows of the codebook, through which the gradient reaches the encoder."""
    loss: Tensor
    """Scalar: the codebook's own term of the training loss."""
    codes: Tensor
    """int64 [B, H, W]."""


class GumbelCodebook(nn.Module):
    """Codes are drawn from learned logits (Jang et al. 2016): the largest of logits + noise while it learns."""

    def __init__(self, n_embed: int, embed_dim: int, *, kl_weight: float = 1e-8, temperature: float = 1.0) -> None:
        super().__init__()
        self.proj = nn.Conv2d(embed_dim, n_embed, 1)
        self.embed = nn.Embedding(n_embed, embed_dim)
        self.kl_weight = kl_weight
        self.temperature = temperature
        """Of the training draw; not in checkpoints."""

    @property
    def rows(self) -> Tensor:
        return self.embed.weight

    def codes(self, h_BEHW: Tensor) -> Tensor:
        """int64 [B, H, W], without noise; the original's script for codes draws noise here too."""
        return self.proj(h_BEHW).argmax(1)

    def forward(self, h_BEHW: Tensor, noise_BNHW: Tensor) -> Quantized:
        """noise_BNHW: -log of exponential draws. Hard codes, with the gradient of the softmax."""
        logits_BNHW = self.proj(h_BEHW)
        soft_BNHW = ((logits_BNHW + noise_BNHW) / self.temperature).softmax(1)
        codes_BHW = soft_BNHW.argmax(1)
        hard_BNHW = torch.zeros_like(soft_BNHW).scatter_(1, codes_BHW[:, None], 1.0)
        hard_BNHW = hard_BNHW - soft_BNHW.detach() + soft_BNHW
        vectors_BEHW = torch.einsum("bnhw,ne->behw", hard_BNHW, self.embed.weight)
        p_BNHW = logits_BNHW.softmax(1)
        kl = (p_BNHW * (p_BNHW * self.embed.num_embeddings + 1e-10).log()).sum(1).mean()
        return Quantized(vectors_BEHW, self.kl_weight * kl, codes_BHW)


class NearestCodebook(nn.Module):
    """The row at the smallest Euclidean distance, the first of several (van den Oord et al. 2017)."""

    def __init__(self, n_embed: int, embed_dim: int, *, legacy: bool = True) -> None:
        """legacy: COMMITMENT weighs the codebook's term, as in the original; else the commitment's."""
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_embed, 1 / n_embed)
        self.legacy = legacy

    @property
    def rows(self) -> Tensor:
        return self.embedding.weight

    def codes(self, h_BEHW: Tensor) -> Tensor:
        """int64 [B, H, W]."""
        flat_PE = h_BEHW.permute(0, 2, 3, 1).reshape(-1, h_BEHW.shape[1])
        distance_PN = self.rows.square().sum(1) - 2 * flat_PE @ self.rows.T  # without |h|^2, which moves no minimum
        return distance_PN.argmin(1).view(h_BEHW.shape[0], *h_BEHW.shape[2:])

    def forward(self, h_BEHW: Tensor, noise_BNHW: Tensor | None = None) -> Quantized:
        """noise_BNHW: not used; both kinds of codebook are called alike."""
        codes_BHW = self.codes(h_BEHW)
        e_BEHW = functional.embedding(codes_BHW, self.rows).permute(0, 3, 1, 2)
        commitment = (e_BEHW.detach() - h_BEHW).square().mean()
        codebook = (e_BEHW - h_BEHW.detach()).square().mean()
        weights = (1.0, COMMITMENT) if self.legacy else (COMMITMENT, 1.0)
        loss = weights[0] * commitment + weights[1] * codebook
        return Quantized(h_BEHW + (e_BEHW - h_BEHW).detach(), loss, codes_BHW)
