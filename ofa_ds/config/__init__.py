"""A run is one TOML recipe: frozen, typed, strict, the model's sizes included.

schema: the sections of a recipe. architecture: sizes and switches of the model. recipe: a file with overrides, read.
saved: a recipe written and read again, by whatever version wrote it. values: the types of single values.
"""

from ofa_ds.config.architecture import KernelConfig
from ofa_ds.config.recipe import changed_recipe, find_recipe, load_recipe, shipped_recipes
from ofa_ds.config.saved import recipe_from_dict, recipe_to_dict, recipe_to_toml
from ofa_ds.config.schema import (
    BatchConfig,
    CriterionConfig,
    DataConfig,
    DataSet,
    MixConfig,
    ModelOptions,
    OptimConfig,
    Recipe,
    TaskOptions,
    TrainConfig,
)

__all__ = [
    "BatchConfig", "CriterionConfig", "DataConfig", "DataSet", "KernelConfig", "MixConfig", "ModelOptions",
    "OptimConfig", "Recipe", "TaskOptions", "TrainConfig", "changed_recipe", "find_recipe", "load_recipe",
    "recipe_from_dict", "recipe_to_dict", "recipe_to_toml", "shipped_recipes",
]  # fmt: skip
