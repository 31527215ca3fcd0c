"""Histograms count every element once, in the bin that it belongs to, whatever shares the ranks have."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from ofa_ds.train import report_histograms
from ofa_ds.train.report_files import Board
from ofa_ds.train.report_histograms import NUM_BINS, buckets, of_state, of_tensor, span, upper_edges


def engine_of(parts: dict[str, dict[str, Tensor]], *, others: Tensor | None = None) -> SimpleNamespace:
    """An engine with these shares. others: what the other ranks' sums are."""
    pieces = [
        SimpleNamespace(name=name, kinds=("weight", "exp_avg", "exp_avg_sq"), tensors=tensors)
        for name, tensors in parts.items()
    ]
    reduce = (lambda sums: sums.add_(others)) if others is not None else lambda sums: sums
    return SimpleNamespace(pieces=lambda: iter(pieces), all_reduce=reduce, device=torch.device("cpu"))


def test_every_value_is_in_the_bin_below_whose_edge_it_is() -> None:
    edges = upper_edges()
    assert len(edges) == NUM_BINS and (np.diff(edges) > 0).all()
    x = torch.randn(4000) * 10.0 ** torch.randint(-9, 4, (4000,))
    counts = of_tensor(x).numpy()[:NUM_BINS]
    assert (counts == np.bincount(np.searchsorted(edges, x.numpy()), minlength=NUM_BINS)).all()


def test_a_tensor_that_is_looked_at_in_parts_counts_as_in_one(monkeypatch) -> None:
    x = torch.randn(1001)
    whole = of_tensor(x)
    monkeypatch.setattr(report_histograms, "_PART", 100)
    assert torch.allclose(of_tensor(x), whole, rtol=1e-12) and whole[:NUM_BINS].sum() == 1001


def test_shares_of_ranks_add_up_to_the_whole_and_an_empty_share_adds_nothing() -> None:
    x = torch.randn(1001)
    whole = of_state(engine_of({"a": {"weight": x, "exp_avg": x * 0}}))
    mine = engine_of({"a": {"weight": x[:400], "exp_avg": x[:400] * 0}})
    theirs = torch.stack([of_tensor(x[400:]), of_tensor(x[400:] * 0)])
    both = of_state(SimpleNamespace(**{**vars(mine), "all_reduce": lambda sums: sums.add_(theirs)}))
    assert whole.keys() == both.keys() == {"weight/a", "gradient_mean/a"}
    for tag, each in whole.items():
        assert (each.counts == both[tag].counts).all() and each.num == both[tag].num == 1001
        assert each.total == pytest.approx(both[tag].total) and each.total_of_squares >= 0
    empty = of_state(engine_of({"a": {}}))
    assert [each.num for each in empty.values()] == [0, 0] and list(buckets(empty["weight/a"])) == []


def test_what_is_not_finite_is_counted_apart_and_what_is_huge_or_tiny_is_not_lost() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1e-30, -1e-30, 1e30, -1e30, 2.0])
    found = of_state(engine_of({"a": {"weight": x, "exp_avg": x[3:5]}}))["weight/a"]
    assert found.not_finite == 3 and found.num == 6 and math.isfinite(found.total)


def test_tensorboard_reads_the_histograms_and_how_many_values_are_not_finite(tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    x = torch.cat([torch.randn(500), torch.tensor([math.nan])])
    board = Board(tmp_path, 0)
    engine = engine_of({"decoder.layers.0.fc1.weight": {"weight": x, "exp_avg": x[:3]}})
    found = of_state(engine)
    board.histograms(4, found)
    board.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    tag = "weight/decoder.layers.0.fc1.weight"
    (event,) = read.Histograms(tag)
    value = event.histogram_value
    assert event.step == 4 and value.num == 500 and sum(value.bucket) == 500 and len(value.bucket_limit) < 200
    assert value.sum == pytest.approx(float(x[:500].double().sum())) and value.min <= float(x[:500].min())
    assert value.min == span(found[tag])[0] and value.max >= float(x[:500].max())
    assert [each.value for each in read.Scalars(f"not_finite/{tag}")] == [1.0]
