"""The exact command of every runner, word by word: a change of one is seen here before a cluster sees it."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import pytest

from ofa_ds.cluster import runners
from ofa_ds.cluster.hostfile import Host
from ofa_ds.cluster.job import RUNNERS, Job

PY = sys.executable
RANK = ["/venv/bin/python", "-u", "rank.py", "it's `a` $(b)"]
WORLD = base64.urlsafe_b64encode(json.dumps({"gpu-2": [0, 1, 2, 3], "gpu-1": [5, 7]}).encode()).decode()

GOLDEN_NODE = {
    ("deepspeed", 0): [
        PY, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={WORLD}", "--node_rank=0", "--master_addr=10.0.0.2",
        "--master_port=29517", "--no_python", "--no_local_rank", "--log_level=warning", *RANK,
    ],
    ("deepspeed", 1): [
        PY, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={WORLD}", "--node_rank=1", "--master_addr=10.0.0.2",
        "--master_port=29517", "--no_python", "--no_local_rank", "--log_level=warning", *RANK,
    ],
    ("torchrun", 0): [
        PY, "-u", "-m", "torch.distributed.run", "--nnodes=2", "--node_rank=0", "--nproc_per_node=4",
        "--max_restarts=0", "--master_addr=10.0.0.2", "--master_port=29517", "--no_python", *RANK,
    ],
    ("torchrun", 1): [
        PY, "-u", "-m", "torch.distributed.run", "--nnodes=2", "--node_rank=1", "--nproc_per_node=2",
        "--max_restarts=0", "--master_addr=10.0.0.2", "--master_port=29517", "--no_python", *RANK,
    ],
}  # fmt: skip
GOLDEN_CENTRAL = {
    "slurm": [
        "srun", "--ntasks", "6", "--nodes", "2", "--distribution", "arbitrary",
        "--nodelist", "gpu-2,gpu-2,gpu-2,gpu-2,gpu-1,gpu-1",
        "--overlap", "--kill-on-bad-exit=0", "--cpu-bind=none", "--mpi=none", "--input=none", *RANK,
    ],
    "openmpi": [
        "mpirun.openmpi", "--allow-run-as-root", "-np", "6",
        "--host", "gpu-2,gpu-2,gpu-2,gpu-2,gpu-1,gpu-1", "--map-by", "seq", "--bind-to", "none",
        "--mca", "oob_tcp_keepalive_time", "2", "--mca", "oob_tcp_keepalive_intvl", "1",
        "--mca", "oob_tcp_keepalive_probes", "3", "-x", "OFA_AGENT", "-x", "PYTHONPATH", *RANK,
    ],
    "mpich": [
        "mpirun.mpich", "-launcher", "ssh", "-hosts", "gpu-2:4,gpu-1:2", "-n", "6",
        "-genvlist", "OFA_AGENT,PYTHONPATH", "-bind-to", "none", *RANK,
    ],
}  # fmt: skip


def job(runner: str, *hosts: Host) -> Job:
    """Rank 0 is on the first host, which is neither the first by name nor as large as the other."""
    return Job(
        hosts=hosts or (Host("gpu-2", 4), Host("gpu-1", 2, (5, 7))),
        runner=runner,
        program=(b"pretrain", b"pretrain-nano"),
        directory=b"/home/a",
        environment={b"NCCL_DEBUG": b"INFO"},
        master_address="10.0.0.2",
        master_port=29517,
        run_dir=Path("runs/a"),
    )


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH that has every runner's first program, and nothing else."""
    for name in ("ssh", "srun", "mpirun.openmpi", "mpirun.mpich", "mpirun", "mpiexec.hydra"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_every_runner_has_a_golden_command() -> None:
    assert {runner for runner, _ in GOLDEN_NODE} | GOLDEN_CENTRAL.keys() == set(RUNNERS)


@pytest.mark.parametrize(("runner", "index"), GOLDEN_NODE)
def test_the_part_of_a_host_is_word_for_word(runner: str, index: int) -> None:
    assert not runners.is_central(job(runner))
    assert runners.node_argv(job(runner), index, RANK) == GOLDEN_NODE[runner, index]


@pytest.mark.parametrize("runner", GOLDEN_CENTRAL)
def test_the_one_command_is_word_for_word(runner: str, programs: Path) -> None:
    assert runners.is_central(job(runner))
    assert runners.central_argv(job(runner), RANK) == GOLDEN_CENTRAL[runner]


@pytest.mark.parametrize(
    ("runner", "first", "second"),
    [("openmpi", "mpirun.openmpi", "mpirun"), ("mpich", "mpirun.mpich", "mpiexec.hydra")],
)
def test_another_name_of_a_program_is_found(runner: str, first: str, second: str, programs: Path) -> None:
    (programs / first).unlink()
    assert runners.central_argv(job(runner), RANK) == [second, *GOLDEN_CENTRAL[runner][1:]]


@pytest.mark.parametrize(
    ("runner", "message"),
    [
        ("deepspeed", "--runner deepspeed: want ssh in PATH; on Debian and Ubuntu: apt-get install openssh-client"),
        ("slurm", "--runner slurm: want srun in PATH; on Debian and Ubuntu: apt-get install slurm-client"),
        ("openmpi", "--runner openmpi: want mpirun.openmpi or mpirun in PATH; on Debian and Ubuntu: apt-get"),
        ("mpich", "--runner mpich: want mpirun.mpich or mpiexec.hydra in PATH; on Debian and Ubuntu: apt"),
    ],
)  # fmt: skip
def test_a_missing_program_is_named_with_its_package(
    runner: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError) as caught:
        runners.check(job(runner))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("runner", GOLDEN_CENTRAL)
@pytest.mark.parametrize(
    ("name", "message"), [("root@a", "takes no user before a host"), ("fe80::1", "takes no address with colons")]
)
def test_a_name_that_a_runner_would_misread_is_refused(runner: str, name: str, message: str, programs: Path) -> None:
    with pytest.raises(ValueError, match=f"{name}: --runner {runner} {message}"):
        runners.central_argv(job(runner, Host(name, 1)), RANK)


def test_a_rank_sees_the_gpus_that_a_filter_chose_and_where_rank_0_is() -> None:
    whole, part = job("torchrun").hosts
    place = {b"NCCL_DEBUG": b"INFO", b"MASTER_ADDR": b"10.0.0.2", b"MASTER_PORT": b"29517"}
    assert job("torchrun").environment_on(whole) == place
    assert job("torchrun").environment_on(part) == {**place, b"CUDA_VISIBLE_DEVICES": b"5,7"}
