"""A small packed model with what can go wrong under ZeRO: a tied vocabulary, buffers, tiny tensors, dropout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB = 97


@dataclass(frozen=True)
class ToyBatch:
    tokens: Tensor
    """[N] vocabulary ids."""
    example: Tensor
    """[N] example of each token."""
    targets: Tensor
    """[N] ids to predict; -1 for none."""

    @property
    def count(self) -> int:
        return int((self.targets >= 0).sum())


class Vocabulary(nn.Module):
    """One owner of the tied matrix: embeds, and scores inside its own forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCAB, width) * 0.1)

    def forward(self, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        if hidden is None:
            return F.embedding(tokens, self.weight)
        return F.cross_entropy((hidden @ self.weight.T).float(), tokens, ignore_index=-1, reduction="none")


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.mix, self.up = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, 3 * width)
        self.down, self.scale = nn.Linear(3 * width, width), nn.Parameter(torch.ones(1))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("seen", torch.zeros(width))

    def forward(self, hidden: Tensor, example: Tensor) -> Tensor:
        inner = self.norm(hidden)
        num_examples = int(example.max()) + 1
        total = inner.new_zeros(num_examples, inner.shape[1]).index_add(0, example, self.mix(inner))
        count = inner.new_zeros(num_examples).index_add(0, example, torch.ones_like(example, dtype=inner.dtype))
        hidden = hidden + (total / count[:, None])[example] * self.scale
        if self.training:
            self.seen.mul_(0.9).add_(hidden.detach().float().mean(0), alpha=0.1)
        return hidden + self.dropout(self.down(F.gelu(self.up(hidden))))


class Toy(nn.Module):
    def __init__(self, width: int = 24, depth: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.vocabulary = Vocabulary(width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.final = nn.LayerNorm(width)
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)

    def forward(self, batch: ToyBatch) -> Tensor:
        """Loss per token [N], fp32, 0 where there is no target."""
        hidden = self.vocabulary(batch.tokens)
        for block in self.blocks:
            hidden = block(hidden, batch.example)
        return self.vocabulary(batch.targets, self.final(self.frozen(hidden) + hidden))


def toy_batch(step: int, micro: int, num_examples: int = 3) -> ToyBatch:
    """Micro-batch `micro` of step `step`, the same wherever it runs; lengths and target counts are uneven."""
    generator = torch.Generator().manual_seed(1000 * step + micro)
    lengths = torch.randint(2, 14, (num_examples,), generator=generator)
    example = torch.repeat_interleave(torch.arange(num_examples), lengths)
    tokens = torch.randint(VOCAB, example.shape, generator=generator)
    targets = (tokens * 7 + example) % VOCAB
    targets[torch.rand(example.shape, generator=generator) < 0.4] = -1
    targets[0] = 5
    return ToyBatch(tokens, example, targets)
