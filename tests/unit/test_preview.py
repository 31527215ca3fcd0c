"""The preview shows every task as text and as a picture, and says what is missing."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_sources import write_sources

from ofa_ds.cli import main
from ofa_ds.config import DataConfig
from ofa_ds.data.example import Example
from ofa_ds.data.shards import Shards
from ofa_ds.data.shards_build import build_shards
from ofa_ds.data.vocab import load_vocab, train_vocab
from ofa_ds.tasks import preview
from ofa_ds.tasks.context import Context
from ofa_ds.terms import TASKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preview")
    sources = write_sources(folder)
    build_shards(folder / "shards", **sources, workers=1)
    build_shards(folder / "text_only", text=sources["text"], workers=1)
    train_vocab([" the cat sat on the mat"] * 9, 280, folder / "vocab", num_codes=8)
    return folder


SIDES = dict(image_size=64, infill_image_size=32, code_image_size=16, sample_patches=8)


@pytest.fixture
def show(folder):
    """show(name of shards, ...): what the command does, with a model of 16 pixels a patch."""

    def show_of(name: str = "shards", *, sizes: dict = SIDES, task=None, row=0, png=None) -> None:
        shards, vocab = Shards(folder / name), load_vocab(folder / "vocab")
        ctx = Context(
            vocab=vocab, negatives=shards.negatives, config=DataConfig(**sizes), patch_size=16, max_positions=512
        )
        preview.show_shards(shards, ctx, task=task, row=row, png=png)

    return show_of


def test_all_eight_tasks_are_written_and_drawn(show, tmp_path, capsys):
    show(png=tmp_path / "all.png")
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line in TASKS] == list(TASKS)
    assert "| what are the objects in the image?" in out and "<code_" in out and "<mask>" in out
    sheet = np.array(Image.open(tmp_path / "all.png"))
    assert sheet.shape[0] > 4 * preview.PICTURE_PIXELS and (sheet != 255).mean() > 0.1


def test_one_task_and_row_can_be_chosen(show, capsys):
    show(task="visual_grounding", row=2)
    out = capsys.readouterr().out
    assert "the cat 8" in out and out.count("source") == 2 and "caption" not in out


def test_boxes_are_drawn_where_they_are():
    ids = np.array([0, 2])
    box = np.array([[16, 32, 48, 48]], np.float32)
    example = Example(
        task="detection",
        source=ids,
        target=ids,
        prev=ids,
        image=np.zeros((64, 64, 3), np.uint8),
        boxes=box,
        labels=("",),
    )
    card = np.array(preview.draw_card(example, [], SimpleNamespace(patch_size=16)).convert("RGB"))[
        preview.MARGIN_PIXELS :, preview.MARGIN_PIXELS :
    ]
    rows, columns = np.nonzero((card[:384, :384] == preview.COLOURS[0]).all(-1))
    assert [columns.min(), rows.min(), columns.max(), rows.max()] == [96, 192, 288, 288]


def test_a_row_that_is_not_there_is_an_error_with_the_count(show):
    with pytest.raises(ValueError, match="no row 5: the shards have 5 rows"):
        show(task="detection", row=5)


def test_shards_of_one_family_show_its_task_and_say_what_they_lack(show, capsys):
    show("text_only")
    out = capsys.readouterr().out
    assert "detection: no row 0: the shards have 0 rows for it" in out and "<mask>" in out


def test_without_a_vocabulary_the_option_is_named(folder, capsys):
    assert main(["shards", "show", str(folder / "shards"), "data.vocab=''"]) == 2
    assert "--vocab" in capsys.readouterr().err
