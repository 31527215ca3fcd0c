"""A run is one TOML recipe: frozen, typed, strict. `load_recipe` reads it and applies KEY=VALUE overrides."""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator
from pydantic.dataclasses import dataclass

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from ofa_ds.terms import FAMILIES

RECIPES = Path(__file__).parent / "recipes"

_STRICT = ConfigDict(extra="forbid", validate_default=True)
_EXTENDS = "extends"
_MAX_EXTENDS = 8


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ModelOptions:
    preset: str = "tiny"
    """Architecture: nano, tiny, medium, base, large, huge, 6b, ... (`ofa_ds.model.config.preset`)."""
    change: dict[str, Any] = Field(default_factory=dict)
    """Fields of `ofa_ds.model.config.ModelConfig` that differ from the preset's, for a model of other sizes."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """On embeddings and on the output of attention and feed-forward blocks."""
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    """On attention probabilities."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Rate of the last layer of each stack; grows linearly from 0; drawn per example."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward instead of keeping its activations."""
    batch_norm: Literal["frozen", "batch", "sync"] = "batch"
    """ResNet statistics: from the buffers, from this rank's images, or from the images of all ranks."""


Kernel = Literal["auto", "triton", "torch"]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class KernelConfig:
    """auto: Triton on a GPU where it pays, torch elsewhere; triton: always; torch: never."""

    attention: Kernel = "auto"
    layer_norm: Literal["auto", "triton", "torch", "apex"] = "auto"
    cross_entropy: Kernel = "auto"
    deterministic: bool = True
    """Gradients of the relative tables with the same bits in every run; false is faster."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class MixConfig:
    """Rows drawn from each family, relative to each other; a family the shards lack is left out."""

    vision_language: int = Field(8, ge=0)
    text: int = Field(2, ge=0)
    image: int = Field(1, ge=0)
    detection: int = Field(1, ge=0)

    @model_validator(mode="after")
    def _something(self) -> MixConfig:
        if not any(self.weights().values()):
            raise ValueError("data.mix has only zeros; give at least one family a positive weight")
        return self

    def weights(self) -> dict[str, int]:
        """Weight per family, in the order of FAMILIES."""
        return {family: getattr(self, family) for family in FAMILIES}


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    shards: str = ""
    """Directory made by `ofa-ds shards build`."""
    vocab: str = ""
    """Directory of a vocabulary: `ofa-ds vocab train`'s, or OFA's own files."""
    image_size: int = Field(384, ge=16)
    """Side of the pictures of vision-language rows, in pixels."""
    infill_image_size: int = Field(256, ge=16)
    """Side of the pictures of image-infilling and detection rows, in pixels."""
    code_image_size: int = Field(128, ge=8, multiple_of=8)
    """Side of the central square that image codes describe, in pixels; one code per 8 x 8."""
    max_image_size: int = Field(512, ge=16)
    """Divisor that turns pixels into coordinate bins (docs/ofa.md, Tasks: bins)."""
    sample_patches: int = Field(196, ge=0)
    """Patches kept of each vision-language picture, drawn without replacement; 0 keeps all."""
    augment: Literal["ofa", "none"] = "ofa"
    """`ofa`: random resize, crop, RandomAugment, scale jitter (docs/ofa.md, Tasks: pictures). `none`: plain resize."""
    max_source_words: int = Field(80, ge=1)
    max_target_words: int = Field(30, ge=1)
    max_text_tokens: int = Field(256, ge=1)
    """Tokens of a text-infilling target."""
    extra_confidence: float = Field(2.0, gt=0)
    """Loss weight of text, image and detection examples (docs/ofa.md, Tasks: text infilling)."""
    mix: MixConfig = MixConfig()
    workers: int = Field(2, ge=0)
    """Processes per rank that prepare batches; 0 prepares them in the training process. Never changes a bit."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class BatchConfig:
    global_rows: int = Field(3072, ge=1)
    """Rows of all families per optimizer step, over all ranks. A vision-language row is two examples, others one."""
    micro_rows: int = Field(12, ge=1)
    """Rows per rank per forward."""

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per rank per optimizer step. Raises ValueError where the numbers do not divide."""
        per_forward = self.micro_rows * world_size
        steps, left = divmod(self.global_rows, per_forward)
        if left or not steps:
            raise ValueError(
                f"batch.global_rows {self.global_rows} is not a multiple of batch.micro_rows {self.micro_rows} x "
                f"{world_size} ranks = {per_forward}; use global_rows {max(steps, 1) * per_forward}, "
                f"or change micro_rows"
            )
        return steps


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class OptimConfig:
    peak_lr: float = Field(1e-4, ge=0)
    end_lr: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    clip_norm: float = Field(5.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Of a moving average of the weights that checkpoints keep beside them; OFA's is 0.9999. 0: none."""

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"want two numbers in [0, 1), got {list(betas)}")
        return betas


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainConfig:
    num_steps: int = Field(1000, ge=0)
    """Optimizer steps; the learning rate reaches optim.end_lr at the last."""
    seed: int = Field(1, ge=0)
    init_from: str = ""
    """A checkpoint, or a run directory, whose weights a new run starts from; without moments, at step 0."""
    accept_changed: tuple[Literal["data", "vocab"], ...] = ()
    """What may differ from the run that is gone on with, whose order of data or meaning of ids then changes midway."""
    log_every: int = Field(10, ge=1)
    save_every: int = Field(1000, ge=1)
    keep: int = Field(3, ge=1)
    """Checkpoints that stay; older ones are deleted."""
    save_in_background: bool = True
    """Training waits only for a copy of its state (as much host memory again), another process writes it."""
    sample_every: int = Field(0, ge=0)
    """Steps between pictures of what the model generates, written to TensorBoard; 0 for none."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Recipe:
    run_dir: str = "runs/ofa"
    """Where checkpoints, metrics.jsonl, TensorBoard files and the resolved recipe go."""
    deepspeed: str = "zero3"
    """A file of ds_configs (by name) or a path: memory layout and precision."""
    model: ModelOptions = ModelOptions()
    kernels: KernelConfig = KernelConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()


def load_recipe(recipe: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a file or a shipped name (`pretrain-nano`), with KEY=VALUE overrides.

    Raises ValueError, one line: unknown recipe or key (with the nearest match), wrong type or range, malformed TOML.
    """
    path = find_recipe(recipe)
    values = _read(path, depth=0)
    for override in overrides:
        _apply(values, override)
    _refuse_unknown(values, Recipe, prefix="", origin=str(recipe))
    try:
        return TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        raise ValueError(f"{recipe}: {_first_problem(error)}") from error


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe given by path or by shipped name."""
    path = Path(recipe)
    if path.suffix == ".toml" or path.is_file():
        if not path.is_file():
            raise ValueError(f"recipe {recipe}: no such file")
        return path
    shipped = RECIPES / f"{recipe}.toml"
    if shipped.is_file():
        return shipped
    names = shipped_recipes()
    raise ValueError(
        f"recipe {recipe}: neither a .toml file nor one of {', '.join(names)}{_nearest(str(recipe), names)}"
    )


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(file.stem for file in RECIPES.glob("*.toml"))


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain nested values, as saved with a run and in each checkpoint."""
    return TypeAdapter(Recipe).dump_python(recipe, mode="json")


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """Inverse of `recipe_to_dict`."""
    try:
        return TypeAdapter(Recipe).validate_python(dict(values))
    except ValidationError as error:
        raise ValueError(f"saved recipe: {_first_problem(error)}") from error


def recipe_to_toml(recipe: Recipe) -> str:
    """The recipe as TOML that `load_recipe` reads back to an equal one."""
    lines: list[str] = []

    def section(name: str, values: dict[str, Any]) -> None:
        if name:
            lines.append(f"\n[{name}]")
        lines.extend(f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict))
        for key, value in values.items():
            if isinstance(value, dict):
                section(f"{name}.{key}".lstrip("."), value)

    section("", recipe_to_dict(recipe))
    return "\n".join(lines) + "\n"


def _read(path: Path, depth: int) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from error
    base = values.pop(_EXTENDS, None)
    if base is None:
        return values
    if depth == _MAX_EXTENDS:
        raise ValueError(f"{path}: more than {_MAX_EXTENDS} recipes extend one another; is there a circle?")
    beside = path.parent / str(base)
    parent = beside if beside.is_file() else find_recipe(base)
    return _merged(_read(parent, depth + 1), values)


def _merged(base: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in extra.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ValueError(f"override {override!r}: want KEY=VALUE, such as optim.peak_lr=2e-4")
    for part in parts[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ValueError(f"override {override!r}: {part} is a value, not a section")
    values[parts[-1]] = _parsed(text)


def _parsed(text: str) -> Any:
    """A TOML value; anything else is taken as a plain string, so that paths need no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _refuse_unknown(values: Mapping[str, Any], cls: type, *, prefix: str, origin: str) -> None:
    known = {field.name: field for field in fields(cls)}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{origin}: unknown key {prefix}{key}{_nearest(key, known)}")
        default = known[key].default
        if is_dataclass(default):
            if not isinstance(value, Mapping):
                raise ValueError(f"{origin}: {prefix}{key} is a section, got {value!r}; want {prefix}{key}.NAME=VALUE")
            _refuse_unknown(value, type(default), prefix=f"{prefix}{key}.", origin=origin)


def _nearest(word: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {match[0]}?" if match else ""


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"]) or "recipe"
    got = problem.get("input")
    shown = "" if isinstance(got, Mapping) or is_dataclass(got) else f", got {_shown(got)}"
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}{shown}"


def _shown(value: Any) -> str:
    return "nan" if isinstance(value, float) and math.isnan(value) else repr(value)
