"""The wish to stop: a signal becomes a checkpoint after the running step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

DUPLICATE_S = 5.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """SIGINT, SIGTERM or SIGUSR1 asks for a checkpoint after the running step.

    A later SIGINT or SIGTERM ends the process at once; what comes within DUPLICATE_S is the same request: a launcher
    passes a signal on that the ranks have had already. SIGUSR1 is a scheduler's early word, which no repetition and no
    first SIGTERM after it turns into impatience.
    """

    def __init__(self) -> None:
        self.asked = False
        self._urged_at_s: float | None = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if number == signal.SIGUSR1:
            return
        now_s = time.monotonic()
        if self._urged_at_s is None:
            self._urged_at_s = now_s
        elif now_s - self._urged_at_s > DUPLICATE_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @contextmanager
    def listening(self) -> Iterator[StopSignal]:
        before = {number: signal.signal(number, self._ask) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
