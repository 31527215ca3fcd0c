"""Starts ranks on the hosts of a hostfile through DeepSpeed's launcher (pdsh over ssh), which quotes nothing.

The launcher makes one line for the shell of each host from: the path of the interpreter, its own working directory,
names and addresses of hosts, every variable whose name begins with PYTHON, MLFLOW, MV2, UCX (NCCL on GPUs), and the
arguments of the program. So it gets few of them, checked, and a word that holds all the rest (`parcel`).

    python -m ofa_ds.cluster.launch prepare HOSTFILE SCRIPT [ARGUMENT ...]   checks; prints "ADDRESS PORT WORD"
    python -m ofa_ds.cluster.launch start HOSTFILE ADDRESS PORT WORD         becomes the launcher

SCRIPT: settings that bash is to source; empty for none.
Exit code 2 and one line: wrong input; 1 and one line: a host that ssh does not reach.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from ofa_ds.cluster import parcel
from ofa_ds.cluster.environment import Environment, gather
from ofa_ds.cluster.hostfile import Host, parse_hostfile

CHECKOUT = Path(__file__).absolute().parents[2]

_DEEPSPEED_FORWARDS = ("MLFLOW", "PYTHON", "MV2", "UCX")

_PYTHON = re.compile(r"PYTHON[A-Za-z0-9_]+")
_SAFE = re.compile(r"[\w@+=:,./-]+")
"""What neither a shell nor pdsh (which replaces %h, %n, %u) reads as anything but itself."""
_DEFAULT_PORT = 29500
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
_MAX_COMMAND = 128 * 1024
"""Bytes of one argument on Linux: the shell of the other host gets the whole command as one."""


def prepare(hosts: Sequence[Host], script: str, arguments: Sequence[bytes]) -> tuple[str, int, str]:
    """(address of rank 0, port, word), all safe in a shell, from this process's environment and directory.

    Raises ValueError for what the launcher cannot carry, RuntimeError where ssh does not reach the first host.
    """
    for what, path in (("the interpreter (PYTHON)", sys.executable), ("this checkout", str(CHECKOUT))):
        if not _SAFE.fullmatch(path):
            reason = f"DeepSpeed's launcher cannot carry {_first_unsafe(path)!r} in its path"
            raise ValueError(f"{what} {path!r}: {reason}; use a path of letters, digits and _@+=:,./- on every host")
    if _log_level() not in _LOG_LEVELS:
        raise ValueError(f"OFA_LAUNCH_LOG {_log_level()!r}: want one of {', '.join(_LOG_LEVELS)}")
    here, of_ranks = gather(os.environb, script)
    port = _port(os.fsdecode(here.get(b"MASTER_PORT", b"")))
    word = parcel.pack(parcel.Parcel(directory=os.getcwdb(), arguments=tuple(arguments), environment=of_ranks))
    _refuse_long(hosts, word, of_ranks)
    return _address(hosts[0].name, os.fsdecode(here.get(b"MASTER_ADDR", b""))), port, word


def _refuse_long(hosts: Sequence[Host], word: str, environment: Environment) -> None:
    """DeepSpeed also lists all hosts and their slots in the command: JSON in base64."""
    listing = sum(len(host.name) + 8 + 5 * host.slots for host in hosts) * 4 // 3
    size = len(word) + listing + 4 * len(str(CHECKOUT)) + 2048
    if size > _MAX_COMMAND:
        longest = max(environment, key=lambda name: len(environment[name])).decode()
        raise ValueError(
            f"the command for each host would have {size} bytes, {len(word)} of them arguments, directory and "
            f"variables; Linux takes {_MAX_COMMAND}: use a recipe file for long overrides, shorten {longest}"
        )


def _log_level() -> str:
    return os.environ.get("OFA_LAUNCH_LOG", "warning")


def _first_unsafe(text: str) -> str:
    return next(character for character in text if not _SAFE.fullmatch(character))


def _port(text: str) -> int:
    if not text:
        return _DEFAULT_PORT
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise ValueError(f"MASTER_PORT {text!r}: want a number from 1 to 65535")
    return int(text)


def _address(first_host: str, wanted: str) -> str:
    """`wanted`, else the first address that the first host says it has. Either way ssh must reach the host."""
    command = ["ssh", "-n", "-o", "BatchMode=yes", "--", first_host, "hostname -I"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise RuntimeError(f"want ssh to start ranks on other hosts: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"{first_host}: ssh does not get there by key: {lines[-1]}")
    address = wanted or next(iter(done.stdout.split()), "")
    if not _SAFE.fullmatch(address):
        raise ValueError(f"MASTER_ADDR {address!r}: want a name or address of {first_host} that all hosts know")
    return address


def start(hosts: Sequence[Host], address: str, port: int, word: str) -> NoReturn:
    """Become DeepSpeed's launcher. It gets the hosts that were checked, not the file: its reader takes other lines."""
    listing = os.memfd_create("hosts", 0)  # kept over exec
    os.write(listing, "".join(f"{host.name} slots={host.slots}\n" for host in hosts).encode())
    environment = _environment_of_launcher(os.environ)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", f"/proc/self/fd/{listing}"]
    # --force_multi: with one host DeepSpeed would run here instead of there. ssh was tried by `prepare`.
    command += ["--launcher", "pdsh", "--force_multi", "--no_ssh_check", "--master_addr", address]
    command += ["--master_port", str(port), "--log_level", _log_level()]
    os.chdir(CHECKOUT)  # where the launcher says `cd` to
    os.execve(sys.executable, [*command, "--module", "ofa_ds.pretrain", f"{parcel.OPTION}{word}"], environment)


def _environment_of_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Of the variables that it would forward, only PYTHON* with values that no shell changes: perhaps it needs them to
    find DeepSpeed. The ranks start anew with those of the word, which has them all.
    """
    safe = {
        name: value
        for name, value in environment.items()
        if not name.startswith(_DEEPSPEED_FORWARDS) or (_PYTHON.fullmatch(name) and _SAFE.fullmatch(value))
    }
    safe["PYTHONPATH"] = ":".join(filter(_SAFE.fullmatch, environment.get("PYTHONPATH", "").split(":")))
    # The launcher itself computes nothing, and a GPU's would forward NCCL*. The null device is no file of settings.
    return {**safe, "DS_ACCELERATOR": "cpu", "DS_ENV_FILE": os.devnull}


def main(arguments: Sequence[str]) -> int:
    """Run one of the two commands; returns the exit code."""
    command, hostfile, *rest = arguments
    try:
        hosts = parse_hostfile(hostfile)
        if command == "start":
            address, port, word = rest
            start(hosts, address, int(port), word)
        script, *words = rest
        print(*prepare(hosts, script, [os.fsencode(word) for word in words]))
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
