"""`ofa-ds runs compare`: two runs side by side, of any version, whole or torn."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ofa_ds.cli import main as ofa_ds
from ofa_ds.config import load_recipe, recipe_to_toml
from ofa_ds.runs.compare import compare, lines
from ofa_ds.runs.curves import Curve, read_metrics
from ofa_ds.runs.picture import COLOURS
from ofa_ds.terms import TASKS
from ofa_ds.train.report_attempt import write_attempt

OLD = Path(__file__).parents[1] / "fixtures" / "checkpoint_0f884a0" / "run"


def record(step: int, loss: float | None, **more: Any) -> str:
    return json.dumps({"step": step, "loss": loss, **more})


def run(path: Path, *overrides: str, records: list[str] | None = None, environment: Any = None, **files: str) -> Path:
    """As this version leaves one."""
    recipe = recipe_to_toml(load_recipe("pretrain-nano", [f"run_dir={path}", *overrides]))
    path.mkdir()
    (path / "recipe.toml").write_text(recipe)
    records = [record(step, 10 / step) for step in range(10, 101, 10)] if records is None else records
    (path / "metrics.jsonl").write_text("".join(f"{each}\n" for each in records))
    content = {
        "recipe.toml": recipe, "deepspeed.json": "{}", "deepspeed_resolved.json": '{"zero_optimization": {"stage": 3}}',
        "environment.json": json.dumps(environment or {"started": str(path), "software": {"torch": "2.13"}}),
        "data.json": '{"shards": {"fingerprint": "s", "path": "x"}, "vocab": {"fingerprint": "v"}}',
    }  # fmt: skip
    write_attempt(path, {**content, **{name.replace("__", "."): text for name, text in files.items()}})
    return path


def told(a: Path, b: Path) -> str:
    return "\n".join(lines(compare(a, b)[2]))


def test_a_run_differs_in_nothing_from_itself(tmp_path):
    a = run(tmp_path / "a")
    text = told(a, a)
    assert "A and B are the same directory." in text and "differ\n" not in text
    for part in ("recipe", "DeepSpeed", "data", "code, machine, ranks"):
        assert f"\n{part}: the same" in text
    assert "step " not in text.partition("where they part\n")[2]


def test_what_differs_is_told_with_both_values_and_what_acts_on_learning_first(tmp_path):
    a = run(tmp_path / "a")
    b = run(
        tmp_path / "b", "optim.peak_lr=0.5", "data.mix.text=7", "train.log_every=3", "model.dropout=0.25",
        environment={"started": "later", "software": {"torch": "2.12", "code": "x"}, "ranks": {"count": 2}},
        deepspeed_resolved__json='{"zero_optimization": {"stage": 2}}',
        data__json='{"shards": {"fingerprint": "t", "path": "x"}, "vocab": {"fingerprint": "v"}}',
    )  # fmt: skip
    _, _, facts = compare(a, b)
    assert facts["recipe"].keys() == {"optim.peak_lr", "data.mix.text", "train.log_every", "model.dropout"}
    assert facts["recipe"]["optim.peak_lr"] == [0.001, 0.5]
    assert facts["deepspeed"] == {"zero_optimization.stage": [3, 2]}
    assert facts["data"] == {"shards.fingerprint": ["s", "t"]}
    assert facts["environment"] == {
        "software.torch": ["2.13", "2.12"], "software.code": [None, "x"], "ranks.count": [None, 2],
    }  # fmt: skip
    text = "\n".join(lines(facts))
    first, rest = text.partition("recipe, the rest: 1 differ")[::2]
    assert "what acts on learning: 3 differ" in first and "log_every" not in first and "train.log_every" in rest
    assert "(not there)" in text and "run_dir" not in text


def test_where_curves_part_and_the_means_of_their_last_tenth(tmp_path):
    losses = [1.0] * 60 + [2.0] * 40
    a = run(tmp_path / "a", records=[record(step, 1.0, lr=0.0) for step in range(1, 101)])
    b = run(tmp_path / "b", records=[record(step, losses[step - 1], lr=0.0) for step in range(1, 101)])
    loss, lr = compare(a, b)[2]["curves"]
    assert loss["name"] == "loss" and loss["means"] == [1.0, 2.0] and loss["change"] == 1.0
    assert loss["parted_at"] == 61 and loss["common_steps"] == 100 and loss["largest_difference"] == 1.0
    assert lr["parted_at"] is None and lr["change"] == 0.0


def test_runs_of_other_steps_are_compared_over_those_that_both_have(tmp_path):
    a = run(tmp_path / "a", records=[record(step, 1.0) for step in range(10, 201, 10)])
    b = run(tmp_path / "b", records=[record(step, 3.0) for step in range(105, 1001, 7)])
    (loss,) = compare(a, b)[2]["curves"]
    assert loss["steps"] == [105, 200] and loss["means"] == [1.0, 3.0] and loss["common_steps"] == 1
    c = run(tmp_path / "c", records=[record(step, 3.0) for step in range(201, 300)])
    assert compare(a, c)[2]["curves"] == [] and "the runs have no steps in common" in told(a, c)
    d = run(tmp_path / "d", records=[record(step, 3.0) for step in range(105, 200, 10)])
    assert "no step is logged by both" in told(a, d)


def test_what_is_not_finite_counts_as_a_difference_and_in_no_mean(tmp_path):
    a = run(tmp_path / "a", records=[record(1, 1.0), record(2, None), record(3, 3.0), '{"step": 4, "loss": NaN}'])
    b = run(tmp_path / "b", records=[record(1, 1.0), record(2, None), record(3, None), record(4, None)])
    one, other, facts = compare(a, b)
    (loss,) = facts["curves"]
    assert loss["parted_at"] == 3 and loss["means"] == [None, None] and loss["largest_difference"] == 0.0
    assert json.dumps(facts, allow_nan=False)
    assert one.metrics.num_broken == other.metrics.num_broken == 0


def test_half_written_lines_are_left_out_and_counted(tmp_path):
    torn = [record(1, 5.0), '{"step": 2, "lo', "", "[]", '{"loss": 1}', '{"step": true, "loss": 1}', "\x00\x00",
            f'{{"step": 3, "loss": {"9" * 5000}}}', '{"step": 4, "loss": "x", "b": true}', record(5, 4.0)]  # fmt: skip
    a, b = run(tmp_path / "a", records=torn), run(tmp_path / "b")
    with open(a / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\xfe{"step": 6')
    one, _, _ = compare(a, b)
    assert list(one.metrics.curves["loss"].steps) == [1.0, 5.0]
    assert "metrics.jsonl: 7 broken lines are left out" in told(a, b)


def test_steps_that_were_written_again_count_once_as_they_were_written_last(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([record(1, 1.0), record(2, 2.0), record(3, 3.0), record(2, 9.0), record(3, 8.0)]))
    curve = read_metrics(path).curves["loss"]
    assert list(curve.steps) == [1, 2, 3] and list(curve.values) == [1.0, 9.0, 8.0]


def test_the_directory_of_an_older_version_is_compared_by_what_it_has(tmp_path):
    new = run(tmp_path / "new")
    text = told(OLD, new)
    assert f"A  {OLD}: step 4 of 6, checkpoint step_00000004" in text
    assert "A: it has no report of an attempt, as older versions have none" in text
    assert "DeepSpeed: cannot be compared, one of the runs has none of it" in text
    facts = compare(OLD, new)[2]
    assert facts["recipe"]["model.change.dim"] == [16, None] and "train.profile_steps" not in facts["recipe"]
    assert facts["data"].keys() == {"shards.fingerprint", "vocab.fingerprint"}
    assert facts["environment"] == {"software.torch": ["2.13.0+cpu", "2.13"]}, "what only a report knows is not told"
    assert "recipe: the same" in told(OLD, OLD)


def test_a_recipe_of_a_later_version_is_compared_as_it_stands(tmp_path):
    a, b = run(tmp_path / "a"), tmp_path / "b"
    later = (a / "recipe.toml").read_text().replace("version = 2", "version = 999") + '\n[later]\nkey = "new"\n'
    run(b, recipe__toml=later)
    facts = compare(a, b)[2]
    assert facts["recipe"]["later.key"] == [None, "new"] and facts["recipe"]["version"] == [None, 999]
    assert "a recipe of version 999" in told(a, b) and "it is compared as it stands" in told(a, b)


def test_files_that_are_missing_or_torn_are_told_and_the_rest_is_compared(tmp_path):
    a, b = run(tmp_path / "a"), run(tmp_path / "b", environment__json='{"soft', recipe__toml="run_dir = [")
    (b / "recipe.toml").unlink()
    (b / "metrics.jsonl").unlink()
    shutil.copytree(OLD / "step_00000004", b / "step_00000004")
    (b / "step_00000004/manifest.json").write_text('{"xx')
    text = told(a, b)
    for part in (
        "environment.json: not a JSON object", "0001/recipe.toml: cannot be read", "manifest.json: cannot be read",
        "no curves: ", "B: it has no recipe that can be read", "data: the same", "DeepSpeed: the same",
        "recipe: cannot be compared", "curves: the runs have no steps in common", "only A has: loss",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_what_is_no_run_is_refused_in_one_line(kind, tmp_path, capsys):
    place = tmp_path / "x"
    if kind == "file":
        place.write_text("")
    if kind == "empty":
        place.mkdir()
    assert ofa_ds(["runs", "compare", str(OLD), str(place)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(place) in err and ("want the directory of a run" in err or "is no run" in err)


def test_the_command_prints_one_json_object_and_draws_each_curve_of_each_run(tmp_path, capsys):
    def records(factor: float) -> list[str]:
        tasks = {f"loss/{task}": None if task == "vqa" else factor for task in TASKS[:8]}
        return [record(step, factor * (1 if step != 50 else 1e6), **tasks) for step in range(1, 101)]

    a, b = run(tmp_path / "a", records=records(1.0)), run(tmp_path / "b", records=records(2.0))
    picture = tmp_path / "ab.png"
    assert ofa_ds(["runs", "compare", str(a), str(b), "--json", "--png", str(picture)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["version"] == 1 and {curve["name"] for curve in facts["curves"]} == {
        "loss",
        *(f"loss/{t}" for t in TASKS[:8]),
    }
    image = Image.open(picture)
    counts = dict((colour, count) for count, colour in image.getcolors(1 << 20))
    assert image.size == (1320, 800) and all(counts[colour] > 2000 for colour in COLOURS)
    assert ofa_ds(["runs", "compare", str(a), str(b), "--png", str(picture)]) == 0
    assert f"picture: {picture}, 9 curves\n" in capsys.readouterr().out


def test_many_curves_are_told_as_far_as_there_is_room(tmp_path, capsys):
    names = {f"loss/task_{i}": 1.0 for i in range(100)}
    a = run(tmp_path / "a", records=[record(1, 1.0, **names)])
    assert ofa_ds(["runs", "compare", str(a), str(a), "--png", str(tmp_path / "x.png")]) == 0
    out = capsys.readouterr().out
    assert "and 41 more: --json has all" in out and "30 of 101 curves" in out


def test_runs_without_a_curve_cannot_be_drawn(tmp_path, capsys):
    a = run(tmp_path / "a", records=[])
    assert ofa_ds(["runs", "compare", str(a), str(a), "--png", str(tmp_path / "x.png")]) == 2
    assert "neither run has a curve to draw" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path):
    a, b = run(tmp_path / "a"), run(tmp_path / "b", environment={"software": {"torch": "\x1b[2J"}})
    assert "\x1b" not in told(a, b)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.lists(st.one_of(st.binary(max_size=60), st.builds(
    lambda step, loss: json.dumps({"step": step, "loss": loss}).encode(),
    st.one_of(st.integers(-5, 10**30), st.floats(), st.none()), st.one_of(st.floats(), st.none(), st.text(max_size=3)),
)), max_size=12))  # fmt: skip
def test_whatever_is_in_the_metrics_nothing_raises(content, tmp_path):
    a = tmp_path / "a"
    a.mkdir(exist_ok=True)
    (a / "metrics.jsonl").write_bytes(b"\n".join(content))
    _, _, facts = compare(a, OLD)
    assert lines(facts) and json.dumps(facts, allow_nan=False)


def test_a_mean_is_over_the_finite_values_of_its_steps():
    curve = Curve()
    for step, value in enumerate([1.0, math.nan, 3.0, 100.0]):
        curve.add(step, value)
    assert curve.mean(0, 2) == 2.0 and math.isnan(curve.mean(1, 1)) and math.isnan(curve.mean(9, 10))
