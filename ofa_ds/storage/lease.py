"""Who may write in a directory: one job at a time, on any number of hosts that share it.

    DIRECTORY/.lease_00000003          who has it: host, pid, start of the process; the run that the directory is of
    DIRECTORY/.lease_00000003_free     the same, once it was given back

The highest number counts. To take the lease is to make the file of the next number by link(2), which only one process
can; it then looks whether anyone was there before it after all. So no file of another owner has to be removed first,
and two that find the same owner dead do not both follow it. A thread touches the file every BEAT_S seconds.

An owner on this host is gone where no process has its pid and its start. One elsewhere (another host, or another
namespace of process numbers) is gone where its file was not touched for LIMIT_S seconds: of the file system's time, as
far as that goes, and at least for three beats while we watch. The clocks of two hosts are never compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

BEAT_S = 10.0
LIMIT_S = 300.0
"""Longer than a file server is away in ordinary life, shorter than ranks wait for one another (10 minutes)."""

_NAME = re.compile(r"\.lease_(\d{8,})(_free)?")
_DRAFT = ".draft_of_lease_"
_TICK_S = 0.5
"""How long the thread may outlive a main thread that ends by an error."""


class LeaseError(RuntimeError):
    """The directory is another job's."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process, so that another one with its number is not taken for it."""

    host: str
    pid: int
    start: str
    """Boot of the kernel, namespace of process numbers, clock ticks from the boot to the start of the process."""
    since: str
    """When it took the lease, by its own clock: for people."""
    run: str
    """Of the directory: the same for all jobs that had it, one after the other. What was saved here names it."""

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}, since {self.since}"


class Lease:
    """Held from `take` to `release`. Only the process that took it may use it, from any thread."""

    def __init__(self, directory: Path, number: int, owner: Owner, beat_s: float) -> None:
        self.directory = directory
        self.owner = owner
        self._number = number
        self._beat_s = beat_s
        self._path = directory / _name(number)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease")
        self._thread.start()

    @property
    def run(self) -> str:
        return self.owner.run

    @property
    def is_lost(self) -> bool:
        """Whether the file is gone: another job took the lease, perhaps while this process was suspended. Quick."""
        try:
            return not os.path.lexists(self._path)
        except OSError:
            return False

    def check(self) -> None:
        """Before anything is published or deleted. Raises LeaseError: it was taken by another job; OSError."""
        newest = _newest(self.directory)
        if newest is None or newest != (self._number, False):
            after = _read(self.directory / _name(*newest)) if newest and newest[0] > self._number else None
            who = f"another job ({after}) took it" if after else "its lease is gone"
            raise LeaseError(
                f"{self.directory}: {who} while this one ({self.owner}) did not move; this one stops here and leaves "
                "what is there as it is"
            )

    def release(self) -> None:
        """Safe to call twice. What the file system does not let us say, the next job finds out by itself."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            os.rename(self._path, self.directory / _name(self._number, free=True))

    def _beat(self) -> None:
        touched = time.monotonic()
        while not self._ended.wait(min(_TICK_S, self._beat_s)) and threading.main_thread().is_alive():
            if time.monotonic() - touched >= self._beat_s:
                touched = time.monotonic()
                with contextlib.suppress(OSError):  # the next time, or never: `check` tells
                    os.utime(self._path)


@contextmanager
def held(directory: Path) -> Iterator[Lease]:
    """The lease for as long as the block runs."""
    lease = take(directory)
    try:
        yield lease
    finally:
        lease.release()


def take(directory: Path, *, beat_s: float = BEAT_S, limit_s: float = LIMIT_S) -> Lease:
    """The lease of a directory, which is made where it is not there. Raises LeaseError where a job has it; OSError.

    Waits up to `limit_s` where only time can tell whether an owner elsewhere lives.
    """
    directory.mkdir(parents=True, exist_ok=True)
    while True:
        newest = _newest(directory)
        number, before = 0, None
        if newest is not None:
            number, is_free = newest
            before = _read(directory / _name(number, is_free))
            who = before or "its lease cannot be read"
            if not is_free and not _is_gone(directory, number, before, beat_s, limit_s):
                raise LeaseError(
                    f"{directory}: another job is at work here ({who}); stop it, or use another run_dir (where this "
                    f"is only a copy of that job's directory, delete {directory / _name(number)})"
                )
            if _newest(directory) != newest:
                continue  # it was given back, or another one took it
            if not is_free:
                _say(f"{directory}: the job before ({who}) ended without giving it back; this one goes on")
        owner = this_process(before.run if before else secrets.token_hex(8))
        if _make(directory, number + 1, owner):
            return Lease(directory, number + 1, owner, beat_s)


def give_back_for(directory: Path, *, host: str, pid: int) -> bool:
    """Give the lease back for an owner that is known to have ended, so that nobody has to watch whether it lives.

    True where it was that owner's. Should the process be there after all, it finds its lease lost, publishes nothing.
    """
    try:
        newest = _newest(directory)
        owner = _read(directory / _name(*newest)) if newest and not newest[1] else None
        if owner is None or (owner.host, owner.pid) != (host, pid):
            return False
        os.rename(directory / _name(*newest), directory / _name(newest[0], free=True))
    except OSError:
        return False
    return True


def this_process(run: str) -> Owner:
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Owner(host=socket.gethostname(), pid=os.getpid(), start=_start(os.getpid()) or "", since=since, run=run)


def _make(directory: Path, number: int, owner: Owner) -> bool:
    """Whether the lease of that number is now ours; older ones are then removed."""
    path, draft = directory / _name(number), directory / f"{_DRAFT}{secrets.token_hex(8)}"
    try:
        with open(draft, "x", encoding="utf-8") as file:
            file.write(json.dumps(asdict(owner)))
            file.flush()
            os.fsync(file.fileno())
        if not _link(draft, path):
            return False
    finally:
        draft.unlink(missing_ok=True)
    if _newest(directory) != (number, False):  # somebody had it, and gave it back, since we looked
        path.unlink(missing_ok=True)
        return False
    for older, is_free in _all(directory):
        if older < number:
            (directory / _name(older, is_free)).unlink(missing_ok=True)
    for name in os.listdir(directory):
        if name.startswith(_DRAFT):  # of a process that was killed; one that is still at it finds the lease taken
            (directory / name).unlink(missing_ok=True)
    return True


def _link(draft: Path, path: Path) -> bool:
    """Whether `path` is now what `draft` is, and was nothing before."""
    try:
        os.link(draft, path)
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            return os.stat(draft).st_nlink == 2  # NFS: it was done; only the answer was lost, and it was asked again
        return False
    except FileNotFoundError:
        return False  # the draft: another one has the lease
    except OSError:  # a file system without links
        try:
            text = draft.read_text(encoding="utf-8")
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
        except (FileExistsError, FileNotFoundError):
            return False
    return True


def _is_gone(directory: Path, number: int, owner: Owner | None, beat_s: float, limit_s: float) -> bool:
    """Whether the owner of the lease is no more, or has it no more."""
    path = directory / _name(number)
    if owner is not None and _place(owner.start) == _place(_start(os.getpid()) or ""):
        return not _is_alive(owner)
    before = _touched(path)
    age_s = max(0.0, _now(directory) - before)
    wait_s = max(limit_s - age_s, 3 * beat_s)
    who = owner or "its lease cannot be read"
    _say(f"{directory}: another job has it ({who}); watching for up to {wait_s:.0f} s whether it lives")
    until = time.monotonic() + wait_s
    while time.monotonic() < until:
        time.sleep(min(1.0, beat_s / 2))
        if _newest(directory) != (number, False):
            return True
        if _touched(path) != before:
            return False
    return True


def _is_alive(owner: Owner) -> bool:
    """Of an owner in our namespace of process numbers."""
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    found = _start(owner.pid)
    return found is None or found == owner.start


def _start(pid: int) -> str | None:
    """Boot, namespace and start of a process; "" for one that only waits to be counted; None: not ours to know."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return None
    words = text.rpartition(")")[2].split()  # the name of a program may have blanks and brackets
    return "" if words[0] in "ZX" else f"{boot} {namespace} {words[19]}"


def _place(start: str) -> list[str]:
    """Where a pid means the same process. Unknown places are all different."""
    return start.split()[:2] or [secrets.token_hex(8)]


def _touched(path: Path) -> float:
    """Opened for it: NFS then asks the server and not its memory."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return 0.0


def _now(directory: Path) -> float:
    """What a file that is made now has as its time: the file system's clock."""
    probe = directory / f"{_DRAFT}{secrets.token_hex(8)}"
    try:
        with open(probe, "x") as file:
            return os.fstat(file.fileno()).st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _read(path: Path) -> Owner | None:
    """None where the file is gone, or says nothing that can be understood."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        owner = Owner(**values)
    except (FileNotFoundError, ValueError, TypeError):
        return None
    types = {each.name: int if each.name == "pid" else str for each in fields(Owner)}
    if any(type(getattr(owner, name)) is not wanted for name, wanted in types.items()):
        return None
    return owner if owner.pid > 0 and re.fullmatch(r"[0-9a-f]{16}", owner.run) else None


def _all(directory: Path) -> list[tuple[int, bool]]:
    """(number, whether it was given back) of all leases."""
    found = (_NAME.fullmatch(name) for name in os.listdir(directory))
    return [(int(match[1]), match[2] is not None) for match in found if match]


def _newest(directory: Path) -> tuple[int, bool] | None:
    return max(_all(directory), default=None)


def _name(number: int, free: bool = False) -> str:
    return f".lease_{number:08d}{'_free' if free else ''}"


def _say(text: str) -> None:
    print(f"lease: {text}", file=sys.stderr, flush=True)
