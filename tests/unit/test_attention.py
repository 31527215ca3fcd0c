"""Packed attention against one example at a time, written out in plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from numerics import assert_close
from torch import Tensor

from ofa_kernels.attention import (
    RelativeCodes,
    Tokens,
    attention,
    plan_attention,
    position_logits,
)

HEADS, DIM, SCALE = 2, 6, 0.3
NUM_POSITIONS, NUM_ENTRIES = 9, 13


def tokens(lengths: list[int], lead: list[int] | None = None) -> Tokens:
    """Examples of these lengths with random positions; `lead` of them come first."""
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    position = torch.randint(NUM_POSITIONS, (sum(lengths),))
    return Tokens(offsets, position, NUM_POSITIONS, None if lead is None else torch.tensor(lead))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def reference(
    qkv: tuple[Tensor, ...],
    queries: Tokens,
    keys: Tokens,
    pos: tuple[Tensor, ...],
    relative: tuple[RelativeCodes, Tensor] | None,
    head_scale: Tensor,
    causal: bool,
) -> Tensor:
    """Example by example, pair by pair."""
    out = []
    for e in range(len(queries.offsets) - 1):
        own, seen = (slice(*side.offsets[e : e + 2].tolist()) for side in (queries, keys))
        i, j = queries.position[own], keys.position[seen]
        split = [x.unflatten(1, (HEADS, -1)).transpose(0, 1) for x in (qkv[0][own], qkv[1][seen], qkv[2][seen])]
        pos_q, pos_k = (x.unflatten(1, (HEADS, -1)).transpose(0, 1) for x in (pos[0][i], pos[1][j]))
        logits = SCALE * (split[0] @ split[1].mT + pos_q @ pos_k.mT)
        if relative is not None:
            codes, row = relative
            for a in range(len(i)):
                for b in range(len(j)):
                    entry = int(codes.query[i[a]] - codes.key[j[b]])
                    if 0 <= entry < NUM_ENTRIES:
                        logits[:, a, b] = logits[:, a, b] + row[:, entry]
        if causal:
            logits = logits.masked_fill(torch.ones(len(i), len(j), dtype=torch.bool).triu(1), -math.inf)
        out.append((logits.softmax(-1) @ split[2] * head_scale[:, None, None]).transpose(0, 1).flatten(1))
    return torch.cat(out)


LENGTHS = {
    "one bucket": ([3, 3], None),
    "padded": ([5, 2, 4, 1], None),
    "patches and text": ([7, 3, 9, 4, 6], [4, 0, 6, 0, 4]),
    "many lengths": ([1, 40, 2, 41, 3, 80, 1], [0, 16, 0, 16, 0, 60, 0]),
}


@pytest.mark.parametrize("kind", ["self", "causal", "cross"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_attention_is_attention_of_each_example(lengths: str, kind: str) -> None:
    torch.manual_seed(0)
    queries = tokens(*LENGTHS[lengths])
    keys = tokens([n + 2 for n in LENGTHS[lengths][0]], LENGTHS[lengths][1]) if kind == "cross" else queries
    num_queries, num_keys = (int(side.offsets[-1]) for side in (queries, keys))
    qkv = (draw(num_queries, DIM), draw(num_keys, DIM), draw(num_keys, DIM))
    pos, row, head_scale = (draw(NUM_POSITIONS, DIM), draw(NUM_POSITIONS, DIM)), draw(HEADS, NUM_ENTRIES), draw(HEADS)
    relative = None
    if kind != "cross":
        codes = RelativeCodes(
            torch.randint(-3, 12, (NUM_POSITIONS,)), torch.randint(0, 8, (NUM_POSITIONS,)), NUM_ENTRIES
        )
        relative = (codes, row)
    expected = reference(qkv, queries, keys, pos, relative, head_scale, kind == "causal")
    plan = plan_attention(queries, keys, relative=relative and relative[0], causal=kind == "causal")
    positions = position_logits(*pos, HEADS, SCALE)
    out = attention(qkv, plan, positions, relative and row, head_scale, scale=SCALE, dropout=0.0)
    assert_close(out, expected.detach(), 1e-13, "output")
    inputs = [*qkv, *pos, head_scale, *([row] if relative else [])]
    upstream = torch.randn_like(out)
    pairs = zip(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    )
    for name, (ours, theirs) in zip(["q", "k", "v", "pos_q", "pos_k", "head scale", "row"], pairs, strict=False):
        assert_close(ours, theirs, 1e-12, f"gradient of {name}", floor=1.0)


def test_without_any_bias_there_is_plain_attention() -> None:
    torch.manual_seed(0)
    side = tokens([4, 2])
    qkv = tuple(draw(6, DIM) for _ in range(3))
    zero = torch.zeros(NUM_POSITIONS, DIM, dtype=torch.float64)
    plan = plan_attention(side, side, relative=None, causal=False)
    out = attention(qkv, plan, (), None, torch.ones(HEADS).double(), scale=SCALE, dropout=0.0)
    assert_close(
        out, reference(qkv, side, side, (zero, zero), None, torch.ones(HEADS), False).detach(), 1e-13, "output"
    )


def test_dropout_keeps_the_mean_and_its_gradient_matches_its_mask() -> None:
    torch.manual_seed(0)
    side = tokens([50] * 4)
    q, k, v = (torch.randn(200, DIM, dtype=torch.float64, requires_grad=True) for _ in range(3))
    plan = plan_attention(side, side, relative=None, causal=False)

    def run(v: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same mask each time
        return attention((q, k, v), plan, (), None, torch.ones(HEADS).double(), scale=SCALE, dropout=0.5)

    dropped = run(v)
    kept = attention((q, k, v), plan, (), None, torch.ones(HEADS).double(), scale=SCALE, dropout=0.0)
    assert not torch.equal(dropped, kept)
    assert abs((dropped - kept).mean().item()) < 0.02
    (grad,) = torch.autograd.grad(dropped.sum(), v)
    step = torch.zeros_like(v).index_fill_(0, torch.tensor([7]), 1.0)
    assert_close((run(v.detach() + step) - dropped).sum().detach(), (grad * step).sum(), 1e-9, "gradient of v")


def test_low_precision_is_computed_in_float32() -> None:
    torch.manual_seed(0)
    side = tokens([9, 4])
    plan = plan_attention(side, side, relative=None, causal=False)
    qkv = tuple(torch.randn(13, DIM).bfloat16() for _ in range(3))
    out = attention(qkv, plan, (), None, torch.ones(HEADS).bfloat16(), scale=SCALE, dropout=0.0)
    exact = attention(tuple(x.float() for x in qkv), plan, (), None, torch.ones(HEADS), scale=SCALE, dropout=0.0)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.bfloat16())


def test_a_plan_of_another_batch_is_refused() -> None:
    side = tokens([3, 2])
    plan = plan_attention(side, side, relative=None, causal=False)
    qkv = tuple(torch.randn(4, DIM) for _ in range(3))
    with pytest.raises(ValueError, match=r"the plan is for 5 queries and 5 keys, got q \(4, 6\)"):
        attention(qkv, plan, (), None, torch.ones(HEADS), scale=SCALE, dropout=0.0)


def test_an_example_with_queries_but_no_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="example 1 has queries but no keys"):
        plan_attention(tokens([2, 2]), tokens([3, 0]), relative=None, causal=False)
