"""The process that writes one rank's checkpoint files while training goes on: `-m ofa_ds.storage.background_writer`.

    argument 1: descriptor of the memory shared with the trainer        argument 2: its size in bytes
    argument 3: the share of a core it takes; all of one from when the memory's first byte is 1: somebody waits
    standard input, a line a job: {"path": ..., "tensors": [[name, dtype, shape, number of bytes, first byte], ...]}
    standard output, a line a job: {"entry": the file's manifest entry} or {"problem": text}

Ends with its trainer: at the end of standard input, or when the parent is another one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ofa_ds.storage.tensor_writer import TensorSpec, TensorWriter

_CHUNK_BYTES = 1 << 22
_NAP_S = 0.05


class Pace:
    """Rests between pieces, so that the work takes no more than a share of a core's time, until somebody waits for it.

    What a piece costs is taken from the quickest so far: after a rest the clock also counts what the machine needs to
    come back, and longer rests would follow from longer rests.
    """

    def __init__(self, share: float, waited_for: Callable[[], bool], watch: Callable[[], None]) -> None:
        """watch: called at least every _NAP_S."""
        self._share, self._waited_for, self._watch = share, waited_for, watch
        self._cost_s = math.inf
        """Of a byte."""

    def after(self, num_bytes: int, cpu_s: float) -> None:
        """Rest for a piece that took `cpu_s` of processor time."""
        self._cost_s = min(self._cost_s, cpu_s / num_bytes)
        until = time.monotonic() + self._cost_s * num_bytes * (1 / self._share - 1)
        while not self._waited_for() and (left_s := until - time.monotonic()) > 0:
            time.sleep(min(left_s, _NAP_S))
            self._watch()


def write_job(memory: memoryview, job: dict[str, Any], pace: Pace, parent: int) -> dict[str, Any]:
    """Write one file; returns what is answered."""
    rows = job["tensors"]
    tensors = [(TensorSpec(name, dtype, tuple(shape), size), start) for name, dtype, shape, size, start in rows]
    _end_with(parent)
    done, began_s = 0, time.process_time()
    try:
        with TensorWriter(Path(job["path"]), [spec for spec, _ in tensors]) as file:
            for spec, start in tensors:
                for at in range(start, start + spec.num_bytes, _CHUNK_BYTES):
                    _end_with(parent)
                    part = memory[at : min(at + _CHUNK_BYTES, start + spec.num_bytes)]
                    file.write(part)
                    done += len(part)
                    if done >= _CHUNK_BYTES:
                        pace.after(done, time.process_time() - began_s)
                        done, began_s = 0, time.process_time()
    except FileNotFoundError as error:
        return {"problem": f"{error}; run_dir must be on a file system that all hosts share"}
    except OSError as error:
        return {"problem": str(error)}
    return {"entry": dataclasses.asdict(file.entry)}


def _end_with(parent: int) -> None:
    """Nobody will commit the file of a trainer that is gone; a new run may be cleaning up here already."""
    if os.getppid() != parent:
        sys.exit(1)


def main(descriptor: int, size: int, share: float) -> None:
    # Meant for the trainer, which then still needs its files written.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    os.nice(5)  # what training needs comes first
    memory = memoryview(mmap.mmap(descriptor, size, prot=mmap.PROT_READ))
    pace = Pace(share, waited_for=lambda: bool(memory[0]), watch=lambda: _end_with(parent))
    for line in sys.stdin:
        print(json.dumps(write_job(memory, json.loads(line), pace, parent)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
