"""Ends of a process that has begun to save in the background: `python exit_worker.py TIMES`. Prints the exit codes.

Each end is that of a forked child, which leaves through Python's own finalisation: torch is imported once for all.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import threading
import time

import torch.distributed  # noqa: F401  its threads and destructors are part of an end

from ofa_ds.checkpoint.snapshot import Snapshot


def snapshot_and_leave(number: int) -> None:
    """At another moment of the claim of memory each time; every third one as by an error, with nothing closed."""
    size = random.Random(number).randrange(1 << 24, 1 << 28)
    snapshot = Snapshot(size, share=0.01, pin=False)
    if number % 3:
        snapshot.close()
        assert threading.active_count() == 1 and snapshot._process.returncode is not None
    else:
        time.sleep(random.Random(number).uniform(0, 0.05))


def main(times: int) -> None:
    gc.freeze()  # what a child need not look through as it ends
    codes = []
    for number in range(times):
        child = os.fork()
        if not child:
            snapshot_and_leave(number)
            return
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(codes))


if __name__ == "__main__":
    main(int(sys.argv[1]))
