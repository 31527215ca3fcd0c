"""What is to run, on which hosts: made from the command line once, and handed on unchanged."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ofa_ds.cluster.hostfile import Host

RUNNERS = ("deepspeed", "torchrun", "slurm", "openmpi", "mpich")
"""Who starts the ranks. The first two get an agent a host over ssh; the others start an agent a rank themselves."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One attempt's work. Everything that a user typed is bytes, and meets no shell."""

    hosts: tuple[Host, ...]
    """Those that take part, in rank order; rank 0 runs on the first."""
    runner: str
    """One of RUNNERS."""
    program: tuple[bytes, ...]
    """The arguments of `ofa-ds` on each rank: b"pretrain", RECIPE, KEY=VALUE ..."""
    directory: bytes
    """Where each rank starts: relative paths are meant from there."""
    environment: dict[bytes, bytes] = field(repr=False)
    """What each rank gets beside its own host's environment."""
    master_address: str
    """Of the first host, as all others know it."""
    master_port: int
    run_dir: Path
    """Of the run, from the recipe: attempts and logs are kept there."""

    @property
    def num_ranks(self) -> int:
        return sum(host.slots for host in self.hosts)

    def environment_on(self, host: Host) -> dict[bytes, bytes]:
        """What each rank of that host gets: rank 0's place, and the GPUs where a filter chose some of them."""
        place = {b"MASTER_ADDR": self.master_address.encode(), b"MASTER_PORT": str(self.master_port).encode()}
        devices = ",".join(map(str, host.devices)).encode()
        return {**self.environment, **place, **({b"CUDA_VISIBLE_DEVICES": devices} if devices else {})}
