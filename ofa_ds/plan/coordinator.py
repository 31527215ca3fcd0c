"""Which weights ZeRO-3 has gathered when: DeepSpeed 0.19.8's partitioned_param_coordinator.py, in numbers.

A fetch gathers what the module wants and does not have, then as many of the next weights as the prefetch bucket takes,
in the order of the micro-batch before. A release gives back what is not wanted again within `max_reuse` elements. In a
run's first micro-batches nothing is known of the order: everything is given back at once, nothing is fetched ahead.
Weights are numbers, in the order of the model's parameters; what is sent, and what it takes, is a subclass's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ofa_ds.plan.layout import Layout
from ofa_ds.plan.parameters import Parameter


@dataclass(frozen=True)
class Held:
    """Which module holds which weights."""

    sizes: Sequence[int]
    """Elements."""
    own: Mapping[str, Sequence[int]]
    """What a fetch of the module wants, in DeepSpeed's order: of a leaf module all in it."""
    direct: Mapping[str, Sequence[int]]
    """Its own alone, and those of others that it reads itself."""
    below: Mapping[str, Sequence[int]]
    """All in it, however deep, and those of others that it reads itself."""
    leaves: Collection[str]


def held(parameters: Sequence[Parameter], external: Mapping[str, Iterable[str]]) -> Held:
    """external: module -> parameters of others that it reads itself; DeepSpeed fetches them with its own."""
    own: dict[str, list[int]] = {}
    direct: dict[str, list[int]] = {}
    below: dict[str, list[int]] = {}
    number = {each.name: i for i, each in enumerate(parameters)}
    for i, each in enumerate(parameters):
        own.setdefault(each.unit, []).append(i)
        direct.setdefault(each.module, []).append(i)
        for name in {"", *around(each.module)}:
            below.setdefault(name, []).append(i)
    for module, names in external.items():
        for table in (own, direct, below):
            table.setdefault(module, []).extend(number[name] for name in names)
    leaves = {each.unit for each in parameters if each.unit != each.module}
    return Held([each.numel for each in parameters], own, direct, below, leaves)


def around(module: str) -> list[str]:
    """The module and those that it is in, but for the whole."""
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


class _Trace:
    """What is known of the order after a whole micro-batch."""

    def __init__(self, held: Held, modules: Sequence[str]) -> None:
        """modules: of each fetch."""
        self.queue = [(weight, step) for step, name in enumerate(modules) for weight in held.own.get(name, ())]
        self._uses, self._passed = {}, {}
        for recurse, contents in ((False, held.direct), (True, held.below)):
            uses: dict[int, list[int]] = {}
            passed = [0]
            for step, module in enumerate(modules):
                inside = contents.get(module, ())
                for weight in inside:
                    uses.setdefault(weight, []).append(step)
                passed.append(passed[-1] + sum(held.sizes[weight] for weight in inside))
            self._uses[recurse], self._passed[recurse] = uses, passed

    def wanted_soon(self, weight: int, step: int, recurse: bool, elements: int) -> bool:
        """Whether a fetch from `step` on wants it before modules with so many elements have gone by."""
        passed = self._passed[recurse]
        first = min(step, len(passed) - 1)
        end = bisect_left(passed, passed[first] + elements, lo=first)
        uses = self._uses[recurse].get(weight, ())
        at = bisect_left(uses, step)
        return at < len(uses) and uses[at] < end


class _Flight:
    """One all-gather."""

    __slots__ = ("arrived", "cargo", "weights")

    def __init__(self, weights: tuple[int, ...], cargo: Any) -> None:
        self.weights, self.cargo, self.arrived = weights, cargo, False


class Coordinator:
    """The weights of one rank."""

    def __init__(self, held: Held, layout: Layout, order: Sequence[str] | None = None) -> None:
        """order: `seen` of a micro-batch before, of a run that has settled; None where a run begins."""
        self.held, self.layout = held, layout
        self.kept = [i for i, size in enumerate(held.sizes) if size <= layout.persistence_threshold]
        self._keeps = set(self.kept)
        self.seen: list[str] = []
        """Modules as they were entered, while nothing was known of the order."""
        self._trace = _Trace(held, order) if order is not None else None
        self._here: set[int] = set(self.kept) if order is not None else set()
        """Whole on this rank."""
        self._coming: set[int] = set()
        self._flights: dict[int, _Flight] = {}
        """Of weights that nobody has waited for yet."""
        self._second: set[int] = set()
        """Have a second copy on this host (hpZ)."""
        self._active: dict[int, set[str]] = {}
        self._decided: dict[tuple[str, int], frozenset[int]] = {}
        """What is released at a step of the order; DeepSpeed decides it once in a run."""
        self._available = 0
        self._restart()

    def _restart(self) -> None:
        self._queue = deque(self._trace.queue if self._trace else ())
        self._last: dict[int, int] = {}
        self._step = 0
        self._running: dict[str, None] = {}

    # What a subclass makes of it.

    def sent(self, weights: tuple[int, ...], second: bool) -> Any:
        """An all-gather begins, within the host where a second copy is there. Returns what it takes with it."""

    def arrived(self, weights: tuple[int, ...], cargo: Any) -> None:
        """It has been waited for. cargo: of `sent`."""

    def given_back(self, weight: int) -> None:
        """It is in pieces again."""

    @property
    def live(self) -> int:
        """Elements that are there or on their way."""
        return sum(self.held.sizes[weight] for weight in self._here | self._coming)

    def begin(self) -> None:
        """A forward of the whole model begins."""
        for weight, flight in list(self._flights.items()):
            self._arrive(flight)
            self._release(weight)
        self._flights.clear()
        if self._trace is None and self.seen:
            self._trace = _Trace(self.held, self.seen)
        self._available = 0
        self._restart()

    def enter(self, module: str, forward: bool) -> None:
        """forward: also one that is computed again in the backward."""
        wanted = self.held.own.get(module, ())
        if self._trace is None:
            self.seen.append(module)
        if not forward:
            self._running[module] = None
        self._gather([weight for weight in wanted if weight not in self._here and weight not in self._coming])
        for weight in wanted:
            self._active.setdefault(weight, set()).add(module)
            if (flight := self._flights.pop(weight, None)) is not None:
                self._arrive(flight)
        if self._trace is not None:
            self._pass(wanted)
            self._fetch_ahead()
        self._step += 1

    def _pass(self, wanted: Sequence[int]) -> None:
        """Take what is wanted now off the queue, unless it was before."""
        left = {weight for weight in wanted if self._last.get(weight, -1) < self._step}
        taken: set[int] = set()
        while self._queue and len(taken) < len(left):
            weight, step = self._queue.popleft()
            self._last[weight] = step
            taken.add(weight)

    def _fetch_ahead(self) -> None:
        bucket = self.layout.prefetch_bucket
        if bucket <= 0:
            return
        most = min(self.layout.max_live - self._available, bucket)
        ahead: dict[int, None] = {}
        elements = 0
        while self._queue and elements < most:
            weight, step = self._queue.popleft()
            self._last[weight] = max(self._last.get(weight, -1), step)
            if weight not in self._here and weight not in self._coming and weight not in ahead:
                ahead[weight] = None
                elements += self.held.sizes[weight]
        self._gather(list(ahead))

    def _gather(self, weights: list[int]) -> None:
        self._available += sum(self.held.sizes[weight] for weight in weights)
        for second in (True, False):
            some = tuple(weight for weight in weights if (weight in self._second) == second)
            if some:
                flight = _Flight(some, self.sent(some, second))
                self._coming.update(some)
                self._flights.update(dict.fromkeys(some, flight))

    def _arrive(self, flight: _Flight) -> None:
        """All of one all-gather; once one is waited for, the others are there too."""
        if not flight.arrived:
            flight.arrived = True
            self._here.update(flight.weights)
            self._coming.difference_update(flight.weights)
            self.arrived(flight.weights, flight.cargo)

    def leave(self, module: str, forward: bool) -> None:
        own = self.held.own.get(module, ())
        if not forward:
            self._running.pop(module, None)
        free = self._to_release(module) if self._trace is not None else own
        for weight in own:
            self._active.get(weight, set()).discard(module)
            if weight in free:
                self._release(weight)

    def _to_release(self, module: str) -> frozenset[int]:
        key = module, self._step
        if key not in self._decided:
            recurse = module in self.held.leaves
            self._decided[key] = frozenset(
                weight
                for weight in self.held.own.get(module, ())
                if weight not in self._keeps
                and self._last.get(weight, -1) <= self._step
                and not self._trace.wanted_soon(weight, self._step, recurse, self.layout.max_reuse)
            )
        return self._decided[key]

    def _release(self, weight: int) -> None:
        if weight in self._here and not self._active.get(weight):
            self._here.discard(weight)
            self._available -= self.held.sizes[weight]
            if self.layout.hpz > 1:
                self._second.add(weight)
            self.given_back(weight)

    def end_backward(self) -> None:
        """Gives back what no release came for."""
        while self._running:
            module, _ = self._running.popitem()
            for weight in self.held.own.get(module, ()):
                self._active.get(weight, set()).discard(module)
                if weight not in self._keeps:
                    self._release(weight)

    def end_step(self) -> None:
        """The optimizer's step: all is partitioned; what is kept is whole again, each weight by itself (not `sent`)."""
        for flight in list(self._flights.values()):
            self._arrive(flight)
        self._flights.clear()
        self._active.clear()
        for weight in list(self._here):
            self._release(weight)
        self._second.clear()
        self._here.update(self.kept)


def padded(elements: int, ranks: int) -> int:
    """Of a weight as it is gathered: to a multiple of the ranks."""
    return -(-elements // ranks) * ranks
