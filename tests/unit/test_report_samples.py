"""Pictures in the middle of a run are painted by a VQGAN that is loaded once; without it they have some colours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import task_models
import torch

from ofa_ds.config import changed_recipe
from ofa_ds.data.shards import Shards
from ofa_ds.inference import painting
from ofa_ds.inference.loaded_model import LoadedModel
from ofa_ds.tasks import preview
from ofa_ds.train.report_samples import Samples

NAME = "text_to_image"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return task_models.build_painting(tmp_path_factory.mktemp("reported"), rows=2)


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return task_models.painting_model(folder)


class Writer:
    def __init__(self) -> None:
        self.pictures: list[np.ndarray] = []

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        assert name == f"sample/{NAME}"
        self.pictures.append(pixels)


def samples_of(model: LoadedModel, folder: Path, *more: str) -> Samples:
    dim = ("model.change.dim=64", "model.change.ffn_dim=128")
    recipe = changed_recipe(model.recipe, [*dim, *more], "recipe")
    engine = SimpleNamespace(full_weights=model.model.state_dict, device=torch.device("cpu"))
    return Samples(engine, recipe, SimpleNamespace(vocab=model.vocab, shards=Shards(folder / NAME)))


@pytest.mark.parametrize("key", ["train.codes_model", "criterion.scst_vqgan"])
def test_the_vqgan_is_loaded_once_for_all_reports(
    model: LoadedModel, folder: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[object] = []
    load = painting.load_coder
    monkeypatch.setattr(painting, "load_coder", lambda *given, **named: loaded.append(given) or load(*given, **named))
    samples, writer = samples_of(model, folder, f"{key}={folder / 'vqgan'}"), Writer()
    samples.show(writer, 1)
    samples.show(writer, 2)
    assert len(loaded) == 1 and len(writer.pictures) == 2
    assert all(pixels.shape[1] > 2 * preview.VIEW_PIXELS for pixels in writer.pictures), "the right codes and its own"


def test_without_a_vqgan_there_are_pictures_all_the_same_and_that_is_said_once(
    model: LoadedModel, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    samples, writer = samples_of(model, folder, "train.codes_model=nowhere"), Writer()
    samples.show(writer, 1)
    samples.show(writer, 2)
    assert len(writer.pictures) == 2
    assert capsys.readouterr().err.count("train.codes_model: image codes have some colour each: nowhere: no VQGAN") == 1
    samples.show(None, 3)
