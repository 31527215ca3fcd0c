"""Independent jobs on processes of this machine, or on the ranks of an MPI job."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE")
"""Set by Open MPI's, MPICH's (and Slurm's PMI-2), Intel's, MVAPICH's, IBM's starters."""
_OTHER_SIZES = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Set by torchrun and deepspeed, by srun."""


def mpi_size() -> int:
    """Ranks of the MPI job that this process belongs to; 1 where there is none."""
    return max(int(os.environ.get(name, "1")) for name in _MPI_SIZES)


def need_one_process(command: str) -> None:
    """Raises ValueError in a job of several ranks, whoever started it."""
    ranks = max(mpi_size(), *(int(os.environ.get(name) or 1) for name in _OTHER_SIZES))
    if ranks > 1:
        raise ValueError(f"{command} was started as {ranks} ranks; start it once, with --workers")


def serve_if_worker() -> None:
    """On a rank other than 0 of an MPI job: run rank 0's jobs, and leave the program when it is done with them."""
    if mpi_size() == 1:
        return
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except ImportError as error:
        message = f"started as an MPI job of {mpi_size()} ranks, but mpi4py is missing: pip install 'ofa-ds[mpi]'"
        raise RuntimeError(message) from error
    if MPI.COMM_WORLD.rank > 0:
        with MPICommExecutor(MPI.COMM_WORLD, root=0):
            pass
        raise SystemExit(0)


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, *, threads: bool = False
) -> Iterator[Result]:
    """Results in the order of `jobs`, however many processes there are. The first failure in that order is raised.

    threads: workers are threads of this process, which start at once; for jobs that read, and do little in Python.
    Raises RuntimeError where a process dies.
    """
    if mpi_size() > 1:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor

        with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
            yield from executor.map(function, jobs)
        return
    workers = min(workers, len(jobs))
    if workers <= 1:
        yield from map(function, jobs)
        return
    if threads:
        with ThreadPoolExecutor(workers) as executor:
            yield from executor.map(function, jobs)
        return
    # Not forked: the caller may have threads, and Arrow's do not survive a fork.
    context = multiprocessing.get_context("spawn")
    before = {child.pid for child in multiprocessing.active_children()}
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(os.getpid(),)) as executor:
        try:
            waiting = [executor.submit(function, job) for job in jobs][::-1]
            while waiting:
                yield waiting.pop().result()
        except BrokenProcessPool as error:
            message = f"one of {workers} worker processes died, perhaps out of memory; use fewer --workers"
            raise RuntimeError(message) from error
        except BaseException:  # a stop, or a failure: nobody waits for what the others are at
            for child in multiprocessing.active_children():  # and not cancelled, which the pool's thread trips over
                if child.pid not in before:
                    child.kill()
            raise


def _start_worker(parent: int) -> None:
    """Ctrl-C is the parent's business; a parent that is killed takes its workers with it, before another starts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


_PR_SET_PDEATHSIG = 1
