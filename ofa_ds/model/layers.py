"""The parts of OFA's stacks, on packed tokens: x is [N, D] everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofa_ds.config import PAD_ID
from ofa_ds.model.config import ModelConfig
from ofa_ds.model.init import Linear
from ofa_ds.model.positions import RelativeRow
from ofa_kernels.attention import AttentionPlan, attention
from ofa_kernels.cross_entropy import linear_cross_entropy


class TokenEmbedding(nn.Module):
    """The vocabulary matrix. Its one owner: embedding, logits and loss are all calls of this module.

    Under ZeRO-3 a weight exists only inside its module's call.
    """

    def __init__(self, vocab_size: int, dim: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        nn.init.normal_(self.weight, std=std)

    def forward(
        self, x: Tensor, targets: Tensor | None = None, label_smoothing: float = 0.0
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """ids [...] -> embeddings [..., D]; hidden [M, D] -> logits [M, V]; both -> (loss, nll, correct), [M] each."""
        if not x.is_floating_point():
            return F.embedding(x, self.weight)
        if targets is None:
            return F.linear(x, self.weight)
        return linear_cross_entropy(x, self.weight, targets, label_smoothing=label_smoothing, ignore_index=PAD_ID)


class RelativeTables(nn.Module):
    """The relative rows of a stack's layers. The tables belong to the stack, so that they keep the official names."""

    def __init__(self, arithmetic: RelativeRow) -> None:
        super().__init__()
        self.register_buffer("token_rows", arithmetic.token_rows, persistent=False)
        self.register_buffer("image_rows", arithmetic.image_rows, persistent=False)

    def forward(self, layer: int, token_tables: nn.ModuleList, image_tables: nn.ModuleList | None) -> Tensor:
        """[H, R] of a layer; a stack with a single table has it in every layer."""
        entries_RH = token_tables[layer % len(token_tables)](self.token_rows)
        if image_tables is not None:
            entries_RH = torch.cat([entries_RH, image_tables[layer % len(image_tables)](self.image_rows)])
        return entries_RH.t()


class AttentionCore(Protocol):
    """What happens between the projections: over a packed batch while training, over caches while generating."""

    def __call__(
        self, q_ND: Tensor, k_MD: Tensor | None, v_MD: Tensor | None, head_scale_H: Tensor, dropout: float
    ) -> Tensor:
        """-> [N, D]. k and v are None where the core has them already."""


@dataclass(frozen=True, slots=True)
class PackedCore:
    """Attention over a planned batch, with the biases of one layer."""

    plan: AttentionPlan
    positions: tuple[Tensor, ...]
    row_HR: Tensor | None
    scale: float

    def __call__(
        self, q_ND: Tensor, k_MD: Tensor | None, v_MD: Tensor | None, head_scale_H: Tensor, dropout: float
    ) -> Tensor:
        qkv = (q_ND, k_MD, v_MD)
        return attention(qkv, self.plan, self.positions, self.row_HR, head_scale_H, scale=self.scale, dropout=dropout)


class Attention(nn.Module):
    """Multi-head attention with a learned scale per head. Self-attention is the case memory = x."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.attention_dropout
        self.k_proj = Linear(config.dim, config.dim, config.init_std)
        self.v_proj = Linear(config.dim, config.dim, config.init_std)
        self.q_proj = Linear(config.dim, config.dim, config.init_std)
        self.out_proj = Linear(config.dim, config.dim, config.init_std)
        self.c_attn = nn.Parameter(torch.ones(config.num_heads))

    def forward(self, x_ND: Tensor, memory_MD: Tensor | None, core: AttentionCore) -> Tensor:
        """memory None: the core has cached keys and values."""
        q_ND, k_MD, v_MD = self.q_proj(x_ND), None, None
        if memory_MD is not None:
            k_MD, v_MD = self.k_proj(memory_MD), self.v_proj(memory_MD)
        return self.out_proj(core(q_ND, k_MD, v_MD, self.c_attn, self.dropout if self.training else 0.0))


class Branch(nn.Module):
    """How the output of a block joins the residual stream: dropout, then drop-path per example."""

    def __init__(self, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.dropout, self.drop_path = dropout, drop_path

    def forward(
        self, residual_ND: Tensor, x_ND: Tensor, example_N: Tensor, num_examples: int, gamma_D: Tensor | None
    ) -> Tensor:
        if self.training and self.dropout:
            x_ND = F.dropout(x_ND, self.dropout)
        if gamma_D is not None:
            x_ND = x_ND * gamma_D
        if self.training and self.drop_path:
            keep = 1 - self.drop_path
            mask_E = torch.rand(num_examples, device=x_ND.device).add_(keep).floor_().div_(keep)
            x_ND = x_ND * mask_E.to(x_ND.dtype)[example_N, None]
        return residual_ND + x_ND


class FeedForward(nn.Module):
    """The last block of both kinds of layer, mixed into them so that names stay the official ones."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.dim, config.ffn_dim, config.init_std)
        self.fc2 = Linear(config.ffn_dim, config.dim, config.init_std)
        self.ffn_layernorm = nn.LayerNorm(config.ffn_dim)
        self.final_layer_norm = nn.LayerNorm(config.dim)

    def feed_forward(self, x_ND: Tensor) -> Tensor:
        return self.fc2(self.ffn_layernorm(F.gelu(self.fc1(self.final_layer_norm(x_ND)))))


def gamma_parameter(config: ModelConfig) -> nn.Parameter | None:
    """A scale per channel (OFASys), or None where the model has none."""
    return None if config.gamma is None else nn.Parameter(torch.full((config.dim,), config.gamma))


class EncoderLayer(FeedForward):
    def __init__(self, config: ModelConfig, drop_path: float) -> None:
        super().__init__(config)
        self.self_attn = Attention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.dim)
        self.attn_ln = nn.LayerNorm(config.dim)
        self.branch = Branch(config.dropout, drop_path)
        self.weight_self_attn, self.weight_ffn = gamma_parameter(config), gamma_parameter(config)

    def forward(self, x_ND: Tensor, core: AttentionCore, example_N: Tensor, num_examples: int) -> Tensor:
        normed_ND = self.self_attn_layer_norm(x_ND)
        attended_ND = self.attn_ln(self.self_attn(normed_ND, normed_ND, core))
        x_ND = self.branch(x_ND, attended_ND, example_N, num_examples, self.weight_self_attn)
        return self.branch(x_ND, self.feed_forward(x_ND), example_N, num_examples, self.weight_ffn)


class DecoderLayer(FeedForward):
    def __init__(self, config: ModelConfig, drop_path: float) -> None:
        super().__init__(config)
        self.self_attn = Attention(config)
        self.encoder_attn = Attention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.dim)
        self.self_attn_ln = nn.LayerNorm(config.dim)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.dim)
        self.cross_attn_ln = nn.LayerNorm(config.dim)
        self.branch = Branch(config.dropout, drop_path)
        self.weight_self_attn, self.weight_cross_attn = gamma_parameter(config), gamma_parameter(config)
        self.weight_ffn = gamma_parameter(config)

    def forward(
        self,
        x_ND: Tensor,
        memory_MD: Tensor | None,
        cores: tuple[AttentionCore, AttentionCore],
        example_N: Tensor,
        num_examples: int,
    ) -> Tensor:
        """cores: self-attention's, cross-attention's."""
        examples = (example_N, num_examples)
        normed_ND = self.self_attn_layer_norm(x_ND)
        attended_ND = self.self_attn_ln(self.self_attn(normed_ND, normed_ND, cores[0]))
        x_ND = self.branch(x_ND, attended_ND, *examples, self.weight_self_attn)
        attended_ND = self.encoder_attn(self.encoder_attn_layer_norm(x_ND), memory_MD, cores[1])
        x_ND = self.branch(x_ND, self.cross_attn_ln(attended_ND), *examples, self.weight_cross_attn)
        return self.branch(x_ND, self.feed_forward(x_ND), *examples, self.weight_ffn)
