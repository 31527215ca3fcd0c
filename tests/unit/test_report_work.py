"""FLOPs of a micro-batch on the host are the plan's, and stand-ins, steps that do not count and SCST are in none."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ofa_ds.batch import Batch, pack, repeated
from ofa_ds.config import load_recipe
from ofa_ds.config.architecture import PRESETS
from ofa_ds.data.example import Example
from ofa_ds.plan.flops import flops
from ofa_ds.plan.work import ImageGroup, work_of
from ofa_ds.terms import TASKS
from ofa_ds.train.metrics import Flops, Usage, Window
from ofa_ds.train.report import console_line
from ofa_ds.train.report_work import WorkCounter, work_counter

SIZES = [(64, 64), (32, 32)]
CONFIG = dataclasses.replace(PRESETS["nano"], vocab_size=100)


def batch_of(*, small: bool = True, seed: int = 0) -> Batch:
    """small: a row has a picture of the second size; else a stand-in is there."""
    rng = np.random.default_rng(seed)
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]

    def example(task: str, picture: int | None, source: int, target: int, *, code: bool = False) -> Example:
        return Example(
            task=task, source=rng.integers(4, 50, source), target=rng.integers(4, 50, target),
            prev=rng.integers(4, 50, target), image=None if picture is None else pictures[picture], code=code,
            patches=np.arange(9) if picture == 0 else None,
        )  # fmt: skip

    examples = [
        example("caption", 0, 5, 7), example("vqa", 0, 12, 2), example("text_infilling", None, 20, 18),
        example("image_infilling", 1 if small else None, 3, 16, code=True),
    ]  # fmt: skip
    return pack(examples, SIZES, CONFIG.patch_size, CONFIG.image_bucket_size)


def planned(batch: Batch, groups: tuple[ImageGroup, ...]) -> float:
    """As a plan has it of the same shapes."""
    places = batch.places
    work = work_of(
        [tuple(each.shape) for each in batch.images], batch.encoder_offsets.tolist(), batch.num_patches.tolist(),
        batch.decoder_offsets.tolist(), batch.code_mask.tolist(), len(places.counted),
    )  # fmt: skip
    distinct = (places.image_positions, places.text_positions, places.decoder_texts, places.decoder_codes)
    work = dataclasses.replace(work, images=groups, distinct=tuple(len(each) for each in distinct))
    return flops(CONFIG, work).useful


def test_they_are_those_of_the_plan() -> None:
    for seed in range(3):
        batch = batch_of(seed=seed)
        found = WorkCounter(CONFIG)(batch)
        assert found.useful == pytest.approx(planned(batch, (ImageGroup(1, 64, 64), ImageGroup(1, 32, 32))), rel=1e-12)
        assert found.padding == 0.0


def test_a_stand_in_is_padding_and_not_useful() -> None:
    batch = batch_of(small=False)
    found = WorkCounter(CONFIG)(batch)
    both = (ImageGroup(1, 64, 64), ImageGroup(1, 32, 32))
    assert found.useful == pytest.approx(planned(batch, both[:1]), rel=1e-12)
    assert found.padding == pytest.approx(planned(batch, both) - planned(batch, both[:1]), rel=1e-9) and found.padding


def test_r_drop_computes_each_example_twice_and_each_picture_once() -> None:
    batch = batch_of()
    twice, once = WorkCounter(CONFIG, copies=2)(batch), WorkCounter(CONFIG)(repeated(batch, 2))
    assert twice.useful == pytest.approx(once.useful, rel=1e-12)
    assert once.useful > 1.5 * WorkCounter(CONFIG)(batch).useful


def test_nobody_counts_the_searches_of_scst_so_it_has_no_figure() -> None:
    recipe = load_recipe("pretrain-nano")
    assert work_counter(recipe, CONFIG, 0) is None and work_counter(recipe, CONFIG, 1) is not None


def step_of(window: Window, batch: Batch, *, counted: bool = True) -> None:
    sums = torch.full((len(TASKS), 4), 1.0 if counted else math.nan)
    counts = window.counts(batch)
    window.add_micro_batch(sums, sums[0, 0], num_tokens=batch.num_tokens, num_examples=4, counts=counts)
    window.end_step(counted=counted)


def test_mfu_is_useful_flops_over_time_and_peak_of_all_ranks_and_a_skipped_step_adds_none(monkeypatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    batch = batch_of()
    window = Window(
        torch.device("cpu"), rank=0, world_size=2, flops=lambda batch: Flops(3e12, 1e12), peak_flops=2 * 8e12
    )
    step_of(window, batch)
    step_of(window, batch, counted=False)
    clock.now += 2.0
    values = window.close(lambda sums: sums.mul_(2))  # the other rank has done as much
    assert values["tflops_per_rank"] == pytest.approx(1.5) and values["mfu"] == pytest.approx(2 * 3 / 2 / 16)
    assert values["padding_fraction"] == 0.25 and values["skipped_steps"] == 1
    assert values["examples_per_s/caption"] == pytest.approx(1.0) and values["examples_per_s/detection"] == 0.0
    assert "MFU 18.8%" in console_line(3, 9, {**values, "lr": 0.1, "grad_norm": 1.0})


def test_without_a_peak_or_a_counter_there_is_no_mfu_rather_than_a_wrong_one() -> None:
    batch = batch_of()
    known: tuple[dict, ...] = ({"flops": WorkCounter(CONFIG)}, {"peak_flops": 1e12}, {})
    for options in known:
        window = Window(torch.device("cpu"), **options)
        step_of(window, batch)
        values = window.close(lambda sums: sums)
        assert "mfu" not in values and "MFU" not in console_line(1, 9, {**values, "lr": 0.1, "grad_norm": 1.0})
        assert values["tokens_per_s"] > 0


def test_of_all_ranks_the_largest_wait_stall_and_memory_are_told_in_one_sum(monkeypatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    windows = [Window(torch.device("cpu"), rank=rank, world_size=3) for rank in range(3)]
    sums: list[torch.Tensor] = []
    for window in windows:
        clock.now = 0.0
        window.reset()
        with window.saving():
            clock.now += 1.0 + window._rank
        clock.now = 10.0
        usage = Usage(100.0 * window._rank, math.nan, math.nan, 50.0 - window._rank)
        window.close(lambda mine: sums.append(mine.clone()), waited_s=4.0 if window._rank == 1 else 2.0, usage=usage)
    clock.now = 0.0
    window = Window(torch.device("cpu"), rank=0, world_size=3)
    clock.now = 10.0
    usage = Usage(0.0, math.nan, math.nan, 50.0)
    values = window.close(lambda mine: mine.copy_(sum(sums)), waited_s=2.0, usage=usage)
    assert values["data_wait_fraction"] == pytest.approx(0.4) and values["checkpoint_s"] == pytest.approx(3.0)
    assert values["peak_memory_MiB"] == 200.0 and values["host_memory_MiB"] == 50.0
    assert "memory_allocated_MiB" not in values, "there is no accelerator"
    assert len(sums) == 3


def test_a_batch_on_a_device_is_not_waited_for() -> None:
    batch = dataclasses.replace(batch_of(), task=torch.empty(4, dtype=torch.int64, device="meta"))
    assert Window(torch.device("cpu"), flops=WorkCounter(CONFIG)).counts(batch) is None
