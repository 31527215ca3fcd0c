"""Scores of painted pictures: equal to plain formulas, left out where a file is missing, and nothing is downloaded."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_inception import random_inception

from ofa_ds.vision import inception, picture_scores
from ofa_ds.vision.inception import Inception, Statistics
from ofa_ds.vision.picture_scores import PictureJudge, ScoreFiles


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked for something")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_inception(tmp_path_factory.mktemp("inception"))


@pytest.fixture(scope="module")
def network(weights: Path) -> Inception:
    return Inception(weights)


def pictures(count: int, seed: int = 0, side: int = 16) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(count)]


def square_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def plain_fid(a: Statistics, b: Statistics) -> float:
    """With the symmetric root S^1/2 S' S^1/2, which has the trace of (S S')^1/2."""
    root = square_root(a.sigma)
    mixed = square_root(root @ b.sigma @ root)
    return float(((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * np.trace(mixed))


def test_fid_is_the_plain_formula() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + 3
    second = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6))
    a, b = (inception.statistics(torch.from_numpy(each)) for each in (first, second))
    assert np.allclose(a.mu, first.mean(0)) and np.allclose(a.sigma, np.cov(first, rowvar=False))
    assert inception.fid(a, b) == pytest.approx(plain_fid(a, b), rel=1e-9)
    assert inception.fid(a, b) == pytest.approx(inception.fid(b, a), rel=1e-9)
    assert inception.fid(a, a) == pytest.approx(0, abs=1e-6)
    moved = Statistics(a.mu + 2, a.sigma)
    assert inception.fid(a, moved) == pytest.approx(6 * 4, rel=1e-6)


def test_the_inception_score_is_the_plain_formula() -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 7)) * 3)
    order = np.random.RandomState(2020).permutation(50)
    p = np.exp(logits.numpy()[order])
    p /= p.sum(1, keepdims=True)
    parts = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in np.split(p, 10)]
    mean, deviation = inception.inception_score(logits)
    assert (mean, deviation) == (pytest.approx(np.mean(parts)), pytest.approx(np.std(parts)))
    with pytest.raises(ValueError, match="want at least 10 pictures, got 9"):
        inception.inception_score(logits[:9])


def test_features_are_torch_fidelity_s_own_for_pictures_of_several_sizes(network: Inception, weights: Path) -> None:
    from torch_fidelity.utils import create_feature_extractor

    given = [*pictures(2), *pictures(1, side=20), *pictures(1)]
    features, logits = network.features(given)
    assert features.shape == (4, 2048) and logits.shape == (4, 1008) and torch.isfinite(features).all()
    theirs = create_feature_extractor(
        "inception-v3-compat", ["2048", "logits_unbiased"], cuda=False, feature_extractor_weights_path=str(weights),
        verbose=False,
    )  # fmt: skip
    wanted, wanted_logits = theirs(torch.from_numpy(given[2]).permute(2, 0, 1)[None])
    for got, want in ((features[2], wanted[0]), (logits[2], wanted_logits[0])):
        assert want.std() > 1e-3
        assert torch.allclose(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_a_folder_and_its_stored_statistics_are_the_same_reference(network: Inception, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real = pictures(2, seed=5)
    for k, picture in enumerate(real):
        Image.fromarray(picture).save(tmp_path / "real" / f"{k}.png")
    found = inception.Reference(tmp_path / "real").statistics(network)
    np.savez(tmp_path / "gt_stat.npz", mu=found.mu, sigma=found.sigma)
    again = inception.Reference(tmp_path / "gt_stat.npz").statistics(network)
    assert (found.mu == again.mu).all() and (found.sigma == again.sigma).all()
    want = network.features(real)[0].double().numpy()
    assert np.allclose(found.mu, want.mean(0))


class Told:
    """CLIP whose cosine with every caption is the mean brightness."""

    def image_features(self, images: list[np.ndarray]) -> torch.Tensor:
        return torch.tensor([[image.mean() / 255] for image in images], dtype=torch.float32)

    def text_features(self, texts: list[str]) -> torch.Tensor:
        return torch.ones(len(texts), 1)


def grey(value: int) -> np.ndarray:
    return np.full((16, 16, 3), value, np.uint8)


def test_of_several_samples_the_one_nearest_to_its_caption_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_scores, "load_clip", lambda path, device: Told())
    judge = PictureJudge(ScoreFiles(clip=Path("c")), say=lambda line: None)
    scores = judge.scores([[grey(0), grey(255), grey(51)], [grey(102), grey(51)]], ["a", "b"])
    assert scores["CLIP score, best of 3"] == pytest.approx(100 * (1 + 0.4) / 2)
    assert scores["CLIP score"] == pytest.approx(100 * (0 + 0.4) / 2), "the first of each"


@pytest.mark.parametrize("number", [1, 5, 100])
def test_pictures_are_painted_and_looked_at_a_part_at_a_time(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_scores, "load_clip", lambda path, device: Told())
    parts: list[int] = []

    def paint(values: list[int]) -> list[np.ndarray]:
        parts.append(len(values))
        return [grey(value) for value in values]

    judge = PictureJudge(ScoreFiles(clip=Path("c")), say=lambda line: None)
    values = np.random.default_rng(0).integers(0, 256, (70, number)).tolist()
    scores = judge.scores(values, ["a"] * 70, paint=paint)
    assert sum(parts) == 70 * number and max(parts) <= max(number, picture_scores.TOGETHER)
    assert scores["CLIP score"] == pytest.approx(100 * np.mean([each[0] for each in values]) / 255, rel=1e-5)
    if number > 1:
        best = 100 * np.mean([max(each) for each in values]) / 255
        assert scores[f"CLIP score, best of {number}"] == pytest.approx(best, rel=1e-5)


def test_what_is_missing_is_said_and_the_rest_goes_on(
    network: Inception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[float]] = []
    answers = torch.rand(12, 2048), torch.rand(12, 1008)

    def features(self: Inception, given: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append([float(picture.mean()) for picture in given])
        return answers[0][: len(given)], answers[1][: len(given)]

    np.savez(tmp_path / "gt.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    monkeypatch.setattr(picture_scores, "load_clip", lambda path, device: Told())
    monkeypatch.setattr(picture_scores.inception, "Inception", lambda path, device: network)
    monkeypatch.setattr(Inception, "features", features)
    monkeypatch.setattr(picture_scores.inception, "fid", lambda a, b: 7.0)
    samples, captions = [[grey(10), grey(20 + k)] for k in range(12)], ["a"] * 12

    def scored(count: int, **files: str) -> tuple[dict, list[str]]:
        said: list[str] = []
        named = ScoreFiles(**{name: tmp_path / file for name, file in files.items()})
        return PictureJudge(named, say=said.append).scores(samples[:count], captions[:count]), said

    scores, said = scored(12)
    assert set(scores.values()) == {None}
    assert "name CLIP's weights" in said[0] and inception.WEIGHTS in said[1] and len(said) == 2
    scores, said = scored(12, clip="c")
    assert scores["CLIP score"] == pytest.approx(100 * 10 / 255)
    assert scores["CLIP score, best of 2"] == pytest.approx(100 * np.mean([20 + k for k in range(12)]) / 255)
    assert scores["FID, best of 2"] is None and len(said) == 1
    scores, said = scored(12, inception="i")
    assert scores["Inception score"] > 1 and scores["FID"] is None and "name what to compare with" in said[1]
    assert seen[-1] == [10] * 12, "without CLIP the first picture counts"
    scores, said = scored(12, clip="c", inception="i", reference="gt.npz")
    assert scores["FID, best of 2"] == 7.0 and None not in scores.values()
    assert seen[-1] == [20 + k for k in range(12)], "with CLIP the best one counts"
    assert len(said) == 1 and said[0].startswith("FID of 12 pictures is too large: 2048 features want as many;")
    scores, said = scored(1, inception="i", reference="gt.npz")
    assert scores["FID"] is None and scores["Inception score"] is None and len(said) == 3
    with pytest.raises(ValueError, match="1 of 12 captions; want some of each"):
        PictureJudge(ScoreFiles(), say=said.append).scores(samples[:1], captions)


CHECKED = ("Conv2d_1a_3x3.conv.weight", "fc.weight")


class Command:
    def __reduce__(self) -> tuple:
        return print, ("this must not be printed",)


def test_wrong_files_are_one_line_and_nothing_in_them_is_run(network, weights: Path, tmp_path: Path, capsys) -> None:
    state = {name: torch.load(weights, weights_only=True, mmap=True)[name].clone() for name in CHECKED}
    bad = {
        "code": ({**state, "fc.bias": Command()}, "refused, it holds more than tensors"),
        "nan": ({**state, "fc.bias": torch.full((1008,), torch.nan)}, "fc.bias: has values that are not finite"),
        "other": ({"layer.weight": torch.zeros(3)}, r"Conv2d_1a_3x3.conv.weight: want shape \[32, 3, 3, 3\]"),
        "part": (state, "not the weights of torch-fidelity.*Missing key"),
        "text": ({"a": "b"}, "want a state dict of tensors"),
    }
    for name, (content, message) in bad.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match=message) as error:
            Inception(tmp_path / f"{name}.pth")
        assert "\n" not in str(error.value) and name in str(error.value)
    with pytest.raises(ValueError, match="none.pth: no such file; want torch-fidelity's weights-inception"):
        Inception(tmp_path / "none.pth")
    assert "must not" not in capsys.readouterr().out
    arrays = {
        "few": ({"mu": np.zeros(3), "sigma": np.eye(3)}, r"want mu \[2048\] and sigma"),
        "no": ({"mean": np.zeros(3)}, "want an .npz with mu and sigma"),
        "objects": ({"mu": np.array([{}]), "sigma": np.eye(3)}, "want an .npz with mu and sigma"),
        "nan": ({"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}, "not finite"),
    }
    for name, (content, message) in arrays.items():
        np.savez(tmp_path / f"{name}.npz", **content)
        with pytest.raises(ValueError, match=message):
            inception.Reference(tmp_path / f"{name}.npz")
    with pytest.raises(ValueError, match="no such folder or file"):
        inception.Reference(tmp_path / "nowhere")
