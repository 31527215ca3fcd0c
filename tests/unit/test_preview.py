"""The preview shows every task as text and as a picture, and says what is missing."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tiny_sources import write_sources

from ofa_ds.config import DataConfig
from ofa_ds.data.shards_build import build_shards
from ofa_ds.data.vocab import train_vocab
from ofa_ds.tasks import preview
from ofa_ds.terms import TASKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preview")
    sources = write_sources(folder)
    build_shards(folder / "shards", **sources, workers=1)
    build_shards(folder / "text_only", text=sources["text"], workers=1)
    train_vocab([" the cat sat on the mat"] * 9, 280, folder / "vocab", num_codes=8)
    return folder


@pytest.fixture
def config(folder):
    side = dict(image_size=64, infill_image_size=32, code_image_size=16, sample_patches=8)
    return DataConfig(**side, vocab=str(folder / "vocab"))


def test_all_eight_tasks_are_written_and_drawn(folder, config, tmp_path, capsys):
    preview.show_shards(folder / "shards", config, task=None, row=0, png=tmp_path / "all.png")
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line in TASKS] == list(TASKS)
    assert "| what are the objects in the image?" in out and "<code_" in out and "<mask>" in out
    sheet = np.array(Image.open(tmp_path / "all.png"))
    assert sheet.shape[0] > 4 * preview.PICTURE_PIXELS and (sheet != 255).mean() > 0.1


def test_one_task_and_row_can_be_chosen(folder, config, capsys):
    preview.show_shards(folder / "shards", config, task="visual_grounding", row=2, png=None)
    out = capsys.readouterr().out
    assert "the cat 8" in out and out.count("source") == 2 and "caption" not in out


def test_boxes_are_drawn_where_they_are():
    from ofa_ds.tasks.pretraining import Example

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
    card = np.array(preview.draw_card(example, []).convert("RGB"))[preview.MARGIN_PIXELS :, preview.MARGIN_PIXELS :]
    rows, columns = np.nonzero((card[:384, :384] == preview.COLOURS[0]).all(-1))
    assert [columns.min(), rows.min(), columns.max(), rows.max()] == [96, 192, 288, 288]


def test_a_row_that_is_not_there_is_an_error_with_the_count(folder, config):
    with pytest.raises(ValueError, match="no row 5: the shards have 5 rows"):
        preview.show_shards(folder / "shards", config, task="detection", row=5, png=None)


def test_shards_of_one_family_show_its_task_and_say_what_they_lack(folder, config, capsys):
    preview.show_shards(folder / "text_only", config, task=None, row=0, png=None)
    out = capsys.readouterr().out
    assert "detection: no row 0: the shards have 0 rows for it" in out and "<mask>" in out


def test_without_a_vocabulary_the_option_is_named(folder):
    with pytest.raises(ValueError, match="--vocab"):
        preview.show_shards(folder / "shards", DataConfig(), task=None, row=0, png=None)
