"""Whatever the user types reaches the ranks of other hosts byte for byte, and no shell on the way acts on it.

Everything is real - launchers/pretrain.sh, DeepSpeed's launcher, pdsh, sshd, the login shell - up to the moment where
the rank would start to train: there it writes down what it was given. Many texts share one launch.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

import hosts
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from ofa_ds.config import load_recipe

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


def accepted(text: str) -> bool:
    """Whether launchers/pretrain.sh starts anything at all: a wrong recipe is refused here, by its own tests."""
    try:
        load_recipe("pretrain-nano", [f"run_dir={text}"])
    except ValueError:
        return False
    return True


# The long value makes a command of nearly the size that is refused.
@settings(max_examples=1, deadline=None, phases=(Phase.explicit, Phase.generate), suppress_health_check=HealthCheck)
@given(typed=st.lists(texts, min_size=40, max_size=80), folder=texts, values=st.lists(texts, min_size=20, max_size=20))
@example(typed=TYPED, folder="a b;>P $(>P) `>P` '\"\n\udcff", values=[*TYPED[-20:], "y" * 66_000])
def test_every_byte_arrives_as_typed_and_nothing_is_executed(
    two_hosts: hosts.Cluster, tmp_path_factory: pytest.TempPathFactory, typed: list[str], folder: str, values: list[str]
) -> None:
    desk = tmp_path_factory.mktemp("carry")
    directory = desk / f"d{folder.replace('/', '_')}"
    directory.mkdir()
    (directory / "hosts").write_text("root@10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    (desk / "sitecustomize.py").write_text(RECORDER)
    overrides = [f"run_dir={text}" for text in typed if accepted(text)]
    overrides += [f"run_dir=x{text}" for text in typed if accepted(f"x{text}")]
    assert len(overrides) > len(typed) / 2
    prefixes = ("UCX_", "MV2_", "MLFLOW_", "PYTHON_", "NCCL_")
    given_env = {f"{prefixes[i % len(prefixes)]}{i}": value for i, value in enumerate(values)}
    env = {**hosts.launch_env(two_hosts), **given_env, "OFA_RECORD": f"{desk}/rank"}
    env["PYTHONPATH"] = f"{env['PYTHONPATH']}:{desk}:{directory}"
    env["MV2;touch P;"] = env["PYTHON$(touch P)"] = "1"
    script = ["bash", str(hosts.ROOT / "launchers" / "pretrain.sh"), "hosts", "pretrain-nano"]
    result = two_hosts.run([*script, *overrides], timeout=300, cwd=directory, env=env)
    assert result.returncode == 0, result.stdout[-3000:]
    for rank in range(2):
        record = json.loads((desk / f"rank{rank}").read_text())
        assert record["cwd"] == str(directory)
        assert record["arguments"] == ["pretrain-nano", *overrides]
        assert given_env.items() <= record["env"].items()
        assert record["env"]["RANK"] == str(rank) and record["env"]["WORLD_SIZE"] == "2"
    assert {file.name for file in directory.iterdir()} == {"hosts"}, "something ran"
    assert not [place for place in (hosts.ROOT, Path.home()) if (place / "P").exists()]


def test_the_user_of_the_hostfile_is_who_logs_in(two_hosts: hosts.Cluster, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("nobody-here@10.77.0.2 slots=1\n")
    command = ["bash", str(hosts.ROOT / "launchers" / "pretrain.sh"), "hosts", "pretrain-nano"]
    result = two_hosts.run(command, timeout=60, cwd=tmp_path, env=hosts.launch_env(two_hosts))
    assert result.returncode == 1
    assert result.stdout.startswith(
        "nobody-here@10.77.0.2: ssh does not get there by key: nobody-here@10.77.0.2: Permis"
    )
    assert len(result.stdout.splitlines()) == 1
