"""The agents of one attempt: started, heard, given orders, and ended with everything that they started."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from ofa_ds.cluster import processes
from ofa_ds.cluster.agent import CHECKOUT
from ofa_ds.cluster.channels import Channel, Inbox, Server, open_ssh, own_addresses, run_there
from ofa_ds.cluster.job import Job
from ofa_ds.cluster.link import PARENT, Message, pack
from ofa_ds.cluster.view import AgentView, RankView

BEAT_S = 1.0
CONNECT_S = 45.0
"""From the start of an attempt until all agents have said hello."""
_TICK_S = 0.1
_END_S = 4.0
_SWEEP_S = 15.0
_AT_ONCE = 32
"""Ssh connections that are made at the same time: it costs a fifth of a second of a core each."""


class Runners(Protocol):
    """Makes the engines' commands (ofa_ds/cluster/runners.py)."""

    def node_argv(self, job: Job, host_index: int, rank_argv: list[str]) -> list[str]: ...

    def central_argv(self, job: Job, agent_argv: list[str]) -> list[str]: ...

    def is_central(self, job: Job) -> bool: ...


def agent_argv() -> list[str]:
    """What Slurm or MPI is to start for each rank."""
    return [sys.executable, "-u", "-m", "ofa_ds.cluster.agent"]


class Crew:
    def __init__(self, job: Job, runners: Runners, say: Callable[[str], None], log: Callable[[str, str], None]) -> None:
        """say: for words of the launch; log: for what a host printed, (host, text)."""
        self.job, self._runners, self._say, self._log_line = job, runners, say, log
        self.token = secrets.token_hex(16)
        self.is_over_ssh = not runners.is_central(job)
        names = [host.name for host in job.hosts for _ in range(1 if self.is_over_ssh else host.slots)]
        self.agents = [AgentView(name, time.monotonic()) for name in names]
        self.stacks: dict[int, str] = {}
        self.traces: dict[str, bytes] = {}
        """What NCCL did last, a file a rank."""
        self.asked = 0
        """A signal that an agent got: Slurm sends it to what srun started, not to the launch."""
        self.environments: dict[str, list[str]] = {}
        """Of each host, what its ranks got, a line a variable, until somebody takes it."""
        self.first_step: dict[int, int] = {}
        """Of each rank, before its first step of this attempt."""
        self.engine: asyncio.subprocess.Process | None = None
        self._parent = ""
        """Where the agents of a central runner find this process; in the environment of all that the runner starts."""
        """Of a central runner."""
        self._num_stacks_ended = 0
        self._inbox: Inbox = asyncio.Queue()
        self._channels: dict[Channel, AgentView] = {}
        self._hellos: dict[int, Message] = {}
        self._server: Server | None = None
        self._tasks: list[asyncio.Task[Any]] = []
        self._next_beat_s = 0.0

    # Starting.

    async def start(self) -> None:
        """Begin to start all agents; `step` sees them come. Raises OSError where the engine cannot be started."""
        if self.is_over_ssh:
            gate = asyncio.Semaphore(_AT_ONCE)
            self._tasks = [asyncio.create_task(self._start_one(agent, gate)) for agent in self.agents]
        else:
            await self._start_engine()

    async def _start_one(self, agent: AgentView, gate: asyncio.Semaphore) -> None:
        async with gate:
            try:
                channel = await open_ssh(
                    agent.name,
                    f"{self.token}.{agent.name}",
                    self._inbox,
                    lambda text: self._log(agent, f"{text.rstrip()}\n"),
                )
            except OSError as error:
                agent.lost = f"ssh cannot be started: {error}"
                return
            self._channels[channel] = agent
            until = time.monotonic() + CONNECT_S
            while not agent.is_ready and not agent.lost and time.monotonic() < until:
                await asyncio.sleep(0.05)

    async def _start_engine(self) -> None:
        self._server = Server(self.token, self._inbox)
        port = await self._server.open()
        addresses = own_addresses([self.job.hosts[0].machine])
        path = _with_checkout(os.environ.get("PYTHONPATH", ""))
        # First of all: MPICH 4.0's `-genvlist` loses the last variable that there is.
        self._parent = pack(addresses, port, self.token)
        ours = {PARENT: self._parent, "PYTHONPATH": path}
        others = {name: value for name, value in os.environ.items() if name not in ours}
        parent = os.getpid()

        def in_child() -> None:
            processes.die_with_parent(signal.SIGTERM)  # mpirun and srun then end what they started
            if os.getppid() != parent:
                os._exit(1)

        self.engine = await asyncio.create_subprocess_exec(
            *self._runners.central_argv(self.job, agent_argv()),
            env={**ours, **others},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=in_child,
        )
        self._tasks.append(asyncio.create_task(self._read_engine(self.engine.stdout)))

    async def _read_engine(self, output: asyncio.StreamReader) -> None:
        while data := await output.read(65_536):
            text = data.decode(errors="replace")
            self._log_line(self.job.runner, text)
            self.agents[0].take_log(text)

    def give_jobs(self, rank_argv: list[str], *, silence_s: float, keep_port: bool) -> None:
        """Each agent its part. Rank 0's host says where it can be reached, where nobody has said so before."""
        first = self._hellos[0]
        port = self.job.master_port if keep_port and self.job.master_port else int(first["port"])
        address = self.job.master_address or str(first["address"]) or self.job.hosts[0].machine
        self.job = dataclasses.replace(self.job, master_port=port, master_address=address)
        hosts = {host.name: host for host in self.job.hosts}
        for channel, agent in self._channels.items():
            argv = rank_argv
            if self.is_over_ssh:
                argv = self._runners.node_argv(self.job, self.agents.index(agent), rank_argv)
            environment = self.job.environment_on(hosts[agent.name])
            channel.send(
                {
                    "kind": "job",
                    "argv": [os.fsencode(word).decode("latin-1") for word in argv],  # a character for each byte
                    "environment": {
                        name.decode("latin-1"): value.decode("latin-1") for name, value in environment.items()
                    },
                    "directory": self.job.directory.decode("latin-1"),
                    "silence_s": silence_s,
                }
            )

    # Watching.

    async def step(self) -> None:
        """Take what has come, for a tick at most; a heartbeat where it is time."""
        with contextlib.suppress(asyncio.TimeoutError):
            self._take(*await asyncio.wait_for(self._inbox.get(), _TICK_S))
        for _ in range(self._inbox.qsize()):
            self._take(*self._inbox.get_nowait())
        now_s = time.monotonic()
        if now_s >= self._next_beat_s:
            self._next_beat_s = now_s + BEAT_S
            self.send_all({"kind": "beat"})

    def send_all(self, message: Message) -> None:
        for channel in self._channels:
            channel.send(message)

    def rows(self) -> list[RankView]:
        return [row for agent in self.agents for row in agent.ranks.values()]

    def rank_0(self) -> tuple[str, int] | None:
        """Its host, by that host's own name, and its pid there."""
        for number, agent in enumerate(self.agents):
            if 0 in agent.ranks:
                return str(self._hellos[number]["host"]), agent.ranks[0].pid
        return None

    def _take(self, channel: Channel, message: Message | None) -> None:
        now_s = time.monotonic()
        if message is not None and message.get("kind") == "hello":
            self._greet(channel, message, now_s)
            return
        agent = self._channels.get(channel)
        if agent is None:
            return
        if message is None:
            early = "" if agent.is_ready else "before it said hello, "
            agent.lost = "" if agent.is_gone else f"{early}{channel.why_ended}"
            return
        agent.heard_at_s = now_s
        kind = message.get("kind")
        if kind == "beat":
            agent.take_beat(message, now_s)
            for row in agent.ranks.values():
                if row.phase in ("launch", "start"):  # a resumed run begins at a step of its own
                    self.first_step[row.rank] = row.step
        elif kind == "exit":
            agent.take_exit(message, now_s)
        elif kind == "log":
            self._log(agent, str(message["text"]))
        elif kind == "environment":
            self.environments[agent.name] = [str(line) for line in message["lines"]]
        elif kind == "engine":
            agent.engine_code = int(message["code"])
        elif kind == "asked":
            asked = int(message["signal"])
            if asked != signal.SIGTERM or self.job.runner not in ("openmpi", "mpich"):  # they send it for a lost host
                self.asked = self.asked or asked
        elif kind == "refused":
            agent.refused = str(message["error"])
        elif kind == "gone":
            agent.is_gone, agent.gave_up = True, str(message["gave_up"])
        elif kind == "stacks":
            self.stacks[int(message["rank"])] = str(message["text"])
        elif kind == "trace":
            self.traces[Path(message["name"]).name] = base64.b64decode(message["content"])
        elif kind == "stacks_end":
            self._num_stacks_ended += 1

    def _greet(self, channel: Channel, hello: Message, now_s: float) -> None:
        agent = self._channels.get(channel)
        if agent is None:  # it came back over TCP, as one rank
            rank = hello["rank"]
            if not isinstance(rank, int) or not 0 <= rank < len(self.agents):
                channel.hang_up()
                return
            agent = self.agents[rank]
            names = {host.machine: host.name for host in self.job.hosts}
            short = str(hello["host"]).partition(".")[0]
            agent.name = names.get(str(hello["host"])) or names.get(short) or agent.name
            self._channels[channel] = agent
        agent.is_ready, agent.heard_at_s = True, now_s
        self._hellos[next(number for number, each in enumerate(self.agents) if each is agent)] = hello

    def _log(self, agent: AgentView, text: str) -> None:
        agent.take_log(text)
        self._log_line(agent.name, text)

    async def ask_stacks(self, limit_s: float) -> None:
        """All ranks write their stacks, and NCCL what it did last."""
        self.send_all({"kind": "stacks"})
        until = time.monotonic() + limit_s
        while self._num_stacks_ended < len(self._channels) and time.monotonic() < until:
            await self.step()

    # Ending.

    async def end(self, bad_hosts: Iterable[str], silence_s: float) -> tuple[str, ...]:
        """Everything of the attempt, on every host; returns hosts that did not take a fresh connection."""
        lost = {agent.name for agent in self.agents if agent.lost or agent.name in bad_hosts}
        sweeps: dict[str, asyncio.Task[bool]] = {}
        if self.is_over_ssh:
            sweeps = {name: asyncio.create_task(self._sweep(name, silence_s)) for name in lost}
        self.send_all({"kind": "kill"})
        until = time.monotonic() + _END_S
        while not all(agent.is_gone or agent.lost for agent in self.agents) and time.monotonic() < until:
            await self.step()
        for agent in self.agents:
            if self.is_over_ssh and not agent.is_gone and (agent.is_ready or agent.lost) and agent.name not in sweeps:
                sweeps[agent.name] = asyncio.create_task(self._sweep(agent.name, silence_s))
        unreachable = [name for name, sweep in sweeps.items() if not await sweep]
        if self.engine is not None and self.engine.returncode is None:
            await _end_group(self.engine)
        return tuple(unreachable)

    async def _sweep(self, name: str, silence_s: float) -> bool:
        """A fresh connection ends what is left there, the agent too. Whether there was one."""
        try:
            code, said = await run_there(name, f"{self.token}.{name}", "sweep", limit_s=_SWEEP_S)
        except OSError as error:
            code, said = 255, str(error)
        if code == 1:
            self._say(f"{name}: processes of this attempt do not end, even by SIGKILL; look there with ps")
        elif code != 0:
            ends = f"its agent ends all by itself within {silence_s:.0f} s of silence"
            self._say(f"{name}: cannot be reached for cleaning up ({said}); {ends}")
        return code in (0, 1)

    async def close(self) -> None:
        """Nothing of this process is left of it either."""
        for task in self._tasks:
            task.cancel()
        if self.engine is not None and self.engine.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.engine.pid, signal.SIGKILL)
            await self.engine.wait()
        if self._parent:  # the runner's own ssh sessions outlive it where the other host is gone
            processes.kill_all_having(PARENT, self._parent)
        await asyncio.gather(*self._tasks, *(channel.close() for channel in self._channels), return_exceptions=True)
        if self._server is not None:
            await self._server.close()


def _with_checkout(path: str) -> str:
    found = [each for each in path.split(":") if each]
    return ":".join([*found, *(str(each) for each in (CHECKOUT, CHECKOUT / "kernels") if str(each) not in found)])


async def _end_group(process: asyncio.subprocess.Process) -> None:
    """SIGTERM, then SIGKILL: mpirun and srun clean up behind them where they can."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), 3.0)
            return
