"""One stream of batches, whatever the ranks, workers, cuts and starts: pixels, tokens and weights bit for bit.

Ranks are loaders of one process, which is all that a rank is to a loader; workers are real processes.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_sources import write_sources
from torch import Tensor

from ofa_ds.batch import Batch
from ofa_ds.config import BatchConfig, DataConfig, DataSet, load_recipe, recipe_to_dict
from ofa_ds.data.building.build import build_shards
from ofa_ds.data.sets import open_data
from ofa_ds.data.vocab import load_vocab, train_vocab
from ofa_ds.model.config import preset
from ofa_ds.train.loader import Loader

GLOBAL_ROWS = 24
WORLDS, WORKERS, CUTS = (1, 2, 3, 4, 6, 8), (0, 1, 3), (1, 2, 3, 4, 6, 8, 12, 24)
STARTS = (0, 1, 4, 5, 7)
"""Steps: the first; amid every epoch; where `more` begins one; where the pictures begin one and the mixture changes;
past it."""
NUM_STEPS = 9
NAMES = (
    "targets", "loss_weight", "source_tokens", "source_position", "patch_position", "num_patches", "decoder_tokens",
    "decoder_position", "code_mask", "task", "group",
)  # fmt: skip
TARGETS = 4
"""Where these begin in `content`, after two sizes of pictures and their holes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sameness")
    build_shards(folder / "all", **write_sources(folder), workers=1)
    (folder / "more.tsv").write_text("".join(f"m{i}\tanother text of number {i} and a cat\n" for i in range(12)))
    build_shards(folder / "more", text=[folder / "more.tsv"], workers=1)
    train_vocab([f" what does the image describe? a cat {i}" for i in range(50)], 300, folder / "vocab", 8, 1000)
    return folder


@pytest.fixture(scope="module")
def make(folder):
    """A loader of two sets, whose mixture changes at step 6."""
    sets = {"all": DataSet(shards=str(folder / "all")), "more": DataSet(shards=str(folder / "more"), weight=3)}
    config = dict(image_size=32, infill_image_size=32, code_image_size=16, sample_patches=2, sets=sets)
    config |= dict(mix_changes=({"step": 6, "text": 5, "detection": 0},))
    shards, vocab = open_data(DataConfig(**config)), load_vocab(folder / "vocab")

    def build(world: int = 1, rank: int = 0, *, cut: int = 24, workers: int = 0) -> Loader:
        return Loader(
            shards=shards, vocab=vocab, config=DataConfig(**config, workers=workers), seed=3, model=preset("nano"),
            batch=BatchConfig(global_rows=GLOBAL_ROWS, micro_rows=cut), rank=rank, world_size=world,
        )  # fmt: skip

    return build


def content(batch: Batch) -> list[Tensor]:
    """What a batch says of its rows, independent of where it stands in memory: all that adds up over micro-batches."""
    own = [weight > 0 for weight in batch.image_weight]  # others stand in where a batch has no picture
    found = [images[mine].clone() for images, mine in zip(batch.images, own, strict=True)]
    found += [holes[mine].clone() for holes, mine in zip(batch.image_holes, own, strict=True)]
    found += [getattr(batch, name).clone() for name in NAMES]
    return [*found, batch.encoder_offsets.diff(), batch.decoder_offsets.diff()]


def step_of(batches: list[list[Tensor]]) -> list[Tensor]:
    """One step, from its micro-batches in order."""
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def steps(make, world: int, cut: int, workers: int, start: int, count: int) -> Iterator[list[Tensor]]:
    """Steps of all ranks together, from `start` on."""
    sources = [make(world, rank, cut=cut, workers=workers).steps(start) for rank in range(world)]
    try:
        for _ in range(count):
            by_rank = [[content(batch) for batch in next(source)] for source in sources]
            yield step_of([batch for group in zip(*by_rank, strict=True) for batch in group])
    finally:
        for source in sources:
            source.close()


@pytest.fixture(scope="module")
def whole(make) -> list[list[Tensor]]:
    """The run of one process that nobody interrupts, a step at a time."""
    return list(steps(make, 1, 24, 0, 0, NUM_STEPS))


def assert_same(found: list[Tensor], whole: list[Tensor]) -> None:
    assert len(found) == len(whole)
    for one, other in zip(found, whole, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_the_starts_are_what_they_say(make, whole):
    """Inside of epochs, at their edges, and on both sides of the change of the mixture."""
    mixture = make().micro_batches.mixture
    edges = {
        start: {
            (each.family, each.part) for each in mixture.progress(start * GLOBAL_ROWS) if each.drawn % each.rows == 0
        }
        for start in STARTS
    }
    assert len(edges[0]) == 5 and edges[1] == set() and edges[4] == {("text", 1)} and ("image", 0) in edges[5]
    families = [
        {family for family, _, _ in mixture.rows(step * GLOBAL_ROWS, (step + 1) * GLOBAL_ROWS)} for step in (4, 5)
    ]
    assert families[0] - families[1] == {"detection"}
    assert len({tuple(targets.tolist()) for targets in (step[TARGETS] for step in whole)}) == NUM_STEPS


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("cut", CUTS)
def test_ranks_and_cuts_and_starts_change_nothing(make, whole, world, cut):
    if GLOBAL_ROWS % (world * cut):
        with pytest.raises(ValueError, match="not a multiple"):
            make(world, cut=cut)
        return
    for start in STARTS:
        for found, wanted in zip(steps(make, world, cut, 0, start, 2), whole[start:], strict=False):
            assert_same(found, wanted)


@pytest.mark.long
@pytest.mark.parametrize("workers", WORKERS[1:])
@pytest.mark.parametrize("world", WORLDS)
def test_workers_change_nothing_at_any_number_of_ranks(make, whole, world, workers):
    """From every other start, each with another cut."""
    cuts = [cut for cut in CUTS if GLOBAL_ROWS % (world * cut) == 0]
    for start, cut in zip(STARTS[(world + workers) % 2 :: 2], itertools.cycle(cuts), strict=False):
        for found, wanted in zip(steps(make, world, cut, workers, start, 2), whole[start:], strict=False):
            assert_same(found, wanted)


def test_a_run_that_goes_on_with_another_world_cut_and_workers_each_time_is_the_same_run(make, whole):
    lives = itertools.cycle([(1, 24, 0), (3, 4, 1), (8, 3, 0), (2, 6, 3), (6, 2, 0), (4, 1, 0)])
    for step, (world, cut, workers) in zip(range(NUM_STEPS), lives, strict=False):
        (found,) = steps(make, world, cut, workers, step, 1)
        assert_same(found, whole[step])


def test_the_billionth_step_begins_with_no_more_work_than_the_first(make):
    """Calls of functions up to the first batch, counted: nothing is drawn again, read past or looked for."""
    loader = make(cut=12)
    next(loader.steps(0))  # what is looked up once
    first, last = (calls_until_a_batch(loader, step) for step in (3, 10**9))
    assert last <= 1.2 * first


def calls_until_a_batch(loader: Loader, step: int) -> int:
    count = 0

    def counted(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    source = loader.steps(step)
    sys.setprofile(counted)
    try:
        next(source)
    finally:
        sys.setprofile(None)
    source.close()
    return count


def test_a_checkpoint_keeps_no_more_of_the_data_than_its_names_and_settings(make):
    """The recipe and two fingerprints: with them, a step's number is all that the order depends on."""
    changes = ", ".join(f"{{step = {1000 * step}, text = {step}}}" for step in range(1, 9))
    words = ["data.shards=", *(f"data.sets.set{k}.shards=/data/shards/set{k}" for k in range(8))]
    recipe = load_recipe("pretrain-base", [*words, f"data.mix_changes=[{changes}]"])
    kept = {"data": recipe_to_dict(recipe)["data"], "identity": {"data": "f" * 32, "vocab": "f" * 32}}
    assert len(json.dumps(kept)) <= 4096
    assert not [name for name, value in vars(make()).items() if isinstance(value, (Tensor, np.ndarray))]
