"""A real Slurm on the hosts of hosts.py: slurmctld on the login host, a slurmd on each other one, a munged of its own.

It lies in one directory and its key is its own: other clusters, and a site's own Slurm, never meet it.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import hosts

_PACKAGES = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "setpriv": "util-linux",
}
_START_S = 30


def missing_requirement() -> str | None:
    """Why this machine cannot have Slurm, in one line; None where it can."""
    for program, package in _PACKAGES.items():
        if not hosts.program_path(program):
            return f"{program} is missing (Debian package {package})"
    return None


@dataclass(frozen=True)
class Slurm:
    cluster: hosts.Cluster
    directory: Path

    @property
    def env(self) -> dict[str, str]:
        """What makes Slurm's commands speak to this cluster."""
        return {"SLURM_CONF": str(self.directory / "slurm.conf")}

    def ask(self, *command: str, cwd: Path | None = None, **env: str) -> str:
        """What one of Slurm's commands prints, on the login host; RuntimeError where it fails."""
        environment = {**hosts.launch_env(self.cluster), **self.env, **env}
        done = self.cluster.run(list(command), host=self.cluster.login, timeout=60, cwd=cwd, env=environment)
        if done.returncode:
            raise RuntimeError(f"{command}: {done.stdout}")
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED ..."""
        return self.fields(job)["JobState"]

    def fields(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.ask("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, *states: str, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while (state := self.state(job)) not in states:
            if time.monotonic() > deadline:
                raise AssertionError(f"job {job} is {state}, want {states} within {within_s} s: {self.fields(job)}")
            time.sleep(0.2)

    def end_all_jobs(self) -> None:
        for job in self.ask("squeue", "--noheader", "--format=%A").split():
            self.ask("scancel", "--signal=KILL", "--full", job)
            self.ask("scancel", job)
            self.wait_for(job, "CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "TIMEOUT", within_s=30)


@contextmanager
def started(cluster: hosts.Cluster, directory: Path) -> Iterator[Slurm]:
    """All nodes are idle; its processes are residents of their hosts, and ended afterwards.

    A job in the partition `urgent` takes the nodes of jobs in `train`, the default one, which are told so first.
    """
    slurm = Slurm(cluster, directory)
    _write_files(cluster, directory)
    with ExitStack() as stack:
        _start_munged(cluster, directory, stack)
        env = {**os.environ, **slurm.env}
        _daemon(stack, cluster.login, ["slurmctld", "-D", "-i"], directory, env)
        for host in cluster.hosts:
            _daemon(stack, host, ["slurmd", "-D", "-N", host.name], directory, env)
        _wait_until_idle(slurm)
        for host in cluster.everything:
            host.residents |= {(one.pid, one.started) for one in host.left()}
        yield slurm


def _daemon(stack: ExitStack, host: hosts.Host, command: list[str], directory: Path, env: dict[str, str]) -> None:
    """Starts it; at the end it is ended together with what it has started."""
    path = hosts.program_path(command[0])
    with open(directory / f"{command[0]}.{host.name}.log", "wb") as log:
        process = subprocess.Popen(
            host.entered([path, *command[1:]], "/"), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env
        )

    def end() -> None:
        for one in host.find(path, *command[1:]):
            os.kill(one.pid, 15)
        process.wait(30)

    stack.callback(end)


def _wait_until_idle(slurm: Slurm) -> None:
    deadline = time.monotonic() + _START_S
    wanted = ["idle"] * len(slurm.cluster.hosts)
    while True:
        try:
            states = slurm.ask("sinfo", "--noheader", "--Node", "--partition=train", "--format=%t").split()
        except RuntimeError as error:  # slurmctld does not listen yet
            states = [str(error)]
        if states == wanted:
            return
        if time.monotonic() > deadline:
            logs = "\n".join(log.read_text()[-2000:] for log in slurm.directory.glob("*.log"))
            raise RuntimeError(f"Slurm's nodes are {states} after {_START_S} s, want {wanted}\n{logs}")
        time.sleep(0.1)


def _start_munged(cluster: hosts.Cluster, directory: Path, stack: ExitStack) -> None:
    """One for all hosts, on the login host: its socket is a file, which all of them see."""
    key = directory / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    files = [f"--{name}-file={directory}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    # --force: the directory of a test is not open to everybody, which munged advises against
    command = ["munged", "--foreground", "--force", f"--socket={directory}/munge.socket", *files]
    _daemon(stack, cluster.login, command, directory, dict(os.environ))
    deadline = time.monotonic() + _START_S
    while not (directory / "munge.socket").exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"munged did not come up: {(directory / 'munged.login.log').read_text()}")
        time.sleep(0.02)


def _write_files(cluster: hosts.Cluster, directory: Path) -> None:
    """slurm.conf with nodes of two processors each, and the cgroup.conf that it reads although no cgroup is used."""
    nodes = "".join(f"NodeName={host.name} NodeAddr={host.address} CPUs=2 RealMemory=4000\n" for host in cluster.hosts)
    (directory / "slurm.conf").write_text(
        f"""ClusterName=ofa
SlurmctldHost=login({cluster.login.address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CredType=cred/munge
MpiDefault=none
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/linear
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
SlurmdTimeout=20
KillWait=5
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=300
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
    )
    (directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nConstrainCores=no\nConstrainRAMSpace=no\n")
