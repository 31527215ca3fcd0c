"""The parts of OFA's stacks, on packed tokens: x is [N, D] everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofa_ds.config import KernelConfig
from ofa_ds.model.config import ModelConfig
from ofa_ds.model.init import Linear
from ofa_ds.model.positions import RelativeRow
from ofa_ds.model.products import linear
from ofa_ds.terms import NUM_SPECIAL_IDS, PAD_ID
from ofa_kernels.attention import AttentionPlan, attention
from ofa_kernels.cross_entropy import linear_cross_entropy
from ofa_kernels.layer_norm import add_branch, add_layer_norm, gelu_layer_norm, layer_norm

MIN_ROWS_OF_LOGITS = 32
"""The vocabulary is so large that oneDNN pays for the few rows of a step of generation."""


def rows_of(x_ND: Tensor, index_M: Tensor) -> Tensor:
    """[M, D] rows of x, one as often as it is asked for: its gradient is summed in fp32 and in one order.

    The gradient of `index_select` is summed by atomics on a GPU, in the dtype of x, in another order each time.
    """
    return F.embedding(index_M, x_ND)


class TokenEmbedding(nn.Module):
    """The vocabulary matrix. Its one owner: embedding, logits and loss are all calls of this module.

    Under ZeRO-3 a weight exists only inside its module's call.
    """

    def __init__(self, vocab_size: int, dim: int, std: float, kernel: str = "auto") -> None:
        super().__init__()
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        nn.init.normal_(self.weight, std=std)

    def forward(
        self, x: Tensor, targets: Tensor | None = None, label_smoothing: float = 0.0,
        allowed: tuple[int, int] | Tensor | None = None, counted: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """ids [...] -> embeddings [..., D]; hidden [M, D] -> logits [M, V]; both -> (loss, nll, correct), [M] each.

        allowed: over which classes the loss is; counted: which targets are not pad; as `linear_cross_entropy` has them.
        Logits with a range (start, end) allowed are those of the special ids and of it: [M, 4 + end - start].
        """
        if not x.is_floating_point():
            return F.embedding(x, self.weight)
        if targets is None and allowed is not None:
            start, end = allowed
            parts = (self.weight[:NUM_SPECIAL_IDS], self.weight[start:end])
            return torch.cat([linear(x, part, min_rows=MIN_ROWS_OF_LOGITS) for part in parts], -1)
        if targets is None:
            return linear(x, self.weight, min_rows=MIN_ROWS_OF_LOGITS)
        return linear_cross_entropy(
            x, self.weight, targets, label_smoothing=label_smoothing, ignore_index=PAD_ID, allowed=allowed,
            kernel=self.kernel, counted=counted,
        )  # fmt: skip


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


class LayerNorm(nn.LayerNorm):
    """A norm of packed tokens, with what comes before it where one kernel can do both.

    Called as a module in every form, since under ZeRO-3 its weights exist only inside its own call.
    """

    def __init__(self, dim: int, kernels: KernelConfig) -> None:
        super().__init__(dim)
        self.kernel = kernels.layer_norm

    def forward(
        self, x_ND: Tensor, residual_ND: Tensor | None = None, branch: BranchOptions | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x; with a residual (residual + branch(x), its norm). Leading axes [..., D] count as one."""
        options = {"eps": self.eps, "kernel": self.kernel}
        shape, x_ND = x_ND.shape, x_ND.flatten(0, -2)
        if residual_ND is None:
            return layer_norm(x_ND, self.weight, self.bias, **options).view(shape)
        residual_ND = residual_ND.flatten(0, -2)
        out = add_layer_norm(residual_ND, x_ND, self.weight, self.bias, **branch, **options)
        return out[0].view(shape), out[1].view(shape)


class GeluLayerNorm(LayerNorm):
    def forward(self, x_ND: Tensor) -> Tensor:
        """The norm of gelu(x)."""
        out = gelu_layer_norm(x_ND.flatten(0, -2), self.weight, self.bias, eps=self.eps, kernel=self.kernel)
        return out.view(x_ND.shape)


class BranchOptions(TypedDict):
    """How the output of a block joins the residual stream, as `add_branch` takes it."""

    dropout: float
    gamma_D: Tensor | None
    example_N: Tensor | None
    keep_E: Tensor | None


class Branch(nn.Module):
    """Dropout, scale per channel, drop-path per example: drawn anew for every block."""

    def __init__(self, config: ModelConfig, drop_path: float) -> None:
        super().__init__()
        self.dropout, self.drop_path, self.kernel = config.dropout, drop_path, config.kernels.layer_norm

    def options(self, example_N: Tensor, num_examples: int, gamma_D: Tensor | None) -> BranchOptions:
        keep_E = None
        if self.training and self.drop_path:
            keep = 1 - self.drop_path
            keep_E = torch.empty(num_examples, device=example_N.device).bernoulli_(keep).div_(keep)
        return {
            "dropout": self.dropout if self.training else 0.0, "gamma_D": gamma_D,
            "example_N": None if keep_E is None else example_N, "keep_E": keep_E,
        }  # fmt: skip

    def forward(
        self, residual_ND: Tensor, x_ND: Tensor, example_N: Tensor, num_examples: int, gamma_D: Tensor | None
    ) -> Tensor:
        options = self.options(example_N, num_examples, gamma_D)
        rows = (residual_ND.flatten(0, -2), x_ND.flatten(0, -2))
        return add_branch(*rows, **options, kernel=self.kernel).view(x_ND.shape)


class FeedForward(nn.Module):
    """The last block of both kinds of layer, mixed into them so that names stay the official ones."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.dim, config.ffn_dim, config.init_std)
        self.fc2 = Linear(config.ffn_dim, config.dim, config.init_std)
        self.ffn_layernorm = GeluLayerNorm(config.ffn_dim, config.kernels)
        self.final_layer_norm = LayerNorm(config.dim, config.kernels)

    def feed_forward(self, normed_ND: Tensor) -> Tensor:
        return self.fc2(self.ffn_layernorm(self.fc1(normed_ND)))


def gamma_parameter(config: ModelConfig) -> nn.Parameter | None:
    """A scale per channel (OFASys), or None where the model has none."""
    return None if config.gamma is None else nn.Parameter(torch.full((config.dim,), config.gamma))


class EncoderLayer(FeedForward):
    def __init__(self, config: ModelConfig, drop_path: float) -> None:
        super().__init__(config)
        self.self_attn = Attention(config)
        self.self_attn_layer_norm = LayerNorm(config.dim, config.kernels)
        self.attn_ln = LayerNorm(config.dim, config.kernels)
        self.branch = Branch(config, drop_path)
        self.weight_self_attn, self.weight_ffn = gamma_parameter(config), gamma_parameter(config)

    def forward(self, x_ND: Tensor, core: AttentionCore, example_N: Tensor, num_examples: int) -> Tensor:
        normed_ND = self.self_attn_layer_norm(x_ND)
        attended_ND = self.attn_ln(self.self_attn(normed_ND, normed_ND, core))
        branch = self.branch.options(example_N, num_examples, self.weight_self_attn)
        x_ND, normed_ND = self.final_layer_norm(attended_ND, x_ND, branch)
        return self.branch(x_ND, self.feed_forward(normed_ND), example_N, num_examples, self.weight_ffn)


class DecoderLayer(FeedForward):
    def __init__(self, config: ModelConfig, drop_path: float) -> None:
        super().__init__(config)
        self.self_attn = Attention(config)
        self.encoder_attn = Attention(config)
        self.self_attn_layer_norm = LayerNorm(config.dim, config.kernels)
        self.self_attn_ln = LayerNorm(config.dim, config.kernels)
        self.encoder_attn_layer_norm = LayerNorm(config.dim, config.kernels)
        self.cross_attn_ln = LayerNorm(config.dim, config.kernels)
        self.branch = Branch(config, drop_path)
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
        branch = self.branch.options(*examples, self.weight_self_attn)
        x_ND, normed_ND = self.encoder_attn_layer_norm(attended_ND, x_ND, branch)
        attended_ND = self.cross_attn_ln(self.encoder_attn(normed_ND, memory_MD, cores[1]))
        branch = self.branch.options(*examples, self.weight_cross_attn)
        x_ND, normed_ND = self.final_layer_norm(attended_ND, x_ND, branch)
        return self.branch(x_ND, self.feed_forward(normed_ND), *examples, self.weight_ffn)
