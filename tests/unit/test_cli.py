"""The command line: help is light, wrong usage is exit code 2 and one line."""

import subprocess
import sys

import pytest

from ofa_ds.cli import main

HEAVY = ("torch", "deepspeed", "pyarrow", "pydantic", "numpy", "PIL")


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom ofa_ds.cli import main\n"
        "try:\n    main(['pretrain', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("[]")


@pytest.mark.parametrize("command", ["scenes", "shards", "vocab", "pretrain", "evaluate", "generate", "checkpoint"])
def test_every_command_of_the_contract_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert "usage: ofa-ds" in capsys.readouterr().out


def test_a_wrong_recipe_is_exit_code_2_and_one_line(capsys):
    assert main(["pretrain", "pretrain-nano", "optim.peak_rl=1"]) == 2
    error = capsys.readouterr().err
    assert error == "ofa-ds: pretrain-nano: unknown key optim.peak_rl; did you mean peak_lr?\n"


def test_missing_shards_are_exit_code_1_and_a_problem_that_names_the_directory(tmp_path, capsys):
    assert main(["shards", "verify", str(tmp_path / "nowhere")]) == 1
    problem, verdict = capsys.readouterr().out.splitlines()
    assert "nowhere" in problem
    assert verdict.endswith("nowhere: problems: 1")


def test_an_unknown_command_is_wrong_usage():
    with pytest.raises(SystemExit) as end:
        main(["pretrian"])
    assert end.value.code == 2
