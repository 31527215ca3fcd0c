"""The search for bad hosts: over simulated rings whose bad hosts are slow or hang."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest

from ofa_ds.cluster.preflight.search import Search

HEALTHY_S, SLOW_S = 0.03, 0.25


def run(num_hosts: int, bad: set[str], fault: str, seed: int = 0) -> Search:
    """fault: `sends` slowly, `both` ways slow, or `hangs`: nobody of its group finishes."""
    rng = random.Random(seed)
    search = Search([f"h{i}" for i in range(num_hosts)], 3.0)
    while groups := search.groups():
        used = [host for group in groups for host in group]
        assert len(used) == len(set(used)) and all(len(group) > 1 for group in groups)
        assert search.rounds < 3 * search.most_rounds, "it does not end"
        search.learn(groups, [ring(group, bad, fault, rng) for group in groups])
    return search


def ring(group: Sequence[str], bad: set[str], fault: str, rng: random.Random) -> list[float]:
    if fault == "hangs" and bad & set(group):
        return [math.inf] * len(group)
    times = []
    for i, host in enumerate(group):
        slow = group[i - 1] in bad or (fault == "both" and host in bad)
        times.append((SLOW_S if slow else HEALTHY_S) * rng.uniform(0.8, 1.3))
    return times


@pytest.mark.parametrize("fault", ["sends", "both", "hangs"])
@pytest.mark.parametrize("num_hosts", range(3, 65))
def test_one_bad_host_is_found_in_as_few_rounds_as_halving_takes(num_hosts: int, fault: str) -> None:
    for place in range(num_hosts):
        search = run(num_hosts, {f"h{place}"}, fault, seed=place)
        assert search.bad == {f"h{place}"} and not search.unclear, (place, search)
        assert search.rounds <= math.ceil(math.log2(num_hosts)) + 1, (place, search)


@pytest.mark.parametrize("fault", ["sends", "hangs"])
def test_of_two_hosts_either_may_be_the_bad_one(fault: str) -> None:
    for place in range(2):
        search = run(2, {f"h{place}"}, fault)
        assert search.unclear == {"h0", "h1"} and not search.bad and search.rounds <= 2


@pytest.mark.parametrize("num_hosts", range(2, 65))
def test_healthy_hosts_cost_one_round(num_hosts: int) -> None:
    search = run(num_hosts, set(), "sends")
    assert search.rounds == 1 and not search.bad and not search.unclear and not search.unexplained


@pytest.mark.parametrize("fault", ["sends", "both", "hangs"])
def test_several_bad_hosts_are_all_found(fault: str) -> None:
    seed = 20240601
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(300):
        num_hosts = rng.randint(8, 64)
        bad = {f"h{i}" for i in rng.sample(range(num_hosts), rng.randint(2, num_hosts // 4))}
        search = run(num_hosts, bad, fault, seed=rng.randint(0, 9999))
        assert bad <= search.bad | search.unclear, (bad, search)
        assert search.bad <= bad, (bad, search)


def test_all_slow_together_and_no_part_alone_is_nobodys_fault() -> None:
    search = Search([f"h{i}" for i in range(8)], 3.0)
    slow: Callable[[Sequence[str]], list[float]] = lambda group: [0.03] * (len(group) - 1) + [0.3]  # noqa: E731
    search.learn(groups := search.groups(), [slow(group) for group in groups])
    while groups := search.groups():
        search.learn(groups, [[0.03] * len(group) for group in groups])
    assert search.unexplained and not search.bad and search.rounds == 2


def test_a_limit_that_is_given_is_the_one_that_counts() -> None:
    search = Search(["h0", "h1", "h2", "h3"], 3.0, limit_s=0.01)
    while groups := search.groups():
        search.learn(groups, [[0.012 if "h2" in group else 0.009] * len(group) for group in groups])
    assert search.bad == {"h2"}
