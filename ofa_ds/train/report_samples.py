"""Pictures of what the model generates, in the middle of a run."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np

from ofa_ds.config import Recipe
from ofa_ds.engine.engine import Engine
from ofa_ds.inference.answers import sample_cards
from ofa_ds.inference.loaded_model import LoadedModel, dtype_for
from ofa_ds.inference.painting import that_paints
from ofa_ds.model.config import model_config
from ofa_ds.model.ofa import OFA
from ofa_ds.train.loader import Loader
from ofa_ds.train.report import MetricsWriter

SEARCHED_ROWS = 200_000
"""Of each family, among which a row is looked for to show: training waits meanwhile."""


def show_samples(engine: Engine, recipe: Recipe, loader: Loader, writer: MetricsWriter | None, step: int) -> None:
    """A picture per task of what the model generates, by a whole copy of it on rank 0."""
    weights = engine.full_weights()
    if writer is None or weights is None:
        return
    config = dataclasses.replace(model_config(recipe, loader.vocab.size), activation_checkpointing=False)
    model = OFA(config)
    model.load_state_dict(weights)
    model = model.to(dtype_for("auto", engine.device)).to(engine.device)
    loaded = LoadedModel(model=model.eval(), vocab=loader.vocab, recipe=recipe, step=step)
    if recipe.train.codes_model:
        try:
            loaded = that_paints(loaded, Path(recipe.train.codes_model))
        except (ValueError, OSError) as error:
            print(f"train.codes_model: image codes of step {step} have some colour each: {error}", file=sys.stderr)
    try:
        for task, card in sample_cards(loaded, loader.shards, max_rows=SEARCHED_ROWS).items():
            writer.picture(step, f"sample/{task}", np.asarray(card.convert("RGB")))
    except (ValueError, OSError) as error:  # a row that cannot be shown is no reason to stop
        print(f"no pictures of step {step}: {error}", file=sys.stderr)
