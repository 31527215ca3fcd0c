"""How long this rank is busy itself in a step, apart from waiting for others in collectives: for finding slow ranks.

The time of a step less the time inside collectives, which are timed where DeepSpeed calls them. On a CPU: on a GPU a
collective only joins a queue, and nothing is known here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ofa_ds.engine.deepspeed_import import deepspeed

_COLLECTIVES = (
    "all_reduce", "all_reduce_coalesced", "reduce", "broadcast", "all_gather", "all_gather_into_tensor",
    "all_gather_coalesced", "reduce_scatter", "reduce_scatter_tensor", "all_to_all_single", "barrier",
)  # fmt: skip


class Waits:
    """Seconds that this process has spent in collectives."""

    def __init__(self) -> None:
        self.total_s = 0.0

    @contextmanager
    def inside(self) -> Iterator[None]:
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self.total_s += time.perf_counter() - began_s

    @classmethod
    def of_deepspeed(cls) -> Waits:
        """Those of the process group that DeepSpeed has made; the same object each time."""
        backend = deepspeed.comm.comm.cdb
        known = getattr(backend, "ofa_ds_waits", None)
        if known is None:
            known = backend.ofa_ds_waits = cls()
            for name in _COLLECTIVES:
                setattr(backend, name, known._timed(getattr(backend, name)))
        return known

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.inside():
                work = call(*args, **kwargs)
            return _Work(work, self) if hasattr(work, "wait") else work

        return timed


class _Work:
    """A collective under way."""

    def __init__(self, work: Any, waits: Waits) -> None:
        self._work, self._waits = work, waits

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._waits.inside():
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class OwnTime:
    """`begin` and `end` around a step; `pace` is then this rank's time per work, to be compared with other ranks'."""

    def __init__(self, device: torch.device) -> None:
        """After DeepSpeed has made the process group."""
        self.pace = 0.0
        """Seconds, of the last step; 0 where it is not known, which is always so on a GPU."""
        self._known = device.type == "cpu" and deepspeed.comm.comm.cdb is not None
        self.waits = Waits.of_deepspeed() if self._known else Waits()
        self._began_s = self._waited_s = 0.0

    def begin(self) -> None:
        self._began_s, self._waited_s = time.perf_counter(), self.waits.total_s

    def end(self, work: float) -> None:
        """work: how much of it the step was, such as tokens."""
        if self._known:
            busy_s = time.perf_counter() - self._began_s - (self.waits.total_s - self._waited_s)
            self.pace = busy_s / max(work, 1.0)
