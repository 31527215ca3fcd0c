"""Where the tokens of a packed batch go when the reference attention pads them: once per batch, for all layers.

Examples of similar length share a bucket, so that little is padded. Inside a bucket the `lead` tokens of all examples
(image patches) start at the same place and the rest (text) starts at the same place; then one slot shows one position
in most batches, and the positional bias of the bucket needs no batch axis.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

MASKED = -1e30
"""Added to a logit that must not count. Finite: a row without keys gives no NaN, and exp() of it is exactly 0."""

_BUCKET_COST = 8000
"""What another bucket costs, in padded query-key pairs. A small model's step on a CPU is flat from 1000 to 32000."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """One side of the attention. E examples, N tokens, U positions."""

    offsets: Tensor
    """[E + 1]: example e owns tokens offsets[e] : offsets[e + 1]."""
    position: Tensor
    """[N] int64: which of the U positional vectors a token has."""
    num_positions: int
    lead: Tensor | None = None
    """[E]: how many tokens come first in each example and are of another kind (patches); None for none."""
    prepared: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What an implementation made of them when they were first planned: pass one object on to share it."""


@dataclass(frozen=True, slots=True)
class RelativeCodes:
    """A pair of positions (u, v) has the relative bias row[query[u] - key[v]], or none outside 0 .. num_entries - 1.

    No code is above num_entries: the kernels tell a key that does not exist by a higher one.
    """

    query: Tensor
    """[U] int64."""
    key: Tensor
    """[V] int64."""
    num_entries: int

    def row_index(self) -> Tensor:
        """[U * V] entry of the row of every pair; num_entries for none."""
        index = (self.query[:, None] - self.key[None, :]).flatten()
        outside = (index < 0) | (index >= self.num_entries)
        return index.masked_fill_(outside, self.num_entries)


@dataclass(frozen=True, slots=True)
class Bucket:
    """b examples padded to Q queries and K keys, in rows of the padded axes."""

    query_start: int
    key_start: int
    num_examples: int
    num_queries: int
    num_keys: int
    bias_index: Tensor | None
    """[Q * K], or [b * Q * K] where positions differ between examples; None where it would be 0, 1, 2, ..."""
    bias_shared: bool
    causal_mask: Tensor | None
    """[Q, K] bool: True where a key lies in the future."""
    key_mask: Tensor | None
    """[b, 1, K] fp32: MASKED at pads, or None where nothing is padded."""

    def queries(self, x: Tensor, num_heads: int) -> Tensor:
        """This bucket's rows of x [padded queries, H * d] -> [H * b, Q, d]."""
        return self._heads(x, self.query_start, self.num_queries, num_heads)

    def keys(self, x: Tensor, num_heads: int) -> Tensor:
        """This bucket's rows of x [padded keys, H * d] -> [H * b, K, d]."""
        return self._heads(x, self.key_start, self.num_keys, num_heads)

    def put_queries(self, out: Tensor, x_h: Tensor) -> None:
        """Inverse of `queries`, into out [padded queries, H, d]."""
        self._put(out, x_h, self.query_start, self.num_queries)

    def put_keys(self, out: Tensor, x_h: Tensor) -> None:
        """Inverse of `keys`, into out [padded keys, H, d]."""
        self._put(out, x_h, self.key_start, self.num_keys)

    def add_bias_grad(self, dbias_HX: Tensor, dlogits: Tensor) -> None:
        """Add the gradient of this bucket's logits [H * b, Q, K] to that of all pairs of positions."""
        num_heads = dbias_HX.shape[0]
        dbias = dlogits.view(num_heads, self.num_examples, -1)
        dbias = dbias.sum(1) if self.bias_shared else dbias.flatten(1)
        if self.bias_index is None:
            dbias_HX.add_(dbias)
        else:
            dbias_HX.scatter_add_(1, self.bias_index.expand(num_heads, -1), dbias)

    def _heads(self, x: Tensor, start: int, length: int, num_heads: int) -> Tensor:
        rows = x[start : start + self.num_examples * length]
        split = rows.view(self.num_examples, length, num_heads, -1).permute(2, 0, 1, 3)
        return split.reshape(num_heads * self.num_examples, length, -1)

    def _put(self, out: Tensor, x_h: Tensor, start: int, length: int) -> None:
        rows = out[start : start + self.num_examples * length]
        split = x_h.view(out.shape[1], self.num_examples, length, -1).permute(1, 2, 0, 3)
        rows.view(split.shape).copy_(split)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    num_queries: int
    num_keys: int
    num_position_pairs: int
    """U * V."""
    query_token: Tensor
    """[padded queries] the token in each place; 0 at pads."""
    query_source: Tensor
    """The same, but N at pads."""
    query_slot: Tensor
    """[N] the place of each token."""
    key_token: Tensor
    key_slot: Tensor
    row_index: Tensor | None
    """[U * V] entry of the relative row; one past the last for none."""
    buckets: tuple[Bucket, ...]

    @property
    def is_relative(self) -> bool:
        return self.row_index is not None


def plan_padded(
    queries: Tokens, keys: Tokens, *, relative: RelativeCodes | None, causal: bool, kind: Tensor | None = None
) -> AttentionPlan:
    """Sort the examples into buckets and say where each token goes.

    kind [E]: examples of different kinds never share a bucket (their positions could not agree). For self-attention
    pass the same object as queries and keys. Raises ValueError for an example that has queries but no keys.
    """
    query_side = _Side(queries)
    key_side = query_side if queries is keys else _Side(keys)
    if np.any((query_side.lengths > 0) & (key_side.lengths == 0)):
        example = int(np.argmax((query_side.lengths > 0) & (key_side.lengths == 0)))
        raise ValueError(
            f"attention: example {example} has queries but no keys; give every example at least one key token"
        )
    device = queries.position.device
    kinds = np.zeros(len(query_side.lengths), np.int64) if kind is None else _numpy(kind).astype(np.int64)
    buckets = []
    for examples in _bucket_examples(query_side, key_side, kinds):
        buckets.append(_bucket(query_side, key_side, examples, causal=causal, device=device))
    query_token, query_slot = query_side.places(device)
    key_token, key_slot = (query_token, query_slot) if queries is keys else key_side.places(device)
    return AttentionPlan(
        num_queries=query_slot.shape[0],
        num_keys=key_slot.shape[0],
        num_position_pairs=queries.num_positions * keys.num_positions,
        query_token=query_token,
        query_source=_tensor(query_side.sources(), device),
        query_slot=query_slot,
        key_token=key_token,
        key_slot=key_slot,
        row_index=None if relative is None else relative.row_index(),
        buckets=tuple(buckets),
    )


class _Side:
    """Queries or keys while the plan is made: lengths in, padded places out."""

    def __init__(self, tokens: Tokens) -> None:
        self.offsets = _numpy(tokens.offsets).astype(np.int64)
        self.position = _numpy(tokens.position)
        self.num_positions = tokens.num_positions
        self.lengths = np.diff(self.offsets)
        self.lead = np.zeros_like(self.lengths) if tokens.lead is None else _numpy(tokens.lead).astype(np.int64)
        self.rest = self.lengths - self.lead
        self._tokens: list[np.ndarray] = []
        self.num_places = 0

    def padded_length(self, examples: np.ndarray) -> int:
        return int(self.lead[examples].max() + self.rest[examples].max())

    def place(self, examples: np.ndarray) -> np.ndarray:
        """Append a bucket to the padded axis -> its tokens [b, L], -1 at pads."""
        lead, rest = self.lead[examples, None], self.rest[examples, None]
        slot = np.arange(self.padded_length(examples))
        max_lead = int(lead.max())
        in_rest = slot - max_lead
        index = np.where(slot < max_lead, slot, in_rest + lead)
        valid = np.where(slot < max_lead, slot < lead, in_rest < rest)
        token = np.where(valid, index + self.offsets[examples, None], -1)
        self._tokens.append(token.ravel())
        self.num_places += token.size
        return token

    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(token of each place, 0 at pads; place of each token)."""
        token = self.sources()
        slot = np.empty(int(self.offsets[-1]), np.int64)
        used = np.flatnonzero(token < len(slot))
        slot[token[used]] = used
        token[token == len(slot)] = 0
        return _tensor(token, device), _tensor(slot, device)

    def sources(self) -> np.ndarray:
        """Token of each place, the number of tokens at pads."""
        token = np.concatenate(self._tokens) if self._tokens else np.zeros(0, np.int64)
        return np.where(token < 0, self.offsets[-1], token)


def _bucket(queries: _Side, keys: _Side, examples: np.ndarray, *, causal: bool, device: torch.device) -> Bucket:
    query_start, key_start = queries.num_places, keys.num_places
    query_token = queries.place(examples)
    key_token = query_token if queries is keys else keys.place(examples)
    num_queries, num_keys = query_token.shape[1], key_token.shape[1]
    index, shared = _bias_index(queries, keys, query_token, key_token)
    identity = index.size == queries.num_positions * keys.num_positions and np.array_equal(index, np.arange(index.size))
    padded = key_token < 0
    key_mask = (
        torch.from_numpy(np.where(padded, np.float32(MASKED), np.float32(0))[:, None]).to(device)
        if padded.any()
        else None
    )
    causal_mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).triu_(1) if causal else None
    return Bucket(
        query_start=query_start,
        key_start=key_start,
        num_examples=len(examples),
        num_queries=num_queries,
        num_keys=num_keys,
        bias_index=None if identity else _tensor(index, device),
        bias_shared=shared,
        causal_mask=causal_mask,
        key_mask=key_mask,
    )


def _bias_index(queries: _Side, keys: _Side, query_token: np.ndarray, key_token: np.ndarray) -> tuple[np.ndarray, bool]:
    """Which pair of positions each logit of the bucket shows, and whether that is the same for all its examples."""
    query_position, query_agrees = _positions(queries, query_token)
    key_position, key_agrees = _positions(keys, key_token)
    shared = query_agrees and key_agrees
    if shared:
        query_position, key_position = query_position.max(0, keepdims=True), key_position.max(0, keepdims=True)
    query_position, key_position = np.maximum(query_position, 0), np.maximum(key_position, 0)
    return (query_position[:, :, None] * keys.num_positions + key_position[:, None, :]).ravel(), shared


def _positions(side: _Side, token: np.ndarray) -> tuple[np.ndarray, bool]:
    position = np.where(token >= 0, side.position[np.maximum(token, 0)], -1)
    agrees = bool(((position == position.max(0)) | (position < 0)).all())
    return position, agrees


def _bucket_examples(queries: _Side, keys: _Side, kinds: np.ndarray) -> list[np.ndarray]:
    """Examples of each bucket: sorted by kind and length, then halved wherever that saves more than a bucket costs."""
    order = np.lexsort((queries.rest, keys.rest, queries.lead, keys.lead, kinds))
    bounds = np.flatnonzero(np.diff(kinds[order])) + 1
    return [
        part for same_kind in np.split(order, bounds) if len(same_kind) for part in _split(queries, keys, same_kind)
    ]


def _split(queries: _Side, keys: _Side, examples: np.ndarray) -> list[np.ndarray]:
    num = len(examples)
    ahead = _padded_pairs(queries, keys, examples)
    behind = _padded_pairs(queries, keys, examples[::-1])[::-1]
    if num > 1:
        costs = ahead[:-1] + behind[1:] + _BUCKET_COST
        cut = int(costs.argmin()) + 1
        if costs[cut - 1] < ahead[-1]:
            return _split(queries, keys, examples[:cut]) + _split(queries, keys, examples[cut:])
    return [examples]


def _padded_pairs(queries: _Side, keys: _Side, examples: np.ndarray) -> np.ndarray:
    """Padded query-key pairs of the first 1, 2, ... of the examples in one bucket."""
    lengths = [
        np.maximum.accumulate(side.lead[examples]) + np.maximum.accumulate(side.rest[examples])
        for side in (queries, keys)
    ]
    return lengths[0] * lengths[1] * np.arange(1, len(examples) + 1)


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


def _tensor(x: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).to(device)
