"""`ofa-ds plan RECIPE`: every shipped recipe is planned, what does not fit gets what does, an error is one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import scenes_shards
from PIL import Image

from ofa_ds.cli import main as ofa_ds
from ofa_ds.config import load_recipe, shipped_recipes
from ofa_ds.data.mixture import Mixture
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import load_vocab, train_vocab
from ofa_ds.engine.config import load_deepspeed_config, shipped_configs
from ofa_ds.model.config import VOCAB_SIZE, model_config, preset
from ofa_ds.plan.advice import advise, lighter
from ofa_ds.plan.calibration import Calibration
from ofa_ds.plan.cpu import CpuPlan
from ofa_ds.plan.forecast import HOST_BYTES, NVME_BYTES, Cluster, Forecast, Run, cost, forecast, heaviest
from ofa_ds.plan.hardware import GPUS, NETWORKS
from ofa_ds.plan.parameters import num_parameters
from ofa_ds.train.loader import Loader

SHIPPED = shipped_configs()
SMALL = ("pretrain-6b", "--gpus-per-host", "2", "--gpu", "a100-40gb")
"""What does not fit as it is."""


def cluster(hosts: int = 1, ranks: int = 8, gpu: str = "a100-80gb") -> Cluster:
    return Cluster(
        hosts=hosts, ranks_per_host=ranks, gpu=GPUS[gpu], network=NETWORKS["infiniband-8x200"],
        host_bytes=HOST_BYTES[gpu], nvme_bytes=NVME_BYTES[gpu],
    )  # fmt: skip


def run(name: str, *overrides: str) -> Run:
    recipe = load_recipe(name, overrides)
    deepspeed = load_deepspeed_config(recipe.deepspeed, nvme=True)
    return Run(name=name, recipe=recipe, model=model_config(recipe, VOCAB_SIZE), deepspeed=deepspeed)


def planned(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    assert ofa_ds(["plan", *words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert ofa_ds(["plan", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def holds_the_state(plan: Forecast, ranks: int) -> bool:
    """Weights, gradients, moments: somewhere, cut among the ranks at best."""
    return plan.memory.gpu_total + plan.memory.host_total / ranks > 7 * plan.parameters / ranks


def takes_time(plan: Forecast) -> bool:
    step = plan.step()
    return 0 < step.low_s <= step.total_s <= step.high_s and 0 < step.mfu < 0.9


def test_every_shipped_recipe_is_planned_with_every_shipped_layout() -> None:
    assert len(shipped_recipes()) > 80 and len(SHIPPED) >= 6
    for name in shipped_recipes():
        plain, ranks = run(name), 8
        while plain.recipe.batch.global_rows % (plain.recipe.batch.micro_rows * ranks):
            ranks //= 2
        for layout, deepspeed in SHIPPED.items():
            plan = forecast(replace(plain, deepspeed=deepspeed), cluster(ranks=ranks))
            assert plan.state_bytes > 0 and plan.work.tokens > 0, (name, layout)
        if re.match("pretrain-|finetune-(vqa|sst2)-", name):  # those of the other tasks hold and take much the same
            own = forecast(plain, cluster(ranks=ranks))
            assert holds_the_state(own, ranks) and takes_time(own), name
    for name in ("pretrain-nano", "pretrain-base"):
        for layout in SHIPPED:
            plan = forecast(run(name, f"deepspeed={layout}"), cluster(ranks=2))
            assert holds_the_state(plan, 2) and takes_time(plan), (name, layout)
            assert plan.state_bytes < plan.memory.gpu_total and min(plan.memory.gpu.values()) >= 0


def test_the_report_names_parts_totals_and_what_they_are_of(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--hosts", "32", "--gpu", "a100-80gb", "--price-per-gpu-hour", "2", "--steps", "1000"]
    assert ofa_ds(["plan", "pretrain-6b", *words]) == 0
    out = capsys.readouterr().out
    count = num_parameters(preset("6b"))
    assert out.startswith(f"pretrain-6b: {count:,} parameters on 32 hosts x 8 a100-80gb, infiniband-8x200\n")
    for text in ("activations", "fits: ", "GiB of a GPU to spare", "MFU ", "tokens/s", "1,000 steps: ", "GPU-hours",
                 "kWh", "price ", "train.save_every=", f"{VOCAB_SIZE:,} is assumed"):  # fmt: skip
        assert text in out, text


def test_the_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "pretrain-6b", "--hosts", "32", "--gpu", "a100-80gb", "--price-per-gpu-hour", "2")
    assert found["version"] == 1 and found["fits"] and found["advice"] == []
    assert sum(found["memory"]["gpu"].values()) == pytest.approx(found["memory"]["gpu_total"])
    for place in ("gpu", "host", "nvme"):
        assert found["memory"][f"{place}_total"] <= found["memory"][f"{place}_capacity"]
    step, price = found["step"], found["cost"]
    assert sum(step["parts_s"].values()) == pytest.approx(step["total_s"])
    assert step["low_s"] < step["total_s"] < step["high_s"]
    low, middle, high = price["gpu_hours"]
    assert low < middle < high and middle == pytest.approx(price["steps"] * step["total_s"] * 256 / 3600)
    assert price["price"] == pytest.approx([2 * low, 2 * middle, 2 * high])
    assert price["energy_kwh"][1] == pytest.approx(middle * 0.4)
    assert sum(found["useful_flops_by_module"].values()) == pytest.approx(step["useful_flops"], rel=1e-9)


def test_a_matrix_that_is_not_trained_has_no_gradient_in_any_of_the_figures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = planned(capsys, "finetune-caption-base", "--gpu", "h100")
    assert sum(found["useful_flops_by_module"].values()) == pytest.approx(found["step"]["useful_flops"], rel=1e-9)


def test_words_may_stand_after_options(capsys: pytest.CaptureFixture[str]) -> None:
    first = planned(capsys, "pretrain-base", "batch.micro_rows=24", "--gpu", "h100")
    assert planned(capsys, "--gpu", "h100", "pretrain-base", "batch.micro_rows=24") == first
    assert planned(capsys, "pretrain-base", "--gpu", "h100", "batch.micro_rows=24") == first


def test_the_vocabulary_of_the_recipe_counts_where_it_is_here(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    train_vocab(["a few words of text"], 260, tmp_path / "vocab", num_codes=16, num_bins=8)
    found = planned(capsys, "pretrain-nano", "--gpu", "h100", "--gpus-per-host", "1", f"data.vocab={tmp_path}/vocab")
    assert found["parameters"] < num_parameters(preset("nano")) and found["notes"] == []


def test_a_plan_of_the_6b_on_1024_gpus_takes_less_than_five_seconds() -> None:
    words = ["plan", "pretrain-6b", "--hosts", "128", "--gpu", "a100-80gb", "batch.global_rows=11264", "--json"]
    code = (
        "import sys; from ofa_ds.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'deepspeed', 'pyarrow'} & sys.modules.keys(); "
        "print(sorted(heavy), file=sys.stderr); sys.exit(code)"
    )
    start = time.process_time(), time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert time.monotonic() - start[1] < 5 or time.process_time() - start[0] < 5
    assert done.returncode == 0 and done.stderr == "[]\n", done.stderr
    assert json.loads(done.stdout)["cluster"]["hosts"] == 128


@pytest.mark.parametrize("mix", [(8, 2, 1, 1), (8, 2, 0, 1), (4, 1, 1, 1), (1, 1, 1, 1), (8, 1, 3, 1), (0, 1, 1, 0)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 11, 12, 13])
def test_no_micro_batch_has_more_vision_language_rows_than_memory_is_planned_for(
    mix: tuple[int, int, int, int], rows: int
) -> None:
    families = dict(zip(("vision_language", "text", "image", "detection"), mix, strict=True))
    words = [f"data.mix.{name}={weight}" for name, weight in families.items()]
    planned_for = heaviest(load_recipe("pretrain-base", [*words, f"batch.micro_rows={rows}"])).data.mix.weights()
    share = Fraction(planned_for["vision_language"], sum(planned_for.values()))
    mixture = Mixture(dict.fromkeys(families, 10**6), families, seed=1)
    drawn = [
        sum(family == "vision_language" for family, _, _ in mixture.rows(start, start + rows))
        for start in range(0, 200 * rows, rows)
    ]
    assert max(drawn) <= share * rows <= max(drawn) + 1


# Advice -------------------------------------------------------------------


def test_what_does_not_fit_gets_changes_that_do_the_cheapest_first(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, *SMALL, code=1)
    assert not found["fits"] and found["memory"]["gpu_total"] > found["memory"]["gpu_capacity"]
    prices = [each["gpu_seconds"] for each in found["advice"]]
    assert prices == sorted(prices) and prices
    for each in found["advice"]:
        assert each["gpu_total"] <= found["memory"]["gpu_capacity"] and each["changes"]
        assert each["hosts"] == 1, "more hosts are for where nothing fits on these"


@pytest.mark.long
def test_advice_is_as_good_as_any_combination_of_rows_checkpointing_and_shipped_layout() -> None:
    plain, few = run("pretrain-6b", "model.activation_checkpointing=false"), cluster(ranks=4, gpu="a100-40gb")
    best = advise(forecast(plain, few), SHIPPED)[0]
    for layout in ("zero3", "zero3_offload", "zero3_6b_a100_40gb", "zero3_6b_offload"):
        for rows in (11, 8):
            for checkpointing in ("true", "false"):
                other = run(
                    "pretrain-6b", f"deepspeed={layout}", f"batch.micro_rows={rows}",
                    f"model.activation_checkpointing={checkpointing}",
                )  # fmt: skip
                there = forecast(other, few)
                if there.layout.precision == "bf16" and 4 * there.step().total_s < 0.999 * best.gpu_seconds:
                    assert not there.fits, (layout, rows, checkpointing)


def test_advice_only_changes_what_it_says() -> None:
    before = forecast(run("pretrain-6b"), cluster(ranks=2, gpu="a100-40gb"))
    for each in advise(before, SHIPPED):
        after = each.planned.run
        said = " ".join(each.changes)
        assert (after.recipe.batch.micro_rows != 11) == ("batch.micro_rows=" in said)
        assert (after.deepspeed != before.run.deepspeed) == bool(re.search("deepspeed=| in ", said))
        assert after.recipe.model.activation_checkpointing == after.model.activation_checkpointing is True
        assert after.recipe.batch.global_rows == 2816, "what a step learns stays as it is"


@pytest.mark.long
def test_where_no_change_fits_more_hosts_are_proposed() -> None:
    small = replace(cluster(ranks=1, gpu="a100-40gb"), host_bytes=60e9)  # too little to offload to
    found = advise(forecast(run("pretrain-6b"), small), SHIPPED)
    assert found and all(each.planned.cluster.hosts > 1 for each in found)
    assert any(re.fullmatch(r"\d+ hosts", each.changes[-1]) for each in found)


@pytest.mark.long
def test_a_lighter_plan_stays_on_the_same_hosts_and_wants_less() -> None:
    before = forecast(run("pretrain-base"), cluster())
    found = lighter(before, SHIPPED)
    assert found and all(each.planned.cluster == before.cluster for each in found)
    assert all(each.planned.memory.gpu_total <= 0.9 * before.memory.gpu_total for each in found)


def test_the_recipe_that_is_written_fits_and_extends_the_one_that_did_not(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "fits.toml"
    assert ofa_ds(["plan", *SMALL, "optim.peak_lr=3e-4", "--write-recipe", str(file)]) == 0
    assert f"recipe: {file}" in capsys.readouterr().out
    assert "by ofa-ds plan" in (text := file.read_text()) and 'extends = "pretrain-6b"' in text
    found = planned(capsys, str(file), *SMALL[1:])
    assert found["fits"]
    written, before = load_recipe(file), load_recipe("pretrain-6b")
    assert written.optim.peak_lr == 3e-4 and written.data == before.data
    assert load_deepspeed_config(written.deepspeed)
    assert "is there already" in refusal(capsys, *SMALL, "--write-recipe", str(file))


def test_a_layout_that_is_no_shipped_one_is_written_beside_the_recipe(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ofa_ds.engine import config

    monkeypatch.setattr(config, "shipped_configs", lambda: {})
    file = tmp_path / "fits.toml"
    assert ofa_ds(["plan", *SMALL, "--write-recipe", str(file)]) == 0
    written = load_recipe(file)
    assert Path(written.deepspeed) == file.with_suffix(".deepspeed.json")
    zero = load_deepspeed_config(written.deepspeed)["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == "cpu" and "zero_hpz_partition_size" not in zero
    capsys.readouterr()
    assert planned(capsys, str(file), *SMALL[1:])["fits"]


def test_a_picture_that_cannot_be_drawn_leaves_no_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr("ofa_ds.plan.picture.draw", full)
    file = tmp_path / "fits.toml"
    assert ofa_ds(["plan", *SMALL, "--write-recipe", str(file), "--png", str(tmp_path / "x.png")]) == 1
    assert not file.exists()


# Several sizes of cluster --------------------------------------------------


def test_scaling_has_each_size_on_each_speed_of_network_with_as_many_rows_a_gpu(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["pretrain-6b", "--gpu", "a100-80gb", "--scaling", "--gpus", "64,256"]
    found = planned(capsys, *words)
    assert found["rows_per_gpu"] == 44, "2,816 rows on the smallest"
    as_it_is = {each["gpus"]: each for each in found["points"] if each["network_factor"] == 1}
    assert list(as_it_is) == [64, 256] and as_it_is[64]["weak_scaling"] == 1
    assert 0.5 < as_it_is[256]["weak_scaling"] <= 1
    of_64 = [each["mfu"] for each in found["points"] if each["gpus"] == 64]
    assert of_64 == sorted(of_64) and len(of_64) > 4, "a faster network is never slower"
    alone = planned(capsys, "pretrain-6b", "--gpu", "a100-80gb", "--hosts", "8")
    assert alone["step"]["total_s"] == pytest.approx(as_it_is[64]["step_s"], rel=0.01)
    file = tmp_path / "scaling.png"
    assert ofa_ds(["plan", *words, "--png", str(file)]) == 0
    assert f"picture: {file}" in capsys.readouterr().out and Image.open(file).width >= 800


# CPUs ---------------------------------------------------------------------


def test_ranks_on_cpus_are_planned_by_a_calibration_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Calibration(device="cpu", machine="2 cores", date="2026-11-28", peak_flops=1e11)
    file = tmp_path / "cpu.json"
    file.write_text(measured.as_text())
    words = ("pretrain-nano", "--gpu", "cpu", "--gpus-per-host", "2", "--calibration", str(file))
    assert "ofa-ds bench" in refusal(capsys, *words), "this file lacks all costs"
    parts = CpuPlan(bytes={"process": 3e8}, seconds={"encoder": 0.2}, bytes_error=0.1, seconds_error=0.25)
    monkeypatch.setattr("ofa_ds.plan.forecast.predict_cpu", lambda *_, **__: parts)
    found = planned(capsys, *words)
    assert found["memory"]["host"] == {"process": 6e8} and found["memory"]["gpu"] == {} and found["fits"]
    step = found["step"]
    assert (step["low_s"], step["total_s"], step["high_s"]) == pytest.approx((0.16, 0.2, 0.25))
    assert step["mfu"] == pytest.approx(step["useful_flops"] / 0.2 / 1e11)
    assert found["calibration"]["machine"] == "2 cores" and found["saving"] is None
    assert "leave --hosts and --network out" in refusal(capsys, *words, "--hosts", "2")
    monkeypatch.setattr("ofa_ds.plan.forecast.predict_cpu", lambda *_, **__: replace(parts, bytes={"process": 1e15}))
    assert "does not fit on 2 ranks of this host" in refusal(capsys, *words)


def test_a_prediction_that_was_off_by_more_than_itself_has_no_negative_times(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpu.json"
    file.write_text(Calibration(device="cpu", machine="2 cores", date="2026-11-28", peak_flops=1e11).as_text())
    parts = CpuPlan(bytes={"process": 3e8}, seconds={"encoder": 0.2}, bytes_error=0.1, seconds_error=1.0)
    monkeypatch.setattr("ofa_ds.plan.forecast.predict_cpu", lambda *_, **__: parts)
    assert ofa_ds(["plan", "pretrain-nano", "--gpu", "cpu", "--calibration", str(file)]) == 0
    assert re.search(r"total +200.0  \(100.0 to 400.0\)", capsys.readouterr().out)


def test_a_calibration_is_taken_for_its_own_kind_of_gpu_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "a100.json"
    slow = Calibration(device="NVIDIA A100-SXM4-80GB", machine="x", date="2026-11-28", rates={"matmul": 1e13})
    file.write_text(slow.as_text())
    words = ("pretrain-base", "--calibration", str(file), "--gpu")
    for other in ("h100", "a100-40gb", "cpu"):
        assert f"is of 'NVIDIA A100-SXM4-80GB', not of --gpu {other}" in refusal(capsys, *words, other)
    assert planned(capsys, *words, "A100-80gb")["step"]["mfu"] < 0.1
    (point, *_) = planned(capsys, *words, "a100-80gb", "--scaling", "--gpus", "8")["points"]
    assert point["mfu"] < 0.1
    assert "not of --gpu h100" in refusal(capsys, *words, "h100", "--scaling")


# Own data -----------------------------------------------------------------


def test_measured_lengths_are_those_of_the_runs_own_micro_batches(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = scenes_shards.build(tmp_path, rows=24)
    words = [
        f"data.shards={folder}/shards",
        f"data.vocab={folder}/vocab",
        "data.mix.text=1",
        "data.mix.vision_language=4",
    ]
    found = planned(
        capsys, "pretrain-nano", "--gpu", "h100", "--gpus-per-host", "1", "--measure", "4", *words, "batch.micro_rows=6"
    )
    assert any("measured on 4 micro-batches of" in note for note in found["notes"])
    recipe = load_recipe("pretrain-nano", [*words, "batch.micro_rows=6"])
    vocab = load_vocab(folder / "vocab")
    model = model_config(recipe, vocab.size)
    loader = Loader(
        shards=Shards(folder / "shards"), vocab=vocab, config=recipe.data, batch=recipe.batch, model=model, seed=1
    )
    batches = [loader.micro_batches.build(0, k) for k in range(4)]
    tokens = sum(batch.num_tokens for batch in batches) / 4
    assert found["batch"]["encoder_tokens"] + found["batch"]["decoder_tokens"] == pytest.approx(tokens, rel=0.02)
    assert "--measure wants a directory" in refusal(
        capsys, "pretrain-nano", "--gpu", "h100", "--measure", "4", "data.shards=", "--gpus-per-host", "1"
    )


# Pictures -----------------------------------------------------------------


def test_the_picture_shows_memory_and_time(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sizes = []
    for words in (("pretrain-6b", "--hosts", "32", "--gpu", "a100-80gb"), SMALL):
        file = tmp_path / f"{len(sizes)}.png"
        ofa_ds(["plan", *words, "--png", str(file)])
        picture = Image.open(file)
        sizes.append(picture.size)
        assert picture.width == 1000 and len(picture.getcolors(10**6)) > 10
    assert f"picture: {file}" in capsys.readouterr().out


# Errors -------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "want a recipe, such as: ofa-ds plan pretrain-6b --gpu"),
        (("pretrain-6b",), "want --gpu NAME: one of a100-40gb, a100-80gb, h100, h200, cpu"),
        (("pretrain-6b", "--gpu", "a100-80g"), "did you mean a100-80gb?"),
        (("pretrain-6b", "--gpu", "h100", "--network", "infiniband"), "network: want one of "),
        (("pretrain-6c", "--gpu", "h100"), "did you mean pretrain-6b?"),
        (("pretrain-6b", "pretrain-base", "--gpu", "h100"), "want one recipe, got pretrain-6b and pretrain-base"),
        (("pretrain-6b", "--gpu", "h100", "--hosts", "3"), "is not a multiple of batch.micro_rows 11 x 24 ranks = 264"),
        (("pretrain-6b", "--gpu", "h100", "deepspeed=zero4"), "deepspeed zero4: neither a .json file nor one of"),
        (("pretrain-6b", "--gpu", "h100", "data.image_size=480"), "does not divide into patches of 14 pixels; use 476"),
        (("pretrain-6b", "--gpu", "h100", "--goodput"), "--goodput plans any run"),
        (("pretrain-6b", "--gpu", "h100", "--gpus", "8"), "--gpus is of --scaling and --goodput"),
        (("pretrain-6b", "--gpu", "h100", "--scaling", "--gpus", "12"), "want whole hosts of 8 GPUs"),
        (("pretrain-6b", "--gpu", "h100", "--scaling", "--hosts", "2"), "--scaling has its sizes in --gpus"),
        (("pretrain-nano", "--gpu", "cpu"), "--gpu cpu wants what was measured of it: ofa-ds bench step"),
        (("pretrain-nano", "--gpu", "h100", "--calibration", "nowhere"), "nowhere: No such file"),
        (("pretrain-base", "--gpu", "h100", "--steps", "9" * 400), "--steps: want at most 2,147,483,647"),
        (("pretrain-base", "--gpu", "h100", "--price-per-gpu-hour", "1e308"), "is more than can be counted"),
        (("pretrain-6b", "--gpu", "h100", "--write-recipe", "x.json"), "want a file name that ends in .toml"),
        (
            ("pretrain-6b", "--gpu", "a100-80gb", "--hosts", "4", "--gpus-per-host", "4", "deepspeed=zero3_6b_a100"),
            "zero_hpz_partition_size 8: its second copy would lie on several hosts",
        ),
        (
            ("pretrain-6b", "--gpu", "a100-80gb", "--hosts", "11", "--gpus-per-host", "4", "deepspeed=zero3_6b_a100",
             "batch.micro_rows=1"),
            "zero_hpz_partition_size 8 does not divide 44 ranks",
        ),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_is_one_line_that_says_what_to_change(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert message in refusal(capsys, *words)


def test_a_recipe_that_fits_nowhere_is_one_line_with_the_least_it_wants(capsys: pytest.CaptureFixture[str]) -> None:
    pictures = ("data.image_size=4200", "data.max_image_size=4200", "data.sample_patches=0", "batch.global_rows=2816",
                "model.change.image_bucket_size=300")  # fmt: skip
    line = refusal(capsys, "pretrain-6b", "--gpu", "a100-40gb", *pictures)
    assert re.search(r"fits on no 1 to 1024 hosts of 8 a100-40gb.* the least wants [\d,.]+ GiB of a GPU", line), line


def test_offload_to_nvme_is_planned_and_told_to_be_refused_by_a_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = json.loads(json.dumps(SHIPPED["zero3_offload"]))
    for key in ("offload_optimizer", "offload_param"):
        config["zero_optimization"][key] = {"device": "nvme", "nvme_path": "/nvme"}
    (tmp_path / "nvme.json").write_text(json.dumps(config))
    found = planned(capsys, "pretrain-6b", "--gpu", "a100-40gb", f"deepspeed={tmp_path}/nvme.json")
    assert found["memory"]["nvme_total"] > 12 * 6e9
    assert any("a run refuses it" in note for note in found["notes"])


def test_epochs_leave_the_length_of_the_run_open(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "finetune-vqa-large", "--gpu", "h100", "train.num_epochs=2")
    assert found["cost"]["steps"] == 0 and any("--steps" in note for note in found["notes"])


def test_more_steps_cost_in_proportion() -> None:
    plan = forecast(run("pretrain-base"), cluster())
    step = plan.step()
    short, long = (cost(plan, step, steps=steps, price_per_gpu_hour=1.5) for steps in (10, 1000))
    assert long.seconds[1] == pytest.approx(100 * short.seconds[1]) == pytest.approx(1000 * step.total_s)
    assert long.price == pytest.approx(tuple(1.5 * each for each in long.gpu_hours))
