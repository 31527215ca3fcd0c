"""How each fault that is not within a rank is done to it, its host or the launch."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import faults
import one_host
from field import Field, Rank
from plans import Fault

AGENT = "ofa_ds.cluster.agent"
BALLAST = "ballast"
DUTY_S = 0.3


class Strikes:
    """Faults of one run, and what undoes them later."""

    def __init__(self, field: Field) -> None:
        self._field = field
        self._threads: list[threading.Thread] = []
        self._over = threading.Event()

    def strike(self, fault: Fault, host: one_host.Host, rank: Rank) -> None:
        """Any kind but those of the launcher and those INSIDE. Raises RuntimeError where there is nothing to strike."""
        getattr(self, f"_{fault.kind}")(fault, host, rank)

    def undo(self) -> None:
        """Everything that still lasts ends now; cut hosts and wrong clocks are whole again."""
        self._over.set()
        for thread in self._threads:
            thread.join()
        for clock in self._field.clocks.iterdir():
            clock.unlink()
        faults.heal(self._field.cluster)

    def _kill_rank(self, fault: Fault, host: one_host.Host, rank: Rank) -> None:
        os.kill(rank.pid, signal.SIGKILL)

    def _stop_rank(self, fault: Fault, host: one_host.Host, rank: Rank) -> None:
        os.kill(rank.pid, signal.SIGSTOP)

    def _kill_agent(self, fault: Fault, host: one_host.Host, rank: Rank) -> None:
        os.kill(agent_of(host).pid, signal.SIGKILL)

    def _stop_agent(self, fault: Fault, host: one_host.Host, rank: Rank) -> None:
        os.kill(agent_of(host).pid, signal.SIGSTOP)

    def _kill_ssh(self, fault: Fault, host: one_host.Host, rank: Rank) -> None:
        pid = agent_of(host).pid
        while not _command(pid).startswith("sshd: "):
            pid = _parent(pid)
            if pid < 2:
                raise RuntimeError(f"{host.name}: the agent has no sshd above it")
        os.kill(pid, signal.SIGKILL)

    def _link_down(self, fault: Fault, host: one_host.Host, rank: Rank) -> None:
        faults.link_down(host)
        if fault.lasts_s:
            self._later(fault.lasts_s, lambda: faults.link_up(host))

    def _power_off(self, fault: Fault, host: one_host.Host, rank: Rank) -> None:
        faults.power_cut(host)

    def _packet_loss(self, fault: Fault, host: one_host.Host, rank: Rank) -> None:
        loss = faults.packet_loss(host, 20)
        loss.__enter__()
        self._later(fault.lasts_s, lambda: loss.__exit__(None, None, None))

    def _clock_jump(self, fault: Fault, host: one_host.Host, rank: Rank) -> None:
        """The clock of the first host takes that of the launch with it."""
        for name in [host.name] + ["login"] * (host is self._field.cluster.hosts[0]):
            (self._field.clocks / name).write_text(f"{fault.lasts_s:.0f}")

    def _full_disk(self, fault: Fault, host: one_host.Host, rank: Rank) -> None:
        ballast = self._field.disk / BALLAST

        def fill() -> None:
            until = time.monotonic() + fault.lasts_s
            with open(ballast, "wb", buffering=0) as file:
                while time.monotonic() < until and not self._over.wait(0.02):
                    with suppress(OSError):
                        for size in (1 << 20, 4096):
                            while file.write(b"\0" * size) == size:
                                pass
            ballast.unlink()

        self._start(fill)

    def _slow_rank(self, fault: Fault, host: one_host.Host, rank: Rank) -> None:
        def duty() -> None:
            until = time.monotonic() + fault.lasts_s
            with suppress(ProcessLookupError):
                while time.monotonic() < until and not self._over.is_set():
                    os.kill(rank.pid, signal.SIGSTOP)
                    self._over.wait(DUTY_S)
                    os.kill(rank.pid, signal.SIGCONT)
                    self._over.wait(DUTY_S)

        self._start(duty)

    def _later(self, after_s: float, action: Callable[[], None]) -> None:
        def wait() -> None:
            self._over.wait(after_s)
            action()

        self._start(wait)

    def _start(self, action: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=action))
        self._threads[-1].start()


def agent_of(host: one_host.Host) -> one_host.Process:
    """The newest agent of the host. Raises RuntimeError where there is none."""
    agents = host.find(AGENT)
    if not agents:
        raise RuntimeError(f"{host.name}: no agent")
    return max(agents, key=lambda process: process.started)


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
