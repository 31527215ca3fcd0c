"""Which process of how many this is, whoever started it: nobody, deepspeed, torchrun, srun or mpirun.

`rendezvous` turns what the launcher left in the environment into the five variables that torch and DeepSpeed read.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import torch

from ofa_ds.engine.host_memory import keep_freed_memory

_STANDARD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_DEFAULT_PORT = 29500


@dataclass(frozen=True, kw_only=True)
class Ranks:
    rank: int
    world_size: int
    local_rank: int
    """Number of this process on its host."""
    device: torch.device
    """`cpu`, or this process's GPU."""


def rendezvous(env: Mapping[str, str]) -> dict[str, str]:
    """The variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for this process.

    Raises ValueError where a launcher left only some of them, or where nothing says which host rank 0 is on.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        missing = [name for name in _STANDARD if name not in env]
        if missing:
            raise ValueError(
                f"the environment has RANK or WORLD_SIZE but not {', '.join(missing)}; "
                f"set all of {', '.join(_STANDARD)}, or start with deepspeed, torchrun, srun or mpirun"
            )
        return {name: env[name] for name in _STANDARD}
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:  # a batch script lacks the first
        return _from_slurm(env)
    if "OMPI_COMM_WORLD_SIZE" in env:
        return _from_open_mpi(env)
    return dict(zip(_STANDARD, ("0", "1", "0", "127.0.0.1", str(_free_port())), strict=True))


def _from_slurm(env: Mapping[str, str]) -> dict[str, str]:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    address = env.get("MASTER_ADDR") or first_host(nodes)
    job = int(env.get("SLURM_JOB_ID", "0"))
    port = env.get("MASTER_PORT") or str(_DEFAULT_PORT + (job * 31 + int(env.get("SLURM_STEP_ID", "0"))) % 10_000)
    values = (env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"], env.get("SLURM_LOCALID", "0"), address, port)
    return dict(zip(_STANDARD, values, strict=True))


def _from_open_mpi(env: Mapping[str, str]) -> dict[str, str]:
    size, local_size = env["OMPI_COMM_WORLD_SIZE"], env.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    address = env.get("MASTER_ADDR") or ("127.0.0.1" if size == local_size else "")
    if not address:
        raise ValueError(
            f"mpirun started {size} processes on several hosts and nothing says which is the first; "
            f"use: mpirun -x MASTER_ADDR=HOST_OF_RANK_0 ..."
        )
    port = env.get("MASTER_PORT", str(_DEFAULT_PORT))
    values = (env["OMPI_COMM_WORLD_RANK"], size, env.get("OMPI_COMM_WORLD_LOCAL_RANK", "0"), address, port)
    return dict(zip(_STANDARD, values, strict=True))


def first_host(nodes: str) -> str:
    """First host of a Slurm node list: `gpu[007-009,12],login1` gives `gpu007`."""
    match = re.match(r"([^\[,\s]+)(?:\[(\d+)[^\]]*\])?([^,\s]*)", nodes)
    if not match:
        raise ValueError(f"SLURM_JOB_NODELIST {nodes!r}: want host names; set MASTER_ADDR to the host of rank 0")
    return "".join(part or "" for part in match.groups())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def choose_device(local_rank: int, env: MutableMapping[str, str], wanted: str | None) -> torch.device:
    """This process's device; also tells DeepSpeed, which reads DS_ACCELERATOR and LOCAL_RANK.

    wanted: "cpu", "cuda", or None for a GPU where there is one.
    """
    kind = wanted or env.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device {kind!r}: want cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("a GPU was asked for and torch finds none; check nvidia-smi and the torch build, or use cpu")
    env["DS_ACCELERATOR"] = kind
    if kind == "cpu":
        keep_freed_memory()
        return torch.device("cpu")
    index = local_rank % torch.cuda.device_count()  # srun may show each process just its own GPU
    env["LOCAL_RANK"] = str(index)
    return torch.device("cuda", index)
