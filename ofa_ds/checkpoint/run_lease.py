"""The lease of a run directory for all ranks of a job: rank 0 holds it, and all end together where it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ofa_ds.storage.lease import Lease, LeaseError, take

Gather = Callable[[Any], list[Any]]
"""A value of each rank to all; all ranks call it together."""


class RunLease:
    """`check`, `run` and `is_lost` speak for rank 0, which alone publishes and deletes; on others they say nothing."""

    def __init__(self, lease: Lease | None) -> None:
        """lease: rank 0's."""
        self._lease = lease

    @classmethod
    def take(cls, run_dir: Path, rank: int, gather: Gather) -> RunLease:
        """Raises LeaseError on all ranks where another job has it, RuntimeError where the directory cannot be used."""
        lease: Lease | None = None
        problem: str | None = None
        is_taken, cause = False, None
        if rank == 0:
            try:
                lease = take(run_dir)
            except LeaseError as error:
                problem, is_taken, cause = str(error), True, error
            except OSError as error:
                problem, cause = f"rank 0: {run_dir}: cannot be used as a run directory: {error}", error
        problem, is_taken = gather((problem, is_taken))[0]
        if problem:
            raise (LeaseError if is_taken else RuntimeError)(problem) from cause
        return cls(lease)

    @property
    def run(self) -> str:
        """Whose checkpoints those are that rank 0 may delete; "" elsewhere."""
        return self._lease.run if self._lease else ""

    @property
    def is_lost(self) -> bool:
        return self._lease is not None and self._lease.is_lost

    def check(self) -> None:
        """Raises LeaseError where another job has taken it, OSError."""
        if self._lease is not None:
            self._lease.check()

    def check_together(self, gather: Gather) -> None:
        """`check`, for all ranks: where rank 0 raises, all do."""
        problem: str | None = None
        try:
            self.check()
        except (LeaseError, OSError) as error:
            problem = str(error)
        if problem := gather(problem)[0]:
            raise LeaseError(problem)

    def release(self) -> None:
        if self._lease is not None:
            self._lease.release()


@contextmanager
def run_lease(run_dir: str | Path, rank: int, gather: Gather) -> Iterator[RunLease]:
    """The lease for as long as the block runs; all ranks enter it together."""
    lease = RunLease.take(Path(run_dir), rank, gather)
    try:
        yield lease
    finally:
        lease.release()
