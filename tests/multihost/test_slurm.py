"""Slurm on the hosts, and what jobs started by it are told."""

from __future__ import annotations

import pytest
import slurm

pytestmark = pytest.mark.long


def test_a_step_runs_on_every_host_and_leaves_nothing(slurm_cluster: slurm.Slurm) -> None:
    said = slurm_cluster.ask("srun", "--nodes=3", "--ntasks-per-node=1", "sh", "-c", "hostname; echo $SLURM_PROCID")
    assert sorted(said.split()) == ["0", "1", "2", "h1", "h2", "h3"]
    slurm_cluster.cluster.wait_until_nothing_is_left()
