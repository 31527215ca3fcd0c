"""The exact commands of every runner, in one table. An existing engine starts the ranks; these are its arguments.

`deepspeed` and `torchrun` have a part a host (`node_argv`), which an agent on that host starts. `slurm`, `openmpi` and
`mpich` have one command on the launching host (`central_argv`), which starts an agent in the place of each rank.
Nothing here meets a shell: these are argument lists.
"""

from __future__ import annotations

import base64
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ofa_ds.cluster.job import RUNNERS, Job

OF_AGENTS = ("OFA_AGENT", "PYTHONPATH")
"""Variables of the launching process that agents started by a central runner need; ranks get theirs from the agents."""


@dataclass(frozen=True)
class Runner:
    programs: tuple[str, ...]
    """What starts it here: the first that is in PATH."""
    package: str
    """Where that comes from, for a machine that lacks it."""
    node: Callable[[Job, int], list[str]] | None = None
    """(job, number of the host) -> the words before the command of a rank."""
    central: Callable[[Job], list[str]] | None = None
    """job -> the words after the program and before the command of an agent."""


def is_central(job: Job) -> bool:
    """Whether one command on the launching host starts all agents, one a rank."""
    return TABLE[job.runner].central is not None


def node_argv(job: Job, host_index: int, rank_argv: Sequence[str]) -> list[str]:
    """What the agent of a host starts: the engine's own part there, which starts `rank_argv` once a slot."""
    node = TABLE[job.runner].node
    assert node is not None, job.runner
    return [*node(job, host_index), *rank_argv]


def central_argv(job: Job, agent_argv: Sequence[str]) -> list[str]:
    """The one command that starts `agent_argv` once a rank. Raises ValueError, RuntimeError as `check` does."""
    central = TABLE[job.runner].central
    assert central is not None, job.runner
    return [check(job), *central(job), *agent_argv]


def check(job: Job) -> str:
    """The program that starts the runner, where this machine has it and the runner can start these hosts.

    Raises RuntimeError for a missing program, ValueError for names of hosts that the runner would misread.
    """
    runner = TABLE[job.runner]
    for host in job.hosts:
        if runner.central and (":" in host.name or "@" in host.name):
            what = "user before a host: put `User` into ~/.ssh/config" if "@" in host.name else "address with colons"
            raise ValueError(f"{host.name}: --runner {job.runner} takes no {what}")
    for program in runner.programs:
        if shutil.which(program):
            return program
    wanted = f"want {' or '.join(runner.programs)} in PATH"
    raise RuntimeError(f"--runner {job.runner}: {wanted}; on Debian and Ubuntu: apt-get install {runner.package}")


def _deepspeed(job: Job, host_index: int) -> list[str]:
    """DeepSpeed's own part of a host. Its LOCAL_RANK is the rank modulo the slots of the host: where hosts have unequal
    slots each rank still has a GPU of its own, in turned order.
    """
    hosts = {host.name: list(host.device_numbers) for host in job.hosts}
    world = base64.urlsafe_b64encode(json.dumps(hosts).encode()).decode()
    command = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
    command += [f"--node_rank={host_index}", f"--master_addr={job.master_address}", f"--master_port={job.master_port}"]
    return [*command, "--no_python", "--no_local_rank", "--log_level=warning"]


def _torchrun(job: Job, host_index: int) -> list[str]:
    """Static rendezvous: hosts tell one another how many ranks they have, so that unequal slots count right."""
    command = [sys.executable, "-u", "-m", "torch.distributed.run", f"--nnodes={len(job.hosts)}"]
    command += [f"--node_rank={host_index}", f"--nproc_per_node={job.hosts[host_index].slots}", "--max_restarts=0"]
    return [*command, f"--master_addr={job.master_address}", f"--master_port={job.master_port}", "--no_python"]


def _slurm(job: Job) -> list[str]:
    """Ranks in the order of the hosts (`arbitrary`), on all cores of a node, also while a step that ends lingers."""
    places = ",".join(host.name for host in job.hosts for _ in range(host.slots))
    command = ["--ntasks", str(job.num_ranks), "--nodes", str(len(job.hosts)), "--distribution", "arbitrary"]
    command += ["--nodelist", places, "--overlap", "--kill-on-bad-exit=0", "--cpu-bind=none", "--mpi=none"]
    return [*command, "--input=none"]


def _openmpi(job: Job) -> list[str]:
    """Ranks in the order of the list (`seq`): else the launching host, where it takes part, would have rank 0.

    With these keepalive times a host that is gone is noticed within six seconds, by default in hours.
    """
    places = ",".join(host.name for host in job.hosts for _ in range(host.slots))
    command = ["--allow-run-as-root", "-np", str(job.num_ranks), "--host", places]
    command += ["--map-by", "seq", "--bind-to", "none"]
    for name, value in (("time", 2), ("intvl", 1), ("probes", 3)):
        command += ["--mca", f"oob_tcp_keepalive_{name}", str(value)]
    return [*command, *(word for name in OF_AGENTS for word in ("-x", name))]


def _mpich(job: Job) -> list[str]:
    """Without `-genvlist` every variable of this shell would go to all hosts, passwords too."""
    places = ",".join(f"{host.name}:{host.slots}" for host in job.hosts)
    command = ["-launcher", "ssh", "-hosts", places, "-n", str(job.num_ranks)]
    return [*command, "-genvlist", ",".join(OF_AGENTS), "-bind-to", "none"]


TABLE: dict[str, Runner] = {
    "deepspeed": Runner(("ssh",), "openssh-client", node=_deepspeed),
    "torchrun": Runner(("ssh",), "openssh-client", node=_torchrun),
    "slurm": Runner(("srun",), "slurm-client", central=_slurm),
    "openmpi": Runner(("mpirun.openmpi", "mpirun"), "openmpi-bin", central=_openmpi),
    "mpich": Runner(("mpirun.mpich", "mpiexec.hydra"), "mpich", central=_mpich),
}
assert tuple(TABLE) == RUNNERS
