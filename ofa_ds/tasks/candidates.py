"""The answers that a task may give, where they are a list: their ids, and what may follow what.

Legend: C answers, L tokens of the longest with its eos, V vertices, N vertices of a part, W following tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ofa_ds.terms import EOS_ID

ROOT = 0
MAX_FOLLOWING = 16384
"""Following tokens of which the rows of the vocabulary are multiplied at once; where one vertex has more, all are."""
_NONE = -1
"""Stands after the end of an answer: less than every id."""


class Trie:
    """The set of answers that a constrained generation may give, each with its eos, as one tree of V vertices.

    A vertex is what has been generated so far. Vertices are numbered depth first, children in the order of their ids,
    so that a parent comes before its children and a subtree is a run. The root has generated nothing.
    """

    def __init__(self, answers: Sequence[Sequence[int]] = ()) -> None:
        """answers: ids without bos and eos. Takes half a second for 100,000."""
        rows_CL = _padded(answers)
        order_C = np.lexsort(rows_CL.T[::-1])
        rows_CL = rows_CL[order_C]
        new_CL = np.ones(rows_CL.shape, bool)
        new_CL[1:] = np.logical_or.accumulate(rows_CL[1:] != rows_CL[:-1], axis=1)
        new_CL &= rows_CL != _NONE
        vertex_CL = np.cumsum(new_CL, dtype=np.int64).reshape(new_CL.shape) * new_CL
        vertex_CL = np.maximum.accumulate(vertex_CL, axis=0)
        parent_CL = np.concatenate([np.full((len(rows_CL), 1), ROOT), vertex_CL[:, :-1]], axis=1)
        depth_CL = np.broadcast_to(np.arange(1, rows_CL.shape[1] + 1), rows_CL.shape)
        self.token_V = np.concatenate([[_NONE], rows_CL[new_CL]]).astype(np.int64)
        """What each vertex has generated last."""
        self.parent_V = np.concatenate([[_NONE], parent_CL[new_CL]]).astype(np.int64)
        self.depth_V = np.concatenate([[0], depth_CL[new_CL]]).astype(np.int64)
        """How much each vertex has generated."""
        self.num_children_V = np.bincount(self.parent_V[1:], minlength=len(self.token_V))
        self._first_V = np.concatenate([[0], np.cumsum(self.num_children_V)])
        self._children = np.argsort(self.parent_V[1:], kind="stable") + 1
        lengths_C = (rows_CL != _NONE).sum(1)
        self.end_C = np.empty(len(rows_CL), np.int64)
        """The vertex of each answer with its eos."""
        self.end_C[order_C] = vertex_CL[np.arange(len(rows_CL)), lengths_C - 1]

    def children(self, vertex: int) -> np.ndarray:
        """Vertices, in the order of their ids."""
        return self._children[self._first_V[vertex] : self._first_V[vertex + 1]]

    def allowed(self, vertex: int | None) -> np.ndarray:
        """Ids that may follow, ascending; eos where nothing does, and after what begins no answer (None)."""
        children = () if vertex is None else self.children(vertex)
        return self.token_V[children] if len(children) else _ONLY_EOS

    def follow(self, vertex: int | None, token: int) -> int | None:
        """The vertex that `token` leads to; None: no answer goes on so."""
        if vertex is None:
            return None
        children = self.children(vertex)
        place = int(np.searchsorted(self.token_V[children], token))
        return int(children[place]) if place < len(children) and self.token_V[children[place]] == token else None

    def next(self, prefix: Sequence[int]) -> list[int]:
        """Ids that may follow `prefix` (without bos), ascending; [eos] if no answer begins so."""
        vertex: int | None = ROOT
        for token in prefix:
            vertex = self.follow(vertex, token)
        return self.allowed(vertex).tolist()


@dataclass(frozen=True, slots=True)
class Part:
    """Vertices that go through the decoder together: a run of the trie, and what its branch begins with."""

    vertices: np.ndarray
    """int64 [N], ordered by depth; the root first."""
    depth: np.ndarray
    """int64 [N]."""
    seen: np.ndarray
    """bool [N, N], query by key: vertices on the way from the root, the last one included."""
    choices: list[tuple[np.ndarray, np.ndarray]]
    """(places [n] in this part, following vertices [n, W], -1 for none): those with about as many, each once in all."""


class Plan:
    """What of a trie the decoder must compute to score all answers; the same for every example.

    A vertex (what has been generated so far) matters only where the list leaves a choice there or further on: a token
    that is the only one possible has probability 1.
    """

    def __init__(self, trie: Trie, ends: bool) -> None:
        """ends: answers are scored with their eos."""
        self.trie = trie
        self.ends_C = trie.end_C if ends else trie.parent_V[trie.end_C]
        """The vertex of each answer whose sum is its score."""
        depths = [np.flatnonzero(trie.depth_V == depth) for depth in range(int(trie.depth_V.max()) + 1)]
        self.levels = [(each, trie.parent_V[each]) for each in depths[2:]]
        """(vertices, their parents) of each depth from 2 on."""
        self.chosen_V = trie.num_children_V > 1
        needed_V = self.chosen_V.copy()
        for each in reversed(depths[1:]):
            needed_V[trie.parent_V[each[needed_V[each]]]] = True
        self.needed = np.flatnonzero(needed_V)

    def parts(self, size: int) -> Iterator[Part]:
        """Runs of at most `size` vertices, each with the few before it that it hangs on."""
        for at in range(0, len(self.needed), size):
            yield self._part(self.needed[at : at + size])

    def _part(self, run: np.ndarray) -> Part:
        trie = self.trie
        way, vertex = [], int(trie.parent_V[run[0]])  # in this order all others hang on the run or on this branch
        while vertex >= 0:
            way.append(vertex)
            vertex = int(trie.parent_V[vertex])
        vertices = np.concatenate([np.array(way[::-1], np.int64), run])
        vertices = vertices[np.argsort(trie.depth_V[vertices], kind="stable")]
        place_of = {vertex: place for place, vertex in enumerate(vertices.tolist())}
        seen = np.eye(len(vertices), dtype=bool)
        for place, parent in enumerate(trie.parent_V[vertices].tolist()):
            if parent >= 0:
                seen[place] |= seen[place_of[parent]]
        chosen = run[self.chosen_V[run]]
        return Part(vertices, trie.depth_V[vertices], seen, list(self._choices(chosen, place_of)))

    def _choices(self, chosen: np.ndarray, place_of: dict[int, int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Vertices in groups whose numbers of following tokens lie within a factor of two."""
        sizes = np.ceil(np.log2(self.trie.num_children_V[chosen])).astype(int)
        for size in np.unique(sizes):
            group = chosen[sizes == size]
            width = int(self.trie.num_children_V[group].max())
            together = max(MAX_FOLLOWING // width, 1)
            for part in (group[at : at + together] for at in range(0, len(group), together)):
                following = np.full((len(part), width), -1, np.int64)
                for row, vertex in zip(following, part.tolist(), strict=True):
                    children = self.trie.children(vertex)
                    row[: len(children)] = children
                yield np.array([place_of[vertex] for vertex in part.tolist()]), following


def _padded(answers: Sequence[Sequence[int]]) -> np.ndarray:
    """int64 [C, L]: each answer and eos, then _NONE."""
    lengths_C = np.array([len(answer) for answer in answers], np.int64)
    rows_CL = np.full((len(answers), int(lengths_C.max(initial=0)) + 1), _NONE, np.int64)
    places_CL = np.arange(rows_CL.shape[1])
    total = int(lengths_C.sum())
    rows_CL[places_CL < lengths_C[:, None]] = np.fromiter((t for answer in answers for t in answer), np.int64, total)
    rows_CL[places_CL == lengths_C[:, None]] = EOS_ID
    return rows_CL


_ONLY_EOS = np.array([EOS_ID], np.int64)


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The answers in the order in which ties are decided."""

    answers: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    """Of each answer as the decoder gives it, without bos and eos."""
    ends: bool = True
    """An answer ends in eos; False: it is one label token, and nothing follows (GLUE)."""

    @cached_property
    def trie(self) -> Trie:
        return Trie(self.ids)

    @cached_property
    def plan(self) -> Plan:
        return Plan(self.trie, self.ends)

    def allowed(self, answer: Sequence[int]) -> tuple[np.ndarray, ...]:
        """Ids that may come at each place of an answer, and after it where it ends in eos; ascending int64."""
        found, vertex = [], ROOT
        for token in answer:
            found.append(self.trie.allowed(vertex))
            vertex = self.trie.follow(vertex, token)
        return (*found, self.trie.allowed(vertex)) if self.ends else tuple(found)

    def __getstate__(self) -> dict[str, object]:
        """What another process is sent: without the trie and its plan, which it builds faster than it reads it."""
        return {"answers": self.answers, "ids": self.ids, "ends": self.ends}
