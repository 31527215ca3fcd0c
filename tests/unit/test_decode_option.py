"""`data.decode` reaches whatever looks at a picture: pretraining, fine-tuning, questions of users, workers."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ofa_ds.bench import photo_rows
from ofa_ds.config import BatchConfig, DataConfig, ModelOptions, Recipe
from ofa_ds.data.example import Example
from ofa_ds.data.image import load
from ofa_ds.data.stored_jpeg import StoredJpeg
from ofa_ds.data.vocab import Vocab
from ofa_ds.inference import answers
from ofa_ds.inference.loaded_model import LoadedModel
from ofa_ds.model.config import preset
from ofa_ds.model.ofa import OFA
from ofa_ds.tasks.context import Context, row_generator
from ofa_ds.tasks.task import NO_NEGATIVES, ask, examples
from ofa_ds.train.loader import Loader

EXACT = DataConfig(image_size=96, infill_image_size=256, code_image_size=128, sample_patches=8, workers=0)
SCALED = replace(EXACT, decode="dct_scaled")
PHOTO = photo_rows.photograph(np.random.default_rng(0))
SEEN = {"id": "7", "image": PHOTO, "width": 480, "height": 360, "dataset": "d"}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "caption": ("vision_language", {"caption": "a cat", "box": None, "gt_objects": [], "type": "caption"}),
    "grounding": (
        "vision_language", {"caption": "a cat", "box": (20.0, 30.0, 300.0, 310.0), "gt_objects": [],
                            "type": "visual_grounding"}),
    "detection": ("detection", {"boxes": [[20.0, 30.0, 300.0, 310.0]], "cat_names": ["cat"], "type": ""}),
    "downstream": ("downstream", {"text": "", "answers": [("a cat", 1.0)], "box": None, "type": "caption"}),
    "imagenet": ("downstream", {"text": "", "answers": [("cat", 1.0)], "box": None, "type": "imagenet"}),
    "refcoco": ("downstream", {"text": "cat", "answers": [], "box": (20.0, 30.0, 300.0, 310.0), "type": "refcoco"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Vocab]:
    return photo_rows.make(tmp_path_factory.mktemp("photographs"), rows=6)


def context(vocab: Vocab, config: DataConfig, split: str, task: str = "") -> Context:
    if task:
        config = replace(config, task=replace(config.task, name=task))
    config = replace(config, infill_image_size=96, code_image_size=48)
    return Context(vocab=vocab, negatives=NO_NEGATIVES, config=config, patch_size=16, max_positions=256, split=split)


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("name", ROWS)
def test_every_way_of_training_and_judging_sees_the_scaled_picture(name: str, split: str,
                                                                   photographs: tuple[Any, Vocab]) -> None:  # fmt: skip
    family, own = ROWS[name]
    task = own["type"] if family == "downstream" else ""

    def seen(config: DataConfig) -> Example:
        ctx = context(photographs[1], config, split, task)
        return examples(family, SEEN | own, row_generator(1, family, 0, 0), ctx)[0]

    exact, scaled = seen(EXACT), seen(SCALED)
    assert exact.image.shape == scaled.image.shape and (exact.image != scaled.image).any()
    for field in ("source", "target", "boxes"):
        np.testing.assert_array_equal(getattr(exact, field), getattr(scaled, field))
    if split == "heldout" or name in ("grounding", "detection", "downstream", "refcoco"):  # nothing makes it stand out
        assert np.abs(exact.image.astype(int) - scaled.image).mean() < 2.5


@pytest.mark.parametrize("task", ["caption", "itm", "vqa", "visual_grounding", "detection", "image_infilling"])
def test_what_a_user_asks_is_seen_as_in_training(task: str, photographs: tuple[Any, Vocab], tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(PHOTO)
    found = []
    for config in (EXACT, SCALED):
        ctx = context(photographs[1], config, "heldout")
        picture = answers._read_picture(ctx, task, tmp_path / "photo.jpg")
        assert isinstance(picture, StoredJpeg) == (config is SCALED) and picture.shape == (360, 480, 3)
        found.append(ask(ctx, task, picture, "" if task in ("caption", "detection", "image_infilling") else "a cat"))
    assert (found[0].image != found[1].image).any()
    np.testing.assert_array_equal(found[0].source, found[1].source)


@pytest.mark.parametrize("task", ["caption", "instruction"])
def test_the_file_of_a_user_is_decoded_once_and_a_damaged_one_is_told_by_its_name(
    task: str, photographs: tuple[Any, Vocab], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.jpg", tmp_path / "cut.jpg"
    whole.write_bytes(PHOTO)
    cut.write_bytes(PHOTO[:9000])
    vocab, decoded = photographs[1], []
    model = OFA(preset("nano", vocab_size=vocab.size)).eval()

    def pixels(stored: StoredJpeg, scale: float = 1.0) -> tuple[np.ndarray, int]:
        decoded.append(scale)
        return real(stored, scale)

    real = StoredJpeg.pixels
    monkeypatch.setattr(StoredJpeg, "pixels", pixels)
    for config in (EXACT, SCALED):
        recipe = Recipe(model=ModelOptions(preset="nano"), data=config)
        loaded = LoadedModel(model=model, vocab=vocab, recipe=recipe)
        monkeypatch.setattr(answers, "load_model", lambda *_, loaded=loaded, **__: loaded)
        decoded.clear()
        answers.generate_one("run", task, image=whole, text="what is it?" if task == "instruction" else "")
        assert len(decoded) == 1
        with pytest.raises(ValueError, match=r"^--image .*cut.jpg: image: undecodable, truncated: "):
            answers.generate_one("run", task, image=cut, text="what is it?")


def test_workers_do_not_change_a_bit_of_scaled_pictures(photographs: tuple[Any, Vocab]) -> None:
    shards, vocab = photographs

    def images(config: DataConfig) -> list[torch.Tensor]:
        loader = Loader(shards=shards, vocab=vocab, config=config, seed=1, model=preset("nano"),
                        batch=BatchConfig(global_rows=12, micro_rows=6))  # fmt: skip
        steps = loader.steps(0)
        try:
            return [each.clone() for batch in next(steps) for each in batch.images]
        finally:
            steps.close()

    alone, helped, exact = images(SCALED), images(replace(SCALED, workers=2)), images(EXACT)
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True)) and len(alone) == len(helped)
    assert any(not torch.equal(a, b) for a, b in zip(alone, exact, strict=True))


def test_only_jpegs_wait_to_be_decoded() -> None:
    Image.new("RGB", (900, 900)).save(out := io.BytesIO(), "PNG")
    assert isinstance(load(out.getvalue(), "dct_scaled"), np.ndarray)
