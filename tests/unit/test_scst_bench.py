"""The benchmarks of SCST: what is timed beside ours does the same work."""

from __future__ import annotations

import pytest

from ofa_ds.bench import cider, scst
from ofa_ds.model.config import ResNetConfig, preset

SMALL = preset(
    "tiny", vocab_size=90, dim=16, ffn_dim=24, num_heads=2, encoder_layers=2, decoder_layers=2, init_std=0.2,
    dropout=0.0, attention_dropout=0.0, drop_path=0.0, backbone=ResNetConfig(depths=(1, 1, 1)), token_bucket_size=8,
    image_bucket_size=6,
)  # fmt: skip


def test_a_picture_encoded_once_and_once_for_each_hypothesis_give_one_loss() -> None:
    result = scst.bench_scst(1, pictures=2, side=64, config=SMALL)
    assert result["loss"] == pytest.approx(result["loss_of_copies"], rel=1e-4, abs=1e-4) and abs(result["loss"]) > 1e-3
    assert "encoded once: x" in scst.table(result)


def test_the_librarys_scores_of_the_benchmarks_captions_are_ours() -> None:
    result = cider.bench_cider(1)
    assert result["largest_difference"] < 1e-9
    assert "pycocoevalcap" in cider.table(result)
