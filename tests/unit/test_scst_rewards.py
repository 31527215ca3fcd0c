"""What SCST makes of hypotheses and scores, and what it refuses at start; ranks: tests/distributed/test_scst.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_cider import shards_of

from ofa_ds.batch import Batch, pack_references, references_of
from ofa_ds.cli import main as ofa_ds
from ofa_ds.config import load_recipe
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import Vocab, train_vocab
from ofa_ds.engine.ranks import Ranks
from ofa_ds.tasks.task_shards import build_task_shards
from ofa_ds.train import trainer
from ofa_ds.train.out_of_memory import OutOfMemory
from ofa_ds.train.scst import CaptionCritical, beside_others, caption_critical, with_hypotheses


@given(scores=st.lists(st.floats(0, 10), min_size=2, max_size=6))
def test_rewards_are_beside_the_mean_of_the_others_and_add_up_to_nothing(scores: list[float]) -> None:
    rewards = beside_others(scores)
    for i, (score, reward) in enumerate(zip(scores, rewards, strict=True)):
        others = scores[:i] + scores[i + 1 :]
        assert reward == pytest.approx(score - sum(others) / len(others), abs=1e-9)
    assert sum(rewards) == pytest.approx(0, abs=1e-8)


def test_a_caption_without_another_beside_it_has_no_reward() -> None:
    assert beside_others([3.0]) == [0.0] and beside_others([]) == []


@given(texts=st.lists(st.lists(st.text(st.characters(codec="utf-8"), max_size=5), max_size=3), min_size=1, max_size=4))
def test_references_come_out_of_a_batch_as_they_went_in(texts: list[list[str]]) -> None:
    batch = dataclasses.replace(empty_batch(len(texts)), **pack_references(texts))
    assert references_of(batch) == texts


def empty_batch(examples: int) -> Batch:
    """Of text alone, one token each."""
    ids, none = torch.arange(examples), torch.empty(0, dtype=torch.int64)
    offsets = torch.arange(examples + 1, dtype=torch.int32)
    return Batch(
        images=(), image_holes=(), image_weight=(), patch_index=none, patch_position=none, patch_slot=none,
        source_tokens=ids, source_position=torch.zeros_like(ids), source_slot=ids, encoder_offsets=offsets,
        num_patches=torch.zeros(examples, dtype=torch.int32), decoder_tokens=ids, decoder_position=ids,
        decoder_offsets=offsets, targets=ids, loss_weight=torch.ones(examples), code_mask=torch.zeros(examples).bool(),
        task=ids, group=ids % 2,
    )  # fmt: skip


def test_each_hypothesis_is_a_run_of_its_own_that_reads_its_example_and_weighs_its_reward() -> None:
    batch = with_hypotheses(empty_batch(3), [[[7, 8, 2], [9, 2]], [], [[5, 2]]], [1.5, -1.5, 0.25])
    assert batch.encoder_of.tolist() == [0, 0, 2] and batch.num_examples == 3
    assert batch.decoder_tokens.tolist() == [0, 7, 8, 0, 9, 0, 5]
    assert batch.targets.tolist() == [7, 8, 2, 9, 2, 5, 2]
    assert batch.decoder_position.tolist() == [0, 1, 2, 0, 1, 0, 1] and batch.decoder_offsets.tolist() == [0, 3, 5, 7]
    assert batch.loss_weight.tolist() == [1.5] * 3 + [-1.5] * 2 + [0.25] * 2
    assert batch.task.tolist() == [0, 0, 2]


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Vocab:
    return train_vocab(["a cat sat on the mat"], 260, tmp_path_factory.mktemp("scst") / "vocab", 4, 4)


def start(vocab: Vocab, shards: Path, *overrides: str) -> CaptionCritical:
    named = any(each.startswith("data.task.name=") for each in overrides)
    given = ("criterion.kind=scst", *([] if named else ["data.task.name=caption_scst"]), *overrides)
    return caption_critical(load_recipe("pretrain-nano", given), Shards(shards), vocab)


def test_document_frequencies_are_the_files_or_those_of_the_shards(vocab: Vocab, tmp_path: Path) -> None:
    shards = shards_of(tmp_path, [("1", "a cat&&the cat"), ("2", "a dog")], "caption_scst")
    file = tmp_path / "frequencies.json"
    file.write_text('{"images": 50, "ngrams": {"cat": 10}}')
    hypotheses = [[vocab.encode(" a cat") + [2], vocab.encode(" cat") + [2]]]
    scores = [
        start(vocab, shards, *more).scores([["a cat"]], hypotheses)[0]
        for more in ((), (f"criterion.scst_document_frequency={file}",))
    ]
    assert scores[0][0] == scores[1][0] == pytest.approx(7.5)  # all there is of a caption without runs of four
    assert scores[0][1] > scores[1][1] > 0  # `cat` is rarer in the shards


REFUSED = {
    "another task": ("data.task.name=vqa", "rewards captions, not 'vqa'; use caption_scst"),
    "smoothing": ("optim.label_smoothing=0.1", "has no labels to smooth; set optim.label_smoothing=0, not 0.1"),
    "tokens left out": ("criterion.drop_worst_ratio=0.2", "drops no token"),
    "R-Drop": ("criterion.rdrop_alpha=1.0", "has no R-Drop"),
    "no beam": ("criterion.scst_beams=0", "criterion.scst_beams: Input should be greater than or equal to 2, got 0"),
    "one beam": ("criterion.scst_beams=1", "criterion.scst_beams: "),
    "no token": ("criterion.scst_max_tokens=0", "criterion.scst_max_tokens: "),
    "less than no n-gram": ("criterion.scst_no_repeat_ngram=-1", "criterion.scst_no_repeat_ngram: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rewarded_is_refused_by_the_command_line_before_torch(name, capsys) -> None:
    override, reason = REFUSED[name]
    words = ["data.shards=s", "data.vocab=v", "optim.label_smoothing=0", override]
    given = {word.partition("=")[0]: word for word in words}.values()
    assert ofa_ds(["finetune", "finetune-caption_scst-nano", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line


LATE = {
    "no file": (("criterion.scst_document_frequency=/nowhere.json",), "/nowhere.json"),
    "no frequencies": (("criterion.scst_document_frequency={shards}/manifest.json",), "no document frequencies"),
    "rows without a caption": ((), "2 of 2 rows have no answer to learn from"),
    "rows of one picture": ((), "has the captions of 1 pictures; document frequencies need two or more"),
    "rows of another task": ((), "want rows of caption_scst, got rows of sst2"),
    "ids outside the vocabulary": (("criterion.constraint_range=[5, 9999]",), "entries; want at most [5, "),
    "no shards": ((), "build them with: ofa-ds shards build --task caption_scst --out"),
}


@pytest.mark.parametrize("name", LATE)
def test_what_the_data_do_not_give_is_told_before_the_engine_is_built(name, tmp_path, monkeypatch) -> None:
    """The real start of a run; no engine is there to be built."""
    overrides, reason = LATE[name]
    ids = ("1", "1") if name == "rows of one picture" else ("1", "2")
    if name == "rows of another task":
        (tmp_path / "sst2.tsv").write_text("fine\t1\nbad\t0\n")
        build_task_shards(tmp_path / "shards", "sst2", [tmp_path / "sst2.tsv"], workers=1)
    elif name != "no shards":
        rows = zip(ids, ("a cat", "a dog"), strict=True)
        options = ["--no-references"] if name == "rows without a caption" else []
        shards_of(tmp_path, list(rows), "caption_scst", *options)
    train_vocab(["a cat"], 256, tmp_path / "vocab", 4, 4)
    directory = tmp_path / "shards"
    given = (f"data.shards={directory}", f"data.vocab={tmp_path / 'vocab'}", f"run_dir={tmp_path / 'run'}")
    recipe = load_recipe("finetune-caption_scst-nano", [*given, *(each.format(shards=directory) for each in overrides)])
    monkeypatch.setattr(trainer, "build", lambda *_, **__: pytest.fail("an engine was built"))
    ranks = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    with pytest.raises((ValueError, OSError)) as raised:
        trainer._run(recipe, ranks, None, None, OutOfMemory(recipe, ranks))
    assert reason in str(raised.value) and "\n" not in str(raised.value)
