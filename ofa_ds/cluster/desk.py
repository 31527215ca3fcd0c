"""What a launch leaves in RUN_DIR/launch and shows on the terminal, written by threads of its own.

A terminal that is not read, a disk that is full or a file server that is away do not hold up the heartbeats: what waits
is bounded, what is too much is dropped and counted, what cannot be written is told once.

    attempts.jsonl                       one line at the start and one at the end of each attempt
    status.json                          how all ranks are, every 2 seconds
    logs/attempt-001/HOST.log            what its ranks printed, `[RANK] ` before each line
    reports/attempt-001.txt, .json       why it ended; stacks of its ranks in reports/attempt-001/
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from ofa_ds.storage.atomic import replace_file

_MAX_FILES, _MAX_TERMINAL = 32 << 20, 1 << 20
"""Bytes that wait to be written."""
CLOSE_S = 10.0


class Writer:
    """A thread that does small pieces of work in order, as many bytes of them at most as `limit`."""

    def __init__(self, name: str, limit: int) -> None:
        self._limit, self._waiting, self.dropped = limit, 0, 0
        self._work: collections.deque[tuple[int, Callable[[], None]]] = collections.deque()
        self._change = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, size: int, work: Callable[[], None]) -> None:
        with self._change:
            if self._waiting + size > self._limit:
                self.dropped += size
                return
            self._waiting += size
            self._work.append((size, work))
            self._change.notify()

    def close(self, limit_s: float) -> None:
        """Do what is left, for so long at most."""
        with self._change:
            self._ended = True
            self._change.notify()
        self._thread.join(limit_s)

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._work and not self._ended:
                    self._change.wait()
                if not self._work:
                    return
                size, work = self._work.popleft()
            work()
            with self._change:
                self._waiting -= size


class Desk:
    def __init__(self, run_dir: Path, *, out: TextIO | None = None, words: TextIO | None = None) -> None:
        """out: for what ranks print; words: for what the launch itself says."""
        self.directory = run_dir / "launch"
        self._out, self._words = out or sys.stdout, words or sys.stderr
        self._files, self._terminal = Writer("files", _MAX_FILES), Writer("terminal", _MAX_TERMINAL)
        self._handles: dict[Path, Any] = {}
        self._rest: dict[str, str] = {}
        self._status: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self._is_told = False
        self._shown_dropped = 0

    def log_path(self, attempt: int, host: str) -> Path:
        return self.directory / "logs" / f"attempt-{attempt:03d}" / f"{_file_name(host)}.log"

    def report_path(self, attempt: int) -> Path:
        return self.directory / "reports" / f"attempt-{attempt:03d}.txt"

    def say(self, text: str) -> None:
        """The launch's own words, on stderr."""
        data = "".join(f"ofa-ds launch: {line}\n" for line in text.splitlines()).encode(errors="replace")
        self._terminal.add(len(data), lambda: _write(self._words, data))

    def log(self, attempt: int, host: str, text: str) -> None:
        """Output of a host. Only whole lines are shown, so that those of several hosts never run into one another."""
        path = self.log_path(attempt, host)
        data = text.encode(errors="replace")
        self._files.add(len(data), lambda: self._append(path, data))
        *lines, self._rest[host] = (self._rest.get(host, "") + text).split("\n")
        if len(self._rest[host]) > 65_536:
            lines.append(self._rest.pop(host))
        if not lines:
            return
        shown = "".join(f"{host} {line}\n" for line in lines).encode(errors="replace")
        if dropped := self._terminal.dropped - self._shown_dropped:
            self._shown_dropped += dropped
            text = f"{dropped} bytes not shown, the terminal takes them too slowly; see {path.parent}"
            shown = f"ofa-ds launch: {text}\n".encode() + shown
        self._terminal.add(len(shown), lambda: _write(self._out, shown))

    def event(self, content: dict[str, Any]) -> None:
        """A line of attempts.jsonl."""
        data = json.dumps(content).encode() + b"\n"
        self._files.add(len(data), lambda: self._append(self.directory / "attempts.jsonl", data))

    def write(self, path: Path, content: bytes) -> None:
        """A whole file: a report, or stacks."""
        self._files.add(len(content), lambda: self._guarded(lambda: _put(path, content)))

    def status(self, content: dict[str, Any]) -> None:
        """Replaces status.json; of several that wait only the newest is written."""
        with self._lock:
            waits, self._status = self._status is not None, content
        if not waits:
            self._files.add(0, self._write_status)

    def _write_status(self) -> None:
        with self._lock:
            content, self._status = self._status, None
        text = json.dumps(content)
        self._guarded(lambda: replace_file(self.directory / "status.json", text))

    def _append(self, path: Path, data: bytes) -> None:
        def append() -> None:
            if path not in self._handles:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._handles[path] = _opened(path)
            self._handles[path].write(data)

        self._guarded(append)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            if not self._is_told:
                self._is_told = True
                self.say(f"{self.directory}: cannot be written: {error}; logs have gaps from here on, the run goes on")

    def close(self) -> None:
        """Write what is left; a terminal that nobody reads is not waited for long."""
        self._files.close(CLOSE_S)
        if self._files.dropped:
            self.say(f"{self.directory}: {self._files.dropped} bytes of logs are missing, files took them too slowly")
        self._terminal.close(CLOSE_S / 2)
        for handle in self._handles.values():
            with contextlib.suppress(OSError):
                handle.close()


def _opened(path: Path) -> Any:
    """To append to; a last line that a killed launch cut off is ended first."""
    file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed with the desk
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _write(stream: TextIO, data: bytes) -> None:
    """With one system call where it goes, so that lines of other writers stay whole. Nobody reads it: let it be."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):  # a test's own stream, or none
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.write(data.decode(errors="replace"))
        return
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:  # somebody made the terminal non-blocking
            time.sleep(0.05)
        except OSError:
            return


def _file_name(host: str) -> str:
    return re.sub(r"[^\w.@-]", "_", host)
