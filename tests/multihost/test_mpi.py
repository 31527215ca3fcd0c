"""mpiexec over two hosts: its ranks find one another where rank 0's host is told, and none trains alone where not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import hosts
import pytest

pytestmark = [
    pytest.mark.long,
    pytest.mark.usefixtures("two_hosts"),
    pytest.mark.skipif(shutil.which("mpiexec.hydra") is None, reason="mpiexec.hydra is missing (Debian package mpich)"),
]
TELL = """
import json, os, sys
sys.modules["mpi4py"] = None
from ofa_ds.engine.rendezvous import rendezvous
try:
    told = rendezvous(os.environ)
except ValueError as error:
    sys.exit(f"refused: {error}")
sys.stdout.write(json.dumps(told) + "\\n")  # at once: two ranks share the pipe
"""


def start(two_hosts: hosts.Cluster, tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "tell.py").write_text(TELL)
    places = ["-launcher", "ssh", "-hosts", ",".join(two_hosts.addresses), "-ppn", "1", "-n", "2"]
    command = ["mpiexec.hydra", *places, *options, sys.executable, str(tmp_path / "tell.py")]
    env = hosts.launch_env(two_hosts)
    del env["MASTER_PORT"]
    return two_hosts.run(command, timeout=60, cwd=tmp_path, env=env)


def test_ranks_on_two_hosts_find_one_another_by_master_addr(two_hosts: hosts.Cluster, tmp_path: Path) -> None:
    result = start(two_hosts, tmp_path, "-genv", "MASTER_ADDR", "10.77.0.1")
    assert result.returncode == 0, result.stdout
    expected = dict(WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="10.77.0.1", MASTER_PORT="29500")
    found = sorted(map(json.loads, result.stdout.splitlines()), key=lambda one: one["RANK"])
    assert found == [{**expected, "RANK": "0"}, {**expected, "RANK": "1"}]


def test_without_it_each_rank_says_what_to_add(two_hosts: hosts.Cluster, tmp_path: Path) -> None:
    result = start(two_hosts, tmp_path)
    assert result.returncode != 0
    refused = [line for line in result.stdout.splitlines() if line.startswith("refused: ")]
    assert refused and "PMI_SIZE=2" in refused[0]
    assert all("use: mpiexec -genv MASTER_ADDR HOST ..., or install mpi4py" in line for line in refused)
