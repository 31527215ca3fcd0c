"""The channel to a host, through an `ssh` that runs the far end's command here: noise, silence, a death, a refusal."""

from __future__ import annotations

import asyncio
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from ofa_ds.cluster.hostfile import Host
from ofa_ds.cluster.preflight.channels import Channel, Unreachable, command, sources
from ofa_ds.cluster.preflight.seen import Seen
from ofa_ds.cluster.preflight.survey import Survey, Wanted, _clock


@pytest.fixture
def far_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts an `ssh` into PATH: `before` runs first, as a login shell's own files do."""

    def make(before: str) -> None:
        ssh = tmp_path / "ssh"
        ssh.write_text(f'#!/bin/sh\n{before}\nfor last; do :; done\nexec sh -c "$last"\n')
        ssh.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return make


def through(work: Callable[[Channel], Awaitable[Any]], timeout_s: float = 30) -> Any:
    async def run() -> Any:
        channel = Channel(Host("there", 1))
        try:
            await channel.open(sources(), timeout_s)
            return await work(channel)
        finally:
            await channel.close()

    return asyncio.run(run())


def test_a_chatty_login_shell_is_noticed_and_harms_nothing(far_end: Callable[[str], None]) -> None:
    far_end("printf 'Welcome!\\nno newline at the end'; echo to stderr >&2")

    async def work(channel: Channel) -> tuple[dict[str, Any], bytes]:
        facts = {"checkout": str(Path(__file__).parents[2]), "python": sys.executable, "directory": "/tmp"}
        return await channel.ask("facts", 60, **facts), channel.noise

    facts, noise = through(work)
    assert noise == b"Welcome!no newline at the end"
    assert facts["python"]["executable"] == sys.executable and len(facts["code"]) == 16
    assert facts["packages"]["torch"] and facts["memory"]["all"] > 0
    assert facts["python"]["version"] == sys.version.split()[0]
    assert not {name: part for name, part in facts.items() if isinstance(part, dict) and "error" in part}


def test_the_probe_needs_no_checkout_and_imports_no_torch(far_end: Callable[[str], None]) -> None:
    far_end("cd /; unset PYTHONPATH")
    facts = through(lambda channel: channel.ask("facts", 60, checkout="/nowhere", python="/p", directory="/nowhere"))
    assert facts["code"] is None and facts["space"]["run"]["missing"] is True
    text = "\n".join(sources().values())
    heavy = "import sys, types\n" + "\n".join(
        f"sys.modules[{name!r}] = types.ModuleType({name!r})\nexec({source!r}, sys.modules[{name!r}].__dict__)"
        for name, source in sources().items()
    )
    assert "import torch" in text
    code = f"{heavy}\nassert not {{'torch', 'numpy', 'ofa_ds'}} & sys.modules.keys(), sorted(sys.modules)"
    subprocess.run([sys.executable, "-I", "-c", code], check=True)


def test_a_silent_host_costs_its_time_and_is_told(far_end: Callable[[str], None]) -> None:
    far_end("exec sleep 600")
    started = time.monotonic()
    with pytest.raises(Unreachable, match="no answer within 1 s"):
        through(lambda channel: channel.ask("clock", 5), timeout_s=1)
    assert time.monotonic() - started < 20


def test_the_last_words_of_ssh_are_the_reason(far_end: Callable[[str], None]) -> None:
    far_end("echo warning >&2; echo 'ssh: connect to host there port 22: Connection refused' >&2; exit 255")
    with pytest.raises(Unreachable, match="^ssh: connect to host there port 22: Connection refused$"):
        through(lambda channel: channel.ask("clock", 5))


def test_a_probe_that_dies_between_questions_is_a_host_that_is_gone(far_end: Callable[[str], None]) -> None:
    far_end("")

    async def work(channel: Channel) -> None:
        assert channel._process is not None
        channel._process.kill()
        await channel.ask("clock", 10)

    with pytest.raises(Unreachable):
        through(work)


def test_a_fault_of_the_far_end_is_told_and_the_channel_stays(far_end: Callable[[str], None], tmp_path: Path) -> None:
    far_end("")

    async def work(channel: Channel) -> Any:
        with pytest.raises(RuntimeError, match="FileNotFoundError"):
            await channel.ask("speed", 10, directory="/nowhere", name="x", num_bytes=1 << 20)
        await channel.ask("write", 10, path=str(tmp_path / "seen"), text="hello")
        assert (tmp_path / "seen").read_text() == "hello"
        return await channel.ask("read", 10, path=str(tmp_path / "seen"), within_s=1)

    assert through(work) == "hello"
    assert not (tmp_path / "seen").exists()


async def clock(channel: Channel) -> tuple[float, float]:
    seen = Seen(channel.host)
    survey = Survey(Wanted(hosts=[channel.host], directory="/tmp"), [seen], {"there": channel}, lambda text: None)
    await _clock(survey, seen)
    assert seen.clock is not None
    return seen.clock


def test_clocks_are_compared_to_within_half_a_round_trip(far_end: Callable[[str], None]) -> None:
    far_end("")
    ahead, error = through(clock)
    assert abs(ahead) <= error < 1  # both ends have one clock


def test_a_clock_that_is_ahead_is_told_to_within_half_a_round_trip(
    far_end: Callable[[str], None], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time\nreal = time.time\ntime.time = lambda: real() + 100\n")
    far_end(f"PYTHONPATH={tmp_path}; export PYTHONPATH")
    ahead, error = through(clock)
    assert abs(ahead - 100) <= error < 1


def test_without_this_interpreter_another_python_answers_and_says_so(
    far_end: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    far_end("")
    monkeypatch.setattr(sys, "executable", "/nowhere/bin/python")
    facts = through(lambda channel: channel.ask("facts", 60, checkout="/", python=sys.executable, directory="/tmp"))
    assert facts["python"]["executable"] != facts["python"]["wanted"] == "/nowhere/bin/python"


def test_two_that_look_at_once_both_get_the_port(far_end: Callable[[str], None]) -> None:
    far_end("")

    async def work(channel: Channel) -> None:
        other = Channel(Host("there", 1))
        try:
            await other.open(sources(), 30)
            port = await other.ask("listen", 10, port=0, within_s=0)
            with pytest.raises(RuntimeError, match="Address already in use"):
                await channel.ask("listen", 10, port=port, within_s=0)
            waiting = asyncio.create_task(channel.ask("listen", 10, port=port, within_s=5))
            await other.ask("close", 10)
            assert await waiting == port
        finally:
            await other.close()

    through(work)


def test_a_shell_gets_nothing_but_fixed_words_and_the_interpreter() -> None:
    *options, dashes, host, script = command("me@host")
    assert (dashes, host) == ("--", "me@host") and options[0] == "ssh"
    assert shlex.split(script)[:3] == ["exec", "/bin/sh", "-c"] and len(shlex.split(script)) == 4
    assert "host" not in script
