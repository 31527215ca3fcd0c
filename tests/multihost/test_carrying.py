"""Whatever the user types reaches the ranks of other hosts byte for byte, and no shell on the way acts on it.

Everything is real - launchers/pretrain.sh, DeepSpeed's launcher, pdsh, sshd, the login shell - up to the moment where
the rank would start to train: there it writes down what it was given. Many texts share one launch.
"""

from __future__ import annotations

import json
import string
import sys
from collections.abc import Callable
from pathlib import Path

import hosts
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("two_hosts")

RECORDER = """
import json, os, sys
if "RANK" in os.environ and sys.orig_argv[2:4] == ["-m", "ofa_ds.pretrain"] and "--encoded" not in sys.orig_argv[-1]:
    record = {"cwd": os.getcwd(), "arguments": sys.orig_argv[4:], "env": dict(os.environ)}
    with open(os.environ["OFA_RECORD"] + os.environ["RANK"], "w") as file:
        json.dump(record, file)
    os._exit(0)
"""
ATTACK = "`>P`$(>P);>P|>P&>P\n>P\n\\`>P\\`';>P;'\";>P;\"%h%n%u~!*?[a]{a,b}#"
TYPED = [
    *string.printable,
    *(f"a{character}b" for character in string.printable),
    *map(chr, range(1, 32)),
    *("\x7f", "\x85", "\xa0", "\u2028", "\ufeff", "é", "日本", "\U0001f600", "\udcff", "a\udc80\udcfe"),
    *(
        '["data"]',
        "{a=1,b=2}",
        "it's",
        "x;>P",
        "`>P`",
        "$(>P)",
        '";>P;"',
        "$HOME",
        "-n",
        "--",
        "",
        " ",
        "a  b ",
        ATTACK,
    ),
]
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=12)


@pytest.fixture
def desk(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a directory of that name, with a hostfile in it and a recorder of ranks beside it."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("carry") / name
        folder.mkdir()
        (folder / "hosts").write_text("root@10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
        (folder.parent / "sitecustomize.py").write_text(RECORDER)
        return folder

    return make


def rank_env(two_hosts: hosts.Cluster, folder: Path) -> dict[str, str]:
    env = {**hosts.launch_env(two_hosts), "OFA_RECORD": f"{folder.parent}/rank"}
    env["PYTHONPATH"] += f":{folder.parent}:{folder}"
    return env


def assert_arrived(folder: Path, arguments: list[str], environment: dict[str, str]) -> None:
    for rank in range(2):
        record = json.loads((folder.parent / f"rank{rank}").read_text())
        assert record["cwd"] == str(folder)
        assert record["arguments"] == arguments
        assert environment.items() <= record["env"].items()
        assert record["env"]["RANK"] == str(rank) and record["env"]["WORLD_SIZE"] == "2"
    assert {file.name for file in folder.iterdir()} == {"hosts"}, "something ran"
    assert not [place for place in (hosts.ROOT, Path.home()) if (place / "P").exists()]


# The long value makes a command of nearly the size that is refused.
@settings(max_examples=1, deadline=None, phases=(Phase.explicit, Phase.generate), suppress_health_check=HealthCheck)
@given(arguments=st.lists(texts, min_size=40), name=texts, values=st.lists(texts, min_size=20, max_size=20))
@example(arguments=TYPED, name="a b;>P $(>P) `>P` '\"\n\udcff", values=[*TYPED[-20:], "y" * 70_000])
def test_every_byte_arrives_as_typed_and_nothing_is_executed(
    two_hosts: hosts.Cluster,
    desk: Callable[[str], Path],
    arguments: list[str],
    name: str,
    values: list[str],
) -> None:
    folder = desk(f"d{name.replace('/', '_')}")
    prefixes = ("UCX_", "MV2_", "MLFLOW_", "PYTHON_", "NCCL_")
    environment = {f"{prefixes[i % len(prefixes)]}{i}": value for i, value in enumerate(values)}
    env = {**rank_env(two_hosts, folder), **environment, "MV2;touch P;": "1", "PYTHON$(touch P)": "1"}
    launch = [sys.executable, "-m", "ofa_ds.cluster.launch"]
    plan = two_hosts.run([*launch, "prepare", "hosts", "", *arguments], timeout=60, cwd=folder, env=env)
    assert plan.returncode == 0, plan.stdout[-3000:]
    result = two_hosts.run([*launch, "start", "hosts", *plan.stdout.split()], timeout=300, cwd=folder, env=env)
    assert result.returncode == 0, result.stdout[-3000:]
    assert_arrived(folder, arguments, environment)


def test_the_command_carries_overrides_and_directory(two_hosts: hosts.Cluster, desk: Callable[[str], Path]) -> None:
    folder = desk("my runs; >P")
    arguments = ["pretrain-nano", "run_dir=/x;>P", "data.shards=it's `>P` $(>P)", 'data.vocab=v["data"]{a=1,b=2}']
    command = ["bash", str(hosts.ROOT / "launchers" / "pretrain.sh"), "hosts", *arguments]
    result = two_hosts.run(command, timeout=300, cwd=folder, env=rank_env(two_hosts, folder))
    assert result.returncode == 0, result.stdout[-3000:]
    assert result.stdout.splitlines()[-1] == "pretrain.sh: done on 2 hosts, 2 ranks"
    assert_arrived(folder, arguments, {})


def test_the_user_of_the_hostfile_is_who_logs_in(two_hosts: hosts.Cluster, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("nobody-here@10.77.0.2 slots=1\n")
    command = ["bash", str(hosts.ROOT / "launchers" / "pretrain.sh"), "hosts", "pretrain-nano", "data.shards=s"]
    result = two_hosts.run([*command, "data.vocab=v"], timeout=60, cwd=tmp_path, env=hosts.launch_env(two_hosts))
    assert result.returncode == 1
    assert result.stdout.startswith(
        "nobody-here@10.77.0.2: ssh does not get there by key: nobody-here@10.77.0.2: Permis"
    )
    assert len(result.stdout.splitlines()) == 1
