"""One host of a cluster of namespaces (hosts.py): its processes, its power, commands on it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path


def program_path(name: str) -> str | None:
    """Where a program is, those of administrators included."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin:/sbin")


@dataclass(frozen=True)
class Process:
    pid: int
    """As this machine numbers it: what os.kill takes."""
    host_pid: int
    """As its host numbers it."""
    state: str
    """R, S, D, T (stopped) ...; Z and X are ended."""
    arguments: list[str]
    started: int
    """Clock ticks since the machine's start: with `pid`, unique."""

    @property
    def alive(self) -> bool:
        return self.state not in "ZX"


@dataclass
class Host:
    """One host. Its number in hostfiles is its place in Cluster.hosts."""

    name: str
    """h1, h2, ...; all hosts of a cluster know one another by it."""
    address: str
    namespace: str
    """Of its network; holds the pid of the process that made it."""
    work: Path
    residents: set[tuple[int, int]] = field(default_factory=set)
    """(pid, start) of what belongs to the host and is never left over."""
    _keeper: subprocess.Popen[bytes] | None = None

    @property
    def first_pid(self) -> int:
        """Of the process that is pid 1 on the host."""
        if self._keeper is None or self._keeper.poll() is not None:
            raise RuntimeError(f"{self.name} is off")
        return _children(self._keeper.pid)[0]

    def entered(self, command: list[str], directory: Path | str | None = None) -> list[str]:
        """The command line that runs `command` on this host."""
        enter = ["nsenter", f"--target={self.first_pid}", "--net", "--pid", "--uts", "--ipc", "--mount"]
        return [*enter, "env", "-C", str(directory or Path.cwd()), *command]

    def power_on(self) -> None:
        """Returns at once; `wait_until_up` waits for its sshd."""
        # Logins here read no ~/.bashrc of whoever runs the tests: a lock that it takes would outlive a killed login.
        script = (
            'hostname "$1"; mount -t tmpfs tmpfs /dev/shm; mount --bind "$2/etc_hosts" /etc/hosts; '
            "[ ! -e ~/.bashrc ] || mount --bind /dev/null ~/.bashrc; "
            '"$3" -D -e -f "$2/sshd_$4" & sleep infinity & wait'  # bash takes in orphans, as a host's init does
        )
        own = ["setpriv", "--pdeathsig", "KILL", "unshare", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
        words = [self.name, str(self.work), str(program_path("sshd")), self.address]
        with open(self.work / f"sshd_{self.address}.log", "ab") as log:
            self._keeper = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *own, "--mount-proc", "bash", "-c", script, "init", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + 30
        while not self._sshd_listens():
            if self._keeper.poll() is not None or time.monotonic() > deadline:
                said = (self.work / f"sshd_{self.address}.log").read_text()
                self.power_off()
                raise RuntimeError(f"sshd on {self.name} did not come up: {said}")
            time.sleep(0.01)
        self.residents = {(process.pid, process.started) for process in self.processes()}

    def _sshd_listens(self) -> bool:
        try:
            sockets = Path(f"/proc/{self.first_pid}/net/tcp").read_text()
        except (OSError, IndexError, RuntimeError):
            return False
        return re.search(r":0016 00000000:0000 0A ", sockets) is not None  # port 22, listening

    def power_off(self) -> None:
        """All its processes are gone at once. A real host also falls silent first: faults.power_cut does that."""
        if self._keeper is None:
            return
        with suppress(ProcessLookupError, IndexError, RuntimeError):
            os.kill(self.first_pid, signal.SIGKILL)  # which its keeper then waits for
            with suppress(subprocess.TimeoutExpired):
                self._keeper.wait(10)
        self._keeper.kill()
        self._keeper.wait()
        self._keeper = None

    def processes(self) -> list[Process]:
        """Everything that runs on the host, ended ones that nobody has waited for included."""
        own = os.readlink(f"/proc/{self.first_pid}/ns/pid")
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(place / "ns/pid") == own and (process := _process(place)):
                    found.append(process)
            except OSError:  # ended meanwhile; or a zombie, which has no namespaces any more
                continue
        return sorted(found, key=lambda process: process.host_pid)

    def find(self, *words: str) -> list[Process]:
        """Processes among whose arguments are all of `words`, each as part of one argument."""
        return [
            process
            for process in self.processes()
            if process.alive and all(any(word in argument for argument in process.arguments) for word in words)
        ]

    def left(self) -> list[Process]:
        """What is alive on the host and was started there by somebody."""
        return [one for one in self.processes() if one.alive and (one.pid, one.started) not in self.residents]

    def wait_until_nothing_is_left(self, within_s: float = 10) -> None:
        """Raises AssertionError with their command lines where processes are left after `within_s`."""
        deadline = time.monotonic() + within_s
        while left := self.left():
            assert time.monotonic() < deadline, f"left on {self.name} after {within_s} s: {left}"
            time.sleep(0.05)

    def clean(self) -> None:
        """Ends what is left, whatever it is."""
        while left := self.left():
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.02)

    def shared_memory(self) -> list[str]:
        """Names in its /dev/shm."""
        return sorted(os.listdir(f"/proc/{self.first_pid}/root/dev/shm"))


@dataclass
class Running:
    """A command on a host, in the background; what it prints is in a file."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """Of the command itself, as this machine numbers it."""
        deadline = time.monotonic() + 10
        while not (children := _children(self.process.pid)) and self.process.poll() is None:
            assert time.monotonic() < deadline, "the command was not started"
            time.sleep(0.005)
        if not children:
            raise ProcessLookupError(f"ended with {self.process.returncode}: {self.output}")
        return children[0]

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float) -> int:
        """The exit code, negative for a signal; killed and AssertionError with its output after `timeout` seconds."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise AssertionError(f"{self.process.args} ran longer than {timeout} s; it said:\n{self.output}") from None


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _process(place: Path) -> Process | None:
    status = (place / "status").read_text()
    numbers = re.search(r"^NSpid:(.*)$", status, re.M)[1].split()
    state = re.search(r"^State:\s+(\S)", status, re.M)[1]
    started = int((place / "stat").read_text().rpartition(")")[2].split()[19])
    arguments = (place / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    return Process(int(place.name), int(numbers[-1]), state, arguments, started)
