"""Work that is done beside what goes on, by threads that nobody waits for: a process ends, and Ctrl-C acts, at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

IDLE_S = 2.0
"""A thread ends that had nothing to do for so long."""

T = TypeVar("T")


class Ahead(Generic[T]):
    """Calls under names, begun in the order in which they were asked for, by at most `threads` at a time."""

    def __init__(self, threads: int) -> None:
        self._most = threads
        self._threads = self._idle = 0
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, Callable[[], T]] = OrderedDict()
        self._running: dict[str, Future[T]] = {}

    def ask(self, name: str, call: Callable[[], T]) -> None:
        """Nothing happens where `name` is asked for already, and not done."""
        with self._changed:
            if name in self._waiting or name in self._running:
                return
            self._waiting[name] = call
            if self._idle >= len(self._waiting):
                self._changed.notify()
            elif self._threads < self._most:
                self._threads += 1
                threading.Thread(target=self._work, daemon=True, name="shards-ahead").start()

    def now(self, name: str, call: Callable[[], T]) -> T:
        """The result of `name`, waited for: begun at once where it is not running. Raises what the call raises."""
        with self._changed:
            self._waiting.pop(name, None)
            running = self._running.get(name)
            if running is None:
                running = self._running[name] = Future()
                threading.Thread(target=self._run, args=(name, call, running), daemon=True).start()
        return running.result()  # in the main thread Ctrl-C ends this, which it would not in the call itself

    def _work(self) -> None:
        while (following := self._next()) is not None:
            self._run(*following)

    def _next(self) -> tuple[str, Callable[[], T], Future[T]] | None:
        with self._changed:
            self._idle += 1
            self._changed.wait_for(lambda: self._waiting, IDLE_S)
            self._idle -= 1
            if not self._waiting:
                self._threads -= 1
                return None
            name, call = self._waiting.popitem(last=False)
            future = self._running[name] = Future()
            return name, call, future

    def _run(self, name: str, call: Callable[[], T], future: Future[T]) -> None:
        try:
            result, error = call(), None
        except BaseException as raised:
            result, error = None, raised
        with self._changed:
            del self._running[name]
        future.set_result(result) if error is None else future.set_exception(error)
