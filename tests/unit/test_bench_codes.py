"""The bench of encoding: the original's way, written beside ours, gives the original's codes, and so does ours."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from ofa_ds.bench.codes import bench_codes, original_way, table
from ofa_ds.vision.coder import Coder
from ofa_ds.vision.config import VqganConfig
from ofa_ds.vision.vqgan import Vqgan

CONFIG = VqganConfig(
    n_embed=64, embed_dim=32, z_channels=32, resolution=32, ch=32, ch_mult=(1, 2, 2), num_res_blocks=2,
    attn_resolutions=(8,),
)  # fmt: skip


def test_both_ways_give_the_same_codes() -> None:
    torch.manual_seed(0)
    model = Vqgan(CONFIG).eval()
    pictures = list(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
    original = original_way(model, 32)(pictures)
    assert len(np.unique(original)) > 8
    assert np.array_equal(original, Coder(model, 32).encode(pictures))
    shifted = dataclasses.replace(CONFIG, attn_resolutions=())
    assert not np.array_equal(original, original_way(Vqgan(shifted).eval(), 32)(pictures))


def test_both_ways_are_timed_and_give_the_same_codes() -> None:
    found = bench_codes(1, pictures=1, config=CONFIG)
    assert found["equal"] == 1.0 and found["side"] == 32 and found["pictures"] == len(found["ratio"]) == 1
    assert min(found["original_s"], found["ours_s"]) > 0
    assert "1 rounds" in table(found) and "equal codes" in table(found)
    assert list(found["rates"]) == [1, 2] and min(found["rates"].values()) > 0
    assert table(found).count("pictures/s by the clock") == 2


def test_the_table_says_the_ratio_of_each_round() -> None:
    found = {"side": 256, "original_s": 3.0, "ours_s": 2.0, "ratio": [1.4, 1.5, 1.6], "equal": 1.0, "rates": {2: 0.8}}
    assert "1/1.50 of it (1.40 to 1.60)" in table(found) and "100.00 %" in table(found)
    assert "2 worker(s)           0.80 pictures/s" in table(found)


def test_a_process_that_ends_ends_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(process: multiprocessing.process.BaseProcess) -> None:
        real(process)
        os.kill(process.pid, signal.SIGKILL)  # as where memory is short

    real = multiprocessing.get_context("spawn").Process.start
    monkeypatch.setattr(multiprocessing.get_context("spawn").Process, "start", start)
    with pytest.raises((EOFError, ConnectionError)):
        bench_codes(1, pictures=1, config=CONFIG)
