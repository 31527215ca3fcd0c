"""From the tensors of a foreign file to a training state, with every name accounted for."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ofa_ds.checkpoint.format import NO_STEPS, Facts, TensorInfo
from ofa_ds.checkpoint.state import ForeignState
from ofa_ds.config import Recipe, load_recipe, recipe_from_dict, recipe_to_dict, shipped_recipes
from ofa_ds.convert.architecture import architecture, compare, config_of, recipe_change
from ofa_ds.convert.weights import Weight, Weights, recomputed, shapes_of
from ofa_ds.model.config import ModelConfig, model_config
from ofa_ds.model.names import ALIASES, from_port_name, is_recomputed
from ofa_ds.model.ofa import OFA

_WRAPPERS = ("module.", "model.")
_GAMMA = re.compile(r"\.gamma_(self_attn|cross_attn|ffn)$")
_COUNTER = "num_batches_tracked"
_SEED = 1
_EMBEDDING = "encoder.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """What a reader of a foreign format found."""

    origin: str
    """The file, for messages."""
    weights: Weights
    """By the file's own names."""
    hints: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ModelConfig that its configuration tells."""
    ema: Weights | None = None
    """The moving average of all weights, where the file has one."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Fields of DataConfig that it tells, such as image_size."""
    num_updates: int = 0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user allows at an import; by default nothing is filled in or left out."""

    allow_missing: Sequence[str] = ()
    """Patterns of official names that start fresh where the file lacks them."""
    drop: Sequence[str] = ()
    """Patterns of names in the file that are left out."""
    use_ema: bool = False
    """Take the moving average as the weights, as OFA's VQA evaluation does (docs/ofa.md, Foreign files: fairseq)."""


def to_state(foreign: Foreign, options: Options) -> tuple[ForeignState, ModelConfig]:
    """A training state of step 0 under official names, and the model it is of.

    Raises ValueError: names or shapes are not those of an OFA (with both lists), tied matrices or position tables
    differ from what they must be.
    """
    chosen = foreign.weights
    if options.use_ema:
        if foreign.ema is None:
            raise ValueError(f"{foreign.origin}: has no moving average (extra_state.ema) to take")
        chosen = foreign.ema
    weights, extra = _official(chosen, foreign.origin, options.drop)
    shapes = {name: weight.shape for name, weight in weights.items()}
    config = config_of(shapes, foreign.hints, foreign.origin)
    fresh = _fresh(config, compare(shapes, config, foreign.origin, allow_missing=options.allow_missing))
    weights |= fresh
    _check_recomputed(extra, config, foreign.origin)
    parameters, buffers = shapes_of(config)
    average = {}
    if foreign.ema is not None and not options.use_ema:
        average, _ = _official(foreign.ema, f"{foreign.origin}, moving average", options.drop)
        average = fresh | average
        compare({name: weight.shape for name, weight in average.items()}, config, f"{foreign.origin} (ema)")
    facts = Facts(state=dict(NO_STEPS), rng_ranks=0)
    state = ForeignState(
        tensors={
            name: TensorInfo(shape=shape, kinds=("weight", "ema") if name in average else ("weight",))
            for name, shape in parameters.items()
        },
        buffers=buffers,
        ema_buffers={name: shape for name, shape in buffers.items() if name in average},
        facts=facts,
        read=lambda name, kind, start, n: _finite(
            (average if kind == "ema" else weights)[name].fp32(start, n), name, kind, foreign.origin
        ),
        buffer=lambda name: _finite(weights[name].whole(), name, "weight", foreign.origin),
        ema_buffer=lambda name: _finite(average[name].whole(), name, "ema", foreign.origin),
    )
    return state, config


def _finite(piece: Tensor, name: str, kind: str, origin: str) -> Tensor:
    """The piece as it is. Raises ValueError where it holds NaN or Inf: no model is worth going on from that."""
    if piece.is_floating_point() and not torch.isfinite(piece).all():
        raise ValueError(f"{origin}: {name} ({kind}) holds NaN or Inf; take an earlier checkpoint of that training")
    return piece


def _refuse_other_types(weights: Weights, origin: str) -> None:
    """Parameters and statistics are floating-point, counters whole numbers. Raises ValueError for anything else."""
    for name, weight in weights.items():
        if weight.dtype.is_floating_point == name.endswith(_COUNTER):
            want = "whole numbers" if name.endswith(_COUNTER) else "float32, float16, bfloat16 or float64"
            raise ValueError(f"{origin}: {name} holds {str(weight.dtype).removeprefix('torch.')}, want {want}")


def official_state(state: ForeignState, origin: str, options: Options) -> tuple[ForeignState, ModelConfig]:
    """A whole training state under official names, and the model it is of.

    Raises ValueError as `to_state` does; a training state is taken whole, so missing names cannot start fresh.
    """
    if options.allow_missing or options.drop or options.use_ema:
        raise ValueError(f"{origin}: --allow-missing, --drop and --ema are for weights, this is a training state")
    names = {from_port_name(name): name for name in state.tensors}
    buffers = {from_port_name(name): name for name in state.buffers if not is_recomputed(from_port_name(name))}
    shapes = {name: state.tensors[old].shape for name, old in names.items()}
    shapes |= {name: state.buffers[old] for name, old in buffers.items()}
    hints = {}
    if "recipe" in state.facts.extra:
        known = model_config(recipe_from_dict(state.facts.extra["recipe"]), shapes.get(_EMBEDDING, (1,))[0])
        hints = {key: getattr(known, key) for key in architecture(known)}
    config = config_of(shapes, hints, origin)
    compare(shapes, config, origin)
    return dataclasses.replace(
        state,
        tensors={name: state.tensors[old] for name, old in names.items()},
        buffers={name: state.buffers[old] for name, old in buffers.items()},
        read=lambda name, kind, start, numel: _finite(state.read(names[name], kind, start, numel), name, kind, origin),
        buffer=lambda name: _finite(state.buffer(buffers[name]), name, "weight", origin),
    ), config


def _official(weights: Weights, origin: str, drop: Sequence[str]) -> tuple[dict[str, Weight], dict[str, Weight]]:
    """(tensors by official name, tied ones once; the buffers that follow from the configuration)."""
    found: dict[str, Weight] = {}
    for name, weight in weights.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in drop):
            continue
        for wrapper in _WRAPPERS:
            name = name.removeprefix(wrapper)
        name = _GAMMA.sub(r".weight_\1", from_port_name(name))
        if name in found:
            raise ValueError(f"{origin}: holds {name} twice, once under another name")
        found[name] = weight
    for alias, owner in ALIASES.items():
        copy = found.pop(alias, None)
        if copy is None:
            continue
        if owner in found and not copy.equals(found[owner]):
            raise ValueError(f"{origin}: {alias} differs from {owner}; OFA ties them, this file cannot be represented")
        found.setdefault(owner, copy)
    extra = {name: found.pop(name) for name in list(found) if is_recomputed(name)}
    _refuse_other_types(found, origin)
    return found, extra


def _check_recomputed(found: Weights, config: ModelConfig, origin: str) -> None:
    """The bucket tables of a file must be those of its configuration: a good test of both."""
    for name, want in recomputed(config, port=False).items():
        if name.endswith("_rp_bucket") and name in found and not found[name].equals(want):
            raise ValueError(f"{origin}: {name} is not the table of its sizes: another bucket rule, or a damaged file")


def _fresh(config: ModelConfig, names: Sequence[str]) -> dict[str, Weight]:
    """Values that a new model starts with. Builds each module that owns one, and nothing else."""
    if not names:
        return {}
    generator = torch.random.get_rng_state()
    torch.manual_seed(_SEED)
    try:
        with torch.device("meta"):
            model = OFA(config)
        return {name: Weight.of(_initialised(model, name)) for name in names}
    finally:
        torch.random.set_rng_state(generator)


def _initialised(model: OFA, name: str) -> Tensor:
    owner_name, _, last = name.rpartition(".")
    owner: nn.Module = model.get_submodule(owner_name)
    reset = getattr(owner, "reset_parameters", None)
    if last == _COUNTER:
        return torch.zeros((), dtype=torch.int64)
    if last == "c_attn" or last.startswith("weight_"):  # scales start at 1, or at the configuration's gamma
        value = 1.0 if last == "c_attn" else model.config.gamma or 1.0
        return torch.full(getattr(owner, last).shape, value)
    if reset is None:
        raise ValueError(f"{name}: has no initial value of its own; it cannot be missing")
    owner.to_empty(device="cpu")
    reset()
    return getattr(owner, last).detach().clone()


def recipe_of(config: ModelConfig, data: Mapping[str, Any]) -> Recipe:
    """The shipped recipe of the nearest preset, changed to this model: what `evaluate` and `generate` go by."""
    model = recipe_change(config)
    name = model["preset"]
    base = f"pretrain-{name}" if f"pretrain-{name}" in shipped_recipes() else f"pretrain-{name.split('_')[0]}"
    recipe = recipe_to_dict(load_recipe(base))
    recipe["model"] |= model
    recipe["data"] |= {"code_image_size": config.code_image_size, **data}
    sides = ("image_size", "infill_image_size", "max_image_size")  # a coordinate of any picture must have a bin
    recipe["data"]["max_image_size"] = max(recipe["data"][side] for side in sides)
    return recipe_from_dict(recipe)
