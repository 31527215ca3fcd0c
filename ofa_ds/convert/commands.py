"""Import and export of whole checkpoints: finding the format out, files beside the weights, everything or nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ofa_ds.checkpoint.format import MANIFEST, TensorInfo
from ofa_ds.checkpoint.from_state import write_checkpoint
from ofa_ds.checkpoint.loading import open_checked, open_stream
from ofa_ds.checkpoint.runs import find, step_directories
from ofa_ds.checkpoint.state import ForeignState, Reader
from ofa_ds.config import Recipe, recipe_from_dict, recipe_to_dict
from ofa_ds.convert import port
from ofa_ds.convert.architecture import architecture
from ofa_ds.convert.foreign import Options, official_state, recipe_of, to_state
from ofa_ds.convert.formats import TABLE, Beside, StateFormat, Target, WeightsFormat, those_here
from ofa_ds.convert.operations import grow_vocabulary, resize_image_positions
from ofa_ds.convert.port_config import is_official
from ofa_ds.convert.weights import Weight, Weights
from ofa_ds.data import kept_vocabulary
from ofa_ds.data.vocab import Vocab, load_vocab
from ofa_ds.data.vocab_files import write_files
from ofa_ds.engine.partition import AVERAGE
from ofa_ds.model.config import ModelConfig, model_config
from ofa_ds.storage.atomic import check_space, new_directory, new_file, refuse_inside
from ofa_ds.terms import FORMATS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def detect(source: Path) -> str:
    """The format of a file or folder. Raises ValueError where it is none that is known."""
    if source.suffix == ".safetensors":
        raise ValueError(f"{source}: give its folder, where the {port.CONFIG} is")
    if not source.exists():
        raise ValueError(f"{source}: no such file or directory")
    if source.is_dir() and ((source / MANIFEST).exists() or step_directories(source)):
        raise ValueError(f"{source}: is a checkpoint of ofa-ds already; see ofa-ds checkpoint export and reshard")
    found = those_here(source)
    if len(found) > 1:
        raise ValueError(f"{source}: holds {' and '.join(found)} both; say which is meant: --format {found[0]}")
    if not found:
        raise ValueError(f"{source}: in none of the formats {', '.join(FORMATS)}; say which with --format")
    return found[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """How an import is to go, beside from where to where."""

    format: str | None = None
    """One of terms.FORMATS; None finds it out."""
    options: Options = Options()
    vocab: Path | None = None
    """The vocabulary's directory; by default the files in the source folder, where there are some."""
    grow_vocab: int | None = None
    image_positions: int | None = None
    ranks: int = 1
    stage: int = 3


def read_foreign(source: Path) -> tuple[ForeignState, ModelConfig, str]:
    """(the training state of another program's file or folder, the model it is of, the format's name).

    Nothing is read yet but names and sizes. Raises ValueError, one line, as `import_checkpoint` does.
    """
    kind = detect(source)
    state, config, _, _ = _read(kind, source, Options())
    return state, config, kind


def import_checkpoint(source: Path, destination: Path, plan: ImportPlan) -> dict[str, Any]:
    """Write a checkpoint of ours from another program's. Returns facts for the user: format, preset, parameters.

    Raises ValueError, one line, where anything is missing, left over or unknown; `destination` then does not exist.
    """
    kind = plan.format or detect(source)
    state, config, origin, data = _read(kind, source, plan.options)
    if plan.grow_vocab is not None:  # the configuration first: it says what is too large to be tried
        config = dataclasses.replace(config, vocab_size=plan.grow_vocab)
        state = grow_vocabulary(state, plan.grow_vocab)
    if plan.image_positions is not None:
        config = dataclasses.replace(config, image_bucket_size=plan.image_positions)
        state = resize_image_positions(state, plan.image_positions)
    vocab = _vocabulary(plan.vocab, source, config)
    known = state.facts.extra
    recipe = known["recipe"] if _fits(known, config) else recipe_to_dict(recipe_of(config, data))
    identity = dict(known.get("identity") or {"data": None, "vocab": None})
    if vocab is not None:
        recipe["data"]["vocab"], identity["vocab"] = str(vocab[0].resolve()), vocab[1].fingerprint
    elif "recipe" not in known:
        recipe["data"]["vocab"] = ""
    extra = {**known, "recipe": recipe, "identity": identity, "origin": {"format": kind, **origin}}
    state = dataclasses.replace(state, facts=dataclasses.replace(state.facts, extra=extra))
    write_checkpoint(destination, state, ranks=plan.ranks, stage=plan.stage)
    if vocab is not None:
        kept_vocabulary.keep(destination.resolve().parent, vocab[0], vocab[1].fingerprint)
    parameters = sum(info.numel for info in state.tensors.values())
    return {"format": kind, "preset": recipe["model"]["preset"], "parameters": parameters, "path": str(destination)}


def _read(
    kind: str, source: Path, options: Options
) -> tuple[ForeignState, ModelConfig, dict[str, Any], Mapping[str, Any]]:
    """(state, its model, what to remember of where it comes from, fields of DataConfig that the source tells)."""
    known = TABLE[kind]
    if isinstance(known, StateFormat):
        state, config = official_state(known.read(source), str(source), options)
        return state, config, state.facts.extra.get("origin", {}), {}
    foreign = known.read(source)
    state, config = to_state(foreign, options)
    return state, config, {"num_updates": foreign.num_updates}, foreign.data


def _fits(extra: Mapping[str, Any], config: ModelConfig) -> bool:
    """Whether the recipe that came with a state (one of our own exports) is of this model."""
    if "recipe" not in extra:
        return False
    return architecture(model_config(recipe_from_dict(extra["recipe"]), config.vocab_size)) == architecture(config)


def _vocabulary(given: Path | None, source: Path, config: ModelConfig) -> tuple[Path, Vocab] | None:
    """The vocabulary that goes with a model; None where there are no files. Raises ValueError where sizes differ."""
    where = given
    if where is None and source.is_dir() and any((source / name).is_file() for name in ("vocab.json", "vocab.txt")):
        where = source
    if where is None:
        return None
    vocab = load_vocab(where)
    if vocab.size != config.vocab_size:
        if given is None:
            return None  # a tokenizer without codes and bins, as the 6B's: the user says which vocabulary it is
        raise ValueError(f"{where}: a vocabulary of {vocab.size} entries, the model has {config.vocab_size} rows")
    return where, vocab


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """How an export is to go, beside from where to where."""

    format: str
    dtype: str = "float32"
    """Of the exported weights; float32 loses nothing."""
    use_ema: bool = False
    """Export the moving average in the place of the weights."""
    ranks: int | None = None
    """Of a DeepSpeed folder; None: as in the checkpoint. So is `stage`."""
    stage: int | None = None
    sub_group_size: int = 10**9
    """Of the engine that will load a DeepSpeed folder at stage 3, in elements."""
    vocab: Path | None = None
    """The vocabulary's directory; None: the one that the run keeps."""


def export_checkpoint(source: Path, destination: Path, plan: ExportPlan) -> dict[str, Any]:
    """Write another program's format from a checkpoint, or the newest one of a run. Checks every byte that it reads.

    Raises ValueError or OSError, one line; `destination` then does not exist.
    """
    refuse_inside(destination, source, find(source))
    kind = TABLE[plan.format]
    if isinstance(kind, StateFormat):
        return _export_training(open_checked(source), destination, plan, kind)
    with open_stream(source, ("weight", AVERAGE)) as reader:
        return _export_weights(reader, destination, plan, kind)


def _export_weights(reader: Reader, destination: Path, plan: ExportPlan, kind: WeightsFormat) -> dict[str, Any]:
    recipe, config = _model_of(reader)
    vocab = None if kind.is_file else _tokenizer(reader, recipe, plan)
    weights = _weights(reader, DTYPES[plan.dtype], "ema" if plan.use_ema else "weight")
    size = sum(weight.numel * weight.dtype.itemsize for weight in weights.values())
    average = None
    if kind.is_file and reader.has_average and not plan.use_ema:
        average = _weights(reader, DTYPES[plan.dtype], "ema")
    beside = Beside(average, reader.facts.state.get("adam_step", 0), recipe.data.image_size)
    with new_file(destination) if kind.is_file else new_directory(destination) as partial:
        if kind.is_file:
            check_space(partial.parent, size * (1 if average is None else 2), 1)
        else:
            check_space(partial, size, 16)
        kind.write(partial, config, weights, beside)
        if vocab is not None:
            write_files(partial, vocab.files, vocab.fingerprint)
    notes = [] if is_official(config) else ["its stem is not one of OFA's: only ofa-ds can build this model"]
    if vocab is None and not kind.is_file:
        notes.append("without a tokenizer: the checkpoint came without a vocabulary; --vocab DIR adds one")
    return {"path": str(destination), "format": plan.format, "step": reader.facts.step, "notes": notes}


def _export_training(reader: Reader, destination: Path, plan: ExportPlan, kind: StateFormat) -> dict[str, Any]:
    ranks, stage = plan.ranks or reader.layout.world_size, plan.stage or reader.manifest.zero_stage or 1
    kind.write(reader, destination, Target(ranks, stage, DTYPES[plan.dtype], plan.sub_group_size))
    notes = [f"for stage {stage} on {ranks} ranks in {plan.dtype}"] if kind.is_for_target else []
    if reader.has_average:
        notes.append("without the moving average, which DeepSpeed's files have no place for")
    return {"path": str(destination), "format": plan.format, "step": reader.facts.step, "notes": notes}


def _model_of(reader: Reader) -> tuple[Recipe, ModelConfig]:
    embedding = reader.tensors.get("encoder.embed_tokens.weight")
    if embedding is None or "recipe" not in reader.facts.extra:
        raise ValueError(
            f"{reader.directory}: is not of an OFA that a recipe describes; it can be exported to deepspeed only"
        )
    recipe = recipe_from_dict(reader.facts.extra["recipe"])
    return recipe, model_config(recipe, embedding.shape[0])


def _weights(reader: Reader, dtype: torch.dtype, kind: str) -> Weights:
    """Parameters (in `dtype`) and buffers (in their own) by official name. Raises ValueError: there is no such kind."""
    if kind == "ema" and not reader.has_average:
        raise ValueError(f"{reader.directory}: has no moving average")

    def parameter(name: str, info: TensorInfo) -> Weight:
        own = kind if kind in info.kinds else "weight"
        return Weight(info.shape, dtype, lambda start, n: _fitting(reader.read(name, own, start, n), name, dtype))

    weights = {name: parameter(name, info) for name, info in reader.tensors.items()}
    for name in reader.buffers:
        averaged = kind == "ema" and name in reader.ema_buffers
        weights[name] = Weight.of(reader.ema_buffer(name) if averaged else reader.buffer(name))
    return weights


def _fitting(piece: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """The piece in `dtype`. Raises ValueError where a weight that is finite would become infinite."""
    cut = piece.to(dtype)
    if dtype == torch.float16 and not torch.equal(torch.isfinite(cut), torch.isfinite(piece)):
        largest = piece[torch.isfinite(piece)].abs().max().item()
        raise ValueError(f"{name} has {largest:.3g}, float16 ends at 65504; use --dtype bfloat16 or float32")
    return cut


def _tokenizer(reader: Reader, recipe: Recipe, plan: ExportPlan) -> Vocab | None:
    """The vocabulary whose files go beside the weights.

    Raises ValueError: the checkpoint has a vocabulary and it cannot be found: an export without would be half of one.
    """
    fingerprint = reader.facts.extra.get("identity", {}).get("vocab")
    found = kept_vocabulary.find(
        reader.directory, fingerprint=fingerprint, recipe_path=recipe.data.vocab, given=plan.vocab
    )
    return None if found is None else found[1]
