"""The exponential moving average of the weights , each rank keeping that of the part it updates.

docs/ofa.md, Training: moving average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class MovingAverage:
    """average <- decay * average + (1 - decay) * weight after each update, fp32; also of floating buffers.

    Counting buffers are copied. Frozen parameters have none: it would be the weight itself.
    """

    def __init__(self, masters: Sequence[Tensor], buffers: Mapping[str, Tensor], decay: float) -> None:
        """masters: the tensors that the optimizer updates; they and the buffers are read at each `update`."""
        self._masters = list(masters)
        self._live_buffers = dict(buffers)
        self._decay = decay
        self._averages = [torch.empty_like(master, dtype=torch.float32) for master in self._masters]
        self.by_master: Mapping[Tensor, Tensor] = dict(zip(self._masters, self._averages, strict=True))
        """The average of each master, in its shape."""
        self.buffers = {name: torch.empty_like(buffer) for name, buffer in buffers.items()}
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Begin at the weights as they are now."""
        torch._foreach_copy_(self._averages, self._masters)
        for name, buffer in self._live_buffers.items():
            self.buffers[name].copy_(buffer)

    @torch.no_grad()
    def update(self) -> None:
        """After each optimizer step that changed the weights."""
        share = 1 - self._decay
        weights = [master.float() for master in self._masters]  # fp32 already, unless no fp32 master is kept
        torch._foreach_lerp_(self._averages, weights, share)
        for name, buffer in self._live_buffers.items():
            if buffer.is_floating_point():
                self.buffers[name].lerp_(buffer, share)
            else:
                self.buffers[name].copy_(buffer)
