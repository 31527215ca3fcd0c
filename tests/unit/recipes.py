"""What tests of recipes share: every key there is, any text, and the line of a refusal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from ofa_ds.config import Recipe, load_recipe
from ofa_ds.config.sections import keys_of


def leaves(kind: Any = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, type) of every single value of a recipe."""
    for name, each in keys_of(kind).items():
        if keys_of(each) is None:
            yield f"{prefix}{name}", each
        else:
            yield from leaves(each, f"{prefix}{name}.")


PATHS = [
    "run_dir", "deepspeed", "data.shards", "data.vocab", "data.heldout", "criterion.scst_document_frequency",
    "criterion.scst_vqgan", "criterion.scst_clip",
    "train.init_from", "train.best_metric", "train.wandb", "train.calibration", "train.codes_model",
]  # fmt: skip
"""Keys whose value is any text."""
TEXT = st.text(min_size=1, max_size=30).filter(lambda text: text.strip() and "\0" not in text)


def problem(*overrides: str, recipe: str | Path = "pretrain-nano") -> str:
    """The one line that refuses them."""
    with pytest.raises(ValueError, match=".") as caught:
        load_recipe(recipe, overrides)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600
    return text
