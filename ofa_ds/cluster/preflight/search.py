"""Finds the hosts that make exchanges slow or hang, in as few rounds as halving takes. Knows nothing of networks.

A round measures several groups of hosts at once, each a ring: every host sends to the next and receives from the one
before. First all hosts; of a slow group both halves; a host alone is paired with one that is known to be good. One bad
host of N is found in ceil(log2 N) + 1 rounds at most; several are found too, mostly in no more.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

Group = tuple[str, ...]
NOISE_S = 0.02
"""A difference below is none, whatever its factor: a busy scheduler makes that much."""


@dataclass
class Search:
    """Ask `groups()`, measure them, tell `learn()`, until there are none."""

    hosts: Sequence[str]
    factor: float
    """So many times slower than healthy hosts is slow."""
    limit_s: float | None = None
    """Or slower than this; found from the first times that come where it is None."""
    rounds: int = 0
    good: set[str] = field(default_factory=set)
    bad: set[str] = field(default_factory=set)
    unclear: set[str] = field(default_factory=set)
    """At least one of these is bad, and nobody is left to tell which: of two hosts, either."""
    slow_groups: list[frozenset[str]] = field(default_factory=list)
    _open: list[Group] = field(default_factory=list)
    """Groups of suspects, still to be looked into."""
    _measured: set[frozenset[str]] = field(default_factory=set)

    @property
    def most_rounds(self) -> int:
        return math.ceil(math.log2(len(self.hosts))) + 1

    @property
    def unexplained(self) -> bool:
        """All together were slow, and no part of them was: a passing disturbance, or a fabric too small for all."""
        return bool(self.slow_groups) and not self.bad and not self.unclear

    def groups(self) -> list[Group]:
        """Of the next round: hosts are in one group at most. Empty: the search is over."""
        if self.rounds == 0:
            return [tuple(self.hosts)]
        if not self.good and len(self._explanations()) == 1:
            self._open = []
        groups, alone = self._halves()
        groups += self._pairs(alone, {host for group in groups for host in group})
        if not groups:
            self._conclude()
        return groups

    def _halves(self) -> tuple[list[Group], list[tuple[str, Group]]]:
        """(groups to measure, hosts that are alone in their half with the group they are from)."""
        groups: list[Group] = []
        alone: list[tuple[str, Group]] = []
        for group in self._open:
            middle = (len(group) + 1) // 2
            for half in (group[:middle], group[middle:]):
                if len(half) > 1:
                    groups.append(half)
                elif half:
                    alone.append((half[0], group))
        return groups, alone

    def _pairs(self, alone: list[tuple[str, Group]], taken: set[str]) -> list[Group]:
        """Good hosts beside suspects; where there are not enough, suspects of different groups beside each other."""
        pairs: list[Group] = []
        free = [host for host in self.hosts if host in self.good]
        left = list(alone)
        while left and free:
            pairs.append((left.pop(0)[0], free.pop(0)))
        if not self.good:
            while left:
                host, group = left.pop(0)
                other = next((one for one, its in left if one not in group and self._is_new(host, one)), None)
                if other is not None and host not in taken:
                    pairs.append((host, other))
                    left = [each for each in left if each[0] != other]
        return pairs

    def _is_new(self, *hosts: str) -> bool:
        return frozenset(hosts) not in self._measured

    def learn(self, groups: Sequence[Group], times_s: Sequence[Sequence[float]]) -> None:
        """times_s: for each group, how long each of its hosts waited for its data; infinite where none came."""
        self.rounds += 1
        finite = sorted(time for times in times_s for time in times if math.isfinite(time))
        if self.limit_s is None and finite:
            healthy = finite[(len(finite) - 1) // 4]
            self.limit_s = max(self.factor * healthy, healthy + NOISE_S)
        undecided = {host for group in self._open for host in group}
        slow = []
        for group, times in zip(groups, times_s, strict=True):
            self._measured.add(frozenset(group))
            if self.limit_s is None or max(times) > self.limit_s:
                slow.append(group)
                self.slow_groups.append(frozenset(group))
            else:
                self.good.update(group)
        self._deduce()
        looked_at = {host for group in groups for host in group}
        suspects = [*slow, *((host,) for host in self.hosts if host in undecided - looked_at)]
        known = self.good | self.bad
        self._open = [left for group in suspects if (left := tuple(host for host in group if host not in known))]

    def _deduce(self) -> None:
        """The last of a slow group of which all others are good is bad."""
        for group in self.slow_groups:
            left = group - self.good
            if len(left) == 1:
                self.bad |= left

    def _explanations(self) -> set[str]:
        """Hosts each of which alone would explain all slow groups that no known bad host explains."""
        groups = [group for group in self.slow_groups if not group & self.bad]
        return set.intersection(*map(set, groups)) - self.good if groups else set()

    def _conclude(self) -> None:
        """Of slow groups that are not explained yet, the host that most of them share; several as good: unclear."""
        while groups := [group - self.good for group in self.slow_groups if not group & (self.bad | self.unclear)]:
            counts = Counter(host for group in groups for host in group)
            if not counts:
                return
            most = max(counts.values())
            found = {host for host, count in counts.items() if count == most}
            (self.bad if len(found) == 1 else self.unclear).update(found)
