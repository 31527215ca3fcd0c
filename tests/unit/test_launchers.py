"""launchers/pretrain.sh checks everything before it starts anything, and hands the ranks the right environment.

The launcher itself is DeepSpeed's and runs for real in tests/multihost; here a stand-in records how it is called.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ofa_ds.cluster.parcel import Parcel, unpack

LAUNCHERS = Path(__file__).parents[2] / "launchers"
RDMA_FILES = sorted((LAUNCHERS / "rdma").glob("*.env"))


class Desk:
    """A working directory with a hostfile, a HOME, and a python that records a launch instead of making one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.home = path / "home"
        self.home.mkdir()
        (path / "hosts").write_text("a slots=1\nb slots=1\n")
        tools = path / "tools"
        tools.mkdir()
        self._script(tools / "pdsh", "exit 0")
        self._script(
            tools / "ssh", '[ -z "${FAKE_SSH:-}" ] || { echo "$FAKE_SSH" >&2; exit 255; }; echo "10.5.5.5 fd00::5"'
        )
        self.python = tools / "python"
        record = f'printf "%s\\n" "${{@:4}}" >{path}/launch; exit ${{FAKE_CODE:-0}}'
        choose = f'case "$2 $3" in "ofa_ds.cluster.launch start") {record};; esac'
        self._script(self.python, f'{choose}\nexec {sys.executable} "$@"')
        path_with_tools = f"{tools}:{os.environ['PATH']}"
        self.env = {"PATH": path_with_tools, "HOME": str(self.home), "PYTHON": str(self.python)}

    @staticmethod
    def _script(file: Path, text: str) -> None:
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)

    def launch(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(LAUNCHERS / "pretrain.sh"), *arguments]
        return subprocess.run(
            command, cwd=self.path, env={**self.env, **env}, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )

    def started(self) -> list[str]:
        """Hostfile, address and port of the launch."""
        return (self.path / "launch").read_text().splitlines()[:3]

    def parcel(self) -> Parcel:
        return unpack((self.path / "launch").read_text().splitlines()[3])

    def ranks_env(self) -> dict[str, str]:
        return {os.fsdecode(name): os.fsdecode(value) for name, value in self.parcel().environment.items()}

    def launched(self) -> bool:
        return (self.path / "launch").exists()


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_the_launch_names_hosts_recipe_and_overrides(desk: Desk) -> None:
    result = desk.launch("hosts", "pretrain-nano", "run_dir=runs/a", MASTER_PORT="29555", MASTER_ADDR="10.1.1.1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "pretrain.sh: done on 2 hosts, 2 ranks"
    assert desk.started() == ["hosts", "10.1.1.1", "29555"]
    assert desk.parcel().arguments == (b"pretrain-nano", b"run_dir=runs/a")
    assert desk.parcel().directory == bytes(desk.path)


def test_rank_0_is_found_at_the_first_address_of_the_first_host(desk: Desk) -> None:
    desk.launch("hosts", "pretrain-nano")
    assert desk.started() == ["hosts", "10.5.5.5", "29500"]


def test_a_host_that_ssh_does_not_reach_is_named_and_nothing_starts(desk: Desk) -> None:
    result = desk.launch("hosts", "pretrain-nano", FAKE_SSH="ssh: connect to host a port 22: Connection refused")
    assert result.returncode == 1 and not desk.launched()
    assert result.stderr == "a: ssh does not get there by key: ssh: connect to host a port 22: Connection refused\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nobody", "pretrain-nano"], "nobody: no such hostfile"),
        (["broken", "pretrain-nano"], "broken:2: 'b slot=1': want 'HOST slots=N'"),
        (["hosts", "pretrain-nan0"], "did you mean pretrain-nano?"),
        (["hosts", "pretrain-nano", "optim.peek_lr=1"], "did you mean peak_lr?"),
        (["hosts", "pretrain-nano", "batch.global_rows=25"], "2 ranks = 24; use global_rows 24"),
        (["hosts"], "want [--env FILE] HOSTFILE RECIPE"),
        (["--evn", "f", "hosts", "pretrain-nano"], "--evn: unknown option"),
        (["--env", "nofile", "hosts", "pretrain-nano"], "--env nofile: no such file"),
        (["--env", "false.env", "hosts", "pretrain-nano"], "--env false.env: bash ends it with exit code 1"),
        (["hosts", "pretrain-nano", f"run_dir={'x' * 100_000}"], "Linux takes 131072: use a recipe file for long"),
    ],
)
def test_a_wrong_command_starts_nothing(desk: Desk, arguments: list[str], message: str) -> None:
    (desk.path / "broken").write_text("a slots=1\nb slot=1\n")
    (desk.path / "false.env").write_text("false\n")
    result = desk.launch(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not desk.launched()


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("MASTER_PORT", "29500;id", "MASTER_PORT '29500;id': want a number from 1 to 65535"),
        ("MASTER_PORT", "70000", "MASTER_PORT '70000': want a number from 1 to 65535"),
        ("MASTER_ADDR", "$(id)", "MASTER_ADDR '$(id)': want a name or address of a that all hosts know"),
        ("MASTER_ADDR", "fe80::1%eth0", "MASTER_ADDR 'fe80::1%eth0': want"),  # pdsh would put the host for %h
        ("OFA_LAUNCH_LOG", "loud", "OFA_LAUNCH_LOG 'loud': want one of debug, info, warning, error, critical"),
    ],
)
def test_a_setting_that_meets_a_shell_is_checked(desk: Desk, name: str, value: str, message: str) -> None:
    result = desk.launch("hosts", "pretrain-nano", **{name: value})
    assert result.returncode == 2 and not desk.launched()
    assert result.stderr.startswith(message) and len(result.stderr.splitlines()) == 1


def test_a_checkout_that_the_launcher_cannot_carry_is_refused(desk: Desk) -> None:
    checkout = desk.path / "a;id"
    checkout.mkdir()
    for part in ("launchers", "ofa_ds", "kernels", "ds_configs"):
        shutil.copytree(LAUNCHERS.parent / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    command = ["bash", str(checkout / "launchers" / "pretrain.sh"), "hosts", "pretrain-nano"]
    result = subprocess.run(command, cwd=desk.path, env=desk.env, capture_output=True, text=True)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert f"this checkout '{checkout}': DeepSpeed's launcher cannot carry ';' in its path" in result.stderr


def test_an_interpreter_that_the_launcher_cannot_carry_is_refused(desk: Desk) -> None:
    venv = desk.path / "my venv"
    venv.symlink_to(sys.prefix)
    result = desk.launch("hosts", "pretrain-nano", PYTHON=f"{venv}/bin/python")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert f"(PYTHON) '{venv}/bin/python': DeepSpeed's launcher cannot carry ' ' in its path" in result.stderr


def test_a_failed_job_fails_the_command(desk: Desk) -> None:
    result = desk.launch("hosts", "pretrain-nano", FAKE_CODE="7")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].endswith("ended with exit code 7; the first error above says why")


def test_only_what_training_reads_is_forwarded(desk: Desk) -> None:
    given = dict(NCCL_DEBUG="INFO", OMP_NUM_THREADS="4", SECRET_TOKEN="x", MASTER_PORT="1234", DS_ENV_FILE="none")
    desk.launch("hosts", "pretrain-nano", **given)
    env = desk.ranks_env()
    assert env["NCCL_DEBUG"] == "INFO" and env["OMP_NUM_THREADS"] == "4"
    assert not {"SECRET_TOKEN", "MASTER_PORT", "PYTHON", "PATH", "HOME", "DS_ENV_FILE"} & env.keys()


def test_a_user_file_with_comments_and_blank_lines_is_read_and_left_alone(desk: Desk) -> None:
    text = "# mine\n\nexport NCCL_DEBUG=WARN\n  MY_SETTING=a=b\n\n"
    (desk.home / ".deepspeed_env").write_text(text)
    (desk.path / ".deepspeed_env").write_text("NCCL_DEBUG=VERSION")  # no line end
    assert desk.launch("hosts", "pretrain-nano").returncode == 0
    env = desk.ranks_env()
    assert env["MY_SETTING"] == "a=b"
    assert env["NCCL_DEBUG"] == "VERSION"
    assert (desk.home / ".deepspeed_env").read_text() == text


def test_a_malformed_user_file_names_file_and_line(desk: Desk) -> None:
    (desk.home / ".deepspeed_env").write_text("A=1\nB 2\n")
    result = desk.launch("hosts", "pretrain-nano")
    assert result.returncode == 2 and not desk.launched()
    assert f"{desk.home}/.deepspeed_env:2: 'B 2': want NAME=VALUE" in result.stderr


@pytest.mark.parametrize("value", ['a"b', "it's", "$HOME/x", "`id`", "a\\b"])
def test_a_value_that_deepspeed_would_let_a_shell_read_is_refused_in_a_file(desk: Desk, value: str) -> None:
    (desk.path / ".deepspeed_env").write_text(f"# mine\nMY={value}\n")
    result = desk.launch("hosts", "pretrain-nano")
    assert result.returncode == 2 and not desk.launched()
    assert result.stderr.startswith(".deepspeed_env:2: ") and len(result.stderr.splitlines()) == 1


def test_any_value_of_the_environment_arrives(desk: Desk) -> None:
    odd = 'it\'s "a" $HOME `id` \\ ;>P \n é \udcff '
    given = {name: f"{name}{odd}" for name in ("NCCL_A", "UCX_A", "MV2_A", "PYTHONA", "MLFLOW_A", "OFA_A", "TMPDIR")}
    assert desk.launch("hosts", "pretrain-nano", **given).returncode == 0
    assert given.items() <= desk.ranks_env().items()
    assert not (desk.path / "P").exists()


def test_a_network_file_fills_gaps_and_overrides_nothing(desk: Desk) -> None:
    (desk.path / ".deepspeed_env").write_text("NCCL_CROSS_NIC=1\n")
    env_file = str(LAUNCHERS / "rdma" / "infiniband.env")
    desk.launch("--env", env_file, "hosts", "pretrain-nano", NCCL_IB_TIMEOUT="14", NCCL_IB_HCA="")
    env = desk.ranks_env()
    assert env["NCCL_IB_TIMEOUT"] == "14"
    assert env["NCCL_IB_HCA"] == ""  # set to nothing is set
    assert env["NCCL_CROSS_NIC"] == "1"
    assert env["NCCL_SOCKET_IFNAME"] == "^lo,docker,virbr,veth"


def test_a_settings_file_is_sourced_with_all_that_is_set_before_it_and_changes_nothing_else(desk: Desk) -> None:
    (desk.path / "mine.env").write_text(
        ': "${MASTER_PORT=29777}"\nrecipe=x hostfile=y\nNCCL_A="$NCCL_B c"\necho loud\n'
    )
    (desk.path / ".deepspeed_env").write_text("NCCL_B=b\nrecipe=kept\n")
    in_path = desk.path / "tools" / "mine.env"
    in_path.write_text("exit 3\n")  # `source mine.env` would take this one
    result = desk.launch("--env", "mine.env", "hosts", "pretrain-nano")
    assert result.returncode == 0, result.stderr
    assert desk.started() == ["hosts", "10.5.5.5", "29777"]
    assert desk.ranks_env()["NCCL_A"] == "b c"
    assert desk.parcel().arguments == (b"pretrain-nano",)


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
    assert len(settings) == len(set(settings)) >= 10


def test_two_network_files_ship() -> None:
    assert [file.name for file in RDMA_FILES] == ["infiniband.env", "roce.env"]


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
