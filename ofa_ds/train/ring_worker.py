"""What a process does that prepares batches for training: one after another into the slots it is told."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

from ofa_ds.batch import Batch
from ofa_ds.train.packed_buffer import Layout, packing
from ofa_ds.train.ring_watch import Places
from ofa_ds.train.slots import Slots

STOP_GRACE_S = 120
"""How long a worker lives on after SIGTERM, which schedulers send to all: the trainer saves after one more step."""

Key = tuple[int, int]
"""Optimizer step and number of a micro-batch in it."""
Begin = Callable[[str, int], None]
"""`begin(family, row)`: this row is next."""
Prepare = Callable[..., tuple[Batch, Any]]
"""`prepare(step, number, begin)` -> the batch and notes about it, a function of the first two alone. ValueErrors and
RuntimeErrors are the consumer's, one line each, and so are OSErrors: of a disk, or of a service."""


Announce = Callable[[int, int], None]
"""`announce(step, number)`: this batch will be wanted soon; what it needs may be fetched meanwhile."""


class Order(NamedTuple):
    """To a worker."""

    number: int
    """Of the batch, counted from the start on."""
    key: Key
    slot: int


class Made(NamedTuple):
    """Of a worker. The batch itself is in the slot."""

    number: int
    size: int
    layout: Layout
    notes: Any


class Failed(NamedTuple):
    """Of a worker, in place of a batch."""

    number: int
    error: ValueError | RuntimeError


def work(
    connection: Connection, slots: Slots, places: Places, number: int, prepare: Prepare, announce: Announce | None
) -> None:
    """Until the connection closes. number: of the worker among them."""
    _be_a_worker()
    begin = partial(places.begin, number)
    orders: deque[Order] = deque()
    try:
        while True:
            while not orders or connection.poll():
                orders.append(connection.recv())
                announce = announced(announce, orders[-1].key)
            connection.send(_answer(orders.popleft(), slots, prepare, begin))
    except (EOFError, ConnectionError):
        return  # the trainer has closed it, or is gone


def announced(announce: Announce | None, key: Key) -> Announce | None:
    """Returns whom to tell the next one: nobody where that fails, which is told once and costs speed alone."""
    if announce is None:
        return None
    try:
        announce(*key)
    except Exception as error:
        print(f"{place(key)}: no reading ahead: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return None
    return announce


def _answer(order: Order, slots: Slots, prepare: Prepare, begin: Begin) -> Made | Failed:
    try:
        batch, notes = prepare(*order.key, begin)
        packed = packing(batch)
        packed.write(slots.reserve(order.slot, packed.size))
        return Made(order.number, packed.size, packed.layout, notes)
    except (ValueError, RuntimeError, OSError) as error:  # the line alone: a class of its own may not travel
        return Failed(order.number, (ValueError if isinstance(error, ValueError) else RuntimeError)(str(error)))
    except MemoryError:
        return Failed(order.number, RuntimeError(f"{place(order.key)}: no memory left; use smaller batch.micro_rows"))
    except Exception as error:  # a fault of ours: it would come again, so nobody should start another worker for it
        traceback.print_exc(file=sys.stderr)
        return Failed(order.number, RuntimeError(f"{place(order.key)}: {type(error).__name__}: {error}"))


def place(key: Key) -> str:
    """In words; steps are counted from 1, as everywhere in a run's output."""
    return f"step {key[0] + 1}, micro-batch {key[1]}"


def _be_a_worker() -> None:
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):  # the trainer's business; it ends its workers
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(STOP_GRACE_S))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A trainer that is killed cannot end its workers, and one in the middle of a batch does not look."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
