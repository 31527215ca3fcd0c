"""DeepSpeed's JSON, what is derived from it, and which process this is under each launcher."""

from __future__ import annotations

import json

import pytest
import torch

from ofa_ds.config import BatchConfig, OptimConfig
from ofa_ds.engine.config import derive_config, load_deepspeed_config
from ofa_ds.engine.ranks import choose_device, first_host, rendezvous

SHIPPED = ("zero1", "zero2", "zero3", "zero3_fp16", "zero3_offload")
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


def test_stage_0_in_low_precision_is_refused():
    with pytest.raises(ValueError, match="stage 1-3"):
        derive({"bf16": {"enabled": True}})


def test_alone_it_is_rank_0_of_1():
    found = rendezvous({})
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert 1024 < int(found["MASTER_PORT"]) < 65536


def test_torchrun_and_deepspeed_are_taken_as_they_are():
    env = dict(RANK="3", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="a", MASTER_PORT="29501")
    assert rendezvous({**env, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}) == env


def test_half_an_environment_names_what_is_missing():
    with pytest.raises(ValueError, match="not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        rendezvous({"RANK": "0", "WORLD_SIZE": "2"})


def test_srun():
    env = dict(SLURM_PROCID="5", SLURM_STEP_NUM_TASKS="16", SLURM_LOCALID="1", SLURM_STEP_NODELIST="gpu[007-010,12],x1",
               SLURM_JOB_ID="4711", SLURM_STEP_ID="0")  # fmt: skip
    found = rendezvous(env)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("5", "16", "1")
    assert found["MASTER_ADDR"] == "gpu007"
    assert found["MASTER_PORT"] == rendezvous({**env, "SLURM_PROCID": "0"})["MASTER_PORT"], "the same on every rank"


def test_a_batch_script_without_srun_is_one_process():
    assert rendezvous({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"})["WORLD_SIZE"] == "1"


@pytest.mark.parametrize(
    "nodes, host",
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[007-009,12]", "gpu007"), ("a-b[3,5]-ib,c", "a-b3-ib"), ("x.y,z", "x.y")],
)
def test_first_host_of_a_slurm_list(nodes, host):
    assert first_host(nodes) == host


def test_mpirun_on_one_host_and_on_several():
    env = dict(OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_LOCAL_RANK="1",
               OMPI_COMM_WORLD_LOCAL_SIZE="2")  # fmt: skip
    found = rendezvous(env)
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("1", "2", "127.0.0.1")
    with pytest.raises(ValueError, match="-x MASTER_ADDR"):
        rendezvous({**env, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    assert rendezvous({**env, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "MASTER_ADDR": "h1"})["MASTER_ADDR"] == "h1"


def test_device_is_told_to_deepspeed():
    env: dict[str, str] = {}
    assert choose_device(0, env, "cpu") == CPU
    assert env["DS_ACCELERATOR"] == "cpu"
    with pytest.raises(ValueError, match="want cpu or cuda"):
        choose_device(0, env, "tpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="torch finds none"):
            choose_device(0, env, "cuda")
