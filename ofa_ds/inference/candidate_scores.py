"""The log-probability of every answer that an example may have, all in one tree (docs/downstream.md, How answers are
found).

The answers share their beginnings, and what an answer begins with is computed once. A vertex of the trie (what has been
generated so far) must go through the decoder only where the list leaves a choice there or further on: a token that is
the only one possible has probability 1. So what the decoder reads is the inner part of the trie, its vertices packed
one after another, each seeing those on its way from the root; and of the vocabulary only the rows of what may follow.

Legend: E examples, C candidates, V vertices of the trie, N vertices that go through the decoder together, D channels, W
following tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ofa_ds.batch import Batch
from ofa_ds.model.ofa import OFA
from ofa_ds.tasks.candidates import MAX_FOLLOWING, Candidates
from ofa_ds.terms import BOS_ID

TOKENS_A_PASS = 4096
"""Decoder tokens of all examples that go through the model together, about."""
MAX_VERTICES_A_PASS = 256
"""Every vertex is compared with every other of its pass; more would make that, and not the layers, the work."""


@torch.no_grad()
def candidate_scores(model: OFA, batch: Batch, prompts: Sequence[Sequence[int]], candidates: Candidates) -> Tensor:
    """[E, C] in at least fp32: the sum of the log-probabilities of each candidate's tokens and its eos.

    Each token's probability is among those that the list allows at its place. prompts: what follows bos, before the
    answer, of each example; the decoder side of `batch` is not read. Raises ValueError: a prompt and the longest answer
    together are longer than the model's positions.
    """
    device, whole = batch.decoder_offsets.device, [[BOS_ID, *prompt] for prompt in prompts]
    state = model.start_decoding(batch, read=[row[:-1] for row in whole])
    root_E = torch.tensor([row[-1] for row in whole], device=device)
    plan = candidates.plan
    size = max(min(TOKENS_A_PASS // len(whole), MAX_VERTICES_A_PASS), 1)
    log_prob_EV: Tensor | None = None
    for part in plan.parts(size):
        tokens_EN = torch.from_numpy(plan.trie.token_V[part.vertices]).to(device).repeat(len(whole), 1)
        tokens_EN[:, 0] = root_E
        depth_N, seen_NN = (torch.from_numpy(each).to(device) for each in (part.depth, part.seen))
        hidden_END = model.decode_tree(tokens_EN, depth_N, seen_NN, state)
        for places, following in part.choices:
            scores = _choices(model, hidden_END[:, torch.from_numpy(places).to(device)], plan.trie.token_V, following)
            if log_prob_EV is None:
                log_prob_EV = scores.new_zeros(len(whole), len(plan.trie.token_V))
            known = torch.from_numpy(following >= 0).to(device)
            log_prob_EV[:, torch.from_numpy(following[following >= 0]).to(device)] = scores[:, known]
    if log_prob_EV is None:  # one candidate
        dtype = torch.promote_types(model.encoder.embed_tokens.weight.dtype, torch.float32)
        return torch.zeros(len(whole), len(candidates.ids), dtype=dtype, device=device)
    for pair in plan.levels:
        vertices, parents = map(torch.from_numpy, pair)
        log_prob_EV[:, vertices] += log_prob_EV[:, parents]
    return log_prob_EV[:, torch.from_numpy(plan.ends_C)]


def _choices(model: OFA, hidden_END: Tensor, token_V: np.ndarray, following_NW: np.ndarray) -> Tensor:
    """[E, N, W]: log-probability of each following vertex, in at least fp32. following_NW: -1 for none."""
    ids_NW = torch.from_numpy(token_V[following_NW]).to(hidden_END.device)
    if ids_NW.numel() > MAX_FOLLOWING:  # one vertex; more are never together where they are so many
        logits_ENV = model.logits(hidden_END.flatten(0, 1)).unflatten(0, hidden_END.shape[:2])
        logits_ENW = logits_ENV.gather(2, ids_NW.clamp(min=0).expand(len(hidden_END), -1, -1))
    else:
        rows_NDW = model.encoder.embed_tokens(ids_NW.clamp(min=0)).transpose(1, 2)
        logits_ENW = torch.matmul(hidden_END.transpose(0, 1), rows_NDW).transpose(0, 1)
    logits_ENW = logits_ENW.to(torch.promote_types(logits_ENW.dtype, torch.float32))
    return logits_ENW.masked_fill(torch.from_numpy(following_NW < 0).to(logits_ENW.device), -torch.inf).log_softmax(2)
