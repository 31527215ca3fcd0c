"""Verdicts over GPUs and the fabric between hosts. What no host has is absent; what this one alone lacks is a fault."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ofa_ds.cluster.preflight import parsers
from ofa_ds.cluster.preflight import thresholds as at
from ofa_ds.cluster.preflight.seen import ABSENT, FAIL, PASS, WARN, Fleet, Seen, Verdict, same

_NO_GPU = Verdict(ABSENT, "no GPU")
_NO_FABRIC = Verdict(ABSENT, "no RDMA device")
_HARD = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")


def gpu_count(seen: Seen, fleet: Fleet) -> Verdict:
    if not fleet.has_gpus:
        return Verdict(ABSENT, "no host has a GPU")
    try:
        found = len(seen.gpus)
    except ValueError as error:
        return Verdict(FAIL, str(error))
    if found < seen.host.slots:
        return Verdict(FAIL, f"{found} GPUs for {seen.host.slots} slots")
    names = sorted({str(gpu["name"]) for gpu in seen.gpus})
    text = f"{found} GPUs ({', '.join(names)}) for {seen.host.slots} slots"
    return Verdict(WARN if found > seen.host.slots or len(names) > 1 else PASS, text)


def _bad_gpus(seen: Seen, fault: Callable[[dict[str, Any]], str], fine: str, state: str = FAIL) -> Verdict:
    """`fault` says what is wrong with a GPU, or ""."""
    if not seen.has_gpus:
        return _NO_GPU
    try:
        bad = [f"GPU {i} {text}" for i, gpu in enumerate(seen.gpus) if (text := fault(gpu))]
    except ValueError as error:
        return Verdict(FAIL, str(error))
    return Verdict(state, "; ".join(bad)) if bad else Verdict(PASS, fine)


def ecc(seen: Seen, fleet: Fleet) -> Verdict:
    def fault(gpu: dict[str, Any]) -> str:
        if gpu["uncorrected"]:
            return f"has {gpu['uncorrected']} uncorrected errors since it started"
        if gpu["remap_failed"]:
            return "could not remap a bad row"
        if gpu["remap_pending"]:
            return "has a row to remap at its next reset"
        return "has ECC switched off" if gpu["ecc"] is False else ""

    return _bad_gpus(seen, fault, "no uncorrected error, no row to remap")


def xid(seen: Seen, fleet: Fleet) -> Verdict:
    if not seen.has_gpus:
        return _NO_GPU
    lines = seen.fact("kernel_log")
    if lines is None:
        return Verdict(WARN, "this user may not read the kernel's log (dmesg)")
    found = parsers.xids(lines)
    fatal = [f"{number} ({parsers.XID_FATAL[number]}) at {pci}" for pci, number in found if number in parsers.XID_FATAL]
    if fatal:
        return Verdict(FAIL, f"XID {', '.join(sorted(set(fatal)))}")
    if found:
        return Verdict(WARN, f"XID {', '.join(sorted({str(number) for _, number in found}))}: mostly a program's fault")
    return Verdict(PASS, "no XID in the kernel's log")


def throttle(seen: Seen, fleet: Fleet) -> Verdict:
    def hard(gpu: dict[str, Any]) -> str:
        reasons = [reason for reason in gpu["throttle"] if reason in _HARD]
        return f"is slowed down: {', '.join(reasons)}" if reasons else ""

    def soft(gpu: dict[str, Any]) -> str:
        if "sw_thermal_slowdown" in gpu["throttle"]:
            return "is slowed down: sw_thermal_slowdown"
        hot = gpu["temperature"] is not None and gpu["temperature"] >= at.GPU_HOT_CELSIUS
        return f"has {gpu['temperature']} C" if hot else ""

    verdict = _bad_gpus(seen, hard, "at full clocks")
    return _bad_gpus(seen, soft, "at full clocks", WARN) if verdict.state == PASS else verdict


def nvlink(seen: Seen, fleet: Fleet) -> Verdict:
    if not seen.has_gpus:
        return _NO_GPU
    most = max((gpu["nvlinks_up"] for each in fleet.answering for gpu in _gpus_or_none(each)), default=0)
    if not most:
        return Verdict(ABSENT, "no NVLink")

    def fault(gpu: dict[str, Any]) -> str:
        down = gpu["nvlinks_up"] < most or gpu["nvlinks_down"]
        return f"has {gpu['nvlinks_up']} of {most} NVLinks up" if down else ""

    return _bad_gpus(seen, fault, f"{most} NVLinks up on each GPU")


def _gpus_or_none(seen: Seen) -> Sequence[dict[str, Any]]:
    try:
        return seen.gpus
    except ValueError:
        return []


def mig(seen: Seen, fleet: Fleet) -> Verdict:
    return _bad_gpus(seen, lambda gpu: "is cut up by MIG" if gpu["mig"] else "", "off")


def hca(seen: Seen, fleet: Fleet) -> Verdict:
    if not seen.fabric:
        if fleet.has_fabric:
            return Verdict(FAIL, "no RDMA device; other hosts have some")
        return Verdict(ABSENT, "no host has an RDMA device")
    down = [
        f"{port['device']}:{port['port']} is {port['state']}, {port['physical']}"
        for port in seen.fabric
        if port["state"] != "ACTIVE" or port["physical"] != "LINKUP"
    ]
    usual = fleet.usual(lambda each: len(each.fabric) or None)
    if down:
        return Verdict(FAIL, "; ".join(down))
    if len(seen.fabric) < usual:
        return Verdict(FAIL, f"{len(seen.fabric)} ports; most hosts have {usual}")
    flaps = [f"{port['device']} {port['link_downed']} times" for port in seen.fabric if port["link_downed"]]
    if flaps:
        return Verdict(WARN, f"links went down since the host started: {', '.join(flaps)}")
    return Verdict(PASS, f"{len(seen.fabric)} ports active")


def hca_rate(seen: Seen, fleet: Fleet) -> Verdict:
    if not seen.fabric:
        return _NO_FABRIC
    kinds = [each.kind for each in fleet.answering if _gpus_or_none(each) and each.kind]
    told = [port["rate"] for each in fleet.answering for port in each.fabric if port["rate"]]
    want = kinds[0].line_Gbps if kinds else max(told, default=0)
    slow = [f"{port['device']} {port['rate']} Gb/s" for port in seen.fabric if (port["rate"] or 0) < want]
    compute = [port for port in seen.fabric if (port["rate"] or 0) >= want]
    if not compute:
        return Verdict(FAIL, f"want {want} Gb/s: {', '.join(slow)}")
    if len(compute) < (fleet.usual(lambda each: sum((port["rate"] or 0) >= want for port in each.fabric) or None) or 0):
        return Verdict(FAIL, f"want {want} Gb/s: {', '.join(slow)}")
    return Verdict(PASS, f"{len(compute)} ports at {want} Gb/s or more")


def gid(seen: Seen, fleet: Fleet) -> Verdict:
    if not seen.fabric:
        return _NO_FABRIC
    bad = []
    for port in seen.fabric:
        kinds = {kind for _, _, kind in port["gids"]}
        if not port["gids"]:
            bad.append(f"{port['device']} has none")
        elif port["link_layer"] == "Ethernet" and "RoCE v2" not in kinds:
            bad.append(f"{port['device']} has none of RoCE v2")
    if bad:
        return Verdict(FAIL, "; ".join(bad))
    index = {i for port in seen.fabric for i, _, kind in port["gids"] if kind == "RoCE v2"}
    return Verdict(PASS, f"RoCE v2 at index {', '.join(map(str, sorted(index)))}" if index else "on every port")


def mtu(seen: Seen, fleet: Fleet) -> Verdict:
    if not seen.fabric:
        return _NO_FABRIC
    text = (seen.fact("texts") or {}).get("ibv_devinfo")
    told = {port["device"]: port for port in parsers.ibv_devinfo(text or "") if port.get("active_mtu")}
    if not told:
        return Verdict(WARN, "not told: ibv_devinfo is missing (package ibverbs-utils)")
    names = {port["device"] for port in seen.fabric}
    low = [
        f"{name} {port['active_mtu']} of {port['max_mtu']}"
        for name, port in told.items()
        if name in names and port["active_mtu"] < at.IB_MTU_BYTES <= (port["max_mtu"] or 0)
    ]
    return Verdict(WARN, f"MTU {', '.join(low)}") if low else same(seen, fleet, "fabric's MTU", _active_mtu)


def _active_mtu(seen: Seen) -> int | None:
    ports = parsers.ibv_devinfo((seen.fact("texts") or {}).get("ibv_devinfo") or "")
    return min((port["active_mtu"] for port in ports if port.get("active_mtu")), default=None)


def peermem(seen: Seen, fleet: Fleet) -> Verdict:
    if not seen.has_gpus or not seen.fabric:
        return Verdict(ABSENT, "no GPU with an RDMA device")
    if any(port["driver"] == "efa" for port in seen.fabric):
        return Verdict(PASS, "EFA needs none")
    found = [name for name in seen.fact("modules") or [] if name != "gdrdrv"]
    return Verdict(PASS, f"{found[0]} is loaded") if found else Verdict(FAIL, "nvidia_peermem is not loaded")


def acs(seen: Seen, fleet: Fleet) -> Verdict:
    if not seen.has_gpus or not seen.fabric:
        return Verdict(ABSENT, "no GPU with an RDMA device")
    text = (seen.fact("texts") or {}).get("lspci") or ""
    if not parsers.acs_is_told(text):
        return Verdict(WARN, "not told: lspci -vvv shows it to root alone (package pciutils)")
    found = parsers.acs_redirects(text)
    if found:
        return Verdict(FAIL, f"on at {len(found)} PCI bridges, such as {found[0]}")
    return Verdict(PASS, "off")


def numa(seen: Seen, fleet: Fleet) -> Verdict:
    gpus = [node for node in (seen.fact("pci_nodes") or {}).values() if node is not None and node >= 0]
    nics = {port["node"] for port in seen.fabric if port["node"] is not None and port["node"] >= 0}
    if not seen.has_gpus or not seen.fabric:
        return Verdict(ABSENT, "no GPU with an RDMA device")
    if not gpus or not nics:
        return Verdict(WARN, "the firmware does not say which socket GPUs and NICs are on")
    far = sorted(set(gpus) - nics)
    if far:
        return Verdict(WARN, f"GPUs of NUMA node {', '.join(map(str, far))} have no NIC on their socket")
    return Verdict(PASS, f"each GPU has a NIC on its socket ({len(set(gpus))} NUMA nodes)")


def exchange(seen: Seen, fleet: Fleet) -> Verdict:
    return seen.exchange or Verdict(ABSENT, "not measured")


def host_all_reduce(seen: Seen, fleet: Fleet) -> Verdict:
    return seen.host_all_reduce or Verdict(ABSENT, "not measured")


def all_reduce(seen: Seen, fleet: Fleet) -> Verdict:
    return seen.all_reduce or Verdict(ABSENT, "not measured")
