"""Time of a step: published runs lie in its range, its parts add up, collectives hide behind computing or do not."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from typing import NamedTuple

import pytest

from ofa_ds.config import load_recipe, shipped_recipes
from ofa_ds.engine.config import load_deepspeed_config
from ofa_ds.model.config import model_config, preset
from ofa_ds.plan.calibration import Calibration
from ofa_ds.plan.flops import flops
from ofa_ds.plan.hardware import GPUS, Gpu, gpu, network
from ofa_ds.plan.layout import Layout, layout_of
from ofa_ds.plan.lengths import work_of_recipe
from ofa_ds.plan.overlap import Overlap
from ofa_ds.plan.parameters import num_parameters
from ofa_ds.plan.rates import host_s, optimizer_s, product_s, seconds, totals
from ofa_ds.plan.step_time import BEYOND, ISSUING, OFFLOADED, step_time
from ofa_ds.plan.traffic import Sent, timeline

A100, FAST = gpu("a100-80gb"), network("infiniband-8x200")
MODEL = preset("base", activation_checkpointing=True)


def layout(**changes: object) -> Layout:
    values = {"stage": 3, "hosts": 32, "ranks_per_host": 8, "precision": "bf16", "persistence_threshold": 0}
    return Layout(**(values | {"leaf_classes": ("EncoderLayer", "DecoderLayer")} | changes))


class Published(NamedTuple):
    """A decoder-only run without activation checkpointing; MFU counts attention without its causal half."""

    gpu: str
    gpus: int
    layers: int
    dim: int
    ffn: int
    gated: bool
    vocab: int
    length: int
    rows: int
    mfu: float


RUNS = {
    "IBM, Llama-7B, fms-fsdp README": Published("a100-80gb", 128, 32, 4096, 11008, True, 32000, 4096, 2, 0.68),
    "llm-foundry, MPT-7B": Published("a100-80gb", 8, 32, 4096, 16384, False, 50368, 2048, 6, 0.6423),
    "llm-foundry, MPT-3B": Published("a100-80gb", 8, 32, 2560, 10240, False, 50368, 2048, 8, 0.6211),
    "llm-foundry, MPT-13B": Published("a100-80gb", 8, 40, 5120, 20480, False, 50368, 2048, 3, 0.5957),
    "flash-attention, GPT 2.7B": Published("a100-80gb", 8, 32, 2560, 10240, False, 50257, 2048, 8, 0.72),
    "llm-foundry, MPT-7B, 40 GB": Published("a100-40gb", 128, 32, 4096, 16384, False, 50368, 2048, 4, 0.501),
    "llm-foundry, MPT-7B, H100": Published("h100", 8, 32, 4096, 16384, False, 50368, 2048, 6, 0.4644),
    "IBM, Llama-7B, H100": Published("h100", 128, 32, 4096, 11008, True, 32000, 4096, 2, 0.46),
}
"""Micro-batches of 8,192 to 16,384 tokens are assumed where a table does not say."""


def roofline_mfu(run: Published) -> float:
    """What the arithmetic of plan.rates says of it, communication left out."""
    its, tokens, dim, ffn = gpu(run.gpu), run.length * run.rows, run.dim, run.ffn
    memory = its.hbm_bytes_per_s * its.hbm_attainable
    products = [(dim, dim)] * 4 + [(dim, ffn)] * (2 if run.gated else 1) + [(ffn, dim)]
    took = sum(run.layers * _product(tokens, inputs, outputs, its) for inputs, outputs in products)
    took += _product(tokens, dim, run.vocab, its) + 12 * tokens * run.vocab / memory
    weights = run.layers * sum(a * b for a, b in products) + dim * run.vocab
    attention = 4 * run.rows * run.length**2 / 2 * dim / its.peak_flops
    took += run.layers * attention * (1 / 0.73 + 2.5 / 0.63)
    took += run.layers * tokens * 2 * (26 * dim + 8 * ffn) / memory + optimizer_s(weights / run.gpus, its)
    useful = 6 * tokens * weights + 12 * run.layers * tokens * run.length * dim
    return useful / took / its.peak_flops


def _product(tokens: int, inputs: int, outputs: int, its: Gpu) -> float:
    shapes = (tokens, outputs, inputs), (inputs, outputs, tokens), (tokens, inputs, outputs)
    return sum(product_s(*shape, its) for shape in shapes)


@pytest.mark.parametrize("name", RUNS)
def test_published_runs_lie_within_the_range_of_their_gpu(name):
    run = RUNS[name]
    fastest, _, slowest = gpu(run.gpu).beyond
    assert fastest - 0.02 <= roofline_mfu(run) / run.mfu <= slowest + 0.02


def test_the_expected_step_is_the_middle_of_the_published_runs():
    ratios = [roofline_mfu(run) / run.mfu for run in RUNS.values() if run.gpu == "a100-80gb"]
    assert statistics.median(ratios) == pytest.approx(A100.beyond[1], abs=0.02)


def plan_6b(**changes: object) -> tuple[object, ...]:
    recipe = load_recipe("pretrain-6b")
    model = dataclasses.replace(model_config(recipe, 59457), **changes)
    return model, work_of_recipe(recipe)


def test_parts_add_up_to_the_step_and_the_range_holds_it():
    model, work = plan_6b()
    for accumulation in (1, 2, 5):
        step = step_time(model, work, layout(hpz=8), accumulation=accumulation, gpu=A100, network=FAST)
        parts = sum(step.compute_s.values()) + step.exposed_s + step.data_s + step.checkpoint_s
        assert parts == pytest.approx(step.total_s)
        assert step.low_s < step.total_s < step.high_s
        assert 0 < step.mfu < step.hfu < A100.attainable
        assert step.exposed_s < step.communication_s


def test_a_step_of_more_micro_batches_takes_each_of_them_once_more():
    model, work = plan_6b()
    two, three, five = (
        step_time(model, work, layout(hpz=8), accumulation=n, gpu=A100, network=FAST).total_s for n in (2, 3, 5)
    )
    assert five - two == pytest.approx(3 * (three - two))


def test_a_slower_network_never_makes_a_step_faster():
    model, work = plan_6b(activation_checkpointing=False)
    speeds = [FAST.host_bytes_per_s * factor for factor in (0.05, 0.2, 1.0, 4.0)]
    took = [
        step_time(
            model, work, layout(), accumulation=1, gpu=A100, network=FAST._replace(host_bytes_per_s=speed)
        ).total_s
        for speed in speeds
    ]
    assert took == sorted(took, reverse=True) and took[0] > 2 * took[-1]


def test_without_overlap_all_communication_is_waited_for():
    model, work = plan_6b()
    hidden, waited = (
        step_time(model, work, layout(overlap=overlap), accumulation=1, gpu=A100, network=FAST)
        for overlap in (True, False)
    )
    assert waited.exposed_s == pytest.approx(waited.communication_s)
    assert hidden.exposed_s < 0.5 * waited.exposed_s
    assert hidden.communication_s == pytest.approx(waited.communication_s)


def test_persistent_parameters_cost_a_call_each_in_every_step():
    """Why zero3 has a threshold of 0: a ring of 1,024 ranks takes a millisecond, however little it moves."""
    model, work = plan_6b()
    none, many = (
        step_time(
            model, work, layout(hosts=128, hpz=8, persistence_threshold=threshold), accumulation=1, gpu=A100,
            network=FAST,
        ).total_s
        for threshold in (0, 250_000)
    )  # fmt: skip
    assert many > none + 1.0


def test_computing_alone_takes_what_its_kernels_take():
    model, work = plan_6b()
    counted = flops(model, work)
    parts = seconds(model, work, counted, A100)
    events = timeline(model, layout(hosts=1, ranks_per_host=1), accumulation=1, checkpointing=True, image_groups=2)
    assert not any(isinstance(each, Sent) for each in events)
    found = Overlap(events, {}, parts).elapsed(lambda call: 0.0, overlap=True)
    assert found.total == pytest.approx(sum(totals(parts).values())) == pytest.approx(found.computing)


def test_a_product_is_no_faster_than_published_and_whole_waves_reach_it():
    rate = A100.peak_flops * A100.attainable
    for shape in ((4096, 4096, 4096), (1000, 59457, 2560), (17, 33, 65), (5000, 2560, 10240)):
        m, n, k = shape
        assert product_s(*shape, A100) >= 2 * m * n * k / rate
    assert product_s(256 * 108, 128 * 10, 4096, A100) == pytest.approx(2 * 256 * 108 * 1280 * 4096 / rate)


def test_measured_rates_take_the_place_of_rooflines():
    model, work = plan_6b()
    counted = flops(model, work)
    measured = Calibration(
        device="A100", machine="x", date="2026-11-28", rates={"matmul": 100e12, "attention": 50e12},
        errors={"step": 0.07},
    )  # fmt: skip
    step = step_time(model, work, layout(), accumulation=1, gpu=A100, network=FAST, calibration=measured)
    assert step.compute_s["matmul"] == pytest.approx(counted.of("matmul").executed / 100e12)
    assert step.compute_s["attention"] == pytest.approx(counted.of("attention").executed / 50e12)
    assert BEYOND not in step.compute_s
    assert 0.93 * step.total_s <= step.low_s < 0.95 * step.total_s
    assert 1.05 * step.total_s < step.high_s <= 1.07 * step.total_s


def test_an_optimizer_on_the_host_costs_time_and_one_on_nvme_more():
    model, work = plan_6b()
    there, host, nvme = (
        step_time(model, work, layout(hosts=1, offload_optimizer=where), accumulation=1, gpu=A100, network=None)
        for where in ("none", "cpu", "nvme")
    )
    assert there.total_s < host.total_s < nvme.total_s
    assert there.compute_s["optimizer"] < host.compute_s[OFFLOADED]


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_on_the_host_are_copied_for_each_gather(ranks: int):
    model, work = plan_6b()
    there, host, nvme = (
        step_time(
            model, work, layout(hosts=1, ranks_per_host=ranks, offload_optimizer="cpu", offload_param=where),
            accumulation=3, gpu=A100, network=None,
        )
        for where in ("none", "cpu", "nvme")
    )  # fmt: skip
    least = 3 * 2 * 2 * num_parameters(model) / ranks / A100.host_link_bytes_per_s  # forward, backward; 16 bits
    assert 0.8 * least < host.communication_s - there.communication_s < 1.2 * least  # the last layers stay
    assert there.total_s < host.total_s <= nvme.total_s


def test_a_small_model_takes_as_long_as_its_host_issues():
    recipe = load_recipe("pretrain-nano")
    model, work = model_config(recipe, 59457), work_of_recipe(recipe)
    step = step_time(model, work, layout(hosts=1, ranks_per_host=1), accumulation=2, gpu=A100, network=None)
    assert step.compute_s[ISSUING] > 0 and step.total_s >= 2 * host_s(model)
    large, mix = plan_6b()
    assert ISSUING not in step_time(large, mix, layout(), accumulation=1, gpu=A100, network=FAST).compute_s


def kinds() -> dict[tuple[object, ...], str]:
    """A shipped recipe of each model, layout and way to keep activations."""
    found: dict[tuple[object, ...], str] = {}
    for name in sorted(shipped_recipes()):
        its = load_recipe(name)
        found.setdefault((its.model.preset, its.deepspeed, its.model.activation_checkpointing), name)
    return found


@pytest.mark.parametrize("name, its", list(zip(kinds().values(), itertools.cycle(GPUS.values()), strict=False)))
def test_shipped_recipes_of_every_kind_have_a_step_time(name, its):
    recipe = load_recipe(name)
    model, work = model_config(recipe, 59457), work_of_recipe(recipe)
    planned = layout_of(load_deepspeed_config(recipe.deepspeed), hosts=1, ranks_per_host=8, on_gpu=True)
    step = step_time(model, work, planned, accumulation=1, gpu=its, network=None)
    assert 0 < step.mfu < 1 and step.low_s <= step.total_s <= step.high_s
    examples = sum(each.count for each in work.examples)
    assert sum(step.examples_per_s.values()) == pytest.approx(8 * examples / step.total_s)


def test_the_6b_on_1024_gpus_is_planned_within_five_seconds():
    model, work = plan_6b()
    began = time.process_time()
    step_time(model, work, layout(hosts=128, hpz=8, prefetch_bucket=77_777_777), accumulation=4, gpu=A100, network=FAST)
    assert time.process_time() - began < 5
