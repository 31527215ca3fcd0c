"""The far end of a launch: starts the engine's part of a host, tells how its ranks are, ends everything when told to.

    python -u -m ofa_ds.cluster.agent           over ssh: messages on stdin and stdout; or over TCP, see `link.PARENT`
    python -u -m ofa_ds.cluster.agent sweep     ends what a stopped or killed agent left of the attempt OFA_ATTEMPT
    python -u -m ofa_ds.cluster.agent ping      nothing: it could be started

It gives up by itself, and nothing of the attempt is left on its host, when the line to the launching process ends or is
silent. Standard library, ofa_ds.beat and ofa_ds.engine.rendezvous only: it starts in a fraction of a second.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ofa_ds import beat
from ofa_ds.cluster import processes
from ofa_ds.cluster.environment import lines, of_a_rank
from ofa_ds.cluster.link import PARENT, Link, connect, unpack
from ofa_ds.cluster.rank import Lines
from ofa_ds.engine.rendezvous import rendezvous

CHECKOUT = Path(__file__).absolute().parents[2]
BEAT_S = 1.0
TICK_S = 0.1
CONNECT_S = 30.0
END_S = 8.0
"""For SIGKILL to have an effect: a process that waits for a dead disk cannot even be killed."""
STACKS_S = 1.5
"""Until a rank has written its stacks."""
_BEATS = re.compile(r"ofa-ds-[0-9a-f]{32}\..+")
_MAX_FILE = 2 << 20
_WITHOUT_JOB_S = 60.0


class Agent:
    def __init__(self, link: Link, attempt: str, ranks: dict[str, str], address: str) -> None:
        """ranks: RANK and the like where this agent's engine is one rank; empty where an engine starts the ranks.

        address: of this host, as far as it is known; else "".
        """
        self.link, self.attempt, self.ranks, self.address = link, attempt, ranks, address
        self.beats = _beats(attempt)
        self._claim = _claimed(self.beats)  # while this process lives
        self.engine: int | None = None
        self.output: int | None = None
        self.started_at_s = 0.0
        self.silence_s = _WITHOUT_JOB_S
        self._lines = Lines(b"")
        self._told: set[int] = set()
        self._next_beat_s = 0.0
        self._stacks_at_s: float | None = None
        self._gave_up = ""

    def run(self, asked: list[int]) -> int:
        """Until everything of the attempt on this host has ended. asked: signals that this process gets."""
        self.link.send(_hello(self.attempt, self.ranks, self.address))
        try:
            while True:
                self._wait()
                for message in self.link.receive():
                    if not self._obey(message):
                        return self._finish()
                if asked and self.engine is not None:  # by a scheduler that takes the host away, or a shutdown
                    self.link.send({"kind": "asked", "signal": asked.pop()})
                    asked.clear()
                silent_s = time.monotonic() - self.link.heard_at_s
                if self.link.is_closed or silent_s > self.silence_s:
                    self._gave_up = f"heard nothing from the launching process for {silent_s:.1f} s"
                    return self._finish()
                if self.engine is not None and not self._look():
                    return self._finish()
                self.link.flush()
        finally:
            processes.end_all(self.attempt, limit_s=END_S)
            shutil.rmtree(self.beats, ignore_errors=True)

    def _wait(self) -> None:
        readable = [self.link.source]
        if self.output is not None and not self.link.is_full:
            readable.append(self.output)
        writable = [self.link.target] if self.link.wants_to_write else []
        ready, _, _ = select.select(readable, writable, [], TICK_S)
        if self.output in ready:
            self._read_output()

    def _read_output(self) -> bool:
        """Whether there may be more."""
        data = b""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self.output, 65_536)
            if not data:
                os.close(self.output)
                self.output = None
        text = self._lines.feed(data, last=self.output is None)
        if text:
            self.link.send({"kind": "log", "text": text.decode(errors="replace")}, is_output=True)
        return bool(data)

    def _obey(self, message: dict[str, Any]) -> bool:
        """False where this agent is to end."""
        kind = message.get("kind")
        if kind == "job" and self.engine is None:
            return self._start(message)
        if kind == "signal":
            for pid in self._pids().values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, int(message["signal"]))
        elif kind == "stacks":
            self._ask_stacks()
        return kind != "kill"

    def _start(self, job: dict[str, Any]) -> bool:
        self.silence_s = float(job["silence_s"])
        arguments = [word.encode("latin-1") for word in job["argv"]]
        given = {name.encode("latin-1"): value.encode("latin-1") for name, value in job["environment"].items()}
        environment = self._environment(given)
        self.link.send({"kind": "environment", "lines": lines(of_a_rank(environment, given))})
        parent = os.getpid()

        def in_child() -> None:
            processes.die_with_parent()
            if os.getppid() != parent:
                os._exit(1)

        read_end, write_end = os.pipe()
        try:
            engine = subprocess.Popen(
                arguments,
                cwd=job["directory"].encode("latin-1"),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                start_new_session=True,
                preexec_fn=in_child,
            )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            self.link.send({"kind": "refused", "error": f"cannot start {os.fsdecode(arguments[0])}: {error}"})
            return False
        finally:
            os.close(write_end)
        engine.returncode = 0  # it is `processes.reap` that waits for it
        self.engine, self.output, self.started_at_s = engine.pid, read_end, time.monotonic()
        os.set_blocking(read_end, False)
        return True

    def _environment(self, given: dict[bytes, bytes]) -> dict[bytes, bytes]:
        """This host's, then what the job gives, then what makes a process known as one of this attempt."""
        environment = dict(os.environb)
        # Over ssh a login has its own PATH; compiled extensions look for ninja beside the interpreter.
        environment[b"PATH"] = os.fsencode(os.path.dirname(sys.executable)) + b":" + environment.get(b"PATH", b"/bin")
        environment |= given
        found = [each for each in environment.get(b"PYTHONPATH", b"").split(b":") if each]
        ours = [os.fsencode(path) for path in (CHECKOUT, CHECKOUT / "kernels")]
        environment[b"PYTHONPATH"] = b":".join([*found, *(path for path in ours if path not in found)])
        for name, value in {  # what NCCL did last, for a hang: a pipe that asks for it, the file that it then writes
            "TORCH_FR_BUFFER_SIZE": "2000",
            "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": f"{self.beats}/nccl_pipe_",
            "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{self.beats}/nccl_trace_",
        }.items():
            environment.setdefault(name.encode(), value.encode())
        ours = {**self.ranks, beat.DIRECTORY: str(self.beats), processes.ATTEMPT: self.attempt}
        environment |= {name.encode(): os.fsencode(value) for name, value in ours.items()}
        environment.pop(PARENT.encode(), None)
        return environment

    def _look(self) -> bool:
        """Tell what is new; False where the engine has ended and all is told."""
        now_s = time.monotonic()
        ended = processes.reap()
        self._tell_exits()
        if now_s >= self._next_beat_s:
            self._next_beat_s = now_s + BEAT_S
            self.link.send({"kind": "beat", "engine": processes.state(self.engine), "ranks": self._rows(now_s)})
        if self._stacks_at_s is not None and now_s >= self._stacks_at_s:
            self._tell_stacks()
        if self.engine not in ended:
            return True
        self.link.send({"kind": "engine", "code": processes.exit_code(ended[self.engine])})
        return False

    def _records(self, kind: str) -> dict[int, dict[str, Any]]:
        """`exit`, `shim` or `error` of all ranks here."""
        found = {}
        for file in self.beats.glob(f"rank-*.{kind}"):
            with contextlib.suppress(OSError, ValueError):
                found[int(file.stem.removeprefix("rank-"))] = json.loads(file.read_text())
        return found

    def _pids(self) -> dict[int, int]:
        """Of the ranks that live."""
        ended = self._records("exit")
        return {rank: shim["pid"] for rank, shim in self._records("shim").items() if rank not in ended}

    def _rows(self, now_s: float) -> list[dict[str, Any]]:
        beats = beat.read(self.beats)
        rows = []
        for rank, shim in sorted(self._records("shim").items()):
            at = beats.get(rank) or beat.Beat(rank, shim["pid"], "launch", 0, self.started_at_s)
            row = {"rank": rank, "pid": shim["pid"], "phase": at.phase, "step": at.step}
            rows.append(row | {"age_s": round(now_s - at.at_s, 2), "state": processes.state(shim["pid"])})
        return rows

    def _tell_exits(self) -> None:
        records = self._records("exit")
        new = sorted(records.keys() - self._told, key=lambda rank: records[rank]["at_s"])
        if not new:
            return
        beats, errors = beat.read(self.beats), self._records("error")
        for rank in new:
            at = beats.get(rank)
            where = {"phase": at.phase, "step": at.step} if at else {"phase": "launch", "step": 0}
            self.link.send({"kind": "exit", "rank": rank, **records[rank], **where, "error": errors.get(rank)})
            self._told.add(rank)

    def _ask_stacks(self) -> None:
        """Of ranks that have said that they write them: others would end by the signal."""
        pids = self._pids()
        for rank in beat.read(self.beats).keys() & pids.keys():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[rank], beat.STACKS_SIGNAL)
        for pipe in self.beats.glob("nccl_pipe_*"):
            with contextlib.suppress(OSError):  # nobody reads it
                descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
                os.write(descriptor, b"1\n")
                os.close(descriptor)
        self._stacks_at_s = time.monotonic() + STACKS_S

    def _tell_stacks(self) -> None:
        self._stacks_at_s = None
        for file in self.beats.glob("rank-*.stacks"):
            with contextlib.suppress(OSError):
                rank, text = int(file.stem.removeprefix("rank-")), file.read_text(errors="replace")
                self.link.send({"kind": "stacks", "rank": rank, "text": text[-_MAX_FILE:]})
        for file in self.beats.glob("nccl_trace_*"):
            with contextlib.suppress(OSError):
                content = base64.b64encode(file.read_bytes()[:_MAX_FILE]).decode()
                self.link.send({"kind": "trace", "name": file.name, "content": content})
        self.link.send({"kind": "stacks_end"})

    def _finish(self) -> int:
        """End all that is left, then say so: nothing comes after that word."""
        if self.engine is not None:
            self._tell_exits()
        left = processes.end_all(self.attempt, limit_s=END_S)
        until = time.monotonic() + 1.0
        while self.output is not None and not self.link.is_closed and time.monotonic() < until:
            if not self._read_output() and self.output is not None:
                break
        shutil.rmtree(self.beats, ignore_errors=True)  # before that word: a batch system may end this agent after it
        self.link.send({"kind": "gone", "left": sorted(left), "gave_up": self._gave_up}, is_output=True)
        self.link.flush_all(limit_s=3.0)
        return 0


def _beats(attempt: str) -> Path:
    """In the host's memory where there is some: a full or slow disk does not silence the ranks. Else in TMPDIR."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
    return Path(place, f"ofa-ds-{attempt}")


def _claimed(beats: Path) -> int:
    """The directory, new and locked; those of killed agents, which nobody locks any more, are removed."""
    for path in beats.parent.glob("ofa-ds-*"):
        if _BEATS.fullmatch(path.name) and (lock := _locked(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
    while True:
        beats.mkdir(mode=0o700, exist_ok=True)
        lock = _locked(beats)
        if lock is not None and os.path.exists(beats):
            return lock
        time.sleep(0.01)  # another agent took it for left over before it was locked


def _locked(path: Path) -> int | None:
    """None where somebody else has it, or where it is another user's."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_uid == os.getuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def _hello(attempt: str, ranks: dict[str, str], address: str) -> dict[str, Any]:
    token, _, name = attempt.partition(".")
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    hello = {"kind": "hello", "token": token, "name": name, "host": socket.gethostname(), "pid": os.getpid()}
    rank = int(ranks["RANK"]) if ranks else None
    return hello | {"port": port, "address": address, "rank": rank}


def _outside(address: str) -> str:
    """Of this host, as the launching one knows it; "" where that is only the loop."""
    address = address.removeprefix("::ffff:")
    return "" if address.startswith("127.") or address == "::1" else address


def _over_tcp(word: str) -> tuple[Link, str, dict[str, str], str]:
    addresses, port, token = unpack(word)
    # The port is only for `rendezvous` to be content: the job brings the real one, and the address of rank 0.
    ranks = rendezvous({"MASTER_ADDR": "unknown", "MASTER_PORT": "1", **os.environ})
    ranks = {name: ranks[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    line = connect(addresses, port, limit_s=CONNECT_S)
    address = _outside(line.getsockname()[0])
    descriptor = line.detach()
    return Link(descriptor, descriptor), f"{token}.{ranks['RANK']}", ranks, address


def main(arguments: list[str]) -> int:
    """Be the agent of this host, or of one rank; or sweep."""
    word = os.environ.pop(PARENT, "")
    attempt = os.environ.get(processes.ATTEMPT, "")
    if arguments == ["ping"]:
        return 0
    if arguments == ["sweep"]:
        if "." not in attempt:
            print(f"want {processes.ATTEMPT}=TOKEN.HOST", file=sys.stderr)
            return 2
        left = processes.end_all(attempt, limit_s=END_S)
        shutil.rmtree(_beats(attempt), ignore_errors=True)
        return 1 if left else 0
    with contextlib.suppress(OSError):
        os.setsid()
    processes.adopt_orphans()
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        # Orders come over the line; Slurm and MPI signal all they started. Not SIG_IGN, which the ranks would inherit.
        signal.signal(number, lambda got, _: asked.append(got))
    try:
        if word:
            link, attempt, ranks, address = _over_tcp(word)
        else:
            words = os.environ.get("SSH_CONNECTION", "").split()
            link, ranks, address = Link(0, os.dup(1)), {}, _outside(words[2]) if len(words) == 4 else ""
            os.dup2(2, 1)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{socket.gethostname()}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return Agent(link, attempt, ranks, address).run(asked)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
