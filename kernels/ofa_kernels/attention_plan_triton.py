"""What the attention's kernels read of a batch beside its tensors: made on the device, once, without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ofa_kernels import attention_triton as kernels
from ofa_kernels.attention_plan import RelativeCodes, Tokens


@dataclass(frozen=True, slots=True)
class Side:
    """Queries or keys of a batch, all int32 on the device."""

    offsets: Tensor
    """[E + 1]."""
    tiles: Tensor
    """[T, 2]: example and first row of each group of owned rows; example E where there are fewer groups than T."""
    position: Tensor
    """[N]."""
    order: Tensor
    """[N] tokens sorted by position, those of one position in their order."""
    starts: Tensor
    """[U + 1]: tokens order[starts[u] : starts[u + 1]] have position u."""

    def tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.__slots__]


_SIDE = len(Side.__slots__)


@dataclass(frozen=True, slots=True)
class Relative:
    """Codes of the tokens and of the positions, all int32 on the device."""

    query_code: Tensor
    """[N]."""
    key_code: Tensor
    """[M]."""
    query_place_code: Tensor
    """[U]."""
    key_place_code: Tensor
    """[V]."""
    query_of: Tensor
    """[E, U]: which of an example's queries, counted from its first, is at a position; -1 for none."""
    key_of: Tensor
    """[E, V]."""

    def tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.__slots__]


_RELATIVE = len(Relative.__slots__)


@dataclass(frozen=True, slots=True)
class TritonPlan:
    num_queries: int
    num_keys: int
    queries: Side
    keys: Side
    """The same object where the tokens are the same."""
    relative: Relative | None
    num_entries: int
    """Of the relative row; 0 for none."""
    causal: bool

    @property
    def is_relative(self) -> bool:
        return self.num_entries > 0

    def tensors(self) -> list[Tensor]:
        """All of them, as an operator takes them; `from_tensors` is the way back."""
        keys = [] if self.keys is self.queries else self.keys.tensors()
        relative = [] if self.relative is None else self.relative.tensors()
        return [*self.queries.tensors(), *keys, *relative]

    @classmethod
    def from_tensors(cls, tensors: list[Tensor], sizes: tuple[int, int], num_entries: int, causal: bool) -> TritonPlan:
        """sizes: queries, keys."""
        relative = Relative(*tensors[-_RELATIVE:]) if num_entries else None
        sides = tensors[:-_RELATIVE] if num_entries else tensors
        queries, *keys = (Side(*sides[i : i + _SIDE]) for i in range(0, len(sides), _SIDE))
        return cls(*sizes, queries, keys[0] if keys else queries, relative, num_entries, causal)


def plan_triton(queries: Tokens, keys: Tokens, *, relative: RelativeCodes | None, causal: bool) -> TritonPlan:
    """An example that has queries but no keys gets zeros. Tokens that were planned before are not planned again."""
    query_side, key_side = _side(queries), _side(keys)
    return TritonPlan(
        num_queries=len(queries.position),
        num_keys=len(keys.position),
        queries=query_side,
        keys=key_side,
        relative=None if relative is None else _relative(relative, (queries, query_side), (keys, key_side)),
        num_entries=0 if relative is None else relative.num_entries,
        causal=causal,
    )


def _relative(codes: RelativeCodes, queries: tuple[Tokens, Side], keys: tuple[Tokens, Side]) -> Relative:
    device = queries[1].position.device
    places = [code.to(device, torch.int32) for code in (codes.query, codes.key)]
    tokens = [place.index_select(0, side.position) for place, (_, side) in zip(places, (queries, keys), strict=True)]
    return Relative(*tokens, *places, _token_of(*queries), _token_of(*keys))


def _token_of(tokens: Tokens, side: Side) -> Tensor:
    """[E, U] int32, kept with the tokens. The launch reports, later, a position that an example has twice."""
    if "token_of" not in tokens.prepared:
        num_tokens, num_examples = len(side.position), len(side.offsets) - 1
        every = torch.arange(num_tokens, device=side.position.device, dtype=torch.int32)
        example = torch.searchsorted(side.offsets, every, right=True, out_int32=True) - 1
        place = (example * tokens.num_positions + side.position).long()
        local = every - side.offsets.index_select(0, example)
        token_of = local.new_full((num_examples * tokens.num_positions,), -1).scatter_(0, place, local)
        alone = (token_of.index_select(0, place) == local).all()
        torch._assert_async(alone, "attention: a relative row wants each position at most once in an example")
        tokens.prepared["token_of"] = token_of.view(num_examples, tokens.num_positions)
    return tokens.prepared["token_of"]


def _side(tokens: Tokens) -> Side:
    """Kept with the tokens: self-attention asks for it twice, and cross-attention for its encoder's again."""
    if "triton" not in tokens.prepared:
        position = tokens.position.to(torch.int32)
        offsets = tokens.offsets.to(position.device, torch.int32)
        in_order, order = position.sort(stable=True)
        every = torch.arange(tokens.num_positions + 1, device=position.device, dtype=torch.int32)
        starts = torch.searchsorted(in_order, every, out_int32=True)
        side = Side(offsets, _tiles(offsets, len(position)), position, order.to(torch.int32), starts)
        tokens.prepared["triton"] = side
    return tokens.prepared["triton"]


def _tiles(offsets: Tensor, num_tokens: int) -> Tensor:
    """As many as there can be: sum of ceil(length / owned) <= num_tokens / owned + E."""
    num_examples = len(offsets) - 1
    counts = (offsets.diff() + (kernels.OWNED - 1)) // kernels.OWNED
    ends = counts.cumsum(0, dtype=torch.int32)
    tile = torch.arange(num_tokens // kernels.OWNED + num_examples, device=offsets.device, dtype=torch.int32)
    example = torch.searchsorted(ends, tile, right=True, out_int32=True)
    first = torch.cat([ends - counts, ends[-1:]]).index_select(0, example)
    return torch.stack([example, (tile - first) * kernels.OWNED], 1)
