"""Which weights ZeRO-3 gathers when: DeepSpeed 0.19.8's PartitionedParameterCoordinator, in arithmetic.

A fetch gathers what the module wants and does not have, then as many of the next parameters as the prefetch bucket
takes, in the order of the micro-batch before. A release frees what is not wanted again within `max_reuse` elements.
The first two micro-batches of a run are other: nothing is known of the order then. So a plan begins at the first and
goes on until steps repeat.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from ofa_ds.plan.layout import Layout
from ofa_ds.plan.order import Event, Order


class Gather(NamedTuple):
    """One all-gather."""

    elements: int
    """With what is padded: every parameter to a multiple of the ranks."""
    parameters: tuple[str, ...]
    group: str
    """`world`, or `host` where a second copy is there (hpZ)."""


class _Trace:
    """What is known of the order after a whole micro-batch."""

    def __init__(self, order: Order, names: Sequence[str], numel: dict[str, int]) -> None:
        """names: the module of each fetch."""
        self.queue = [(name, at) for at, module in enumerate(names) for name in order.own.get(module, ())]
        self._uses, self._passed = {}, {}
        below = _below(order, set(names))
        for recurse, contents in ((False, order.direct), (True, below)):
            uses: dict[str, list[int]] = {}
            passed = [0]
            for at, module in enumerate(names):
                inside = [*contents.get(module, ()), *order.external.get(module, ())]
                for name in inside:
                    uses.setdefault(name, []).append(at)
                passed.append(passed[-1] + sum(numel[name] for name in inside))
            self._uses[recurse], self._passed[recurse] = uses, passed

    def wanted_soon(self, name: str, step: int, recurse: bool, elements: int) -> bool:
        """Whether a fetch from `step` on wants it before modules with so many elements have gone by."""
        passed = self._passed[recurse]
        end = bisect_left(passed, passed[min(step, len(passed) - 1)] + elements, lo=min(step, len(passed) - 1))
        uses = self._uses[recurse].get(name, ())
        at = bisect_left(uses, step)
        return at < len(uses) and uses[at] < end


def _below(order: Order, modules: set[str]) -> dict[str, list[str]]:
    """All parameters in each module, however deep."""
    found: dict[str, list[str]] = {}
    for each in order.parameters:
        parts = each.module.split(".")
        for name in ("", *(".".join(parts[: i + 1]) for i in range(len(parts)))):
            if name in modules:
                found.setdefault(name, []).append(each.name)
    return found


class Coordinator:
    """The weights of one rank through a run's micro-batches."""

    def __init__(self, order: Order, layout: Layout) -> None:
        self._order, self._layout = order, layout
        self._numel = {each.name: each.numel for each in order.parameters}
        self.persistent = [name for name, numel in self._numel.items() if numel <= layout.persistence_threshold]
        self._persists = set(self.persistent)
        self._here: set[str] = set()
        """Whole on this rank."""
        self._flight: dict[str, tuple[str, ...]] = {}
        """Parameters on their way -> all that come with them, as DeepSpeed's registry has them."""
        self._coming: set[str] = set()
        self._second: set[str] = set()
        """Have a second copy."""
        self._active: dict[str, set[str]] = {}
        self._trace: _Trace | None = None
        self._recording: list[str] | None = None
        self._kept: dict[tuple[str, int], frozenset[str]] = {}
        """What DeepSpeed decided to release at a step of the order; it decides once in a run."""
        self.gathers: list[Gather] = []

    def begin(self) -> None:
        """A forward of the whole model begins."""
        for name, others in list(self._flight.items()):
            self._arrive(others)
            self._release(name)
        self._flight.clear()
        if self._trace is None:
            if self._recording is not None:
                self._trace = _Trace(self._order, self._recording, self._numel)
            else:
                self._recording = []
        self._queue = deque(self._trace.queue if self._trace else ())
        self._recent: dict[str, int] = {}
        self._step = self._available = 0
        self._backward: dict[str, None] = {}

    def fetch(self, event: Event) -> None:
        module = event.name
        if self._trace is None and self._recording is not None:
            self._recording.append(module)
        if event.backward and not event.again:
            self._backward[module] = None
        wanted = self._order.own.get(module, ())
        self._gather([name for name in wanted if name not in self._here and name not in self._coming])
        for name in wanted:
            self._active.setdefault(name, set()).add(module)
            others = self._flight.pop(name, None)
            if others is not None and name in self._coming:
                self._arrive(others)
        if self._trace is not None:
            self._pass(wanted)
            self._prefetch()
        self._step += 1

    def _pass(self, wanted: Sequence[str]) -> None:
        """Take what is wanted now off the queue, unless it was before."""
        left = {name for name in wanted if self._recent.get(name, -1) < self._step}
        taken: set[str] = set()
        while self._queue and len(taken) < len(left):
            name, at = self._queue.popleft()
            self._recent[name] = at
            taken.add(name)

    def _prefetch(self) -> None:
        bucket = self._layout.prefetch_bucket
        if bucket <= 0:
            return
        most = min(self._layout.max_live - self._available, bucket)
        chosen: dict[str, None] = {}
        elements = 0
        while self._queue and elements < most:
            name, at = self._queue.popleft()
            self._recent[name] = max(self._recent.get(name, -1), at)
            if name not in self._here and name not in self._coming and name not in chosen:
                chosen[name] = None
                elements += self._numel[name]
        self._gather(list(chosen))

    def _gather(self, names: list[str]) -> None:
        self._available += sum(self._numel[name] for name in names)
        for second in (True, False):
            some = tuple(name for name in names if (name in self._second) == second)
            if some:
                elements = sum(padded(self._numel[name], self._layout.world) for name in some)
                self.gathers.append(Gather(elements, some, "host" if second else "world"))
                self._coming.update(some)
                self._flight.update(dict.fromkeys(some, some))

    def _arrive(self, names: tuple[str, ...]) -> None:
        """All of one gather; once one is waited for, the others are there too."""
        if names[0] in self._coming:
            self._here.update(names)
            self._coming.difference_update(names)

    def release(self, event: Event) -> None:
        module = event.name
        own = self._order.own.get(module, ())
        if event.backward and not event.again:
            self._backward.pop(module, None)
        free = self._to_release(module) if self._trace is not None else own
        for name in own:
            self._active.get(name, set()).discard(module)
            if name in free:
                self._release(name)

    def _to_release(self, module: str) -> frozenset[str]:
        key = module, self._step
        if key not in self._kept:
            recurse = module in self._order.leaves
            self._kept[key] = frozenset(
                name
                for name in self._order.own.get(module, ())
                if name not in self._persists
                and self._recent.get(name, -1) <= self._step
                and not self._trace.wanted_soon(name, self._step, recurse, self._layout.max_reuse)
            )
        return self._kept[key]

    def _release(self, name: str) -> None:
        if name in self._here and not self._active.get(name):
            self._here.discard(name)
            self._available -= self._numel[name]
            if self._layout.hpz > 1:
                self._second.add(name)

    def end_backward(self) -> None:
        """What no release came for."""
        while self._backward:
            module, _ = self._backward.popitem()
            for name in self._order.own.get(module, ()):
                self._active.get(name, set()).discard(module)
                if name not in self._persists:
                    self._release(name)

    def end_step(self) -> list[Gather]:
        """The optimizer's step: all is partitioned; what persists is gathered anew, each parameter by itself."""
        for others in list(self._flight.values()):
            self._arrive(others)
        self._flight.clear()
        self._active.clear()
        for name in list(self._here):
            self._release(name)
        self._second.clear()
        self._here.update(self.persistent)
        return [Gather(padded(self._numel[name], self._layout.world), (name,), "world") for name in self.persistent]


def padded(elements: int, ranks: int) -> int:
    return -(-elements // ranks) * ranks
