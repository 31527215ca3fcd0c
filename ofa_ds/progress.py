"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0

T = TypeVar("T")


class Progress:
    """Counts `unit`s of work on stderr. Off a terminal, short work says nothing."""

    def __init__(self, total: int, what: str, unit: str) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.done = self._skipped = 0.0
        self.note = ""
        """Said beside the counts, such as how many errors there were so far."""
        self._bar = tqdm(total=total, desc=what, unit=f" {unit}", leave=False) if sys.stderr.isatty() else None
        self._started = self._told = time.monotonic()

    def add(self, count: float) -> None:
        """Count that many more; parts of a unit add up."""
        before = int(self.done)
        self.done += count
        if self._bar is not None:
            if self.note:
                self._bar.set_postfix_str(self.note, refresh=False)
            self._bar.update(int(self.done) - before)
            return
        now = time.monotonic()
        if now - self._told >= SECONDS_BETWEEN_LINES:
            self._told = now
            rate = (self.done - self._skipped) / (now - self._started)
            left_s = max(self.total - self.done, 0.0) / rate if rate else 0.0
            a_second = f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
            line = f"{self.what}: {int(self.done)} of {self.total} {self.unit}, {a_second} a second"
            line += f", {left_s:.0f} s left{f', {self.note}' if self.note else ''}"
            print(line, file=sys.stderr, flush=True)

    def skip(self, count: float) -> None:
        """Count that many as done before: they say nothing of how fast the rest goes."""
        self.done += count
        self._skipped += count
        if self._bar is not None:
            self._bar.initial = self._bar.n = int(self.done)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def track(items: Sequence[T], what: str, unit: str) -> Iterator[T]:
    """Yield `items`, counting them."""
    progress = Progress(len(items), what, unit)
    try:
        for item in items:
            yield item
            progress.add(1)
    finally:
        progress.close()
