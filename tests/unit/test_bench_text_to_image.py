"""The benchmark of text to image: both ways sample the same codes, and a small run fills the table."""

from __future__ import annotations

import pytest
import torch

from ofa_ds.bench.text_to_image import (
    UncachedCodes,
    bench_text_to_image,
    caption,
    config_of,
    model_of,
    table,
    whole,
)
from ofa_ds.inference.draws import SeededDraw
from ofa_ds.inference.generate import generate


def test_without_caches_the_same_codes_are_sampled() -> None:
    model = model_of("tiny", 32).double()
    batch, config = caption(model), config_of(3, 32)
    ours, plain = (
        generate(each, batch, config, draw=SeededDraw(range(3)))[0] for each in (model, UncachedCodes(model))
    )
    assert [each.tokens for each in ours] == [each.tokens for each in plain] and len(ours[0].tokens) == 17
    assert [each.score for each in ours] == pytest.approx([each.score for each in plain], rel=1e-9)


def test_lengths_between_those_timed_are_on_a_line() -> None:
    assert whole([1, 3, 5], [1.0, 3.0, 5.0], 5) == pytest.approx(15) and whole([1, 2], [2.0, 4.0], 3) == pytest.approx(
        10
    )


def test_a_small_run_fills_the_table() -> None:
    before = torch.get_num_threads()
    try:
        shown = table(bench_text_to_image(1, threads=(1,), samples=2, side=16))
    finally:
        torch.set_num_threads(before)
    assert shown.count("extrapolated") == 2 and "2 pictures of 4 codes" in shown
