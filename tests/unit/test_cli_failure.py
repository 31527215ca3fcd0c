"""Every failure of a command is one line; one that nobody foresaw leaves its traceback in a file of its own."""

from __future__ import annotations

import argparse
import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ofa_ds.cli.main import main
from ofa_ds.cli.parser import UsageError, command
from ofa_ds.config import load_recipe
from ofa_ds.data.order import Permutation
from ofa_ds.data.pool import run_jobs
from ofa_ds.storage.safetensors_file import DamagedError


def test_a_rank_writes_each_line_whole_so_that_those_of_several_do_not_mix():
    """Each write to such a socket arrives as a message of its own."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-u", "-m", "ofa_ds.pretrain", "no-such-recipe"]
    with ours, theirs:
        assert subprocess.run(command, stderr=theirs, stdout=subprocess.DEVNULL).returncode == 2
        theirs.close()
        messages = list(iter(lambda: ours.recv(65536), b""))
    assert len(messages) == 1 and messages[0].startswith(b"ofa-ds: ") and messages[0].endswith(b"\n")


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> Callable[..., tuple[int, str, list[Path]]]:
    """A command `fail` that does what it is told; returns exit code, stderr and the new files of TMPDIR."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def run(action: Callable[[], object], *arguments: str) -> tuple[int, str, list[Path]]:
        def add(commands: argparse._SubParsersAction) -> None:
            parser = command(commands, "fail", lambda options: action(), "Fails.", example="")
            parser.add_argument("words", nargs="*")

        monkeypatch.setattr(sys.modules[main.__module__], "_GROUPS", (add,))
        code = main(["fail", *arguments])
        return code, capsys.readouterr().err, sorted(tmp_path.iterdir())

    return run


def raising(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def test_a_full_disk_is_no_fault_of_ours_and_is_named(fail, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Writing fails without a file name; the arguments tell which disk it was."""
    full, real = tmp_path / "full", os.statvfs
    full.mkdir()
    lacking = SimpleNamespace(f_blocks=10, f_bavail=0, f_frsize=4096, f_files=10, f_favail=5)
    monkeypatch.setattr(os, "statvfs", lambda path: lacking if Path(path) == full else real(path))
    action = raising(OSError(errno.ENOSPC, "No space left on device"))
    for argument in (str(full / "new" / "out.json"), f"run_dir={full}/run"):
        code, told, files = fail(action, "x", argument)
        place = argument.rpartition("=")[2]
        want = f"ofa-ds: No space left on device on the disk of {place}; make room and run the same command again\n"
        assert (code, told, files) == (1, want, [full])
    assert fail(action)[1] == "ofa-ds: No space left on device; make room and run the same command again\n"


def endless(n: int) -> int:
    return endless(n + 1) + 1


UNFORESEEN = {
    "KeyError: 'a'": lambda: {}["a"],
    "TypeError": raising(TypeError("two\nlines")),
    "AssertionError": raising(AssertionError()),
    "out of memory": raising(MemoryError()),
    "RecursionError: maximum recursion depth": lambda: endless(0),
    "ValueError: operands could not be broadcast": lambda: np.ones(2) + np.ones(3),
    "ValueError: invalid literal": lambda: int("x"),
    "JSONDecodeError: Expecting value": lambda: json.loads("x"),
    "ZeroDivisionError": lambda: 1 / 0,
    "ModuleNotFoundError: No module named 'ofa_ds.nowhere'": lambda: __import__("ofa_ds.nowhere"),
    "OSError: of no file": raising(OSError("of no file")),
    "RuntimeError": raising(RuntimeError()),
    "UnicodeEncodeError": lambda: "\ud800".encode(),
    "StopIteration": lambda: next(iter(())),
}  # fmt: skip


@pytest.mark.parametrize("what", UNFORESEEN)
def test_what_nobody_foresaw_is_one_line_and_a_file_with_traceback_command_and_versions(fail, what) -> None:
    code, line, (file,) = fail(UNFORESEEN[what], "a b", "it's\n")
    assert code == 1
    assert line.startswith(f"ofa-ds: {what}") and line.count("\n") == 1
    assert line.endswith(f"; unforeseen: please report it with {file}\n")
    text = file.read_text()
    assert "Traceback (most recent call last):" in text and "in _failed" not in text
    assert what.removeprefix("out of memory").split(":")[0] in text
    assert """ofa-ds fail 'a b' 'it'"'"'s""" in text
    for package in ("ofa-ds 0.", "python 3.", "torch", "deepspeed", f"{os.getpid()}", os.getcwd()):
        assert package in text
    assert file.stat().st_mode & 0o777 == 0o600


def permutation() -> None:
    Permutation(0, seed=1, epoch=0)


FORESEEN = {
    "want n >= 1": permutation,
    "unknown key optim.peak_rl": lambda: load_recipe("pretrain-nano", ["optim.peak_rl=1"]),
    "[Errno 2] No such file or directory: '/no/where'": lambda: open("/no/where"),
    "[Errno 13] Permission denied: '/a'": raising(PermissionError(13, "Permission denied", "/a")),
}


@pytest.mark.parametrize("what", FORESEEN)
def test_what_our_code_raises_on_purpose_or_names_a_file_is_the_line_alone(fail, what) -> None:
    code, line, files = fail(FORESEEN[what])
    assert (code, files) == (1, [])
    assert line.startswith(f"ofa-ds: {what}") or what in line
    assert line.count("\n") == 1 and "unforeseen" not in line


def in_a_worker(kind: str) -> object:
    return Permutation(0, seed=1, epoch=0) if kind == "ours" else np.ones(2) + np.ones(3)


@pytest.mark.parametrize(("kind", "saved"), [("ours", 0), ("theirs", 1)])
def test_a_failure_in_another_process_is_told_apart_too(fail, kind, saved) -> None:
    code, line, files = fail(lambda: list(run_jobs(in_a_worker, [kind, kind], workers=2)))
    assert code == 1 and line.count("\n") == 1
    assert len(files) == saved and ("unforeseen" in line) == bool(saved)
    if files:
        assert "in in_a_worker" in files[0].read_text()


def test_wrong_usage_is_2_and_ctrl_c_is_130(fail) -> None:
    assert fail(raising(UsageError("wrong\nusage"))) == (2, "ofa-ds: wrong usage\n", [])
    assert fail(raising(KeyboardInterrupt())) == (130, "ofa-ds: stopped by Ctrl-C\n", [])
    assert fail(raising(DamagedError("f: damaged")))[0] == 1


def test_each_of_many_ranks_has_a_file_of_its_own_and_the_line_names_it(fail, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1", "1"):  # a second failure of the same rank in the same second too
        monkeypatch.setenv("RANK", rank)
        _, line, files = fail(lambda: {}["a"])
        assert f"ofa-ds: rank {rank} on {os.uname().nodename}: KeyError: 'a'; " in line
    assert len(files) == 3
    assert sorted(file.name.split("-rank")[1][0] for file in files) == ["0", "1", "1"]


def test_where_no_file_can_be_written_the_traceback_is_printed_and_told_why(fail, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc/self")
    code, text, files = fail(lambda: {}["a"])
    assert (code, files) == (1, [])
    first, *rest = text.splitlines()
    assert first.startswith("ofa-ds: KeyError: 'a'; its traceback, which cannot be saved ([Errno ")
    assert rest[0] == "Traceback (most recent call last):"


def shell(script: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "", "PY": sys.executable}
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment)


def test_a_reader_that_goes_away_ends_a_command_quietly() -> None:
    for arguments in ("--help", "vocab show --help"):
        ended = shell(f"{{ $PY -m ofa_ds.cli {arguments}; echo $? >&2; }} | true")
        assert (ended.stdout, ended.stderr) == ("", "141\n")


def test_output_to_a_full_disk_is_an_error_of_the_command() -> None:
    ended = shell("$PY -m ofa_ds.cli --help >/dev/full")
    assert ended.returncode == 1
    assert ended.stderr.startswith("ofa-ds: No space left on device") and ended.stderr.count("\n") == 1


def test_another_broken_pipe_is_no_reader_gone(fail) -> None:
    code, line, files = fail(raising(BrokenPipeError(32, "Broken pipe")))
    assert code == 1 and len(files) == 1 and "Broken pipe" in line


@pytest.mark.parametrize("code, words", [(0, "done"), (130, "done"), (1, "done and ended by Python")])
def test_a_rank_that_has_finished_ends_without_pythons_own_end(code: int, words: str) -> None:
    """Which takes the connections' threads down, and now and then the whole process with them."""
    script = (
        "import atexit; from ofa_ds.cli.main import leave; "
        "atexit.register(lambda: print(' and ended by Python', end=''));"
        f"print('done', end=''); leave({code})"
    )
    environment = {**os.environ, "RANK": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, words)
