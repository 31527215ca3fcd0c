"""`bench loader`, small: all of it runs, both ways hand the same batch over, and the table has what was measured."""

from __future__ import annotations

import functools
import json
import multiprocessing
import sys

import numpy as np
import pytest
import torch

from ofa_ds.bench import __main__ as command
from ofa_ds.bench import loader as bench
from ofa_ds.bench import photo_rows
from ofa_ds.train.packed_buffer import packing


@pytest.mark.parametrize("way", bench.WAYS)
def test_both_ways_hand_over_the_same_batch_and_leave_no_worker(way):
    wanted = packing(bench._batch())
    with bench.WAYS[way](1) as take:
        for _ in range(3):
            found = packing(take())
            assert found.layout == wanted.layout
            assert all(torch.equal(*pair) for pair in zip(found.tensors, wanted.tensors, strict=True))
    assert not multiprocessing.active_children()


def test_the_command_measures_all_three_and_prints_them(monkeypatch, capsys):
    for name in ("BATCHES", "FEED_ROWS", "FEED_MICRO_BATCHES", "WAIT_STEPS"):
        monkeypatch.setattr(bench, name, 1)
    monkeypatch.setattr(bench, "WAIT_PRESET", "nano")
    monkeypatch.setattr(photo_rows, "make", functools.partial(photo_rows.make, rows=12))
    monkeypatch.setattr(sys, "argv", ["bench", "loader", "--repeats", "1", "--json"])
    command.main()
    result = json.loads(capsys.readouterr().out)
    assert result["hand_over"]["batch_bytes"] > bench.PICTURES * 3 * bench.SIDE**2
    assert min(result["hand_over"].values()) > 0 and result["feed"].keys() == bench.SIDES.keys()
    assert 0 <= result["wait"]["wait.1"] < 1
    lines = bench.table(result).splitlines()
    assert any("DataLoader / ring" in line for line in lines) and any("detection, 480 px" in line for line in lines)


@pytest.mark.parametrize("seed", range(3))
def test_photographs_are_as_large_as_such_files_are(seed):
    assert 36_000 < len(photo_rows.photograph(np.random.default_rng(seed))) < 42_000
