"""The process that writes one rank's checkpoint files while training goes on: `-m ofa_ds.background_writer`.

    argument 1: descriptor of the memory shared with the trainer        argument 2: its size in bytes
    standard input, a line a job: {"path": ..., "tensors": [[name, dtype, shape, number of bytes, first byte], ...]}
    standard output, a line a job: {"entry": the file's manifest entry} or {"problem": text}

Ends with its trainer: at the end of standard input, or when the parent is another one.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
from pathlib import Path
from typing import Any

from ofa_ds.tensor_writer import TensorSpec, TensorWriter

_CHUNK_BYTES = 1 << 24


def write_job(memory: memoryview, job: dict[str, Any], parent: int) -> dict[str, Any]:
    """Write one file; returns what is answered."""
    rows = job["tensors"]
    tensors = [(TensorSpec(name, dtype, tuple(shape), size), start) for name, dtype, shape, size, start in rows]
    _end_with(parent)
    try:
        with TensorWriter(Path(job["path"]), [spec for spec, _ in tensors]) as file:
            for spec, start in tensors:
                for at in range(start, start + spec.num_bytes, _CHUNK_BYTES):
                    _end_with(parent)
                    file.write(memory[at : min(at + _CHUNK_BYTES, start + spec.num_bytes)])
    except FileNotFoundError as error:
        return {"problem": f"{error}; run_dir must be on a file system that all hosts share"}
    except OSError as error:
        return {"problem": str(error)}
    return {"entry": file.entry}


def _end_with(parent: int) -> None:
    """Nobody will commit the file of a trainer that is gone; a new run may be cleaning up here already."""
    if os.getppid() != parent:
        sys.exit(1)


def main(descriptor: int, size: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the trainer, which then still needs its files written
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    os.nice(5)  # what training needs comes first
    memory = memoryview(mmap.mmap(descriptor, size, prot=mmap.PROT_READ)) if size else memoryview(b"")
    for line in sys.stdin:
        print(json.dumps(write_job(memory, json.loads(line), parent)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
