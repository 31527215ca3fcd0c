"""The agent's end of its line to the launching process: JSON lines over two pipes (ssh) or one socket (TCP).

It never blocks: what cannot be sent yet waits here, and news about ranks overtakes their output. Standard library only.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import json
import os
import select
import socket
import time
from typing import Any

Message = dict[str, Any]

PARENT = "OFA_AGENT"
"""Variable with a word that says where the launching process listens, and the token that it wants. Not an argument:
those are there for everybody on the host to read."""
MAX_LINE = 64 << 20
"""Bytes of a message: a job has all arguments and variables in it."""
MAX_WAITING = 256 << 10
"""Bytes of output that wait here. While they are more, the ranks' pipe is not read."""


def pack(addresses: list[str], port: int, token: str) -> str:
    """The word for PARENT."""
    content = json.dumps({"addresses": addresses, "port": port, "token": token})
    return base64.urlsafe_b64encode(content.encode()).decode()


def unpack(word: str) -> tuple[list[str], int, str]:
    """(addresses, port, token). Raises ValueError for what `pack` did not make."""
    try:
        content = json.loads(base64.urlsafe_b64decode(word))
        return [str(each) for each in content["addresses"]], int(content["port"]), str(content["token"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{PARENT}: not what `ofa-ds launch` writes: {error}") from error


def connect(addresses: list[str], port: int, *, limit_s: float) -> socket.socket:
    """To the first address that answers. Raises OSError where none does in time."""
    until, problem = time.monotonic() + limit_s, OSError("no address given")
    while time.monotonic() < until:
        for address in addresses:
            try:
                found = socket.create_connection((address, port), timeout=5)
            except OSError as error:
                problem = error
                continue
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return found
        time.sleep(0.5)
    raise OSError(f"the launching process answers at none of {', '.join(addresses)}, port {port}: {problem}")


class Link:
    def __init__(self, source: int, target: int) -> None:
        """Two descriptors, which may be the same one."""
        self.source, self.target = source, target
        self.is_closed = False
        self.heard_at_s = time.monotonic()
        self._received = b""
        self._news: collections.deque[bytes] = collections.deque()
        self._output: collections.deque[bytes] = collections.deque()
        self._sending = b""
        self._waiting = 0
        for descriptor in {source, target}:
            os.set_blocking(descriptor, False)

    def send(self, message: Message, *, is_output: bool = False) -> None:
        line = json.dumps(message).encode() + b"\n"
        self._waiting += len(line)
        (self._output if is_output else self._news).append(line)

    @property
    def is_full(self) -> bool:
        return self._waiting > MAX_WAITING

    @property
    def wants_to_write(self) -> bool:
        return self._waiting > 0 and not self.is_closed

    def flush(self) -> None:
        """Send as much as goes without waiting."""
        while self._waiting and not self.is_closed:
            if not self._sending:
                self._sending = (self._news or self._output).popleft()
            try:
                sent = os.write(self.target, self._sending)
            except BlockingIOError:
                return
            except OSError:
                self.is_closed = True
                return
            self._sending = self._sending[sent:]
            self._waiting -= sent

    def flush_all(self, *, limit_s: float) -> None:
        """Before the end: what the other side takes within the limit."""
        until = time.monotonic() + limit_s
        while self.wants_to_write and (left := until - time.monotonic()) > 0:
            select.select([], [self.target], [], left)
            self.flush()

    def receive(self) -> list[Message]:
        """What has come since. Sets `is_closed` at the end of file, and where something else than messages comes."""
        with contextlib.suppress(BlockingIOError):
            try:
                data = os.read(self.source, 1 << 20)
            except BlockingIOError:
                raise
            except OSError:
                data = b""
            self.is_closed |= not data
            self._received += data
        *lines, self._received = self._received.split(b"\n")
        self.is_closed |= len(self._received) > MAX_LINE
        if lines:
            self.heard_at_s = time.monotonic()
        try:
            return [json.loads(line) for line in lines]
        except ValueError:
            self.is_closed = True
            return []
