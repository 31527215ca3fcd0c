"""The model of a recipe. Sizes, switches and presets are declared with the rest of a recipe, in `ofa_ds.config`."""

from __future__ import annotations

from ofa_ds.config import Recipe
from ofa_ds.config.architecture import (
    MAX_TOKEN_DISTANCE,
    PRESETS,
    VOCAB_SIZE,
    Backbone,
    ConvConfig,
    ModelConfig,
    ResNetConfig,
    ViTConfig,
    backbone_from,
    preset,
)

__all__ = [
    "MAX_TOKEN_DISTANCE", "PRESETS", "VOCAB_SIZE", "Backbone", "ConvConfig", "ModelConfig", "ResNetConfig", "ViTConfig",
    "backbone_from", "model_config", "preset",
]  # fmt: skip


def model_config(recipe: Recipe, vocab_size: int) -> ModelConfig:
    """The preset, with the recipe's changes and regularisation. Raises ValueError for a vocabulary without entries."""
    options = recipe.model
    return preset(
        options.preset,
        **options.change,
        vocab_size=vocab_size,
        dropout=options.dropout,
        attention_dropout=options.attention_dropout,
        drop_path=options.drop_path,
        activation_checkpointing=options.activation_checkpointing,
        batch_norm="frozen" if "backbone_norms" in recipe.optim.freeze else options.batch_norm,
        pixel_norm=options.pixel_norm,
        code_image_size=recipe.data.code_image_size,
        kernels=recipe.kernels,
    )
