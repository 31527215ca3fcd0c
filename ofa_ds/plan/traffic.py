"""What ranks send each other in an optimizer step under DeepSpeed 0.19.8: every collective, to the byte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from ofa_ds.config.architecture import ModelConfig
from ofa_ds.plan.coordinator import Coordinator, held, padded
from ofa_ds.plan.layout import BYTES, Layout
from ofa_ds.plan.order import Event, Order

_BYTES = {**BYTES, "float64": 8, "uint8": 1, "int8": 1, "int4": 0.5}
ALL_REDUCE_ELEMENTS = 500_000_000
"""DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE: where a stage without buckets of its own cuts."""
SETTLED = 3
"""Steps after which DeepSpeed repeats itself: one or two micro-batches to learn the order, one to decide on it."""


class Collective(NamedTuple):
    """`count` equal calls."""

    kind: str
    """all_gather, reduce_scatter, all_reduce or all_to_all."""
    count: int
    bytes: int
    """Payload of one call on one rank: what it has gathered in the end, or before anything is reduced."""
    elements: int
    dtype: str
    when: str
    """forward, backward or step."""
    group: str = "world"
    """Who takes part: `world`, or `host`: the ranks of a second copy (hpZ)."""


class Sent(NamedTuple):
    call: Collective
    parameters: tuple[str, ...] = ()
    """What a gather brings."""


def collectives(
    config: ModelConfig, layout: Layout, *, accumulation: int, checkpointing: bool, image_groups: int = 1,
    shared_counts: int = 2,
) -> list[Collective]:  # fmt: skip
    """Of one optimizer step of one rank; none where there is one rank.

    image_groups: how many sizes of pictures a micro-batch has. shared_counts: numbers that `train_step` sums over the
    ranks beside one for each rank: counts of its losses, and votes.
    """
    calls: Counter[Collective] = Counter()
    for each in timeline(
        config, layout, accumulation=accumulation, checkpointing=checkpointing, image_groups=image_groups,
        shared_counts=shared_counts,
    ):  # fmt: skip
        if isinstance(each, Sent):
            calls[each.call] += 1
    return [call._replace(count=count) for call, count in calls.items()]


def timeline(
    config: ModelConfig, layout: Layout, *, accumulation: int, checkpointing: bool, image_groups: int = 1,
    shared_counts: int = 2, alone: bool = False,
) -> list[Event | Sent]:  # fmt: skip
    """The same in its order, between what the modules do: a collective begins with the event before it.

    alone: gathers of a single rank too, which send nothing; where weights are on the host they are copies.
    """
    order = Order(
        config, layout.leaf_classes, image_groups=image_groups, checkpointing=checkpointing, stage=layout.stage
    )
    events = order.events()
    head = [_call("all_reduce", shared_counts + layout.world, "float64", "step")]
    if layout.stage == 3:
        found = _stage3(order, events, layout, accumulation)
    else:
        found = list(_stages012(order, events, layout, accumulation))
    if layout.world == 1:
        return [each for each in found if isinstance(each, Event) or (alone and each.call.kind == "all_gather")]
    return [*head, *found]


def _call(kind: str, elements: int, dtype: str, when: str, group: str = "world", *brings: str) -> Sent:
    return Sent(Collective(kind, 1, int(elements * _BYTES[dtype]), elements, dtype, when, group), brings)


def _own(event: Event) -> Sent:
    """A sum of synchronous batch norm; its statistics are fp32."""
    return _call("all_reduce", int(event.name), "fp32", "backward" if event.backward else "forward")


def _stage3(order: Order, events: list[Event], layout: Layout, accumulation: int) -> list[Event | Sent]:
    coordinator = _Gathers(order, layout)
    found: list[Event | Sent] = []
    for _ in range(SETTLED + 1):
        found.clear()
        for _ in range(accumulation):
            found += _micro_batch3(order, events, layout, coordinator)
        found += _norms(order, layout)
        coordinator.end_step()
        found += (coordinator.gather((weight,), "step") for weight in coordinator.kept)
    return found


def _micro_batch3(order: Order, events: list[Event], layout: Layout, coordinator: _Gathers) -> Iterator[Event | Sent]:
    bucket = _Bucket(layout.reduce_bucket)
    numel = {each.name: each.numel for each in order.parameters}
    coordinator.begin()
    for event in events:
        yield event
        when = "backward" if event.backward else "forward"
        if event.kind == "fetch":
            coordinator.enter(event.name, not event.backward or event.again)
        elif event.kind == "release":
            coordinator.leave(event.name, not event.backward or event.again)
        elif event.kind == "reduce":
            yield _own(event)
        elif (full := bucket.add(numel[event.name])) is not None:
            yield _scatter(full, layout)
        yield from (coordinator.gather(weights, when, second) for weights, second in coordinator.waiting)
        coordinator.waiting.clear()
    coordinator.end_backward()
    if bucket.sizes:
        yield _scatter(bucket.sizes, layout)


class _Gathers(Coordinator):
    """All-gathers that have begun since they were last asked for."""

    def __init__(self, order: Order, layout: Layout) -> None:
        super().__init__(held(order.parameters, order.external), layout)
        self._names = [each.name for each in order.parameters]
        self.waiting: list[tuple[tuple[int, ...], bool]] = []
        """(weights, whether within a host)."""

    def sent(self, weights: tuple[int, ...], second: bool) -> None:
        self.waiting.append((weights, second))

    def gather(self, weights: tuple[int, ...], when: str, second: bool = False) -> Sent:
        elements = sum(padded(self.held.sizes[weight], self.layout.world) for weight in weights)
        names = (self._names[weight] for weight in weights)
        return _call("all_gather", elements, self.layout.precision, when, "host" if second else "world", *names)


class _Bucket:
    """Gradients that wait to be reduced together."""

    def __init__(self, limit: int) -> None:
        self.sizes: list[int] = []
        self._limit = limit

    def add(self, numel: int) -> list[int] | None:
        """What was in it, if it had to be emptied first."""
        full = None
        if self.sizes and sum(self.sizes) + numel > self._limit:
            full, self.sizes = self.sizes, []
        self.sizes.append(numel)
        return full


def _scatter(sizes: list[int], layout: Layout) -> Sent:
    elements = sum(padded(size, layout.world) for size in sizes)
    return _call("reduce_scatter", elements, layout.reduce_precision, "backward")


def _norms(order: Order, layout: Layout) -> Iterator[Sent]:
    """Of stage 3: whether anything overflowed, and the norm of each group that the optimizer updates at a time."""
    if layout.precision == "fp16":
        yield _call("all_reduce", 1, "uint8", "step")
    left, groups = 0, 1
    total = sum(padded(each.numel, layout.world) // layout.world for each in order.parameters)
    if total > layout.sub_group:
        groups = 0
        for at, each in enumerate(order.parameters, 1):
            left += padded(each.numel, layout.world) // layout.world
            if left >= layout.sub_group or at == len(order.parameters):
                left, groups = 0, groups + 1
    for _ in range(groups):
        yield _call("all_reduce", 1, "float64", "step")


def _stages012(order: Order, events: list[Event], layout: Layout, accumulation: int) -> Iterator[Event | Sent]:
    numel = {each.name: each.numel for each in order.parameters}
    in_one = layout.stage == 0 or _has_bf16_optimizer(layout)
    met = {event.name for event in events if event.kind == "gradient"}
    for micro in range(accumulation):
        last = micro == accumulation - 1
        as_they_come = not in_one and (layout.stage == 2 or (last and layout.overlap))
        buckets = _Slices(order, layout)
        for event in events:
            yield event
            if event.kind == "reduce":
                yield _own(event)
            elif event.kind == "gradient" and as_they_come:
                yield from buckets.add(event.name)
        if layout.stage == 1 and last and not (in_one or layout.overlap):
            for name in numel:
                if name in met:
                    yield from buckets.add(name)
        yield from buckets.flush()
        if in_one and last:
            yield from _whole(list(numel.values()), layout)
    if layout.stage and layout.precision != "fp32" and not in_one:
        yield _call("all_reduce", 1, "uint8", "step")
    if not (layout.stage and in_one):
        yield _call("all_reduce", 1, "fp32", "step")
    if layout.stage:
        yield _call("all_gather", padded(sum(numel.values()), 2 * layout.world), layout.precision, "step")


def _has_bf16_optimizer(layout: Layout) -> bool:
    """Stage 1 in bf16 with gradients summed in fp32 is another optimizer of DeepSpeed's, without buckets."""
    return layout.stage == 1 and layout.precision == "bf16" and layout.accumulate_precision == "fp32"


def _whole(sizes: list[int], layout: Layout) -> Iterator[Sent]:
    """All gradients in the order of the parameters, cut where there are more than ALL_REDUCE_ELEMENTS."""
    together = 0
    for at, size in enumerate(sizes, 1):
        together += size
        if together > ALL_REDUCE_ELEMENTS or at == len(sizes):
            yield _call("all_reduce", together, layout.reduce_precision, "backward")
            together = 0


class _Slices:
    """The bucket of stages 1 and 2. A gradient larger than it is cut where the ranks' shares of all weights end."""

    def __init__(self, order: Order, layout: Layout) -> None:
        self._layout = layout
        self._numel = {each.name: each.numel for each in order.parameters}
        self._start, at = {}, 0
        for name, numel in self._numel.items():
            self._start[name], at = at, at + numel
        self._share = padded(at, 2 * layout.world) // layout.world
        self._names: list[str] = []
        self._elements = 0

    def add(self, name: str) -> Iterator[Sent]:
        if self._elements + self._numel[name] > self._layout.reduce_bucket:
            yield from self.flush()
        self._names.append(name)
        self._elements += self._numel[name]

    def flush(self) -> Iterator[Sent]:
        pieces = [self._elements] if self._elements <= self._layout.reduce_bucket else self._cut(self._names[0])
        together = 0
        for at, piece in enumerate(pieces, 1):
            together += piece
            if together and (together > self._layout.reduce_bucket or at == len(pieces)):
                yield _call("all_reduce", together, self._layout.reduce_precision, "backward")
                together = 0
        self._names, self._elements = [], 0

    def _cut(self, name: str) -> list[int]:
        start, end = self._start[name], self._start[name] + self._numel[name]
        first, last = start // self._share, (end - 1) // self._share
        edges = [start, *(share * self._share for share in range(first + 1, last + 1)), end]
        return [after - before for before, after in zip(edges, edges[1:], strict=False)]
