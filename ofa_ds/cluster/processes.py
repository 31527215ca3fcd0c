"""Processes of this host, found exactly: by descent or by the attempt in their environment, never by a pattern.

Standard library only: the agent starts before anything heavy is imported. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time

ATTEMPT = "OFA_ATTEMPT"
"""`TOKEN.HOST` in the environment of all that is of an attempt on a host. Set at exec: /proc shows no later one."""
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36

_prctl = ctypes.CDLL(None, use_errno=True).prctl
"""Looked up here, so that a child that has just been forked has nothing to import."""


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """This process gets the signal when the thread that started it ends. Cleared by fork, kept over exec."""
    _prctl(_SET_PDEATHSIG, int(number), 0, 0, 0)


def adopt_orphans() -> None:
    """Descendants whose parents die become children of this process, so that it can find and end them."""
    _prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def state(pid: int) -> str:
    """`R`, `S`, `D`, `T` ... as the kernel says; `X` for one that is gone or only waits to be counted."""
    found = _stat(pid)
    return "X" if found is None or found[0] in "ZXx" else found[0]


def _stat(pid: int) -> tuple[str, int] | None:
    """(state, parent) of a process; None where there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            words = file.read().rpartition(b")")[2].split()  # a program's name may hold blanks and brackets
        return words[0].decode(), int(words[1])
    except (OSError, IndexError, ValueError):
        return None


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def descendants(root: int) -> set[int]:
    """All living processes below `root`."""
    parents = {pid: found for pid in _pids() if (found := _stat(pid)) is not None}
    children: dict[int, list[int]] = {}
    for pid, (_, parent) in parents.items():
        children.setdefault(parent, []).append(pid)
    below, pending = set(), [root]
    while pending:
        for pid in children.get(pending.pop(), ()):
            below.add(pid)
            pending.append(pid)
    return {pid for pid in below if parents[pid][0] not in "ZXx"}


def of_attempt(attempt: str) -> set[int]:
    """All living processes that were started with this attempt in their environment, whoever their parents are now."""
    return having(ATTEMPT, attempt)


def having(name: str, value: str) -> set[int]:
    """All living processes but this one that were started with this variable in their environment."""
    mark = f"{name}={value}".encode()
    found = set()
    for pid in _pids():
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if mark in file.read().split(b"\0") and state(pid) != "X":
                    found.add(pid)
        except OSError:  # another user's, or gone
            continue
    return found - {os.getpid()}


def end_all(attempt: str, *, limit_s: float) -> set[int]:
    """Kill all descendants of this process and all of the attempt until none is left; returns what is left in the end.

    SIGKILL at once: the state of what failed is worth nothing, and a stopped process obeys no other signal.
    """
    until = time.monotonic() + limit_s
    while True:
        left = descendants(os.getpid()) | of_attempt(attempt)
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        reap()
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.05)


def kill_all_having(name: str, value: str) -> None:
    """SIGKILL for all of `having`."""
    for pid in having(name, value):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def reap() -> dict[int, int]:
    """Wait statuses of the children that have ended since."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended[pid] = status
    return ended


def exit_code(status: int) -> int:
    """Of a wait status, as shells say it: 128 + signal for a death by signal."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
