"""The gradient of the relative row: sums of dlogits over pairs, in groups of heads, over positions and not tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_attention_kernel import DEVICE, Case, assert_right
from torch import Tensor

from ofa_ds.model.positions import RelativeRow, code_image_ids, grid_ids
from ofa_kernels import attention_ops_triton, attention_row_ops_triton, attention_triton
from ofa_kernels._launch import interpreting
from ofa_kernels.attention import RelativeCodes, Tokens, attention, plan_attention

CASE = Case((20, 9, 33), heads=6, head_dim=4)


def row_gradient(case: Case, **options: float) -> Tensor:
    inputs = case.inputs()
    (case.run("triton", inputs) * options.get("times", 1.0)).sum().backward()
    return inputs[5].grad


@pytest.mark.parametrize("causal", [False, True])
def test_groups_of_heads_change_no_bit(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    case = replace(CASE, causal=causal)
    at_once = row_gradient(case)
    groups = []
    add = attention_row_ops_triton.RowSum.add
    monkeypatch.setattr(
        attention_row_ops_triton.RowSum, "add", lambda self, *group: groups.append(group) or add(self, *group)
    )
    bytes_per_head = 62 * 64 * 4
    monkeypatch.setattr(attention_row_ops_triton, "DLOGITS_BYTES", 2 * bytes_per_head)
    assert torch.equal(row_gradient(case), at_once) and groups == [(0, 2), (2, 2), (4, 2)]


@pytest.mark.parametrize(
    "heads, bytes_per_head, group",
    [(32, 4 << 20, 32), (32, 5 << 20, 16), (12, 11 << 20, 6), (7, 19 << 20, 1), (3, 1 << 40, 1)],
)
def test_equal_groups_of_heads_stay_under_the_budget(heads: int, bytes_per_head: int, group: int) -> None:
    assert attention_row_ops_triton.heads_at_once(heads, bytes_per_head) == group


@pytest.mark.parametrize("heads", [1, 4, 8, 12, 16])
def test_any_number_of_heads_is_exact(heads: int) -> None:
    assert_right(Case((20, 9), heads=heads, head_dim=4))


def ofas_own(kind: str) -> tuple[RelativeRow, Tensor, Tensor, list[Tensor]]:
    """(the row's arithmetic, codes of all positions as queries and keys, positions of each example)."""
    row = RelativeRow(32, 8, 64, with_start=kind == "codes")
    text, generator = torch.arange(12), torch.Generator().manual_seed(0)
    if kind == "codes":
        image = code_image_ids(32, 8)[:17]
        images = [torch.arange(17), torch.arange(17)]
    else:
        image = grid_ids(5, 6, 8)
        images = [torch.randperm(30, generator=generator)[:22].sort().values for _ in range(3)]
    query, key = (torch.cat(pair) for pair in zip(row.image_codes(image), row.text_codes(text), strict=True))
    texts = [len(image) + text[:n] for n in (12, 7, 1)]
    if kind == "codes":
        return row, query, key, images + texts
    return row, query, key, [torch.cat(pair) for pair in zip(images, texts, strict=True)] + texts[:1]


@pytest.mark.parametrize("kind", ["images and texts", "codes"])
def test_ofas_own_rows_of_pictures_texts_and_codes_are_exact(kind: str) -> None:
    arithmetic, query, key, examples = ofas_own(kind)
    offsets = torch.tensor([0, *(len(each) for each in examples)]).cumsum(0)
    tokens = Tokens(offsets.to(DEVICE), torch.cat(examples).to(DEVICE), len(query))
    codes = RelativeCodes(query.to(DEVICE), key.to(DEVICE), arithmetic.num_entries)
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(len(tokens.position), 32, generator=generator) for _ in range(4)]
    row = torch.randn(2, arithmetic.num_entries, generator=generator) / 4
    grads = []
    for kernel, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        *qkv, dout = (each.to(DEVICE, dtype) for each in values)
        leaf = row.to(DEVICE, dtype, copy=True).requires_grad_()
        plan = plan_attention(tokens, tokens, relative=codes, causal=kind == "codes", kernel=kernel)
        out = attention(tuple(qkv), plan, (), leaf, torch.ones(2, device=DEVICE, dtype=dtype), scale=0.2, dropout=0.0)
        out.backward(dout)
        grads.append(leaf.grad.double())
    assert grads[1].count_nonzero() > arithmetic.num_text / 4
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5 * grads[1].abs().max().item())


def test_a_position_that_an_example_has_twice_is_refused() -> None:
    index = torch.tensor([0, 1, 1, 2], device=DEVICE)
    tokens = Tokens(torch.tensor([0, 2, 4], device=DEVICE), index, 3)
    codes = RelativeCodes(index.unique() + 2, index.unique(), 5)
    plan_attention(tokens, tokens, relative=codes, causal=False, kernel="triton")
    tokens = Tokens(torch.tensor([0, 1, 4], device=DEVICE), index, 3)
    with pytest.raises(RuntimeError, match="at most once"):
        plan_attention(tokens, tokens, relative=codes, causal=False, kernel="triton")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_stay_visible(bad: float) -> None:
    assert row_gradient(CASE).isfinite().all()
    assert not row_gradient(CASE, times=bad).isfinite().any()


def test_no_sum_of_the_largest_gradients_there_can_be_overflows() -> None:
    """All pairs on one entry, with the same dlogit as large as it gets: what fixed point leaves room for."""
    num_queries, dim = 64, 16
    tokens = Tokens(torch.tensor([0, num_queries]), torch.arange(num_queries), num_queries)
    zero = torch.zeros(num_queries, dtype=torch.int64)
    seen = []
    for times in (1.0, 3e4):
        codes = RelativeCodes(zero, torch.where(torch.arange(num_queries) < num_queries // 2, 0, 9), 1)
        plan = plan_attention(tokens, tokens, relative=codes, causal=False, kernel="triton")
        q = torch.zeros(num_queries, dim)
        v = torch.ones(num_queries, dim) * times
        v[num_queries // 2 :] *= -1
        row = torch.zeros(1, 1, requires_grad=True)
        attention((q, q, v), plan, (), row, torch.ones(1), scale=1.0, dropout=0.0).sum().backward()
        seen.append(row.grad.item() / times)
    assert seen == pytest.approx([num_queries * dim / 2] * 2, rel=1e-6)


@pytest.mark.skipif(not interpreting(), reason="counted in Triton's interpreter")
@pytest.mark.parametrize("kind, pairs_each", [("images and texts", 8), ("text", 12)])
def test_pairs_share_their_additions_to_the_row(monkeypatch: pytest.MonkeyPatch, kind: str, pairs_each: int) -> None:
    """One 64-bit atomic a pair is what made this gradient cost a third of the backward."""
    from triton.runtime.interpreter import InterpreterBuilder

    added, real = [], InterpreterBuilder.create_atomic_rmw

    def counting(self: object, op: object, pointers: object, values: object, mask: object, *rest: object) -> object:
        added.append(int(mask.data.sum()) if values.data.dtype == "int64" else 0)
        return real(self, op, pointers, values, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_atomic_rmw", counting)
    if kind == "text":
        tokens, entries = Case((40, 64, 51)).sides()[0], 135
        query, key = torch.arange(68) + 67, torch.arange(68)
    else:
        arithmetic, query, key, examples = ofas_own(kind)
        offsets = torch.tensor([0, *(len(each) for each in examples)]).cumsum(0)
        tokens, entries = Tokens(offsets, torch.cat(examples), len(query)), arithmetic.num_entries
    codes = RelativeCodes(query, key, entries)
    plan = plan_attention(tokens, tokens, relative=codes, causal=False, kernel="triton")
    q, row = torch.randn(len(tokens.position), 4), torch.zeros(1, entries, requires_grad=True)
    attention((q, q, q), plan, (), row, torch.ones(1), scale=0.5, dropout=0.0).square().sum().backward()
    assert 0 < sum(added) * pairs_each <= int((tokens.offsets.diff() ** 2).sum())


@pytest.mark.parametrize("with_start", [False, True])
def test_no_code_is_above_the_number_of_entries_where_the_kernels_put_keys_that_do_not_exist(with_start: bool) -> None:
    arithmetic = RelativeRow(256, 42, 1024, with_start)
    image = arithmetic.image_codes(torch.arange(0 if with_start else 1, 42**2 + 1))
    for codes in (*arithmetic.text_codes(torch.arange(2000)), *image):
        assert int(codes.max()) <= arithmetic.num_entries


@pytest.mark.parametrize("dtype, kept", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_positional_gradients_are_summed_in_fp32_and_kept_in(dtype: torch.dtype, kept: torch.dtype) -> None:
    assert attention_triton.per_token(dtype) == kept and attention_triton.per_token(torch.float32) == torch.float32
    tokens = CASE.sides()[0]
    plan = plan_attention(tokens, tokens, relative=None, causal=False, kernel="triton")
    x = torch.randn(len(tokens.position), 24, device=DEVICE).to(kept)
    total = attention_ops_triton._sum_of_positions(x, plan.queries)
    exact = torch.zeros(tokens.num_positions, 24, device=DEVICE).index_add_(0, tokens.position, x.float())
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, exact, rtol=1e-6, atol=1e-6)


def test_the_row_keeps_its_precision_whatever_the_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        row_HR = attention_ops_triton._prepare_row(torch.ones(2, 3, dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)
    assert row_HR.dtype == torch.float32
    assert abs(row_HR[0, 0].item() - math.log2(math.e)) < 1e-6
