"""Speed between hosts: a round of real processes on one host, and what is made of times of GPU hosts."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import pytest
from preflight_hosts import cpu_facts, fleet, gpu_facts
from test_preflight_channels import far_end, through  # noqa: F401  far_end is a fixture

from ofa_ds.cluster.preflight import bandwidth
from ofa_ds.cluster.preflight.channels import Channel
from ofa_ds.cluster.preflight.seen import ABSENT, FAIL, PASS, WARN, Fleet


def test_processes_of_one_host_exchange_and_each_round_is_new(far_end: Any) -> None:  # noqa: F811
    from torch.distributed import TCPStore

    far_end("")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "backend": "gloo", "num_bytes": 1 << 16, "repeats": 2, "port": store.port, "address": "127.0.0.1",
        "environment": {"GLOO_SOCKET_IFNAME": "lo"}, "first_rank": 0, "world_size": 2, "within_s": 30.0,
    }  # fmt: skip

    async def work(channel: Channel) -> list[dict[str, Any]]:
        await channel.ask("load", 90)
        plans = [
            {"how": "all_reduce", "devices": [0, 1], "prefix": "1"},
            {"how": "all_reduce", "devices": [0], "prefix": "2", "within_s": 1.0},  # the other never comes
            {"how": "all_reduce", "devices": [0, 1], "prefix": "3"},
            {"how": "ring", "devices": [0], "prefix": "4", "environment": {"GLOO_SOCKET_IFNAME": "none0"}},
        ]
        return [await channel.ask("exchange", 60, **{**shared, **plan}) for plan in plans]

    whole, alone, again, wrong = through(work)
    for answer in (whole, again):
        assert answer["error"] == "" and all(0 < seconds < 30 for seconds in answer["seconds"])
    assert len(whole["seconds"]) == 2 and alone["seconds"] == [None]
    assert wrong["seconds"] == [None] and "none0" in wrong["error"]


class Stand:
    """Exchanges whose times are given: hosts in `bad` make their group slow."""

    def __init__(self, hosts: Fleet, seconds: float, bad: Sequence[str] = (), bad_seconds: float = math.inf) -> None:
        self.backend, self.errors = "nccl", {"h1": ""}
        self.hosts = {seen.host.name: seen for seen in hosts.seen}
        self._bad, self._seconds, self._bad_seconds = set(bad), seconds, bad_seconds

    async def round(self, groups: Sequence[Sequence[str]], how: str, num_bytes: int) -> list[list[float]]:
        return [[self._bad_seconds if self._bad & set(group) else self._seconds] * len(group) for group in groups]


def test_nvlinks_of_an_a100_host_are_held_to_228_gigabytes() -> None:
    num_bytes = bandwidth.ALL_REDUCE_BYTES["nccl"]
    for found, state in ((229, PASS), (227, FAIL), (0, FAIL)):
        hosts = fleet(gpu_facts, 2)
        seconds = 2 * 7 / 8 * num_bytes / (found * 1e9) if found else math.inf
        asyncio.run(bandwidth._in_hosts(Stand(hosts, seconds)))
        verdict = hosts.seen[0].host_all_reduce
        assert verdict is not None and verdict.state == state and (not found or f"{found}.00 GB/s" in verdict.text)


@pytest.mark.parametrize("bad_seconds", [(256 << 20) * 8 / 179e9, math.inf])
def test_a_nic_of_an_a100_host_is_held_to_180_gigabits(bad_seconds: float) -> None:
    hosts = fleet(gpu_facts, 8)
    search = asyncio.run(bandwidth._between_hosts(Stand(hosts, (256 << 20) * 8 / 181e9, ["h6"], bad_seconds)))
    assert search.bad == {"h6"} and search.rounds <= 4
    assert [seen.exchange.state for seen in hosts.seen if seen.exchange] == [PASS] * 5 + [FAIL] + [PASS] * 2


def test_all_hosts_together_are_held_to_four_fifths_of_their_nics_with_a_warning() -> None:
    num_bytes, num_ranks = bandwidth.ALL_REDUCE_BYTES["nccl"], 16
    for found, state in ((145, PASS), (143, WARN)):  # 0.8 x 8 NICs x 180 Gb/s = 144 GB/s
        hosts = fleet(gpu_facts, 3)
        seconds = 2 * (num_ranks - 1) / num_ranks * num_bytes / (found * 1e9)
        asyncio.run(bandwidth._over_all(Stand(hosts, seconds), ["h1", "h2"]))
        states = [seen.all_reduce.state for seen in hosts.seen if seen.all_reduce]
        assert states == [state, state, ABSENT]


def test_without_gpus_the_all_reduce_in_a_host_is_absent() -> None:
    hosts = fleet(cpu_facts, 2)
    stand = Stand(hosts, 1.0)
    stand.backend = "gloo"
    asyncio.run(bandwidth._in_hosts(stand))
    assert all(seen.host_all_reduce and seen.host_all_reduce.state == ABSENT for seen in hosts.seen)
