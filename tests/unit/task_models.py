"""Shards of a few toy rows of every downstream task, and a small model that is asked about them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from checkpoints import state_of
from tiny_vqgan import tiny_vqgan

from ofa_ds.checkpoint.from_state import write_checkpoint
from ofa_ds.config import BatchConfig, ModelOptions, Recipe, recipe_from_dict, recipe_to_dict
from ofa_ds.convert.architecture import recipe_change
from ofa_ds.data.example import Example
from ofa_ds.data.scenes_tasks import ANSWERS, write_task_scenes
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import load_vocab, train_vocab
from ofa_ds.inference.evaluate import collect
from ofa_ds.inference.loaded_model import LoadedModel
from ofa_ds.model.config import model_config
from ofa_ds.model.ofa import OFA
from ofa_ds.tasks.task import data_config_of, row_texts
from ofa_ds.tasks.task_shards import build_task_shards
from ofa_ds.terms import DOWNSTREAM_TASKS

SIZES = {"image_size": 64, "infill_image_size": 64, "code_image_size": 64, "max_image_size": 64, "augment": "none"}


def build(folder: Path, rows: int, tasks: tuple[str, ...] = DOWNSTREAM_TASKS) -> dict[str, Shards]:
    """folder/TASK for each task, and folder/vocab."""
    texts: list[str] = []
    for task in tasks:
        file = write_task_scenes(folder / "tsv" / task, task, rows, seed=1)
        answers = file.parent / "answers.txt" if task in ANSWERS else None
        build_task_shards(folder / task, task, [file], answers=answers, workers=1)
        shards = Shards(folder / task)
        texts += [text for i in range(rows) for text in row_texts("downstream", shards.row("downstream", i))]
        texts += [f" {answer}" for answer in shards.answers]
    train_vocab([*texts, " yes no maybe positive negative"] * 2, 500, folder / "vocab", num_codes=128, num_bins=65)
    return {task: Shards(folder / task) for task in tasks}


def model_of(folder: Path, task: str = "", **options: object) -> LoadedModel:
    """Untrained, always the same; asked as fine-tuned on `task`, or as pretrained without one."""
    vocab = load_vocab(folder / "vocab")
    recipe = recipe_of(folder, task, **options)
    torch.manual_seed(0)
    config = dataclasses.replace(model_config(recipe, vocab.size), dim=64, ffn_dim=128, init_std=64**-0.5)
    return LoadedModel(model=OFA(config).eval(), vocab=vocab, recipe=recipe)


PAINTING = "text_to_image"


def build_painting(folder: Path, rows: int) -> Path:
    """folder/text_to_image and vocab; vqgan, of as many codes; run, a checkpoint of `painting_model`."""
    build(folder, rows, tasks=(PAINTING,))
    tiny_vqgan(folder / "vqgan")
    saved(painting_model(folder), folder / "run")
    return folder


def painting_model(folder: Path) -> LoadedModel:
    return model_of(folder, PAINTING, max_source_words=64)


def recipe_of(folder: Path, task: str = "", **options: object) -> Recipe:
    data = data_config_of(task or "caption", **SIZES | options)
    if not task:
        data = dataclasses.replace(data, task=type(data.task)())
    data = dataclasses.replace(data, shards=str(folder / (task or "caption")), vocab=str(folder / "vocab"), workers=0)
    return Recipe(model=ModelOptions(preset="nano"), data=data, batch=BatchConfig(global_rows=4, micro_rows=4))


def examples_of(model: LoadedModel, shards: Shards, task: str) -> list[Example]:
    return collect(shards, model.context(shards), [task], 1000)[task]


def learn_by_heart(model: LoadedModel, examples: list[Example], steps: int) -> LoadedModel:
    """The same model after it has learned these examples."""
    learned = OFA(model.model.config)
    learned.load_state_dict(model.model.state_dict())
    batch = model.pack(examples)
    optimizer = torch.optim.AdamW(learned.parameters(), lr=2e-3, betas=(0.9, 0.98))
    for _ in range(steps):
        learned(batch)[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return dataclasses.replace(model, model=learned.eval())


def saved(model: LoadedModel, path: Path) -> Path:
    """A checkpoint of the model's weights and recipe, as `ofa-ds evaluate` and `predict` take it."""
    weights = dict(model.model.named_parameters())
    buffers = {name: each for name, each in model.model.state_dict().items() if name not in weights}
    recipe = recipe_to_dict(model.recipe)
    recipe["model"] |= recipe_change(model.model.config)
    extra = {
        "recipe": recipe_to_dict(recipe_from_dict(recipe)),
        "identity": {"data": None, "vocab": model.vocab.fingerprint},
    }
    detached = {name: each.detach() for name, each in weights.items()}
    state = state_of(detached, kinds=dict.fromkeys(detached, ("weight",)), buffers=buffers, extra=extra)
    write_checkpoint(path, state, ranks=1, stage=0)
    return path
