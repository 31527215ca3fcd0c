"""What a model paints into the middle of pictures is compared with the truth, and with what it paints blindly."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scenes_shards import build
from tiny_vqgan import CONFIG

from ofa_ds.cli.main import main
from ofa_ds.config import BatchConfig, DataConfig, ModelOptions, Recipe
from ofa_ds.data.scenes_tasks import write_task_scenes
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import load_vocab
from ofa_ds.inference import painted, painting
from ofa_ds.inference.answers import draw_answer
from ofa_ds.inference.loaded_model import LoadedModel
from ofa_ds.inference.painted import judge_painted
from ofa_ds.inference.painting import coder_of, that_paints
from ofa_ds.model.config import model_config
from ofa_ds.model.ofa import OFA
from ofa_ds.tasks import preview
from ofa_ds.vision.coder import Coder
from ofa_ds.vision.files import save_vqgan
from ofa_ds.vision.vqgan import Vqgan

SIDES = {"image_size": 64, "infill_image_size": 64, "code_image_size": 32, "max_image_size": 64, "sample_patches": 0}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return Shards(build(tmp_path_factory.mktemp("painted"), 48) / "shards")


@pytest.fixture(scope="module")
def model(shards: Shards) -> LoadedModel:
    torch.manual_seed(0)
    vocab = load_vocab(shards.path.parent / "vocab")
    data = DataConfig(shards=str(shards.path), vocab=str(shards.path.parent / "vocab"), augment="none", **SIDES)
    recipe = Recipe(model=ModelOptions(preset="nano"), data=data, batch=BatchConfig(global_rows=12, micro_rows=12))
    config = dataclasses.replace(model_config(recipe, vocab.size), dim=64, ffn_dim=128, init_std=64**-0.5)
    return LoadedModel(model=OFA(config).eval(), vocab=vocab, recipe=recipe)


@pytest.fixture(scope="module")
def coder() -> Coder:
    torch.manual_seed(0)
    return Coder(Vqgan(CONFIG), 32)


def test_right_codes_are_as_far_off_as_their_own_painting_and_others_further(
    model: LoadedModel, shards: Shards, coder: Coder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Answers are set: the rows' own codes where the picture is the row's, else code 0 everywhere."""
    start = model.vocab.code_start

    def answers(_model, _ctx, _task, asked, *_) -> list[list[int]]:
        sees = [len(np.unique(example.image)) > 1 and not shuffled(example) for example in asked]
        return [example.target[:-1].tolist() if own else [start] * 16 for example, own in zip(asked, sees, strict=True)]

    def shuffled(example) -> bool:
        return not (example.image == pictures[example.row_id]).all()

    ctx = model.context(shards)
    asked = painted.collect(shards, ctx, [painted.NAME], 6)[painted.NAME]
    pictures = {example.row_id: example.image for example in asked}
    monkeypatch.setattr(painted, "answers_to", answers)
    found = judge_painted(model, shards, coder, rows=6, png=tmp_path / "sheet.png")
    y0, x0, y1, x1 = asked[0].hole
    errors = {"own": [], "grey": []}
    for example in asked:
        for how, codes in (("own", example.target[:-1] - start), ("grey", np.zeros(16, np.int64))):
            picture = coder.paint([codes])[0].astype(float)
            errors[how].append(np.abs(picture - example.image[y0:y1, x0:x1]).mean())
    assert found["examples"] == 6
    assert found["colour_error"]["own"] == pytest.approx(np.mean(errors["own"])) == found["right_codes"]
    for how in ("grey", "shuffled", "blind"):
        assert found["colour_error"][how] == pytest.approx(np.mean(errors["grey"]))
    assert found["token_accuracy"]["own"] == 1 and found["token_accuracy"]["blind"] < 0.9
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (3 * 132 - 4, 8 * 132 - 4, 3)
    assert (sheet[:128:2, :128:2] == asked[0].image).all()
    assert (sheet[2 * y0 : 2 * y1, 132 + 2 * x0 : 132 + 2 * x1] == preview.HOLE_GREY).all()
    mine = coder.paint([asked[0].target[:-1] - start])[0]
    assert (sheet[2 * y0 : 2 * y1 : 2, 264 + 2 * x0 : 264 + 2 * x1 : 2] == mine).all()


def test_scenes_are_painted_by_their_rule_where_no_vqgan_has_that_name(
    model: LoadedModel, shards: Shards, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenes").mkdir()  # where somebody drew them: no VQGAN
    coder = coder_of(Path("scenes"), 32, "cpu")
    example = preview.find_example(shards, painted.NAME, 0, model.context(shards))
    y0, x0, y1, x1 = example.hole
    codes = example.target[:-1] - model.vocab.code_start
    (shown,) = that_paints(model, Path("scenes")).paint([example.target[:-1]])
    assert (shown == coder.paint([codes.reshape(4, 4)])[0]).all()
    assert (shown == example.image[y0:y1, x0:x1]).all(-1).mean() > 0.85
    for wrong, text in ((codes[:15], "row: want as many codes as a square"), (codes + 128, "row: want 0 ... 127 of")):
        with pytest.raises(ValueError, match=text):
            coder.paint([wrong], ["row"])
    given = ["codes", "decode", "--codes", " ".join(map(str, codes)), "--model", "scenes", "--png", "painted.png"]
    assert main(given) == 0
    assert (np.asarray(Image.open("painted.png")) == shown).all()
    (tmp_path / "scenes").rmdir()
    save_vqgan(Vqgan(CONFIG), tmp_path / "scenes")
    assert isinstance(coder_of(Path("scenes"), 32, "cpu"), Coder)


def test_the_vqgan_is_where_the_model_is(
    model: LoadedModel, coder: Coder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded: list[Coder] = []
    load = painting.load_coder
    monkeypatch.setattr(
        painting, "load_coder", lambda *given, **named: loaded.append(load(*given, **named)) or loaded[-1]
    )
    save_vqgan(coder.model, tmp_path / "vqgan")
    elsewhere = dataclasses.replace(model, model=copy.deepcopy(model.model).to("meta"))
    that_paints(elsewhere, tmp_path / "vqgan")
    assert loaded[0].device == torch.device("meta")


def test_a_vqgan_of_another_codebook_is_told(model: LoadedModel, shards: Shards) -> None:
    other = Coder(Vqgan(dataclasses.replace(CONFIG, n_embed=64)), 32)
    with pytest.raises(ValueError, match="--model: 64 codes of 8 pixels each, want 128, which"):
        judge_painted(model, shards, other, rows=6)


def test_shards_without_rows_that_are_painted_are_told(model: LoadedModel, coder: Coder, tmp_path: Path) -> None:
    file = write_task_scenes(tmp_path, "text_to_image", rows=2, seed=1)
    command = ["shards", "build", "--task", "text_to_image", "--out", str(tmp_path / "shards"), str(file)]
    assert main(command) == 0
    with pytest.raises(ValueError, match="shards: has no row for image_infilling, only for text_to_image"):
        judge_painted(model, Shards(tmp_path / "shards"), coder, rows=6)


def test_a_card_shows_the_picture_with_what_codes_stand_for_in_its_hole(
    model: LoadedModel, shards: Shards, coder: Coder, tmp_path: Path
) -> None:
    save_vqgan(coder.model, tmp_path / "vqgan")
    model = that_paints(model, tmp_path / "vqgan")
    ctx = model.context(shards)
    example = preview.find_example(shards, painted.NAME, 0, ctx)
    start = model.vocab.code_start
    y0, x0, y1, x1 = example.hole
    answer = [start + 5] * 16
    card = np.asarray(draw_answer(ctx, example, answer).convert("RGB"))
    side, gap = preview.VIEW_PIXELS, preview.MARGIN_PIXELS
    right, own = coder.paint([example.target[:-1] - start, np.array(answer) - start])
    for k, middle in enumerate((example.image[y0:y1, x0:x1], preview.HOLE_GREY, right, own)):
        wanted, left = example.image.copy(), gap + k * (side + gap)
        wanted[y0:y1, x0:x1] = middle
        scale = side // len(wanted)
        shown = card[gap : gap + side, left : left + side]
        assert np.array_equal(shown, wanted.repeat(scale, 0).repeat(scale, 1)), k
    false_colours = np.asarray(draw_answer(dataclasses.replace(ctx, paint=None), example, answer).convert("RGB"))
    assert false_colours.shape != card.shape
    with pytest.raises(ValueError, match="no VQGAN there"):
        that_paints(model, tmp_path / "nothing")


def test_what_is_no_run_of_codes_is_said_and_not_painted(
    model: LoadedModel, shards: Shards, coder: Coder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[dict[str, str]] = []
    draw = preview.draw_card
    monkeypatch.setattr(preview, "draw_card", lambda e, texts, *rest: said.append(dict(texts)) or draw(e, texts, *rest))
    save_vqgan(coder.model, tmp_path / "vqgan")
    ctx = that_paints(model, tmp_path / "vqgan").context(shards)
    example = preview.find_example(shards, painted.NAME, 0, ctx)
    code = ctx.vocab.code_start
    for ids, problem in (([4] * 16, "of the codebook"), ([code] * 15, "want 16"), ([code] * 4, "want 16")):
        draw_answer(ctx, example, ids)
        assert problem in said[-1]["not painted"]
    draw_answer(ctx, example, [code] * 16)
    assert "not painted" not in said[-1]
