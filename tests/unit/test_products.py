"""Linear layers by oneDNN are torch's: outputs, gradients, any number of rows; and where they are used."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ofa_ds.model import products
from ofa_ds.model.products import _Linear, linear, onednn_is_faster, without_onednn

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no linear layer of oneDNN"
)


def arguments(
    rows: int, inner: int, outer: int, *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(rows + 3 * inner + 5 * outer)
    shapes = [(rows, inner), (outer, inner), (outer,)][: 3 if bias else 2]
    return [torch.randn(*shape, generator=random).to(dtype).requires_grad_() for shape in shapes]


def results(call, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    out = call(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream_of(out))]


UNIT = 2.0**-24
"""Relative rounding of fp32."""


def upstream_of(out: torch.Tensor) -> torch.Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)


def rounding(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """How far from the truth fp32 may be, for output and gradients: each is a sum of K products, K UNIT sum |product|.

    That holds in whatever order they are added (Higham, Accuracy and Stability, 3.1). Another library at the same shape
    is no measure: where it adds in blocks and oneDNN one after the other, its largest error is four times smaller.
    """
    x_MK, weight_NK, *bias = (each.detach().double().abs() for each in inputs)
    grad_MN = upstream_of(x_MK @ weight_NK.T).abs()
    out_MN = x_MK @ weight_NK.T + (bias[0] if bias else 0.0)
    sums = [(len(x_MK.T) + len(bias), out_MN), (len(weight_NK), grad_MN @ weight_NK), (len(x_MK), grad_MN.T @ x_MK)]
    sums += [(len(x_MK), grad_MN.sum(0))] * len(bias)
    return [count * UNIT / (1 - count * UNIT) * total for count, total in sums]


@needs_onednn
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 200), inner=st.integers(1, 70), outer=st.integers(1, 90), bias=st.booleans())
@example(rows=198, inner=15, outer=15, bias=False)  # where torch's largest error is a quarter of oneDNN's
def test_outputs_and_gradients_are_as_accurate_as_fp32_allows_at_any_shape(rows, inner, outer, bias) -> None:
    inputs = arguments(rows, inner, outer, bias=bias)
    exact = results(F.linear, [each.detach().double().requires_grad_() for each in inputs])
    ours = results(lambda x, w, b=None: _Linear.apply(x, w, b), inputs)
    for mine, true, allowed in zip(ours, exact, rounding(inputs), strict=True):
        assert mine.shape == true.shape and mine.is_contiguous()
        assert ((mine - true).abs() <= allowed).all()


def test_the_measure_of_accuracy_tells_a_product_of_lower_precision() -> None:
    inputs = arguments(198, 64, 64, bias=False)
    exact = results(F.linear, [each.detach().double().requires_grad_() for each in inputs])
    rounded = [each.detach().bfloat16().float().requires_grad_() for each in inputs]
    for low, true, allowed in zip(results(F.linear, rounded), exact, rounding(inputs), strict=True):
        assert ((low - true).abs() > allowed).any()


@needs_onednn
def test_leading_axes_views_and_frozen_inputs_are_taken_as_by_torch() -> None:
    x, weight, bias = arguments(2 * 5 * 7, 12, 30)
    turned = x.detach().reshape(7, 5, 2, 12).transpose(0, 2).requires_grad_()
    ours, theirs = (call(turned, weight.detach(), bias) for call in (_Linear.apply, F.linear))
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(out.square().sum(), [turned, bias]) for out in (ours, theirs)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


@needs_onednn
def test_the_output_may_be_changed_in_place_and_the_layer_recomputed() -> None:
    x, weight, bias = arguments(70, 16, 24)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return _Linear.apply(x, weight, bias).relu_() * 2

    plain = torch.autograd.grad(layer(x).sum(), [x, weight, bias])
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), [x, weight, bias])
    expected = torch.autograd.grad((F.linear(x, weight, bias).relu() * 2).sum(), [x, weight, bias])
    for one, two, three in zip(plain, again, expected, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-4)


@pytest.fixture
def chosen(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes that went to oneDNN, on a processor where that is faster."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no linear layer of oneDNN")
    shapes, product = [], products._product

    def recorded(x, weight, bias=None):
        shapes.append(tuple(x.shape))
        return product(x, weight, bias)

    monkeypatch.setattr(products, "_product", recorded)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    return shapes


def test_large_products_in_fp32_go_to_onednn_in_rows_of_thirty_two(chosen) -> None:
    linear(*arguments(130, 512, 1024))
    assert chosen == [(160, 512)]


def test_few_rows_small_products_other_precisions_autocast_and_comparisons_stay_with_torch(chosen) -> None:
    linear(*arguments(4, 512, 1024))
    linear(*arguments(130, 128, 256))
    linear(*arguments(100, 1024, 1024))  # padding would cost as much as is gained
    linear(*arguments(130, 512, 1024, dtype=torch.float64))
    linear(*arguments(130, 512, 1024, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*arguments(130, 512, 1024)).dtype == torch.bfloat16
    with without_onednn():
        linear(*arguments(130, 512, 1024))
    assert chosen == []


def test_it_is_chosen_by_the_processor_alone(monkeypatch) -> None:
    """Not by a measurement: the same machine must give the same bits tomorrow."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    onednn_is_faster.cache_clear()
    try:
        assert not onednn_is_faster()
    finally:
        onednn_is_faster.cache_clear()
