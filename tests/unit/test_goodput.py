"""The simulator of failures against closed forms, and against limits that can be counted by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ofa_ds.cli import main as ofa_ds
from ofa_ds.plan import goodput
from ofa_ds.plan.goodput import DAY_S, Plan, first_order_interval, first_order_waste, search, simulate

NO_FAILURES = math.inf
WHOLE_WRITE = {"write_s": 0.0}
"""As the table of the plan has it: a checkpoint is whole when training goes on."""


def mean(plan: Plan, interval_s: float, runs: int = 4000) -> float:
    return float(simulate(plan, interval_s, runs=runs, seed=0).mean())


def test_llama_3_had_a_failure_every_50_700_gpu_hours() -> None:
    assert goodput.LLAMA3_GPU_HOURS == pytest.approx(50_700, rel=0.001)
    assert [round(Plan(gpus=gpus).failure_s / 3600, 1) for gpus in (256, 512, 1024)] == [198.0, 99.0, 49.5]


@pytest.mark.parametrize("gpus, interval_s, percent", [(256, 1194, 0.21), (512, 844, 0.32), (1024, 597, 0.50)])
def test_the_planned_waste_is_that_of_the_first_order_and_of_the_simulation(
    gpus: int, interval_s: float, percent: float
) -> None:
    plan = Plan(gpus=gpus, **WHOLE_WRITE)
    assert first_order_interval(plan) == pytest.approx(interval_s, abs=1)
    assert round(100 * first_order_waste(plan, interval_s), 2) == pytest.approx(percent, abs=0.011)
    assert 100 * (1 - mean(plan, interval_s)) == pytest.approx(percent, abs=0.02)


@pytest.mark.parametrize("gpus, percent", [(256, 1.3), (512, 2.1), (1024, 3.9)])
def test_saving_every_three_hours_for_40_seconds_wastes_what_it_is_said_to(gpus: int, percent: float) -> None:
    plan = Plan(gpus=gpus, stall_s=40, restart_s=900 - 25, **WHOLE_WRITE)
    assert 100 * first_order_waste(plan, 10_800) == pytest.approx(percent, abs=0.06)
    assert 100 * (1 - mean(plan, 10_800)) == pytest.approx(percent, abs=0.15)


@pytest.mark.parametrize("interval_s", [100.0, 597.0, 3000.0])
@pytest.mark.parametrize("write_s", [0.0, 60.0])
@pytest.mark.parametrize("gpus", [64, 1024])
def test_the_mean_is_that_of_the_first_order_where_waste_is_small(gpus: int, interval_s: float, write_s: float) -> None:
    plan = Plan(gpus=gpus, write_s=write_s)
    waste = first_order_waste(plan, interval_s)
    assert 1 - mean(plan, interval_s) == pytest.approx(waste, rel=0.06 + waste)


def test_the_mean_time_is_exactly_that_of_exponential_failures_where_waste_is_large() -> None:
    """Daly's exact form: a piece with its save fails exp(piece / M) - 1 times, each with a restart, which fails too."""
    plan = Plan(gpus=1, gpu_hours=1.0, work_s=20 * 600, stall_s=60, write_s=0, detect_s=0, stop_s=0, restart_s=300)
    failure_s, piece_s = 3600.0, 600 + 60
    piece = failure_s * math.exp(plan.restart_s / failure_s) * (math.exp(piece_s / failure_s) - 1)
    times = plan.work_s / simulate(plan, 600.0, runs=40_000, seed=1)
    assert times.mean() == pytest.approx(20 * piece, rel=0.01)


def test_without_failures_only_stalls_and_the_last_write_are_lost() -> None:
    plan = Plan(gpus=1024, gpu_hours=NO_FAILURES, work_s=1000.0, stall_s=2.0, write_s=7.0)
    assert simulate(plan, 100.0, runs=3, seed=0).tolist() == [1000 / (1000 + 10 * 2 + 7)] * 3
    assert simulate(plan, 300.0, runs=1, seed=0).tolist() == [1000 / (1000 + 4 * 2 + 7)], "the last piece is shorter"
    assert simulate(replace(plan, stall_s=0.0, write_s=0.0), 100.0, runs=1, seed=0).tolist() == [1.0]


def told(monkeypatch: pytest.MonkeyPatch, *until_s: float, lost: bool = False) -> None:
    """Failures that come so long after the beginning of each attempt, and then none."""

    def draw(plan: Plan, event: int, runs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full(runs, until_s[event] if event < len(until_s) else math.inf), np.full(runs, lost)

    monkeypatch.setattr(goodput, "_draw", draw)


COUNTED = Plan(gpus=16, work_s=1000.0, stall_s=2.0, write_s=10.0, detect_s=3.0, stop_s=4.0, restart_s=50.0)
TAIL_S = 2.0 + 10.0
"""The last save."""


@pytest.mark.parametrize(
    "story, until_s, total_s",
    [
        ("no failure", (), 1000 + 9 * 2 + TAIL_S),
        ("in training: back to the save before", (250.0,), 250 + 7 + 50 + 800 + 7 * 2 + TAIL_S),
        ("in the stall of the second save", (203.0,), 203 + 7 + 50 + 900 + 8 * 2 + TAIL_S),
        ("while the second save is written", (213.9,), 213.9 + 7 + 50 + 900 + 8 * 2 + TAIL_S),
        ("just after it is whole", (214.1,), 214.1 + 7 + 50 + 800 + 7 * 2 + TAIL_S),
        ("before the first save", (60.0,), 60 + 7 + 50 + 1000 + 9 * 2 + TAIL_S),
        ("in the restart", (250.0, 49.0), 250 + 7 + 49 + 7 + 50 + 800 + 7 * 2 + TAIL_S),
        ("in two restarts", (250.0, 20.0, 30.0), 250 + 20 + 30 + 3 * 7 + 50 + 800 + 7 * 2 + TAIL_S),
        ("a second one, after the restart", (250.0, 170.0), 250 + 170 + 2 * 7 + 50 + 700 + 6 * 2 + TAIL_S),
        ("while the last save is written", (1025.0,), 1025 + 7 + 50 + 100 + 0 * 2 + TAIL_S),
    ],
)  # fmt: skip
def test_a_failure_costs_what_can_be_counted_by_hand(
    monkeypatch: pytest.MonkeyPatch, story: str, until_s: tuple[float, ...], total_s: float
) -> None:
    told(monkeypatch, *until_s)
    found = simulate(COUNTED, 100.0, runs=2, seed=0)
    assert found.tolist() == pytest.approx([1000 / total_s] * 2), story


def test_without_a_spare_training_goes_on_slower_and_a_repaired_host_comes_back_at_a_restart(monkeypatch) -> None:
    told(monkeypatch, 250.0, lost=True)
    two_hosts = replace(COUNTED, gpus_per_host=8, spares=0, repair_hours=1.0)
    slow = 250 + 7 + 50 + 1600 + 15 * 2 + TAIL_S  # 800 s of work at half the speed, saved every 100 s of time
    assert simulate(two_hosts, 100.0, runs=1, seed=0).tolist() == pytest.approx([1000 / slow])
    spare = 250 + 7 + 50 + 800 + 7 * 2 + TAIL_S
    assert simulate(replace(two_hosts, spares=1), 100.0, runs=1, seed=0).tolist() == pytest.approx([1000 / spare])
    told(monkeypatch, 250.0, 4000.0 / 2, lost=True)
    back = replace(two_hosts, work_s=10_000.0, repair_hours=0.1)  # the first host is back when the second fails
    attempt = 50 + 8 * 0
    kept = (2000 * 2 - attempt - 10) // 102  # at half the hosts failures are half as frequent
    work = 10_000 - 200 - kept * 50
    total = 250 + 7 + 4000 + 7 + attempt + 2 * work + (math.ceil(2 * work / 100) - 1) * 2 + TAIL_S
    assert simulate(back, 100.0, runs=1, seed=0).tolist() == pytest.approx([10_000 / total])


def test_all_hosts_out_means_waiting_for_the_first_that_is_repaired(monkeypatch) -> None:
    told(monkeypatch, 250.0, lost=True)
    one_host = replace(COUNTED, gpus=8, spares=0, repair_hours=1.0)
    total = 257 + 3600 + 50 + 800 + 7 * 2 + TAIL_S
    assert simulate(one_host, 100.0, runs=1, seed=0).tolist() == pytest.approx([1000 / total])


def test_spares_only_help_and_many_are_as_good_as_a_replacement_at_hand() -> None:
    plan = Plan(gpus=1024, host_loss=1.0, work_s=20 * DAY_S)
    means = [mean(replace(plan, spares=spares), 600.0, 500) for spares in (0, 1, 2, 30)]
    assert means == sorted(means) and means[0] < means[-1]
    assert means[-1] == pytest.approx(mean(plan, 600.0, 500))


def test_the_same_seed_gives_the_same_runs_and_another_seed_others() -> None:
    plan = Plan(gpus=1024)
    first, again, other = (simulate(plan, 600.0, runs=50, seed=seed) for seed in (3, 3, 4))
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize("gpus", [256, 1024, 16_384])
def test_the_best_interval_is_near_the_first_order_one_and_none_tried_is_better(gpus: int) -> None:
    found = search(Plan(gpus=gpus, work_s=20 * DAY_S), runs=1000, seed=0)
    low, high = found.as_good
    assert low <= found.best.interval_s <= high
    assert low <= first_order_interval(found.plan) <= high
    assert found.best.mean >= max(point.mean for point in found.points) - 1e-4
    assert found.best.p5 < found.best.p50 < found.best.p95
    assert len(found.points) >= 15


@pytest.mark.parametrize("days", [1e-4, 0.01, 54.0])
@pytest.mark.parametrize("change", [{"stall_s": 0.0}, {"gpu_hours": NO_FAILURES}, {"write_s": 5000.0}, {}])
def test_a_search_never_fails_for_a_strange_but_possible_plan(change: dict[str, float], days: float) -> None:
    found = search(replace(Plan(gpus=1024, work_s=days * DAY_S), **change), runs=20, seed=0)
    assert 0 < found.best.mean <= 1
    json.dumps(found.as_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--interval", "3"], "interval 3 s: want at least 30 s, since a save waits for the one before"),
        (["--gpus", "10000000", "--runs", "5", "--interval", "60"], "5 of 5 runs were not done after 300 failures"),
        (["--interval", "60", "--png", "x.png"], "a curve wants more than one interval: leave --interval out"),
        (["--gpus", "9999", "--spares", "0", "--host-loss", "1", "--repair-hours", "9999"], "64 hosts are out at once"),
    ],
)
def test_a_plan_that_cannot_be_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(goodput, "MAX_EVENTS", 300)
    assert ofa_ds(["plan", "--goodput", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [["--gpus", "0"], ["--gpus", "8,"], ["--stall", "nan"], ["--restart", "-1"], ["--days", "inf"],
     ["--gpu-hours", "0"], ["--host-loss", "1.5"], ["--runs", "10000000"], ["--png", "no/such/folder.png"]],
)  # fmt: skip
def test_a_wrong_value_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = ofa_ds(["plan", "--goodput", "--gpus", "8", *words])
    except SystemExit as end:
        code = end.code
    assert code == 2 and words[0] in capsys.readouterr().err.replace("host_loss", "--host-loss")


def test_the_command_prints_p5_p50_and_the_best_interval_in_seconds_and_steps(capsys, tmp_path: Path) -> None:
    words = ["--runs", "300", "--step-seconds", "6", "--png", str(tmp_path / "curve.png")]
    assert ofa_ds(["plan", "--goodput", *words]) == 0
    first, *rows, curve = capsys.readouterr().out.splitlines()
    assert "54 days of training, 300 runs, seed 0" in first and len(rows) == 3 and curve.startswith("curve: ")
    for gpus, row in zip(("256", "512", "1,024"), rows, strict=True):
        assert row.startswith(f"{gpus} GPUs, a failure every ")
        assert "goodput p50 99." in row and "p5 99." in row and "train.save_every=" in row
    picture = Image.open(tmp_path / "curve.png")
    assert picture.size == (900, 560) and len(picture.getcolors(10**6)) > 10


def test_json_is_one_object_with_every_interval(capsys: pytest.CaptureFixture[str]) -> None:
    assert ofa_ds(["plan", "--goodput", "--gpus", "512", "--runs", "200", "--gpu-hours", "inf", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    (cluster,) = facts["clusters"]
    assert cluster["plan"]["gpus"] == 512 and cluster["plan"]["failure_s"] is None
    assert cluster["best"] in cluster["points"]
