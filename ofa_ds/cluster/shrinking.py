"""Whether a run can go on with all hosts that are left after a loss: the batch has to divide over their ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from ofa_ds.cluster.hostfile import Host


def sizes_after_losing(slots: Sequence[int], lost: int) -> list[int]:
    """Numbers of ranks that may be left once `lost` hosts are gone, none of which is the last, most ranks first."""
    gone: list[set[int]] = [{0}, *(set() for _ in range(lost))]
    for each in slots:
        for count in range(lost, 0, -1):
            gone[count] |= {sum_before + each for sum_before in gone[count - 1]}
    return sorted({sum(slots) - each for each in gone[lost]} - {0}, reverse=True)


def warnings(hosts: Sequence[Host], spares: Sequence[Host], retries: int, fits: Callable[[int], bool]) -> list[str]:
    """One line for each loss within the retries after which not all hosts that are left could be used."""
    found = []
    for lost in range(1, min(retries, len(hosts) + len(spares) - 1) + 1):
        beyond_spares = lost - len(spares)
        if beyond_spares <= 0:
            continue
        sizes = sizes_after_losing([host.slots for host in hosts], beyond_spares)
        wrong = [ranks for ranks in sizes if not fits(ranks)]
        if wrong:
            fewer = [ranks for ranks in itertools.accumulate(host.slots for host in hosts) if ranks < wrong[0]]
            used = max(filter(fits, fewer), default=0)
            way_on = f"at most {used} would go on" if used else "it could not go on"
            found.append(
                f"after losing {lost} host{'s' * (lost > 1)} {wrong[0]} ranks may be left, over which the batch does "
                f"not divide: {way_on}; batch.global_rows and batch.micro_rows that divide for {wrong[0]} ranks help"
            )
    return found
