"""How much of what ranks send computing hides: the modules of a step one after another, collectives beside them.

A gather begins when the module before whose call DeepSpeed asks for it does (the host is taken to be no further ahead
than the GPU), a reduce-scatter when its bucket is full; both wait for their turn, one collective at a time. A module
waits for its own weights. A micro-batch ends when its last gradient is reduced: DeepSpeed waits there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ofa_ds.plan.order import Event
from ofa_ds.plan.rates import Seconds
from ofa_ds.plan.traffic import Collective, Sent


class Elapsed(NamedTuple):
    """Seconds of a step's micro-batches and of what follows them."""

    total: float
    computing: float
    sending: float

    @property
    def exposed(self) -> float:
        return self.total - self.computing


class Overlap:
    """A step's timeline with what each event costs."""

    def __init__(self, timeline: Sequence[Event | Sent], own: dict[str, list[str]], parts: Iterable[Seconds]) -> None:
        """own: parameters that each module waits for. parts: of one micro-batch; their kinds do not matter."""
        self._timeline, self._own = timeline, own
        micro_batches = sum(1 for each in timeline if isinstance(each, Event) and _is_root(each))
        costs = _Costs(timeline, parts, max(micro_batches, 1))
        self._costs = [
            costs.take(each) if isinstance(each, Event) and each.kind == "fetch" else 0.0 for each in timeline
        ]

    def elapsed(self, send_s: Callable[[Collective], float], *, overlap: bool, factor: float = 1.0) -> Elapsed:
        """factor: how many times longer than `parts` everything computes."""
        state = _State(self._own, send_s, overlap)
        for each, seconds in zip(self._timeline, self._costs, strict=True):
            if isinstance(each, Sent):
                state.send(each)
                continue
            if _is_root(each):
                state.end_micro_batch()
            state.run()
            if each.kind == "fetch":
                state.begin(each.name, factor * seconds)
        state.run()
        state.end_micro_batch()
        return Elapsed(state.now, state.computing, state.sending)


def _is_root(event: Event) -> bool:
    return event.kind == "fetch" and not event.name and not event.backward


class _State:
    def __init__(self, own: dict[str, list[str]], send_s: Callable[[Collective], float], overlap: bool) -> None:
        self._own, self._send_s, self._overlap = own, send_s, overlap
        self._took: dict[Collective, float] = {}
        self.now = self.computing = self.sending = 0.0
        self._free = 0.0
        """When the next collective may begin."""
        self._there: dict[str, float] = {}
        self._pending: tuple[str, float] | None = None

    def begin(self, module: str, seconds: float) -> None:
        self._pending = (module, seconds)

    def run(self) -> None:
        """What has begun, once all its weights are there."""
        if self._pending is None:
            return
        module, seconds = self._pending
        self._pending = None
        there = self._there
        self.now = max([self.now, *(there[name] for name in self._own.get(module, ()) if name in there)])
        self.now += seconds
        self.computing += seconds

    def send(self, sent: Sent) -> None:
        call = sent.call
        if call not in self._took:
            self._took[call] = self._send_s(call)
        seconds = self._took[call]
        if call.kind != "all_gather":
            self.run()
        self._free = max(self._free, self.now) + seconds
        self.sending += seconds
        if call.kind == "all_gather" and call.when != "step":
            self._there.update(dict.fromkeys(sent.parameters, self._free))
        waits = call.when == "step" or (call.kind == "all_reduce" and call.when == "forward")
        if waits or not self._overlap:  # a gather's own module has not begun yet
            self.now = max(self.now, self._free)

    def end_micro_batch(self) -> None:
        self.now = max(self.now, self._free)


class _Costs:
    """Seconds of each event: what lies in a module but in none of its own calls is the module's."""

    def __init__(self, timeline: Sequence[Event | Sent], parts: Iterable[Seconds], micro_batches: int) -> None:
        fetches = [each for each in timeline if isinstance(each, Event) and each.kind == "fetch"]
        modules = {each.name for each in fetches}
        self._calls: dict[tuple[str, bool, bool], float] = {}
        for each in fetches:
            key = each.name, each.backward, each.again
            self._calls[key] = self._calls.get(key, 0) + 1 / micro_batches
        self._seconds: dict[tuple[str, bool, bool], float] = {}
        for part in parts:
            name = part.name
            while name not in modules:
                name = name.rpartition(".")[0]
            for key, value in (
                ((name, False, False), part.forward), ((name, True, False), part.backward),
                ((name, True, True), part.again),
            ):  # fmt: skip
                while key not in self._calls:  # computed again with the layer that it is in, or with its own backward
                    key = (key[0].rpartition(".")[0], *key[1:]) if key[0] else ("", True, False)
                self._seconds[key] = self._seconds.get(key, 0.0) + value

    def take(self, event: Event) -> float:
        key = event.name, event.backward, event.again
        return self._seconds.get(key, 0.0) / self._calls[key]
