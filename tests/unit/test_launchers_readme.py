"""Every command of launchers/README.md is known to its reader; tests/multihost/test_readme_on_hosts.py runs some."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from ofa_ds.cli.main import _parser
from ofa_ds.config import load_recipe

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "launchers/README.md"


def commands() -> list[str]:
    """The lines of the bash blocks."""
    blocks = PAGE.read_text(encoding="utf-8").split("```bash\n")[1:]
    return [line for block in blocks for line in block.partition("```")[0].splitlines() if line]


def check_ofa_ds(words: list[str]) -> None:
    cut = words.index("--") if "--" in words else len(words)
    _parser().parse_args(words)
    if words[0] == "launch":
        assert words[cut + 1] == "pretrain"
        check_recipe(words[cut + 2 :])


def check_recipe(words: list[str]) -> None:
    load_recipe(words[0], words[1:])


def after_module(words: list[str]) -> None:
    check_recipe(words[words.index("ofa_ds.pretrain") + 1 :])


def check_sbatch(words: list[str]) -> None:
    place = next(i for i, word in enumerate(words) if not word.startswith("--"))
    assert (ROOT / words[place]).is_file()
    program = words[place + 1 :]
    if program[0] == "predict":
        _parser().parse_args(program)
    else:
        check_recipe(program[1:] if program[0] in ("pretrain", "finetune") else program)


def files_are_there(words: list[str]) -> None:
    named = [word for word in words if word.startswith("launchers/")]
    assert named and all((ROOT / word).is_file() for word in named)


def is_switch(words: list[str]) -> None:
    assert Path(words[0]).name in (ROOT / "ofa_ds/docs/running.md").read_text()


READERS: dict[str, Callable[[list[str]], None]] = {
    "ofa-ds": check_ofa_ds,
    "cp": files_are_there,
    "kubectl": files_are_there,
    "touch": is_switch,
    "sbatch": check_sbatch,
    "deepspeed": after_module,
    "mpirun.openmpi": after_module,
    "mpiexec.hydra": after_module,
    "srun": after_module,
    "scancel": lambda words: None,  # tests/multihost/test_every_runner.py sends it
}


def resolve(command: str) -> None:
    """Raises where a word of the command is unknown to who would read it."""
    words = shlex.split(command.partition(" >")[0])
    READERS[words[0]](words[1:])


@pytest.mark.parametrize("command", commands())
def test_a_command_is_known_to_who_reads_it(command: str) -> None:
    resolve(command)


@pytest.mark.parametrize(
    "command",
    [
        "ofa-ds launch --hostfile hosts --retires 3 -- pretrain pretrain-nano",
        "ofa-ds launch --hostfile hosts -- pretrain pretrain-nano run_dri=x",
        "ofa-ds preflight",
        "sbatch launchers/slurm/nowhere.sbatch pretrain-nano",
        "deepspeed --hostfile hosts --module ofa_ds.pretrain pretrain-nan",
        "kubectl apply -f launchers/k8s/nowhere.yaml",
    ],
)
def test_a_command_that_would_fail_is_not(command: str) -> None:
    with pytest.raises((AssertionError, ValueError, SystemExit)):
        resolve(command)


def test_files_and_options_of_the_text_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for place in re.findall(r"`((?:launchers|tests|ofa_ds)/[\w./*-]+)`", text):
        assert list(ROOT.glob(place)), place
    launch = next(iter(_parser()._subparsers._group_actions)).choices["launch"].format_help()
    for option in re.findall(r"`(--[a-z-]+)`", text):
        assert option in launch or option in ("--allow-run-as-root", "--"), option
    runners = set(re.findall(r"--runner (\w+)", text))
    assert runners == {"torchrun", "openmpi", "mpich", "slurm"}  # and the default
