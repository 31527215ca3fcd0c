"""Pictures of what the model generates, in the middle of a run."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path

import numpy as np

from ofa_ds.config import Recipe
from ofa_ds.engine.engine import Engine
from ofa_ds.inference.answers import sample_cards
from ofa_ds.inference.loaded_model import LoadedModel, dtype_for
from ofa_ds.inference.painting import painter
from ofa_ds.model.config import model_config
from ofa_ds.model.ofa import OFA
from ofa_ds.tasks.context import PaintCodes
from ofa_ds.train.loader import Loader
from ofa_ds.train.report import MetricsWriter

SEARCHED_ROWS = 200_000
"""Of each family, among which a row is looked for to show: training waits meanwhile."""


class Samples:
    def __init__(self, engine: Engine, recipe: Recipe, loader: Loader) -> None:
        self._engine, self._recipe, self._loader = engine, recipe, loader

    def show(self, writer: MetricsWriter | None, step: int) -> None:
        """A picture per task of what the model generates, by a whole copy of it on rank 0, which has the writer."""
        engine, loader = self._engine, self._loader
        weights = engine.full_weights()
        if writer is None or weights is None:
            return
        config = dataclasses.replace(model_config(self._recipe, loader.vocab.size), activation_checkpointing=False)
        model = OFA(config)
        model.load_state_dict(weights)
        model = model.to(dtype_for("auto", engine.device)).to(engine.device).eval()
        loaded = LoadedModel(model=model, vocab=loader.vocab, recipe=self._recipe, step=step, paint=self._paint)
        try:
            for task, card in sample_cards(loaded, loader.shards, max_rows=SEARCHED_ROWS).items():
                writer.picture(step, f"sample/{task}", np.asarray(card.convert("RGB")))
        except (ValueError, OSError) as error:  # a row that cannot be shown is no reason to stop
            print(f"no pictures of step {step}: {error}", file=sys.stderr)

    @functools.cached_property
    def _paint(self) -> PaintCodes | None:
        """By train.codes_model, else by the VQGAN that rewards; loaded once. None, which is said, where it is none."""
        recipe = self._recipe
        key = "train.codes_model" if recipe.train.codes_model else "criterion.scst_vqgan"
        vqgan = recipe.train.codes_model or recipe.criterion.scst_vqgan
        if not vqgan:
            return None
        try:
            vocab, side = self._loader.vocab, recipe.data.code_image_size
            return painter(Path(vqgan), vocab, side, self._engine.device)
        except (ValueError, OSError) as error:
            print(f"{key}: image codes have some colour each: {error}", file=sys.stderr)
            return None
