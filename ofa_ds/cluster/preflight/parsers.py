"""Reads what nvidia-smi, ibstat, ibv_devinfo and lspci print. Text in, plain records out; nothing is run here."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

_SLOWDOWNS = {
    "sw_power_cap", "hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown",
}  # fmt: skip
_ABSENT = ("", "N/A", "[N/A]", "Not Supported", "[Not Supported]", "Requested functionality has been deprecated")


def gpus_of_xml(text: str, nvlink: str | None = None) -> list[dict[str, Any]]:
    """A record a GPU, from `nvidia-smi -q -x` and `nvidia-smi nvlink -s`.

    Keys: name, uuid, driver, ecc (on?), uncorrected (errors since boot), remap_pending, remap_failed, throttle (names
    of reasons that are active), mig (on?), nvlinks_up, nvlinks_down, temperature. None is: this GPU does not say.
    Raises ValueError with nvidia-smi's own words where it prints no report.
    """
    start = text.find("<?xml")
    try:
        root = ElementTree.fromstring(text[start:]) if start >= 0 else None
    except ElementTree.ParseError as error:
        raise ValueError(f"nvidia-smi breaks off in the middle of its report: {error}") from error
    if root is None:
        raise ValueError(" ".join(text.split())[:200] or "nvidia-smi prints nothing")
    driver = root.findtext("driver_version", "").strip()
    links = links_of(nvlink or "")
    return [_gpu(each, driver, links.get(index)) for index, each in enumerate(root.iter("gpu"))]


def _gpu(gpu: ElementTree.Element, driver: str, links: tuple[int, int] | None) -> dict[str, Any]:
    def text(*paths: str) -> str | None:
        found = (" ".join((gpu.findtext(path) or "").split()) for path in paths)
        return next((each for each in found if each not in _ABSENT), None)

    def flag(*paths: str) -> bool | None:
        value = text(*paths)
        return None if value is None else value in ("Enabled", "Yes", "Active")

    reasons = {  # the list was renamed with driver 535
        each.tag.partition("_reason_")[2] or each.tag.partition("_reasons_")[2]
        for path in ("clocks_event_reasons", "clocks_throttle_reasons")
        for each in gpu.findall(f"{path}/*")
        if (each.text or "").strip() == "Active"
    }
    up, down = links or (0, 0)
    return {
        "name": text("product_name"), "uuid": text("uuid"), "driver": driver,
        "ecc": flag("ecc_mode/current_ecc"),
        "uncorrected": _uncorrected(gpu),
        "remap_pending": flag("remapped_rows/remapped_row_pending"),
        "remap_failed": flag("remapped_rows/remapped_row_failure"),
        "throttle": sorted(reasons & _SLOWDOWNS),
        "mig": flag("mig_mode/current_mig"), "nvlinks_up": up, "nvlinks_down": down,
        "temperature": _integer(text("temperature/gpu_temp")),
    }  # fmt: skip


def _uncorrected(gpu: ElementTree.Element) -> int | None:
    """Volatile uncorrected errors, DRAM and SRAM; newer drivers split those of the SRAM in two."""
    counts = [
        _integer(each.text)
        for each in gpu.findall("ecc_errors/volatile/*")
        if "uncorrectable" in each.tag and "aggregate" not in each.tag
    ]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def links_of(text: str) -> dict[int, tuple[int, int]]:
    """GPU -> (links that are up, links that are down) of `nvidia-smi nvlink -s`."""
    found: dict[int, tuple[int, int]] = {}
    gpu = -1
    for line in text.splitlines():
        if match := re.match(r"GPU (\d+):", line.strip()):
            gpu = int(match[1])
            found[gpu] = (0, 0)
        elif match := re.match(r"Link \d+: (.+)", line.strip()):
            up, down = found.get(gpu, (0, 0))
            found[gpu] = (up + 1, down) if match[1].endswith("GB/s") else (up, down + ("inactive" in match[1]))
    return found


def ibstat(text: str) -> list[dict[str, Any]]:
    """A record a port: device, port, state, physical, rate (Gb/s), link_layer, firmware."""
    ports: list[dict[str, Any]] = []
    device = firmware = ""
    names = {"State": "state", "Physical state": "physical", "Link layer": "link_layer"}
    for line in text.splitlines():
        word = line.strip()
        if match := re.match(r"CA '(.+)'", word):
            device, firmware = match[1], ""
        elif match := re.match(r"Firmware version: (\S+)", word):
            firmware = match[1]
        elif match := re.match(r"Port (\d+):", word):
            ports.append({"device": device, "port": int(match[1]), "firmware": firmware, "rate": None})
        elif ports and (match := re.match(r"([\w ]+): (.*)", word)):
            if match[1] in names:
                ports[-1][names[match[1]]] = match[2]
            elif match[1] == "Rate":
                ports[-1]["rate"] = _integer(match[2])
    return ports


def ibv_devinfo(text: str) -> list[dict[str, Any]]:
    """A record a port: device, port, state, active_mtu, max_mtu (bytes), link_layer, width_x_speed (Gb/s or None)."""
    ports: list[dict[str, Any]] = []
    device = ""
    for line in text.splitlines():
        name, colon, value = (part.strip() for part in line.partition(":"))
        if not colon:
            continue
        if name == "hca_id":
            device = value
        elif name == "port" and value.isdecimal():
            ports.append({"device": device, "port": int(value), "active_mtu": None, "max_mtu": None})
        elif ports and name in ("active_mtu", "max_mtu"):
            ports[-1][name] = _integer(value)
        elif ports and name in ("state", "link_layer"):
            ports[-1][name] = value.split()[0]
    return ports


def rate(text: str) -> int | None:
    """Gb/s of `/sys/class/infiniband/*/ports/*/rate`: `200 Gb/sec (4X HDR)`."""
    return _integer(text)


def state(text: str) -> str:
    """`4: ACTIVE` or `Active` or `PORT_ACTIVE` -> `ACTIVE`; `5: LinkUp` -> `LINKUP`."""
    return text.rpartition(":")[2].strip().upper().removeprefix("PORT_")


def acs_redirects(text: str) -> list[str]:
    """PCI addresses of bridges whose ACS sends peer traffic to the root complex: `ACSCtl: SrcValid+ ... ReqRedir+`."""
    found, bridge = [], ""
    for line in text.splitlines():
        if match := re.match(r"((?:[0-9a-f]{4}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]) (.*)", line):
            bridge = match[1] if match[2].startswith("PCI bridge") else ""
        elif bridge and "ACSCtl:" in line and ("SrcValid+" in line or "ReqRedir+" in line):
            found.append(bridge)
    return found


def acs_is_told(text: str) -> bool:
    """Whether lspci showed any ACS setting: without root it shows none."""
    return "ACSCtl:" in text


XID_FATAL = {
    48: "double-bit ECC error", 62: "firmware halt", 64: "row remapping failed",
    74: "NVLink error", 79: "GPU fell off the bus", 92: "high rate of single-bit errors", 94: "contained ECC error",
    95: "uncontained ECC error", 119: "GSP does not answer", 120: "GSP error", 140: "unrecovered ECC error",
}  # fmt: skip
"""Of NVIDIA's table of XIDs: those that are the machine's fault. Others (13, 31, 43, 45) are mostly a program's."""


def xids(lines: list[str]) -> list[tuple[str, int]]:
    """(PCI address, XID) of lines `NVRM: Xid (PCI:0000:3b:00): 79, pid=...`."""
    matches = (re.search(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+)", line) for line in lines)
    return [(match[1], int(match[2])) for match in matches if match]


def _integer(text: str | None) -> int | None:
    match = re.match(r"\s*(\d+)", text or "")
    return int(match[1]) if match else None
