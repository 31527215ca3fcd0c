"""Which weights stage 3 has gathered when: what DeepSpeed 0.19.8's coordinator does, with bytes in place of tensors.

As in deepspeed/runtime/zero/partitioned_param_coordinator.py and partition_parameters.py: a module's weights come in
one collective, into one buffer, of which each weight then gets a copy of its own; the buffer stays until all of them
have been waited for. Those of the next modules are fetched ahead, and what is used again soon is not given back.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ofa_ds.plan.layout import Layout
from ofa_ds.plan.tape import Buffer, Ledger

AWAY, IN_FLIGHT, THERE = range(3)
PART = "gathered weights"
_QUANTIZED_GROUP = 2048
"""Weights of one scale in 8 bits, about."""


class Gathered:
    """A collective: its buffer, and the weights that still have to be waited for."""

    def __init__(self, weights: list[int], buffer: Buffer | None) -> None:
        self.weights, self.buffer, self.complete = weights, buffer, False
        self.wide: Buffer | None = None


class Coordinator:
    """modules: of every module that is called, its weights (all in it, for a leaf module), by number.

    order: of a pass before, (module, whether its weights are all to be there) as `seen` has it; None for the first one,
    in which everything is given back at once and nothing is fetched ahead.
    """

    def __init__(
        self, modules: Mapping[str, Sequence[int]], sizes: Sequence[int], layout: Layout, ledger: Ledger,
        order: list[str] | None = None,
    ) -> None:  # fmt: skip
        self.modules, self.sizes, self.layout, self.ledger = modules, sizes, layout, ledger
        self.order, self.seen = order, []
        self.kept = [size <= layout.persistence_threshold for size in sizes]
        self.status = [THERE if kept else AWAY for kept in self.kept]
        self.watch: Callable[[str, bool, bool], None] | None = None
        """Called with (module, forward, whether it is entered) after each change."""
        self.whole: list[Any] = [None] * len(sizes)
        self.available = 0
        self._in_flight: dict[int, Gathered] = {}
        self._active: list[set[str]] = [set() for _ in sizes]
        self._last = [-1e10] * len(sizes)
        self._step = 0
        self._running: dict[str, None] = {}
        self._queue = deque((weight, step) for step, name in enumerate(order or ()) for weight in modules.get(name, ()))

    @property
    def live(self) -> int:
        """Elements that are there or on their way."""
        return sum(size for size, status in zip(self.sizes, self.status, strict=True) if status != AWAY)

    def enter(self, module: str, forward: bool) -> None:
        weights = self.modules.get(module, ())
        self.seen.append(module)
        if not forward:
            self._running[module] = None
        self._gather([weight for weight in weights if self.status[weight] == AWAY])
        for weight in weights:
            self._active[weight].add(module)
            if weight in self._in_flight:
                self._wait(self._in_flight.pop(weight))
        if self.order is not None:
            self._take_from_queue(weights)
            self._fetch_ahead()
        self._step += 1
        if self.watch is not None:
            self.watch(module, forward, True)

    def _take_from_queue(self, weights: Sequence[int]) -> None:
        wanted = {weight for weight in weights if self._last[weight] < self._step}
        taken: set[int] = set()
        while self._queue and len(taken) < len(wanted):
            weight, step = self._queue.popleft()
            self._last[weight] = step
            taken.add(weight)
        if taken != wanted:
            raise RuntimeError(f"the order of modules changed at step {self._step}")

    def _fetch_ahead(self) -> None:
        most = min(self.layout.max_live - self.available, self.layout.prefetch_bucket)
        if self.layout.prefetch_bucket <= 0:
            return
        ahead: list[int] = []
        elements = 0
        while self._queue and elements < most:
            weight, step = self._queue.popleft()
            self._last[weight] = max(self._last[weight], step)
            if self.status[weight] == AWAY and weight not in ahead:
                ahead.append(weight)
                elements += self.sizes[weight]
        self._gather(ahead)

    def leave(self, module: str, forward: bool) -> None:
        weights = self.modules.get(module, ())
        release = set(weights) if self.order is None else self._not_soon(weights)
        if not forward:
            self._running.pop(module, None)
        for weight in weights:
            self._active[weight].discard(module)
            if weight in release:
                self._give_back(weight)
        if self.watch is not None:
            self.watch(module, forward, False)

    def _not_soon(self, weights: Sequence[int]) -> set[int]:
        release = {weight for weight in weights if not self.kept[weight] and self._last[weight] <= self._step}
        traversed = 0
        for name in self.order[self._step :]:
            if traversed >= self.layout.max_reuse or not release:
                break
            for weight in self.modules.get(name, ()):
                release.discard(weight)
                traversed += self.sizes[weight]
        return release

    def finish(self) -> None:
        """The backward has ended."""
        while self._running:
            module, _ = self._running.popitem()
            for weight in self.modules.get(module, ()):
                self._active[weight].discard(module)
                if not self.kept[weight]:
                    self._give_back(weight)

    def _give_back(self, weight: int) -> None:
        if self.status[weight] == THERE and not self._active[weight]:
            self.status[weight], self.whole[weight] = AWAY, None
            self.available -= self.sizes[weight]

    def _gather(self, weights: list[int]) -> None:
        if not weights:
            return
        self.available += sum(self.sizes[weight] for weight in weights)
        ranks, width = self.layout.world, self.layout.weight_bytes
        if self.layout.hpz > 1:
            ranks = self.layout.hpz
        buffer = None
        if self.layout.world > 1:  # else a weight is its own piece
            elements = sum(math.ceil(self.sizes[weight] / ranks) * ranks for weight in weights)
            size = elements * (1 + 4 / _QUANTIZED_GROUP) if self.layout.qwz else elements * width
            buffer = self.ledger.take(size, PART)
        gathered = Gathered(weights, buffer)
        for weight in weights:
            self.status[weight] = IN_FLIGHT
            self._in_flight[weight] = gathered

    def _wait(self, gathered: Gathered) -> None:
        if gathered.complete:
            return
        gathered.complete = True
        alone, width = len(gathered.weights) == 1, self.layout.weight_bytes
        wide = None
        if self.layout.qwz and gathered.buffer is not None:  # back in 16 bits before it is cut up
            wide = self.ledger.take(sum(self.sizes[weight] for weight in gathered.weights) * width, PART)
        for weight in gathered.weights:
            self.status[weight] = THERE
            if gathered.buffer is None:
                continue
            if alone:
                self.whole[weight] = gathered.buffer if wide is None else wide
            else:
                self.whole[weight] = self.ledger.take(self.sizes[weight] * width, PART)
        gathered.wide = wide
