"""What gathered weights take under stage 3: `ofa_ds.plan.coordinator` with bytes in place of tensors.

As in deepspeed/runtime/zero/partition_parameters.py (0.19.8): a module's weights come in one collective, into one
buffer, of which each weight then gets a copy of its own; the buffer stays until all of them have been waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ofa_ds.plan.coordinator import Coordinator, Held, padded
from ofa_ds.plan.layout import Layout
from ofa_ds.plan.tape import Buffer, Ledger

PART = "gathered weights"
_QUANTIZED_GROUP = 2048
"""Weights of one scale in 8 bits, about."""


class _Cargo:
    """What a collective writes into, and in 16 bits what came in 8, before it is cut up."""

    wide: Buffer | None = None

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer


class GatheredBytes(Coordinator):
    """Buffers of a ledger for one micro-batch."""

    def __init__(self, held: Held, layout: Layout, ledger: Ledger, order: Sequence[str] | None = None) -> None:
        super().__init__(held, layout, order)
        self.ledger = ledger
        self.watch: Callable[[str, bool, bool], None] | None = None
        """Called with (module, forward, whether it is entered) after each change."""
        self._whole: dict[int, Any] = {}

    def enter(self, module: str, forward: bool) -> None:
        super().enter(module, forward)
        if self.watch is not None:
            self.watch(module, forward, True)

    def leave(self, module: str, forward: bool) -> None:
        super().leave(module, forward)
        if self.watch is not None:
            self.watch(module, forward, False)

    def sent(self, weights: tuple[int, ...], second: bool) -> _Cargo | None:
        if self.layout.world == 1:  # a weight is its own piece
            return None
        ranks = self.layout.hpz if second else self.layout.world
        elements = sum(padded(self.held.sizes[weight], ranks) for weight in weights)
        each = 1 + 4 / _QUANTIZED_GROUP if self.layout.qwz else self.layout.weight_bytes
        return _Cargo(self.ledger.take(elements * each, PART))

    def arrived(self, weights: tuple[int, ...], cargo: _Cargo | None) -> None:
        if cargo is None:
            return
        width = self.layout.weight_bytes
        if self.layout.qwz:
            cargo.wide = self.ledger.take(sum(self.held.sizes[weight] for weight in weights) * width, PART)
        if len(weights) == 1:
            self._whole[weights[0]] = cargo.wide or cargo.buffer
            return
        for weight in weights:
            self._whole[weight] = self.ledger.take(self.held.sizes[weight] * width, PART)

    def given_back(self, weight: int) -> None:
        self._whole.pop(weight, None)
