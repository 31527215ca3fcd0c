"""DeepSpeed's JSON, what is derived from it, and which process this is under each launcher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ofa_ds.config import BatchConfig, OptimConfig
from ofa_ds.engine.config import derive_config, load_deepspeed_config
from ofa_ds.engine.ranks import choose_device

SHIPPED = tuple(sorted(path.stem for path in (Path(__file__).parents[2] / "ds_configs").glob("*.json")))
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def derive(config: dict, device: torch.device = CPU, world_size: int = 2) -> dict:
    batch = BatchConfig(global_rows=24, micro_rows=4)
    return derive_config(config, optim=OptimConfig(clip_norm=0.5), batch=batch, world_size=world_size, device=device)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_load_and_derive_what_the_recipe_says(name):
    derived = derive(load_deepspeed_config(name))
    assert derived["train_micro_batch_size_per_gpu"] == 4
    assert derived["gradient_accumulation_steps"] == 3
    assert derived["gradient_clipping"] == 0.5
    assert "auto" not in json.dumps(derived)


@pytest.mark.parametrize("name", SHIPPED)
def test_low_precision_reduces_and_accumulates_in_fp32(name):
    config = load_deepspeed_config(name)
    assert config["communication_data_type"] == "fp32"
    assert config["data_types"]["grad_accum_dtype"] == "fp32"


def test_auto_precision_is_bf16_on_a_gpu_and_fp32_on_a_cpu():
    config = load_deepspeed_config("zero3")
    assert derive(config, GPU)["bf16"]["enabled"] is True
    assert derive(config, CPU)["bf16"]["enabled"] is False
    assert derive(config, GPU)["zero_optimization"]["overlap_comm"] is True
    assert config["bf16"]["enabled"] == "auto", "the loaded file is not edited"


@pytest.mark.parametrize(
    "key, recipe_key",
    [
        ("train_batch_size", "batch.global_rows"),
        ("train_micro_batch_size_per_gpu", "batch.micro_rows"),
        ("gradient_accumulation_steps", "batch.global_rows"),
        ("gradient_clipping", "optim.clip_norm"),
        ("optimizer", "[optim]"),
        ("scheduler", "optim.warmup_steps"),
    ],
)
def test_a_key_that_the_recipe_owns_is_refused_with_both_places(tmp_path, key, recipe_key):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, key: 1}))
    with pytest.raises(ValueError) as caught:
        load_deepspeed_config(path)
    assert str(path) in str(caught.value) and key in str(caught.value) and recipe_key in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not valid JSON"),
        ("[]", "want a JSON object, got list"),
        ('{"zero_optimization": {"stage": 4}}', "want 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 3, "leaf_module": {"classes": ["Block"]}}}', "Block is called once for each"),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', "use device cpu"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, message):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_deepspeed_config(path)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_shipped_ones_and_the_nearest():
    with pytest.raises(ValueError, match=r"zero1, zero2, zero3.*did you mean zero3\?"):
        load_deepspeed_config("zero33")
    with pytest.raises(ValueError, match="no such file"):
        load_deepspeed_config("nowhere/zero3.json")


def test_a_second_copy_of_the_weights_wants_ranks_that_it_divides():
    config = load_deepspeed_config("zero3_6b_a100")
    assert derive(config, GPU, 2)["zero_optimization"].get("zero_hpz_partition_size") is None
    batch = BatchConfig(global_rows=256, micro_rows=1)
    for ranks, left in ((8, None), (16, 8), (256, 8)):
        derived = derive_config(config, optim=OptimConfig(), batch=batch, world_size=ranks, device=GPU)
        assert derived["zero_optimization"].get("zero_hpz_partition_size") == left
    with pytest.raises(ValueError, match="zero_hpz_partition_size 8 does not divide 12 ranks; set it to the number"):
        derive_config(
            config, optim=OptimConfig(), batch=BatchConfig(global_rows=12, micro_rows=1), world_size=12, device=GPU
        )


def test_stage_0_in_low_precision_is_refused():
    with pytest.raises(ValueError, match="stage 1-3"):
        derive({"bf16": {"enabled": True}})


def test_device_is_told_to_deepspeed():
    env: dict[str, str] = {}
    assert choose_device(0, env, "cpu") == CPU
    assert env["DS_ACCELERATOR"] == "cpu"
    with pytest.raises(ValueError, match="want cpu or cuda"):
        choose_device(0, env, "tpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="torch finds none"):
            choose_device(0, env, "cuda")
