"""Text to image rewarded by CLIP: rewards, samples, what is learnt from them, and what is refused at start."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import task_models
import torch
from safetensors.torch import save_file

from ofa_ds.batch import Batch
from ofa_ds.cli import main
from ofa_ds.cluster.check_recipe import check_sense
from ofa_ds.config import Recipe, load_recipe
from ofa_ds.data.scenes import COLORS
from ofa_ds.data.shards import Shards
from ofa_ds.inference.loaded_model import LoadedModel
from ofa_ds.train.clip_scst import PaintingCritical, painting_critical
from ofa_ds.vision.clip import new_model
from ofa_ds.vision.clip_files import ClipSizes
from ofa_ds.vision.config import VqganConfig
from ofa_ds.vision.files import save_vqgan
from ofa_ds.vision.scenes_coder import ScenesCoder
from ofa_ds.vision.vqgan import Vqgan

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
    folder = tmp_path_factory.mktemp("rewarded")
    task_models.build(folder, rows=4, tasks=(NAME,))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return task_models.model_of(folder, NAME, max_source_words=64)


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
        ((), "criterion.scst_vqgan: want the VQGAN that the codes are of, got none"),
        (("criterion.scst_vqgan=v",), "criterion.scst_clip: want weights of CLIP, which reward, got none"),
        (("criterion.scst_vqgan=v", "criterion.scst_clip=c"), "v: no VQGAN there"),
    ],
)
def test_without_vqgan_or_clip_it_is_one_line(model: LoadedModel, folder: Path, more: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        painting_critical(recipe_of(folder, *more), model.vocab)
    assert "\n" not in str(error.value)


def test_only_pictures_are_rewarded_so(folder: Path) -> None:
    with pytest.raises(ValueError, match="clip_scst rewards pictures, not 'caption'"):
        check_sense(recipe_of(folder, "data.task.name=caption"))
    with pytest.raises(ValueError, match="clip_scst has no labels to smooth"):
        check_sense(recipe_of(folder, "optim.label_smoothing=0.1"))


@pytest.mark.long
def test_a_run_is_rewarded_by_files_and_what_it_paints_is_ranked_by_them(folder: Path, tmp_path: Path) -> None:
    """By the commands, with a VQGAN and a CLIP of random weights."""
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("CLIP needs open_clip")
    torch.manual_seed(0)
    sizes = {"n_embed": 128, "embed_dim": 8, "z_channels": 8, "ch": 32, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1}
    save_vqgan(Vqgan(VqganConfig(resolution=64, attn_resolutions=(), **sizes)), tmp_path / "vqgan")
    clip = ClipSizes(
        embed_dim=16, image_size=32, patch_size=16, vision_width=64, vision_layers=1, context_length=77,
        vocab_size=49408, text_width=64, text_layers=1,
    )  # fmt: skip
    weights = {name: 0.1 * torch.randn(value.shape) for name, value in new_model(clip).state_dict().items()}
    save_file(weights, tmp_path / "clip.safetensors")
    run, files = tmp_path / "run", (tmp_path / "vqgan", tmp_path / "clip.safetensors")
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
