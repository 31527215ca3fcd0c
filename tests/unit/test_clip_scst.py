"""Text to image rewarded by CLIP: rewards, samples, what is learnt from them, and what is refused at start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import task_models
import torch
from tiny_clip import tiny_clip

from ofa_ds.batch import Batch
from ofa_ds.cli import main
from ofa_ds.cluster.check_recipe import check_sense
from ofa_ds.cluster.check_recipe import main as check_recipe
from ofa_ds.config import Recipe, load_recipe
from ofa_ds.data.scenes import COLORS
from ofa_ds.data.shards import Shards
from ofa_ds.inference.loaded_model import LoadedModel
from ofa_ds.train.clip_scst import PaintingCritical, painting_critical
from ofa_ds.vision.scenes_coder import ScenesCoder

NAME, BEAMS = "text_to_image", 5


class Reddish:
    """In place of CLIP: the share of red."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def scores(self, images: list[np.ndarray], text: str) -> torch.Tensor:
        self.asked.append(text)
        return torch.tensor([float((image == COLORS["red"]).all(-1).mean()) for image in images])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return task_models.build_painting(tmp_path_factory.mktemp("rewarded"), rows=4)


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return task_models.painting_model(folder)


@pytest.fixture(scope="module")
def batch(folder: Path, model: LoadedModel) -> Batch:
    return model.pack(task_models.examples_of(model, Shards(folder / NAME), NAME))


def recipe_of(folder: Path, *more: str) -> Recipe:
    paths = (f"data.shards={folder / NAME}", f"data.vocab={folder / 'vocab'}")
    return load_recipe("finetune-image-gen-stage2-nano", (*paths, *more))


@pytest.fixture
def critical(folder: Path, model: LoadedModel) -> PaintingCritical:
    vocab = model.vocab
    codes = f"criterion.constraint_range=[{vocab.code_start},{vocab.bin_start}]"
    return PaintingCritical(ScenesCoder(), Reddish(), vocab, recipe_of(folder, codes))


def test_five_samples_are_rewarded_beside_the_others_and_their_codes_are_the_targets(
    critical: PaintingCritical, model: LoadedModel, batch: Batch, folder: Path
) -> None:
    found = critical.found(model.model, batch, 3)
    assert [len(each) for each in found] == [BEAMS] * 4
    tokens = [[hypothesis.tokens for hypothesis in each] for each in found]
    prepared = critical.rewarded(batch, tokens)
    start, pictures = model.vocab.code_start, ScenesCoder()
    painted = [pictures.paint([np.array(run[:-1]) - start for run in each]) for each in tokens]
    scores = np.array([[2.5 * (image == COLORS["red"]).all(-1).mean() for image in each] for each in painted])
    rewards = scores - (scores.sum(1, keepdims=True) - scores) / (BEAMS - 1)
    assert np.allclose(prepared.batch.loss_weight.view(4, BEAMS, 65)[..., 0], rewards, atol=1e-6)
    assert prepared.batch.targets.tolist() == [token for each in tokens for run in each for token in run]
    assert bool(prepared.batch.code_mask.all()) and prepared.counts.tolist() == [4 * BEAMS * 65]
    assert prepared.more.tolist() == [[pytest.approx(scores.sum(), rel=1e-5), 4 * BEAMS]]
    rows = [Shards(folder / NAME).row("downstream", k)["text"] for k in range(4)]
    assert critical._clip.asked == rows


def test_samples_follow_from_step_and_caption_whoever_is_in_the_batch(
    critical: PaintingCritical, model: LoadedModel, batch: Batch, folder: Path
) -> None:
    def tokens(batch: Batch, step: int) -> list[list[list[int]]]:
        found = critical.found(model.model, batch, step)
        return [sorted(hypothesis.tokens for hypothesis in each) for each in found]

    two = model.pack(task_models.examples_of(model, Shards(folder / NAME), NAME)[1:3])
    assert tokens(two, 3) == tokens(batch, 3)[1:3] != tokens(two, 4)


def test_what_is_rewarded_is_painted_more_often(critical: PaintingCritical, model: LoadedModel, batch: Batch) -> None:
    learning = type(model.model)(model.model.config)
    learning.load_state_dict(model.model.state_dict())
    optimizer, id_range = (
        torch.optim.AdamW(learning.parameters(), lr=1e-3),
        (model.vocab.code_start, model.vocab.bin_start),
    )
    rewards = []
    for step in range(16):
        found = critical.found(learning.eval(), batch, step)
        prepared = critical.rewarded(batch, [[hypothesis.tokens for hypothesis in each] for each in found])
        rewards.append(float(prepared.more[0, 0] / prepared.more[0, 1]))
        loss_M, *_ = learning.train()(prepared.batch, id_range=id_range)
        (100 * (loss_M * prepared.batch.loss_weight).sum() / prepared.counts[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert np.mean(rewards[-4:]) > 1.5 * np.mean(rewards[:4])


@pytest.mark.parametrize(
    "more, message",
    [
        ((), 'criterion.scst_vqgan: want the VQGAN that the codes are of, or "scenes", got none; add'),
        (("criterion.scst_vqgan=v",), "criterion.scst_vqgan v: is not there; want the VQGAN"),
        (("criterion.scst_vqgan=scenes",), "criterion.scst_clip: want weights of CLIP, which reward, got none; add"),
        (("criterion.scst_vqgan=scenes", "criterion.scst_clip=c"), "criterion.scst_clip c: is not there; want weights"),
    ],
)
def test_without_vqgan_or_clip_it_is_one_line_before_a_rank_starts(
    folder: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture
) -> None:
    paths = (f"data.shards={folder / NAME}", f"data.vocab={folder / 'vocab'}")
    assert check_recipe(["1", "finetune-image-gen-stage2-nano", *paths, *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)
    check_sense(recipe_of(folder, *more))  # is planned all the same


def test_vqgan_and_clip_are_on_the_rank_s_own_device_and_scenes_need_no_vqgan(
    model: LoadedModel, folder: Path, tmp_path: Path
) -> None:
    """On a device that no other rank has: here one without values."""
    clip = f"criterion.scst_clip={tiny_clip(tmp_path / 'clip.safetensors')}"
    device = torch.device("meta")
    found = painting_critical(recipe_of(folder, f"criterion.scst_vqgan={folder / 'vqgan'}", clip), model.vocab, device)
    assert found._coder.device == found._clip.device == device
    assert next(found._clip.model.parameters()).device == device
    by_rule = painting_critical(recipe_of(folder, "criterion.scst_vqgan=scenes", clip), model.vocab, device)
    assert isinstance(by_rule._coder, ScenesCoder)


def test_only_pictures_are_rewarded_so(folder: Path) -> None:
    with pytest.raises(ValueError, match="clip_scst rewards pictures, not 'caption'"):
        check_sense(recipe_of(folder, "data.task.name=caption"))
    with pytest.raises(ValueError, match="clip_scst has no labels to smooth"):
        check_sense(recipe_of(folder, "optim.label_smoothing=0.1"))


@pytest.mark.long
def test_a_run_is_rewarded_by_files_and_what_it_paints_is_ranked_by_them(folder: Path, tmp_path: Path) -> None:
    """By the commands, with a VQGAN and a CLIP of random weights."""
    run, files = tmp_path / "run", (folder / "vqgan", tiny_clip(tmp_path / "clip.safetensors"))
    paths = [f"data.shards={folder / NAME}", f"data.vocab={folder / 'vocab'}", f"run_dir={run}"]
    paths += [f"criterion.scst_vqgan={files[0]}", f"criterion.scst_clip={files[1]}"]
    small = ["train.num_steps=2", "train.log_every=1", "batch.global_rows=4", "batch.micro_rows=2"]
    small += ["criterion.scst_beams=2", "data.workers=0", "train.evaluate_every=0"]
    done = subprocess.run(
        [sys.executable, "-m", "ofa_ds.cli", "finetune", "finetune-image-gen-stage2-nano", *paths, *small],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rewards = [value for line in logged for name, value in line.items() if name.endswith("reward")]
    assert rewards and all(-2.5 <= reward <= 2.5 for reward in rewards)
    out = tmp_path / "painted.png"
    asked = ["--task", NAME, "--text", "a red circle", "--samples", "3", "--codes-model", str(files[0])]
    assert main(["generate", str(run), *asked, "--rerank", "clip", "--clip", str(files[1]), "--png", str(out)]) == 0
    told = json.loads((tmp_path / "painted.png.json").read_text())
    found = [sample["similarity"] for sample in told["samples"]]
    assert told["ranked_by"] == "clip" and found == sorted(found, reverse=True) and out.stat().st_size
