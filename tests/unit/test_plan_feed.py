"""What a plan says of data: measured where it was, assumed where not, and waited for where workers are too few."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_sources import write_sources

from ofa_ds.bench import loader as bench
from ofa_ds.cli.main import main as ofa_ds
from ofa_ds.config import load_recipe
from ofa_ds.data.building.build import build_shards
from ofa_ds.data.vocab import train_vocab
from ofa_ds.plan.calibration import Calibration, load_calibration
from ofa_ds.plan.feed import ASSUMED, Feed, feed_of, key
from ofa_ds.terms import PRETRAINING_FAMILIES

ON_A_GPU = ("plan", "pretrain-tiny", "--gpu", "h200", "--gpus-per-host", "8", "--json")


def measured(device: str, **costs: list[float]) -> Calibration:
    known = {key(family): costs.get(family, [1e-3, 0.0]) for family in PRETRAINING_FAMILIES}
    return Calibration(device=device, machine="2 cores", date="2026-11-29", costs=known)


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert ofa_ds([*ON_A_GPU, *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_step_costs_its_rows_of_each_family_by_their_pictures() -> None:
    recipe = load_recipe("pretrain-tiny", ["data.image_size=320"])
    costs = {"vision_language": [2e-3, 1e-8], "image": [0.0, 3e-8]}
    found = feed_of(recipe, 8, measured("NVIDIA H200", **costs))
    pictures = 256 * (2e-3 + 1e-8 * 320**2) + 32 * 3e-8 * 256**2
    assert found == Feed(core_s=pytest.approx(pictures + 96e-3), workers=12, is_measured=True)


def test_what_was_not_measured_is_assumed_on_a_gpu_and_not_told_on_a_cpu() -> None:
    recipe = load_recipe("pretrain-tiny", [])
    nothing = Calibration(device="NVIDIA H200", machine="x", date="2026-11-29")
    one = replace(measured("NVIDIA H200"), costs={key("text"): [1.0, 0.0]})
    assert feed_of(recipe, 8, None) == feed_of(recipe, 8, nothing) == feed_of(recipe, 8, one)
    assert not feed_of(recipe, 8, None).is_measured and ASSUMED.keys() == set(PRETRAINING_FAMILIES)
    assert feed_of(recipe, 8, replace(nothing, device="cpu")) is None
    assert feed_of(recipe, 8, measured("cpu")).is_measured
    assert feed_of(load_recipe("finetune-caption-base", []), 8, None) is None, "rows of a task were not measured"


def test_workers_that_are_ahead_cost_nothing_and_none_cost_all() -> None:
    feed = Feed(core_s=3.0, workers=2, is_measured=True)
    assert feed.wait_s(2.0) == 0 and feed.wait_s(1.0) == 0.5 and feed.cores(2.0) == 1.5
    assert replace(feed, workers=0).wait_s(100.0) == 3.0


def test_a_run_waits_for_too_few_workers_and_the_plan_names_enough(capsys: pytest.CaptureFixture[str]) -> None:
    ahead, behind = plan(capsys, "data.workers=64"), plan(capsys, "data.workers=1")
    computes, waits = ahead["step"]["total_s"], behind["step"]["data_s"]
    assert ahead["step"]["data_s"] == 0 and waits > 0
    assert behind["step"]["total_s"] == pytest.approx(computes + waits)
    assert sum(behind["step"]["parts_s"].values()) == pytest.approx(computes + waits)
    assert behind["step"]["mfu"] == pytest.approx(ahead["step"]["mfu"] * computes / (computes + waits))
    examples = [sum(found["step"]["examples_per_s"].values()) for found in (behind, ahead)]
    assert examples[0] == pytest.approx(examples[1] * computes / (computes + waits))
    assert ofa_ds([*ON_A_GPU[:-1], "data.workers=1"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("data: "))
    enough = int(line.split()[-3])
    assert "(assumed)" in line and "with data.workers=1 it waits for them" in line
    assert plan(capsys, f"data.workers={enough}")["step"]["data_s"] == 0
    assert plan(capsys, f"data.workers={enough - 1}")["step"]["data_s"] > 0


def test_what_this_machine_needs_is_measured_and_planned_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"FEED_ROWS": 2, "FEED_MICRO_BATCHES": 1}.items():
        monkeypatch.setattr(bench, name, value)
    build_shards(tmp_path / "shards", **write_sources(tmp_path), workers=1)
    train_vocab(["a cat on a mat and the dog"] * 9, 300, tmp_path / "vocab", num_codes=8, num_bins=1000)
    words = ("bench", "data", "--output", str(tmp_path / "here.json"), "--shards", str(tmp_path / "shards"))
    assert ofa_ds(words) == 2 and "want both, or none" in capsys.readouterr().err
    assert ofa_ds([*words, "--vocab", str(tmp_path / "vocab")]) == 0
    assert "image, 32 px" in capsys.readouterr().out
    found = load_calibration(tmp_path / "here.json")
    assert found.costs.keys() == {key(family) for family in PRETRAINING_FAMILIES}
    assert all(sum(cost) > 0 and min(cost) >= 0 for cost in found.costs.values())
    on_gpu = tmp_path / "gpu.json"
    on_gpu.write_text(replace(found, device="NVIDIA H200", dtype="bf16").as_text())
    assert plan(capsys, "--calibration", str(on_gpu))["feed"]["is_measured"]


def test_a_line_through_two_sizes_is_found_again() -> None:
    assert bench.fitted([(100, 1.0), (300, 2.0)]) == pytest.approx([0.5, 0.005])
    assert bench.fitted([(100, 2.0), (300, 1.0)]) == [2.0, 0.0], "larger pictures never cost less"
    assert bench.fitted([(0, 2.0)]) == [2.0, 0.0] and bench.fitted([(100, 2.0)]) == [0.0, 0.02]
