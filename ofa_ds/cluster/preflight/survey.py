"""Asks all hosts at once, over one ssh channel each. What one host does not answer costs that host alone."""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ofa_ds.cluster.hostfile import Host
from ofa_ds.cluster.preflight.channels import Channel, Unreachable, sources
from ofa_ds.cluster.preflight.seen import Fleet, Seen
from ofa_ds.cluster.preflight.thresholds import WRITE_PROBE_BYTES

CHECKOUT = Path(__file__).absolute().parents[3]
LOGINS_AT_ONCE = 32
"""More at once are no faster: the launching host's cores are what ssh waits for."""
_CLOCK_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to look at."""

    hosts: Sequence[Host]
    directory: str
    """Where runs are written; every host shall see it."""
    master_address: str = ""
    """Of rank 0; else the address by which ssh reaches the first host."""
    master_port: int = 29500
    bandwidth: bool = True
    timeout_s: float = 60.0
    """For one answer of one host."""


@dataclass(eq=False)
class Survey:
    """All channels, and what came through them so far."""

    wanted: Wanted
    seen: list[Seen]
    channels: dict[str, Channel]
    tell: Callable[[str], None]
    """Told in a few words what is being done: progress."""
    token: str = field(default_factory=lambda: secrets.token_hex(6))
    rank_0: str = ""

    def answering(self) -> list[Seen]:
        return [each for each in self.seen if not each.problem]

    def fleet(self) -> Fleet:
        return Fleet(self.seen, self.rank_0)

    def channel(self, seen: Seen) -> Channel:
        return self.channels[seen.host.name]

    async def each(self, what: str, work: Callable[[Seen], Awaitable[None]], hosts: Sequence[Seen]) -> None:
        """Do `work` for these hosts at once. A channel that breaks marks its host, and the others go on."""
        started, left = time.monotonic(), len(hosts)

        async def one(seen: Seen) -> None:
            nonlocal left
            try:
                await work(seen)
            except Unreachable as error:
                seen.problem = seen.problem or str(error)
            left -= 1
            self.tell(f"{what}: {len(hosts) - left} of {len(hosts)} hosts, {time.monotonic() - started:.0f} s")

        await asyncio.gather(*(one(seen) for seen in hosts))


@asynccontextmanager
async def opened(wanted: Wanted, tell: Callable[[str], None]) -> AsyncIterator[Survey]:
    """Channels to all hosts that can be reached; every ssh has ended afterwards, whatever happened."""
    channels = {host.name: Channel(host) for host in wanted.hosts}
    survey = Survey(wanted, [Seen(host) for host in wanted.hosts], channels, tell)
    modules, slots = sources(), asyncio.Semaphore(LOGINS_AT_ONCE)

    async def log_in(seen: Seen) -> None:
        async with slots:
            await survey.channel(seen).open(modules, wanted.timeout_s)
        seen.login_s = survey.channel(seen).login_s

    try:
        await survey.each("ssh", log_in, survey.seen)
        yield survey
    finally:
        await asyncio.gather(*(channel.close() for channel in channels.values()))


async def look(survey: Survey) -> None:
    """Everything but bandwidth, into `survey.seen`."""
    await survey.each("clocks", lambda seen: _clock(survey, seen), survey.answering())
    await survey.each("facts", lambda seen: _facts(survey, seen), survey.answering())
    for seen in survey.answering():
        seen.noise = survey.channel(seen).noise
    if survey.answering():
        await _shared(survey)
        await _writing(survey)
        await _ports(survey)


async def _clock(survey: Survey, seen: Seen) -> None:
    """Four time stamps a question; of the rounds the fastest, whose error is at most half its round trip."""
    best: tuple[float, float] | None = None
    for _ in range(_CLOCK_ROUNDS):
        sent = time.time()
        received, answered = await survey.channel(seen).ask("clock", survey.wanted.timeout_s)
        back = time.time()
        error = max((back - sent) - (answered - received), 0.0) / 2
        if best is None or error < best[1]:
            best = ((received - sent + answered - back) / 2, error)
    seen.clock = best


async def _facts(survey: Survey, seen: Seen) -> None:
    details = {"checkout": str(CHECKOUT), "python": sys.executable, "directory": survey.wanted.directory}
    try:
        seen.facts = await survey.channel(seen).ask("facts", survey.wanted.timeout_s, **details)
    except RuntimeError as error:
        if isinstance(error, Unreachable):
            raise
        seen.problem = f"the probe fails there: {error}"


async def _shared(survey: Survey) -> None:
    """The first two hosts write a file each, all read both. Each goes with its writer's channel."""
    wait_s = survey.wanted.timeout_s
    base = f"{survey.wanted.directory}/.ofa-preflight-{survey.token}"
    written: dict[str, str] = {}

    async def begin(seen: Seen) -> None:
        path = f"{base}-{survey.seen.index(seen)}"
        try:
            await survey.channel(seen).ask("write", wait_s, path=path, text=survey.token)
            written[seen.host.name] = path
        except RuntimeError as error:
            _pass_on(error)  # that it cannot write, `_writing` will tell

    async def read(seen: Seen) -> None:
        for writer, path in sorted(written.items(), key=lambda each: each[1]):
            try:
                text = await survey.channel(seen).ask("read", wait_s, path=path, within_s=3.0)
                seen.shared[writer] = "" if text == survey.token else f"sees another content of {path}"
            except RuntimeError as error:
                _pass_on(error)
                seen.shared[writer] = f"does not see the file that {writer} wrote: {error}"

    await survey.each("shared directory", begin, survey.answering()[:2])
    await survey.each("shared directory", read, survey.answering())


async def _writing(survey: Survey) -> None:
    """All hosts write at once, as ranks do when they save."""

    async def write(seen: Seen) -> None:
        name = f".ofa-preflight-{survey.token}-speed-{survey.seen.index(seen)}"
        details = {"directory": survey.wanted.directory, "name": name, "num_bytes": WRITE_PROBE_BYTES}
        try:
            seen.write_speed = await survey.channel(seen).ask("speed", survey.wanted.timeout_s, **details)
        except RuntimeError as error:
            _pass_on(error)
            seen.write_speed = f"cannot write {WRITE_PROBE_BYTES >> 20} MiB: {error}"

    await survey.each("writing", write, survey.answering())


def _pass_on(error: RuntimeError) -> None:
    """A host that is gone is not a host that answers no."""
    if isinstance(error, Unreachable):
        raise error


async def _ports(survey: Survey) -> None:
    """Every host connects to rank 0's port on the first one, where the probe listens meanwhile."""
    first, wanted = survey.answering()[0], survey.wanted
    told = wanted.master_address if first is survey.seen[0] else ""
    address = told or (first.fact("network") or {}).get("address", "")
    survey.rank_0 = f"{address} port {wanted.master_port}"

    async def listen(seen: Seen) -> None:
        try:
            await survey.channel(seen).ask("listen", wanted.timeout_s, port=wanted.master_port, within_s=5.0)
        except RuntimeError as error:
            _pass_on(error)
            seen.port = f"port {wanted.master_port} is not free there: {error}"

    async def connect(seen: Seen) -> None:
        try:
            seen.port = await survey.channel(seen).ask(
                "connect", wanted.timeout_s, address=address, port=wanted.master_port, within_s=5.0
            )
        except RuntimeError as error:
            _pass_on(error)
            seen.port = f"does not reach {survey.rank_0}: {error}"

    async def close(seen: Seen) -> None:
        await survey.channel(seen).ask("close", wanted.timeout_s)

    await survey.each("ports", listen, [first])
    if isinstance(first.port, str) or first.problem:
        return
    await survey.each("ports", connect, survey.answering())
    await survey.each("ports", close, [first])
