"""Autograd without tensors: which bytes are there when, in a forward and backward of operators that say what they keep.

A `Buffer` counts as long as Python holds it, so code that is written like the model's holds what the model holds: a
local variable until its function returns, what an operator saves until its backward has run, a gradient until it is
used. The order is autograd's: nodes run from the last made to the first, a parameter's gradient is added up first.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any, Protocol


class Ledger:
    """Bytes that are there, by part, and what was there when there were most."""

    def __init__(self) -> None:
        self.live: Counter[str] = Counter()
        self.total = self.peak = 0.0
        self.at_peak: Counter[str] = Counter()

    def take(self, size: float, part: str) -> Buffer:
        self.live[part] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, self.live.copy()
        return Buffer(self, size, part)


class Buffer:
    """Bytes that are there until nobody refers to this."""

    __slots__ = ("ledger", "part", "size")

    def __init__(self, ledger: Ledger, size: float, part: str) -> None:
        self.ledger, self.size, self.part = ledger, size, part

    def __del__(self) -> None:
        self.ledger.live[self.part] -= self.size
        self.ledger.total -= self.size


class Leaf:
    """A parameter."""

    __slots__ = ("elements", "name")

    def __init__(self, name: str, elements: int) -> None:
        self.name, self.elements = name, elements


class Node:
    """A step of the backward. `run`: gradients of the outputs to those of the inputs, None where there is none."""

    __slots__ = ("edges", "frame", "place", "run", "saved", "seq")

    def __init__(self, seq: int, edges: list[tuple[Node, int] | Leaf | None], run: Callable[..., Any]) -> None:
        self.seq, self.edges, self.run = seq, edges, run
        self.saved: list[Buffer] = []
        self.frame: Frame | None = None
        self.place = 0


class Value:
    """A tensor: its storage, and which output of which node it is; node None: it needs no gradient."""

    __slots__ = ("buffer", "elements", "index", "node", "width")

    def __init__(self, buffer: Buffer, elements: float, width: float, node: Node | None = None, index: int = 0) -> None:
        self.buffer, self.elements, self.width, self.node, self.index = buffer, elements, width, node, index


class Frame:
    """One checkpointed call: its nodes have nothing saved until the first of them runs."""

    def __init__(self, again: Callable[[], Any]) -> None:
        self.again, self.nodes = again, []
        self.done = False


class _Enough(Exception):
    """All that the frame's nodes want has been computed again (torch's early stop)."""


class Weights(Protocol):
    """What becomes of parameters: gathered when a module is called, their gradients given away."""

    part: str
    """Under which gradients count."""

    def enter(self, module: str, forward: bool) -> None: ...

    def leave(self, module: str, forward: bool) -> None: ...

    def gradient(self, leaf: Leaf, gradient: Buffer) -> None: ...

    def leave_gradients(self, module: str) -> None: ...


class Tape:
    """width: bytes of an activation. hooked: whether a module's call gathers what it has, or may. fake: as fake tensors
    have it: torch adds up none of their gradients in place, and kernels have no workspace.
    """

    def __init__(
        self, ledger: Ledger, width: int, weights: Weights, hooked: Callable[[str], bool], *, fake: bool = False
    ) -> None:
        self.ledger, self.width, self.weights, self.hooked = ledger, width, weights, hooked
        self.fake, self.workspace = fake, not fake
        self.part = "activations"
        self._seq = 0
        self._waiting: dict[str, int] = {}
        self._recording: Frame | None = None
        self._replaying: tuple[Frame, list[int]] | None = None

    def new(self, elements: float, width: float | None = None, part: str | None = None) -> Buffer:
        return self.ledger.take(elements * (self.width if width is None else width), part or self.part)

    def of_parameter(self, leaf: Leaf, width: float | None = None) -> Buffer:
        """Its gradient."""
        return self.new(leaf.elements, width, self.weights.part)

    def value(self, elements: float, width: float | None = None) -> Value:
        """That needs no gradient."""
        return Value(self.new(elements, width), elements, self.width if width is None else width)

    def op(
        self, inputs: Sequence[Value | Leaf | None], outputs: Sequence[tuple[float, float] | Value],
        run: Callable[..., Any], *, save: Sequence[Buffer] = (), first: bool = False, saves_outputs: Sequence[int] = (),
    ) -> list[Value]:  # fmt: skip
        """outputs: (elements, width) of each, or a value whose storage it shares. first: saves before it computes."""
        needs = any(isinstance(each, Leaf) or (each is not None and each.node is not None) for each in inputs)
        node = None
        if needs:
            edges = [each if isinstance(each, Leaf) or each is None else self._edge(each) for each in inputs]
            node = Node(self._seq, edges, run)
            self._seq += 1
            if first:
                self._save(node, list(save), final=True)
        values = []
        for i, out in enumerate(outputs):
            if isinstance(out, Value):
                values.append(Value(out.buffer, out.elements, out.width, node, i))
            else:
                values.append(Value(self.new(*out), *out, node, i))
        if node is not None and not first:
            self._save(node, [*save, *(values[i].buffer for i in saves_outputs)], final=True)
        return values

    @staticmethod
    def _edge(value: Value) -> tuple[Node, int] | None:
        return None if value.node is None else (value.node, value.index)

    def _save(self, node: Node, buffers: list[Buffer], final: bool) -> None:
        if self._recording is not None:
            frame = self._recording
            node.frame, node.place = frame, len(frame.nodes)
            frame.nodes.append((node, bool(buffers)))
        elif self._replaying is not None:
            frame, counts = self._replaying
            original, has = frame.nodes[counts[0]]
            counts[0] += 1
            original.saved = buffers
            if has:
                counts[1] -= 1
                if not counts[1]:
                    raise _Enough
        else:
            node.saved = buffers

    def checkpoint(self, call: Callable[[], list[Value]]) -> list[Value]:
        """`call()`, whose saved buffers are dropped and computed again in the backward."""
        frame = Frame(call)
        self._recording = frame
        try:
            return call()
        finally:
            self._recording = None

    def _replay(self, frame: Frame) -> None:
        frame.done = True
        self._replaying = (frame, [0, sum(has for _, has in frame.nodes)])
        try:
            frame.again()
        except _Enough as enough:
            enough.__traceback__ = None  # its frames hold what is no longer there
        finally:
            self._replaying = None
            frame.nodes, frame.again = [], None

    def call(self, module: str, body: Callable[..., list[Value]], *inputs: Value) -> list[Value]:
        """The module's `body(*inputs)` between DeepSpeed's hooks of stage 3; without them the body alone."""
        if not self.hooked(module):
            return body(*inputs)
        weights = self.weights
        weights.enter(module, True)
        waiting, own = self._waiting, [0]
        waiting[module] = 0  # the module's, whatever call it is of: one called twice is given back in the end only

        def after(*gradients: Buffer | None) -> list[Buffer | None]:
            own[0] -= 1
            if not own[0]:
                weights.leave_gradients(module)
            waiting[module] -= 1
            if not waiting[module]:
                weights.leave(module, False)
            return list(gradients)

        def before(*gradients: Buffer | None) -> list[Buffer | None]:
            weights.enter(module, False)
            return list(gradients)

        wrapped = []
        for each in inputs:
            if each.node is not None:
                own[0] += 1
                waiting[module] += 1
                each = self.op([each], [each], after)[0]
            wrapped.append(each)
        outputs = body(*wrapped)
        del wrapped
        weights.leave(module, True)
        return [self.op([each], [each], before)[0] if each.node is not None else each for each in outputs]

    @contextmanager
    def as_part(self, part: str) -> Any:
        """What is taken inside counts as this part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def backward(self, loss: Value) -> None:
        root, waiting = loss.node, _dependencies(loss.node)
        grads: dict[Node, list[Buffer | None]] = {root: [self.new(1)]}
        leaf_grads: dict[Leaf, Buffer] = {}
        ready = [(-root.seq, root)]
        loss.node, loss = None, None
        del root
        while ready:
            node = heapq.heappop(ready)[1]
            given = grads.pop(node, [])
            if node.frame is not None and not node.frame.done and node.saved == [] and _wants(node):
                self._replay(node.frame)
            results = node.run(*given) if any(each is not None for each in given) else [None] * len(node.edges)
            given, node.saved, node.run = [], [], None
            edges, node.edges = node.edges, []
            for k, edge in enumerate(edges):
                result, results[k] = results[k], None
                if edge is None:
                    continue
                if isinstance(edge, Leaf):
                    if result is not None:
                        leaf_grads[edge] = self._add(leaf_grads.pop(edge, None), result)
                    waiting[edge] -= 1
                    result = None
                    if not waiting[edge] and edge in leaf_grads:
                        self.weights.gradient(edge, leaf_grads.pop(edge))
                    continue
                target, index = edge
                slots = grads.setdefault(target, [])
                slots += [None] * (index + 1 - len(slots))
                if result is not None:
                    held, slots[index] = slots[index], None
                    slots[index] = self._add(held, result)
                result = held = None
                waiting[target] -= 1
                if not waiting[target]:
                    heapq.heappush(ready, (-target.seq, target))
            edge = target = slots = None

    def _add(self, held: Buffer | None, more: Buffer) -> Buffer:
        if held is None:
            return more
        return self.ledger.take(held.size, held.part) if self.fake else held


def _wants(node: Node) -> bool:
    """Whether the node saved anything in its forward."""
    return node.frame.nodes[node.place][1]


def _dependencies(root: Node) -> Counter[Any]:
    counts: Counter[Any] = Counter()
    seen, todo = {root}, [root]
    while todo:
        for edge in todo.pop().edges:
            if edge is None:
                continue
            target = edge if isinstance(edge, Leaf) else edge[0]
            counts[target] += 1
            if not isinstance(target, Leaf) and target not in seen:
                seen.add(target)
                todo.append(target)
    return counts
