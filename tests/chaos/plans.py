"""Which faults a run of the chaos suite meets: a function of its seed and nothing else."""

from __future__ import annotations

import random
from dataclasses import dataclass

NUM_STEPS = 10
"""Of each run: a checkpoint every second step, so a fault costs up to four."""

LAST_STEP = NUM_STEPS - 4
"""At which a fault may be due: later ones would often find that the run has ended."""

FATAL = (
    "kill_rank",
    "kill_agent",
    "kill_launcher",
    "kill_ssh",
    "stop_rank",
    "stop_agent",
    "raise",
    "link_down",
    "power_off",
)
"""The attempt ends, and another one has to follow."""
ENDURED = ("nan", "packet_loss", "full_disk", "slow_rank", "clock_jump")
"""The attempt may go on."""
KINDS = FATAL + ENDURED
COSTS_A_HOST = ("link_down", "power_off", "stop_agent")
INSIDE = ("raise", "nan")
"""Happen within a rank, by tests/chaos/inside/sitecustomize.py; all others are done to it."""


RUNNERS = ("torchrun", "deepspeed", "openmpi")
"""The first two have an agent a host, started by ssh; Open MPI starts an agent a rank, which calls back."""


@dataclass(frozen=True)
class Fault:
    kind: str
    """One of KINDS."""
    step: int
    """It strikes when a rank has finished so many steps; the kinds INSIDE, within the next one."""
    host: int
    """Index of the host, which has the rank of that number in the first attempt."""
    delay_s: float
    """From the step to the fault."""
    lasts_s: float
    """Of what goes by: a cut link that is mended (0: never), loss, a full disk, a slow rank. clock_jump: how far."""
    repeats: bool = False
    """raise: whenever the step is tried, until it is left out."""

    def __str__(self) -> str:
        lasts = f", {self.lasts_s:+.0f} s" if self.lasts_s else ""
        return f"{self.kind} on host {self.host + 1} after step {self.step}{lasts}{', each time' * self.repeats}"


@dataclass(frozen=True)
class Plan:
    seed: int
    num_hosts: int
    runner: str
    faults: tuple[Fault, ...]
    """In the order in which they strike."""

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.num_hosts} hosts, {self.runner}: {'; '.join(map(str, self.faults))}"


def plan(seed: int, *, faults_each: int = 2, runners: tuple[str, ...] = RUNNERS) -> Plan:
    """The kinds are dealt like cards: so many seeds in a row as a pack has hands meet each kind once.

    Seeds that begin a pack are those that len(KINDS) // faults_each divides.
    """
    hands = len(KINDS) // faults_each
    pack, hand = divmod(seed, hands)
    cards = _pack(pack)
    kinds = cards[hand * faults_each : (hand + 1) * faults_each]
    draw = random.Random(f"run {seed}")
    num_hosts = 3 if sum(kind in COSTS_A_HOST for kind in kinds) > 1 else draw.choice((2, 3, 3))
    steps = sorted(draw.randint(1, LAST_STEP) for _ in kinds)
    hosts = draw.sample(range(num_hosts), k=num_hosts)
    faults, lost = [], False
    for i, (kind, step) in enumerate(zip(kinds, steps, strict=True)):
        host = 0 if lost and kind in INSIDE else hosts[i % num_hosts]  # rank 0 is always there
        lost |= kind in COSTS_A_HOST
        faults.append(_fault(kind, step, host, draw))
    return Plan(seed, num_hosts, draw.choice(runners), tuple(faults))


def _pack(number: int) -> list[str]:
    cards = list(KINDS)
    random.Random(f"pack {number}").shuffle(cards)
    return cards


def _fault(kind: str, step: int, host: int, draw: random.Random) -> Fault:
    lasts_s = {
        "link_down": draw.choice((0.0, 25.0)),
        "packet_loss": draw.uniform(5, 15),
        "full_disk": draw.uniform(2, 8),
        "slow_rank": draw.uniform(3, 6),
        "clock_jump": draw.choice((-86_400.0, -3600.0, 3600.0, 86_400.0)),
    }
    return Fault(
        kind=kind,
        step=step,
        host=host,
        delay_s=round(draw.uniform(0, 0.4), 3),
        lasts_s=round(lasts_s.get(kind, 0.0), 1),
        repeats=kind == "raise" and draw.random() < 0.4,
    )
