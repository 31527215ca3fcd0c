"""The loader: the same bits for any workers and ranks, any start; errors that name the row; a quiet end."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from tiny_sources import write_sources

from ofa_ds.batch import Batch
from ofa_ds.config import BatchConfig, DataConfig
from ofa_ds.data.building.build import build_shards
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import load_vocab, train_vocab
from ofa_ds.model.config import preset
from ofa_ds.train.loader import Loader
from ofa_ds.train.packed_buffer import from_buffer, to_buffer

DATA = DataConfig(image_size=64, infill_image_size=32, code_image_size=16, sample_patches=8, workers=0)
BATCH = BatchConfig(global_rows=24, micro_rows=4)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Shards:
    folder = tmp_path_factory.mktemp("loader")
    build_shards(folder / "shards", **write_sources(folder), workers=1)
    texts = [f" what does the image describe? a cat {i} on a mat and the dog" for i in range(50)]
    train_vocab(texts, 300, folder / "vocab", num_codes=8, num_bins=1000)
    return Shards(folder / "shards")


@pytest.fixture(scope="module")
def make(shards):
    vocab = load_vocab(shards.path.parent / "vocab")

    def build(data: DataConfig = DATA, batch: BatchConfig = BATCH, **options) -> Loader:
        given = {"seed": 1, "shards": shards, "model": preset("nano"), **options}
        return Loader(vocab=vocab, config=data, batch=batch, **given)

    return build


def take(loader: Loader, steps: int, start: int = 0) -> list[list[Batch]]:
    """Copies: a step's own memory is the next one's."""
    source = loader.steps(start)
    try:
        return [[from_buffer(*to_buffer(batch)) for batch in batches] for batches in itertools.islice(source, steps)]
    finally:
        source.close()


def assert_same(one: Batch, other: Batch) -> None:
    for each in fields(Batch):
        left, right = getattr(one, each.name), getattr(other, each.name)
        pairs = zip(left, right, strict=True) if isinstance(left, tuple) else [(left, right)]
        for a, b in pairs:
            assert a.dtype == b.dtype and torch.equal(a, b), each.name


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_a_bit(make, workers):
    alone, helped = take(make(), 2), take(make(replace(DATA, workers=workers)), 2)
    for left, right in zip(itertools.chain(*alone), itertools.chain(*helped), strict=True):
        assert_same(left, right)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_what_one_process_sees(make, world_size):
    alone = take(make(), 3)
    ranks = [take(make(rank=rank, world_size=world_size), 3) for rank in range(world_size)]
    for step, whole in enumerate(alone):
        for number, batch in enumerate(whole):
            assert_same(batch, ranks[number % world_size][step][number // world_size])


def test_a_restart_goes_on_where_the_run_would_have(make):
    whole, rest = take(make(), 4), take(make(), 2, start=2)
    for left, right in zip(itertools.chain(*whole[2:]), itertools.chain(*rest), strict=True):
        assert_same(left, right)


def test_the_cut_into_micro_batches_does_not_change_the_examples(make):
    coarse, fine = take(make(batch=BatchConfig(global_rows=24, micro_rows=12)), 1), take(make(), 1)
    for name in ("source_tokens", "targets", "loss_weight", "task"):
        joined = [torch.cat([getattr(batch, name) for batch in batches]) for batches in (coarse[0], fine[0])]
        assert torch.equal(*joined), name


def test_another_seed_gives_other_batches(make):
    one, other = take(make(), 1)[0][0], take(make(seed=2), 1)[0][0]
    assert one.source_tokens.shape != other.source_tokens.shape or not torch.equal(
        one.source_tokens, other.source_tokens
    )


def test_the_default_mix_gives_16_2_1_1_examples_of_twelve_rows(make):
    (batch,) = take(make(batch=BatchConfig(global_rows=12, micro_rows=12)), 1)[0]
    assert batch.group.bincount().tolist() == [16, 4]
    assert [len(images) for images in batch.images] == [8, 2]


def test_epochs_draw_other_augmentation_for_the_same_row(make, shards):
    loader = make(DATA, BatchConfig(global_rows=1, micro_rows=1))
    build = loader.micro_batches.build
    rows = loader.micro_batches.mixture.rows(0, 12 * 5)
    first = next(p for p, (family, epoch, _) in enumerate(rows) if family == "vision_language" and epoch == 0)
    again = next(
        p for p, (family, epoch, i) in enumerate(rows) if (family, epoch, i) == (rows[first][0], 1, rows[first][2])
    )
    assert not torch.equal(build(first, 0).images[0], build(again, 0).images[0])


def test_workers_leave_the_random_state_of_the_trainer_alone(make):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    take(make(replace(DATA, workers=1)), 1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 1])
def test_texts_that_the_model_cannot_hold_are_told_once_and_counted(make, capsys, workers):
    small = replace(preset("nano"), max_positions=16)
    loader = make(replace(DATA, workers=workers), model=small)
    batches = list(itertools.chain(*take(loader, 2)))
    assert all(length <= 16 for batch in batches for length in batch.decoder_offsets.diff().tolist())
    assert all(batch.source_position.max() < 16 for batch in batches if len(batch.source_position))
    first, last = capsys.readouterr().err.splitlines()
    assert "is cut to the model's 16 positions" in first and loader.num_cut > 1
    assert last.endswith(f"cut {loader.num_cut} examples in all, on the first rank")
    take(make(model=small, rank=1, world_size=2), 1)
    take(make(), 1)
    assert capsys.readouterr().err == "", "other ranks say nothing, nor does a run where nothing is cut"


def test_waiting_is_counted(make):
    loader = make()
    assert loader.wait_seconds == 0
    take(loader, 1)
    assert loader.wait_seconds > 0


def test_one_buffer_carries_a_whole_batch(make):
    batch = take(make(), 1)[0][0]
    buffer, layout = to_buffer(batch)
    assert_same(batch, from_buffer(buffer, layout))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_row_is_named_in_one_line(make, workers):
    loader = make(replace(DATA, infill_image_size=48, workers=workers))
    with pytest.raises(
        ValueError, match=r"shards: image row (\d) \(image-00000.arrow row \1, id 'i\1'\): image row i\1: the pict"
    ) as error:
        take(loader, 4)
    assert "\n" not in str(error.value)


FAILURES = [
    (ValueError("no such bin"), ValueError, "no such bin"),
    (OSError(5, "Input/output error"), RuntimeError, r"\[Errno 5\] Input/output error"),
    (RuntimeError("can't allocate memory"), RuntimeError, "can't allocate memory"),
    (MemoryError(), RuntimeError, r"MemoryError  at test_loader.py:\d+"),
    (KeyError("width"), RuntimeError, r"KeyError 'width' at test_loader.py:\d+"),
    (ZeroDivisionError("division by zero"), RuntimeError, r"ZeroDivisionError division by zero at test_loader.py:\d+"),
]


@pytest.mark.parametrize("error, kind, message", FAILURES, ids=lambda value: type(value).__name__)
def test_whatever_fails_at_a_row_names_family_number_file_and_id(make, monkeypatch, error, kind, message):
    def fail(*_args):
        raise error

    monkeypatch.setattr("ofa_ds.train.micro_batches.examples", fail)
    place = r"shards: vision_language row (\d+) \(vision_language-00000.arrow row \1, id 'vl\1'\): "
    with pytest.raises(kind, match=f"{place}{message}$") as raised:
        make().micro_batches.build(0, 0)
    assert "\n" not in str(raised.value) and raised.value.__cause__ is error


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_that_are_cut_under_a_run_end_it_with_the_row_and_the_file(make, shards, tmp_path, workers):
    copied = Shards(shutil.copytree(shards.path, tmp_path / "cut"))
    steps = make(replace(DATA, workers=workers), shards=copied).steps()
    next(steps)
    for file in copied.path.glob("*.arrow"):
        os.truncate(file, 100)
    with pytest.raises(RuntimeError, match=r"cut: \w+ row \d+ \(\w+-00000.arrow row \d+\): .*: want \d+ bytes"):
        for _ in range(20):
            next(steps)
    steps.close()


def test_batch_sizes_that_do_not_divide_are_refused_at_once(make):
    with pytest.raises(ValueError, match="not a multiple"):
        make(world_size=5)


PROGRAM = """
import json, multiprocessing, signal, sys, time
from ofa_ds.config import BatchConfig, DataConfig
from ofa_ds.model.config import preset
from ofa_ds.train.loader import Loader
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import load_vocab

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    data = DataConfig(image_size=64, infill_image_size=32, code_image_size=16, sample_patches=8, workers=2)
    shards, vocab = Shards(sys.argv[1]), load_vocab(sys.argv[2])
    loader = Loader(shards=shards, vocab=vocab, config=data, batch=BatchConfig(global_rows=24, micro_rows=4), seed=1,
                    model=preset("nano"))
    source = loader.steps()
    next(source)
    try:
        print(json.dumps([child.pid for child in multiprocessing.active_children()]), flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        source.close()
        sys.exit(130)
"""


@pytest.mark.parametrize("ended_by, code", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_trainer_that_is_stopped_or_killed_leaves_no_worker(shards, tmp_path, ended_by, code):
    (tmp_path / "consume.py").write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "consume.py"), str(shards.path), str(shards.path.parent / "vocab")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    workers = json.loads(process.stdout.readline())
    assert len(workers) == 2
    if ended_by == signal.SIGINT:
        os.killpg(process.pid, ended_by)  # the terminal sends it to the whole group
    else:
        process.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in errors
    until = time.monotonic() + 30
    while any(_alive(worker) for worker in workers):
        assert time.monotonic() < until, "a worker outlived its trainer"
        time.sleep(0.1)


def _alive(process: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("workers", [0, 2])
def test_the_rows_of_steps_that_are_left_out_are_read_by_nobody(make, monkeypatch, workers):
    loader, wanted = make(replace(DATA, workers=workers)), make()
    if not workers:
        read, prepare = [], type(loader.micro_batches).prepare
        monkeypatch.setattr(
            type(loader.micro_batches), "prepare", lambda self, *key: (read.append(key[0]), prepare(self, *key))[1]
        )
    source = loader.steps(3, without={4, 5})
    found = [[from_buffer(*to_buffer(batch)) for batch in next(source)] for _ in range(2)]
    source.close()
    if not workers:
        assert set(read) == {3, 6}
    whole = wanted.steps(3)
    steps = [next(whole) for _ in range(4)]
    for one, other in zip(found, (steps[0], steps[3]), strict=True):
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
