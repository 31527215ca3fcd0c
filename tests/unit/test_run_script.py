"""tests/run.sh: what it hands to pytest, in which parts, and what it says at the end. pytest itself is a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IGNORING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.execvp(sys.argv[1], sys.argv[1:])
"""
LAUNCHES = "tests/reliability/test_launch.py"
STAND_IN = """#!{python}
import json, os, sys, time
words = sys.argv[1:]
if "--last-failed" in words:
    part = 4
elif "tests/multihost" in words:
    part = 3
else:
    part = 2 if "--ignore" in words else 1
code = os.environ["CODES"].split(",")[part - 1]
try:
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([part, words]) + "\\n")
    if code == "hangs":
        time.sleep(600)
except KeyboardInterrupt:
    open(os.environ["CALLS"] + ".interrupted", "w").close()
    sys.exit(2)
while os.environ["CODES"].endswith("hangs") and part != 3 and "[3" not in open(os.environ["CALLS"]).read():
    time.sleep(0.01)
print(f"part {{part}} says {{code}}")
sys.exit(int(code))
"""


class Script:
    def __init__(self, folder: Path) -> None:
        self.calls = folder / "calls"
        self.interrupted = folder / "calls.interrupted"
        self.venv = folder / "venv"
        (self.venv / "bin").mkdir(parents=True)
        for name in ("python", "ofa-ds"):
            (self.venv / "bin" / name).write_text(STAND_IN.format(python=sys.executable))
            (self.venv / "bin" / name).chmod(0o755)
        texts = b"".join((ROOT / name).read_bytes() for name in ("setup.py", "constraints.txt"))
        done = subprocess.run(["cksum"], input=texts, stdout=subprocess.PIPE, check=True)
        (self.venv / ".ready-dev").write_bytes(done.stdout)

    def run(
        self, *arguments: str, codes: str = "0,0,0", wrapper: tuple[str, ...] = ()
    ) -> tuple[int, str, list[list[str]]]:
        """(exit code, last line, what each pytest was given, in the order of the parts).

        codes: with which each of the parts ends; "hangs" waits to be interrupted.
        """
        self.calls.unlink(missing_ok=True)
        environment = {**os.environ, "OFA_DS_VENV": str(self.venv), "CALLS": str(self.calls), "CODES": codes}
        done = subprocess.run(
            [*wrapper, "bash", str(ROOT / "tests/run.sh"), *arguments],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/",
        )  # fmt: skip
        calls = sorted(json.loads(line) for line in self.calls.read_text().splitlines())
        return done.returncode, done.stdout.splitlines()[-1], [words for _, words in calls]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


def folders(calls: list[list[str]]) -> list[list[str]]:
    return [[word for word in call if word.startswith("tests/")] for call in calls]


def test_every_folder_of_tests_runs_once_and_arguments_reach_each_part(script: Script) -> None:
    code, last, calls = script.run("-k", "a b", "--slow", "-m", "slow")
    there = {f"tests/{file.parent.name}" for file in (ROOT / "tests").glob("*/test_*.py")}
    named = [folder for part in folders(calls) for folder in part]
    assert code == 0 and sorted({*named} - {LAUNCHES}) == sorted(there) and len(named) == len({*named}) + 1
    assert "--ignore" in calls[1] and LAUNCHES in folders(calls)[1] and LAUNCHES in folders(calls)[2], "in one part"
    assert all(call[-5:] == ["-k", "a b", "--slow", "-m", "slow"] for call in calls)
    assert last == "tests: passed (part 1 says 0; part 2 says 0; part 3 says 0)"


def test_a_value_of_golden_is_no_folder_to_run(script: Script) -> None:
    _, _, calls = script.run("--golden", "tests/parity/golden")
    assert len(calls) == 3 and all(call[-2:] == ["--golden", "tests/parity/golden"] for call in calls)


def test_what_is_long_is_left_out_unless_all_is_asked_for_or_it_is_named(script: Script) -> None:
    assert all("--brief" in call for call in script.run("-x")[2])
    assert not any({"--brief", "--all"} & {*call} for call in script.run("--all", "-x")[2])
    assert not any("--brief" in call for call in script.run("tests/unit")[2])
    assert "tests/run.sh --all" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("named", ["tests/unit", "tests/unit/test_docs.py", "tests/unit/test_docs.py::test_x[a/b]"])
def test_what_is_named_runs_alone_in_one_process(script: Script, named: str) -> None:
    code, last, calls = script.run(named, "-x")
    assert (code, last) == (0, "tests: passed (part 1 says 0)")
    assert len(calls) == 1 and calls[0][-2:] == [named, "-x"] and "-n" not in calls[0]


@pytest.mark.parametrize(
    "codes, arguments, parts, expected",
    [
        ("1,0,0", [], 3, 1),
        ("0,1,0", [], 3, 1),
        ("1,0,hangs", ["-x"], 2, 1),
        ("1,0,hangs", ["--maxfail=1"], 2, 1),
        ("2,0,hangs", [], 2, 2),
        ("4,0,hangs", [], 2, 4),
        ("5,0,5", ["-k", "x"], 3, 0),
        ("0,0,1,0", [], 4, 0),
        ("0,0,1,1", [], 4, 1),
        ("0,0,1,5", [], 4, 1),
        ("0,0,1", ["-x"], 3, 1),
        ("1,0,1", [], 3, 1),
        ("5,5,1,1", ["-k", "x"], 4, 1),
        ("5,5,5", ["-k", "x"], 3, 5),
    ],
)
def test_the_exit_code_is_that_of_the_first_part_that_failed(
    script: Script, codes: str, arguments: list[str], parts: int, expected: int
) -> None:
    code, last, calls = script.run(*arguments, codes=codes)
    assert (code, len(calls)) == (expected, parts)
    assert script.interrupted.exists() == ("hangs" in codes), "what runs beside ends with the rest"
    assert last.startswith("tests: passed (" if expected == 0 else "tests: FAILED (part 1 says")


def test_what_runs_beside_ends_with_the_rest_where_interrupts_are_ignored(script: Script) -> None:
    """As a script's `&` leaves it; a shell cannot undo that."""
    wrapper = (sys.executable, "-c", IGNORING)
    code, _, calls = script.run("-x", codes="1,0,hangs", wrapper=wrapper)
    assert (code, len(calls), script.interrupted.exists()) == (1, 2, True)


def test_what_failed_among_launches_and_hosts_is_tried_once_more_and_said_to_have_failed_once(script: Script) -> None:
    code, last, calls = script.run("-k", "x", codes="0,0,1,0")
    assert code == 0 and "--last-failed" in calls[3] and folders(calls)[3] == folders(calls)[2]
    assert last == "tests: passed (part 1 says 0; part 2 says 0; part 3 says 1; part 4 says 0)"


def test_no_two_files_of_tests_have_one_name() -> None:
    """Folders of tests are no packages: a run of two folders would import the first of two such modules for both."""
    names = [file.name for file in (ROOT / "tests").rglob("*.py") if file.name not in ("conftest.py", "__init__.py")]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []
