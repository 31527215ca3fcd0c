"""What a step's collectives must add up to, whatever their buckets; tests/distributed has them beside real ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ofa_ds.model.config import preset
from ofa_ds.plan.coordinator import padded
from ofa_ds.plan.layout import BYTES, Layout
from ofa_ds.plan.parameters import parameters
from ofa_ds.plan.traffic import collectives

MODEL = preset("tiny")
UNREAD = ("decoder.cross_pos_q_linear", "decoder.cross_pos_k_linear", "type_embedding", "image_pos_ln")


def planned(model: Any = MODEL, accumulation: int = 1, **changes: Any) -> list[Any]:
    values = {"stage": 3, "hosts": 4, "ranks_per_host": 8, "precision": "bf16", "reduce_precision": "fp32"}
    values |= {"persistence_threshold": 0, "leaf_classes": ("EncoderLayer", "DecoderLayer")}
    layout = Layout(**(values | changes))
    return collectives(model, layout, accumulation=accumulation, checkpointing=model.activation_checkpointing)


def elements(calls: list[Any], kind: str, **wanted: str) -> int:
    return sum(
        each.count * each.elements
        for each in calls
        if each.kind == kind and all(getattr(each, name) == value for name, value in wanted.items())
    )


@pytest.mark.parametrize("bucket", [10_000, 5_000_000, 500_000_000])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_gradient_is_reduced_once_a_micro_batch_whatever_the_bucket(bucket, accumulation):
    whole = sum(padded(each.numel, 32) for each in parameters(MODEL))
    calls = planned(accumulation=accumulation, reduce_bucket=bucket)
    assert elements(calls, "reduce_scatter") == accumulation * whole
    assert sum(each.count for each in calls if each.kind == "reduce_scatter") >= accumulation


@pytest.mark.parametrize("prefetch", [0, 1_000_000, 50_000_000])
def test_weights_are_gathered_once_where_they_may_stay_and_again_where_they_may_not(prefetch):
    whole = sum(padded(each.numel, 32) for each in parameters(MODEL))
    once = planned(prefetch_bucket=prefetch)
    assert elements(once, "all_gather") == whole
    twice = planned(prefetch_bucket=prefetch, max_reuse=0, max_live=2_000_000)
    vocabulary = padded(MODEL.vocab_size * MODEL.dim, 32)  # wanted for the embedding and for the loss, each way
    assert elements(twice, "all_gather") == 2 * whole + 2 * vocabulary


def test_the_second_copy_serves_the_backward_within_a_host():
    calls = planned(hpz=8, max_reuse=0, max_live=2_000_000)
    assert elements(calls, "all_gather", group="host") > 0
    assert elements(calls, "all_gather", when="backward", group="world") == 0
    without = planned(max_reuse=0, max_live=2_000_000)
    assert elements(without, "all_gather") == elements(calls, "all_gather")


def test_stages_below_three_reduce_all_gradients_and_gather_what_is_updated():
    whole = sum(each.numel for each in parameters(MODEL))
    for stage in (0, 1, 2):
        calls = planned(stage=stage, precision="fp32", accumulation=2)
        reduced = elements(calls, "all_reduce", when="backward")
        assert reduced == whole * (2 if stage == 2 else 1)
        assert elements(calls, "all_gather") == (padded(whole, 64) if stage else 0)


def test_payloads_are_elements_in_their_type():
    for each in planned():
        assert each.bytes == each.elements * (BYTES | {"float64": 8})[each.dtype]
    assert {each.dtype for each in planned() if each.kind == "reduce_scatter"} == {"fp32"}


def test_one_rank_sends_nothing():
    assert planned(hosts=1, ranks_per_host=1) == []


def test_parameters_that_nothing_reads_are_neither_gathered_nor_reduced():
    model = dataclasses.replace(
        preset("6b_share_attn_bias_entangle"), dim=256, ffn_dim=1024, num_heads=4, encoder_layers=2, decoder_layers=2
    )
    whole = sum(padded(each.numel, 32) for each in parameters(model))
    read = sum(
        padded(each.numel, 32)
        for each in parameters(model)
        if not each.name.startswith((*UNREAD[:2], "decoder.type_embedding", "encoder.image_pos_ln"))
    )
    assert elements(planned(model), "reduce_scatter") == read < whole
