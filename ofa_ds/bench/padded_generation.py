"""How the original answers, on a model of ours: no caches, padded, one row a beam, candidates in chunks.

The search itself is `ofa_ds.inference.generate` in both; the scores of candidates are computed as the original's
evaluation does. Tests hold the results together with ours.

Legend: B rows, S memory tokens, L decoder tokens, C candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ofa_ds.bench.padded import PaddedBatch, PaddedOFA
from ofa_ds.model.ofa import OFA
from ofa_ds.tasks.candidates import Candidates
from ofa_ds.terms import BOS_ID, EOS_ID, PAD_ID

CHUNK = 20
"""Candidates that go through the decoder together: `valid_batch_size` of the original."""

Memory = tuple[Tensor, Tensor, Tensor]
"""Of `PaddedOFA.encode`: states [S, B, D], padding [B, S], positions [B, S, D]."""


def repeated(memory: Memory, times: int) -> Memory:
    """Every row `times` times, as a tensor of its own."""
    return tuple(x.repeat_interleave(times, dim) for x, dim in zip(memory, (1, 0, 0), strict=True))


@dataclass
class PaddedState:
    tokens_RL: Tensor
    """int64: all that each row has been fed."""
    memory: Memory

    def reorder(self, index_R: Tensor) -> None:
        states, padding, positions = self.memory
        self.tokens_RL = self.tokens_RL[index_R]
        self.memory = states[:, index_R], padding[index_R], positions[index_R]


class UncachedModel:
    """What `generate` asks of a model, without caches: each step runs all tokens so far, each row with its memory.

    The original's generator, where a model has no caches, computes the logits of all positions and takes the last ones;
    last_only: those alone.
    """

    def __init__(self, model: OFA, batch: PaddedBatch, *, last_only: bool = False) -> None:
        self.model, self.padded, self.batch, self.last_only = model, PaddedOFA(model), batch, last_only

    def start_decoding(self, batch: object, beams: int = 1, *, read: object = None) -> PaddedState:
        memory = repeated(self.padded.encode(self.batch), beams)
        return PaddedState(torch.empty(memory[1].shape[0], 0, dtype=torch.int64), memory)

    def decode_step(self, tokens_R: Tensor, state: PaddedState) -> Tensor:
        state.tokens_RL = torch.cat([state.tokens_RL, tokens_R[:, None]], 1)
        hidden_LRD = self.padded.decode(previous(state.tokens_RL), *state.memory)
        hidden_LRD = hidden_LRD[-1:] if self.last_only else hidden_LRD
        return F.linear(hidden_LRD.transpose(0, 1), self.model.encoder.embed_tokens.weight)[:, -1]


def previous(tokens_BL: Tensor, *, code: bool = False) -> PaddedBatch:
    """Of the decoder alone. code: it generates image codes."""
    nothing = torch.empty(0)
    return PaddedBatch(
        images=nothing, has_image=nothing, patches=None, source=nothing, previous=tokens_BL, target=nothing,
        code=torch.full((len(tokens_BL),), code),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """The decoder's side of some candidates for every example: rows are examples x candidates."""

    previous: Tensor
    """int64 [B, L]: bos, prompt, answer."""
    target: Tensor
    """int64 [B, L]: pads for the prompt, answer, eos."""
    allowed: Tensor
    """bool [B, L, V]."""


def chunks_of(
    prompts: Sequence[Sequence[int]], candidates: Candidates, vocab_size: int, which: Sequence[int] | None = None
) -> list[Chunk]:
    """which: the numbers of some chunks of CHUNK candidates, in order; all where not given."""
    count = -(-len(candidates.ids) // CHUNK)
    return [_chunk(prompts, candidates, vocab_size, at * CHUNK) for at in (range(count) if which is None else which)]


def _chunk(prompts: Sequence[Sequence[int]], candidates: Candidates, vocab_size: int, first: int) -> Chunk:
    rows = [(list(prompt), ids) for prompt in prompts for ids in candidates.ids[first : first + CHUNK]]
    length = max(len(prompt) + len(ids) for prompt, ids in rows) + 1
    previous, target = torch.full((2, len(rows), length), PAD_ID).unbind()
    allowed = torch.zeros(len(rows), length, vocab_size, dtype=torch.bool)
    for row, (prompt, ids) in enumerate(rows):
        before = len(prompt)
        previous[row, : 1 + before + len(ids)] = torch.tensor([BOS_ID, *prompt, *ids])
        target[row, before : before + len(ids) + 1] = torch.tensor([*ids, EOS_ID])
        allowed[row, :before] = allowed[row, before + len(ids) + 1 :] = True  # positions without a target
        for place, following in enumerate(candidates.allowed(ids)):
            allowed[row, before + place, torch.from_numpy(following)] = True
    return Chunk(previous=previous, target=target, allowed=allowed)


@torch.no_grad()
def chunked_scores(padded: PaddedOFA, memory: Memory, chunks: Sequence[Chunk]) -> Tensor:
    """[E, candidates of the chunks]: every candidate a row with its example's memory, logits of all the vocabulary."""
    num_examples, found = memory[1].shape[0], []
    for chunk in chunks:
        rows = repeated(memory, len(chunk.previous) // num_examples)
        hidden_LBD = padded.decode(previous(chunk.previous), *rows)
        logits_BLV = F.linear(hidden_LBD.transpose(0, 1), padded.encoder.embed_tokens.weight)
        logits_BLV.masked_fill_(~chunk.allowed, -torch.inf)
        logp_BL = logits_BLV.log_softmax(-1).gather(-1, chunk.target[..., None])[..., 0]
        found.append(logp_BL.masked_fill(chunk.target == PAD_ID, 0).sum(1).view(num_examples, -1))
    return torch.cat(found, 1)
