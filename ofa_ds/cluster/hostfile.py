"""Hostfiles: one `[USER@]HOST slots=N` a line, `#` starts a comment. Read strictly, before anything is started.

A line that ends in `# spare` is a host that waits: none of its ranks is started until it takes the place of one that
failed. `choose` filters hosts and their GPUs as DeepSpeed's --include and --exclude do.

DeepSpeed's own reader takes a missing file for "run here" and `slots=8x` for 8; here each is an error with its line.
tests/unit/test_hostfile_against_deepspeed.py lists every difference.

    python -m ofa_ds.cluster.hostfile FILE     prints "HOSTS RANKS", such as "4 32"
"""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

_LINE = re.compile(
    r"(?P<name>(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.:-]*)[ \t]+slots=(?P<slots>[0-9]{1,6})"
)
_SPARE = "spare"
_MARKS = {codecs.BOM_UTF8: "UTF-8", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


@dataclass(frozen=True)
class Host:
    name: str
    """Name or address, as ssh takes it; `user@` before it where the login is another one there."""
    slots: int
    """Ranks to start there: one per GPU."""
    devices: tuple[int, ...] = ()
    """Which GPUs of that host, by number, in rank order; () for the first `slots`."""
    spare: bool = field(default=False, kw_only=True)
    """Waits until another host fails."""

    @property
    def machine(self) -> str:
        """The name without a user."""
        return self.name.rpartition("@")[2]

    @property
    def device_numbers(self) -> tuple[int, ...]:
        return self.devices or tuple(range(self.slots))


def parse_hostfile(path: str | Path) -> list[Host]:
    """The hosts that ranks start on, in the file's order, without the spares; rank 0 runs on the first.

    Raises ValueError as `read_hostfile` does, and where all hosts are spares.
    """
    return split_spares(read_hostfile(path), str(path))[0]


def read_hostfile(path: str | Path) -> list[Host]:
    """All hosts, spares too, in the file's order.

    Raises ValueError, one line that begins with `file:line:`, for a missing or empty file, a byte order mark,
    a malformed line, a host named twice (under two users too: one line is all that its GPUs take), or zero slots.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such hostfile; write one 'HOST slots=N' a line, N = GPUs of that host") from error
    except OSError as error:
        raise ValueError(f"{path}: not a readable text file: {error}") from error
    return read_text(content, str(path))


def read_text(content: bytes, path: str) -> list[Host]:
    """`read_hostfile` of what stands in the file `path`."""
    first_line: dict[str, int] = {}
    hosts: list[Host] = []
    for number, text, comment in _lines(content, path):
        match = _LINE.fullmatch(text)
        if match is None:
            raise ValueError(f"{path}:{number}: {text!r}: want 'HOST slots=N'")
        host = Host(match["name"], int(match["slots"]), spare=comment == _SPARE)
        if host.slots == 0:
            raise ValueError(f"{path}:{number}: {text!r}: want at least one slot, or no line for {host.name}")
        if host.machine in first_line:
            earlier = f"{host.machine} is on line {first_line[host.machine]} already"
            raise ValueError(f"{path}:{number}: {text!r}: {earlier}; give each host one line")
        first_line[host.machine] = number
        hosts.append(host)
    if not hosts:
        raise ValueError(f"{path}: names no host; write one 'HOST slots=N' a line")
    return hosts


def split_spares(hosts: Iterable[Host], path: str) -> tuple[list[Host], list[Host]]:
    """(those that ranks start on, those that wait). Raises ValueError where none is left to start on."""
    working, spares = [], []
    for host in hosts:
        (spares if host.spare else working).append(host)
    if not working:
        raise ValueError(f"{path}: names spares only; take '# spare' from the lines of hosts that are to train")
    return working, spares


def _lines(content: bytes, path: str) -> Iterator[tuple[int, str, str]]:
    """(number, text, comment) of the lines that say something. Only a line feed ends a line, a carriage return before
    it or not: other characters that Unicode calls line ends would hide the rest of a comment from us, not an editor.
    """
    for mark, encoding in _MARKS.items():
        if content.startswith(mark):
            problem = f"begins with a byte order mark of {encoding}; save it as UTF-8 without one"
            raise ValueError(f"{path}:1: not a readable text file: {problem}")
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{number}: not a readable text file: {error}") from error
    for number, line in enumerate(lines, start=1):
        text, _, comment = (part.strip(" \t\r") for part in line.partition("#"))
        if text:
            yield number, text, comment


def choose(hosts: Sequence[Host], include: str, exclude: str) -> list[Host]:
    """Those of `hosts` that a filter leaves, in their order, with the GPUs that it leaves of each.

    A filter is `HOST[:GPU[,GPU ...]][@HOST ...]` as in DeepSpeed's --include and --exclude, of which one may be given;
    a host's `user@` may stand in it or not. "" is no filter. Raises ValueError, one line that begins with the option.
    """
    if include and exclude:
        raise ValueError(f"--include {include!r} and --exclude {exclude!r}: want one of them, not both")
    if not include and not exclude:
        return list(hosts)
    option, text = ("--include", include) if include else ("--exclude", exclude)
    named = _named(f"{option} {text!r}", text, {host.machine: host for host in hosts})
    left = []
    for host in hosts:
        numbers = host.device_numbers
        if include:
            chosen = named.get(host.machine, None)
            numbers = () if chosen is None else chosen or numbers
        elif host.machine in named:
            numbers = tuple(n for n in numbers if n not in named[host.machine]) if named[host.machine] else ()
        if numbers:
            devices = () if numbers == tuple(range(host.slots)) else numbers
            left.append(replace(host, slots=len(numbers), devices=devices))
    if not left:
        raise ValueError(f"{option} {text!r}: leaves no host of {', '.join(host.name for host in hosts)[:200]}")
    return left


def _named(where: str, text: str, hosts: Mapping[str, Host]) -> dict[str, tuple[int, ...]]:
    """Machine -> GPUs that a filter names for it, in order; () for all. Several parts of one host add up."""
    users = {host.name.rpartition("@")[0] for host in hosts.values()} - {""}
    named: dict[str, tuple[int, ...]] = {}
    parts = text.split("@")
    for i, part in enumerate(parts):
        if part in users and part not in hosts and i + 1 < len(parts):  # `user@host`: the next part is the host
            continue
        name, numbers = _part(where, part, hosts)
        named[name] = tuple(sorted({*named.get(name, ()), *numbers}))
    return named


def _part(where: str, part: str, hosts: Mapping[str, Host]) -> tuple[str, tuple[int, ...]]:
    if part in hosts:  # an address of IPv6 has colons of its own
        return part, ()
    name, colon, numbers = part.rpartition(":")
    name = name if colon else part
    if name not in hosts:
        raise ValueError(f"{where}: {name!r} is not in the hostfile; it has {', '.join(hosts)[:200]}")
    if not re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})*", numbers):
        raise ValueError(f"{where}: {part!r}: want HOST or HOST:GPU[,GPU ...]")
    wanted = tuple(map(int, numbers.split(",")))
    missing = [number for number in wanted if number not in hosts[name].device_numbers]
    if missing:
        raise ValueError(f"{where}: {name} has no GPU {missing[0]}; its slots={hosts[name].slots} are numbered from 0")
    return name, wanted


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
