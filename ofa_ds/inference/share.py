"""What of a work that several processes do together is this one's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Share:
    """This process's part of what all of them judge or predict together."""

    rank: int = 0
    world_size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    """A picklable value of every rank, by rank; all call it together (`ofa_ds.engine.process_group.gather`). Predicting
    needs none: those processes share a directory."""
    leave: Callable[[], object] = lambda: None
    """All call it when nobody waits for another any more; what rank 0 does then may take longer than others wait."""

    def part(self, items: Sequence[T]) -> list[T]:
        return list(items[self.rank :: self.world_size])

    def whole(self, own: Sequence[T]) -> list[T]:
        """The results of every rank's part, in the order of the whole."""
        parts = self.gather(list(own))
        merged: list[T] = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            merged[rank :: self.world_size] = part
        return merged


ALONE = Share()
