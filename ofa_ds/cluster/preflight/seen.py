"""What was seen of each host and of all together: what the checks judge. Built by `survey`; parsed once, here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any

from ofa_ds.cluster.hostfile import Host
from ofa_ds.cluster.preflight import parsers
from ofa_ds.cluster.preflight.thresholds import Kind, kind_of

PASS, WARN, FAIL, ABSENT = "pass", "warn", "fail", "absent"


@dataclass(frozen=True)
class Verdict:
    state: str
    text: str
    """What was found, with its numbers."""


@dataclass(eq=False)
class Seen:
    """One host."""

    host: Host
    problem: str = ""
    """Why it does not answer; "" where it does."""
    login_s: float = 0.0
    noise: bytes = b""
    facts: dict[str, Any] = field(default_factory=dict)
    """As `probe.facts` makes them."""
    clock: tuple[float, float] | None = None
    """(seconds ahead of the launching machine, largest error of that)."""
    shared: dict[str, str] = field(default_factory=dict)
    """Host that wrote a file -> why that is not seen here, "" where it is."""
    write_speed: float | str | None = None
    """Bytes a second, or why nothing can be written."""
    port: float | str | None = None
    """Seconds to rank 0's port, or why it is not reached; None where that was not tried."""
    exchange: Verdict | None = None
    host_all_reduce: Verdict | None = None
    all_reduce: Verdict | None = None

    def fact(self, name: str) -> Any:
        """None where the host could not say."""
        value = self.facts.get(name)
        return None if isinstance(value, dict) and value.keys() == {"error"} else value

    def trouble(self, name: str) -> str:
        """Why the host could not say it; "" where it could."""
        value = self.facts.get(name)
        return str(value["error"]) if isinstance(value, dict) and value.keys() == {"error"} else ""

    @cached_property
    def gpus(self) -> list[dict[str, Any]]:
        """Records of its GPUs; [] where it has none. Raises ValueError where they do not answer."""
        if self.trouble("gpus"):
            raise ValueError(f"nvidia-smi fails: {self.trouble('gpus')}")
        found = self.fact("gpus")
        if not found:
            return []
        return found["records"] if "records" in found else parsers.gpus_of_xml(found["xml"], found.get("nvlink"))

    @property
    def has_gpus(self) -> bool:
        try:
            return bool(self.gpus)
        except ValueError:
            return True

    @cached_property
    def ports(self) -> list[dict[str, Any]]:
        """Ports of its RDMA devices, by sysfs; ibstat's where sysfs shows none (old containers)."""
        found = self.fact("infiniband")
        if found:
            keys = {"state": parsers.state, "physical": parsers.state, "rate": parsers.rate}
            return [{**port, **{key: change(port[key]) for key, change in keys.items()}} for port in found]
        listed = parsers.ibstat((self.fact("texts") or {}).get("ibstat") or "")
        empty = {"gids": [], "driver": "", "node": None, "link_downed": None, "netdev_mtu": None}
        return [
            {**empty, **port, **{key: parsers.state(port.get(key, "")) for key in ("state", "physical")}}
            for port in listed
        ]

    @property
    def fabric(self) -> list[dict[str, Any]]:
        """Those of `ports` that training would use: InfiniBand, RoCE with a cable, EFA."""
        return [port for port in self.ports if not is_spare(port)]

    @property
    def kind(self) -> Kind | None:
        return kind_of(self.gpus[0]["name"]) if self.has_gpus and self.gpus else None


def is_spare(port: dict[str, Any]) -> bool:
    """An Ethernet port without a cable is no part of the fabric: DPUs and on-board NICs show up as RDMA devices."""
    return port.get("link_layer") == "Ethernet" and port.get("physical") in ("DISABLED", "POLLING")


@dataclass(frozen=True)
class Fleet:
    """All hosts of the hostfile."""

    seen: Sequence[Seen]
    rank_0: str = ""
    """Address and port of rank 0, as text."""

    @property
    def answering(self) -> list[Seen]:
        return [each for each in self.seen if not each.problem]

    def usual(self, of: Callable[[Seen], Any]) -> Any:
        """What most hosts have; of equally many, the first host's. None is no opinion."""
        values = [value for value in map(of, self.answering) if value is not None]
        return Counter(values).most_common(1)[0][0] if values else None

    def median(self, of: Callable[[Seen], float | None]) -> float | None:
        values = [value for value in map(of, self.answering) if value is not None]
        return median(values) if values else None

    @property
    def has_gpus(self) -> bool:
        return any(each.has_gpus for each in self.answering)

    @property
    def has_fabric(self) -> bool:
        return any(each.fabric for each in self.answering)


def same(seen: Seen, fleet: Fleet, what: str, of: Callable[[Seen], Any]) -> Verdict:
    """Fails the few that differ from the many."""
    value, usual = of(seen), fleet.usual(of)
    if usual is None:
        return Verdict(ABSENT, f"no host has {what}")
    if value is None:
        return Verdict(FAIL, f"no {what}; most hosts have {usual}")
    if value != usual:
        return Verdict(FAIL, f"{what} {value}; most hosts have {usual}")
    return Verdict(PASS, f"{what} {value}")


def size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
