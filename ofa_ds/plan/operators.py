"""What each operator of the model keeps from its forward, makes in its backward, and for how long (`ofa_ds.plan.tape`).

As torch's derivatives and the autograd functions of `kernels/ofa_kernels` have it. Legend: N rows, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from ofa_ds.plan.tape import Buffer, Leaf, Tape, Value

MIN_ELEMENTS, MAX_WIDTH = 1 << 22, 11264
"""Of rows for which "auto" takes the norms' kernels (`ofa_kernels.layer_norm`)."""
WORKSPACE = "kernels' workspace"
Grads = list[Buffer | None]


class Branch(NamedTuple):
    """How a block's output joins the residual stream."""

    dropout: float
    drop_path: float
    gamma: str
    """Name of its scale per channel."""
    scales: bool
    """Whether there is any of them."""


class Operators:
    """shapes: of the parameters, by name. fused: whether 16-bit kernels run (a GPU), else plain torch."""

    def __init__(self, tape: Tape, shapes: Mapping[str, tuple[int, ...]], *, fused: bool) -> None:
        self.tape, self.shapes, self.fused = tape, shapes, fused
        self._leaves = {name: Leaf(name, math.prod(shape)) for name, shape in shapes.items()}

    def leaf(self, name: str) -> Leaf | None:
        return self._leaves.get(name)

    def _parameters(self, module: str) -> list[Leaf]:
        found = (self.leaf(f"{module}.{name}") for name in ("weight", "bias"))
        return [each for each in found if each is not None]

    def linear(self, x: Value, module: str, weight: str = "weight", bias: str = "bias") -> Value:
        """x W^T + b, as a module's call."""
        return self.tape.call(module, lambda x: [self.product(x, f"{module}.{weight}", f"{module}.{bias}")], x)[0]

    def product(self, x: Value, weight: str, bias: str) -> Value:
        tape, shape = self.tape, self.shapes[weight]
        out_features, in_features = shape[0], math.prod(shape[1:])
        elements, needs = x.elements, x.node is not None
        leaves = [leaf for leaf in (self.leaf(weight), self.leaf(bias)) if leaf is not None]

        def run(gradient: Buffer) -> Grads:
            return [tape.new(elements) if needs else None, *(tape.of_parameter(leaf) for leaf in leaves)]

        rows = elements / in_features
        return tape.op([x, *leaves], [(rows * out_features, tape.width)], run, save=[x.buffer], first=True)[0]

    def norm(self, x: Value, module: str) -> Value:
        return self.tape.call(module, lambda x: [self._norm(x, module)], x)[0]

    def gelu_norm(self, x: Value, module: str) -> Value:
        return self.tape.call(module, lambda x: [self._gelu_norm(x, module)], x)[0]

    def _gelu_norm(self, x: Value, module: str) -> Value:
        return self._norm(x if self._kernel(x, module) else self.pointwise(x, save_input=True), module)

    def _kernel(self, x: Value, module: str) -> bool:
        width = self.shapes[f"{module}.weight"][0]
        return self.fused and x.elements >= MIN_ELEMENTS and width <= MAX_WIDTH

    def _norm(self, x: Value, module: str) -> Value:
        tape, elements, leaves, needs = self.tape, x.elements, self._parameters(module), x.node is not None
        rows = elements / leaves[0].elements

        def run(gradient: Buffer) -> Grads:
            return [tape.new(elements) if needs else None, *(tape.of_parameter(leaf) for leaf in leaves)]

        statistics = tape.new(2 * rows, 4)
        return tape.op([x, *leaves], [(elements, tape.width)], run, save=[x.buffer, statistics])[0]

    def add_norm(self, residual: Value, x: Value, module: str, branch: Branch) -> tuple[Value, Value]:
        """(residual + branch(x), its norm)."""

        def body(x: Value, residual: Value) -> list[Value]:
            if not self._kernel(x, module):
                total = self._add(residual, x, branch)
                return [total, self._norm(total, module)]
            return self._added(residual, x, branch, self._parameters(module))

        total, normed = self.tape.call(module, body, x, residual)
        return total, normed

    def add(self, residual: Value, x: Value, branch: Branch) -> Value:
        """residual + branch(x)."""
        if self.fused and branch.scales and x.elements >= MIN_ELEMENTS:
            return self._added(residual, x, branch, [])[0]
        return self._add(residual, x, branch)

    def _added(self, residual: Value, x: Value, branch: Branch, norm: list[Leaf]) -> list[Value]:
        """By the kernel: it draws the mask again, and keeps x for gamma's gradient alone."""
        tape, elements, gamma = self.tape, x.elements, self.leaf(branch.gamma)
        leaves = [*norm, *([gamma] if gamma is not None else [])]

        def run(total: Buffer | None, normed: Buffer | None = None) -> Grads:
            gradient = tape.new(elements) if norm else total
            own = tape.new(elements) if branch.scales else gradient
            return [gradient, own, *(tape.of_parameter(leaf) for leaf in leaves)]

        outputs = [(elements, tape.width)] * (2 if norm else 1)
        save = [x.buffer] if gamma is not None else []
        return tape.op([residual, x, *leaves], outputs, run, save=save, saves_outputs=[0] if norm else [])

    def _add(self, residual: Value, x: Value, branch: Branch) -> Value:
        tape = self.tape
        if branch.dropout:
            x = self.dropout(x)
        gamma = self.leaf(branch.gamma)
        if gamma is not None:
            elements = x.elements

            def scaled(gradient: Buffer) -> Grads:
                product = tape.new(elements)  # before it is summed over rows
                del product
                return [tape.new(elements), tape.of_parameter(gamma)]

            x = tape.op([x, gamma], [(elements, tape.width)], scaled, save=[x.buffer], first=True)[0]
        if branch.drop_path:
            x = self.pointwise(x)
        return self.sum(residual, x)

    def dropout(self, x: Value) -> Value:
        """torch's, which keeps a mask of bytes."""
        tape, elements = self.tape, x.elements
        mask = tape.new(elements, 1)
        return tape.op([x], [(elements, tape.width)], lambda g: [tape.new(elements)], save=[mask])[0]

    def pointwise(self, x: Value, *, save_input: bool = False, save_output: bool = False) -> Value:
        """One input, a gradient of its own."""
        tape, elements = self.tape, x.elements
        saves = {"save": [x.buffer] if save_input else [], "saves_outputs": [0] if save_output else []}
        return tape.op([x], [(elements, tape.width)], lambda g: [tape.new(elements)], **saves)[0]

    def sum(self, a: Value, b: Value) -> Value:
        return self.tape.op([a, b], [(a.elements, self.tape.width)], lambda g: [g, g])[0]

    def add_row(self, x: Value, table: Value) -> Value:
        """A row of the table to each."""
        tape, whole = self.tape, table.elements
        return tape.op([x, table], [(x.elements, tape.width)], lambda g: [g, tape.new(whole)])[0]

    def rows(self, x: Value, elements: float) -> Value:
        """Some of its rows, as often as wanted: `embedding` or `index_select`."""
        tape, whole = self.tape, x.elements
        return tape.op([x], [(elements, tape.width)], lambda g: [tape.new(whole)])[0]

    def part(self, x: Value, elements: float) -> Value:
        """A slice: the gradient is of all of x."""
        tape, whole = self.tape, x.elements
        return tape.op([x], [Value(x.buffer, elements, x.width)], lambda g: [tape.new(whole)])[0]

    def joined(self, *parts: Value) -> Value:
        """Their gradients are views of its own."""
        count = len(parts)
        total = sum(each.elements for each in parts)
        return self.tape.op(list(parts), [(total, self.tape.width)], lambda g: [g] * count)[0]

    def table(self, rows: float, module: str) -> Value:
        """Rows of an embedding by their ids; its gradient is dense."""
        return self.tape.call(module, lambda: [self.looked_up(rows, f"{module}.weight")])[0]

    def looked_up(self, rows: float, weight: str) -> Value:
        tape, leaf = self.tape, self.leaf(weight)
        width = self.shapes[weight][1]
        return tape.op([leaf], [(rows * width, tape.width)], lambda g: [tape.of_parameter(leaf)])[0]

    def wide(self, x: Value) -> Value:
        """In fp32."""
        if self.tape.width == 4:
            return x
        tape, elements = self.tape, x.elements
        return tape.op([x], [(elements, 4)], lambda g: [tape.new(elements)])[0]
