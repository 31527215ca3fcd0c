"""Hostfiles: one `[USER@]HOST slots=N` a line, `#` starts a comment. Read strictly, before anything is started.

DeepSpeed's own reader takes a missing file for "run here" and `slots=8x` for 8; here each is an error with its line.

    python -m ofa_ds.cluster.hostfile FILE     prints "HOSTS RANKS", such as "4 32"
"""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(
    r"(?P<name>(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.:-]*)[ \t]+slots=(?P<slots>[0-9]{1,6})"
)
_MARKS = {codecs.BOM_UTF8: "UTF-8", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


@dataclass(frozen=True)
class Host:
    name: str
    """Name or address, as ssh takes it; `user@` before it where the login is another one there."""
    slots: int
    """Ranks to start there: one per GPU."""


def parse_hostfile(path: str | Path) -> list[Host]:
    """The hosts, in the file's order; rank 0 runs on the first.

    Raises ValueError, one line that begins with `file:line:`, for a missing or empty file, a byte order mark,
    a malformed line, a host named twice (under two users too: one line is all that its GPUs take), or zero slots.
    """
    first_line: dict[str, int] = {}
    hosts: list[Host] = []
    for number, text in _lines(Path(path)):
        match = _LINE.fullmatch(text)
        if match is None:
            raise ValueError(f"{path}:{number}: {text!r}: want 'HOST slots=N'")
        host = Host(match["name"], int(match["slots"]))
        if host.slots == 0:
            raise ValueError(f"{path}:{number}: {text!r}: want at least one slot, or no line for {host.name}")
        machine = host.name.rpartition("@")[2]
        if machine in first_line:
            earlier = f"{machine} is on line {first_line[machine]} already"
            raise ValueError(f"{path}:{number}: {text!r}: {earlier}; give each host one line")
        first_line[machine] = number
        hosts.append(host)
    if not hosts:
        raise ValueError(f"{path}: names no host; write one 'HOST slots=N' a line")
    return hosts


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that say something. Only a line feed ends a line, a carriage return before it or not:
    other characters that Unicode calls line ends would hide the rest of a comment from an editor, but not from us.
    """
    try:
        content = path.read_bytes()
        for mark, encoding in _MARKS.items():
            if content.startswith(mark):
                problem = f"begins with a byte order mark of {encoding}; save it as UTF-8 without one"
                raise ValueError(f"{path}:1: not a readable text file: {problem}")
        lines = content.decode("utf-8").split("\n")
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such hostfile; write one 'HOST slots=N' a line, N = GPUs of that host") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable text file: {error}") from error
    for number, line in enumerate(lines, start=1):
        text = line.split("#", maxsplit=1)[0].strip(" \t\r")
        if text:
            yield number, text


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
