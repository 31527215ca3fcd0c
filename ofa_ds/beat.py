"""What a rank leaves on its own host for whoever watches it: how far it is, its first error, its Python stacks.

The directory is named by the variable OFA_BEAT_DIR, which `ofa-ds launch` sets; without it nothing is written. Standard
library only: the watcher (ofa_ds/cluster/agent.py) runs before anything heavy is imported.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import time
import traceback
from pathlib import Path
from typing import NamedTuple

DIRECTORY = "OFA_BEAT_DIR"
STACKS_SIGNAL = signal.SIGUSR2
"""Makes a rank write the Python stacks of all its threads, even while it waits in a collective."""
_LENGTH = 160
"""Bytes of a beat: always as many, so that it is replaced by one write."""


class Beat(NamedTuple):
    rank: int
    pid: int
    phase: str
    """`start` until the first step, then `step`, `save`, `sample`, `end`. In all but `step` a rank may be busy for as
    long as a checkpoint, its reading, or pictures take, without a newer beat."""
    step: int
    """Optimizer steps finished."""
    at_s: float
    """Monotonic seconds of this host, which no jump of its clock moves."""


def place(rank: int, kind: str) -> Path | None:
    """The file of a rank; kind: `beat`, `error` or `stacks`. None where nobody watches."""
    directory = os.environ.get(DIRECTORY)
    return Path(directory, f"rank-{rank}.{kind}") if directory else None


class Pulse:
    """A rank's own side."""

    def __init__(self, rank: int) -> None:
        """Also lets STACKS_SIGNAL write the stacks of this process from now on."""
        self.rank = rank
        self.since_s = time.time()
        """When this rank began, by its host's clock."""
        self._file: int | None = None
        beat, stacks = place(rank, "beat"), place(rank, "stacks")
        if beat is None or stacks is None:
            return
        self._file = os.open(beat, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        faulthandler.register(STACKS_SIGNAL, open(stacks, "w"), all_threads=True)  # noqa: SIM115 - for good
        self.beat("start", 0)

    def beat(self, phase: str, step: int) -> None:
        """Say how far this rank is: one small write, every step."""
        if self._file is None:
            return
        text = json.dumps({"pid": os.getpid(), "phase": phase, "step": step, "at_s": round(time.monotonic(), 3)})
        try:
            os.pwrite(self._file, text.ljust(_LENGTH - 1).encode() + b"\n", 0)
        except OSError:  # a full disk: whoever watches sees the last beat; training goes on
            pass


def read(directory: str | Path) -> dict[int, Beat]:
    """The newest beat of each rank of a host; a file that is being replaced, or is empty, is left out."""
    beats = {}
    for file in Path(directory).glob("rank-*.beat"):
        try:
            content = json.loads(file.read_text())
            rank = int(file.stem.removeprefix("rank-"))
            beats[rank] = Beat(rank, content["pid"], content["phase"], content["step"], content["at_s"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return beats


def write_error(rank: int, error: BaseException) -> None:
    """Keep the first error of this rank, with its traceback; a later one does not replace it."""
    file = place(rank, "error")
    if file is None:
        return
    content = {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
        "at_s": round(time.monotonic(), 3),
    }
    try:
        with open(file, "x", encoding="utf-8") as out:
            json.dump(content, out)
    except OSError:  # there already, or no room: stderr has it too
        pass
