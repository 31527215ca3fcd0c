"""How much memory a process may have, and has: of its GPU, or of this host within the limits that were set for it."""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import NamedTuple

import torch

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_NO_LIMIT = 1 << 60


class Room(NamedTuple):
    what: str
    used: float
    """Bytes."""
    limit: float
    is_shared: bool = False
    """By all ranks of the host."""

    @property
    def left(self) -> float:
        return self.limit - self.used


def rooms(device: torch.device) -> list[Room]:
    """The limits of a rank that computes there, the tightest first. Never raises."""
    try:
        found = _of_gpu(device) if device.type == "cuda" else _of_host()
    except Exception:
        found = []
    return sorted(found, key=lambda room: room.left)


def _of_gpu(device: torch.device) -> list[Room]:
    free, total = torch.cuda.mem_get_info(device)
    return [Room(f"the {torch.cuda.get_device_name(device)}", total - free, total)]


def _of_host() -> list[Room]:
    status, info = _sizes("/proc/self/status"), _sizes("/proc/meminfo")
    found = [Room("this host", info["MemTotal"] - info["MemAvailable"], info["MemTotal"], is_shared=True)]
    for name, limit, used in (
        ("RLIMIT_AS (ulimit -v)", resource.RLIMIT_AS, "VmSize"),
        ("RLIMIT_DATA (ulimit -d)", resource.RLIMIT_DATA, "VmData"),
    ):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            found.append(Room(name, status[used], soft))
    for limit_file, used_file in _CGROUPS:
        try:
            limit_bytes, used_bytes = (int(Path(name).read_text()) for name in (limit_file, used_file))
        except (OSError, ValueError):  # none, or "max"
            continue
        if limit_bytes < _NO_LIMIT:
            found.append(Room("the control group", used_bytes, limit_bytes, is_shared=True))
    return found


def host_memory() -> dict[str, int]:
    """Bytes of this process: resident now and at most, and of virtual memory."""
    sizes = _sizes("/proc/self/status")
    names = {"resident": "VmRSS", "resident at most": "VmHWM", "virtual": "VmSize"}
    return {name: sizes[key] for name, key in names.items() if key in sizes}


def _sizes(path: str) -> dict[str, int]:
    """The sizes of a file of /proc, in bytes."""
    return {name: 1024 * int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", Path(path).read_text(), re.M)}
