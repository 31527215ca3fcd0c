"""From a folder of pictures to a model that paints: the commands of docs/pictures.md, "The whole way", as they stand.

The pictures are drawn scenes, so that what each command has written is known; CLIP and Inception are of random weights.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_inception import random_inception
from safetensors.torch import load_file
from tiny_clip import tiny_clip

from ofa_ds.checkpoint import load_model_weights
from ofa_ds.data import scenes
from ofa_ds.data.scenes import NUM_CODES, SIDE, WHOLE, Draw
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import load_vocab
from ofa_ds.tasks.gallery import SIDE_PIXELS
from ofa_ds.tasks.preview import MARGIN_PIXELS
from ofa_ds.vision.code_rows import TEXT_TO_IMAGE, code_rows
from ofa_ds.vision.files import load_vqgan

PAGE = Path(__file__).parents[2] / "ofa_ds/docs/pictures.md"
STEPS = ("codes scenes", "codes encode", "shards build", "shards split", "vocab train", "finetune", "finetune",
         "generate", "evaluate")  # fmt: skip
FEW = ["train.num_steps=2", "train.log_every=1", "batch.global_rows=4", "batch.micro_rows=4", "data.workers=0"]
SMALL = {"codes encode": ["--workers", "1"], "finetune": FEW}
"""What follows a command of the page here, so that it takes seconds."""
NUM_PICTURES = 64
CELLS = (SIDE // scenes.CELL) ** 2


def taught() -> list[list[str]]:
    """Words of each command of the section, without `ofa-ds`."""
    section = PAGE.read_text(encoding="utf-8").split("## The whole way\n")[1].partition("\n## ")[0]
    lines = re.findall(r"^    (.+)$", section.replace("\\\n", " "), flags=re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in lines]


def name_of(words: list[str]) -> str:
    return " ".join(words[:2]) if words[0] in ("codes", "shards", "vocab") else words[0]


@cache
def drawn() -> dict[str, tuple[np.ndarray, str]]:
    """Pixels and caption, by the name of the file."""
    draw = Draw(1, "train", "photos", 0)
    found = [scenes.any_scene(draw) for _ in range(NUM_PICTURES)]
    return {f"{k:02}.png": (scenes.paint(scene), scenes.caption(scene)) for k, scene in enumerate(found)}


def own_files(folder: Path) -> None:
    """What the page says is the user's own."""
    (folder / "photos").mkdir()
    for name, (pixels, caption) in drawn().items():
        Image.fromarray(pixels).save(folder / "photos" / name)
        (folder / "photos" / name).with_suffix(".txt").write_text(f"{caption}\n")
    torch.save(load_file(tiny_clip(folder / "clip.safetensors")), folder / "ViT-B-16.pt")
    random_inception(folder)


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """(the folder in which all of it ran, what each command printed)."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("Inception needs torch_fidelity")
    folder = tmp_path_factory.mktemp("way")
    own_files(folder)
    printed = []
    for words in taught():
        command = [sys.executable, "-m", "ofa_ds.cli", *words, *SMALL.get(name_of(words), [])]
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        printed.append(done.stdout)
    return folder, printed


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_page_teaches_the_whole_way() -> None:
    assert tuple(name_of(words) for words in taught()) == STEPS


@pytest.mark.long
def test_pictures_become_captions_and_the_codes_of_the_rule(way: tuple[Path, list[str]]) -> None:
    folder, _ = way
    assert load_vqgan(folder / "vqgan").config.n_embed == NUM_CODES
    csv.field_size_limit(1 << 30)
    with (folder / "t2i.tsv").open(newline="") as file:
        rows = {row[0]: row[2:] for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)}
    wanted = {name: (caption, scenes.codes(pixels, WHOLE)) for name, (pixels, caption) in drawn().items()}
    assert rows == {name: [caption, " ".join(map(str, codes))] for name, (caption, codes) in wanted.items()}

    def stored(path: str) -> dict[str, tuple[str, list[int]]]:
        shards = Shards(folder / path)
        texts = [shards.row("downstream", k)["text"] for k in range(shards.families["downstream"])]
        codes = [(row.id, row.codes.tolist()) for row in code_rows(folder / path, TEXT_TO_IMAGE)]
        return {name: (text, each) for text, (name, each) in zip(texts, codes, strict=True)}

    train, heldout = stored("data/split/train"), stored("data/split/heldout")
    assert stored("data/t2i") == wanted == train | heldout
    assert len(train) + len(heldout) == NUM_PICTURES and len(heldout) == 10
    assert load_vocab(folder / "data/vocab").num_codes == NUM_CODES


@pytest.mark.long
def test_a_model_is_fine_tuned_on_them_and_then_rewarded_by_clip(way: tuple[Path, list[str]]) -> None:
    folder, printed = way
    for run, told in zip(("t2i", "rewarded"), printed[5:7], strict=True):
        assert f"done: 2 steps; checkpoint runs/{run}/step_00000002" in told
    losses = [line["loss"] for line in metrics(folder / "runs/t2i") if "loss" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    lines = metrics(folder / "runs/rewarded")
    rewards = [value for line in lines for name, value in line.items() if name.endswith("reward")]
    assert rewards and all(-2.5 <= reward <= 2.5 and reward for reward in rewards)
    first, second = (load_model_weights(folder / "runs" / run) for run in ("t2i", "rewarded"))
    moved = max(float((second[name] - value).abs().max()) for name, value in first.items())
    assert first.keys() == second.keys() and 0 < moved < 1e-2


@pytest.mark.long
def test_what_it_paints_is_ranked_and_drawn(way: tuple[Path, list[str]]) -> None:
    folder, _ = way
    told = json.loads((folder / "painted.png.json").read_text())
    found = [sample["similarity"] for sample in told["samples"]]
    assert told["ranked_by"] == "clip" and found == sorted(found, reverse=True) and len(set(found)) > 1
    assert all(len(sample["codes"]) == CELLS for sample in told["samples"])
    with Image.open(folder / "painted.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    best = scenes.picture_of_codes(told["samples"][0]["codes"])
    best = best.repeat(SIDE_PIXELS // SIDE, 0).repeat(SIDE_PIXELS // SIDE, 1)
    column = pixels[:, MARGIN_PIXELS : MARGIN_PIXELS + SIDE_PIXELS]
    assert any(np.array_equal(column[y : y + SIDE_PIXELS], best) for y in range(len(column) - SIDE_PIXELS))


@pytest.mark.long
def test_it_is_judged_by_clip_and_inception(way: tuple[Path, list[str]]) -> None:
    folder, printed = way
    task = json.loads(printed[-1])["tasks"]["text_to_image"]
    assert task["examples"] == Shards(folder / "data/split/heldout").families["downstream"]
    scores = {name: values["own"] for name, values in task["scores"].items()}
    assert -100 <= scores["CLIP score"] <= scores["CLIP score, best of 4"] <= 100
    assert scores["FID, best of 4"] > 1
    assert scores["Inception score, best of 4"] == pytest.approx(1)  # of ten parts with a picture each
    assert 0 <= scores["equal codes"] <= 1
