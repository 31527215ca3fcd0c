"""kernels/first_ten_minutes.sh: every step has its turn whatever the others do, and what was seen is kept."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "kernels/first_ten_minutes.sh"
sys.path.insert(0, str(ROOT / "kernels"))

import first_ten_minutes as ten  # noqa: E402

STEPS = ["versions", "accurate", "same bits", "memory errors", "training", "a step", "no waiting", "speed"]


def step(name: str, code: str, seconds: float = 20.0) -> ten.Step:
    return ten.Step(name, seconds, (sys.executable, "-c", code))


def verdicts(page: str) -> dict[str, str]:
    rows = re.findall(r"^\| ([^|]+) \| \d+ \| ([^|]+) \| .*\|$", page.partition("\n## ")[0], flags=re.MULTILINE)
    return dict(rows)


def test_a_step_that_fails_hangs_or_dies_is_told_and_the_next_has_its_turn(tmp_path: Path) -> None:
    child = tmp_path / "child"
    hangs = ("bash", "-c", f"(while :; do date +%N >{child}; sleep 0.1; done) & sleep 60")
    planned = [
        step("fails", "print('| a | table |'); raise SystemExit('no such thing')", 8.0), ten.Step("hangs", 0.0, hangs),
        ten.Step("cannot", 1.0, ()), step("dies", "import os; os.abort()"),
        step("well", "print('* found'); print('all | well')"),
    ]  # fmt: skip
    out = tmp_path / "page.md"
    ten.run_all(planned, out, "Title", 100.0)
    page = out.read_text()
    found = verdicts(page)
    assert list(found) == ["fails", "hangs", "cannot", "dies", "well"]
    assert found["fails"] == "FAILED (1)" and found["dies"] == "FAILED (-6)" and found["well"] == "ok"
    assert found["hangs"].startswith("OUT OF TIME after") and found["cannot"] == "left out: needs a GPU"
    assert "```\n| a | table |\nno such thing\n```" in page and "## well\n\n* found\n" in page
    assert "| well | 0 | ok | all / well |" in page
    last = child.read_text()
    time.sleep(1)
    assert child.read_text() == last, "what the step had started goes on"


def test_the_page_is_whole_after_every_step_and_no_step_begins_after_the_time(tmp_path: Path) -> None:
    out = tmp_path / "page.md"
    sees = f"text = open({str(out)!r}).read(); print('saw' if '| first | 0 | ok |' in text else 'no page')"
    hangs = "import time; time.sleep(60)"
    planned = [step("first", "pass"), step("second", sees), step("long", hangs), step("late", "pass")]
    began = time.monotonic()
    done = ten.run_all(planned, out, "Title", 6.0)
    assert time.monotonic() - began < 40
    assert done[1].lines == ["saw"]
    assert [each.verdict.split(" after")[0] for each in done][2:] == ["OUT OF TIME", "OUT OF TIME before it began"]


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and its steps take ten minutes")
def test_the_script_goes_through_all_steps_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "page.md"
    command = ["bash", str(SCRIPT), "--device", "cpu", "--small", "--out", str(out)]
    environment = {**os.environ, "OFA_DS_VENV": str(Path(sys.executable).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    page = out.read_text()
    assert page in done.stdout
    assert list(verdicts(page)) == STEPS
    gpu_only = {name for name, verdict in verdicts(page).items() if verdict == "left out: needs a GPU"}
    assert gpu_only == {"same bits", "no waiting"}
    assert {verdict for name, verdict in verdicts(page).items() if name not in gpu_only} == {"ok"}
    assert "the same losses twice" in page and "| vocabulary loss | base | 12 | ofa-ds |" in page


def test_nothing_runs_beside_a_step_that_measures(tmp_path: Path) -> None:
    beside = subprocess.Popen(["sleep", "60"], start_new_session=True)
    planned = [step("accurate", f"import os; os.kill({beside.pid}, 0); print('there')"), step("speed", "pass")]
    done = ten.run_all(planned, tmp_path / "page.md", "Title", 50.0, [beside])
    assert [each.verdict for each in done] == ["ok", "ok"] and done[0].lines == ["there"]
    assert beside.returncode == -9


def test_on_a_gpu_every_step_has_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ten.shutil, "which", lambda name, path=None: f"/bin/{name}")
    planned = ten.steps("cuda", small=False)
    assert [each.name for each in planned] == STEPS and all(each.command for each in planned)
    assert sum(each.seconds for each in planned) <= 620
    for each in planned:
        for part in each.command:
            if part.startswith(("tests/", str(ROOT))):
                assert (ROOT / part).exists(), part
    memory = planned[3]
    assert memory.command[:3] == ("/bin/compute-sanitizer", "--tool", "memcheck")
    assert memory.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


FAKE_PYTHON = """#!/usr/bin/env bash
here=$(dirname "$0")
case $1 in
  -) if [ ! -e "$here/installed" ]; then echo pydantic deepspeed; fi ;;
  -m) echo "$@" >"$here/installed" ;;
  *) echo "ran $*"; echo "path $PYTHONPATH" ;;
esac
"""


def checkout(folder: Path) -> dict[str, str]:
    """A copy of the script with a Python that lacks packages until something is installed; its environment."""
    (folder / "root/kernels").mkdir(parents=True)
    (folder / "root/kernels/first_ten_minutes.sh").write_bytes(SCRIPT.read_bytes())
    (folder / "venv/bin").mkdir(parents=True)
    (folder / "venv/bin/python").write_text(FAKE_PYTHON)
    (folder / "venv/bin/python").chmod(0o755)
    return {**os.environ, "OFA_DS_VENV": str(folder / "venv"), "PYTHONPATH": "mine"}


@pytest.mark.parametrize("place", ["root/gpu_wheels", "gpu_wheels", "shared/gpu_wheels", "root/shared/gpu_wheels"])
def test_what_python_lacks_is_installed_from_wheels_without_a_network(tmp_path: Path, place: str) -> None:
    environment = checkout(tmp_path)
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "pydantic-1-py3-none-any.whl").touch()
    command = ["bash", str(tmp_path / "root/kernels/first_ten_minutes.sh"), "--small"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    said = (tmp_path / "venv/bin/installed").read_text()
    assert said.startswith("-m pip install -q --no-index --no-deps --target ") and "pydantic-1-py3-none-any.whl" in said
    assert "ran " in done.stdout and " --small" in done.stdout
    site = re.search(r"--target (\S+)", said)[1]
    assert done.stdout.split("path ")[1].strip().endswith(f":mine:{site}"), "what is here already goes before"
    assert not Path(site).exists()


def test_without_wheels_it_says_what_python_lacks_and_goes_on(tmp_path: Path) -> None:
    command = ["bash", str(tmp_path / "root/kernels/first_ten_minutes.sh")]
    done = subprocess.run(command, capture_output=True, text=True, env=checkout(tmp_path), timeout=60)
    assert "Python lacks pydantic deepspeed" in done.stderr and "root/gpu_wheels" in done.stderr
    assert "ran " in done.stdout


def test_tests_for_a_gpu_are_collected_where_hypothesis_is_missing(tmp_path: Path) -> None:
    (tmp_path / "hypothesis.py").write_text(ten.SHIM)
    path = os.pathsep.join([str(tmp_path), *map(str, (ROOT, ROOT / "kernels", ROOT / "tests"))])
    files = [f"tests/kernels/test_{name}.py" for name in ("gpu", "attention_kernel", "layer_norm_kernel")]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:hypothesispytest", *files]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = done.stdout
    assert "::test_every_head_dim_of_every_kind_is_exact" in names and "::test_any_shape_is_exact" not in names


def test_a_script_that_is_ended_ends_its_step() -> None:
    said = "import os, time; print(os.getpid(), flush=True); time.sleep(30)"
    code = (
        "import sys, first_ten_minutes as ten; ten.end_on_sigterm(); "
        f"ten.run(ten.Step('sleeps', 30.0, (sys.executable, '-c', {said!r})), 30.0)"
    )
    script = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT / "kernels"
    )  # fmt: skip
    pid = next(int(line) for line in script.stdout if line.strip().isdigit())
    script.terminate()
    script.wait(timeout=20)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 9)
