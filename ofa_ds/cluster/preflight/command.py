"""`ofa-ds preflight`: hostfile to report and exit code."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ofa_ds.cluster.hostfile import read_hostfile, split_spares
from ofa_ds.cluster.preflight.bandwidth import measure
from ofa_ds.cluster.preflight.healthy import write_healthy
from ofa_ds.cluster.preflight.report import Report, as_json, made, tell
from ofa_ds.cluster.preflight.survey import Wanted, look, opened

_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True, kw_only=True)
class Options:
    hostfile: Path
    directory: Path = Path()
    as_json: bool = False
    write_healthy: Path | None = None
    bandwidth: bool = True
    timeout_s: float = 60.0


def wanted_of(options: Options) -> Wanted:
    """Raises ValueError, one line, for a wrong hostfile, MASTER_PORT, or place of the healthy hostfile."""
    healthy = options.write_healthy
    if healthy is not None and (healthy.is_dir() or not healthy.parent.is_dir()):
        problem = "is a directory" if healthy.is_dir() else f"there is no directory {str(healthy.parent)!r}"
        raise ValueError(f"--write-healthy {str(healthy)!r}: {problem}; want a file to write")
    working, spares = split_spares(read_hostfile(options.hostfile), str(options.hostfile))
    return Wanted(
        hosts=[*working, *spares], directory=os.path.abspath(options.directory),
        master_address=os.environ.get("MASTER_ADDR", ""), master_port=_port(os.environ.get("MASTER_PORT", "29500")),
        bandwidth=options.bandwidth, timeout_s=options.timeout_s,
    )  # fmt: skip


def preflight(options: Options, wanted: Wanted) -> int:
    """0 where every host passes or is only warned of, 1 where one fails."""
    progress = Progress()
    report = asyncio.run(examined(str(options.hostfile), wanted, progress))
    progress.clear()
    if options.as_json:
        print(json.dumps(as_json(report)))
    else:
        tell(report)
    if options.write_healthy is not None:
        left = write_healthy(options.hostfile, options.write_healthy, report.bad_hosts)
        sys.stdout.flush()  # where both go to one file, the report is whole
        print(f"{options.write_healthy}: {left} hosts", file=sys.stderr)
    return 1 if report.bad_hosts else 0


async def examined(hostfile: str, wanted: Wanted, progress: Progress) -> Report:
    """Ask every host, then judge."""
    started = time.monotonic()
    exchange: dict[str, Any] = {}
    async with opened(wanted, progress.tell) as survey:
        await look(survey)
        if wanted.bandwidth:
            exchange = await measure(survey)
    return made(hostfile, time.monotonic() - started, survey.fleet(), exchange)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 65536):
        raise ValueError(f"MASTER_PORT {text!r}: want a number from 1 to 65535")
    return int(text)


class Progress:
    """One line that changes, on a terminal; elsewhere a line now and then. On stderr."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._told = time.monotonic()

    def tell(self, text: str) -> None:
        now = time.monotonic()
        if self._terminal:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif now - self._told >= _SECONDS_BETWEEN_LINES:
            self._told = now
            print(f"preflight: {text}", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
