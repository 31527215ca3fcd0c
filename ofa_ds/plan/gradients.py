"""What becomes of a parameter's gradient, by ZeRO stage, and of its weights (`ofa_ds.plan.gathering`).

deepspeed/runtime/zero/stage3.py and stage_1_and_2.py, 0.19.8: gradients are copied into a bucket; one that does not fit
is kept as it is until the bucket is reduced. Those of a leaf module wait for its backward to end.
"""

from __future__ import annotations

from collections.abc import Sequence

from ofa_ds.plan.coordinator import Coordinator
from ofa_ds.plan.layout import BYTES, Layout
from ofa_ds.plan.parameters import Parameter
from ofa_ds.plan.tape import Buffer, Leaf, Ledger

PART = "gradients in flight"


class Gradients:
    """`tape.Weights`."""

    def __init__(self, params: Sequence[Parameter], layout: Layout, ledger: Ledger, accumulation: int) -> None:
        self.layout, self.ledger, self.accumulation = layout, ledger, accumulation
        self.part = "gradients" if layout.stage < 2 else PART
        self.coordinator: Coordinator | None = None
        self._leaf_of = {each.name: each.unit for each in params if each.unit != each.name.rpartition(".")[0]}
        self._of_leaf: dict[str, list[tuple[Leaf, Buffer]]] = {}
        self._kept: list[Buffer] = []
        self._elements = self._parameters = self._in_bucket = 0

    def enter(self, module: str, forward: bool) -> None:
        self.coordinator.enter(module, forward)

    def leave(self, module: str, forward: bool) -> None:
        self.coordinator.leave(module, forward)

    def gradient(self, leaf: Leaf, gradient: Buffer) -> None:
        """Of one parameter, whole."""
        if self.layout.stage >= 2:
            if self.layout.stage == 3 and leaf.name in self._leaf_of:
                self._of_leaf.setdefault(self._leaf_of[leaf.name], []).append((leaf, gradient))
            else:
                self._into_bucket(leaf, gradient)
        elif not self._is_in_state():
            self._kept.append(gradient)

    def _is_in_state(self) -> bool:
        """Whether `state` counts the whole gradients, which are there all the time."""
        return self.layout.keeps_whole_gradients or self.accumulation > 1

    def leave_gradients(self, module: str) -> None:
        """The leaf module's backward has ended."""
        for leaf, gradient in self._of_leaf.pop(module, []):
            self._into_bucket(leaf, gradient)

    def _into_bucket(self, leaf: Leaf, gradient: Buffer) -> None:
        layout, size = self.layout, leaf.elements
        if self._elements + size > layout.reduce_bucket and self._elements:
            self._reduce()
        if self._elements + size <= layout.reduce_bucket:
            self._in_bucket += size
        else:
            self._kept.append(gradient)
        self._elements += size
        self._parameters += 1

    def _reduce(self) -> None:
        layout = self.layout
        width, wide = layout.weight_bytes, BYTES[layout.reduce_precision]
        kept = sum(each.size for each in self._kept) / width
        cast = self.ledger.take(kept * wide, PART) if wide != width and kept else None
        joined = None
        if layout.stage == 3 and (self._parameters > 1 or self._elements % layout.world):
            joined = self.ledger.take(self._elements * wide, PART)  # pieces of every rank, one after another
        del cast, joined
        self._kept.clear()
        self._elements = self._parameters = self._in_bucket = 0

    def finish(self) -> None:
        """The backward has ended."""
        if self.layout.stage >= 2:
            self._reduce()
        if self.coordinator is not None:
            self.coordinator.end_backward()
