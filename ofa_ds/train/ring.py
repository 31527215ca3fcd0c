"""Batches from worker processes through reused shared memory: what travels is which slot, and how it is laid out.

Workers are interchangeable: a batch is a function of its key, so one that is killed, or hangs, is started again, and
its batches are made again with the same bits. They come from a fork server, not by forking the trainer, whose RDMA
buffers and threads do not survive a fork.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from torch import Tensor

from ofa_ds.batch import Batch
from ofa_ds.train.packed_buffer import Layout, from_buffer
from ofa_ds.train.ring_watch import REPLACE_S, TELL_S, Places, Silence, seen
from ofa_ds.train.ring_worker import Announce, Failed, Key, Made, Order, Prepare, place, work
from ofa_ds.train.slots import Slots

PREFETCH = 2
"""Batches that each worker keeps ready at least."""
MAX_ORDERS = 64
"""That a worker has not answered: more would fill the pipes, and both ends would wait."""
MAX_DEATHS = 5
"""Of workers over one batch."""
GRACE_S = 0.5
"""For workers to end by themselves; they have nothing to lose."""
POLL_S = 0.2


class Parcel(NamedTuple):
    """A batch as it lies in a slot, or in a copy."""

    buffer: Tensor
    layout: Layout
    notes: Any

    def batch(self) -> Batch:
        """Its tensors are views of `buffer`."""
        return from_buffer(self.buffer, self.layout)


@dataclass
class _Worker:
    number: int
    process: BaseProcess | None = None
    connection: Connection | None = None
    orders: deque[Order] = field(default_factory=deque)
    """Not answered, oldest first: that one it is at."""
    silence: Silence = field(default_factory=Silence)
    hung: bool = False
    """It was ended because nothing was heard of it."""


class Ring:
    """`ring.take()` -> the next batch, in the order of the keys. Its slot is used again after `ring.release()`."""

    def __init__(
        self, prepare: Prepare, keys: Iterator[Key], *, workers: int, held: int, announce: Announce | None = None,
        preload: str = __name__, name: str = "data worker",
    ) -> None:  # fmt: skip
        """held: batches that are taken between two releases. preload: module that the fork server imports.

        announce: called by a worker for each batch it is to make, before it makes those ordered earlier.

        While the consumer is busy, as many batches are made as it takes at once. Raises RuntimeError, one line: no
        memory for slots.
        """
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([preload])
        self._work, self._keys, self._name = (prepare, announce), enumerate(keys), name
        self._ahead = max(PREFETCH * workers, min(held, MAX_ORDERS * workers))
        self._slots = Slots(held + self._ahead)
        self._places = Places(workers)
        self._watched = time.monotonic()
        self._free = list(range(self._slots.count))
        self._lent: list[int] = []
        self._workers = [_Worker(number) for number in range(workers)]
        self._answers: dict[int, tuple[Order, Made | Failed]] = {}
        self._deaths: Counter[int] = Counter()
        """Of workers, by the number of the batch they were at."""
        self._next = 0
        self._stopped = self._closed = False
        self.num_restarts = 0
        """Workers that were started in place of one that ended."""
        atexit.register(
            self.close
        )  # before multiprocessing's own end, which asks with the SIGTERM that workers survive
        try:
            for worker in self._workers:
                self._start(worker)
        except BaseException:
            self.close()
            raise

    def take(self) -> Parcel:
        """The next batch; waits for it.

        Raises ValueError or RuntimeError in its turn, one line: what its preparing raised, or that it killed every
        worker. StopIteration after the last, and where `stop_waiting` was called.
        """
        self._assign()
        if self._next not in self._answers and not any(worker.orders for worker in self._workers):
            raise StopIteration
        while self._next not in self._answers:
            if self._stopped:
                raise StopIteration
            self._listen()
            self._assign()
        order, answer = self._answers.pop(self._next)
        self._next += 1
        self._lent.append(order.slot)
        self._assign()  # the consumer may now be busy for long
        if isinstance(answer, Failed):
            raise answer.error
        return Parcel(self._slots.view(order.slot, answer.size), answer.layout, answer.notes)

    def release(self) -> None:
        """All that were taken: their slots are written anew, and with them their tensors."""
        self._free.extend(reversed(self._lent))  # what was used last is used next: it is still in the cache
        self._lent.clear()
        self._assign()

    def stop_waiting(self) -> None:
        """From another thread: `take` ends within POLL_S seconds."""
        self._stopped = True

    def close(self) -> None:
        """Ends the workers. Batches that were taken stay as they are."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        live = [worker for worker in self._workers if worker.connection is not None]
        for worker in live:
            worker.connection.close()
        until = time.monotonic() + GRACE_S
        for worker in live:
            worker.process.join(max(until - time.monotonic(), 0.0))
            _reap(worker.process)
        self._slots.close()
        self._places.close()

    def _assign(self) -> None:
        """Orders to workers with the fewest, while there are slots."""
        while self._free and len(self._answers) + sum(len(worker.orders) for worker in self._workers) < self._ahead:
            worker = min(self._workers, key=lambda each: len(each.orders))
            if len(worker.orders) >= MAX_ORDERS or (following := next(self._keys, None)) is None:
                return
            order = Order(*following, self._free.pop())
            worker.orders.append(order)
            if worker.connection is None:
                self._start(worker)
            else:
                _send(worker.connection, order)

    def _listen(self) -> None:
        """Until something came, or nothing for POLL_S seconds."""
        connections = {worker.connection: worker for worker in self._workers if worker.connection is not None}
        for connection in wait(list(connections), POLL_S):
            try:
                answer = connection.recv()
            except (EOFError, OSError):
                self._replace(connections[connection])
                continue
            order = connections[connection].orders.popleft()
            assert order.number == answer.number, "workers answer in order"
            self._answers[order.number] = order, answer
            del self._deaths[order.number]
        self._watch()

    def _watch(self) -> None:
        """Tell of workers that stay at one row, and end those that give no sign of life."""
        passed_s = time.monotonic() - self._watched
        if passed_s < POLL_S:
            return
        self._watched += passed_s
        for worker in self._workers:
            if worker.connection is None or not worker.orders or worker.hung:
                continue
            rows, row = self._places.of(worker.number)
            silence, order = worker.silence, worker.orders[0]
            # Time between two calls is the trainer's, which computed, or was stopped itself.
            silence.add(min(passed_s, 2 * POLL_S), (order.number, rows), seen(worker.process.pid))
            who = f"{self._name} (process {worker.process.pid})"
            if silence.dead_s >= REPLACE_S:
                worker.hung = True
                _tell(f"{who} gave no sign of life for {REPLACE_S:g} s at {place(order.key)}, {row}: it is ended")
                worker.process.kill()
            elif silence.row_s >= TELL_S and not silence.told:
                silence.told = True
                until = f"it is replaced after {REPLACE_S:g} s without a sign of life"
                _tell(f"{who} is at {place(order.key)}, {row}, for {TELL_S:g} s: {silence.does}; {until}")

    def _start(self, worker: _Worker) -> None:
        """With all its orders."""
        self.num_restarts += worker.process is not None
        self._places.clear(worker.number)
        worker.hung = False
        ours, theirs = self._context.Pipe()
        try:
            worker.process = self._context.Process(
                target=work, args=(theirs, self._slots, self._places, worker.number, *self._work), name=self._name,
                daemon=True,
            )  # fmt: skip
            worker.process.start()
        except OSError as error:
            raise RuntimeError(f"{self._name}: cannot be started: {error}; set data.workers=0") from error
        finally:
            theirs.close()  # what is left of it is the worker's: that end tells us when it is gone
        worker.connection = ours
        for order in worker.orders:
            _send(ours, order)

    def _replace(self, worker: _Worker) -> None:
        """A worker has ended that nobody has told to."""
        worker.connection.close()
        worker.connection = None
        worker.process.join(GRACE_S)
        how = "hung, and was ended," if worker.hung else _how(worker.process.exitcode)
        process = worker.process.pid
        _reap(worker.process)
        who = f"{self._name} (process {process}) {how}"
        if not worker.orders:
            _tell(f"{who} while it had nothing to do: another one is started when there is something")
            return
        order = worker.orders[0]
        self._deaths[order.number] += 1
        if self._deaths[order.number] >= MAX_DEATHS:
            worker.orders.popleft()
            row = f", {self._places.of(worker.number)[1]}" if worker.hung else ""
            error = RuntimeError(_gave_up(f"{who} at {place(order.key)}{row}", HANG if worker.hung else DEATH))
            self._answers[order.number] = order, Failed(order.number, error)
        else:
            _tell(f"{who} at {place(order.key)}: another one is started, which makes the same batch")
        self._start(worker)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _send(connection: Connection, order: Order) -> None:
    try:
        connection.send(order)
    except OSError:
        pass  # it is gone: `_listen` reads so, and its orders are kept


def _how(code: int | None) -> str:
    """code: `Process.exitcode`."""
    if code is None or code == 255:  # where the fork server is gone too, nobody knows
        return "ended"
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _gave_up(where: str, advice: str) -> str:
    return f"{where}, the {MAX_DEATHS}th to do so at this batch: {advice}; data.workers=0 shows the fault itself"


DEATH = (
    "SIGKILL is mostly a lack of memory (fewer data.workers, smaller batch.micro_rows), SIGBUS a file that is cut or a "
    "full disk"
)
HANG = "see whether the row decodes: ofa-ds shards verify"


def _reap(process: BaseProcess) -> None:
    if process.is_alive():
        process.kill()
        process.join()
    process.close()
