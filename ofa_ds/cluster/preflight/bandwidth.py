"""How fast hosts talk to each other, and which one does not: rings, halved until the bad host is alone; all-reduce.

The same code over NCCL where every host has its GPUs, and over gloo elsewhere. The store by which ranks find each other
is here, outside every group: a host that hangs takes no group's store with it.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Sequence
from typing import Any

from ofa_ds.cluster.preflight import thresholds as at
from ofa_ds.cluster.preflight.channels import Unreachable
from ofa_ds.cluster.preflight.search import Search
from ofa_ds.cluster.preflight.seen import ABSENT, FAIL, PASS, WARN, Seen, Verdict
from ofa_ds.cluster.preflight.survey import Survey

_LOAD_S = 90.0
_REPEATS = 3
RING_BYTES = {"gloo": 2 << 20, "nccl": 256 << 20}
ALL_REDUCE_BYTES = {"gloo": 2 << 20, "nccl": 4 << 30}


class Exchanges:
    """Rounds over the hosts of a survey."""

    def __init__(self, survey: Survey, hosts: Sequence[Seen], store_port: int, backend: str) -> None:
        self.survey, self.backend, self._port = survey, backend, store_port
        self.hosts = {seen.host.name: seen for seen in hosts}
        self.errors: dict[str, str] = {}
        """What a host said last of an exchange that failed."""
        self._rounds = 0

    def within_s(self, num_hosts: int) -> float:
        """For one round. NCCL's first words at thousands of GPUs take ten seconds."""
        return 20.0 if self.backend == "nccl" else 6.0 + num_hosts / 32

    async def round(self, groups: Sequence[Sequence[str]], how: str, num_bytes: int) -> list[list[float]]:
        """For each group the seconds of each host, of its slowest process; infinite where it did not finish."""
        self._rounds += 1
        self.survey.tell(f"exchange, round {self._rounds}: {', '.join(str(len(group)) for group in groups)} hosts")
        return list(await asyncio.gather(*(self._group(i, group, how, num_bytes) for i, group in enumerate(groups))))

    async def _group(self, index: int, group: Sequence[str], how: str, num_bytes: int) -> list[float]:
        devices = {name: self._devices(self.hosts[name]) for name in group}
        shared = {
            "how": how, "num_bytes": num_bytes, "backend": self.backend, "repeats": _REPEATS, "port": self._port,
            "prefix": f"{self._rounds}/{index}", "world_size": sum(map(len, devices.values())),
            "within_s": self.within_s(sum(map(len, devices.values()))),
        }  # fmt: skip
        first, asked = 0, []
        for name in group:
            asked.append(self._host(name, {**shared, "devices": devices[name], "first_rank": first}))
            first += len(devices[name])
        return list(await asyncio.gather(*asked))

    def _devices(self, seen: Seen) -> list[int]:
        return list(seen.host.device_numbers) if self.backend == "nccl" else [0]

    async def _host(self, name: str, details: dict[str, Any]) -> float:
        seen = self.hosts[name]
        network = seen.fact("network") or {}
        chosen = {"TORCH_GLOO_LAZY_INIT": "1"}  # a ring needs no connection from everybody to everybody
        if network["interface"]:  # else gloo goes by the host's name, NCCL by its own guess
            chosen |= {"GLOO_SOCKET_IFNAME": network["interface"], "NCCL_SOCKET_IFNAME": network["interface"]}
        # What the user has set counts, as it does for ranks.
        own = {key: value for key, value in os.environ.items() if key.startswith(("NCCL_", "GLOO_", "UCX_", "FI_"))}
        details |= {"environment": {**chosen, **own}, "address": network["from"]}
        try:
            answer = await self.survey.channel(seen).ask("exchange", details["within_s"] + 15, **details)
        except Unreachable as error:
            seen.problem = str(error)
            return math.inf
        except RuntimeError as error:
            answer = {"seconds": [None], "error": str(error)}
        self.errors[name] = answer["error"]
        return max((math.inf if seconds is None else seconds) for seconds in answer["seconds"])


async def measure(survey: Survey) -> dict[str, Any]:
    """Sets the verdicts of all hosts; returns how they were found, for the report."""
    hosts = survey.answering()
    if not hosts:
        return {}
    backend = "nccl" if survey.fleet().has_gpus else "gloo"
    try:
        store = await asyncio.to_thread(_store)
    except (ImportError, OSError, RuntimeError) as error:
        _all(hosts, Verdict(WARN, f"not measured: no torch store on the launching host: {error}"))
        return {}
    hosts = await _ready(survey, hosts, store.port, backend)
    exchanges = Exchanges(survey, hosts, store.port, backend)
    await _in_hosts(exchanges)
    if len(hosts) < 2:
        _all(hosts, Verdict(ABSENT, "no second host to measure with"))
        return {}
    search = await _between_hosts(exchanges)
    await _over_all(exchanges, [name for name in exchanges.hosts if name not in search.bad | search.unclear])
    return {
        "backend": backend, "rounds": search.rounds, "most_rounds": search.most_rounds, "bad": sorted(search.bad),
        "unclear": sorted(search.unclear), "limit_s": search.limit_s, "num_bytes": RING_BYTES[backend],
    }  # fmt: skip


def _store() -> Any:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of addresses without a name
    from torch.distributed import TCPStore

    return TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)


def _all(hosts: Sequence[Seen], verdict: Verdict) -> None:
    for seen in hosts:
        seen.exchange = seen.all_reduce = verdict


async def _ready(survey: Survey, hosts: Sequence[Seen], port: int, backend: str) -> list[Seen]:
    """Those that have torch imported, their GPUs, and reach the store. Of the others the verdict is set."""
    able: list[Seen] = []

    async def prepare(seen: Seen) -> None:
        address = (seen.fact("network") or {}).get("from")
        try:
            if not address:
                raise RuntimeError("its sshd does not say where the login came from (SSH_CONNECTION)")
            if backend == "nccl" and len(seen.gpus) < seen.host.slots:
                raise RuntimeError("fewer GPUs than slots")
            await survey.channel(seen).ask("connect", survey.wanted.timeout_s, address=address, port=port, within_s=5.0)
            await survey.channel(seen).ask("load", _LOAD_S)
            able.append(seen)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, Unreachable):
                raise
            _all([seen], Verdict(WARN, f"not measured: {error}; the launching host is {address or 'unknown'} to it"))

    await survey.each("torch", prepare, hosts)
    return [seen for seen in hosts if seen in able]


async def _in_hosts(exchanges: Exchanges) -> None:
    """All-reduce over the GPUs of each host, all hosts at once."""
    if exchanges.backend != "nccl":
        for seen in exchanges.hosts.values():
            seen.host_all_reduce = Verdict(ABSENT, "no GPU")
        return
    many = [seen for seen in exchanges.hosts.values() if seen.host.slots > 1]
    num_bytes = ALL_REDUCE_BYTES[exchanges.backend]
    times = await exchanges.round([[seen.host.name] for seen in many], "all_reduce", num_bytes)
    for seen, (seconds,) in zip(many, times, strict=True):
        want = seen.kind.host_all_reduce_GBps if seen.kind else 0.0
        seen.host_all_reduce = _bus_verdict(seconds, num_bytes, seen.host.slots, want, FAIL, exchanges.errors)


def _bus_verdict(
    seconds: float, num_bytes: int, num_ranks: int, want_GBps: float, state: str, errors: dict[str, str]
) -> Verdict:
    """As nccl-tests count: what each link carries, 2 (n - 1) / n of the bytes."""
    if not math.isfinite(seconds):
        said = next((text for text in errors.values() if text), "nothing came back in time")
        return Verdict(FAIL, f"does not finish: {said}")
    found = 2 * (num_ranks - 1) / num_ranks * num_bytes / seconds / 1e9
    text = f"{found:.2f} GB/s over {num_ranks} ranks" + (f"; want {want_GBps:g}" if want_GBps else "")
    return Verdict(state if found < want_GBps else PASS, text)


async def _between_hosts(exchanges: Exchanges) -> Search:
    """Rings and halves; sets each host's verdict."""
    num_bytes = RING_BYTES[exchanges.backend]
    kinds = [
        seen.kind for seen in exchanges.hosts.values() if exchanges.backend == "nccl" and seen.kind and seen.fabric
    ]
    limit_s = num_bytes * 8 / (kinds[0].nic_Gbps * 1e9) if kinds else None
    search = Search(list(exchanges.hosts), at.SLOW_FACTOR, limit_s)
    took: dict[str, list[float]] = {name: [] for name in exchanges.hosts}
    while groups := search.groups():
        times = await exchanges.round(groups, "ring", num_bytes)
        search.learn(groups, times)
        for group, seconds in zip(groups, times, strict=True):
            for name, own in zip(group, seconds, strict=True):
                took[name].append(max(seconds) if name in search.bad else own)
    for name, seen in exchanges.hosts.items():
        seen.exchange = _exchange_verdict(search, name, took[name], num_bytes, exchanges.errors.get(name, ""))
    return search


def _exchange_verdict(search: Search, name: str, took: Sequence[float], num_bytes: int, error: str) -> Verdict:
    """took: the host's seconds in each round; of a bad host, those of the slowest beside it."""
    limit = "no host finished" if search.limit_s is None else f"limit {1000 * search.limit_s:.1f} ms"
    is_bad = name in search.bad | search.unclear
    seconds = took[-1] if is_bad else min(took)
    shown = f"{1000 * seconds:.1f} ms" if math.isfinite(seconds) else f"not finished ({error or 'out of time'})"
    text = f"{num_bytes >> 20} MiB to the next host: {shown}, {limit}"
    if name in search.unclear:
        others = ", ".join(sorted(search.unclear - {name}))
        return Verdict(FAIL, f"it or {others}: no other host is left to tell which; {text}")
    if is_bad:
        return Verdict(FAIL, f"exchanges with it are slow or hang, found in {search.rounds} rounds; {text}")
    if search.unexplained:
        return Verdict(WARN, f"all hosts together were slow once, no part of them was; {text}")
    return Verdict(PASS, text)


async def _over_all(exchanges: Exchanges, names: Sequence[str]) -> None:
    """One all-reduce over the hosts that are left."""
    for name in exchanges.hosts.keys() - set(names):
        exchanges.hosts[name].all_reduce = Verdict(ABSENT, "left out: see exchange")
    hosts = [exchanges.hosts[name] for name in names if not exchanges.hosts[name].problem]
    if len(hosts) < 2:
        for seen in hosts:
            seen.all_reduce = Verdict(ABSENT, "no second host to measure with")
        return
    num_bytes = ALL_REDUCE_BYTES[exchanges.backend]
    (times,) = await exchanges.round([[seen.host.name for seen in hosts]], "all_reduce", num_bytes)
    on_gpus = exchanges.backend == "nccl"
    num_ranks = sum(seen.host.slots for seen in hosts) if on_gpus else len(hosts)
    kind = hosts[0].kind if on_gpus else None
    want = at.GROUP_SHARE * kind.nic_Gbps / 8 * len(hosts[0].fabric) if kind else 0.0
    verdict = _bus_verdict(max(times), num_bytes, num_ranks, want, WARN, exchanges.errors)
    for seen in hosts:
        seen.all_reduce = verdict
