"""One ssh channel a host, with the probe at its far end: questions go there, answers come back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import shlex
import signal
import sys
import time
from importlib import resources
from typing import Any

from ofa_ds.cluster.channels import SSH
from ofa_ds.cluster.hostfile import Host

PACKAGE = "ofa_ds.cluster.preflight"
_MODULES = ("machine", "exchange", "probe")
_START = (
    "import json,sys,types\n"
    "sent=json.loads(sys.stdin.buffer.readline())\n"
    "for name,source in sent['modules'].items():\n"
    "    sys.modules[name]=types.ModuleType(name)\n"
    "    exec(compile(source,name,'exec'),sys.modules[name].__dict__)\n"
    f"sys.modules['{PACKAGE}.probe'].main(sent['mark'])\n"
)
_LONGEST_LINE = 64 << 20


class Unreachable(RuntimeError):
    """The host does not answer; the text says why, in one line."""


def command(host: str) -> list[str]:
    """What is run here. The far shell gets fixed words and this interpreter's path, quoted; no other text."""
    python = shlex.quote(sys.executable)
    start = shlex.quote(_START)
    script = f"if test -x {python}; then exec {python} -u -c {start}; else exec python3 -u -c {start}; fi"
    return [*SSH, "-o", "ConnectTimeout=10", "--", host, f"exec /bin/sh -c {shlex.quote(script)}"]


def sources() -> dict[str, str]:
    """Full name -> source of what the far end needs, in the order of their imports."""
    files = resources.files(PACKAGE)
    return {f"{PACKAGE}.{name}": files.joinpath(f"{name}.py").read_text(encoding="utf-8") for name in _MODULES}


class Channel:
    """Open it, ask, close it: closing ends the far end too."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.noise = b""
        """What the login shell printed before the probe spoke."""
        self.login_s = 0.0
        self._mark = f"ofa-preflight-{secrets.token_hex(8)} "
        self._process: asyncio.subprocess.Process | None = None
        self._said: asyncio.Task[bytes] | None = None

    async def open(self, modules: dict[str, str], timeout_s: float) -> None:
        """Log in and start the probe. Raises Unreachable."""
        started = time.monotonic()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command(self.host.name),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C comes to this process, which then closes every channel
                limit=_LONGEST_LINE,
            )
        except OSError as error:
            raise Unreachable(f"ssh does not start here: {error}") from error
        assert self._process.stderr is not None
        self._said = asyncio.create_task(self._process.stderr.read())
        await self._send({"modules": modules, "mark": self._mark})
        await self._answer("log in and start Python", timeout_s)
        self.login_s = time.monotonic() - started

    async def ask(self, what: str, timeout_s: float, **details: Any) -> Any:
        """The probe's answer. Raises Unreachable where none comes, RuntimeError with the far end's own words."""
        await self._send({"ask": what, **details})
        answer = await self._answer(what, timeout_s)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["ok"]

    async def _send(self, message: dict[str, Any]) -> None:
        if self._process is None or self._process.stdin is None:
            raise Unreachable("the channel is closed")
        with contextlib.suppress(ConnectionError):  # ssh has ended: reading will say why
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            await asyncio.wait_for(self._process.stdin.drain(), timeout=30)

    async def _answer(self, what: str, timeout_s: float) -> dict[str, Any]:
        try:
            return await asyncio.wait_for(self._marked(), timeout_s)
        except asyncio.TimeoutError as error:  # noqa: UP041  another class before Python 3.11
            await self.close()
            raise Unreachable(f"no answer within {timeout_s:g} s to: {what}") from error

    async def _marked(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        mark = self._mark.encode()
        while line := await self._process.stdout.readline():
            before, found, text = line.partition(mark)
            self.noise += before.strip(b"\r\n")[:4096]
            if found:
                return json.loads(text)
        raise Unreachable(await self._why())

    async def _why(self) -> str:
        """Of a channel that ended by itself: the last words of ssh."""
        assert self._process is not None and self._said is not None
        words = (await self._said).decode(errors="replace").strip().splitlines()
        code = await self._process.wait()
        await self.close()
        return " ".join(words[-1].split())[:300] if words else f"ssh ends with exit code {code}"

    async def close(self) -> None:
        """End ssh; the probe reads the end of its questions and goes. Twice does no harm."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), timeout=1)
        except (asyncio.TimeoutError, asyncio.CancelledError):  # noqa: UP041
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            await process.wait()
        if self._said is not None:
            self._said.cancel()
