"""`ofa-ds runs watch`: the present of a run, from files that are torn, stale, missing, endless or of the past."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ofa_ds.cli import main as ofa_ds
from ofa_ds.cluster.watch import Watcher, age
from ofa_ds.cluster.watch_screen import lines, short, watch

NOW = 1_800_000_000.0


def iso(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, timezone.utc).isoformat(timespec="milliseconds")


def rank(number: int, at_step: int, **changed: Any) -> dict[str, Any]:
    return {"rank": number, "pid": 100 + number, "phase": "step", "step": at_step, "age_s": 0.3, "state": "R"} | changed


class Run:
    """A run directory, as a launch and a trainer would have left it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "launch").mkdir(parents=True)
        tables = ("[data]\nnum_steps = 7\n", "[train]\nnum_steps = 1000\nsave_every = 50\n", "[z]\nsave_every = 3\n")
        (path / "recipe.toml").write_text("\n".join(['version = 2\nrun_dir = "x"\n', *tables]))

    def status(self, hosts: dict[str, list[dict[str, Any]]], *, age_s: float = 1.0, **changed: Any) -> None:
        rows = [{"name": name, "silence_s": 0.2, "ranks": ranks} for name, ranks in hosts.items()]
        content = {"at": iso(NOW - age_s), "attempt": 1, "retries_left": 2, "runner": "torchrun", "state": "running"}
        (self.path / "launch/status.json").write_text(json.dumps(content | {"hosts": rows} | changed))

    def start(self, attempt: int, from_step: int, skip_steps: tuple[int, ...] = ()) -> None:
        self._event(
            attempt=attempt, event="start", at=iso(NOW - 900), runner="torchrun", hosts=[["h1", 1], ["h2", 1]],
            world_size=2, from_step=from_step, skip_steps=list(skip_steps),
        )  # fmt: skip

    def end(self, attempt: int, **changed: Any) -> None:
        self._event(**{
            "attempt": attempt, "event": "end", "at": iso(NOW - 60), "outcome": "failed", "exit_code": 137,
            "host": "h2", "rank": 1, "step": 70, "error": "killed by SIGKILL", "bad_hosts": ["h2"], "seconds": 12.3,
            **changed,
        })  # fmt: skip

    def _event(self, **content: Any) -> None:
        with open(self.path / "launch/attempts.jsonl", "a") as file:
            file.write(json.dumps(content) + "\n")

    def metrics(self, *steps: int, at_s: float = NOW - 5, **changed: Any) -> None:
        file = self.path / "metrics.jsonl"
        with open(file, "a") as out:
            for step in steps:
                row = {"step": step, "loss": 2.0 + step / 1000, "lr": 1e-4, "grad_norm": 0.5, "step_ms": 1500.0}
                row |= {"examples_per_s": 300.0, "tokens_per_s": 9000.0, "data_wait_fraction": 0.01, **changed}
                out.write(json.dumps(row) + "\n")
        os.utime(file, (at_s, at_s))

    def checkpoint(self, step: int, age_s: float = 30.0) -> None:
        manifest = self.path / f"step_{step:08d}" / "manifest.json"
        manifest.parent.mkdir()
        manifest.write_text("{}")
        os.utime(manifest, (NOW - age_s, NOW - age_s))

    def lease(self, folder: str = ".", *, is_free: bool = False, since_s: float = NOW - 900) -> None:
        name = f".lease_00000003{'_free' if is_free else ''}"
        content = {"host": "h1", "pid": 7, "start": "s", "since": iso(since_s), "run": "0" * 16}
        (self.path / folder / name).write_text(json.dumps(content))
        os.utime(self.path / folder / name, (NOW - 2, NOW - 2))

    def look(self) -> dict[str, Any]:
        return Watcher(self.path).look(NOW)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def healthy(run: Run) -> None:
    run.start(1, 0)
    run.status({"h1": [rank(0, 812)], "h2": [rank(1, 812)]})
    run.metrics(790, 800, 810)
    run.checkpoint(750, 400)
    run.checkpoint(800)
    run.lease()
    run.lease("launch")


def test_one_screen_says_progress_speed_loss_checkpoint_attempt_and_every_host(run: Run) -> None:
    healthy(run)
    facts = run.look()
    assert (facts["step"], facts["num_steps"], facts["is_over"], facts["warnings"]) == (812, 1000, False, [])
    assert facts["remaining_s"] == pytest.approx(188 * 1.5)
    screen = "\n".join(lines(facts))
    for words in (
        "step 812 of 1,000 (81%)", "running, attempt 1 (2 retries left), 2 hosts, 2 ranks, torchrun", "1,500 ms a step",
        "300 examples/s", "5 min left", "loss 2.8100 at step 810", "lr 1.00e-04", "checkpoint 800, 30 s ago (2 there)",
        "h1  ranks 0", "h2  ranks 1",
    ):  # fmt: skip
        assert words in screen
    assert short(facts).count("\n") == 0 and "step 812" in short(facts)


def test_records_of_an_earlier_attempt_are_not_taken_for_progress(run: Run) -> None:
    run.start(1, 0)
    run.end(1, step=95)
    run.start(2, 50)
    run.metrics(40, 50, 60, 90, loss=3.0)
    run.status({"h1": [rank(0, 0, phase="start")], "h2": [rank(1, 0, phase="launch")]}, attempt=2, retries_left=1)
    facts = run.look()
    assert facts["step"] == 50 and facts["metrics"]["step"] == 50, "it starts: where it goes on from"
    run.status({"h1": [rank(0, 63)], "h2": [rank(1, 62)]}, attempt=2, retries_left=1)
    facts = run.look()
    assert facts["step"] == 63 and facts["metrics"]["step"] == 60
    assert not any(each["odd"] for host in facts["hosts"] for each in host["ranks"]), "one step apart is nothing"
    assert "attempt 1  failed at step 95 after 12 s on h2, rank 1, exit code 137; left out: h2: killed by" in "\n".join(
        lines(facts)
    )


def test_a_launch_that_died_is_told_since_when(run: Run) -> None:
    healthy(run)
    run.status({"h1": [rank(0, 812)], "h2": [rank(1, 812)]}, age_s=240)
    facts = run.look()
    assert facts["launch"]["state"] == "gone" and not facts["is_over"]
    assert iso(NOW - 240) in facts["warnings"][0] and "4 min" in facts["warnings"][0]
    assert "LAUNCH GONE" in lines(facts)[0]


def test_a_status_that_changes_is_fresh_though_the_other_clock_is_an_hour_off(run: Run) -> None:
    healthy(run)
    watcher = Watcher(run.path)
    for age_s in (3600.0, 3598.0):
        run.status({"h1": [rank(0, 812)]}, age_s=age_s)
        facts = watcher.look(NOW)
    assert facts["launch"]["state"] == "running" and facts["launch"]["age_s"] < 10
    run.status({"h1": [rank(0, 812)]}, age_s=-3600.0)
    assert run.look()["launch"]["state"] == "running"


@pytest.mark.parametrize(
    "story, changed, odd",
    [
        ("stopped", {"state": "T"}, "stopped (SIGSTOP)"),
        ("dead", {"state": "Z"}, "dead"),
        ("behind", {"step": 800}, "12 steps behind"),
        ("not begun", {"phase": "start", "step": 0}, "has not begun"),
        ("slow", {"age_s": 44.0}, "no step for 44 s"),
        ("healthy, asleep", {"state": "S"}, None),
        ("healthy, on the disk", {"state": "D", "phase": "save"}, None),
    ],
)
def test_what_is_odd_about_a_rank_is_said(run: Run, story: str, changed: dict[str, Any], odd: str | None) -> None:
    healthy(run)
    run.status({"h1": [rank(0, 812), rank(1, 812)], "h2": [rank(2, 812), rank(3, 812, **changed)]})
    facts = run.look()
    assert [each["odd"] for host in facts["hosts"] for each in host["ranks"]] == [None, None, None, odd]
    assert any(line.startswith("ODD        rank 3 on h2: ") for line in lines(facts)) is (odd is not None)


def test_where_nobody_makes_a_step_that_is_one_warning_and_no_rank_is_blamed(run: Run) -> None:
    healthy(run)
    run.status({"h1": [rank(0, 812, age_s=70.0)], "h2": [rank(1, 812, age_s=71.0)]})
    facts = run.look()
    assert facts["warnings"] == ["no rank has made a step for 70 s"]
    assert not any(each["odd"] for host in facts["hosts"] for each in host["ranks"])


def test_trouble_is_told(run: Run) -> None:
    run.start(1, 0, skip_steps=(640,))
    run.status({"h1": [rank(0, 812)], "h2": [rank(1, 812)]})
    status = json.loads((run.path / "launch/status.json").read_text())
    status["hosts"][1]["silence_s"] = 7.0
    (run.path / "launch/status.json").write_text(json.dumps(status))
    run.metrics(810, loss=None, skipped_steps=3.0)
    run.checkpoint(600)
    (run.path / "step_00000700").mkdir()
    (run.path / "step_00000650.damaged").mkdir()
    (run.path / "STOP").touch()
    told = "\n".join(run.look()["warnings"])
    for words in (
        "host h2 is silent for 7 s", "the loss at step 810 is not finite", "3 steps before step 810 were skipped",
        "passed over for good: steps 640", "no checkpoint since step 600, though one is due every 50 steps",
        "damaged checkpoints: step_00000650.damaged", "step_00000700 has no manifest", "STOP is asked for",
    ):  # fmt: skip
        assert words in told
    assert "loss not finite at step 810" in "\n".join(lines(run.look()))


def test_a_thousand_ranks_fit_a_screen_with_the_odd_ones_first_and_counts_for_the_rest(run: Run) -> None:
    hosts = {f"node{h:03d}": [rank(8 * h + r, 812) for r in range(8)] for h in range(128)}
    hosts["node077"][3] |= {"state": "T", "age_s": 12.0, "step": 811}
    for h in range(90, 120):
        hosts[f"node{h:03d}"][0] |= {"age_s": 60.0}
    healthy(run)
    run.status(hosts)
    began = time.process_time()
    facts = run.look()
    shown = lines(facts, height=24)
    assert time.process_time() - began < 1
    assert len(shown) <= 24 and "128 hosts, 1,024 ranks" in shown[0]
    odd = [line for line in shown if line.startswith("ODD")]
    assert "rank 619 on node077: stopped" in odd[0] and len(odd) >= 3
    assert any("more odd ranks" in line for line in shown)
    assert "more hosts, like the last of these" in shown[-1]
    assert len(lines(facts)) > 150, "without a screen every host has its line"


@pytest.mark.parametrize("outcome, left", [("done", 2), ("stopped", 2), ("failed", 0)])
def test_a_launch_that_has_ended_is_over_and_says_how(run: Run, outcome: str, left: int) -> None:
    run.start(1, 0)
    run.end(1, outcome=outcome, step=70)
    run.status({"h1": [rank(0, 70, state="X")]}, state="ended", age_s=5000.0, retries_left=left)
    run.metrics(60, 70)
    run.lease("launch", is_free=True)
    run.lease(is_free=True)
    facts = run.look()
    assert facts["is_over"] and facts["step"] == 70 and facts["remaining_s"] is None and facts["warnings"] == []
    assert f"over: {outcome}" in lines(facts)[0]


def test_between_two_attempts_it_is_not_over(run: Run) -> None:
    run.start(1, 0)
    run.end(1)
    run.status({"h1": [rank(0, 70)]}, state="ended", age_s=20.0)
    run.lease("launch")
    facts = run.look()
    assert not facts["is_over"] and "between two attempts" in lines(facts)[0]


def test_a_run_without_a_launch_shows_metrics_checkpoint_and_whose_it_is(run: Run) -> None:
    (run.path / "launch").rmdir()
    run.metrics(10, 20)
    run.checkpoint(20)
    run.lease()
    facts = run.look()
    assert facts["launch"] is None and facts["step"] == 20 and not facts["is_over"] and facts["hosts"] == []
    assert "host h1, pid 7, since" in "\n".join(lines(facts))
    (run.path / ".lease_00000003").rename(run.path / ".lease_00000003_free")
    assert run.look()["is_over"] and "no job is at work" in "\n".join(lines(run.look()))


def test_a_judgement_of_held_out_rows_is_shown_and_not_taken_for_a_step_without_a_loss(run: Run) -> None:
    (run.path / "launch").rmdir()
    run.metrics(10)
    run.checkpoint(10)
    run.lease()
    with open(run.path / "metrics.jsonl", "a") as out:
        out.write(json.dumps({"step": 10, "heldout/accuracy": 0.75}) + "\n")
    (run.path / "best").write_text("step_00000010\n")
    facts = run.look()
    assert facts["metrics"]["loss"] == 2.01 and facts["judged"] == {"step": 10, "heldout/accuracy": 0.75}
    assert "judged     accuracy 0.7500 at step 10; the best is step_00000010" in lines(facts)
    assert not any("not finite" in text for text in facts["warnings"])


def test_without_a_launch_records_from_before_the_present_job_count_up_to_its_checkpoint(run: Run) -> None:
    run.metrics(10, 20, 30, 40, at_s=NOW - 500)
    run.checkpoint(30, 600)
    run.lease(since_s=NOW - 20)
    facts = run.look()
    assert facts["step"] == 30 and facts["metrics"]["step"] == 30
    assert facts["warnings"] == ["the job at work has written no metrics yet"]
    os.utime(run.path / ".lease_00000003", (NOW - 400, NOW - 400))
    assert any("has not touched its lease for 7 min" in text for text in run.look()["warnings"])


def test_a_job_without_a_launch_after_one_is_what_is_shown(run: Run) -> None:
    healthy(run)
    for old in run.path.rglob(".lease_*"):
        old.unlink()
    run.lease("launch", is_free=True)
    run.status({"h1": [rank(0, 812)]}, state="ended", age_s=600.0)
    run.lease(since_s=NOW - 100)
    run.metrics(820)
    facts = run.look()
    assert facts["launch"] is None and facts["step"] == 820 and not facts["is_over"]


def test_an_empty_directory_has_not_begun_and_none_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ofa_ds(["runs", "watch", str(tmp_path), "--once"]) == 0
    assert "no step yet" in capsys.readouterr().out
    assert ofa_ds(["runs", "watch", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert "no such directory; want the run_dir of a run" in error and error.count("\n") == 1


def test_half_written_lines_and_files_of_another_kind_are_left_out(run: Run) -> None:
    healthy(run)
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 811, "lo')
    with open(run.path / "launch/attempts.jsonl", "a") as file:
        file.write('[]\n\n{"event": "end"}\n{"attempt": 2, "eve')
    assert run.look()["metrics"]["step"] == 810
    whole = (run.path / "launch/status.json").read_text()
    for torn in ("", whole[: len(whole) // 2], "[]", "\0\0", '{"hosts": {"a": 1}, "at": 3}'):
        (run.path / "launch/status.json").write_text(torn)
        assert run.look()["step"] is not None
    (run.path / "launch/status.json").unlink()
    (run.path / "launch/status.json").mkdir()
    lines(run.look())


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["hosts", "ranks", "rank", "name", "step", "phase", "state", "at", "age_s", "silence_s", "loss", "step_ms",
         "event", "attempt", "from_step", "outcome", "skip_steps", "bad_hosts", "retries_left", "world_size", "lr"]
    ), inner, max_size=6),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(ANYTHING, st.lists(ANYTHING, max_size=4), st.lists(ANYTHING, max_size=4))
def test_whatever_is_in_the_files_there_is_a_screen_and_strict_json(
    run: Run, status: object, events: list[object], records: list[object]
) -> None:
    whole = {"at": iso(NOW), "state": "running", "hosts": [{"name": "h", "ranks": [status]}, status]}
    for content in (status, whole):
        (run.path / "launch/status.json").write_text(json.dumps(content))
        starts = [{"attempt": 1, "event": "start"} | (each if isinstance(each, dict) else {}) for each in events]
        ends = [{"attempt": 1, "event": "end"} | (each if isinstance(each, dict) else {}) for each in events]
        rows = [each | {"step": 1} if isinstance(each, dict) else each for each in records]
        for name, found in (("launch/attempts.jsonl", [*starts, *events, *ends]), ("metrics.jsonl", rows)):
            (run.path / name).write_text("".join(json.dumps(each) + "\n" for each in found))
        facts = run.look()
        json.dumps(facts, allow_nan=False)
        shown = [*lines(facts, height=20), short(facts)]
        assert all(c.isprintable() for line in shown for c in line)


def test_a_look_writes_nothing(run: Run) -> None:
    healthy(run)
    before = {path: os.stat(path).st_mtime_ns for path in [run.path, *run.path.rglob("*")]}
    assert ofa_ds(["runs", "watch", str(run.path), "--once", "--json"]) == 0
    assert {path: os.stat(path).st_mtime_ns for path in [run.path, *run.path.rglob("*")]} == before


def test_metrics_of_gigabytes_are_read_from_their_end(run: Run) -> None:
    with open(run.path / "metrics.jsonl", "wb") as file:
        file.seek(3 << 30)
        file.write(b"\n")
    run.metrics(10)
    began = time.process_time()
    assert run.look()["metrics"]["step"] == 10
    assert time.process_time() - began < 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_it_redraws_and_elsewhere_it_prints_what_is_new(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy(run)
    looks = iter(range(3))

    def sleep(seconds: float) -> None:
        if next(looks) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("ofa_ds.cluster.watch_screen.time.sleep", sleep)
    terminal = Terminal()
    assert watch(run.path, as_json=False, once=False, every_s=1, out=terminal) == 0
    assert terminal.getvalue().count("\x1b[H") == 2 and terminal.getvalue().startswith("\x1b[2J")
    looks, elsewhere = iter(range(3)), io.StringIO()
    assert watch(run.path, as_json=False, once=False, every_s=1, out=elsewhere) == 0
    assert "\x1b" not in elsewhere.getvalue() and elsewhere.getvalue().count("step 812 of") == 1


def test_json_is_an_object_a_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    healthy(run)
    assert ofa_ds(["runs", "watch", str(run.path), "--once", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["num_steps"] == 1000


def test_ctrl_c_ends_it_quietly_with_0(run: Run) -> None:
    healthy(run)
    command = [sys.executable, "-m", "ofa_ds.cli", "runs", "watch", str(run.path)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores Ctrl-C, and so do these tests and what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and "step 8" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


def test_ages_read_well() -> None:
    ages = [age(each) for each in (None, 3.2, 119, 121, 7300, 200_000)]
    assert ages == ["?", "3 s", "119 s", "2 min", "2 h", "2 days"]
