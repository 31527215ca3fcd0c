"""Which tensors a process holds at this moment, by what they are for; also those that only autograd knows."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

MAX_NODES = 500_000
"""Of autograd's graph that are looked at."""
ROWS = 40


class Piece(NamedTuple):
    """One piece of memory, whatever tensors look at it."""

    kind: str
    of: str
    """Type and shape of the tensor that it was found by."""
    num_bytes: int
    device: str


def live_tensors(held: Iterable[tuple[str, Tensor]] = (), *, saved: bool = True) -> list[Piece]:
    """Every piece once, by the first that names it: `held`, then autograd, then Python.

    saved: also what autograd keeps for a backward. Not where layers are computed again: asking for what they saved
    would compute them.
    """
    pieces: dict[tuple[str, int], Piece] = {}

    def add(kind: str, tensor: Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
            key = (str(storage.device), storage.data_ptr())
            if key[1] and key not in pieces:  # 0: on meta, or released by ZeRO-3
                of = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                if (whole := storage.nbytes() // tensor.element_size()) > tensor.numel():
                    of += f", of {whole:,} elements"
                pieces[key] = Piece(kind, of, storage.nbytes(), key[0])
        except Exception:  # noqa: S110 - a tensor of another kind: sparse, wrapped, being destroyed
            pass

    for kind, tensor in held:
        add(kind, tensor)
    found = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    if saved:
        for node, tensor in _saved(found):
            add(f"saved for the backward by {node}", tensor)
    for tensor in found:
        if issubclass(type(tensor), nn.Parameter):
            add("weights of no engine", tensor)
        else:
            add("of the step under way" if tensor.grad_fn is not None else "other", tensor)
    return list(pieces.values())


def _saved(tensors: Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(operator, tensor) of what autograd keeps, from all graphs that any of the tensors ends."""
    pending = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(pending)
    names: dict[type, list[str]] = {}
    while pending and len(seen) < MAX_NODES:
        node = pending.pop()
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
        kind = type(node)
        if kind not in names:
            fields = [name for name in dir(kind) if name.startswith("_saved_")]
            names[kind] = [*fields, *(["saved_tensors"] if hasattr(kind, "saved_tensors") else [])]
        for name in names[kind]:
            try:
                value = getattr(node, name)
            except Exception:  # noqa: S112 - given back already, or changed since
                continue
            for each in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(each, Tensor):
                    yield kind.__name__, each


def by_kind(pieces: Iterable[Piece], device: torch.device) -> dict[str, int]:
    """Bytes on a device (its type and index) by kind, the largest first; what autograd saved is one kind."""
    sums: dict[str, int] = defaultdict(int)
    for piece in pieces:
        if piece.device == str(device):
            sums[_short(piece.kind)] += piece.num_bytes
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def table(pieces: Iterable[Piece]) -> list[str]:
    """Lines: bytes, how many of them, what they are; alike ones together, the largest first."""
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for piece in pieces:
        entry = groups[piece.kind, piece.of, piece.device]
        entry[0] += piece.num_bytes
        entry[1] += 1
    rows = sorted(groups.items(), key=lambda item: -item[1][0])
    lines = [f"{'MiB':>12} {'count':>7}  what"]
    for (kind, of, device), (num_bytes, count) in rows[:ROWS]:
        lines.append(f"{num_bytes / 2**20:>12,.1f} {count:>7}  {kind}: {of} on {device}")
    if left := rows[ROWS:]:
        total, count = (sum(entry[i] for _, entry in left) for i in (0, 1))
        lines.append(f"{total / 2**20:>12,.1f} {count:>7}  (all else)")
    return lines


def _short(kind: str) -> str:
    return "saved for the backward" if kind.startswith("saved for the backward") else kind
