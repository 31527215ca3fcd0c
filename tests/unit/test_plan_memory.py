"""A plan's memory against steps of real models with fake tensors, and against the kernels' arithmetic."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import fake_step
import pytest

from ofa_ds.config.architecture import ModelConfig, preset
from ofa_ds.engine.config import load_deepspeed_config
from ofa_ds.plan import vocabulary
from ofa_ds.plan.activations import activations
from ofa_ds.plan.layout import Layout, layout_of
from ofa_ds.plan.memory import checkpoint_bytes, memory
from ofa_ds.plan.operators import MAX_WIDTH, MIN_ELEMENTS
from ofa_ds.plan.parameters import num_parameters
from ofa_ds.plan.state import pinned, shard_elements
from ofa_ds.plan.work import ExampleShape, ImageGroup, Work
from ofa_kernels import attention_row_ops_triton, cross_entropy, cross_entropy_ops_triton, layer_norm

GIB = 2**30


def work_for(config: ModelConfig, rows: int, codes: int = 0, side: int = 30) -> Work:
    """rows pictures of `side` patches a side with a caption each, and runs of image codes from smaller ones."""
    images = [ImageGroup(rows, side * config.patch_size, side * config.patch_size)]
    examples = [ExampleShape("caption", side**2, 20, 20)] * rows
    if codes:
        images.append(ImageGroup(codes, 16 * config.patch_size, 16 * config.patch_size))
        examples += [ExampleShape("image_infilling", 16**2, 10, 257, code=True)] * codes
    return Work(images=tuple(images), examples=tuple(examples))


def layout_for(name: str, hosts: int = 32, **changes: Any) -> Layout:
    layout = layout_of(load_deepspeed_config(name), hosts=hosts, ranks_per_host=8, on_gpu=True)
    return dataclasses.replace(layout, **changes)


PLAIN = Layout(stage=0, hosts=1, ranks_per_host=1, precision="bf16")
DROPPING = {"dropout": 0.1, "attention_dropout": 0.1, "drop_path": 0.1, "backbone_drop_path": 0.1}
STEPS = {
    "tiny": ("tiny", {}, (4, 2), PLAIN),
    "tiny that drops": ("tiny", DROPPING, (4, 2), PLAIN),
    "base, checkpointed, ZeRO-2": ("base", {"activation_checkpointing": True}, (4, 0), layout_for("zero2")),
    "large, checkpointed, ZeRO-3": ("large", {"activation_checkpointing": True}, (4, 0), layout_for("zero3")),
    "6B, checkpointed, ZeRO-3": ("6b", {"activation_checkpointing": True}, (8, 0), layout_for("zero3_6b_a100")),
}


@pytest.mark.long
@pytest.mark.parametrize("case", STEPS)
def test_the_peak_of_a_step_with_fake_tensors_is_the_planned_one(case: str) -> None:
    name, changes, rows, layout = STEPS[case]
    config = preset(name, **changes)
    work = work_for(config, *rows, side=34 if name == "6b" else 30)
    found = fake_step.step(config, work, layout)
    planned = activations(config, work, layout, fake=True)
    assert sum(planned.values()) == pytest.approx(found.peak, rel=0.012)  # measured: at most 0.0111


def test_so_many_equal_examples_are_as_much_as_each_of_them() -> None:
    config, layout = preset("base"), layout_for("zero3")
    one_by_one = work_for(config, 6)
    together = dataclasses.replace(one_by_one, examples=(one_by_one.examples[0]._replace(count=6.0),))
    assert activations(config, together, layout) == activations(config, one_by_one, layout)


def test_the_6b_on_256_gpus_is_planned_in_a_second() -> None:
    config = preset("6b", activation_checkpointing=True)
    planned = memory(config, work_for(config, 8, side=34), layout_for("zero3_6b_a100"), gpu_bytes=80 * GIB)
    assert 10 * GIB < planned.gpu_total < 40 * GIB
    assert planned.phase == "backward"


@pytest.mark.parametrize("counts", [(160, 768), (1100, 768), (1100, 2560), (5000, 2560), (16384, 768), (40000, 1024)])
@pytest.mark.parametrize("budget", [0, 160 << 20, 320 << 20])
def test_tiles_of_the_vocabulary_are_those_of_the_kernel(counts: tuple[int, int], budget: int) -> None:
    tokens, dim = counts
    theirs = cross_entropy_ops_triton.tile_shape(tokens, 59457, dim, 2, None, budget)
    assert vocabulary.tile_shape(tokens, 59457, dim, 2, budget) == theirs


def test_constants_are_those_of_the_kernels() -> None:
    assert (MIN_ELEMENTS, MAX_WIDTH) == (layer_norm.MIN_ELEMENTS, layer_norm.MAX_WIDTH)
    for name in ("CHUNK_ELEMENTS", "WHOLE_CHUNKS", "PAYS_TOKENS"):
        assert getattr(vocabulary, name) == getattr(cross_entropy, name)
    for name in ("TILE_AND_SUM_BYTES", "SUM_BYTES", "DEVICE_SHARE"):
        assert getattr(vocabulary, name) == getattr(cross_entropy_ops_triton, name)
    from ofa_ds.plan import attention

    assert attention.DLOGITS_BYTES == attention_row_ops_triton.DLOGITS_BYTES


def test_more_ranks_hold_less_and_checkpointing_keeps_less() -> None:
    config, checkpointed = preset("large"), preset("large", activation_checkpointing=True)
    work = work_for(config, 4)
    for stage in ("zero1", "zero2", "zero3"):
        totals = [memory(config, work, layout_for(stage, hosts)).gpu_total for hosts in (1, 4, 32)]
        assert totals[0] > totals[1] > totals[2]
        assert memory(checkpointed, work, layout_for(stage)).gpu_total < totals[2]


def test_state_by_stage_is_bytes_a_parameter() -> None:
    config, ranks = preset("base"), 256
    work, total = work_for(config, 1), num_parameters(preset("base"))

    def parts(name: str, *names: str, **changes: Any) -> float:
        gpu = memory(config, work, layout_for(name, **changes)).gpu
        return sum(gpu.get(each, 0) for each in names) / total

    assert parts("zero1", "weights") == parts("zero2", "weights") == 2
    assert parts("zero2", "optimizer") == pytest.approx(12 / ranks, rel=1e-3)
    assert parts("zero3", "weights", "gradients", "optimizer") == pytest.approx((2 + 4 + 12) / ranks, rel=1e-2)
    assert parts("zero3", "moving average", ema=True) == pytest.approx(4 / ranks, rel=1e-2)
    assert parts("zero3", "second copy (hpZ)", hpz=8) == pytest.approx(2 / 8, rel=1e-2)


def test_offloaded_state_is_on_the_host_or_on_nvme_and_not_on_the_gpu() -> None:
    config = preset("6b")
    work, total, layout = work_for(config, 1), num_parameters(config), layout_for("zero3_offload", hosts=2)
    on_cpu = memory(config, work, layout)
    assert not {"weights", "optimizer", "gradients"} & on_cpu.gpu.keys()
    assert on_cpu.host["optimizer"] == pytest.approx(12 * total / 2, rel=1e-2)
    swapped = dataclasses.replace(layout, offload_optimizer="nvme", offload_param="nvme")
    on_nvme = memory(config, work, swapped)
    assert on_nvme.nvme_total == pytest.approx((2 + 12 + 4) * total / 2, rel=1e-2)
    assert on_nvme.host_total < on_cpu.host_total


def test_pieces_are_padded_and_pinned_memory_rounded_up() -> None:
    assert shard_elements([10, 3, 8], 4) == 3 + 1 + 2
    assert [pinned(size) for size in (0, 3, 4, 5)] == [0, 4, 4, 8]


def test_several_micro_batches_keep_whole_gradients_where_zero_does_not_cut_them() -> None:
    config = preset("base")
    work, layout = work_for(config, 4), Layout(stage=0, hosts=1, ranks_per_host=2)
    one, several = (memory(config, work, layout, accumulation=n).gpu_total for n in (1, 2))
    assert 0 < several - one < 4.5 * num_parameters(config)


def test_a_checkpoint_has_fp32_weights_moments_and_the_average() -> None:
    config = preset("tiny")
    for ema, size in ((False, 12), (True, 16)):
        assert math.isclose(checkpoint_bytes(config, layout_for("zero3", ema=ema)), size * num_parameters(config))
