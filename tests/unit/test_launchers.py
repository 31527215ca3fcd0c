"""What `ofa-ds launch` refuses before anything starts, and what it would hand to the ranks; launchers/*.sh.

`ssh` is a stand-in here that answers as a host would; ranks are started for real in tests/multihost.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from ofa_ds.cli import main as ofa_ds
from ofa_ds.cluster.hostfile import Host
from ofa_ds.cluster.launch import Plan, Request, prepare

LAUNCHERS = Path(__file__).parents[2] / "launchers"
RDMA_FILES = sorted((LAUNCHERS / "rdma").glob("*.env"))
INFINIBAND = "\n".join(f"port mlx5_{i} mlx5_core InfiniBand 200 Gb/sec (4X HDR) 4: ACTIVE" for i in range(8))
DATA = ("data.shards=s", "data.vocab=v")


class Desk:
    """A working directory with a hostfile, a HOME, and programs that answer as a host would."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self._monkeypatch = path, monkeypatch
        self.home, self.tools = path / "home", path / "tools"
        self.home.mkdir()
        self.tools.mkdir()
        (path / "hosts").write_text("a slots=1\nb slots=1\n")
        self.script("ssh", 'cat >/dev/null; [ -z "${FAKE_SSH:-}" ] || { echo "$FAKE_SSH" >&2; exit 255; }\n'
                    'echo "$@" >>"$HOME/asked"; echo "10.5.5.5 fd00::5"; printf "%s\\n" "${FAKE_FACTS:-}"')  # fmt: skip
        for name in set(os.environ):
            if re.match("(NCCL|GLOO|UCX|FI|TORCH|OMP|DS|OFA|PYTHON|MASTER|SLURM)_|TMPDIR", name):
                monkeypatch.delenv(name)
        monkeypatch.setenv("PATH", f"{self.tools}:{os.environ['PATH']}")
        monkeypatch.setenv("HOME", str(self.home))
        monkeypatch.chdir(path)

    def script(self, name: str, text: str) -> None:
        (self.tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (self.tools / name).chmod(0o755)

    def prepare(self, *overrides: str, env: dict[str, str] | None = None, **options: object) -> Plan:
        for name, value in (env or {}).items():
            self._monkeypatch.setenv(name, value)
        program = options.pop("program", ("pretrain", "pretrain-nano", *DATA, *overrides))
        return prepare(Request(**{"hostfile": "hosts", "program": program, **options}))

    def ranks_env(self, *, env_file: str = "/dev/null", **env: str) -> dict[str, str]:
        found = self.prepare(env=env, env_file=env_file).job.environment
        return {os.fsdecode(name): os.fsdecode(value) for name, value in found.items()}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(tmp_path, monkeypatch)


def test_the_job_has_hosts_program_directory_and_place_of_rank_0(desk: Desk) -> None:
    job = desk.prepare("run_dir=runs/a", env={"MASTER_PORT": "29555", "MASTER_ADDR": "10.1.1.1"}).job
    assert job.hosts == (Host("a", 1), Host("b", 1))
    assert job.program == (b"pretrain", b"pretrain-nano", b"data.shards=s", b"data.vocab=v", b"run_dir=runs/a")
    assert (job.directory, job.run_dir) == (bytes(desk.path), desk.path / "runs" / "a")
    assert (job.master_address, job.master_port) == ("10.1.1.1", 29555)


@pytest.mark.parametrize("out", [("--out", "vqa.json"), ("--out=vqa.json",)])
def test_a_prediction_keeps_its_launch_beside_the_result_and_takes_any_number_of_ranks(desk: Desk, out) -> None:
    program = ("predict", "runs/a", "--task", "vqa", "--shards", "s", *out)
    plan = desk.prepare(program=program, retries=1)
    assert plan.job.program == tuple(map(os.fsencode, program)) and plan.job.run_dir == desk.path / "vqa.json.launch"


def test_rank_0_is_found_at_the_first_address_of_the_first_host_and_a_free_port(desk: Desk) -> None:
    job = desk.prepare().job
    assert (job.master_address, job.master_port) == ("10.5.5.5", 0)
    assert len((desk.home / "asked").read_text().splitlines()) == 1


def test_a_filter_chooses_hosts_and_gpus_and_spares_wait(desk: Desk) -> None:
    (desk.path / "hosts").write_text("a slots=8\nb slots=8 # spare\nc slots=8\nd slots=8 # spare\n")
    plan = desk.prepare("batch.micro_rows=1", "batch.global_rows=72", include="a@c:5@b:1,0,2,3")
    assert plan.job.hosts == (Host("a", 8), Host("c", 1, (5,)))
    assert plan.spares == (Host("b", 4, (0, 1, 2, 3), spare=True),)


def test_a_host_that_ssh_does_not_reach_is_named(desk: Desk) -> None:
    with pytest.raises(RuntimeError) as caught:
        desk.prepare(env={"FAKE_SSH": "ssh: connect to host a port 22: Connection refused"})
    assert str(caught.value) == "a: ssh does not get there by key: ssh: connect to host a port 22: Connection refused"


WRONG = {
    "nobody: no such hostfile": {"hostfile": "nobody"},
    "--hostfile: want a file with one 'HOST slots=N' a line": {"hostfile": ""},
    "broken:2: 'b slot=1': want 'HOST slots=N'": {"hostfile": "broken"},
    "spares: names spares only": {"hostfile": "spares"},
    "--include 'c': 'c' is not in the hostfile; it has a, b": {"include": "c"},
    "--exclude 'a@b': leaves no host of a, b": {"exclude": "a@b"},
    "want one of them, not both": {"exclude": "a", "include": "b"},
    "launch: nothing to run; want -- pretrain|finetune RECIPE": {"program": ()},
    "launch: 'evaluate' does not run on all ranks; want -- pretrain|finetune RECIPE": {"program": ("evaluate", "x")},
    "or -- predict CHECKPOINT": {"program": ("generate", "x")},
    "launch: predict without a checkpoint": {"program": ("predict", "--out", "new.json")},
    "launch: predict without --out FILE": {"program": ("predict", "runs/a", "--task", "vqa", "--out")},
    "predict without --out FILE, beside which": {"program": ("predict", "runs/a")},
    "hosts: exists; give another --out": {"program": ("predict", "runs/a", "--out=hosts")},
    "launch: pretrain without a recipe": {"program": ("pretrain",)},
    "launch: '--retries' after the recipe: want KEY=VALUE": {"program": ("pretrain", "r", "--retries", "3")},
    "did you mean pretrain-nano?": {"program": ("pretrain", "pretrain-nan0")},
    "did you mean peak_lr?": {"program": ("pretrain", "pretrain-nano", "optim.peek_lr=1")},
    "2 ranks = 24; use global_rows 24": {"program": ("pretrain", "pretrain-nano", *DATA, "batch.global_rows=25")},
    "run_dir hosts: is a file": {"program": ("pretrain", "pretrain-nano", *DATA, "run_dir=hosts")},
    "--env nofile: no such file": {"env_file": "nofile"},
    "--env false.env: bash ends it with exit code 1": {"env_file": "false.env"},
    "MASTER_PORT '29500;id': want a number from 1 to 65535": {"env": {"MASTER_PORT": "29500;id"}},
    "MASTER_PORT '70000': want a number": {"env": {"MASTER_PORT": "70000"}},
    "MASTER_ADDR '$(id)': want a name or address of a that all hosts know": {"env": {"MASTER_ADDR": "$(id)"}},
    "--preflight nothing: not what ofa-ds preflight --json prints": {"preflight": "nothing"},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_command_is_one_line(desk: Desk, message: str) -> None:
    (desk.path / "broken").write_text("a slots=1\nb slot=1\n")
    (desk.path / "spares").write_text("a slots=1 # spare\n")
    (desk.path / "false.env").write_text("false\n")
    with pytest.raises(ValueError) as caught:
        desk.prepare(**WRONG[message])
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_missing_program_is_named(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(desk.home))
    with pytest.raises(RuntimeError, match="--runner openmpi: want mpirun.openmpi or mpirun in PATH"):
        desk.prepare(runner="openmpi")


FOUR = "a slots=1\nb slots=1\nc slots=1\nd slots=1\n"
UNEQUAL = "a slots=5\nb slots=1\nc slots=1\nd slots=1 # spare\n"


@pytest.mark.parametrize(
    ("hosts", "retries", "rows", "expected"),
    [
        (FOUR, 0, 20, []),
        (FOUR, 1, 24, []),
        (FOUR, 1, 20, ["after losing 1 host 3 ranks may be left, over which the batch does not divide: at most 2"]),
        (UNEQUAL, 9, 7, ["after losing 2 hosts 6 ranks may be left, over", "after losing 3 hosts 5 ranks may be left"]),
    ],
)  # fmt: skip
def test_losses_that_leave_hosts_idle_are_told_beforehand(
    desk: Desk, hosts: str, retries: int, rows: int, expected: list[str]
) -> None:
    (desk.path / "hosts").write_text(hosts)
    warnings = desk.prepare("batch.micro_rows=1", f"batch.global_rows={rows}", retries=retries).warnings
    assert [line.startswith(start) for line, start in zip(warnings, expected, strict=True)] == [True] * len(expected)


@pytest.mark.parametrize("runner", ["deepspeed", "openmpi"])
def test_a_dry_run_prints_every_command_and_variable_and_starts_nothing(
    desk: Desk, runner: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.script("mpirun.openmpi", "touch started")
    env = {"NCCL_A": "it's", "MLFLOW_TRACKING_TOKEN": "hidden"}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    words = ["launch", "--hostfile", "hosts", "--runner", runner, "--include", "a@b:0", "--dry-run"]
    assert ofa_ds([*words, "--", "pretrain", "pretrain-nano", *DATA, "run_dir=it's a"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"NCCL_A='it'\"'\"'s'", "MLFLOW_TRACKING_TOKEN=(not shown)", "MASTER_ADDR=10.5.5.5"} <= set(lines)
    ranks = [shlex.split(line) for line in lines if "ofa_ds.cluster.rank" in line]
    assert [words[-5:] for words in ranks] == [["pretrain", "pretrain-nano", *DATA, "run_dir=it's a"]] * 2
    starters = [shlex.split(line)[0] for line in lines if "ofa_ds.cluster.agent" in line]
    assert starters == (["ssh", "ssh"] if runner == "deepspeed" else ["mpirun.openmpi"])
    assert not (desk.path / "started").exists() and not (desk.path / "runs").exists()


# Slurm ----------------------------------------------------------------


def allocation(desk: Desk, **variables: str) -> tuple[Host, ...]:
    desk.script("scontrol", 'printf "n7\\nn8\\n"')
    desk.script("srun", 'cat >/dev/null; echo "10.6.6.6"')
    env = {"SLURM_JOB_ID": "3", "SLURM_JOB_NODELIST": "n[7-8]", **variables}
    return desk.prepare("batch.micro_rows=1", hostfile="", runner="slurm", env=env).job.hosts


def test_an_allocation_gives_its_nodes_and_tasks(desk: Desk) -> None:
    assert allocation(desk, SLURM_TASKS_PER_NODE="2,1", SLURM_NTASKS="3") == (Host("n7", 2), Host("n8", 1))


def test_an_allocation_without_tasks_gives_its_gpus(desk: Desk) -> None:
    assert allocation(desk, SLURM_TASKS_PER_NODE="1(x2)", SLURM_GPUS_ON_NODE="4") == (Host("n7", 4), Host("n8", 4))


def test_outside_an_allocation_slurm_wants_a_hostfile_and_nobody_is_asked(desk: Desk) -> None:
    desk.script("srun", "exit 9")
    plan = desk.prepare(runner="slurm")
    assert plan.job.master_address == "a" and plan.settings.startswith("none")


# Environment ----------------------------------------------------------


def test_only_what_training_reads_is_forwarded(desk: Desk) -> None:
    given = dict(NCCL_DEBUG="INFO", OMP_NUM_THREADS="4", SECRET_TOKEN="x", MASTER_PORT="1234", DS_ENV_FILE="none")
    env = desk.ranks_env(**given)
    assert env["NCCL_DEBUG"] == "INFO" and env["OMP_NUM_THREADS"] == "4"
    assert not {"SECRET_TOKEN", "MASTER_PORT", "PYTHON", "PATH", "HOME", "DS_ENV_FILE"} & env.keys()


def test_ranks_import_this_checkout_first(desk: Desk) -> None:
    root = LAUNCHERS.parent
    assert desk.ranks_env(PYTHONPATH=f"/mine:{root}")["PYTHONPATH"] == f"{root}:{root}/kernels:/mine"


def test_a_user_file_with_comments_and_blank_lines_is_read_and_left_alone(desk: Desk) -> None:
    text = "# mine\n\nexport NCCL_DEBUG=WARN\n  MY_SETTING=a=b\n\n"
    (desk.home / ".deepspeed_env").write_text(text)
    (desk.path / ".deepspeed_env").write_text("NCCL_DEBUG=VERSION")  # no line end
    env = desk.ranks_env()
    assert env["MY_SETTING"] == "a=b"
    assert env["NCCL_DEBUG"] == "VERSION"
    assert (desk.home / ".deepspeed_env").read_text() == text


def test_a_malformed_user_file_names_file_and_line(desk: Desk) -> None:
    (desk.home / ".deepspeed_env").write_text("A=1\nB 2\n")
    with pytest.raises(ValueError, match=f"{desk.home}/.deepspeed_env:2: 'B 2': want NAME=VALUE"):
        desk.prepare()


@pytest.mark.parametrize("value", ['a"b', "it's", "$HOME/x", "`id`", "a\\b"])
def test_a_value_that_deepspeed_would_let_a_shell_read_is_refused_in_a_file(desk: Desk, value: str) -> None:
    (desk.path / ".deepspeed_env").write_text(f"# mine\nMY={value}\n")
    with pytest.raises(ValueError, match=r"^\.deepspeed_env:2: "):
        desk.prepare()


def test_any_value_of_the_environment_arrives(desk: Desk) -> None:
    odd = 'it\'s "a" $HOME `id` \\ ;>P \n \u00e9 \udcff '
    given = {name: f"{name}{odd}" for name in ("NCCL_A", "UCX_A", "MV2_A", "PYTHONA", "MLFLOW_A", "OFA_A", "TMPDIR")}
    assert given.items() <= desk.ranks_env(**given).items()
    assert not (desk.path / "P").exists()


def test_a_network_file_fills_gaps_and_overrides_nothing(desk: Desk) -> None:
    (desk.path / ".deepspeed_env").write_text("NCCL_CROSS_NIC=1\n")
    env_file = str(LAUNCHERS / "rdma" / "infiniband.env")
    env = desk.ranks_env(env_file=env_file, NCCL_IB_TIMEOUT="14", NCCL_IB_HCA="")
    assert env["NCCL_IB_TIMEOUT"] == "14"
    assert env["NCCL_IB_HCA"] == ""  # set to nothing is set
    assert env["NCCL_CROSS_NIC"] == "1"
    assert env["NCCL_SOCKET_IFNAME"] == "^lo,docker,virbr,veth"


def test_a_settings_file_is_sourced_with_all_that_is_set_before_it_and_changes_nothing_else(desk: Desk) -> None:
    (desk.path / "mine.env").write_text(
        ': "${MASTER_PORT=29777}"\nrecipe=x hostfile=y\nNCCL_A="$NCCL_B c"\necho loud\n'
    )
    (desk.path / ".deepspeed_env").write_text("NCCL_B=b\nrecipe=kept\n")
    (desk.tools / "mine.env").write_text("exit 3\n")  # `source mine.env` would take this one
    job = desk.prepare(env_file="mine.env").job
    assert job.master_port == 29777
    assert job.environment[b"NCCL_A"] == b"b c"


# Profiles -------------------------------------------------------------


def test_the_profile_that_fits_the_first_host_fills_gaps_but_not_what_the_host_sets(desk: Desk) -> None:
    facts = f"{INFINIBAND}\nset NCCL_IB_TIMEOUT"
    plan = desk.prepare(env={"FAKE_FACTS": facts, "NCCL_CROSS_NIC": "1"})
    env = plan.job.environment
    assert plan.settings.endswith("infiniband.env (a has 8 active InfiniBand RDMA ports, 1600 Gb/s together)")
    assert env[b"NCCL_IB_HCA"] == b"^mlx5_bond_0" and env[b"NCCL_CROSS_NIC"] == b"1"
    assert b"NCCL_IB_TIMEOUT" not in env, "its nccl.conf says it"


def test_without_rdma_the_profile_is_tcp_and_a_file_of_the_user_replaces_any(desk: Desk) -> None:
    assert desk.prepare().settings.endswith("tcp.env (a has no RDMA port)")
    plan = desk.prepare(env_file="/dev/null", env={"FAKE_FACTS": INFINIBAND})
    assert plan.settings == "/dev/null (--env)"
    assert not [name for name in plan.job.environment if name.startswith(b"NCCL")]


def test_what_preflight_saw_chooses_and_hosts_that_differ_are_refused(desk: Desk) -> None:
    port = {"device": "mlx5_0", "port": 1, "link_layer": "Ethernet", "rate": "100 Gb/sec (2X HDR)",
            "state": "4: ACTIVE", "driver": "mlx5_core"}  # fmt: skip
    roce, none = {"ports": [port], "efa": False}, {"ports": [], "efa": False}
    (desk.path / "seen").write_text(json.dumps({"hosts": [{"name": "a", "rdma": roce}, {"name": "b", "rdma": roce}]}))
    settings = desk.prepare(preflight="seen").settings
    assert settings.endswith("roce.env (a has 1 active Ethernet RDMA ports, 100 Gb/s together)")
    (desk.path / "seen").write_text(json.dumps({"hosts": [{"name": "a", "rdma": roce}, {"name": "b", "rdma": none}]}))
    with pytest.raises(ValueError, match="hosts differ in their network: a has 1 active.*, b has no RDMA port"):
        desk.prepare(preflight="seen")
    (desk.path / "seen").write_text(json.dumps({"hosts": [{"name": "a", "rdma": roce}]}))
    with pytest.raises(ValueError, match="--preflight seen: has nothing of 'b'; run ofa-ds preflight --json again"):
        desk.prepare(preflight="seen")


@pytest.mark.parametrize("file", RDMA_FILES, ids=lambda file: file.name)
def test_network_files_explain_every_variable_with_a_source(file: Path) -> None:
    blocks = [block for block in file.read_text().split("\n\n")[1:] if ": " in block]
    settings = []
    for block in blocks:
        comment = " ".join(line for line in block.splitlines() if line.startswith("#"))
        lines = [line for line in block.splitlines() if line and not line.startswith("#")]
        settings += [match[1] for line in lines if (match := re.fullmatch(r': "\$\{([A-Z_]+)=[^}]+\}"', line))]
        assert len([line for line in lines if not line.startswith(': "${')]) == 0, lines
        if lines:
            assert re.search(r"\[[a-zA-Z][^\]]*\]\S*$", comment.strip()), f"{lines}: the comment ends with no source"
    assert len(settings) == len(set(settings)) >= 7


def test_four_network_files_ship() -> None:
    assert [file.name for file in RDMA_FILES] == ["efa.env", "infiniband.env", "roce.env", "tcp.env"]


# Scripts --------------------------------------------------------------


@pytest.mark.parametrize("script", sorted(LAUNCHERS.glob("*.sh")), ids=lambda script: script.name)
def test_scripts_parse_and_stop_at_the_first_error(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "set -euo pipefail" in script.read_text()


def test_set_up_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "PYTHON": str(old), "OFA_DS_VENV": str(tmp_path / "venv")}
    command = ["bash", str(LAUNCHERS / "setup_env.sh")]
    result = subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 1
    assert result.stderr == "setup: want Python 3.10 or newer, found Python 3.8.1; install one and set PYTHON to it\n"
    assert not (tmp_path / "venv").exists()


def test_set_up_skips_what_is_ready(tmp_path: Path) -> None:
    """A stamp of the right content and a command are all that a second run looks at."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    shutil.copy("/bin/true", venv / "bin" / "ofa-ds")
    root = LAUNCHERS.parent
    files = f"{shlex.quote(str(root / 'setup.py'))} {shlex.quote(str(root / 'constraints.txt'))}"
    (venv / ".ready").write_text(subprocess.check_output(f"cat {files} | cksum", shell=True, text=True))
    env = {"PATH": os.environ["PATH"], "OFA_DS_VENV": str(venv)}
    command = ["bash", str(LAUNCHERS / "setup_env.sh")]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=5)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("words", [
    "finetune finetune-vqa-nano run_dir=a", "predict runs/vqa --task vqa --shards vqa --out out.json",
    "pretrain pretrain-nano",
])  # fmt: skip
def test_pretrain_sh_hands_on_another_command_as_it_is(desk: Desk, words: str) -> None:
    desk.script("python", 'echo "$@" >"$HOME/called"')
    script = ["bash", str(LAUNCHERS / "pretrain.sh"), "hosts", *words.split()]
    subprocess.run(script, cwd=desk.path, env={**os.environ, "PYTHON": "python"}, check=True)
    assert (desk.home / "called").read_text() == f"-m ofa_ds.cli launch --hostfile hosts -- {words}\n"


def test_pretrain_sh_is_launch_with_the_hostfile_first(desk: Desk) -> None:
    desk.script("python", 'printf "%s\\n" "$PYTHONPATH" "$@" >"$HOME/called"; exit 137')
    script = [str(LAUNCHERS / "pretrain.sh"), "--env", "a b", "--retries=2", "--dry-run", "hosts", "pretrain-nano"]
    env = {**os.environ, "PYTHON": "python", "PYTHONPATH": "/mine"}
    result = subprocess.run(["bash", *script, "run_dir=it's $(id)"], cwd=desk.path, env=env)
    root = LAUNCHERS.parent
    assert result.returncode == 137
    assert (desk.home / "called").read_text().splitlines() == [
        f"{root}:{root}/kernels:/mine", "-m", "ofa_ds.cli", "launch", "--hostfile", "hosts", "--env", "a b",
        "--retries=2", "--dry-run", "--", "pretrain", "pretrain-nano", "run_dir=it's $(id)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hosts"], "pretrain.sh: want [OPTION ...] HOSTFILE RECIPE [KEY=VALUE ...]"),
        (["--env"], "pretrain.sh: --env: want a value"),
        (["--hostfile", "hosts", "pretrain-nano"], "pretrain.sh: --hostfile: the hostfile is the first argument; want"),
    ],
)
def test_a_wrong_call_of_pretrain_sh_is_one_line(arguments: list[str], message: str) -> None:
    result = subprocess.run(["bash", str(LAUNCHERS / "pretrain.sh"), *arguments], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith(message) and len(result.stderr.splitlines()) == 1
