"""The hostfile without its bad hosts: comments, spares and order stay."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ofa_ds.cluster.hostfile import read_text, split_spares
from ofa_ds.storage.atomic import replace_file


def without(text: str, bad_hosts: Collection[str]) -> str:
    """`text` less the lines whose host is bad; spares that are bad go too."""
    return "\n".join(line for line in text.split("\n") if _host_of(line) not in bad_hosts)


def _host_of(line: str) -> str:
    words = line.split("#", maxsplit=1)[0].split()
    return words[0] if words else ""


def write_healthy(hostfile: Path, destination: Path, bad_hosts: Collection[str]) -> int:
    """How many hosts are left, spares too. `destination` may be the hostfile itself; it is whole at any moment.

    Raises RuntimeError where nobody is left to start on; `destination` is then as it was.
    """
    text = without(hostfile.read_text(encoding="utf-8"), bad_hosts)
    try:
        working, spares = split_spares(read_text(text.encode(), str(hostfile)), str(hostfile))
    except ValueError as error:
        raise RuntimeError(f"{destination}: not written: no healthy host is left to start on") from error
    replace_file(destination, text)
    return len(working) + len(spares)
