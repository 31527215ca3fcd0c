"""What the launching process knows about agents and ranks, as they told it last. No input, no output."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STOPPED_STATES = ("T", "t")
"""Of a process that got SIGSTOP, or that a debugger holds."""


@dataclass
class RankView:
    rank: int
    pid: int
    phase: str
    step: int
    """Optimizer steps finished."""
    state: str
    """As /proc says; `X`: gone."""
    moved_at_s: float
    """When it last made progress, by this process's monotonic clock."""
    stopped_since_s: float | None = None
    gone_since_s: float | None = None


@dataclass(frozen=True)
class Exit:
    """How a rank ended, by the shim around it."""

    host: str
    rank: int
    code: int
    signal: int
    phase: str
    step: int
    error: dict[str, Any] | None
    """Type, message, traceback of its own exception, where it wrote one down."""
    tail: str
    """What it printed last."""
    arrived_at_s: float


@dataclass
class AgentView:
    """One agent: of a host, or of one rank where Slurm or MPI starts them."""

    name: str
    """Of its host, as the hostfile has it."""
    heard_at_s: float
    is_ready: bool = False
    """It said hello."""
    ranks: dict[int, RankView] = field(default_factory=dict)
    exits: dict[int, Exit] = field(default_factory=dict)
    engine_code: int | None = None
    engine_stopped_since_s: float | None = None
    refused: str = ""
    lost: str = ""
    """Why its line ended without a last word."""
    is_gone: bool = False
    """It said that nothing of the attempt is left there."""
    gave_up: str = ""
    """Why it ended all by itself."""
    log_tail: str = ""

    def take_beat(self, message: dict[str, Any], now_s: float) -> None:
        is_stopped = message["engine"] in STOPPED_STATES
        self.engine_stopped_since_s = (self.engine_stopped_since_s or now_s) if is_stopped else None
        for row in message["ranks"]:
            rank = int(row["rank"])
            before = self.ranks.get(rank)
            new = RankView(
                rank, int(row["pid"]), str(row["phase"]), int(row["step"]), str(row["state"]), now_s - row["age_s"]
            )
            if new.state in STOPPED_STATES:
                new.stopped_since_s = (before.stopped_since_s if before else None) or now_s
            if new.state == "X":
                new.gone_since_s = (before.gone_since_s if before else None) or now_s
            self.ranks[rank] = new

    def take_exit(self, message: dict[str, Any], now_s: float) -> None:
        rank = int(message["rank"])
        self.exits[rank] = Exit(
            host=self.name,
            rank=rank,
            code=int(message["code"]),
            signal=int(message["signal"]),
            phase=str(message["phase"]),
            step=int(message["step"]),
            error=message["error"],
            tail=str(message["tail"]),
            arrived_at_s=now_s,
        )

    def take_log(self, text: str) -> None:
        self.log_tail = (self.log_tail + text)[-4000:]
