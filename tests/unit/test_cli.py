"""The command line: help is light, wrong usage is exit code 2 and one line."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ofa_ds.cli import main
from ofa_ds.cli.main import _parser
from ofa_ds.cli.parser import parsed

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


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Every command that does something, actions of groups included."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for group in groups:
        for each in group.choices.values():
            yield from commands(each)
    if not groups:
        yield parser


LEAVES = {parser.prog: parser for parser in commands(_parser())}


@pytest.mark.parametrize("name", LEAVES)
def test_the_help_of_every_command_says_what_each_argument_is_and_gives_an_example_that_parses(name) -> None:
    parser = LEAVES[name]
    assert all(action.help for action in parser._actions), [
        action.dest for action in parser._actions if not action.help
    ]
    text = parser.format_help()
    assert not any(noise in text for noise in ("(default: None)", "(default: False)", "(default: [])", "(default: )"))
    program, *words = shlex.split(parser.epilog.removeprefix("Example: "))
    assert program == "ofa-ds"
    assert parsed(_parser(), words).run is parser.get_default("run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("evaluate c --shards s --rows 0", "argument --rows: want a whole number of at least 1, got '0'"),
        ("evaluate c --shards s --rows x", "argument --rows: want a whole number of at least 1, got 'x'"),
        ("shards show d --row -1", "argument --row: want a whole number of at least 0, got '-1'"),
        ("vocab train --shards s --out o --codes -1", "argument --codes: want a whole number of at least 0, got '-1'"),
        ("scenes --out o --questions 11", "argument --questions: invalid choice: 11"),
        ("evaluate c --shards s --task vaq", "argument --task: invalid choice: 'vaq' (choose from 'caption', 'vqa'"),
        ("evaluate c --shards s --png x.nope", "argument --png: want a file name that ends in .png, .jpg"),
        ("shards show d --png no/x.png", "argument --png: 'no/x.png': there is no directory 'no'"),
        ("generate c --task caption --png .", "argument --png: want a file name that ends in .png, .jpg"),
        ("generate c --task vqa --text \udcff", "argument --text: want text that is valid UTF-8, got '\\udcff'"),
        ("vocab show v --text \udcff", "argument --text: want text that is valid UTF-8, got '\\udcff'"),
        ("shards show d --png x.png --nope=1", "unrecognized arguments: --nope=1"),
        ("shards verify d data.workers=1", "unrecognized arguments: data.workers=1"),
        ("pretrain r --local_rank 0 x", "unrecognized arguments: x"),
    ],
)
def test_a_wrong_argument_says_what_was_wanted(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["shards show d", "pretrain r"])
def test_settings_may_stand_before_and_after_an_option(command: str) -> None:
    option = "--row 2" if command.startswith("shards") else "--local_rank 2"
    given = parsed(_parser(), f"{command} train.seed=1 {option} train.keep=2 train.num_steps=3".split())
    assert given.set == ["train.seed=1", "train.keep=2", "train.num_steps=3"]
    assert parsed(_parser(), f"{command} {option} train.keep=2".split()).set == ["train.keep=2"]
    assert parsed(_parser(), f"{command} {option}".split()).set == []


@pytest.mark.parametrize(
    "command, words, says",
    [
        ("pretrain", ["data.task.name=sst2"], "ofa-ds finetune"),
        ("finetune", [], "data.task.name: want a task to fine-tune on"),
    ],
)
def test_each_of_pretrain_and_finetune_refuses_the_recipes_of_the_other(command, words, says, capsys):
    assert main([command, "pretrain-nano", *words]) == 2
    assert says in capsys.readouterr().err
