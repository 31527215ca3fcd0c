"""Stands between an engine and a rank: keeps how the rank really ended, and what it said last.

    python -u -m ofa_ds.cluster.rank -- PROGRAM [ARGUMENT ...]

Engines hide it (for one and the same SIGKILL torchrun says 1, srun 143, MPICH 255). Lines of the rank are passed on
whole, each behind `[RANK] `. Signals go to the rank. It dies with the engine, and the rank with it. In OFA_BEAT_DIR it
leaves `rank-R.shim` (its rank's pid) and `rank-R.exit`. Standard library only.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from ofa_ds.beat import place
from ofa_ds.cluster import processes
from ofa_ds.terms import STOPPED

LINGER_S = 3.0
"""A failed rank's engine learns of it so much later: until then whoever watches has ended them all, and peers are not
confused by the engine's own clean-up."""
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
_TAIL_LINES, _TAIL_BYTES = 60, 16_384
_LONGEST_LINE = 65_536


class Lines:
    """Cuts a stream into whole lines, remembers the last of them."""

    def __init__(self, mark: bytes) -> None:
        self.tail: collections.deque[bytes] = collections.deque(maxlen=_TAIL_LINES)
        self._mark, self._rest = mark, b""

    def feed(self, data: bytes, *, last: bool = False) -> bytes:
        """What can be passed on now; all of it where `last`, or where a line gets too long."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        if self._rest and (last or len(self._rest) > _LONGEST_LINE):
            whole.append(self._rest)
            self._rest = b""
        self.tail.extend(line[:2000] for line in whole)
        return b"".join(self._mark + line + b"\n" for line in whole)

    @property
    def is_partial(self) -> bool:
        return bool(self._rest)

    def tail_text(self) -> str:
        return b"\n".join(self.tail)[-_TAIL_BYTES:].decode(errors="replace")


def main(arguments: list[str]) -> int:
    """Run the program as a rank; returns the exit code for the engine."""
    if arguments[:1] != ["--"] or not os.environ.get("RANK", "").isdecimal():
        print("want -- PROGRAM [ARGUMENT ...] and the variable RANK, which the engine sets", file=sys.stderr)
        return 2
    parent = os.getppid()
    processes.die_with_parent()
    if os.getppid() != parent:  # it died before it could take us with it
        return 1
    rank = int(os.environ["RANK"])
    read_end, write_end = os.pipe()
    # Blocked until there is somebody to pass them on to.
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    child = os.fork()
    if child == 0:
        _become(arguments[1:], os.getppid(), read_end, write_end)
    os.close(write_end)
    for number in _PASSED_ON:
        signal.signal(number, lambda got, _: _pass_on(child, got))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    _keep(rank, "shim", {"pid": child})
    lines = Lines(f"[{rank}] ".encode())
    status = _pump(child, read_end, lines)
    code = processes.exit_code(status)
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    at_s = round(time.monotonic(), 3)
    _keep(rank, "exit", {"pid": child, "code": code, "signal": number, "tail": lines.tail_text(), "at_s": at_s})
    if code not in (0, STOPPED):
        time.sleep(LINGER_S)
    return 0 if code == STOPPED else code  # an engine would end peers that still save


def _become(program: list[str], shim: int, read_end: int, write_end: int) -> NoReturn:
    """In the child: the rank itself, in a process group of its own, so that it gets no signal twice."""
    try:
        processes.die_with_parent()
        if os.getppid() != shim:
            os._exit(1)
        os.setpgid(0, 0)
        os.close(read_end)
        os.dup2(write_end, 1)
        os.dup2(write_end, 2)
        os.close(write_end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        os.execvp(program[0], program)
    except BaseException as error:
        os.write(2, f"{' '.join(program[:1])}: cannot be started: {error}\n".encode(errors="surrogateescape"))
    finally:
        os._exit(127)


def _pass_on(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)


def _pump(child: int, source: int, lines: Lines) -> int:
    """Pass output on until the rank has ended and its pipe is empty; returns its wait status.

    What the rank started may keep the pipe open, and is not waited for.
    """
    os.set_blocking(source, False)
    status: int | None = None
    while True:
        is_ready = bool(select.select([source], [], [], 0 if status is not None else 0.1)[0])
        data = b""
        if is_ready:
            with contextlib.suppress(BlockingIOError):
                data = os.read(source, 65_536)
        closed = is_ready and not data
        if data or (not is_ready and lines.is_partial):
            _write(lines.feed(data, last=not is_ready))
        if status is not None and not data:
            _write(lines.feed(b"", last=True))
            return status
        if closed:
            time.sleep(0.05)  # the rank closed its output and goes on
        if status is None:
            pid, found = os.waitpid(child, os.WNOHANG)
            status = found if pid else None


def _write(data: bytes) -> None:
    """To the engine's output; nobody there to read it is no reason for a rank to end."""
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(1, data) :]


def _keep(rank: int, kind: str, content: dict[str, Any]) -> None:
    file = place(rank, kind)
    if file is None:
        return
    draft = Path(f"{file}.draft")
    try:
        draft.write_text(json.dumps(content))
        os.replace(draft, file)
    except OSError:  # no room: the engine's own exit code has to do
        pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
