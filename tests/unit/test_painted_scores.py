"""`ofa-ds evaluate` judges what a text-to-image model paints, and says which files it would want for more."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import task_models
import torch
from PIL import Image

from ofa_ds.cli import main
from ofa_ds.data import scenes
from ofa_ds.data.scenes_judge import Found, parse
from ofa_ds.data.shards import Shards
from ofa_ds.inference import answering
from ofa_ds.inference.answering import samples
from ofa_ds.inference.asking import How
from ofa_ds.inference.evaluate import evaluate, judge_tasks
from ofa_ds.inference.loaded_model import LoadedModel
from ofa_ds.inference.painted_scores import PaintedScores
from ofa_ds.inference.painting import that_paints
from ofa_ds.inference.share import Share
from ofa_ds.tasks.downstream.text_to_image import PROMPT, caption_of, judge, scene_scores
from ofa_ds.tasks.task import DOWNSTREAM
from ofa_ds.vision import inception, picture_scores
from ofa_ds.vision.clip import without_slashes
from ofa_ds.vision.picture_scores import ScoreFiles
from ofa_ds.vision.scenes_coder import ScenesCoder

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
    given = ["evaluate", folder / "run", "--shards", folder / TASK, "--json", *options]
    assert main([str(each) for each in given]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out)["tasks"][TASK]["scores"], captured.err


def test_pictures_are_painted_and_judged_beside_their_captions(folder: Path, capsys, monkeypatch) -> None:
    seen = Seen()
    monkeypatch.setattr(picture_scores, "load_clip", lambda path, device: seen)
    monkeypatch.setattr(inception, "Inception", lambda path, device: seen)
    monkeypatch.setattr(inception, "Reference", lambda path: SimpleNamespace(statistics=lambda network: None))
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
        (("--samples", "3"), 2, "--samples, --clip, --inception and --reference judge pictures: say what paints them"),
        (("--codes-model", "vqgan", "--samples", "3", "--beam", "2"), 2, "want --samples or --beam, one of them"),
        (("--samples", "0"), 2, "--samples"),
    ],
)
def test_wrong_files_are_told_before_anything_is_painted(
    folder: Path, capsys, monkeypatch, options: tuple[str, ...], code: int, message: str
) -> None:
    monkeypatch.setattr("ofa_ds.inference.evaluate.judge_tasks", lambda *_, **__: pytest.fail("painted"))
    given = [str(folder / "vqgan") if each == "vqgan" else each for each in options]
    try:
        found = main(["evaluate", str(folder / "run"), "--shards", str(folder / TASK), *given])
    except SystemExit as error:
        found = error.code
    assert found == code and message in capsys.readouterr().err


def test_what_is_wrong_on_rank_0_is_told_by_all_and_waited_for_by_none(folder: Path, tmp_path: Path) -> None:
    told: list[str] = []
    for rank in (0, 1):
        share = Share(rank=rank, world_size=2, gather=lambda value: told.append(value) or told[:1])
        with pytest.raises(ValueError, match="none: no VQGAN there"):
            evaluate(folder / "run", folder / TASK, codes_model=tmp_path / "none", share=share)


def test_scenes_are_looked_at_as_the_vqgan_paints_them(folder: Path, model: LoadedModel) -> None:
    examples = task_models.examples_of(model, Shards(folder / TASK), TASK)
    answers = [example.target[:-1].tolist() for example in examples]
    empty = np.full((64, 64, 3), scenes.GROUND, np.uint8)
    paints_nothing = dataclasses.replace(model, paint=lambda answers: [empty] * len(answers))
    assert judge(model.context(), examples, answers)["colour right"] == 1
    painted = PaintedScores(paints_nothing, ScoreFiles())
    assert painted(examples, [[ids] for ids in answers], all_scores=True)["colour right"] == 0
    assert "colour right" not in judge(paints_nothing.context(), examples, answers), "each is painted once"


def test_the_best_of_several_samples_is_told_beside_the_first(
    folder: Path, model: LoadedModel, capsys, monkeypatch
) -> None:
    """By scenes, and by a CLIP that likes red; every sample is painted once."""
    painted: list[int] = []
    paint = ScenesCoder.paint
    monkeypatch.setattr(ScenesCoder, "paint", lambda self, codes: painted.append(len(codes)) or paint(self, codes))
    clip = Seen()
    monkeypatch.setattr(clip, "image_features", lambda images: torch.tensor([[redness(image)] for image in images]))
    monkeypatch.setattr(picture_scores, "load_clip", lambda path, device: clip)
    found = {}
    for number in (1, 5):
        options = ("--samples", number, "--codes-model", "scenes", "--clip", "c")
        found[number], _ = evaluated(folder, capsys, *options)
        views = ROWS * (number + 1)  # its own captions, and shuffled ones once
        assert sum(painted) == views
        painted.clear()
    one, five = found[1], found[5]
    alike = {name: each["own"] for name, each in one.items() if each["own"] is not None}
    assert alike == pytest.approx({name: five[name]["own"] for name in alike}) and "CLIP score" in alike
    examples = task_models.examples_of(model, Shards(folder / TASK), TASK)
    runs = samples(model, examples, DOWNSTREAM[TASK], 5)
    pictures = [that_paints(model, Path("scenes")).paint(each) for each in runs]
    best = 100 * np.mean([max(map(redness, each)) for each in pictures])
    assert five["CLIP score, best of 5"]["own"] == pytest.approx(best, rel=1e-5)
    assert five["CLIP score, best of 5"]["own"] > five["CLIP score"]["own"]
    assert five["CLIP score, best of 5"]["blind"] is None
    assert {"colour right, best of 5", "shape right, best of 5", "place right, best of 5"} < set(five)
    assert not any("best of" in name for name in one)


def redness(picture: np.ndarray) -> float:
    return float((picture == scenes.COLORS["red"]).all(-1).mean())


def test_samples_are_the_same_however_many_go_together(
    folder: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = task_models.examples_of(model, Shards(folder / TASK), TASK)
    whole = samples(model, examples, DOWNSTREAM[TASK], 5)
    monkeypatch.setattr(answering, "MAX_TOGETHER", 2)
    assert samples(model, examples, DOWNSTREAM[TASK], 5) == whole
    assert [each[0] for each in whole] == answering.answer(model, examples, DOWNSTREAM[TASK])


def test_the_sample_with_most_right_is_the_best_of_them() -> None:
    found = {
        "right": (Found("circle", "red", (0.2, 0.5), 0.2), Found("square", "blue", (0.8, 0.5), 0.2)),
        "swapped": (Found("circle", "red", (0.8, 0.5), 0.2), Found("square", "blue", (0.2, 0.5), 0.2)),
        "colours": (Found("circle", "blue", (0.2, 0.5), 0.2), Found("square", "red", (0.8, 0.5), 0.2)),
        "nothing": (),
    }
    said = [parse("a red circle left of a blue square")] * 2
    scores = scene_scores(said, [[found["nothing"], found["right"], found["colours"]], [found[k] for k in
                          ("colours", "nothing", "swapped")]])  # fmt: skip
    first = {"colour right": 0.5, "shape right": 0.0, "place right": 0.0}
    best = {"colour right, best of 3": 1.0, "shape right, best of 3": 1.0, "place right, best of 3": 0.5}
    assert scores == first | best


def test_what_takes_its_time_begins_when_no_rank_waits_any_more(folder: Path, model: LoadedModel) -> None:
    """Others may be gone by then: nothing is gathered any more."""
    order: list[str] = []

    class Slow(PaintedScores):
        def __call__(self, *given: object, **named: object) -> dict:
            order.append("painted")
            return super().__call__(*given, **named)

    share = Share(gather=lambda value: order.append("gathered") or [value], leave=lambda: order.append("left"))
    painting = that_paints(model, Path("scenes"))
    judge_tasks(painting, Shards(folder / TASK), painted=Slow(painting, ScoreFiles()), share=share)
    at = order.index("left")
    assert set(order[:at]) == {"gathered"} and set(order[at + 1 :]) == {"painted"}


def test_the_reference_of_fid_is_looked_at_when_it_is_compared(tmp_path: Path, monkeypatch) -> None:
    looked: list[int] = []
    network = SimpleNamespace(features=lambda part: looked.append(len(part)) or (torch.rand(len(part), 4), None))
    for k in range(3):
        Image.fromarray(np.full((8, 8, 3), k, np.uint8)).save(tmp_path / f"{k}.png")
    reference = inception.Reference(tmp_path)
    assert not looked
    assert reference.statistics(network) is reference.statistics(network) and looked == [3]


def test_samples_and_weights_are_of_tasks_that_paint(model: LoadedModel, folder: Path, tmp_path: Path, capsys) -> None:
    task_models.build(tmp_path, rows=2, tasks=("caption",))
    with pytest.raises(ValueError, match="--samples: none of caption paints; leave it out"):
        judge_tasks(task_models.model_of(tmp_path, "caption"), Shards(tmp_path / "caption"), how=How(samples=2))
    given = ["evaluate", folder / "run", "--shards", tmp_path / "caption", "--codes-model", "scenes", "--clip", "c"]
    assert main([str(each) for each in given]) == 1
    assert "caption: asks for no pictures of texts; leave --clip and --inception out" in capsys.readouterr().err


def test_the_caption_that_clip_reads_is_that_of_the_source() -> None:
    row = " what is the complete image? caption: a red/blue circle"
    assert caption_of(row) == "a red/blue circle" and without_slashes(caption_of(row)) == "a redblue circle"
    assert caption_of(f"{PROMPT}a sign with the caption: no") == "a sign with the caption: no"
