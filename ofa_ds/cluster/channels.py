"""Lines from the launching process to its agents: over ssh one a host, over TCP one from each agent that comes back.

What arrives goes to one queue as (channel, message); None after the last one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Sequence

from ofa_ds.cluster.agent import CHECKOUT
from ofa_ds.cluster.link import Message
from ofa_ds.cluster.processes import ATTEMPT

SSH = (
    "ssh", "-T", "-o", "BatchMode=yes", "-o", "ControlPath=none", "-o", "ServerAliveInterval=3",
    "-o", "ServerAliveCountMax=3",
)  # fmt: skip
_MAX_LINE = 32 << 20
_MAX_HELLO = 4096
_HELLO_S = 10.0
_MAX_UNSENT = 4 << 20
"""Bytes: whoever takes nothing for so long is lost soon, and needs no more heartbeats."""

Inbox = asyncio.Queue[tuple["Channel", Message | None]]


class Channel:
    """Of one agent. Nothing here waits."""

    def __init__(self, name: str, writer: asyncio.StreamWriter | None = None) -> None:
        self.name = name
        self.writer = writer
        self.why_ended = "the line ended"

    def send(self, message: Message) -> None:
        if self.writer is None or self.writer.is_closing():
            return
        if self.writer.transport.get_write_buffer_size() < _MAX_UNSENT:
            with contextlib.suppress(OSError, RuntimeError):
                self.writer.write(json.dumps(message).encode() + b"\n")

    def hang_up(self) -> None:
        if self.writer is not None:
            with contextlib.suppress(OSError, RuntimeError):
                self.writer.close()

    async def close(self) -> None:
        self.hang_up()


async def pass_on(
    channel: Channel,
    reader: asyncio.StreamReader,
    inbox: Inbox,
    rest: bytes = b"",
    on_greeting: Callable[[str], None] | None = None,
) -> None:
    """All messages of a channel to the inbox. What is no message ends it.

    on_greeting: gets what comes before the first message, of a login shell that prints.
    """
    pending = [rest]
    size = len(rest)
    try:
        while data := await reader.read(1 << 18):
            pending.append(data)
            size += len(data)
            if b"\n" not in data:
                if size > _MAX_LINE:
                    raise ValueError(f"a line of more than {_MAX_LINE} bytes")
                continue
            *lines, left = b"".join(pending).split(b"\n")
            pending, size = [left], len(left)
            for line in lines:
                if on_greeting is not None and not line.startswith(b'{"kind": "hello"'):
                    on_greeting(line.decode(errors="replace"))
                    continue
                on_greeting = None
                message = json.loads(line)
                if not isinstance(message, dict):
                    raise ValueError("want an object")
                await inbox.put((channel, message))
    except (OSError, ValueError) as error:
        channel.why_ended = f"the line ended: {error}"


def remote_command(attempt: str, *arguments: str) -> str:
    """For the shell of a login, whatever shell that is: plain words alone."""
    words = ["env", f"{ATTEMPT}={attempt}", f"PYTHONPATH={CHECKOUT}", sys.executable, "-u", "-m"]
    return "exec " + shlex.join([*words, "ofa_ds.cluster.agent", *arguments])


async def open_ssh(host: str, attempt: str, inbox: Inbox, on_words: Callable[[str], None]) -> SshChannel:
    """Start an agent there. on_words: gets what ssh and the agent write on stderr."""
    process = await asyncio.create_subprocess_exec(
        *SSH, "-o", "ConnectTimeout=15", "--", host, remote_command(attempt),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    return SshChannel(host, process, inbox, on_words)


class SshChannel(Channel):
    def __init__(
        self, name: str, process: asyncio.subprocess.Process, inbox: Inbox, on_words: Callable[[str], None]
    ) -> None:
        super().__init__(name, process.stdin)
        self._process, self._inbox, self._on_words = process, inbox, on_words
        self._words = ""
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._read_words())]

    async def _read(self) -> None:
        await pass_on(self, self._process.stdout, self._inbox, on_greeting=self._on_words)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._process.wait(), 1.0)
        code = self._process.returncode
        said = self._words.strip().splitlines()
        self.why_ended += f", ssh with exit code {code}" if code is not None else ""
        self.why_ended += f": {said[-1][:300]}" if said else ""
        await self._inbox.put((self, None))

    async def _read_words(self) -> None:
        while data := await self._process.stderr.read(65_536):
            text = data.decode(errors="replace")
            self._words = (self._words + text)[-2000:]
            self._on_words(text)

    async def close(self) -> None:
        """End ssh: at the other end that is the end of the line too."""
        self.hang_up()
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def run_there(host: str, attempt: str, *arguments: str, limit_s: float) -> tuple[int, str]:
    """A fresh agent for one thing only: (exit code, last line on stderr). 255: ssh does not get there."""
    process = await asyncio.create_subprocess_exec(
        *SSH, "-o", "ConnectTimeout=5", "--", host, remote_command(attempt, *arguments),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        _, words = await asyncio.wait_for(process.communicate(), limit_s)
    except asyncio.TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        return 255, f"no answer within {limit_s:.0f} s"
    said = words.decode(errors="replace").strip().splitlines()
    return process.returncode, said[-1][:300] if said else ""


class Server:
    """Where agents that Slurm or MPI started come back to. Whoever does not know the token is dropped."""

    def __init__(self, token: str, inbox: Inbox) -> None:
        self._token, self._inbox = token, inbox
        self._server: asyncio.Server | None = None
        self._ranks: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> int:
        """Listen on all addresses; returns the port."""
        both = socket.has_dualstack_ipv6()
        family, address = (socket.AF_INET6, "::") if both else (socket.AF_INET, "0.0.0.0")
        listening = socket.create_server((address, 0), family=family, dualstack_ipv6=both, backlog=4096)
        self._server = await asyncio.start_server(self._greet, sock=listening)
        return listening.getsockname()[1]

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())
        asyncio.current_task().add_done_callback(self._tasks.discard)
        channel = None
        try:
            line = await asyncio.wait_for(_first_line(reader), _HELLO_S)
            hello = json.loads(line[: line.index(b"\n")])
            rank = hello["rank"]
            if not hmac.compare_digest(str(hello["token"]).encode(), self._token.encode()) or rank in self._ranks:
                raise ValueError("not one of ours")
            self._ranks.add(rank)
            channel = Channel(str(hello["host"]), writer)
            rest = line[line.index(b"\n") + 1 :]
        except (OSError, ValueError, KeyError, TypeError, asyncio.TimeoutError, asyncio.CancelledError):
            writer.close()
            return
        await self._inbox.put((channel, hello))
        with contextlib.suppress(asyncio.CancelledError):  # asyncio's own task: it would complain of an end by that
            await pass_on(channel, reader, self._inbox, rest)
            await self._inbox.put((channel, None))

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _first_line(reader: asyncio.StreamReader) -> bytes:
    data = b""
    while b"\n" not in data:
        got = await reader.read(_MAX_HELLO)
        data += got
        if not got or len(data) > _MAX_HELLO:
            raise ValueError("no hello")
    return data


def own_addresses(towards: Sequence[str]) -> list[str]:
    """Addresses of this host, those first by which it reaches `towards`."""
    found: dict[str, None] = {}
    for target in towards:
        with contextlib.suppress(OSError):
            for family, kind, protocol, _, address in socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM):
                with socket.socket(family, kind, protocol) as probe, contextlib.suppress(OSError):
                    probe.connect(address)  # sends nothing
                    found[probe.getsockname()[0]] = None
    with contextlib.suppress(OSError):
        for _, _, _, _, address in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
            found[address[0]] = None
    return list(found) or ["127.0.0.1"]
