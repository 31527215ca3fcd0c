"""Out of memory: known by whatever says so, told in one line with what to change, and a report of what filled it."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ofa_ds.cli.failure import is_foreseen
from ofa_ds.config import Recipe, load_recipe
from ofa_ds.engine.ranks import Ranks
from ofa_ds.train import live_tensors, memory_plan, out_of_memory
from ofa_ds.train.memory_limits import Room, host_memory, rooms
from ofa_ds.train.out_of_memory import OutOfMemory, asked_bytes, is_out_of_memory

CPU = torch.device("cpu")
VOCABULARY = 59_457
HUGE = 1 << 52
"""Bytes that no machine has."""


def ranks(rank: int = 0, world_size: int = 1) -> Ranks:
    return Ranks(rank=rank, world_size=world_size, local_rank=rank, device=CPU)


def recipe(folder: Path, *overrides: str, name: str = "pretrain-nano") -> Recipe:
    return load_recipe(name, [f"run_dir={folder}", *overrides])


def fail(kind: str) -> None:
    """Each for real."""
    if kind == "torch":
        torch.empty(HUGE, dtype=torch.uint8)
    elif kind == "numpy":
        np.zeros(HUGE, dtype=np.uint8)
    elif kind == "python":
        bytearray(HUGE)
    else:
        raise AssertionError(kind)


def message(
    folder: Path,
    kind: str = "torch",
    *overrides: str,
    vocab: int = VOCABULARY,
    name: str = "pretrain-nano",
    **place: int,
) -> str:
    watch = OutOfMemory(recipe(folder, *overrides, name=name), ranks(**place))
    watch.vocab_size = vocab
    with pytest.raises(RuntimeError, match="out of memory") as caught, watch.explained("in step 7", step=7):
        fail(kind)
    assert is_foreseen(caught.value), "the command tells it in one line, without a file of its traceback"
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
    return str(caught.value)


@pytest.mark.parametrize("kind, asked", [("torch", float(HUGE)), ("numpy", float(HUGE)), ("python", None)])
def test_what_fails_for_real_is_known_and_what_was_asked_for(kind, asked):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        fail(kind)
    assert is_out_of_memory(caught.value) and asked_bytes(caught.value) == asked


@pytest.mark.parametrize(
    "error, asked",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has ..."), 20.5 * 2**30),
        (torch.OutOfMemoryError("Tried to allocate 2.00 MiB. "), 2.0**21),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."), None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None),
        (RuntimeError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"), None),
        (RuntimeError("std::bad_alloc"), None),
        (MemoryError(), None),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), None),
    ],
)
def test_what_others_say_is_known(error, asked):
    assert is_out_of_memory(error) and asked_bytes(error) == asked


@pytest.mark.parametrize(
    "error", [ValueError("out of memory"), RuntimeError("Connection closed by peer"), OSError(errno.ENOSPC, "full"),
              RuntimeError("CUDA error: an illegal memory access was encountered"), KeyError("memory")]
)  # fmt: skip
def test_all_else_passes_as_it_is(error, tmp_path):
    with pytest.raises(type(error)) as caught, OutOfMemory(recipe(tmp_path), ranks()).explained("in step 1"):
        raise error
    assert caught.value is error and not list(tmp_path.iterdir())


@pytest.mark.long
def test_the_line_says_who_where_how_much_and_what_to_change(tmp_path, monkeypatch):
    text = message(tmp_path, rank=3, world_size=2)
    assert text.startswith("rank 3 on ") and ": out of memory in step 7: 4.50 PB more were asked for, " in text
    assert " are taken; planned: " in text and "activations " in text
    assert str(tmp_path / "out_of_memory/step_00000007.rank_00003.") in text and text.endswith(".txt")
    assert "rank" not in message(tmp_path).partition(":")[0], "one process has no number"
    monkeypatch.setattr(out_of_memory, "rooms", lambda device: [Room("the GPU", 29e9, 30e9)])
    text = message(tmp_path, "python", name="pretrain-base", rank=3, world_size=8)
    assert ": out of memory in step 7: 29.0 GB of 30.0 GB of the GPU are taken; planned: " in text
    assert "; the cheapest change that wants less: " in text and "of the planned memory); " in text


def test_the_report_has_the_plan_beside_what_was_found(tmp_path):
    held = torch.zeros(1000, 1000)
    message(tmp_path)
    (file,) = (tmp_path / "out_of_memory").iterdir()
    text = file.read_text()
    assert "DefaultCPUAllocator: can't allocate memory" in text and "this process: resident " in text
    plan, found = text.partition("What tensors hold on cpu, found now: ")[::2]
    for part in (
        "What `ofa-ds plan` expects of a rank: ",
        "weights",
        "activations",
        "for a micro-batch of ",
        "wants less",
    ):
        assert part in plan, part
    assert "CUDA context" not in text and "offload" not in plan, "of no use on a CPU"
    assert "MiB  other" in found and "float32 [1000, 1000] on cpu" in found
    del held


def test_without_a_vocabulary_or_a_plan_it_is_told_all_the_same(tmp_path, monkeypatch):
    assert "; take fewer rows a micro-batch (batch.micro_rows), or more ranks; " in message(tmp_path, vocab=0)
    (file,) = (tmp_path / "out_of_memory").iterdir()
    assert "There is no plan of this run: ValueError: the vocabulary was not read yet" in file.read_text()

    def fails(*args: object, **kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr(out_of_memory, "planned", fails)
    assert "or more ranks; what filled it: " in message(tmp_path)
    monkeypatch.setattr(out_of_memory, "live_tensors", fails)
    assert message(tmp_path).endswith("; no report: MemoryError: ")
    monkeypatch.setattr(out_of_memory, "rooms", lambda device: [])
    assert "; no report" in message(tmp_path)


def test_a_report_that_cannot_be_written_is_no_second_failure(tmp_path):
    (tmp_path / "out_of_memory").write_text("")
    assert "; no report: FileExistsError: " in message(tmp_path)


def test_what_was_explained_once_is_not_explained_again(tmp_path):
    watch = OutOfMemory(recipe(tmp_path), ranks())
    with pytest.raises(RuntimeError) as caught, watch.explained("outside of the steps"), watch.explained("in step 3"):
        fail("torch")
    assert "in step 3" in str(caught.value) and "outside" not in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError) and "DefaultCPUAllocator" in str(caught.value.__cause__)
    assert len(list((tmp_path / "out_of_memory").iterdir())) == 1


def test_what_autograd_keeps_is_found_by_the_operator_that_saved_it():
    gc.collect()
    layers = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    out = layers(torch.randn(500, 64)).square().sum()
    pieces = live_tensors.live_tensors([("weights", each) for each in layers.parameters()])
    mine = {(piece.kind, piece.of): piece.num_bytes for piece in pieces}
    full = 500 * 64 * 4
    for name in ("GeluBackward0", "PowBackward0"):
        assert mine["saved for the backward by " + name, "float32 [500, 64]"] == full
    assert mine["weights", "float32 [64, 64]"] == 64 * 64 * 4
    kinds = live_tensors.by_kind(pieces, CPU)
    assert kinds["saved for the backward"] >= 4 * full and kinds["weights"] == 2 * (64 * 64 + 64) * 4
    out.backward()
    kinds = live_tensors.by_kind(live_tensors.live_tensors(), CPU)
    assert kinds.get("saved for the backward", 0) < full, "given back by the backward"


def test_one_piece_of_memory_counts_once_however_many_look_at_it():
    gc.collect()
    before = sum(live_tensors.by_kind(live_tensors.live_tensors(), CPU).values())
    whole = torch.zeros(10_000)
    views = [whole[:10], whole.view(100, 100), whole.detach()]
    assert sum(live_tensors.by_kind(live_tensors.live_tensors(), CPU).values()) - before == whole.nbytes
    assert len(views) == 3


def test_a_plan_asks_for_no_less_than_what_did_not_fit(tmp_path):
    """A rank of base on an A100 of 40 GB, as far as the plan goes: a change that it names wants that much less."""
    given = recipe(tmp_path, name="pretrain-base")  # 48 rows
    plan = memory_plan.planned(given, ranks(world_size=8), VOCABULARY, (), Room("x", 30e9, 31e9), 6e9)
    assert plan.total > 6e9 and plan.changes
    share = int(plan.changes[0].partition("(")[2].partition("%")[0]) / 100
    assert share <= 1 - 5e9 / plan.total + 0.01
    assert any("batch.micro_rows=" in change or "checkpointing" in change for change in plan.changes)


@pytest.mark.parametrize(
    "room, asked, share",
    [
        (None, 9e9, 0.95),
        (Room("x", 30e9, 40e9), 1e9, 0.95),
        (Room("x", 38e9, 40e9), 6e9, 0.8),
        (Room("x", 38e9, 40e9), 90e9, 0.3),
        (Room("x", 1e9, 8e9), 0.0, 0.95 * 8 / 20),
        (Room("x", 1e9, 8e9, True), 0.0, 0.95 * 2 / 20),
    ],
)
def test_a_change_is_to_want_that_much_less_and_to_fit_where_the_plan_does_not(room, asked, share):
    """Of a plan of 20 GB, and 2 GB that no change moves; four ranks a host."""
    plan = SimpleNamespace(memory=SimpleNamespace(gpu_total=22e9), cluster=SimpleNamespace(ranks_per_host=4))
    assert memory_plan._share(plan, 20e9, room, asked) == pytest.approx((share * 20 + 2) / 22)


def test_the_limits_of_this_process_are_found_the_tightest_first():
    found = rooms(CPU)
    assert found and [room.left for room in found] == sorted(room.left for room in found)
    assert all(0 < room.used and room.limit > 0 for room in found)
    sizes = host_memory()
    assert 0 < sizes["resident"] <= sizes["resident at most"] <= sizes["virtual"]


def snapshot_of(folder: Path, rank: int) -> str:
    watch = OutOfMemory(recipe(folder), ranks(rank, 1000))
    watch._has_history = True  # as on a GPU with train.memory_snapshot
    with pytest.raises(RuntimeError) as caught, watch.explained("in step 7", step=7):
        fail("python")
    return str(caught.value)


def test_of_many_ranks_without_memory_the_first_write_a_snapshot_and_all_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"x"))
    monkeypatch.setattr(out_of_memory, "MAX_SNAPSHOTS", 2)
    monkeypatch.setattr(out_of_memory, "planned", lambda *args: memory_plan.Plan())
    told = [snapshot_of(tmp_path, rank) for rank in range(3)]
    assert told[0].endswith(".txt, step_00000007.snapshot_0.pickle for pytorch.org/memory_viz")
    assert "snapshot_1.pickle" in told[1] and told[2].endswith("; 2 other ranks have written snapshots")
    folder = tmp_path / "out_of_memory"
    assert len(list(folder.glob("*.pickle"))) == 2 and len(list(folder.glob("*.txt"))) == 3
    for file in folder.glob("*.pickle"):  # of an earlier failure
        os.utime(file, (1e9, 1e9))
    assert "snapshot_2.pickle" in snapshot_of(tmp_path, 4)


def test_a_snapshot_that_cannot_be_written_leaves_no_half_of_it(tmp_path, monkeypatch):
    def fails(path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", fails)
    assert "; no snapshot: [Errno 28] No space left on device" in snapshot_of(tmp_path, 0)
    assert not list(tmp_path.glob("out_of_memory/*.pickle"))
