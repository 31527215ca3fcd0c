"""Where a run takes place: versions, devices, hosts, code, command. Of each rank; what differs between them is told.

Nothing of it is a secret: variables are those that training reads, by name, and of these a password's or a key's value
stays away, as does one inside an address.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).parents[2]
_PACKAGES = (
    "ofa-ds", "torch", "deepspeed", "triton", "numpy", "pyarrow", "pillow", "simplejpeg", "tokenizers", "pydantic",
    "tensorboard", "xxhash",
)  # fmt: skip
_READ = re.compile(
    r"(NCCL|GLOO|UCX|FI|TORCH|PYTORCH|TRITON|OMP|MKL|DS|OFA|CUDA|CUBLAS|SLURM|PYTHON|MASTER|DEEPSPEED)_[A-Z0-9_]+"
    r"|OMP_NUM_THREADS|PYTHONPATH|PYTHONHASHSEED|RANK|WORLD_SIZE|LD_LIBRARY_PATH|PATH|TMPDIR|HOSTNAME|TOKENIZERS_PARALLELISM"
)  # fmt: skip
"""Variables that training, its libraries or its launcher read. All others stay away unseen."""
_SECRET = re.compile(r"TOKEN(?!IZERS)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|KEY|COOKIE|JWT|NETRC", re.IGNORECASE)
"""In the name of what must not be seen."""
_LEAST_SECRET = 8
"""Characters; shorter values are words that stand elsewhere by chance."""
_NEVER = frozenset({"OFA_ATTEMPT"})
"""Who is of an attempt of `ofa-ds launch`: of no use later."""
HIDDEN = "(not shown)"
_LOGIN = re.compile(r"(?<=://)[^/\s]+@")
_ASSIGNED = re.compile(r"(?P<name>[\w.-]+)=")
_MAX_DIFFERENT = 8
"""Kinds of ranks that are told apart."""
_GIT_S = 5


def of_this_rank(device: torch.device, *, with_code: bool) -> dict[str, Any]:
    """What should be alike on all ranks. with_code: read the sources too, for which one rank of a host is enough."""
    found: dict[str, Any] = {"python": platform.python_version(), "system": _system()}
    found |= {name: version for name in _PACKAGES if (version := _version(name)) is not None}
    found["device"] = device_name(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device_memory_bytes": properties.total_memory,
            "device_capability": f"{properties.major}.{properties.minor}",
            "driver": _driver(), "cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version()),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }  # fmt: skip
    if with_code:
        found["code"] = code_hash()
    return found


def device_name(device: torch.device) -> str:
    """As `report_peak.peak_of` takes it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def of_all_ranks(mine: Mapping[str, Any], host: str, gather: Callable[[Any], list[Any]]) -> dict[str, Any]:
    """{hosts: [of each rank], devices: likewise, differences: lines}; all ranks call it together.

    A name, a device and a digest travel of each rank; only of kinds that differ from rank 0's, their content, once.
    """
    digest = hashlib.sha256(json.dumps({**mine, "code": None}, sort_keys=True).encode()).hexdigest()[:16]
    ranks = gather((host, mine["device"], digest, mine.get("code")))
    digests = [each[2] for each in ranks]
    others = list(dict.fromkeys(each for each in digests if each != digests[0]))
    lines = [*_other_code(ranks)]
    if others:  # all ranks see it alike
        firsts = {digests.index(each): each for each in [digests[0], *others[:_MAX_DIFFERENT]]}
        told = gather([dict(mine) if digest == each else None for each in firsts.values()])
        zero = told[0][0]
        for place, (rank, each) in enumerate(list(firsts.items())[1:], start=1):
            lines.append(_difference(rank, ranks[rank][0], digests.count(each), zero, told[rank][place] or {}))
        if len(others) > _MAX_DIFFERENT:
            lines.append(f"{len(others) - _MAX_DIFFERENT} further kinds of ranks differ too")
    return {"hosts": [each[0] for each in ranks], "devices": [each[1] for each in ranks], "differences": lines}


def _other_code(ranks: list[tuple[str, str, str, str | None]]) -> Iterator[str]:
    for rank, (host, _, _, code) in enumerate(ranks):
        if code is not None and code != ranks[0][3]:
            yield f"rank {rank} on {host} runs other code than rank 0: {code[:12]}, not {(ranks[0][3] or '')[:12]}"
            return


def _difference(rank: int, host: str, count: int, zero: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    names = [name for name in sorted({*zero, *other} - {"code"}) if zero.get(name) != other.get(name)]
    told = ", ".join(f"{name} {other.get(name)} (rank 0: {zero.get(name)})" for name in names)
    ranks = "" if count == 1 else f" and {count - 1} more"
    return f"rank {rank}{ranks} on {host} differs from rank 0: {told}"


def code_hash() -> str:
    """SHA-256 of all sources of ofa_ds and its kernels, by their place in the package."""
    total = hashlib.sha256()
    for package in (_ROOT / "ofa_ds", _kernels()):
        for file in sorted(package.rglob("*.py")):
            try:
                content = hashlib.sha256(file.read_bytes()).hexdigest()
            except OSError:  # an editor's lock is a link to nothing
                continue
            total.update(f"{package.name}/{file.relative_to(package).as_posix()} {content}\n".encode())
    return total.hexdigest()


def _kernels() -> Path:
    found = importlib.util.find_spec("ofa_kernels")  # in kernels/ of a checkout, beside ofa_ds once installed
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def checkout() -> dict[str, Any]:
    """Commit of the sources, and whether they have changed since; {} where they are no checkout of git."""
    if not (_ROOT / ".git").exists():
        return {}
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", "ofa_ds", "kernels", "ds_configs")
    return {} if commit is None else {"commit": commit, "changed": None if changed is None else bool(changed)}


def _git(*arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(_ROOT), *arguments]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=_GIT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else None


def machine() -> dict[str, Any]:
    """Of this host."""
    return {
        "platform": platform.platform(), "processor": _first("/proc/cpuinfo", r"model name\s*:\s*(.+)"),
        "cores": os.cpu_count(), "cores_allowed": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }  # fmt: skip


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those that training reads, by name; what is a secret by its name, or inside an address, is not shown."""
    return {
        name: HIDDEN if _SECRET.search(name) else without_secrets(value)
        for name, value in sorted(environment.items())
        if _READ.fullmatch(name) and name not in _NEVER
    }


def without_secrets(text: str) -> str:
    """`https://me:word@host` without who and word; `api_key=word` without the word."""
    found = _ASSIGNED.match(text.lstrip("-"))
    if found and _SECRET.search(found["name"]):
        return f"{text[: text.index('=')]}={HIDDEN}"
    return _LOGIN.sub(f"{HIDDEN}@", text).encode("utf-8", "backslashreplace").decode()


def scrubbed(text: str, environment: Mapping[str, str]) -> str:
    """Without the values of the environment's secrets, wherever they stand: on a command line, in a path."""
    for name, value in environment.items():
        if _SECRET.search(name) and len(value) >= _LEAST_SECRET and re.search("[A-Za-z]", value):
            for form in {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}:
                text = text.replace(form, HIDDEN)
    return text


def command() -> dict[str, Any]:
    """How this process was started, and where."""
    try:
        directory = os.getcwd()
    except OSError:
        directory = None  # it was removed
    hidden = [re.sub(r"(?<=^--encoded=).*", HIDDEN, without_secrets(each)) for each in sys.orig_argv]
    return {"arguments": hidden, "directory": directory, "interpreter": sys.executable}


def _system() -> str:
    return f"{platform.system()} {platform.machine()}"


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    return _first("/proc/driver/nvidia/version", r"Kernel Module(?: for \S+)?\s+(\S+)")


def _first(file: str, pattern: str) -> str | None:
    try:
        found = re.search(pattern, Path(file).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return found[1].strip() if found else None
