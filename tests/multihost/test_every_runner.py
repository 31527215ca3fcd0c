"""Every runner trains: ZeRO-3 over gloo on three hosts, the same losses and weights to the bit, nothing left behind.

Slurm is real, so are its pre-emption and the batch script; so are Open MPI, MPICH, torchrun and DeepSpeed's launcher.
They are started by `ofa-ds launch`, and some of them without it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hosts
import pytest
import slurm
import training

from ofa_ds.data.scenes_tasks import write_task_scenes
from ofa_ds.tasks.task_shards import build_task_shards

pytestmark = pytest.mark.long

PROGRAMS = {
    "deepspeed": "ssh",
    "torchrun": "ssh",
    "openmpi": "mpirun.openmpi",
    "mpich": "mpiexec.hydra",
    "slurm": "srun",
}
SCRIPT = hosts.ROOT / "launchers/slurm/pretrain.sbatch"


class Trained:
    """What the first training gave; every other one must give the same."""

    def __init__(self) -> None:
        self.losses: dict[int, dict[str, float]] = {}
        self.weights: list[str] = []

    def compare(self, desk: training.Desk, run_dir: str) -> None:
        losses, weights = desk.losses(run_dir), desk.weights(run_dir)
        assert sorted(losses) == list(range(1, training.NUM_STEPS + 1))
        assert len(weights) == 3, "ZeRO-3: each rank saves its own third"
        if not self.weights:
            self.losses, self.weights = losses, weights
        assert losses == self.losses
        assert weights == self.weights
        assert losses[training.NUM_STEPS]["loss"] < losses[1]["loss"]  # a model that stands still proves little


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained()


@pytest.fixture(scope="module")
def desk(three_hosts: hosts.Cluster, tmp_path_factory: pytest.TempPathFactory) -> training.Desk:
    return training.make(three_hosts, tmp_path_factory.mktemp("runners"))


@pytest.fixture(autouse=True)
def nothing_is_left(desk: training.Desk) -> Iterator[None]:
    yield
    desk.cluster.wait_until_nothing_is_left()
    assert [host.shared_memory() for host in desk.cluster.hosts] == [[], [], []]


@pytest.fixture
def environment(request: pytest.FixtureRequest, desk: training.Desk) -> dict[str, str]:
    """For the runner of the test: Slurm's step runs within an allocation of all hosts."""
    runner = request.node.callspec.params["runner"]
    if not hosts.program_path(PROGRAMS[runner]):
        pytest.skip(f"{PROGRAMS[runner]} is missing")
    if runner != "slurm":
        return desk.env
    return {**desk.env, **request.getfixturevalue("slurm_cluster").env}


@pytest.mark.parametrize("runner", PROGRAMS)
def test_three_hosts_train_to_the_same_bits(
    desk: training.Desk, trained: Trained, environment: dict[str, str], runner: str
) -> None:
    command = desk.launch(runner, "--runner", runner)
    if runner == "slurm":
        command = ["salloc", "--quiet", "--nodes=3", "--ntasks-per-node=1", *command]
    login = desk.cluster.login
    result = desk.cluster.run(command, host=login, timeout=300, cwd=desk.path, env=environment)
    assert result.returncode == 0, result.stdout
    trained.compare(desk, runner)


def test_three_hosts_fine_tune_and_predict_each_row_once(desk: training.Desk, trained: Trained) -> None:
    toy, login = desk.path / "toy", desk.cluster.login
    build_task_shards(toy / "shards", "sst2", [write_task_scenes(toy, "sst2", 26, 1)])

    def launch(*program: str) -> None:
        command = [sys.executable, "-m", "ofa_ds.cli", "launch", "--hostfile", "hosts", "--", *program]
        result = desk.cluster.run(command, host=login, timeout=300, cwd=desk.path, env=desk.env)
        assert result.returncode == 0, result.stdout

    batch = ("batch.global_rows=24", "batch.micro_rows=4", "train.num_steps=2")
    launch("finetune", "finetune-sst2-nano", "run_dir=tuned", "data.shards=toy/shards", "data.vocab=vocab", *batch)
    launch("predict", "tuned", "--task", "sst2", "--shards", "toy/shards", "--out", "sst2.tsv")
    head, *rows = (desk.path / "sst2.tsv").read_text().splitlines()
    assert [row.split("\t")[0] for row in rows] == [str(number) for number in range(26)], head


def plain_commands() -> dict[str, list[str]]:
    """How to start ranks without `ofa-ds launch`. Rank 0's host is found by mpi4py under Open MPI."""
    carried = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "DS_ACCELERATOR", "GLOO_SOCKET_IFNAME")
    mpirun = ["mpirun.openmpi", "--allow-run-as-root", "-np", "3", "--hostfile", "hosts", "--map-by", "node"]
    mpirun += [word for name in carried for word in ("-x", name)]
    return {
        "deepspeed": ["deepspeed", "--hostfile", "hosts", "--module", "ofa_ds.pretrain"],
        "openmpi": [*mpirun, sys.executable, "-m", "ofa_ds.pretrain"],
    }


@pytest.mark.parametrize("runner", plain_commands())
def test_without_supervision_they_train_to_the_same_bits(desk: training.Desk, trained: Trained, runner: str) -> None:
    if not hosts.program_path("mpirun.openmpi" if runner == "openmpi" else "pdsh"):
        pytest.skip(f"what starts {runner} is missing")
    folder = desk.path / "plain"
    folder.mkdir(exist_ok=True)
    for name in ("shards", "vocab", "hosts"):
        if not (folder / name).exists():
            (folder / name).symlink_to(desk.path / name)
    (folder / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\nDS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    env = {**desk.env, "PATH": f"{desk.cluster.tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [*plain_commands()[runner], *desk.program(f"plain-{runner}")[1:]]
    result = desk.cluster.run(command, timeout=300, cwd=folder, env=env)
    assert result.returncode == 0, result.stdout
    trained.compare(training.Desk(desk.cluster, folder), f"plain-{runner}")


def test_a_launch_that_is_told_to_stop_saves_and_another_runner_goes_on(desk: training.Desk, trained: Trained) -> None:
    login, log = desk.cluster.login, desk.path / "stopped.log"
    stopping = desk.cluster.start(
        desk.launch("moved", "--runner", "torchrun"), host=login, log=log, cwd=desk.path, env=desk.env
    )
    desk.wait_for_step("moved", 1)
    with paused(desk.cluster.hosts[1], "moved"):
        stopping.send(signal.SIGTERM)
        time.sleep(1)
    assert stopping.wait(120) == 130, stopping.output
    saved = max(int(place.name.removeprefix("step_")) for place in (desk.path / "moved").glob("step_*"))
    assert 1 <= saved < training.NUM_STEPS, stopping.output
    desk.cluster.wait_until_nothing_is_left()
    result = desk.cluster.run(
        desk.launch("moved", "--runner", "openmpi"), host=login, timeout=300, cwd=desk.path, env=desk.env
    )
    assert result.returncode == 0, result.stdout
    trained.compare(desk, "moved")


class paused:
    """A rank of the host stands still, and all others wait for it: what is done meanwhile happens between two steps."""

    def __init__(self, host: hosts.Host, run_dir: str) -> None:
        self.processes = [one for one in host.find(f"run_dir={run_dir}") if "ofa_ds.cluster" not in str(one.arguments)]

    def __enter__(self) -> None:
        assert self.processes
        for one in self.processes:
            os.kill(one.pid, signal.SIGSTOP)

    def __exit__(self, *_: object) -> None:
        for one in self.processes:
            os.kill(one.pid, signal.SIGCONT)


def test_a_job_that_is_preempted_saves_goes_back_into_the_queue_and_finishes(
    desk: training.Desk, trained: Trained, slurm_cluster: slurm.Slurm
) -> None:
    variables = {"OFA_DS_ROOT": str(hosts.ROOT), "PYTHON": sys.executable}
    options = ["--parsable", "--nodes=3", "--ntasks-per-node=1", "--gpus-per-node=0", "--output=job.log"]
    program = desk.program("preempted")[1:]
    job = slurm_cluster.ask("sbatch", *options, str(SCRIPT), *program, cwd=desk.path, **variables)
    log = desk.path / "job.log"
    desk.wait_for_step("preempted", 1)
    with paused(desk.cluster.hosts[1], "preempted"):
        urgent = slurm_cluster.ask(
            "sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--wrap=hostname", cwd=desk.path
        )
        deadline = time.monotonic() + 60
        while "asked to make room" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
    slurm_cluster.wait_for(job, "PENDING", within_s=120)
    slurm_cluster.wait_for(urgent, "COMPLETED", within_s=60)
    time.sleep(5)  # a start in the second of the requeue is refused: "Job credential revoked"
    slurm_cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")  # else Slurm waits two minutes
    slurm_cluster.wait_for(job, "COMPLETED", "FAILED", within_s=240)
    said = log.read_text()
    assert slurm_cluster.fields(job)["ExitCode"] == "0:0", said
    assert slurm_cluster.fields(job)["Restarts"] == "1"
    assert "start 1, on h[1-3]" in said and "saved; back into the queue" in said and "start 2, on h[1-3]" in said
    trained.compare(desk, "preempted")
