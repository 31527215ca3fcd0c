"""Batches copied out of a ring into pinned memory, on a thread: the GPU fetches those without the host waiting."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from ofa_ds.train.ring import POLL_S, Parcel, Ring


class PinnedCopies:
    """As a ring, whose batches stay valid: torch's allocator keeps a pinned block until the GPU has read it."""

    def __init__(self, ring: Ring, ahead: int, copy: Callable[[Tensor], Tensor] = Tensor.pin_memory) -> None:
        """ahead: batches that are copied before they are asked for."""
        self._ring, self._copy = ring, copy
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._copied: queue.Queue[Parcel | BaseException] = queue.Queue(ahead)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pinned-copies", daemon=True)
        self._thread.start()

    @property
    def num_restarts(self) -> int:
        return self._ring.num_restarts

    def take(self) -> Parcel:
        found = self._copied.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def release(self) -> None:
        """Nothing to do: what was taken is a copy."""

    def close(self) -> None:
        self._closing.set()
        self._ring.stop_waiting()
        self._thread.join()
        self._ring.close()

    def _run(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)  # else the pinned memory would belong to the first GPU's context
        try:
            while self._put(self._next()):
                pass
        except BaseException as error:  # the consumer's, whatever it is: nobody looks at this thread
            self._put(error)

    def _next(self) -> Parcel:
        parcel = self._ring.take()
        copied = parcel._replace(buffer=self._copy(parcel.buffer))
        self._ring.release()
        return copied

    def _put(self, what: Parcel | BaseException) -> bool:
        """False: nobody will take it."""
        while not self._closing.is_set():
            try:
                self._copied.put(what, timeout=POLL_S)
                return True
            except queue.Full:
                continue
        return False
