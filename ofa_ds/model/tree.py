"""Many decoder tokens at once over the caches of generation: prompts, and trees of answers that share their beginnings.

Legend: E examples, Q tokens of the block, P slots filled before it, K memory tokens, H heads, d head dim, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ofa_ds.model.decoding import MASKED, DecodingState, SelfCache, attend


def decode_block(
    state: DecodingState, tokens_EQD: Tensor, slot_Q: Tensor, seen_QQ: Tensor, *, keep: bool = False
) -> Tensor:
    """Embedded tokens in these slots, ascending -> hidden states [E, Q, D] after the last norm.

    Several tokens may stand in one slot: which others a token sees says seen_QQ (bool, query by key, itself included);
    besides these it sees all that the state has. A row for each example. keep: the block, a token a slot, becomes part
    of what the state has read. Raises ValueError past the position table.
    """
    decoder = state.decoder
    slots, index_Q, counts = torch.unique_consecutive(slot_Q, return_inverse=True, return_counts=True)
    state.check_slot(int(slots[-1]))
    state.make_room(int(slots[-1]) + 1)
    x_RD = state.embed(tokens_EQD, slot_Q).flatten(0, 1)
    before = torch.zeros(len(slot_Q), state.step, dtype=torch.bool, device=slot_Q.device)
    mask_QK = torch.cat([before, ~seen_QQ], 1).float() * MASKED
    block = _Block(state, slots, index_Q, mask_QK, state.memory_bias(slots), counts.tolist())
    code_R = state.code_R.repeat_interleave(len(slot_Q))
    for layer, (own, memory) in zip(decoder.layers, state.caches, strict=True):
        own_core = _OwnCore(block, own, keep)
        x_RD = layer(x_RD, None, (own_core, _MemoryCore(block, memory.k, memory.v, own.scale)), code_R, len(code_R))
    state.step += len(slot_Q) if keep else 0
    return decoder.layer_norm(x_RD).view(tokens_EQD.shape)


@dataclass(frozen=True, slots=True)
class _Block:
    """What all layers share."""

    state: DecodingState
    slots: Tensor
    """The distinct ones."""
    index_Q: Tensor
    """Which of them each token is in."""
    mask_QK: Tensor
    """[Q, P + Q]: MASKED at what a token does not see."""
    memory_bias: Tensor
    """[E, 1 or H, 1 or slots, K]."""
    counts: list[int]
    """Tokens in each slot."""


@dataclass(frozen=True, slots=True)
class _OwnCore:
    """Self-attention of one layer."""

    block: _Block
    cache: SelfCache
    keep: bool

    def __call__(self, q_RD: Tensor, k_RD: Tensor, v_RD: Tensor, head_scale_H: Tensor, dropout: float) -> Tensor:
        block, state, num_heads = self.block, self.block.state, len(head_scale_H)
        q, k, v = (_split(x, len(block.index_Q), num_heads) for x in (q_RD, k_RD, v_RD))
        if state.step:
            k, v = (torch.cat([x[:, :, : state.step], y], 2) for x, y in ((self.cache.k, k), (self.cache.v, v)))
        before = torch.arange(state.step, device=q.device)
        bias = state.own_bias(self.cache.bias_2HCC, block.slots, torch.cat([before, block.slots]))
        key = torch.cat([before, state.step + block.index_Q])
        bias = bias.index_select(2, block.index_Q).index_select(3, key) + block.mask_QK
        if self.keep:
            self.cache.k, self.cache.v = k, v
        return _join(attend(q, k, v, bias, self.cache.scale) * head_scale_H[:, None, None])


@dataclass(frozen=True, slots=True)
class _MemoryCore:
    """Cross-attention of one layer."""

    block: _Block
    k: Tensor
    """[E, H, K, d]"""
    v: Tensor
    scale: float

    def __call__(self, q_RD: Tensor, k_RD: None, v_RD: None, head_scale_H: Tensor, dropout: float) -> Tensor:
        block, num_heads = self.block, len(head_scale_H)
        q = _split(q_RD, len(block.index_Q), num_heads)
        bias, logits = block.memory_bias, torch.matmul(q, self.k.transpose(2, 3))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).mul_(self.scale)
        if bias.shape[2] == 1:
            logits += bias
        else:
            for place, part in enumerate(logits.split(block.counts, 2)):
                part += bias[:, :, place, None]
        out = torch.matmul(logits.softmax(-1).to(self.v.dtype), self.v)
        return _join(out * head_scale_H[:, None, None])


def _split(x_RD: Tensor, tokens: int, num_heads: int) -> Tensor:
    """[E, H, Q, d]"""
    return x_RD.view(-1, tokens, num_heads, x_RD.shape[1] // num_heads).transpose(1, 2)


def _join(x_EHQd: Tensor) -> Tensor:
    """[R, D]"""
    return x_EHQd.transpose(1, 2).flatten(0, 1).flatten(1)
