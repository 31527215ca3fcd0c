"""What a host's kernel and NVML say of its GPUs and fabric; sent there with the probe. Standard library, pynvml."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import struct
from pathlib import Path
from typing import Any

_SIOCGIFADDR = 0x8915
_NUM_NVLINKS = 18
THROTTLE_BITS = {
    0x4: "sw_power_cap", 0x8: "hw_slowdown", 0x20: "sw_thermal_slowdown", 0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
}  # fmt: skip
"""NVML's clocks event reasons that mean: slower than it could be. Names are nvidia-smi's."""


def interface_of(address: str) -> str:
    """The network interface that has this address; "" where none has."""
    if ":" in address:
        wanted = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            words = line.split()
            if words[0] == wanted:
                return words[-1]
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""


def infiniband(root: str = "/sys/class/infiniband") -> list[dict[str, Any]] | None:
    """The ports of all RDMA devices; None where the kernel has none. Values are the kernel's words."""
    base = Path(root)
    if not base.is_dir():
        return None
    ports = []
    for device in sorted(base.iterdir()):
        driver = os.path.basename(os.path.realpath(device / "device" / "driver"))
        for port in sorted((device / "ports").iterdir(), key=lambda each: int(each.name)):
            ports.append(
                {
                    "device": device.name, "port": int(port.name), "driver": driver,
                    "node": _number(_line(device / "device" / "numa_node")),
                    "state": _line(port / "state"), "physical": _line(port / "phys_state"),
                    "rate": _line(port / "rate"), "link_layer": _line(port / "link_layer"),
                    "link_downed": _number(_line(port / "counters" / "link_downed")), "gids": _gids(port),
                    "netdev_mtu": _netdev_mtu(device),
                }
            )  # fmt: skip
    return ports


def _line(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?[0-9]+", text) else None


def _gids(port: Path) -> list[tuple[int, str, str]]:
    """(index, GID, "IB/RoCE v1" or "RoCE v2") of those that are set."""
    found = []
    for file in sorted((port / "gids").glob("[0-9]*"), key=lambda each: int(each.name)):
        gid = _line(file)
        if gid and set(gid) != {"0", ":"}:
            found.append((int(file.name), gid, _line(port / "gid_attrs" / "types" / file.name)))
    return found[:64]


def _netdev_mtu(device: Path) -> int | None:
    for netdev in sorted((device / "device" / "net").glob("*")):
        return _number(_line(netdev / "mtu"))
    return None


def gpu_nodes() -> dict[str, int | None]:
    """NUMA node of each NVIDIA GPU by PCI address; -1 where the firmware does not say."""
    found = {}
    for device in sorted(Path("/sys/bus/pci/devices").glob("*")):
        if _line(device / "vendor") == "0x10de" and _line(device / "class").startswith("0x03"):
            found[device.name] = _number(_line(device / "numa_node"))
    return found


def modules() -> list[str]:
    """Those of the loaded kernel modules that let a NIC read a GPU's memory."""
    return [name for name in ("nvidia_peermem", "nv_peer_mem", "gdrdrv") if Path("/sys/module", name).is_dir()]


def nvml_records() -> list[dict[str, Any]]:
    """One record a GPU, as `parsers.gpus_of_xml` makes them. Raises ImportError or NVMLError."""
    import pynvml as nvml

    nvml.nvmlInit()
    try:
        driver = _word(nvml.nvmlSystemGetDriverVersion())
        return [_record(nvml, i, driver) for i in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()


def _word(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _record(nvml: Any, index: int, driver: str) -> dict[str, Any]:
    def maybe(name: str, *arguments: Any) -> Any:
        """None where this GPU or this driver has no such thing."""
        try:
            return getattr(nvml, name)(handle, *arguments)
        except (nvml.NVMLError, AttributeError):
            return None

    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    rows = maybe("nvmlDeviceGetRemappedRows")
    links = [maybe("nvmlDeviceGetNvLinkState", link) for link in range(_NUM_NVLINKS)]
    reasons = maybe("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
    mig = maybe("nvmlDeviceGetMigMode")
    uncorrected = maybe("nvmlDeviceGetTotalEccErrors", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
    mode = maybe("nvmlDeviceGetEccMode")
    return {
        "name": _word(nvml.nvmlDeviceGetName(handle)), "uuid": _word(nvml.nvmlDeviceGetUUID(handle)), "driver": driver,
        "ecc": bool(mode[0]) if mode else None, "uncorrected": uncorrected,
        "remap_pending": bool(rows[2]) if rows else None, "remap_failed": bool(rows[3]) if rows else None,
        "throttle": [name for bit, name in THROTTLE_BITS.items() if reasons & bit],
        "mig": bool(mig[0]) if mig else None,
        "nvlinks_up": links.count(1), "nvlinks_down": links.count(0),
        "temperature": maybe("nvmlDeviceGetTemperature", 0),
    }  # fmt: skip
