"""What every rank would refuse is refused before any is started: exit code 2, one line, without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ofa_ds.cli import main as ofa_ds
from ofa_ds.cluster.check_recipe import main

WRONG = {
    "model.preset: want one of nano, ": "model.preset=nanno",
    "model.change.encoder_layers: ": "model.change.encoder_layers=-1",
    "model.change: dim 128 is not a multiple of num_heads 3": "model.change.num_heads=3",
    "unknown key model.change.dropout; the recipe sets it as model.dropout": "model.change.dropout=0.1",
    "deepspeed zero33: neither a .json file nor one of ": "deepspeed=zero33",
    "deepspeed no/such.json: no such file": "deepspeed=no/such.json",
    "broken.json: not valid JSON": "deepspeed=broken.json",
    "owner.json sets train_batch_size, which the recipe sets as batch.global_rows": "deepspeed=owner.json",
    "number.json: zero_optimization: want a JSON object, got 3": "deepspeed=number.json",
    "offload.json: zero_optimization.offload_param: want a JSON object, got 'cpu'": "deepspeed=offload.json",
    "list.json: bf16: want a JSON object, got [True]": "deepspeed=list.json",
    "stage0.json: ZeRO stage 0 keeps no fp32 master weights here; use stage 1-3": "deepspeed=stage0.json",
    "batch.global_rows 24 is not a multiple of batch.micro_rows 5 x 2 ranks = 10": "batch.micro_rows=5",
    "data.shards: want a directory, got none; add data.shards=DIR": "data.shards=",
    "data.vocab: want a directory, got none; add data.vocab=DIR": "data.vocab=",
    "data.image_size 60 does not divide into patches of 16 pixels; use 48": "data.image_size=60",
    "data.max_image_size 64 is less than the pictures' side 128": "data.infill_image_size=128",
    "data.image_size 64 has 4 patches of 16 pixels a side, the model's table has 3": "model.change.image_bucket_size=3",
    "data.code_image_size 128 is more than data.infill_image_size 64": "data.code_image_size=128",
    "recipe 'pretrain-nanno': neither": "",
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "owner.json").write_text(json.dumps({"train_batch_size": 3}))
    (tmp_path / "number.json").write_text(json.dumps({"zero_optimization": 3}))
    (tmp_path / "offload.json").write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}))
    (tmp_path / "list.json").write_text(json.dumps({"bf16": [True]}))
    (tmp_path / "stage0.json").write_text(json.dumps({"bf16": {"enabled": True}}))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("message", WRONG)
def test_a_cluster_and_each_rank_refuse_the_same_with_exit_code_2(here, capsys, monkeypatch, message) -> None:
    recipe = "pretrain-nano" if WRONG[message] else "pretrain-nanno"
    overrides = [WRONG[message]] if WRONG[message] else []
    assert main(["2", recipe, *overrides]) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert ofa_ds(["pretrain", recipe, *overrides]) == 2
    assert capsys.readouterr().err == f"ofa-ds: {line}"


def test_a_picture_of_more_codes_than_the_model_has_places_is_refused_where_any_is_asked_for(capsys) -> None:
    few = ["pretrain-nano", "model.change.image_bucket_size=4", "data.code_image_size=64"]
    assert main(["2", *few]) == 2
    assert "data.code_image_size 64 has 8 codes a side, the model's table has 4" in capsys.readouterr().err
    assert main(["2", *few, "data.mix.image=0"]) == 0


@pytest.mark.parametrize(
    "arguments", [[], ["2"], ["x", "pretrain-nano"], ["0", "pretrain-nano"], ["-1", "pretrain-nano"]]
)
def test_what_it_wants_is_said(arguments, capsys) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == "want RANKS RECIPE [KEY=VALUE ...]\n"


@pytest.mark.parametrize(("recipe", "ranks"), [("pretrain-nano", 2), ("pretrain-tiny", 8), ("pretrain-6b", 32)])
def test_shipped_recipes_pass_in_silence(recipe, ranks, capsys) -> None:
    assert main([str(ranks), recipe]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "call", ["ofa_ds.cluster.check_recipe import main; main(['2',", "ofa_ds.cli import main; main(['pretrain',"]
)
def test_a_refusal_needs_nothing_heavy(call) -> None:
    code = (
        f"import sys; from {call} 'pretrain-nano', 'batch.micro_rows=5']); "
        "sys.exit(bool({'torch', 'deepspeed', 'numpy', 'pyarrow'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "batch.global_rows 24 is not a multiple of batch.micro_rows 5" in result.stderr
