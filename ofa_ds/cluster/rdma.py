"""Which profile of network settings (launchers/rdma/*.env) fits what the hosts have. What a user has set stays.

Facts come from the first host, asked over the channel that ranks are started through, or from what
`ofa-ds preflight --json` saw of every host.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ofa_ds.storage.strict_json import loads

PROFILES = Path(__file__).absolute().parents[2] / "launchers" / "rdma"
_MIN_RATE_GBPS = 40
"""Slower adapters are for management; nobody wants tensors on them."""

PROBE = r"""
hostname -I
for port in /sys/class/infiniband/*/ports/*; do
  [ -e "$port/link_layer" ] || continue
  device=${port%/ports/*}
  driver=$(basename "$(readlink -f "$device/device/driver")")
  echo "port ${device##*/} $driver $(cat "$port/link_layer") $(cat "$port/rate" "$port/state" | tr '\n' ' ')"
done
{ env; cat /etc/nccl.conf "$HOME/.nccl.conf" 2>/dev/null; } | sed -n 's/^\(NCCL_[A-Z0-9_]*\)=.*/set \1/p'
exit 0
"""
"""For `sh` on a host: its addresses in the first line, its RDMA ports, which variables of NCCL are set there."""


@dataclass(frozen=True)
class Port:
    """One port of an RDMA device."""

    device: str
    driver: str
    link_layer: str
    """InfiniBand, Ethernet, or what else the kernel says."""
    rate_gbps: int
    is_active: bool


@dataclass(frozen=True)
class Facts:
    """What a host has for NCCL to speak through."""

    host: str
    ports: tuple[Port, ...]
    efa: bool = False
    is_set: frozenset[str] = frozenset()
    """Variables of NCCL that the host itself sets, in its environment or in nccl.conf."""


def facts_of_probe(host: str, output: str) -> Facts:
    """What `PROBE` printed on that host, without its first line's addresses."""
    ports = []
    for words in (line.split() for line in output.splitlines() if line.startswith("port ")):
        _, device, driver, link_layer, *rest = words
        ports.append(Port(device, driver, link_layer, _rate(rest[0] if rest else ""), "ACTIVE" in rest))
    is_set = frozenset(re.findall(r"^set (NCCL_\w+)$", output, re.MULTILINE))
    return Facts(host, tuple(ports), any(port.driver == "efa" for port in ports), is_set)


def facts_of_preflight(path: str | Path, hosts: Sequence[str]) -> list[Facts]:
    """What `ofa-ds preflight --json` wrote of these hosts. Raises ValueError, one line."""
    try:
        found = {host["name"]: host["rdma"] for host in loads(Path(path).read_bytes())["hosts"]}
        return [_facts_of_json(host, found[host]) for host in hosts]
    except KeyError as error:
        raise ValueError(f"--preflight {path}: has nothing of {error}; run ofa-ds preflight --json again") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--preflight {path}: not what ofa-ds preflight --json prints: {error}") from error


def _facts_of_json(host: str, rdma: dict[str, Any]) -> Facts:
    ports = [
        Port(
            device=str(port["device"]),
            driver=str(port.get("driver") or ""),
            link_layer=str(port["link_layer"]),
            rate_gbps=_rate(str(port["rate"])),
            is_active="ACTIVE" in str(port["state"]),
        )
        for port in rdma["ports"]
    ]
    return Facts(host, tuple(ports), bool(rdma["efa"]))


def _rate(text: str) -> int:
    """`200 Gb/sec (4X HDR)` -> 200."""
    match = re.match(r"[0-9]+", text)
    return int(match[0]) if match else 0


def choose(facts: Facts) -> tuple[str, str]:
    """(name of a profile, why): `efa`, `infiniband`, `roce` or `tcp`.

    Where a host has InfiniBand and Ethernet, the faster of the two counts: the slower is storage or management.
    """
    if facts.efa:
        count = sum(port.driver == "efa" for port in facts.ports)
        return "efa", f"{facts.host} has {count or 'some'} Elastic Fabric Adapters"
    totals = {}
    for layer in ("InfiniBand", "Ethernet"):
        ports = [port for port in facts.ports if port.link_layer == layer and _carries_tensors(port)]
        totals[layer] = (sum(port.rate_gbps for port in ports), len(ports))
    layer = max(totals, key=lambda name: totals[name][0])
    rate, count = totals[layer]
    if not rate:
        idle = f"{len(facts.ports)} RDMA ports, none of them active and fast" if facts.ports else "no RDMA port"
        return "tcp", f"{facts.host} has {idle}"
    name = {"InfiniBand": "infiniband", "Ethernet": "roce"}[layer]
    return name, f"{facts.host} has {count} active {layer} RDMA ports, {rate} Gb/s together"


def _carries_tensors(port: Port) -> bool:
    return port.is_active and port.rate_gbps >= _MIN_RATE_GBPS and "bond" not in port.device


def choose_for_all(facts: Sequence[Facts]) -> tuple[str, str]:
    """`choose` for hosts that are alike. Raises ValueError where they are not: one of them is sick, or not wanted."""
    choices = {each.host: choose(each) for each in facts}
    first = choices[facts[0].host]
    for name, why in choices.values():
        if name != first[0]:
            raise ValueError(
                f"hosts differ in their network: {first[1]}, {why}; leave one kind out (--exclude), or name a profile "
                f"such as --env {PROFILES / 'tcp.env'}"
            )
    return first
