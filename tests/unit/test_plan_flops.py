"""Planned operations are those that torch counts in real steps on a CPU: module by module, pass by pass.

Plain torch pads inside the attention and computes a causal mask's other half: that is what is counted here, and what is
planned has its pairs in place of the useful ones. Those of a GPU are in test_plan_flops_at_size.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from counted_flops import UNKNOWN_TO_TORCH, CountedFlops
from torch.utils.flop_counter import FlopCounterMode

from ofa_ds.batch import Batch, pack
from ofa_ds.bench.step import example
from ofa_ds.model import decoder, encoder
from ofa_ds.model.config import ModelConfig, preset
from ofa_ds.model.ofa import OFA
from ofa_ds.model.products import without_onednn
from ofa_ds.plan.flops import Flops, UsefulFlops, flops, flops_of_sums, sums_of
from ofa_ds.plan.work import ExampleShape, ImageGroup, Work, work_of
from ofa_ds.terms import PAD_ID
from ofa_kernels.attention_plan import AttentionPlan

EXACT = 1e-9
SIDES = (96, 64)


def batch_of(config: ModelConfig, lengths: Sequence[tuple[str, int, int, int]], sides: Sequence[int] = SIDES) -> Batch:
    """lengths: (task, side of the picture or 0, source tokens, target tokens); of the first size half the patches."""
    rng = np.random.default_rng(0)
    patch, grid = config.patch_size, config.image_bucket_size
    sides = [side // patch * patch for side in sides]
    examples = []
    for task, index, source, target in lengths:
        side = 0 if index < 0 else sides[index]
        new = example(rng, side=side, source=source, target=target, task=task)
        count = (side // patch) ** 2
        patches = np.sort(rng.choice(count, count // 2, replace=False)) if index == 0 else None
        ids = new.target.copy()
        ids[:2] = PAD_ID if source % 2 else ids[:2]
        examples.append(
            dataclasses.replace(
                new,
                patches=patches,
                target=ids % config.vocab_size,
                prev=new.prev % 50,
                source=new.source % config.vocab_size,
            )
        )
    return pack(examples, [(side, side) for side in sides], patch, grid)


MIXED = (("caption", 0, 9, 12), ("vqa", 0, 17, 3), ("caption", 0, 22, 2), ("text_infilling", -1, 30, 40),
         ("image_infilling", 1, 11, 17), ("detection", 1, 10, 23))  # fmt: skip
LONG = (("text_infilling", -1, 20, 330),)
"""More logits than are kept."""


@contextmanager
def padded_pairs():
    """Pairs that the torch path computes with its pads, (encoder's, decoder's, across), once plans are made."""
    plans: list[AttentionPlan] = []
    real = encoder.plan_attention

    def plan(*args: Any, **options: Any) -> AttentionPlan:
        plans.append(real(*args, **options))
        return plans[-1]

    with mock.patch.object(encoder, "plan_attention", plan), mock.patch.object(decoder, "plan_attention", plan):
        yield lambda: [
            float(sum(each.num_examples * each.num_queries * each.num_keys for each in plan.buckets)) for plan in plans
        ]


def work_of_batch(batch: Batch) -> Work:
    places = batch.places
    work = work_of(
        [tuple(each.shape) for each in batch.images], batch.encoder_offsets.tolist(), batch.num_patches.tolist(),
        batch.decoder_offsets.tolist(), batch.code_mask.tolist(), len(places.counted),
    )  # fmt: skip
    found = (places.image_positions, places.text_positions, places.decoder_texts, places.decoder_codes)
    return dataclasses.replace(work, distinct=tuple(float(len(each)) for each in found))


def step(config: ModelConfig, batch: Batch) -> tuple[CountedFlops, FlopCounterMode, Flops]:
    """(counted by module, counted by torch, planned with the pads that the torch path computes)."""
    torch.manual_seed(0)
    model = OFA(config).train()
    torchs = FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_TORCH)
    with without_onednn(), padded_pairs() as pairs, torchs, CountedFlops(model) as counted:
        model(batch)[0].sum().backward()
    counted.pairs = pairs()
    return counted, torchs, planned_step(config, batch, counted, stage=0)


def planned_step(config: ModelConfig, batch: Batch, counted: CountedFlops, stage: int) -> Flops:
    """With the pairs that were computed."""
    work = work_of_batch(batch)
    own, causal, across = counted.pairs
    sums = sums_of(config, work)._replace(encoder_pairs=own, decoder_pairs=causal, cross_pairs=across)
    return flops_of_sums(config, sums, work.images, on_gpu=False, stage=stage)


def by_module(planned: Flops) -> tuple[Counter, Counter]:
    """(forward, backward with what it computes again)."""
    forward, backward = Counter(), Counter()
    for each in planned.modules:
        name = each.name.removesuffix(".position_logits")
        forward[name] += each.forward
        backward[name] += each.backward + each.recomputed
    return forward, backward


def check(config: ModelConfig, batch: Batch) -> None:
    counted, torchs, planned = step(config, batch)
    total = torchs.get_total_flops()
    assert total == sum(counted.forward.values()) + sum(counted.backward.values()) + sum(counted.again.values())
    assert planned.executed == pytest.approx(total, rel=EXACT)
    forward, backward = by_module(planned)
    assert {name: count for name, count in forward.items() if count} == pytest.approx(dict(counted.forward), rel=EXACT)
    assert {name: count for name, count in backward.items() if count} == pytest.approx(
        dict(counted.backward + counted.again), rel=EXACT
    )
    assert planned.forward == pytest.approx(sum(counted.forward.values()), rel=EXACT)
    again = {name: each for name, each in counted.again.items() if each}
    planned_again = {
        each.name: each.recomputed for each in planned.modules if each.name.startswith(("encoder.layers", "decoder"))
    }
    assert {name: each for name, each in planned_again.items() if each} == pytest.approx(again, rel=EXACT)


SMALL_6B = {
    "vocab_size": 300, "encoder_layers": 2, "decoder_layers": 1, "dim": 160, "ffn_dim": 640, "num_heads": 2,
    "backbone": {"resolution": 56, "patch_size": 14, "channels": 96, "layers": 3, "heads": 2},
    "orig_patch_image_size": 56,
}  # fmt: skip
CONFIGS = {
    "tiny": preset("tiny", vocab_size=300),
    "tiny again": preset("tiny", vocab_size=300, activation_checkpointing=True),
    "tiny dropout": preset("tiny", vocab_size=300, activation_checkpointing=True, dropout=0.1, drop_path=0.1),
    "nano": preset("nano", vocab_size=300),
    "nano drop path": preset("nano", vocab_size=300, activation_checkpointing=True, drop_path=0.1, encoder_layers=3),
    "frozen norms": preset("nano", vocab_size=300, batch_norm="frozen", backbone={"depths": (1, 2, 1)}),
    "long text": preset("nano", encoder_layers=1, decoder_layers=1),
    "base": preset("base"),
    "interpolated": preset("nano", vocab_size=300, interpolate_position=True, orig_patch_image_size=64),
    "6b": preset("6b", **SMALL_6B),
    "6b entangled": preset("6b_share_attn_bias_entangle", **SMALL_6B, activation_checkpointing=True, gamma=0.1),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_is_as_planned_module_by_module(name):
    config = CONFIGS[name]
    check(config, batch_of(config, [*MIXED, *LONG] if name == "long text" else MIXED))


def test_a_batch_without_pictures_is_as_planned():
    check(
        CONFIGS["nano"], batch_of(CONFIGS["nano"], [("text_infilling", -1, 30, 20), ("caption", -1, 9, 12)], sides=())
    )


def test_under_stage_3_a_layer_is_computed_again_to_its_end():
    """DeepSpeed's linear layer saves its input behind the product, where torch's saves it before."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    config = preset("nano", vocab_size=300, activation_checkpointing=True)
    batch = batch_of(config, MIXED)
    with mock.patch.object(torch.nn.functional, "linear", zero3_linear_wrap):
        counted, torchs, _ = step(config, batch)
    counts = {stage: planned_step(config, batch, counted, stage).executed for stage in (2, 3)}
    assert counts[3] == pytest.approx(torchs.get_total_flops(), rel=EXACT)
    last = sum(count for name, count in counted.again.items() if name.endswith("fc2"))
    assert last > 0 and counts[3] - counts[2] == pytest.approx(last, rel=EXACT)


def test_a_frozen_vocabulary_has_no_gradient_to_compute():
    config, batch = CONFIGS["nano"], batch_of(CONFIGS["nano"], MIXED)
    torch.manual_seed(0)
    model = OFA(config).train()
    model.encoder.embed_tokens.weight.requires_grad_(False)
    with without_onednn(), CountedFlops(model) as counted:
        model(batch)[0].sum().backward()
    planned = flops(config, work_of_batch(batch), on_gpu=False, frozen_embedding=True).of("vocabulary")
    assert planned.backward == counted.backward["encoder.embed_tokens"]
    assert planned.forward == counted.forward["encoder.embed_tokens"]


def test_useful_operations_leave_out_pads_and_half_of_a_causal_mask():
    work = Work(images=(), examples=(ExampleShape("caption", 0, 10, 4), ExampleShape("caption", 0, 20, 6)))
    config = preset("nano", vocab_size=300, encoder_layers=1, decoder_layers=1)
    attention = {each.name: each for each in flops(config, work).of("attention").modules}
    for name, pairs in (("encoder.layers.0.self_attn", 10**2 + 20**2), ("decoder.layers.0.self_attn", 10 + 21),
                        ("decoder.layers.0.encoder_attn", 10 * 4 + 20 * 6)):  # fmt: skip
        assert attention[name].forward == 2 * 2 * config.dim * pairs
        assert attention[name].backward == 4 * 2 * config.dim * pairs


@pytest.mark.parametrize("name", ["nano", "tiny", "6b"])
def test_stand_ins_are_of_no_use_and_are_paid_for(name):
    config = CONFIGS[name]
    work = Work(images=(ImageGroup(3, 112, 112),), examples=(ExampleShape("caption", 16, 10, 4),))
    alone = ImageGroup(1, 56, 56, stand_ins=1)
    before = flops(config, work)
    after = flops(config, dataclasses.replace(work, images=(*work.images, alone)))
    paid = flops(config, dataclasses.replace(work, images=(*work.images, ImageGroup(1, 56, 56))))
    assert after.useful == pytest.approx(before.useful, rel=EXACT)
    assert after.executed == pytest.approx(paid.executed, rel=EXACT)
    assert after.executed > before.executed


@pytest.mark.parametrize("name", ["nano", "tiny", "6b", "6b entangled"])
def test_a_run_counts_a_batch_in_microseconds_as_a_plan_does(name):
    config, batch = CONFIGS[name], batch_of(CONFIGS[name], MIXED)
    work = work_of_batch(batch)
    quick, sums = UsefulFlops(config), sums_of(config, work)
    images = [tuple(group)[:3] for group in work.images]
    assert quick(sums, images) == pytest.approx(flops(config, work).useful, rel=EXACT)
    best = min(_seconds(lambda: quick(sums, images)) for _ in range(200))
    assert best < 50e-6


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
