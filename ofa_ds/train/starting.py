"""The weights that a new run starts from, whoever wrote them: `train.init_from` and what may be changed of them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ofa_ds.checkpoint.format import BEST, MANIFEST
from ofa_ds.checkpoint.loading import open_together, start_at
from ofa_ds.checkpoint.runs import step_directories
from ofa_ds.checkpoint.state import ForeignState, Reader, TrainingState
from ofa_ds.config import Recipe, recipe_from_dict
from ofa_ds.config.values import shown
from ofa_ds.convert.architecture import Shapes, architecture, config_of, recipe_change
from ofa_ds.convert.commands import read_foreign
from ofa_ds.convert.operations import grow_vocabulary, resize_image_positions
from ofa_ds.engine.engine import Engine
from ofa_ds.engine.process_group import together
from ofa_ds.model.config import ModelConfig, model_config

_EMBEDDING = "encoder.embed_tokens.weight"
_GROW, _RESIZE = "grow_vocab", "resize_image_positions"


def start_from(engine: Engine, recipe: Recipe, config: ModelConfig, vocab: str) -> None:
    """Fill the engine with the weights of `train.init_from`; all ranks call it together.

    config: the engine's model. vocab: fingerprint of its vocabulary. Raises ValueError, one line, with the keys that
    differ and what would fit: another model, or another vocabulary.
    """
    source, changes = Path(recipe.train.init_from), recipe.train.init_changes
    state: TrainingState
    if _is_ours(source):
        state = reader = open_together(engine, source)
        where, saved = str(reader.directory), _model_of(reader)
        _check_vocabulary(reader, recipe, vocab)
    else:
        with together(engine.ranks):
            state, saved, kind = read_foreign(source)
            where = f"{source} ({kind})"
    with together(engine.ranks):
        state = _changed(_weights_of(state), config, changes)
    if engine.ranks.rank == 0 and saved is not None:
        _tell_switches(where, saved, config)
    start_at(engine, state, where, lambda found: _way_out(found, config, saved, changes))


def _is_ours(source: Path) -> bool:
    """A checkpoint, a run directory or its pointer."""
    if source.is_file():
        return source.name == BEST
    return (source / MANIFEST).exists() or bool(step_directories(source))


def _model_of(reader: Reader) -> ModelConfig | None:
    """None where the checkpoint does not say what model it is of."""
    embedding = reader.tensors.get(_EMBEDDING)
    if reader.manifest.recipe is None or embedding is None:
        return None
    return model_config(recipe_from_dict(reader.manifest.recipe, str(reader.directory)), embedding.shape[0])


def _check_vocabulary(reader: Reader, recipe: Recipe, vocab: str) -> None:
    """Raises ValueError where the same ids would mean other words."""
    known = reader.manifest.identity.get("vocab")
    if known is None or known == vocab or _GROW in recipe.train.init_changes or "vocab" in recipe.train.accept_changed:
        return
    raise ValueError(
        f"{reader.directory}: was trained with vocabulary {known}, data.vocab={recipe.data.vocab} is {vocab}: its ids "
        f"mean other words; use the vocabulary that the run keeps, train.init_changes='[\"{_GROW}\"]' for one that "
        "only has more entries, or train.accept_changed='[\"vocab\"]' to go on all the same"
    )


def _weights_of(state: TrainingState) -> ForeignState:
    """Without moments and averages, which no new run takes over."""
    return ForeignState(
        tensors={name: dataclasses.replace(info, kinds=("weight",)) for name, info in state.tensors.items()},
        buffers=state.buffers, facts=state.facts, read=state.read, buffer=state.buffer,
    )  # fmt: skip


def _changed(state: ForeignState, config: ModelConfig, changes: tuple[str, ...]) -> ForeignState:
    if _GROW in changes and _EMBEDDING in state.tensors and state.tensors[_EMBEDDING].shape[0] < config.vocab_size:
        state = grow_vocabulary(state, config.vocab_size)
    if _RESIZE in changes:
        state = resize_image_positions(state, config.image_bucket_size)
    return state


def _tell_switches(where: str, saved: ModelConfig, config: ModelConfig) -> None:
    """Of two models with the same weights that are not the same model, what differs."""
    theirs, ours = architecture(saved), architecture(config)
    same = {"code_image_size", "image_bucket_size"}  # the first is the data's, the second shows in the shapes
    other = [f"{key} {shown(theirs[key])} (now {shown(ours[key])})" for key in ours if theirs[key] != ours[key]]
    if other and all(theirs[key] == ours[key] for key in _SIZES):
        told = [text for text in other if text.split(" ")[0] not in same]
        if told:
            print(f"{where}: was made with {', '.join(told)}", file=sys.stderr)


_SIZES = ("dim", "ffn_dim", "num_heads", "encoder_layers", "decoder_layers", "backbone", "use_ofasys")


def _way_out(found: Shapes, config: ModelConfig, saved: ModelConfig | None, changes: tuple[str, ...]) -> str:
    """What to do where names or shapes differ: the recipe that fits, or the change that makes the weights fit."""
    try:
        theirs = saved or config_of(found, {}, "")
    except ValueError:
        return "its tensors are not those of an OFA"
    hints = []
    model = recipe_change(theirs)
    if not _same_but_tables(theirs, config):
        hints.append(f"the recipe that fits has model.preset={model['preset']}{_listed(model['change'])}")
    rows = found.get(_EMBEDDING, (0,))[0]
    if rows != config.vocab_size:
        grow = f", or train.init_changes='[\"{_GROW}\"]' draws what is missing" if rows < config.vocab_size else ""
        hints.append(f"data.vocab has {config.vocab_size} entries, the weights {rows}: use their vocabulary{grow}")
    if theirs.image_bucket_size != config.image_bucket_size and _RESIZE not in changes:
        side, own = theirs.image_bucket_size, config.image_bucket_size
        hints.append(
            f"its tables of image positions are of {side} x {side} patches, the model's of {own} x {own}: "
            f"train.init_changes='[\"{_RESIZE}\"]', or model.change.image_bucket_size={side}"
        )
    return "; ".join(hints) or "use the recipe it was made with"


def _same_but_tables(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether they differ in what can be changed alone."""
    tables = {"image_bucket_size": other.image_bucket_size, "code_image_size": other.code_image_size}
    return architecture(dataclasses.replace(one, **tables)) == architecture(other)


def _listed(change: Mapping[str, Any]) -> str:
    """As further KEY=VALUE."""
    return "".join(f" model.change.{key}={shown(value)}" for key, value in change.items() if key != "backbone")
