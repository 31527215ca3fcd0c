"""Text to image from the command line: samples with their seeds, painted, ranked, on a sheet; or one line why not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import task_models
import torch
from PIL import Image

from ofa_ds.cli import main
from ofa_ds.data import scenes
from ofa_ds.data.scenes import picture_of_codes
from ofa_ds.inference.answering import codes_config
from ofa_ds.inference.draws import SeededDraw
from ofa_ds.inference.generate import generate
from ofa_ds.inference.loaded_model import LoadedModel
from ofa_ds.inference.samples import Sample, Sampling, ranked, sample_codes
from ofa_ds.tasks.gallery import GAP_PIXELS, SIDE_PIXELS
from ofa_ds.tasks.preview import MARGIN_PIXELS
from ofa_ds.tasks.task import ask

NAME, CAPTION = "text_to_image", "a red circle left of a blue square"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return task_models.build_painting(tmp_path_factory.mktemp("samples"), rows=4)


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return task_models.painting_model(folder)


@pytest.fixture(scope="module")
def saved(model: LoadedModel, folder: Path) -> list[str]:
    """The beginning of a command line."""
    return ["generate", str(folder / "run"), "--task", NAME, "--vocab", str(folder / "vocab")]


def test_a_sample_is_a_function_of_its_seed_whatever_is_sampled_beside_it(model: LoadedModel) -> None:
    five = sample_codes(model, CAPTION, Sampling(samples=5, seed=7))
    assert [sample.seed for sample in five] == [7, 8, 9, 10, 11] and len({tuple(each.codes) for each in five}) == 5
    (third,) = sample_codes(model, CAPTION, Sampling(samples=1, seed=9))
    assert third.codes == five[2].codes and third.log_probability == pytest.approx(five[2].log_probability)
    assert all(len(each.codes) == 64 and 0 <= min(each.codes) <= max(each.codes) < 128 for each in five)


def test_more_samples_than_go_together_are_the_same_samples(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sample_codes(model, CAPTION, Sampling(samples=5))
    monkeypatch.setattr("ofa_ds.inference.samples.MAX_TOGETHER", 2)
    assert [each.codes for each in sample_codes(model, CAPTION, Sampling(samples=5))] == [each.codes for each in whole]


def test_the_caption_is_encoded_once_for_all_samples(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode = type(model.model).encode
    monkeypatch.setattr(type(model.model), "encode", lambda self, batch: seen.append(1) or encode(self, batch))
    sample_codes(model, CAPTION, Sampling(samples=6))
    assert seen == [1]


def test_few_codes_low_temperature_and_top_p_leave_the_improbable_out(model: LoadedModel) -> None:
    first = [{each.codes[0] for each in sample_codes(model, CAPTION, how)} for how in (
        Sampling(samples=40), Sampling(samples=40, top_k=2), Sampling(samples=40, top_k=0, top_p=1e-6),
        Sampling(samples=40, temperature=1e-4))]  # fmt: skip
    assert len(first[0]) > 10 and len(first[1]) == 2 and len(first[2]) == len(first[3]) == 1
    assert first[2] == first[3] < first[1]


def test_the_smallest_top_p_and_temperature_leave_the_most_probable_code(model: LoadedModel) -> None:
    (wanted,) = sample_codes(model, CAPTION, Sampling(samples=1, top_k=1))
    for least in (Sampling(samples=1, top_k=0, top_p=1e-300), Sampling(samples=1, top_k=0, temperature=1e-30)):
        assert [each.codes for each in sample_codes(model, CAPTION, least)] == [wanted.codes]


def test_codes_alone_give_what_the_whole_vocabulary_gives(model: LoadedModel) -> None:
    """With a prefix, though empty, the search is over every id."""
    batch = model.pack([ask(model.context(), NAME, None, CAPTION)])
    config = codes_config(model, beams=3, sampling=True, top_k=20)
    for options in ({}, {"prefix": [[]]}):
        (found,) = generate(model.model, batch, config, draw=SeededDraw(range(3)), **options)
        tokens = [(each.beam, each.tokens) for each in found]
        scores = [each.score for each in found]
        if not options:
            wanted, expected = tokens, scores
    assert tokens == wanted and scores == pytest.approx(expected, rel=1e-4)


class Judge:
    """Likes red."""

    def scores(self, images: list[np.ndarray], text: str) -> torch.Tensor:
        assert text == "a red b"
        return torch.tensor([float((image == scenes.COLORS["red"]).all(-1).mean()) for image in images])


def test_clip_s_favourite_comes_first_with_its_picture() -> None:
    samples = [Sample(3, [0] * 4, -1.0), Sample(4, [15] * 4, -2.0), Sample(5, [15, 0, 0, 0], -3.0)]
    pictures = [picture_of_codes(sample.codes) for sample in samples]
    found, shown = ranked(samples, pictures, Judge(), "a red/ b")
    assert [sample.seed for sample in found] == [4, 5, 3]
    assert [sample.similarity for sample in found] == [1.0, 0.25, 0.0]
    assert np.array_equal(shown[0], pictures[1])


def test_the_sheet_has_every_picture_and_what_is_beside_it_every_code_and_seed(
    saved: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.png"
    given = ["--text", CAPTION, "--samples", "5", "--seed", "3", "--top-p", "0.9"]
    assert main([*saved, *given, "--codes-model", "scenes", "--png", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((tmp_path / "a.png.json").read_text())
    assert [sample["seed"] for sample in told["samples"]] == [3, 4, 5, 6, 7] and told["ranked_by"] == "seed"
    assert (told["caption"], told["top_k"], told["top_p"], told["temperature"]) == (CAPTION, 0, 0.9, 1.0)
    with Image.open(file) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    for k, sample in enumerate(told["samples"]):
        left = MARGIN_PIXELS + k % 3 * (SIDE_PIXELS + GAP_PIXELS)
        own = picture_of_codes(sample["codes"]).repeat(SIDE_PIXELS // 64, 0).repeat(SIDE_PIXELS // 64, 1)
        column = pixels[:, left : left + SIDE_PIXELS]
        places = [y for y in range(len(column) - SIDE_PIXELS) if np.array_equal(column[y : y + SIDE_PIXELS], own)]
        assert len(places) == 1 and (places[0] > SIDE_PIXELS) == (k >= 3), k
    assert main([*saved, *given]) == 0
    assert capsys.readouterr().out.count("seed ") == 5


@pytest.mark.parametrize(
    "more, code, message",
    [
        (["--samples", "0"], 2, "--samples"), (["--top-k", "-1"], 2, "--top-k"), (["--top-p", "0"], 2, "--top-p"),
        (["--top-p", "1.5"], 2, "at most 1"), (["--temperature", "nan"], 2, "--temperature"),
        (["--temperature", "1e-300"], 1, "temperature: want at least 1e-30, below which logits have no room in fp32"),
        (["--top-k", "3", "--top-p", "0.5"], 2, "one of them"), (["--beam", "2"], 2, "--beam"),
        (["--rerank", "clip"], 2, "--rerank clip and --clip FILE together"), (["--clip", "x"], 2, "together"),
        (["--png", "a.png"], 1, "--codes-model DIR"), (["--codes-model", "nowhere", "--png", "a.png"], 1, "nowhere"),
        (["--codes-model", "scenes", "--clip", "nowhere", "--rerank", "clip"], 1, "nowhere"),
        (["--text", "word " * 10_000], 1, "10000 words, want 64 at most"), (["--text", " "], 1, "needs --text"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(
    saved: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    more: list[str], code: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    try:
        assert main([*saved, "--text", CAPTION, *more]) == code
    except SystemExit as ended:  # what argparse refuses
        assert ended.code == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and not list(tmp_path.glob("*.png*"))


def test_options_of_samples_are_of_painting_alone(saved: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*saved[:2], "--task", "caption", "--samples", "2"]) == 2
    assert "--samples: is of text_to_image, not of caption" in capsys.readouterr().err
