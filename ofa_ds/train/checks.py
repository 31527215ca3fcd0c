"""Silent corruption, looked for now and then: do ranks hold the same bits, does a rank compute the same bits twice?"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ofa_ds.batch import Batch
from ofa_ds.engine.engine import Engine
from ofa_ds.train.objective import Objective

SHOWN_TENSORS = 3


class _Finding(NamedTuple):
    """Of one rank."""

    host: str
    repeats: bool
    """The first micro-batch has the same losses twice."""
    unlike_master: list[str]
    sums: int
    """Hash of those of the replicated state."""


class Checks:
    """All ranks call `check` together before a step; it changes nothing, and raises RuntimeError on all alike."""

    def __init__(self, engine: Engine, objective: Objective, *, every: int, buffers_agree: bool) -> None:
        """every: steps; 0 for never. buffers_agree: the model's buffers are to be the same on all ranks."""
        self._engine, self._objective, self._every, self._buffers_agree = engine, objective, every, buffers_agree

    def is_due(self, step: int) -> bool:
        """Before step number `step` (from 1 on)."""
        return bool(self._every) and step % self._every == 0

    def check(self, step: int, batch: Batch) -> None:
        """batch: this rank's first micro-batch of step number `step`."""
        engine = self._engine
        first, second = (self._objective.replay(engine, batch) for _ in range(2))
        sums = engine.replicated_sums(with_buffers=self._buffers_agree)
        mine = _Finding(socket.gethostname(), first == second, engine.unlike_master(), hash(tuple(sums.values())))
        found: list[_Finding] = [_Finding(*each) for each in engine.gather(tuple(mine))]
        problems = [*_of_single_ranks(found), *self._of_copies(found, sums)]
        if problems:
            raise RuntimeError(
                f"before step {step}: {'; '.join(problems)}: a processor or a memory fails there; leave that host out; "
                f"checkpoints from after step {max(step - self._every, 0)} may hold what it did"
            )

    def _of_copies(self, found: Sequence[_Finding], sums: Mapping[str, int]) -> list[str]:
        """Of what is to be the same on all ranks."""
        kinds = Counter(each.sums for each in found).most_common()
        if len(kinds) == 1:
            return []
        everyone: list[dict[str, int]] = self._engine.gather(dict(sums))
        right = [each.sums for each in found].index(kinds[0][0])
        odd = [rank for rank, each in enumerate(found) if each.sums != kinds[0][0]]
        names = [name for name in sums if any(everyone[rank][name] != everyone[right][name] for rank in odd)]
        where = f"{', '.join(names[:SHOWN_TENSORS])}{' and others' if len(names) > SHOWN_TENSORS else ''}"
        if kinds[1][1] == kinds[0][1]:
            return [f"{_listed(range(len(found)), found)} do not hold the same bits in {where}"]
        return [f"{_listed(odd, found)} holds other bits than all others in {where}"]


def _of_single_ranks(found: Sequence[_Finding]) -> list[str]:
    problems = []
    for rank, each in enumerate(found):
        if not each.repeats:
            problems.append(f"{_listed([rank], found)} computes other losses from the same micro-batch a second time")
        if each.unlike_master:
            name = each.unlike_master[0]
            problems.append(f"{_listed([rank], found)} holds {name} unlike its fp32 master")
    return problems


def _listed(ranks: Sequence[int], found: Sequence[_Finding]) -> str:
    return ", ".join(f"rank {rank} on {found[rank].host}" for rank in ranks)
