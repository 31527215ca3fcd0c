"""Hostfiles: one `HOST slots=N` a line, `#` starts a comment. Read strictly, before anything is started.

DeepSpeed's own reader takes a missing file for "run here" and `slots=8x` for 8; here each is an error with its line.

    python -m ofa_ds.cluster.hostfile FILE     prints "HOSTS RANKS", such as "4 32"
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"(?P<name>[A-Za-z0-9_][A-Za-z0-9_.:-]*)\s+slots=(?P<slots>[0-9]+)")


@dataclass(frozen=True)
class Host:
    name: str
    """Name or address, as ssh takes it."""
    slots: int
    """Ranks to start there: one per GPU."""


def parse_hostfile(path: str | Path) -> list[Host]:
    """The hosts, in the file's order; rank 0 runs on the first.

    Raises ValueError, one line that begins with `file:line:`, for a missing or empty file, a malformed line,
    a host named twice, or zero slots.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such hostfile; write one 'HOST slots=N' a line, N = GPUs of that host") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable text file: {error}") from error
    first_line: dict[str, int] = {}
    hosts: list[Host] = []
    for number, line in enumerate(lines, start=1):
        text = line.split("#", maxsplit=1)[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise ValueError(f"{path}:{number}: '{text}': want 'HOST slots=N'")
        host = Host(match["name"], int(match["slots"]))
        if host.slots == 0:
            raise ValueError(f"{path}:{number}: '{text}': want at least one slot, or no line for {host.name}")
        if host.name in first_line:
            earlier = f"{host.name} is on line {first_line[host.name]} already"
            raise ValueError(f"{path}:{number}: '{text}': {earlier}; give each host one line")
        first_line[host.name] = number
        hosts.append(host)
    if not hosts:
        raise ValueError(f"{path}: names no host; write one 'HOST slots=N' a line")
    return hosts


def main(arguments: list[str]) -> int:
    """Check the hostfile named in `arguments`; 0 where it is right, else 2 and one line on stderr."""
    if len(arguments) != 1:
        print("usage: python -m ofa_ds.cluster.hostfile FILE", file=sys.stderr)
        return 2
    try:
        hosts = parse_hostfile(arguments[0])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(len(hosts), sum(host.slots for host in hosts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
