"""Planned operations of real models at real sizes, as a GPU has them: torch counts them with fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from counted_flops import UNKNOWN_TO_TORCH, CountedFlops
from fake_step import as_on_a_gpu, batch_of, fake, fake_model
from torch.utils.flop_counter import FlopCounterMode

from ofa_ds.config import Recipe, load_recipe
from ofa_ds.model.config import model_config
from ofa_ds.plan.flops import Flops, flops
from ofa_ds.plan.lengths import work_of_recipe
from ofa_ds.plan.work import ImageGroup, Work

EXACT = 1e-9


def whole(work: Work) -> Work:
    """A batch that can be: whole numbers of examples and tokens, all begin at the first patch."""
    examples = []
    for each in work.examples:
        shape = each._replace(
            patches=int(each.patches), source=round(each.source), target=round(each.target), count=1.0
        )
        examples += [shape] * round(each.count)
    images = tuple(ImageGroup(round(each.count), each.height, each.width) for each in work.images)
    found = (
        max(each.patches for each in examples), max(each.source for each in examples),
        max((each.target for each in examples if not each.code), default=0),
        max((each.target for each in examples if each.code), default=0),
    )  # fmt: skip
    return Work(images=images, examples=tuple(examples), distinct=found)


def formulas_of_kernels(work: Work) -> dict[Any, Callable[..., int]]:
    """Of the operators whose fake versions say shapes alone: what their kernels' loops have in them."""
    from ofa_kernels import attention_ops_triton, cross_entropy_ops_triton  # noqa: F401

    own, causal, across = (round(pairs) for pairs in work.pairs)

    def attended(q: Any, k: Any, pq: Any, settings: tuple[Any, ...], plain: int, positional: int) -> int:
        pairs = causal if settings[1] else own if q[0] == k[0] else across
        return 2 * pairs * q[1] * (plain + positional * (pq is not None))

    def forward(q: Any, k: Any, v: Any, pq: Any, *rest: Any) -> int:
        return attended(q, k, pq, rest[-4:], 2, 1)

    def backward(
        dout: Any, out: Any, lse: Any, q: Any, k: Any, v: Any, row: Any, head: Any, pq: Any, *rest: Any
    ) -> int:
        return attended(q, k, pq, rest[-4:], 7, 4)

    def loss(hidden: Any, weight: Any, *_: Any) -> int:
        return 2 * hidden[0] * weight[0] * weight[1]

    def loss_backward(
        dloss: Any, hidden: Any, weight: Any, target: Any, mask: Any, state: Any, buffer: Any, *_: Any
    ) -> int:
        tiles = cross_entropy_ops_triton._tiles(hidden[0], weight[0], list(buffer))
        sizes = [(rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in tiles]
        return 2 * loss(hidden, weight) + 2 * sum(sizes[:-1]) * weight[1]

    ops = torch.ops.ofa_kernels
    return {
        ops.attention_forward: forward, ops.attention_backward: backward,
        ops.linear_cross_entropy: loss, ops.linear_cross_entropy_backward: loss_backward,
    }  # fmt: skip


def counted_and_planned(recipe: Recipe, by_module: bool) -> tuple[int, CountedFlops, Flops]:
    """(torch's count, the same by module where asked for, the plan) of a step without ZeRO."""
    config, work = model_config(recipe, 59457), whole(work_of_recipe(recipe))
    mapping, batch = formulas_of_kernels(work), batch_of(config, work)
    with as_on_a_gpu() as mode:
        model, batch = fake_model(config), fake(batch, mode)
        wrapped = {op: (lambda *args, out_shape=None, run=run, **_: run(*args)) for op, run in mapping.items()}
        torchs = FlopCounterMode(display=False, custom_mapping={**UNKNOWN_TO_TORCH, **wrapped})
        counted = CountedFlops(model, mapping)
        with torchs, counted if by_module else nullcontext():
            model(batch)[0].sum().backward()
    return torchs.get_total_flops(), counted, flops(config, work, stage=0)


@pytest.mark.long
@pytest.mark.parametrize("name", ["pretrain-6b", "pretrain-large"])
def test_a_step_at_full_size_is_as_planned(name):
    counted, _, planned = counted_and_planned(load_recipe(name, ["batch.micro_rows=11"]), by_module=False)
    assert planned.executed == pytest.approx(counted, rel=EXACT)


def test_a_step_with_several_tiles_of_logits_is_as_planned_module_by_module():
    recipe = load_recipe("pretrain-base", ["model.activation_checkpointing=true"])
    total, counted, planned = counted_and_planned(recipe, by_module=True)
    assert planned.executed == pytest.approx(total, rel=EXACT)
    done = counted.forward + counted.backward + counted.again
    for name in {each.name for each in planned.modules}:
        own = sum(each.executed for each in planned.modules if each.name == name)
        assert own == pytest.approx(done[name], rel=EXACT), name
    loss = next(each for each in planned.modules if each.kind == "vocabulary")
    assert 0 < loss.recomputed < loss.forward
