"""Whatever the user types reaches the ranks of other hosts byte for byte, and no shell on the way acts on it.

Everything is real - launchers, ssh, sshd, the login shell, agents and engines, DeepSpeed's own launcher over pdsh -
up to the moment where the rank would train: there it writes down what it was given. Many texts share one launch.
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

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("two_hosts")]

RECORDER = """
import json, os, sys
starts = {"ofa_ds.cli": 5, "ofa_ds.pretrain": 4}
start = starts.get(sys.orig_argv[3]) if sys.orig_argv[1:3] == ["-u", "-m"] else None
if start and "RANK" in os.environ and "--encoded" not in sys.orig_argv[-1]:
    record = {"cwd": os.getcwd(), "arguments": sys.orig_argv[start:], "env": dict(os.environ)}
    with open(os.environ["OFA_RECORD"] + os.environ["RANK"], "w") as file:
        json.dump(record, file)
    os._exit(0)
"""
LAUNCH = """
import os, sys
from pathlib import Path
from ofa_ds.cluster import attempts, runners
from ofa_ds.cluster.environment import gather
from ofa_ds.cluster.hostfile import Host
from ofa_ds.cluster.job import Job
runner, address, *arguments = sys.argv[1:]
job = Job(
    hosts=(Host("10.77.0.1", 1), Host("10.77.0.2", 1)), runner=runner, master_address=address, master_port=0,
    program=(b"pretrain", *map(os.fsencode, arguments)), directory=os.getcwdb(),
    environment=gather(os.environb, "")[1], run_dir=Path(os.environ["OFA_RECORD"]).parent / "run",
)
sys.exit(attempts.run(job, attempts.Policy(start_within_s=60), runners))
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
        for place in (folder, folder.parent):
            (place / "hosts").write_text("root@10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
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
    assert not (folder.parent / "P").exists()
    assert not [place for place in (hosts.ROOT, Path.home()) if (place / "P").exists()]


def odd_environment(values: list[str]) -> dict[str, str]:
    prefixes = ("UCX_", "MV2_", "MLFLOW_", "PYTHON_", "NCCL_")
    return {f"{prefixes[i % len(prefixes)]}{i}": value for i, value in enumerate(values)}


NAME = "a b;>P $(>P) `>P` '\"\n\udcff"
VALUES = [*TYPED[-20:], "y" * 70_000]


@settings(max_examples=1, deadline=None, phases=(Phase.explicit, Phase.generate), suppress_health_check=HealthCheck)
@given(arguments=st.lists(texts, min_size=40), name=texts, values=st.lists(texts, min_size=20, max_size=20))
@example(arguments=TYPED, name=NAME, values=VALUES)
def test_every_byte_arrives_over_ssh_as_typed_and_nothing_is_executed(
    two_hosts: hosts.Cluster, desk: Callable[[str], Path], arguments: list[str], name: str, values: list[str]
) -> None:
    launch_and_compare(two_hosts, desk(f"d{name.replace('/', '_')}"), "deepspeed", arguments, values)


@pytest.mark.parametrize("runner", ["torchrun", "openmpi", "mpich"])
def test_every_byte_arrives_through_other_engines_too(
    two_hosts: hosts.Cluster, desk: Callable[[str], Path], runner: str
) -> None:
    launch_and_compare(two_hosts, desk(NAME), runner, TYPED, VALUES)


def launch_and_compare(
    two_hosts: hosts.Cluster, folder: Path, runner: str, arguments: list[str], values: list[str]
) -> None:
    environment = odd_environment(values)
    env = {**rank_env(two_hosts, folder), **environment, "MV2;touch P;": "1", "PYTHON$(touch P)": "1"}
    command = [sys.executable, "-c", LAUNCH, runner, "10.77.0.1", *arguments]
    result = two_hosts.run(command, timeout=120, cwd=folder, env=env)
    assert result.returncode == 0, result.stdout[-3000:]
    assert_arrived(folder, arguments, environment)


def test_every_byte_arrives_through_deepspeeds_own_launcher_and_pdsh_in_one_word(
    two_hosts: hosts.Cluster, desk: Callable[[str], Path]
) -> None:
    folder, arguments = desk(NAME), TYPED
    environment = odd_environment(VALUES)
    clean = rank_env(two_hosts, folder)
    clean["PYTHONPATH"] = clean["PYTHONPATH"].removesuffix(f":{folder}")
    packing = [sys.executable, "-m", "ofa_ds.cluster.parcel", *arguments]
    word = two_hosts.run(packing, timeout=60, cwd=folder, env={**rank_env(two_hosts, folder), **environment})
    assert word.returncode == 0 and len(word.stdout.split()) == 1, word.stdout[-3000:]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "hosts"]
    command += ["--master_port", str(hosts.free_port()), "--module", "ofa_ds.pretrain", word.stdout.strip()]
    result = two_hosts.run(command, timeout=120, cwd=folder.parent, env=clean)
    assert result.returncode == 0, result.stdout[-3000:]
    assert_arrived(folder, arguments, environment)


def test_the_command_carries_overrides_and_directory(two_hosts: hosts.Cluster, desk: Callable[[str], Path]) -> None:
    folder = desk("my runs; >P")
    run_dir, shards, vocab = f"run_dir={folder.parent}/x;>P", "data.shards=it's `>P` $(>P)", 'data.vocab=["a"]{a=1,b=2}'
    arguments = ["pretrain-nano", run_dir, shards, vocab]
    command = ["bash", str(hosts.ROOT / "launchers" / "pretrain.sh"), "hosts", *arguments]
    result = two_hosts.run(command, timeout=300, cwd=folder, env=rank_env(two_hosts, folder))
    assert result.returncode == 0, result.stdout[-3000:]
    assert "ofa-ds launch: attempt 1 done" in result.stdout.splitlines()
    assert_arrived(folder, arguments, {})


def test_the_user_of_the_hostfile_is_who_logs_in(two_hosts: hosts.Cluster, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("nobody-here@10.77.0.2 slots=1\n")
    command = ["bash", str(hosts.ROOT / "launchers" / "pretrain.sh"), "hosts", "pretrain-nano", "data.shards=s"]
    result = two_hosts.run([*command, "data.vocab=v"], timeout=60, cwd=tmp_path, env=hosts.launch_env(two_hosts))
    assert result.returncode == 1
    assert result.stdout.startswith(
        "ofa-ds: nobody-here@10.77.0.2: ssh does not get there by key: nobody-here@10.77.0.2: Permis"
    )
    assert len(result.stdout.splitlines()) == 1
