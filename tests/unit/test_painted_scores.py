"""`ofa-ds evaluate` judges what a text-to-image model paints, and says which files it would want for more."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import task_models
import torch

from ofa_ds.cli import main
from ofa_ds.data import scenes
from ofa_ds.data.shards import Shards
from ofa_ds.inference.loaded_model import LoadedModel
from ofa_ds.tasks.downstream.text_to_image import PROMPT, caption_of, judge
from ofa_ds.vision import inception, picture_scores
from ofa_ds.vision.clip import without_slashes

TASK, ROWS = "text_to_image", 3
SCORES = ("CLIP score", "FID", "Inception score")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return task_models.build_painting(tmp_path_factory.mktemp("painted"), rows=ROWS)


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return task_models.painting_model(folder)


class Seen:
    """CLIP and InceptionV3 that keep what they are shown."""

    def __init__(self) -> None:
        self.captions: list[str] = []
        self.pictures: list[np.ndarray] = []

    def image_features(self, images: list[np.ndarray]) -> torch.Tensor:
        self.pictures += images
        return torch.full((len(images), 1), 0.25)

    def text_features(self, texts: list[str]) -> torch.Tensor:
        self.captions += texts
        return torch.ones(len(texts), 1)

    def features(self, images: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.rand(len(images), 4), torch.rand(len(images), 4)


def evaluated(folder: Path, capsys: pytest.CaptureFixture, *options: object) -> tuple[dict, str]:
    given = ["evaluate", folder / "run", "--shards", folder / TASK, "--beam", 1, "--json", *options]
    assert main([str(each) for each in given]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out)["tasks"][TASK]["scores"], captured.err


def test_pictures_are_painted_and_judged_beside_their_captions(folder: Path, capsys, monkeypatch) -> None:
    seen = Seen()
    monkeypatch.setattr(picture_scores, "load_clip", lambda path, device: seen)
    monkeypatch.setattr(inception, "Inception", lambda path, device: seen)
    monkeypatch.setattr(inception, "reference_statistics", lambda path, network: inception.Statistics(0, 0))
    monkeypatch.setattr(inception, "fid", lambda a, b: 40.0)
    files = ("--clip", "c", "--inception", "i", "--reference", "r")
    scores, said = evaluated(folder, capsys, "--codes-model", folder / "vqgan", *files)
    assert scores["CLIP score"]["own"] == pytest.approx(25)
    assert scores["FID"]["own"] == 40 and scores["FID"]["blind"] is None
    assert scores["Inception score"]["own"] is None and "want at least 10 pictures, got 3" in said
    assert {picture.shape for picture in seen.pictures} == {(64, 64, 3)} and len(seen.pictures) >= ROWS
    assert all(caption.startswith("a ") for caption in seen.captions[:ROWS])
    given = ["evaluate", folder / "run", "--shards", folder / TASK, "--beam", 1, "--codes-model", folder / "vqgan"]
    assert main([str(each) for each in (*given, *files)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "CLIP score" in line]
    assert "25.000" in line, "no share"


def test_what_cannot_be_judged_is_said_with_what_it_wants(folder: Path, capsys) -> None:
    scores, said = evaluated(folder, capsys)
    assert not set(SCORES) & set(scores) and "no CLIP score, FID, Inception score: say what paints the codes" in said
    scores, said = evaluated(folder, capsys, "--codes-model", folder / "vqgan")
    assert [scores[name]["own"] for name in SCORES] == [None] * 3
    assert "name CLIP's weights" in said and inception.WEIGHTS in said


@pytest.mark.parametrize(
    "options, code, message",
    [
        (("--clip", "x.pt"), 2, "say what paints them, --codes-model DIR"),
        (("--codes-model", "vqgan", "--reference", "r"), 2, "--reference: FID wants --inception too"),
        (("--codes-model", "vqgan", "--clip", "none.pt"), 1, "none.pt: no CLIP there: want OpenAI's"),
        (("--codes-model", "vqgan", "--inception", "none.pth"), 1, "none.pth: no such file; want torch-fidelity's"),
    ],
)
def test_wrong_files_are_told_before_anything_is_painted(
    folder: Path, capsys, monkeypatch, options: tuple[str, ...], code: int, message: str
) -> None:
    monkeypatch.setattr("ofa_ds.inference.evaluate.judge", lambda *_, **__: pytest.fail("painted"))
    given = [str(folder / "vqgan") if each == "vqgan" else each for each in options]
    try:
        found = main(["evaluate", str(folder / "run"), "--shards", str(folder / TASK), *given])
    except SystemExit as error:
        found = error.code
    assert found == code and message in capsys.readouterr().err


def test_scenes_are_looked_at_as_the_vqgan_paints_them(folder: Path, model: LoadedModel) -> None:
    examples = task_models.examples_of(model, Shards(folder / TASK), TASK)
    answers = [example.target[:-1].tolist() for example in examples]
    empty = np.full((64, 64, 3), scenes.GROUND, np.uint8)
    ctx = model.context()
    assert judge(ctx, examples, answers)["colour right"] == 1
    assert judge(dataclasses.replace(ctx, paint=lambda ids: empty), examples, answers)["colour right"] == 0


def test_the_caption_that_clip_reads_is_that_of_the_source() -> None:
    row = " what is the complete image? caption: a red/blue circle"
    assert caption_of(row) == "a red/blue circle" and without_slashes(caption_of(row)) == "a redblue circle"
    assert caption_of(f"{PROMPT}a sign with the caption: no") == "a sign with the caption: no"
