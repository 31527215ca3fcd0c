"""Which process of how many: found whoever started it, or refused in one line; never alone by mistake.

Launchers are real where this machine has them: mpirun of Open MPI, mpiexec of MPICH (Hydra), scontrol of Slurm.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ofa_ds.engine.rendezvous import _MPI, _SLURM, STANDARD, first_host, rendezvous

ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)


@pytest.fixture
def no_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")


def test_alone_it_is_rank_0_of_1() -> None:
    found = rendezvous({})
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert 1024 < int(found["MASTER_PORT"]) < 65536


def test_torchrun_and_deepspeed_are_taken_as_they_are() -> None:
    env = dict(RANK="3", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="a", MASTER_PORT="29501")
    assert rendezvous({**env, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}) == env


def test_half_an_environment_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match="not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        rendezvous({"RANK": "0", "WORLD_SIZE": "2"})


def test_srun(no_scontrol: None) -> None:
    env = dict(SLURM_PROCID="5", SLURM_STEP_NUM_TASKS="16", SLURM_LOCALID="1", SLURM_STEP_NODELIST="gpu[007-010,12],x1",
               SLURM_JOB_ID="4711", SLURM_STEP_ID="0")  # fmt: skip
    found = rendezvous(env)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("5", "16", "1")
    assert found["MASTER_ADDR"] == "gpu007"
    assert found["MASTER_PORT"] == rendezvous({**env, "SLURM_PROCID": "0"})["MASTER_PORT"], "the same on every rank"


def test_a_batch_script_without_srun_is_one_process() -> None:
    assert rendezvous({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"})["WORLD_SIZE"] == "1"


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[007-009,12]", "gpu007"),
        ("a-b[3,5]-ib,c", "a-b3-ib"),
        ("x.y,z", "x.y"),
        ("rack[0-1]_blade[0-1]", "rack0_blade0"),
        ("x1000c0s[3-4]b[0-1]n0", "x1000c0s3b0n0"),
        ("a[1,3-5],b2", "a1"),
        ("[3-4]n,x", "3n"),
    ],
)
def test_first_host_of_a_slurm_list(nodes: str, host: str, no_scontrol: None) -> None:
    assert first_host(nodes) == host


def test_mpirun_on_one_host_and_on_several(no_mpi4py: None) -> None:
    env = dict(OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_LOCAL_RANK="1",
               OMPI_COMM_WORLD_LOCAL_SIZE="2")  # fmt: skip
    found = rendezvous(env)
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("1", "2", "127.0.0.1")
    with pytest.raises(ValueError, match="-x MASTER_ADDR"):
        rendezvous({**env, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    assert rendezvous({**env, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "MASTER_ADDR": "h1"})["MASTER_ADDR"] == "h1"


@pytest.mark.parametrize(
    "nodes",
    ["dgx-[a1-a4]", "", "a[1", "a]1", "a[]", "a[[1]]", "a[2-1]", "a[1:2]", "a b", ",a", "$(id)", "a[1-2", "-n[1-2]"],
)
def test_a_slurm_list_that_is_not_understood_is_refused_in_one_line(nodes: str, no_scontrol: None) -> None:
    with pytest.raises(ValueError, match="cannot tell the first host; set MASTER_ADDR to that of rank 0") as caught:
        first_host(nodes)
    assert len(str(caught.value).splitlines()) == 1


def test_slurm_is_asked_where_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/bash\n[ $# -eq 3 ] && [ "$1 $2" = "show hostnames" ] && printf "%s-of\\nb\\n" "${3//[^a-z]/}"'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert first_host("dgx-[a1-a4],$(touch x) 'b") == "dgxaatouchxb-of"
    scontrol.write_text("#!/bin/bash\necho 'scontrol: error: no configuration' >&2\nexit 1\n")
    assert first_host("gpu[3-4]x[1-2]") == "gpu3x1"
    scontrol.write_text("#!/bin/bash\necho 'gpu[3-4]'\n")  # no host's name
    assert first_host("gpu[3-4]") == "gpu3"


numbers = st.integers(0, 120).flatmap(lambda n: st.sampled_from([f"{n}", f"{n:03}"]))
ranges = st.one_of(
    numbers, st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda r: f"{r[0]:02}-{r[0] + r[1]:02}")
)
groups = st.one_of(numbers, st.lists(ranges, min_size=1, max_size=3).map(lambda parts: f"[{','.join(parts)}]"))
hosts = st.lists(st.tuples(st.text("abx-_.", min_size=1, max_size=3), groups), min_size=1, max_size=3)
lists_of_slurm = st.lists(
    hosts.map(lambda parts: "".join(text + group for text, group in parts)), min_size=1, max_size=3
)


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="scontrol is not installed (Debian package slurm-client)")
@settings(max_examples=60, deadline=None)
@given(lists_of_slurm)
def test_the_first_host_is_the_one_that_slurm_names(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    assume(names[0][0] not in "-._" or names[0][0] == "_")
    nodes = ",".join(names)
    conf = tmp_path_factory.mktemp("slurm") / "slurm.conf"
    conf.write_text("ClusterName=x\nSlurmctldHost=localhost\n")
    command = ["scontrol", "show", "hostnames", nodes]
    done = subprocess.run(command, env={**os.environ, "SLURM_CONF": str(conf)}, capture_output=True, text=True)
    assume(done.returncode == 0 and "nvalid" not in done.stdout + done.stderr)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        assert first_host(nodes) == done.stdout.splitlines()[0]


VARIABLES = sorted({name for launcher in (*_MPI, _SLURM) for name in vars(launcher).values() if name.isupper()})
small = st.integers(0, 4).map(str)
surroundings = st.fixed_dictionaries(
    {}, optional={**dict.fromkeys(VARIABLES, small), "MASTER_ADDR": st.just("h"), "MASTER_PORT": small}
)


@settings(max_examples=300)
@given(surroundings, st.booleans())
@example({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "1"}, False)
def test_no_process_trains_alone_where_anything_says_that_there_are_more(env: dict[str, str], standard: bool) -> None:
    if standard:
        env = {**env, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mpi4py", None)
        try:
            found = rendezvous(env)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
            return
    assert 0 <= int(found["RANK"]) < int(found["WORLD_SIZE"]) and int(found["LOCAL_RANK"]) < int(found["WORLD_SIZE"])
    if any(int(env.get(launcher.size, "1")) > 1 for launcher in (*_MPI, _SLURM)):
        assert int(found["WORLD_SIZE"]) > 1
    if not standard and any(int(env.get(launcher.rank, "0")) > 0 for launcher in (*_MPI, _SLURM)):
        assert int(found["WORLD_SIZE"]) > 1


@pytest.mark.parametrize("launcher", [*_MPI[:-1]], ids=lambda launcher: launcher.size)
def test_each_launcher_of_mpi_is_known(launcher, no_mpi4py: None) -> None:  # noqa: ANN001
    env = {launcher.rank: "1", launcher.size: "2", launcher.local_rank: "1", launcher.local_size: "2"}
    expected = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    if launcher.local_size:
        assert rendezvous(env) == expected
    two_hosts = {**env, launcher.local_size: "1", launcher.local_rank: "0"}
    with pytest.raises(ValueError, match=launcher.pass_on) as caught:
        rendezvous(two_hosts)
    assert len(str(caught.value).splitlines()) == 1
    found = rendezvous({**two_hosts, "MASTER_ADDR": "h", "MASTER_PORT": "7777"})
    assert found == {**expected, "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "7777"}


@pytest.mark.parametrize(
    "env, message",
    [
        ({"PMIX_RANK": "0"}, "has PMIX_RANK=0, not how many processes .*; set all of RANK, .*, or install mpi4py"),
        ({"MPI_LOCALRANKID": "0"}, "has MPI_LOCALRANKID=0, not how many"),
        ({"PMI_SIZE": "2"}, "has PMI_SIZE=2, not how many"),
        ({"SLURM_PROCID": "3"}, "SLURM_PROCID=3 but not all of SLURM_PROCID, SLURM_STEP_NUM_TASKS; start .* with srun"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2 but not all of"),
        ({"PMI_RANK": "2", "PMI_SIZE": "2"}, "want PMI_RANK below PMI_SIZE"),
        ({"PMI_RANK": "two", "PMI_SIZE": "2"}, "PMI_RANK 'two': want a whole number of at least 0"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "0"}, "SIZE '0': want a whole number of at least 1"),
        (
            {
                "SLURM_PROCID": "0",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_LOCALID": "0",
                "SLURM_JOB_NODELIST": "a",
                "SLURM_JOB_ID": "x",
            },
            "SLURM_JOB_ID .x.: want a whole number",
        ),
        (
            {"PMI_RANK": "0", "PMI_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"},
            "two launchers disagree: OMPI_COMM_WORLD_RANK=0, OMPI_COMM_WORLD_SIZE=4 against PMI_RANK=0, PMI_SIZE=2",
        ),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            "two launchers disagree: PMI_RANK=1, PMI_SIZE=2 against SLURM_PROCID=0, SLURM_STEP_NUM_TASKS=2",
        ),
        ({"PMI_RANK": "0", "PMI_SIZE": "1", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, "would train alone"),
    ],
)
def test_what_does_not_tell_the_ranks_is_refused(env: dict[str, str], message: str, no_mpi4py: None) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        rendezvous(env)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"RANK": "8"}, "RANK=8, WORLD_SIZE=8, LOCAL_RANK=1: want both ranks below the size"),
        ({"LOCAL_RANK": "8"}, "LOCAL_RANK=8: want both ranks below"),
        ({"RANK": "-1"}, "RANK '-1': want a whole number of at least 0"),
        ({"WORLD_SIZE": "8.0"}, "WORLD_SIZE '8.0': want a whole number of at least 1"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT '0': want a number from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT '65536': want a number from 1 to 65535"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT 'http': want a whole number"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR '': want the name or address of the host of rank 0"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "PMI_SIZE": "2"}, "would train alone, but .* PMI_SIZE=2"),
    ],
)
def test_variables_that_cannot_be_right_are_refused(change: dict[str, str], message: str) -> None:
    env = dict(RANK="3", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="a", MASTER_PORT="29501")
    with pytest.raises(ValueError, match=message):
        rendezvous({**env, **change})


def test_ranks_of_mpirun_inside_slurm_are_those_of_mpirun(no_mpi4py: None) -> None:
    """mpirun starts one daemon a host by srun; its ranks inherit the daemon's variables."""
    env = dict(PMI_RANK="5", PMI_SIZE="8", MPI_LOCALRANKID="1", MPI_LOCALNRANKS="4", SLURM_PROCID="1",
               SLURM_STEP_NUM_TASKS="2", SLURM_LOCALID="0", MASTER_ADDR="h")  # fmt: skip
    found = rendezvous(env)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["MASTER_ADDR"]) == ("5", "8", "1", "h")


def test_srun_with_pmi_takes_the_hosts_from_slurm(no_scontrol: None) -> None:
    env = dict(PMI_RANK="1", PMI_SIZE="2", PMIX_RANK="1", SLURM_PROCID="1", SLURM_STEP_NUM_TASKS="2", SLURM_LOCALID="0",
               SLURM_JOB_NODELIST="n[4-5]")  # fmt: skip
    assert rendezvous(env)["MASTER_ADDR"] == "n4"


STARTERS = {
    "mpirun.openmpi": ["mpirun.openmpi", "--allow-run-as-root", "--oversubscribe", "-n", "2"],
    "mpiexec.hydra": ["mpiexec.hydra", "-n", "2"],
}
TELL = """
import json, os, sys
from ofa_ds.engine.rendezvous import rendezvous
hidden = tuple(sys.argv[1:])
try:
    env = {k: v for k, v in os.environ.items() if not (hidden and k.startswith(hidden))}
    assert rendezvous(env)["WORLD_SIZE"]  # `ofa-ds pretrain` asks twice
    told = rendezvous(env)
except ValueError as error:
    told = str(error)
sys.stdout.write(json.dumps(told) + "\\n")  # at once: two ranks share the pipe
"""


def start(starter: str, tmp_path: Path, *hidden: str) -> list[dict[str, str] | str]:
    """What two ranks find; `hidden`: beginnings of names that they are not shown."""
    if shutil.which(starter) is None:
        pytest.skip(f"{starter} is not installed (Debian packages openmpi-bin, mpich)")
    (tmp_path / "tell.py").write_text(TELL)
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "SLURM_"))}
    command = [*STARTERS[starter], sys.executable, str(tmp_path / "tell.py"), *hidden]
    done = subprocess.run(
        command,
        env={**plain, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return sorted(found, key=lambda one: one if isinstance(one, str) else one["RANK"])


@pytest.mark.parametrize("starter", STARTERS)
def test_real_ranks_of_mpi_find_one_another(starter: str, tmp_path: Path) -> None:
    expected = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    assert start(starter, tmp_path) == [{**expected, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]


@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed")
def test_mpi4py_tells_what_the_variables_do_not(tmp_path: Path) -> None:
    first, second = start("mpirun.openmpi", tmp_path, "OMPI_COMM_WORLD")  # PMIX_RANK is left
    assert isinstance(first, dict) and isinstance(second, dict), (first, second)
    assert [first["RANK"], second["RANK"]] == [first["LOCAL_RANK"], second["LOCAL_RANK"]] == ["0", "1"]
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        assert first[name] == second[name]
    assert first["WORLD_SIZE"] == "2" and set(first) == set(STANDARD)


@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed")
def test_mpi4py_of_another_mpi_is_told(tmp_path: Path) -> None:
    """Without MPICH's library beside it mpi4py loads Open MPI's, in which each process is alone."""
    for told in start("mpiexec.hydra", tmp_path, "MPI_LOCALNRANKS"):
        if isinstance(told, dict):
            assert told["WORLD_SIZE"] == "2"
        else:
            assert "mpiexec -genv MASTER_ADDR HOST" in told and "mpi4py" in told
