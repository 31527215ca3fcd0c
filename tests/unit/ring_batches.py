"""Batches that workers make in no time, and faults that strike them in the middle of it. Picklable, light to import."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ofa_ds.batch import Batch, pack
from ofa_ds.data.example import Example

PATCH = 4


class OwnError(ValueError):
    """Of a class that cannot be made from its text."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(f"{number}: {text}")


@dataclass(frozen=True)
class Making:
    """`making(step, number)` -> (batch of `side(step)` pixels, notes), the same for the same arguments."""

    sides: tuple[int, ...] = (16,)
    """Of pictures, by step, over and over."""
    delay_s: float = 0.0
    faults: dict[tuple[int, int], str] = field(default_factory=dict)
    """What happens at these, by name."""
    folder: Path | None = None
    """Where a fault leaves a mark, so that it strikes once; None: every time."""

    def __call__(
        self, step: int, number: int, begin: Callable[[str, int], None] | None = None
    ) -> tuple[Batch, list[str]]:
        if "no service" in self.faults.values():  # here: while it starts, a worker may compute for long
            from ofa_ds.data.remote import fetching  # noqa: F401
        time.sleep(self.delay_s)
        if begin is not None:
            begin("text", 10 * step + number)
        fault = self.faults.get((step, number))
        if fault and (self.folder is None or not (self.folder / fault).exists()):
            if self.folder is not None:
                (self.folder / fault).touch()
            strike(fault)
        rng, side = np.random.default_rng((step, number)), self.sides[step % len(self.sides)]
        image = rng.integers(0, 256, (side, side, 3)).astype(np.uint8)
        target = rng.integers(4, 99, 1 + number)
        example = Example(
            task="caption", source=np.array([0, *rng.integers(4, 99, 5), 2]), target=np.array([*target, 2]),
            prev=np.array([0, *target]), image=image,
        )  # fmt: skip
        return pack([example], [(side, side)], PATCH, 1024), [f"{step}/{number}"]

    def announce(self, step: int, number: int) -> None:
        """Leaves a mark."""
        if not (self.folder / f"made {step} {number}").exists():
            (self.folder / f"announced {step} {number}").touch()

    def made(self, step: int, number: int, begin: Callable[[str, int], None]) -> tuple[Batch, list[str]]:
        """The same, and a mark of it."""
        assert (self.folder / f"announced {step} {number}").exists()
        (self.folder / f"made {step} {number}").touch()
        return self(step, number, begin)


def strike(fault: str) -> None:
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "bus error":
        _read_a_page_that_is_cut_off()
    elif fault == "crash":
        ctypes.string_at(0)
    elif fault == "value error":
        raise OwnError(7, "row 7 is at fault")
    elif fault == "full disk":
        raise OSError(errno.ENOSPC, "No space left on device", "cache/a")
    elif fault == "bug":
        raise ZeroDivisionError("division by zero")
    elif fault == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "endless":
        while True:
            pass
    elif fault == "no service":
        _wait_for_a_service_that_fails()
    elif fault == "no memory":
        raise MemoryError


def _wait_for_a_service_that_fails() -> None:
    """For 6 s, twice as long as a worker may be silent there."""
    from ofa_ds.data.remote import fetching

    fetching.LONGEST_WAIT_S = 0.5
    until = time.monotonic() + 6

    def attempt() -> None:
        if time.monotonic() < until:
            raise OSError("no answer")

    fetching.persistent("s3://bucket/a.arrow", attempt, 60)


def _read_a_page_that_is_cut_off() -> None:
    file = os.memfd_create("cut")
    os.ftruncate(file, 2 * mmap.PAGESIZE)
    with mmap.mmap(file, 2 * mmap.PAGESIZE) as mapped:
        os.ftruncate(file, 0)
        mapped[mmap.PAGESIZE]
