"""Jobs on processes and on MPI ranks: results in order, failures in order, a dead process is said to be one."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ofa_ds.data.pool import run_jobs, serve_if_worker


def square(number: int) -> int:
    if number < 0:
        raise ValueError(f"{number} is negative")
    return number * number


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_jobs(workers: int) -> None:
    assert list(run_jobs(square, range(20), workers)) == [number * number for number in range(20)]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_failure_in_order_is_raised(workers: int) -> None:
    with pytest.raises(ValueError, match="-3 is negative"):
        list(run_jobs(square, [1, 2, -3, 4, -5], workers))


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_before_many_jobs_is_told_without_a_thread_s_traceback() -> None:
    with pytest.raises(ValueError, match="-1 is negative"):
        list(run_jobs(square, [-1, *range(40)], 2))


def test_a_dead_process_is_a_failure_of_the_machine() -> None:
    with pytest.raises(RuntimeError, match="worker processes died.*--workers"):
        list(run_jobs(os._exit, [1, 1], 2))


def test_mpi_without_mpi4py_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(RuntimeError, match="3 ranks, but mpi4py is missing"):
        serve_if_worker()


has_mpi = shutil.which("mpirun") and importlib.util.find_spec("mpi4py")


@pytest.mark.skipif(not has_mpi, reason="mpirun or mpi4py is not installed")
def test_mpi_ranks_build_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"".join(b"%d\ttext number %d\n" % (k, k) for k in range(50)))
    build = [sys.executable, "-m", "ofa_ds.cli", "shards", "build", "--text", str(tmp_path / "a.tsv")]
    build += ["--rows-per-shard", "7", "--shard-bytes", "200", "--out"]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    env = os.environ | root | {"OMPI_MCA_rmaps_base_oversubscribe": "1"}
    subprocess.run(["mpirun", "-n", "3", *build, str(tmp_path / "mpi")], env=env, check=True, timeout=120)
    subprocess.run([*build, str(tmp_path / "alone")], check=True, timeout=120)
    names = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert sorted(path.name for path in (tmp_path / "mpi").iterdir()) == names and len(names) > 9
    assert all((tmp_path / "mpi" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes() for name in names)
