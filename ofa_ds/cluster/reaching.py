"""Asks the first host, over the channel that ranks are started through, what the launch has to know of it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping

from ofa_ds.cluster import rdma
from ofa_ds.cluster.channels import SSH
from ofa_ds.cluster.hostfile import Host
from ofa_ds.cluster.job import Job

_LIMIT_S = 60.0
_CONNECT_S = 10
_RANGE = re.compile(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?")


def ask(job: Job) -> tuple[str, rdma.Facts | None]:
    """(address of rank 0: the one that the job has, else the first that the first host says it has; its facts).

    Raises RuntimeError, one line, where the host is not reached. Slurm outside an allocation has no host to ask yet.
    """
    host = job.hosts[0]
    command = _command(job, host)
    if command is None:
        return job.master_address or host.name, None
    try:
        done = subprocess.run(
            command, input=rdma.PROBE, capture_output=True, text=True, errors="replace", timeout=_LIMIT_S
        )
    except OSError as error:
        raise RuntimeError(f"want {command[0]} to start ranks on other hosts: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{host.name}: no answer through {command[0]} within {_LIMIT_S:g} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        how = "ssh does not get there by key" if command[0] == "ssh" else f"{command[0]} does not get there"
        raise RuntimeError(f"{host.name}: {how}: {lines[-1]}")
    first = next(iter(done.stdout.partition("\n")[0].split()), host.machine)
    return job.master_address or first, rdma.facts_of_probe(host.name, done.stdout)


def _command(job: Job, host: Host) -> list[str] | None:
    """Runs `sh` there with a script from stdin; None where there is nothing to ask yet."""
    if job.runner != "slurm":
        return [*SSH, "-o", f"ConnectTimeout={_CONNECT_S}", "--", host.name, "exec sh -s"]
    if "SLURM_JOB_ID" not in os.environ:
        return None
    place = ["--nodes=1", "--ntasks=1", "--nodelist", host.name]
    return ["srun", *place, "--overlap", "--mpi=none", "sh", "-s"]


def hosts_of_allocation(environment: Mapping[str, str]) -> list[Host]:
    """The nodes of this Slurm allocation; slots are its tasks a node, else its GPUs a node.

    Raises ValueError, one line, for variables that Slurm would not write, RuntimeError where Slurm does not answer.
    """
    nodes, tasks = environment.get("SLURM_JOB_NODELIST", ""), environment.get("SLURM_TASKS_PER_NODE", "")
    if not nodes or nodes.startswith("-"):
        raise ValueError(f"SLURM_JOB_NODELIST {nodes!r}: want the nodes of the allocation, or --hostfile")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"scontrol does not say the hosts of {nodes}: {error}") from error
    names = done.stdout.split()
    if done.returncode or not names:
        raise RuntimeError(f"scontrol does not say the hosts of {nodes}: {done.stderr.strip()[-200:]}")
    slots = _tasks(tasks, len(names))
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    if not {"SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"} & environment.keys() and gpus.isdecimal() and int(gpus):
        slots = [int(gpus)] * len(names)
    return [Host(name, count) for name, count in zip(names, slots, strict=True)]


def _tasks(text: str, num_hosts: int) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]."""
    found: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        found += [int(match[1])] * int(match[2] or 1) if match else []
    if len(found) != num_hosts or not all(found):
        raise ValueError(f"SLURM_TASKS_PER_NODE {text!r}: want the tasks of each of {num_hosts} nodes, or --hostfile")
    return found
