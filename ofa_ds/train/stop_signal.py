"""The wish to stop: a signal becomes a checkpoint after the running step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

DUPLICATE_S = 5.0


class StopSignal:
    """SIGINT or SIGTERM asks for a checkpoint after the running step; a later one ends the process at once.

    A launcher passes a signal on that the ranks have had already: what comes within DUPLICATE_S is the same request.
    """

    def __init__(self) -> None:
        self.asked = False
        self._asked_at_s = 0.0

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if not self.asked:
            self.asked, self._asked_at_s = True, now_s
        elif now_s - self._asked_at_s > DUPLICATE_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @contextmanager
    def listening(self) -> Iterator[StopSignal]:
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
