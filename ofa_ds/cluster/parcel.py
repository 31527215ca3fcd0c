"""What a rank on another host needs - directory, arguments, environment - as one word that no shell can misread.

`ofa-ds launch` needs none of this. It is for DeepSpeed's own launcher, which joins words into a command for the shell
of the other host and quotes next to nothing:

    deepspeed --hostfile HOSTS --module ofa_ds.pretrain $(python -m ofa_ds.cluster.parcel RECIPE [KEY=VALUE ...])

The word has letters, digits, `-` and `_` only; `ofa_ds.pretrain --encoded=WORD` opens it there (ofa_ds.finetune too).
Everything inside is bytes, so it arrives as it was typed whatever the locale of either host.
"""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from ofa_ds.cluster.environment import gather

OPTION = "--encoded="
_MAX_WORD = 96 * 1024
"""Bytes. Linux takes 128 KiB as one argument: the shell of the other host gets its whole command as one."""

_OF_THE_LAUNCHER = frozenset(
    b"RANK LOCAL_RANK WORLD_SIZE LOCAL_SIZE CROSS_RANK CROSS_SIZE MASTER_ADDR MASTER_PORT CUDA_VISIBLE_DEVICES".split()
)
"""Set for each rank by deepspeed.launcher.launch, whatever a parcel says."""


@dataclass(frozen=True, kw_only=True)
class Parcel:
    directory: bytes
    """Where relative paths start."""
    arguments: tuple[bytes, ...]
    """Those of `ofa-ds pretrain`, or of what opens it."""
    environment: dict[bytes, bytes]


def pack(parcel: Parcel) -> str:
    """The word. Latin-1 gives each byte a character of its own, so JSON keeps them all."""
    content = {
        "directory": parcel.directory.decode("latin-1"),
        "arguments": [argument.decode("latin-1") for argument in parcel.arguments],
        "environment": {name.decode("latin-1"): value.decode("latin-1") for name, value in parcel.environment.items()},
    }
    return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")


def unpack(word: str) -> Parcel:
    """Inverse of `pack`. Raises ValueError, one line, for anything that `pack` did not make."""
    try:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", word):
            raise ValueError("want letters, digits, - and _ only")
        content = json.loads(base64.urlsafe_b64decode(word + "=" * (-len(word) % 4)))
        return Parcel(
            directory=content["directory"].encode("latin-1"),
            arguments=tuple(argument.encode("latin-1") for argument in content["arguments"]),
            environment={
                name.encode("latin-1"): value.encode("latin-1") for name, value in content["environment"].items()
            },
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{OPTION}{word[:40]!r}: not what ofa_ds.cluster.parcel prints: {error}") from error


def start(word: str, module: str) -> NoReturn:
    """Become the rank that `word` describes: `module` in its directory, with its environment and arguments.

    A new interpreter, since PYTHON* and library settings count only at a start. Raises ValueError for a wrong word,
    RuntimeError where this host lacks the directory.
    """
    parcel = unpack(word)
    environment = dict(os.environb)
    environment |= {name: value for name, value in parcel.environment.items() if name not in _OF_THE_LAUNCHER}
    # Over ssh a login has its own PATH; compiled extensions look for ninja beside the interpreter.
    environment[b"PATH"] = b":".join([os.fsencode(os.path.dirname(sys.executable)), environment.get(b"PATH", b"/bin")])
    arguments = [os.fsencode(sys.executable), b"-u", b"-m", os.fsencode(module), *parcel.arguments]
    try:
        os.chdir(parcel.directory)
        os.execve(sys.executable, arguments, environment)
    except OSError as error:
        where = f"host {socket.gethostname()}, directory {os.fsdecode(parcel.directory)!r}"
        raise RuntimeError(f"{where}: {error.strerror}; every host needs the directory of the launch") from error


def main(arguments: Sequence[str]) -> int:
    """Print the word for these arguments, this directory and this environment; 0, or 2 and one line on stderr."""
    try:
        _, of_ranks = gather(os.environb, "")
        inside = Parcel(directory=os.getcwdb(), arguments=tuple(map(os.fsencode, arguments)), environment=of_ranks)
        word = pack(inside)
        if len(word) > _MAX_WORD:
            longest = max(of_ranks, key=lambda name: len(of_ranks[name]), default=b"").decode()
            what = f"arguments, directory and variables (the longest: {longest}) make a word of {len(word)} bytes"
            raise ValueError(f"{what}, {_MAX_WORD} are sure to arrive; use a recipe file, or ofa-ds launch")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{OPTION}{word}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
