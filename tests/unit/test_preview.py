"""The preview shows every task as text and as a picture, and says what is missing."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_sources import write_sources

from ofa_ds.cli import main
from ofa_ds.config import DataConfig
from ofa_ds.data import image as pictures
from ofa_ds.data.building.build import build_shards
from ofa_ds.data.example import Example
from ofa_ds.data.shard_file import ShardFile
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import load_vocab, train_vocab
from ofa_ds.tasks import preview
from ofa_ds.tasks.context import Context
from ofa_ds.terms import PRETRAINING_TASKS


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
def vocab_ctx(folder):
    shards, vocab = Shards(folder / "shards"), load_vocab(folder / "vocab")
    return Context(
        vocab=vocab, negatives=shards.negatives, config=DataConfig(**SIDES), patch_size=16, max_positions=512
    )


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
    assert [line for line in out.splitlines() if line in PRETRAINING_TASKS] == list(PRETRAINING_TASKS)
    assert "| what are the objects in the image?" in out and "<code_" in out and "<mask>" in out
    sheet = np.array(Image.open(tmp_path / "all.png"))
    assert sheet.shape[0] > 4 * preview.PICTURE_PIXELS and (sheet != 255).mean() > 0.1


def test_infilling_is_drawn_as_original_hole_and_what_the_codes_of_the_row_stand_for(folder, vocab_ctx, tmp_path):
    asked, grey = [], np.full((16, 16, 3), 77, np.uint8)
    ctx = dataclasses.replace(vocab_ctx, paint=lambda answers: asked.extend(answers) or [grey] * len(answers))
    shards, png = Shards(folder / "shards"), tmp_path / "a.png"
    preview.show_shards(shards, ctx, task="image_infilling", row=1, png=png)
    row = shards.row("image", 1)
    assert asked == [[ctx.vocab.code(int(code)) for code in row["codes"]]]
    sheet, side, gap = np.array(Image.open(png)), preview.VIEW_PIXELS, preview.MARGIN_PIXELS
    for k, middle in enumerate((None, preview.HOLE_GREY, 77)):
        wanted = pictures.decode(row["image"]).copy()
        if middle is not None:
            wanted[8:24, 8:24] = middle
        shown = sheet[gap : gap + side, gap + k * (side + gap) :][:, :side]
        assert np.array_equal(shown, wanted.repeat(8, 0).repeat(8, 1)), k
    small = dataclasses.replace(ctx, paint=lambda ids: [np.zeros((8, 8, 3), np.uint8)] * len(ids))
    with pytest.raises(ValueError, match="8 x 8 pixels are painted, the hole has 16 x 16"):
        preview.show_shards(shards, small, task="image_infilling", row=1, png=tmp_path / "b.png")


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


@pytest.mark.parametrize("task", ["image_infilling", None])
def test_a_row_that_does_not_fit_the_settings_is_named_with_family_number_file_and_id(show, task) -> None:
    where = r"shards: image row 0 \(image-00000.arrow row 0, id '[^']+'\): .*data.infill_image_size"
    with pytest.raises(ValueError, match=where):
        show(task=task, sizes=SIDES | {"infill_image_size": 48})


def test_shards_of_one_family_show_its_task_and_say_what_they_lack(show, capsys):
    show("text_only")
    out = capsys.readouterr().out
    assert "detection: no row 0: the shards have 0 rows for it" in out and "<mask>" in out


def test_without_a_vocabulary_the_option_is_named(folder, capsys):
    assert main(["shards", "show", str(folder / "shards"), "data.vocab=''"]) == 2
    assert "--vocab" in capsys.readouterr().err


def test_patches_are_those_of_the_recipes_model(folder, capsys):
    """The 6B's have 14 pixels: 56 pixels are 4 x 4 of them, of which 9 are sampled, and 3.5 of 16."""
    sizes = ["data.image_size=56", "data.infill_image_size=56", "data.code_image_size=16", "data.sample_patches=9"]
    command = ["shards", "show", str(folder / "shards"), *sizes, "--vocab", str(folder / "vocab"), "--task", "caption"]
    for recipe, sampled in [("pretrain-6b", "9 patches sampled"), ("pretrain-tiny", "56 x 56 pixels\n")]:
        assert main([*command, "--recipe", recipe]) == 0
        assert sampled in capsys.readouterr().out, recipe


def test_dimmed_are_the_patches_that_were_not_sampled():
    ids, size = np.array([0, 2]), 14
    white = np.full((28, 28, 3), 255, np.uint8)
    example = Example(task="caption", source=ids, target=ids, prev=ids, image=white, patches=np.array([3]))
    card = np.array(preview.draw_card(example, [], SimpleNamespace(patch_size=size)).convert("RGB"))
    picture = card[preview.MARGIN_PIXELS :, preview.MARGIN_PIXELS :][:384, :384, 0]
    assert (picture[192:, 192:] == 255).all() and (picture[:192] == 127).all() and (picture[:, :192] == 127).all()


def test_a_family_that_the_mix_leaves_out_is_not_shown_unless_asked_for(folder, show, capsys):
    without = {**SIDES, "mix": {"image": 0}}
    show(sizes=without)
    out = capsys.readouterr().out
    assert "image_infilling: not trained, as data.mix.image is 0; --task image_infilling shows it" in out
    assert "<code_" not in out
    show(sizes=without, task="image_infilling")
    assert "<code_" in capsys.readouterr().out


def test_the_nth_row_of_a_type_is_found_without_reading_a_row(folder, monkeypatch):
    shards = Shards(folder / "shards")
    every = [shards.row("vision_language", i)["type"] for i in range(21)]
    monkeypatch.setattr(ShardFile, "row", None)
    for kinds in [("qa",), ("caption", "visual_grounding"), ("caption", "qa"), ()]:
        wanted = [i for i, kind in enumerate(every) if kind in kinds or not kinds]
        assert list(shards.rows_of_types("vision_language", kinds)) == wanted
        for start, most in [(0, 5), (4, None), (7, 6), (20, 9), (21, None)]:
            end = 21 if most is None else start + most
            found = list(shards.rows_of_types("vision_language", kinds, start=start, max_rows=most))
            assert found == [i for i in wanted if start <= i < end]


def test_a_type_that_the_manifest_does_not_count_is_not_looked_for(folder, monkeypatch):
    shards = Shards(folder / "shards")
    monkeypatch.setattr(ShardFile, "rows_of_types", None)
    assert list(shards.rows_of_types("vision_language", ["video"])) == []
    assert list(shards.rows_of_types("text", [])) == list(range(7))


def test_in_training_a_row_is_looked_for_among_so_many_only(folder, vocab_ctx):
    shards = Shards(folder / "shards")
    assert preview.find_example(shards, "vqa", 0, vocab_ctx, max_rows=2).row_id == "vl1"
    with pytest.raises(LookupError, match="not among the first 2 of vision_language"):
        preview.find_example(shards, "visual_grounding", 0, vocab_ctx, max_rows=2)
