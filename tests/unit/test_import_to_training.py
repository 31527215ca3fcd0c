"""Each foreign format on its whole way: written as its own tools write it, imported, verified, drawn, trained on."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ofa_ds.batch import pack
from ofa_ds.cli import main
from ofa_ds.config import DataConfig, ModelOptions, Recipe
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import train_vocab
from ofa_ds.model.config import model_config
from ofa_ds.model.ofa import OFA
from ofa_ds.tasks.context import Context, row_generator
from ofa_ds.tasks.task import examples

ROWS = 4
IMAGES = [{"id": k, "file_name": f"COCO_train2014_{k:012}.jpg", "width": 64, "height": 48} for k in range(ROWS)]
INSTANCES = {
    "images": IMAGES,
    "annotations": [
        {"id": 10 + k, "image_id": k, "category_id": 1 + k % 2, "bbox": [4.5, 6, 30, 20], "iscrowd": 0, "area": 600.0,
         "segmentation": [[4, 6, 34, 6, 34, 26]]} for k in range(ROWS)
    ],
    "categories": [{"id": 1, "name": "cat", "supercategory": "animal"}, {"id": 2, "name": "dog"}],
}  # fmt: skip


def picture(k: int) -> bytes:
    coarse = np.random.default_rng(k).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC).save(out := io.BytesIO(), "JPEG")
    return out.getvalue()


def write(path: Path, content: object) -> str:
    path.write_bytes(pickle.dumps(content, 2) if path.suffix == ".p" else json.dumps(content).encode())
    return str(path)


def coco_captions(folder: Path) -> list[str]:
    found = [{"id": 50 + k, "image_id": k, "caption": f"a cat {k} on a mat"} for k in range(ROWS)]
    return [write(folder / "captions_train2014.json", {"info": {}, "images": IMAGES, "annotations": found})]


def coco_instances(folder: Path) -> list[str]:
    return [write(folder / "instances.json", INSTANCES)]


def vqa_v2(folder: Path) -> list[str]:
    asked = [{"question_id": k * 10, "image_id": k, "question": "What is this?"} for k in range(ROWS)]
    people = [{"answer": "cat", "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]
    told = [{"question_id": k * 10, "image_id": k, "question_type": "what", "answers": people} for k in range(ROWS)]
    questions = {"data_subtype": "train2014", "task_type": "Open-Ended", "questions": asked}
    return [write(folder / "questions.json", questions), write(folder / "annotations.json", {"annotations": told})]


def refcoco(folder: Path) -> list[str]:
    refs = [
        {"ref_id": k, "ann_id": 10 + k, "image_id": k, "category_id": 1, "split": "train", "sent_ids": [k],
         "sentences": [{"tokens": ["left", "cat"], "raw": "Left cat", "sent_id": k, "sent": "left cat"}]}
        for k in range(ROWS)
    ]  # fmt: skip
    return [write(folder / "refs(unc).p", refs), write(folder / "instances.json", INSTANCES)]


def webdataset(folder: Path, end: str = "tar") -> list[str]:
    with tarfile.open(path := folder / f"000000.{end}", "w:gz" if end == "tar.gz" else "w") as file:
        for k in range(ROWS):
            for kind, content in (("jpg", picture(k)), ("txt", b"a cat on a mat"), ("json", b'{"objects": ["cat"]}')):
                info = tarfile.TarInfo(f"{k:09}.{kind}")
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return [str(path)]


def table() -> pa.Table:
    pictures = [{"bytes": picture(k), "path": f"{k}.jpg"} for k in range(ROWS)]
    return pa.table({"image": pictures, "caption": [[f"a cat {k}"] for k in range(ROWS)], "id": list(range(ROWS))})


def parquet(folder: Path) -> list[str]:
    pq.write_table(table(), path := folder / "train-00000-of-00001.parquet", row_group_size=3)
    return [str(path)]


def huggingface(folder: Path) -> list[str]:
    (saved := folder / "saved").mkdir()
    with pa.ipc.new_stream(str(saved / "data-00000-of-00001.arrow"), table().schema) as file:
        file.write_table(table(), 3)
    write(saved / "state.json", {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"})
    return [str(saved)]


SETS = {
    "coco-captions": (coco_captions, "caption"), "coco-instances": (coco_instances, "detection"),
    "vqa-v2": (vqa_v2, "vqa"), "refcoco": (refcoco, "visual_grounding"), "webdataset": (webdataset, "caption"),
    "webdataset.gz": (lambda folder: webdataset(folder, "tar.gz"), "caption"), "parquet": (parquet, "caption"),
    "huggingface": (huggingface, "caption"),
}  # fmt: skip
"""Name, its format before the dot -> (what writes it and gives the sources, a task that its rows train)."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> SimpleNamespace:
    """An untrained nano model, narrow, with what it needs to make examples."""
    texts = [f" what does the image describe? a cat and two dogs on mat {k}" for k in range(100)]
    vocab = train_vocab(texts, 400, folder := tmp_path_factory.mktemp("model") / "vocab", num_codes=64, num_bins=65)
    data = DataConfig(image_size=64, infill_image_size=64, code_image_size=32, sample_patches=16, max_image_size=512)
    negatives = SimpleNamespace(captions=["a red bus."], objects=["bus"], type2ans={"other": ["table", "sky"]})
    context = Context(vocab=vocab, negatives=negatives, config=data, patch_size=16, max_positions=1024)
    torch.manual_seed(0)
    config = model_config(Recipe(model=ModelOptions(preset="nano"), data=data), vocab.size)
    config = dataclasses.replace(config, dim=64, ffn_dim=128, init_std=64**-0.5)
    return SimpleNamespace(ofa=OFA(config), context=context, vocab=folder)


@pytest.mark.parametrize("name", SETS)
def test_a_foreign_data_set_becomes_shards_that_a_model_is_trained_on(name: str, model, tmp_path: Path) -> None:
    make, task = SETS[name]
    form = name.partition(".")[0]
    (pictures := tmp_path / "pictures").mkdir()
    for k in range(ROWS):
        (pictures / f"COCO_train2014_{k:012}.jpg").write_bytes(picture(k))
    images = ["--images", str(pictures)] if form in ("coco-captions", "coco-instances", "vqa-v2", "refcoco") else []
    out = str(tmp_path / "out")
    assert main(["shards", "import", form, *make(tmp_path), *images, "--out", out, "--workers", "1"]) == 0
    assert main(["shards", "verify", out]) == 0
    drawn = tmp_path / "row.png"
    assert main(["shards", "show", out, "--task", task, "--vocab", str(model.vocab), "--png", str(drawn)]) == 0
    assert Image.open(drawn).size[0] > 64

    shards = Shards(Path(out))
    ((family, count),) = ((family, count) for family, count in shards.families.items() if count)
    assert count == ROWS and [shards.row(family, k)["image"] for k in range(ROWS)] == [*map(picture, range(ROWS))]
    made = [
        each for k in range(ROWS)
        for each in examples(family, shards.row(family, k), row_generator(0, family, 0, k), model.context)
    ]  # fmt: skip
    assert task in {each.task for each in made}
    batch = pack(made, sorted({each.image.shape[:2] for each in made if each.image is not None}), 16, 42)
    loss = model.ofa(batch)[0].mean()
    model.ofa.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in model.ofa.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad
    assert torch.isfinite(loss) and model.ofa(batch)[0].mean() < loss
