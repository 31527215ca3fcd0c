"""The yardstick for 16 bits computes the same attention as the reference."""

from __future__ import annotations

import pytest
import torch
from plain_attention import plain_results
from test_attention_kernel import Case


@pytest.mark.parametrize(
    "case",
    [Case((5, 19, 1)), Case((5, 19), causal=True), Case((3, 7), (9, 6), relative=False), Case((4, 6), positions=False)],
    ids=str,
)
def test_dense_attention_in_fp64_is_the_reference_in_fp64(case: Case) -> None:
    ours, reference = plain_results(case, torch.float64), case.results("torch", torch.float64)
    assert ours.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-12, msg=name)
