"""A corrupt row is replaced by another, the same one everywhere; it is written down once, and too many end the run."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from spoiled_shards import spoil
from tiny_sources import write_sources

from ofa_ds.batch import Batch
from ofa_ds.config import BatchConfig, DataConfig
from ofa_ds.data.building.build import build_shards
from ofa_ds.data.corrupt import CorruptRecord
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import load_vocab, train_vocab
from ofa_ds.model.config import preset
from ofa_ds.train.corrupt_rows import CorruptRows
from ofa_ds.train.loader import Loader
from ofa_ds.train.micro_batches import Substituted

DATA = DataConfig(image_size=64, infill_image_size=32, code_image_size=16, sample_patches=8, workers=0)
SPOILED = {("vision_language", 4), ("vision_language", 11), ("image", 2)}
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`good` shards, and `bad` ones of which three pictures are damaged."""
    folder = tmp_path_factory.mktemp("corrupt")
    build_shards(folder / "good", **write_sources(folder), workers=1)
    shutil.copytree(folder / "good", folder / "bad")
    for family, row in SPOILED:
        spoil(folder / "bad", family, row)
    train_vocab([f" what does the image describe? a cat {i}" for i in range(50)], 300, folder / "vocab", 8, 1000)
    return folder


def loader(folder: Path, name: str = "bad", *, micro_rows: int = 4, workers: int = 0, **options) -> Loader:
    return Loader(
        shards=Shards(folder / name), vocab=load_vocab(folder / "vocab"), seed=1, model=preset("nano"),
        config=DataConfig(**{**DATA.__dict__, "workers": workers}),
        batch=BatchConfig(global_rows=24, micro_rows=micro_rows), **options,
    )  # fmt: skip


def own_pictures(batch: Batch) -> list[torch.Tensor]:
    """Of rows, without those that stand in where a batch has none."""
    return [images[weight > 0].clone() for images, weight in zip(batch.images, batch.image_weight, strict=True)]


def take(source: Loader, steps: int = STEPS) -> tuple[list, list[Substituted]]:
    """Copies of the batches' pictures and targets, and what was replaced in them."""
    found, batches = source.steps(), []
    for _ in range(steps):
        batches += [[*own_pictures(batch), batch.targets.clone()] for batch in next(found)]
    found.close()
    return batches, source.substituted


def test_a_row_whose_picture_is_damaged_gives_way_to_another_of_its_family_and_is_named(folder):
    _, found = take(loader(folder))
    assert {(each.family, each.row) for each in found} == SPOILED
    for each in found:
        assert (each.family, each.substitute) not in SPOILED
        file = f"{each.family}-00000.arrow row {each.row}"
        assert f"bad: {each.family} row {each.row} ({file}, id '" in each.problem and "image: " in each.problem
        assert "\n" not in each.problem
    assert take(loader(folder, "good"))[1] == []


@pytest.mark.parametrize("workers, world_size, micro_rows", [(1, 1, 4), (0, 2, 4), (2, 3, 2), (0, 1, 24)])
def test_every_rank_worker_and_cut_replaces_alike(folder, workers, world_size, micro_rows):
    batches, noted = take(loader(folder, micro_rows=1))
    ranks = [take(loader(folder, micro_rows=micro_rows, workers=workers, rank=rank, world_size=world_size))
             for rank in range(world_size)]  # fmt: skip
    assert sorted(itertools.chain(*(found for _, found in ranks))) == sorted(noted)
    again = [batch for group in zip(*(made for made, _ in ranks), strict=True) for batch in group]
    assert torch.equal(torch.cat([each[-1] for each in again]), torch.cat([each[-1] for each in batches]))
    for k in range(2):
        assert torch.equal(*(torch.cat([each[k] for each in some]) for some in (again, batches)))


def test_rows_that_are_whole_come_as_they_would_without(folder):
    bad, good = take(loader(folder, micro_rows=1)), take(loader(folder, "good", micro_rows=1))
    same = [all(map(torch.equal, one, other)) for one, other in zip(bad[0], good[0], strict=True)]
    assert same.count(False) == len(bad[1])


def test_where_all_is_damaged_the_run_ends_and_says_what_to_do(folder, tmp_path):
    shutil.copytree(folder / "good", tmp_path / "all")
    for row in range(5):
        spoil(tmp_path / "all", "image", row)
    (tmp_path / "vocab").symlink_to(folder / "vocab")
    with pytest.raises(RuntimeError, match="image row .* rows drawn in its place are damaged as well; verify"):
        take(loader(tmp_path, "all"))


def test_a_text_that_is_no_utf8_and_a_checksum_that_differs_are_damage_too(folder, tmp_path):
    shutil.copytree(folder / "good", tmp_path / "bad")
    file = tmp_path / "bad" / "text-00000.arrow"
    file.write_bytes(file.read_bytes().replace(b"the cat 3 sat", b"the \xff\xff\xff 3 sat"))
    (tmp_path / "vocab").symlink_to(folder / "vocab")
    _, found = take(loader(tmp_path), steps=6)
    assert {(each.family, each.row) for each in found} == {("text", 3)}
    assert all("its text is not UTF-8" in each.problem for each in found)
    with pytest.raises(CorruptRecord, match="has checksum"):
        Shards(tmp_path / "bad", verify=True).row("text", 0)


class Many:
    """The engines of some ranks that gather in turn: rank 0 last, with what the others said."""

    def __init__(self, rank: int = 0, others: list | None = None) -> None:
        self.ranks, self._others = SimpleNamespace(rank=rank), others or []

    def gather(self, value):
        others, self._others = self._others, []
        return [value, *others]


def row(number: int) -> Substituted:
    return Substituted("text", number, number + 100, f"shards: text row {number}: damaged")


def corrupt_rows(run_dir: Path, mine, *, others=None, max_share: float = 0.001, rows: int = 50_000) -> CorruptRows:
    source = SimpleNamespace(
        substituted=list(mine), shards=SimpleNamespace(families={"text": rows}),
        batch=BatchConfig(global_rows=1000, micro_rows=1),
        micro_batches=SimpleNamespace(mixture=SimpleNamespace(families=("text",))),
    )  # fmt: skip
    return CorruptRows(Many(0, others), source, run_dir, max_share=max_share)


def written(run_dir: Path) -> list[int]:
    return [json.loads(line)["row"] for line in (run_dir / "corrupt_rows.jsonl").read_text().splitlines()]


def test_a_row_is_written_once_over_all_ranks_and_attempts_and_every_time_counts(tmp_path, capsys):
    first = corrupt_rows(tmp_path, [row(1), row(2), row(1)], others=[[tuple(row(2)), tuple(row(3))]])
    assert first.is_unsettled
    first.settle(7)
    assert not first.is_unsettled and (first.taken(), first.taken()) == (5, 0)
    assert written(tmp_path) == [1, 2, 3]
    assert "step 7: shards: text row 1: damaged; row 101 is learnt from in its place" in capsys.readouterr().err
    again = corrupt_rows(tmp_path, [row(3), row(4)])
    again.settle(9)
    assert written(tmp_path) == [1, 2, 3, 4] and again.taken() == 2
    assert json.loads((tmp_path / "corrupt_rows.jsonl").read_text().splitlines()[-1]) == {
        "step": 9, "family": "text", "row": 4, "substitute": 104, "problem": "shards: text row 4: damaged",
    }  # fmt: skip


def test_a_line_that_a_killed_run_left_in_part_is_written_again(tmp_path):
    corrupt_rows(tmp_path, [row(1), row(2)]).settle(1)
    path = tmp_path / "corrupt_rows.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    corrupt_rows(tmp_path, [row(1), row(2), row(3)]).settle(1)
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line)["row"])
        except ValueError:
            assert line.startswith('{"step": 1')
    assert found == [1, 2, 3]


def test_more_than_the_share_ends_the_run_with_the_list(tmp_path):
    some = [row(number) for number in range(11)]
    (tmp_path / "few").mkdir()
    corrupt_rows(tmp_path / "few", some[:10]).settle(1)
    with pytest.raises(RuntimeError, match="11 corrupt rows of 1000 .*max_corrupt 0.001 .*text row 0: damaged; "):
        corrupt_rows(tmp_path, some).settle(1)
    assert written(tmp_path) == list(range(11)), "what is told is written too"
    later = corrupt_rows(tmp_path, [row(12)])
    later.settle(30)  # 30,000 rows seen: 30 may be
    (tmp_path / "none").mkdir()
    with pytest.raises(RuntimeError, match="1 corrupt rows of"):
        corrupt_rows(tmp_path / "none", [row(1)], max_share=0.0).settle(1)


def test_a_file_that_cannot_be_written_is_told_and_training_goes_on(tmp_path, capsys):
    (tmp_path / "corrupt_rows.jsonl").mkdir()
    corrupt_rows(tmp_path, [row(1)]).settle(1)
    told = capsys.readouterr().err
    assert "jsonl: cannot be read" in told and "jsonl: cannot be written" in told
    gone = corrupt_rows(tmp_path / "gone", [row(1)])
    gone.settle(3)
    assert "gone/corrupt_rows.jsonl: cannot be written" in capsys.readouterr().err and gone.taken() == 1
