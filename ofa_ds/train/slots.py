"""Memory that the processes of a host share, without a name: it is gone with the last of them, however that ends."""

from __future__ import annotations

import mmap
import os
import resource
import tempfile
from contextlib import suppress
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ofa_ds.storage.sizes import size_text

STRIDE = 1 << 36
"""Bytes of the file from slot to slot: room to grow. Only what was reserved takes memory."""
SHARED_MEMORY = Path("/dev/shm")
OTHER_FILES = 512
"""That a training process has open beside."""


class Slots:
    """`count` runs of bytes, each as long as the longest that was asked of it; pages are kept from use to use.

    Fresh pages are what costs when a batch changes hands: 2,160 faults for 8.8 MB, five times the copy. Goes to another
    process as an argument of it: the file's descriptor is passed on.
    """

    def __init__(self, count: int, descriptor: int | None = None) -> None:
        """Raises RuntimeError, one line, where the system gives no such memory."""
        self.count = count
        _allow_files(count)
        self._windows: dict[int, Tensor] = {}
        self._reserved: dict[int, int] = {}
        try:
            self._file = unnamed_file() if descriptor is None else descriptor
            if descriptor is None:
                os.ftruncate(self._file, count * STRIDE)
        except OSError as error:
            raise RuntimeError(f"no memory that processes share: {error}; set data.workers=0") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return _passed, (self.count, DupFd(self._file))

    def reserve(self, slot: int, size: int) -> Tensor:
        """[size] uint8 of `slot`, to write to: its pages are there, so that a write cannot end the process.

        Raises RuntimeError, one line with the way out, where the machine has no memory left for them.
        """
        there = self._reserved.get(slot, 0)
        if size > there:
            try:
                os.posix_fallocate(self._file, slot * STRIDE + there, size - there)
            except OSError as error:
                raise RuntimeError(
                    f"no memory for a batch of {size_text(size)} that workers share with training: "
                    f"{error.strerror}; use smaller batch.micro_rows, fewer data.workers, or data.workers=0"
                ) from error
            self._reserved[slot] = size
        return self.view(slot, size)

    def view(self, slot: int, size: int) -> Tensor:
        """[size] uint8 of `slot`; stays valid, and shows what is written there next."""
        window = self._windows.get(slot)
        if window is None or len(window) < size:
            length = max(1 << (size - 1).bit_length(), mmap.ALLOCATIONGRANULARITY)  # addresses, not memory
            try:
                mapped = mmap.mmap(self._file, length, offset=slot * STRIDE)
            except OSError as error:
                raise RuntimeError(
                    f"no room for a batch of {size_text(size)} that workers share with training: {error.strerror}; "
                    "raise `ulimit -v` or `ulimit -n`, or set data.workers=0"
                ) from error
            window = self._windows[slot] = torch.frombuffer(mapped, dtype=torch.uint8)
        return window[:size]

    def close(self) -> None:
        """Views stay valid."""
        self._windows.clear()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _passed(count: int, descriptor: Any) -> Slots:
    return Slots(count, descriptor.detach())


def _allow_files(count: int) -> None:
    """Each mapping has a descriptor of its own: as many as a step has batches, and as many ahead."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # `view` tells it where that is not enough
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
            )


def unnamed_file() -> int:
    """Descriptor. Not limited by the size of /dev/shm, which containers make small, where the system is not older."""
    if hasattr(os, "memfd_create"):  # a Python that was built for an old C library lacks it
        with suppress(OSError):  # a sandbox may forbid it
            return os.memfd_create("ofa-ds-batches", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as file:
        return os.dup(file.fileno())
