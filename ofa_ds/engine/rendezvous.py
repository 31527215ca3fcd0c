"""Which process of how many this is, by what a launcher left in the environment. Standard library only, but for mpi4py.

`rendezvous` turns it into the five variables that torch and DeepSpeed read. Where anything says that there are more
processes and not which one this is, that is an error: many ranks that each train alone would look like success.
"""

from __future__ import annotations

import functools
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STANDARD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_DEFAULT_PORT = 29500
_HOST = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class _Launcher:
    """Names of its variables; "" where it has none."""

    rank: str
    size: str
    local_rank: str
    """Number of the process on its host."""
    local_size: str
    pass_on: str
    """How a user hands MASTER_ADDR to all ranks."""


_SLURM = _Launcher("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "", "export MASTER_ADDR=HOST")
_MPI = (
    _Launcher(*(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
              "mpirun -x MASTER_ADDR=HOST"),
    _Launcher(*(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
              "mpirun_rsh ... MASTER_ADDR=HOST"),
    _Launcher("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "mpiexec -genv MASTER_ADDR HOST"),
    _Launcher("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE", "mpiexec -genv MASTER_ADDR HOST"),
    _Launcher(*(f"JSM_NAMESPACE_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
              "jsrun -E MASTER_ADDR=HOST"),
    _Launcher("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", "", "flux run --env=MASTER_ADDR=HOST"),
    _Launcher("PMIX_RANK", "", "", "", "mpirun -x MASTER_ADDR=HOST"),
)  # fmt: skip
"""Open MPI; MVAPICH; Hydra, which starts MPICH, Intel MPI and MVAPICH; Cray; jsrun; Flux; anything with PMIx."""


@dataclass(frozen=True)
class _Claim:
    """What one launcher's variables say; None where they do not."""

    launcher: _Launcher
    rank: int | None
    size: int | None
    local_rank: int | None
    local_size: int | None

    @property
    def complete(self) -> bool:
        return self.rank is not None and self.size is not None

    def __str__(self) -> str:
        parts = ((self.launcher.rank, self.rank), (self.launcher.size, self.size))
        parts += ((self.launcher.local_rank, self.local_rank), (self.launcher.local_size, self.local_size))
        return ", ".join(f"{name}={value}" for name, value in parts if value is not None)


def rendezvous(env: Mapping[str, str]) -> dict[str, str]:
    """The variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for this process.

    Raises ValueError, one line, where launchers say too little, contradict one another or themselves, or where nothing
    says which host rank 0 is on.
    """
    claims = [claim for launcher in (*_MPI, _SLURM) if (claim := _claim(env, launcher)) is not None]
    if "RANK" in env or "WORLD_SIZE" in env:
        missing = [name for name in STANDARD if name not in env]
        if missing:
            raise ValueError(
                f"the environment has RANK or WORLD_SIZE but not {', '.join(missing)}; "
                f"set all of {', '.join(STANDARD)}, or start with deepspeed, torchrun, srun or mpirun"
            )
        found = {name: env[name] for name in STANDARD}
    else:
        found = _from_claims(env, claims)
    _check(found)
    is_told = "RANK" in env
    crowd = [claim for claim in claims if (claim.size or 1) > 1 or (claim.rank and not is_told)]
    if int(found["WORLD_SIZE"]) == 1 and crowd:
        name = crowd[0].launcher.size if crowd[0].size else crowd[0].launcher.rank
        raise ValueError(
            f"this process would train alone, but its environment has {crowd[0]}: each of those would train the same; "
            f"start them with one launcher, or unset {name} where they are separate runs"
        )
    return found


def _claim(env: Mapping[str, str], launcher: _Launcher) -> _Claim | None:
    names = (launcher.rank, launcher.size, launcher.local_rank, launcher.local_size)
    values = [_number(name, env[name], least=i % 2) if name in env else None for i, name in enumerate(names)]
    if launcher is _SLURM and values[1] is None and not values[0]:
        return None  # a batch script is task 0 and has no step
    claim = _Claim(launcher, *values)
    if claim.complete and claim.rank >= claim.size:
        raise ValueError(f"the environment has {claim}: want {launcher.rank} below {launcher.size}")
    return None if values == [None] * 4 else claim


def _from_claims(env: Mapping[str, str], claims: Sequence[_Claim]) -> dict[str, str]:
    complete = [claim for claim in claims if claim.complete]
    slurm = [claim for claim in complete if claim.launcher is _SLURM]
    mpi = [claim for claim in complete if claim.launcher is not _SLURM]
    if not claims:
        return _found(0, 1, 0, "127.0.0.1", str(_free_port()))
    if not complete:
        return _ask_mpi(env, claims[0])
    # Where mpirun starts daemons by srun, its ranks see the Slurm variables of their daemon: another size.
    relevant = [*mpi, *(claim for claim in slurm if not mpi or claim.size == mpi[0].size)]
    for other in relevant:
        if (other.rank, other.size) != (relevant[0].rank, relevant[0].size):
            pair = f"{relevant[0]} against {other}"
            raise ValueError(f"two launchers disagree: {pair}; unset the variables of the outer one")
    if relevant[-1].launcher is _SLURM:  # it knows the hosts
        return _from_slurm(env, relevant[-1])
    first = next((claim for claim in mpi if claim.local_rank is not None), mpi[0])
    address = env.get("MASTER_ADDR") or ("127.0.0.1" if first.size in (1, first.local_size) else None)
    local_rank = first.local_rank if first.size > 1 else 0
    if local_rank is None or address is None:
        return _ask_mpi(env, first)
    return _found(first.rank, first.size, local_rank, address, env.get("MASTER_PORT") or str(_DEFAULT_PORT))


def _from_slurm(env: Mapping[str, str], claim: _Claim) -> dict[str, str]:
    local_rank = claim.local_rank if claim.size > 1 else 0
    if local_rank is None:
        raise ValueError(f"the environment has {claim} but not {_SLURM.local_rank}; start the ranks with srun")
    address = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", ""))
    job, step = (_number(name, env.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = env.get("MASTER_PORT") or str(_DEFAULT_PORT + (job * 31 + step) % 10_000)
    return _found(claim.rank, claim.size, local_rank, address, port)


def _ask_mpi(env: Mapping[str, str], claim: _Claim) -> dict[str, str]:
    """What MPI itself says, by mpi4py: for launchers whose variables lack the size, or the host of rank 0."""
    what = f"the environment has {claim}"
    if claim.launcher is _SLURM:
        raise ValueError(f"{what} but not all of {_SLURM.rank}, {_SLURM.size}; start the ranks with srun")
    lack = "not which host rank 0 is on" if claim.complete else "not how many processes there are and which this one is"
    way_out = f"set all of {', '.join(STANDARD)} for each process"
    if claim.complete and claim.local_rank is not None:
        way_out = f"use: {claim.launcher.pass_on} ..."
    try:
        rank, size, local_rank, address, port = _discover()
    except (ImportError, RuntimeError) as error:
        reason = "install mpi4py" if isinstance(error, ModuleNotFoundError) else f"mend mpi4py ({error})"
        raise ValueError(f"{what}, {lack}; {way_out}, or {reason}") from error
    if claim.size not in (None, size) or claim.rank not in (None, rank):
        raise ValueError(
            f"{what}, mpi4py of another MPI says process {rank} of {size}; {way_out}, or set MPI4PY_MPIABI"
        )
    return _found(rank, size, local_rank, env.get("MASTER_ADDR") or address, env.get("MASTER_PORT") or str(port))


@functools.cache  # MPI starts once in a process
def _discover() -> tuple[int, int, int, str, int]:
    """(rank, size, rank on this host, an address of rank 0, a port that is free there).

    MPI is over before this returns: training speaks NCCL or gloo, and MPI minds processes that fork.
    """
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    MPI.Init()
    try:
        world = MPI.COMM_WORLD
        here = world.Split_type(MPI.COMM_TYPE_SHARED)
        place = bytearray(256)
        if world.rank == 0:
            text = f"{_own_address()} {_free_port()}".encode()
            place[: len(text)] = text
        world.Bcast(place)  # not `bcast`, which pickles
        address, port = place.rstrip(b"\0").decode().split()
        return world.rank, world.size, here.rank, address, int(port)
    finally:
        MPI.Finalize()


def _own_address() -> str:
    """The first address of this host, as launchers/pretrain.sh takes it; else its name."""
    try:
        output = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        output = ""
    return next(iter(output.split()), socket.gethostname())


def first_host(nodes: str) -> str:
    """First host of a Slurm node list: `gpu[007-009,12],login1` gives `gpu007`.

    Slurm is asked where it is there; else each bracket's first number counts. Raises ValueError for other lists.
    """
    if "[" in nodes and (asked := _ask_slurm(nodes)):
        return asked
    first = re.match(r"(?:[^\[\],]|\[[^\[\]]*\])*", nodes)[0]
    host = re.sub(r"\[([^\]]*)\]", lambda group: _first_number(group[1]), first)
    if not _HOST.fullmatch(host) or nodes[len(first) :][:1] not in ("", ","):
        raise ValueError(
            f"the Slurm node list {nodes!r}: cannot tell the first host; set MASTER_ADDR to that of rank 0"
        )
    return host


def _first_number(numbers: str) -> str:
    """`007` of `007-009,12`, with its zeros; "[" for anything else, which no name of a host has."""
    ranges = [re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part) for part in numbers.split(",")]
    if not all(match and int(match[1]) <= int(match[2] or match[1]) for match in ranges):
        return "["
    return ranges[0][1]


def _ask_slurm(nodes: str) -> str | None:
    scontrol = shutil.which("scontrol")
    if scontrol is None or nodes.startswith("-"):
        return None
    try:
        command = [scontrol, "show", "hostnames", nodes]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    first = done.stdout.partition("\n")[0]
    return first if done.returncode == 0 and _HOST.fullmatch(first) else None


def _found(rank: int, size: int, local_rank: int, address: str, port: str) -> dict[str, str]:
    return dict(zip(STANDARD, (str(rank), str(size), str(local_rank), address, port), strict=True))


def _check(found: Mapping[str, str]) -> None:
    rank, size, local_rank = (
        _number(name, found[name], least) for name, least in zip(STANDARD, (0, 1, 0), strict=False)
    )
    if max(rank, local_rank) >= size:
        raise ValueError(f"RANK={rank}, WORLD_SIZE={size}, LOCAL_RANK={local_rank}: want both ranks below the size")
    if not 0 < _number("MASTER_PORT", found["MASTER_PORT"]) < 65536:
        raise ValueError(f"MASTER_PORT {found['MASTER_PORT']!r}: want a number from 1 to 65535")
    if not re.fullmatch(r"\S+", found["MASTER_ADDR"]):
        raise ValueError(f"MASTER_ADDR {found['MASTER_ADDR']!r}: want the name or address of the host of rank 0")


def _number(name: str, text: str, least: int = 0) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < least:
        raise ValueError(f"{name} {text!r}: want a whole number of at least {least}")
    return int(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
