"""Which variables the ranks get: those of this environment, then of .deepspeed_env files, then of a script of settings.

The first to set a variable wins. Where nobody names a script, a profile of launchers/rdma/ fills what is left, but for
what a host sets itself. Everything is bytes: a value may hold anything but NUL.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

Environment = dict[bytes, bytes]

_TO_RANKS = re.compile(
    rb"(NCCL_|GLOO_|UCX_|FI_|TORCH_|PYTORCH_|TRITON_|OMP_|DS_|OFA_|MLFLOW_|MV2_|PYTHON)[A-Za-z0-9_]+"
    rb"|CUDA_DEVICE_ORDER|TMPDIR"
)
_OF_THE_HOST = re.compile(rb"CUDA_VISIBLE_DEVICES|LD_LIBRARY_PATH|PATH")
_NEVER_TO_RANKS = re.compile(rb"DS_ENV_FILE|MV2_COMM_WORLD_.*")
"""A setting of the launch itself; who this process is in a job of MPI."""
_SECRET = re.compile(rb"TOKEN|SECRET|PASSW|CREDENTIAL|_KEY|KEY_", re.IGNORECASE)
_NAME = re.compile(rb"[A-Za-z_][A-Za-z0-9_]*")
_FOR_A_SHELL = re.compile(rb"[\"'\\`$]")


def gather(environment: Mapping[bytes, bytes], script: str) -> tuple[Environment, Environment]:
    """(all of the merged environment, what of it the ranks get).

    script: a file for bash to source, which sees all that is set before it; "" for none. Raises ValueError, one line.
    """
    merged = dict(environment)
    names: set[bytes] = set()
    for file in _deepspeed_files(environment):
        for name, value in _settings(file):
            merged.setdefault(name, value)
            names.add(name)
    if script:
        merged = _sourced(script, merged)
    names |= {name for name in merged if _TO_RANKS.fullmatch(name)}
    return merged, {name: merged[name] for name in sorted(names & merged.keys()) if not _NEVER_TO_RANKS.fullmatch(name)}


def filled(of_ranks: Environment, profile: str, set_there: frozenset[str]) -> Environment:
    """What the ranks get, with a profile in the gaps; a variable that a host sets itself is no gap."""
    merged = _sourced(profile, dict(of_ranks) | _for_bash())
    kept = {os.fsencode(name) for name in set_there}
    new = {name: value for name, value in merged.items() if _TO_RANKS.fullmatch(name) and name not in kept}
    return dict(sorted({**new, **of_ranks}.items()))


def of_a_rank(environment: Environment, given: Collection[bytes]) -> Environment:
    """Of all that a rank's engine starts with, what was given to it and what else training reads, for the log."""
    shown = {name for name in environment if name in given or _TO_RANKS.fullmatch(name) or _OF_THE_HOST.fullmatch(name)}
    return {name: environment[name] for name in shown if name != b"OFA_ATTEMPT"}


def lines(environment: Environment) -> list[str]:
    """One line a variable, as a shell would take it; values of what by its name is a password or a key stay away."""
    shown = []
    for name, value in sorted(environment.items()):
        text = "(not shown)" if _SECRET.search(name) else shlex.quote(os.fsdecode(value))
        shown.append(f"{os.fsdecode(name)}={text}".encode("utf-8", "backslashreplace").decode().replace("\n", "\\n"))
    return shown


def _for_bash() -> Environment:
    return {b"PATH": os.environb.get(b"PATH", b"/usr/bin:/bin")}


def _deepspeed_files(environment: Mapping[bytes, bytes]) -> list[Path]:
    """Those that exist, of the directory first: DeepSpeed lets the last one win, which is that one too."""
    name = os.fsdecode(environment.get(b"DS_ENV_FILE") or b".deepspeed_env")
    folders = dict.fromkeys((Path(), Path(os.fsdecode(environment.get(b"HOME", b"")))))
    return [file for file in dict.fromkeys(folder / name for folder in folders) if file.is_file()]


def _settings(file: Path) -> Iterator[tuple[bytes, bytes]]:
    """(name, value) of each line `[export ]NAME=VALUE`; blank lines and `#` comments are left out.

    A value that DeepSpeed would have a shell of each host expand is refused: here values arrive as they are written.
    """
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        text = line.strip()
        if not text or text.startswith(b"#"):
            continue
        name, equals, value = text.partition(b"=")
        name = name.removeprefix(b"export ").strip()
        where = f"{file}:{number}: {os.fsdecode(text)!r}"
        if not equals or not _NAME.fullmatch(name):
            raise ValueError(f"{where}: want NAME=VALUE")
        if _FOR_A_SHELL.search(value):
            raise ValueError(f"{where}: want the value itself: no shell will read quotes, $, \\ or backquotes")
        yield name, value.strip()


def _sourced(script: str, environment: Environment) -> Environment:
    """The environment after bash sourced `script` in it; whatever it prints goes to stderr."""
    path = script if "/" in script else f"./{script}"  # bash would look for a bare name in PATH first
    command = ["bash", "-c", 'set -aeuo pipefail; source "$1" >&2; exec env -0', "bash", path]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    if done.returncode:
        raise ValueError(f"--env {script}: bash ends it with exit code {done.returncode}")
    return dict(entry.split(b"=", maxsplit=1) for entry in done.stdout.split(b"\0") if b"=" in entry)
