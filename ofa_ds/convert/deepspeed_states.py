"""What DeepSpeed's own folder and its universal one have in common: model states, counters, loss scale, optimizer.

DeepSpeed's classes are written and read as plain stand-ins under its names: nothing of it is imported or run.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ofa_ds.checkpoint.format import Facts
from ofa_ds.checkpoint.state import TrainingState
from ofa_ds.convert.torch_file import Slot, TorchFile
from ofa_ds.engine.partition import KINDS
from ofa_ds.storage.safetensors_file import whole_numbers

DEEPSPEED_VERSION = "0.19.8"
"""Whose layout is written."""

EXTRA = "ofa_ds_extra"
"""Where `Facts.extra` goes in the model states: DeepSpeed hands unknown keys to its caller."""

_WEIGHTS_ALONE = "`--format huggingface` or `--format fairseq` exports weights alone"
_COUNTERS = ("global_steps", "skipped_steps", "global_samples")
_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")


class LossScaler:
    """Stands in for the one that DeepSpeed pickles: a bag of attributes."""


class DynamicLossScaler(LossScaler):
    """Of fp16."""


class Fragment:
    """Stands in for DeepSpeed's address of a parameter's piece in a flat buffer."""

    def __init__(self, numel: int, start: int) -> None:
        self.numel = numel
        self.start = start


STAND_INS: list[type | tuple[type, str]] = [
    (LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (DynamicLossScaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
]
READABLE = [*STAND_INS, (int, "deepspeed.runtime.zero.config.ZeroStageEnum")]


def find_tag(source: Path, pointer: str) -> Path:
    """The directory with the files: `source`, or the one that its file `pointer` names. Raises ValueError."""
    if not source.is_dir():
        raise ValueError(f"{source}: no such directory")
    if not (source / pointer).is_file():
        return source
    tag = (source / pointer).read_text(encoding="utf-8", errors="replace").strip()
    if not tag or Path(tag).name != tag:
        raise ValueError(f"{source / pointer}: names {tag[:80]!r}, want a directory beside it")
    if not (source / tag).is_dir():
        raise ValueError(f"{source / tag}: no such directory, {source / pointer} names it")
    return source / tag


def open_states(path: Path, *keys: str) -> TorchFile:
    """A file of DeepSpeed's with these keys. Raises ValueError."""
    file = TorchFile(path, READABLE)
    missing = [key for key in keys if not isinstance(file.content, dict) or key not in file.content]
    if missing:
        raise ValueError(f"{path}: has no {', '.join(missing)}: not what DeepSpeed writes here")
    return file


@contextmanager
def one_line(directory: Path) -> Iterator[None]:
    """What trips over content of another form than DeepSpeed's becomes a ValueError that says so."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{directory}: not what DeepSpeed writes: {type(error).__name__} {error}") from error


def plain_name(name: str) -> str:
    return name.removeprefix("module.")


def safe_name(name: str) -> str:
    """A parameter's name as that of a directory. Raises ValueError where it would lead elsewhere."""
    if Path(name).name != name or name.startswith("."):
        raise ValueError(f"{name!r}: not the name of a parameter")
    return name


class ModelStates:
    """The `*_model_states.pt` of a directory: names, shapes, buffers, frozen parameters, counters."""

    def __init__(self, directory: Path, *, by_rank: bool | None = None) -> None:
        """by_rank: whether there is a file a rank (stage 3); None for whichever there are. Raises ValueError."""
        self.directory = directory
        self.by_rank = not (directory / model_file(None)).is_file() if by_rank is None else by_rank
        self._first = open_states(directory / model_file(0 if self.by_rank else None), "module", "buffer_names")
        content = self._content = self._first.content
        self.ranks: int = content["dp_world_size"]
        if content.get("mp_world_size", 1) != 1:
            raise ValueError(f"{self._first.path}: of a model cut into {content['mp_world_size']} parts, want one")
        if not isinstance(content.get("param_shapes"), list):
            raise ValueError(f"{self._first.path}: has no param_shapes, so the optimizer's tensors have no names")
        self.groups = [_shapes(self._first.path, group) for group in content["param_shapes"]]
        self.buffers = {plain_name(name): tuple(self._module(name).shape) for name in content["buffer_names"]}
        self._buffer_names = {plain_name(name): name for name in content["buffer_names"]}
        self.frozen: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[tuple[TorchFile, Tensor]]] = {}
        self._find_frozen()

    def _module(self, name: str) -> Tensor:
        tensor = self._content["module"].get(name)
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{self._first.path}: has no tensor {name}")
        return tensor

    def _find_frozen(self) -> None:
        """What no optimizer owns: pieces of every rank at stage 3, else whole tensors of the module."""
        content = self._content
        if not self.by_rank:
            known = {name for group in self.groups for name in group} | set(content["buffer_names"])
            known |= set(content.get("shared_params") or {})
            for name, tensor in content["module"].items():
                if name not in known and isinstance(tensor, Tensor):
                    self.frozen[plain_name(name)] = tuple(tensor.shape)
                    self._pieces[plain_name(name)] = [(self._first, tensor)]
            return
        shapes = content.get("frozen_param_shapes") or {}
        self.frozen = {plain_name(name): shape for name, shape in _shapes(self._first.path, shapes).items()}
        for rank in range(self.ranks if shapes else 0):
            file = open_states(self.directory / model_file(rank), "frozen_param_fragments") if rank else self._first
            fragments = file.content["frozen_param_fragments"]
            for name in shapes:
                want = -(-math.prod(shapes[name]) // self.ranks)
                if fragments[name].numel() != want:
                    raise ValueError(f"{file.path}: {fragments[name].numel()} elements of {name}, want {want}")
                self._pieces.setdefault(plain_name(name), []).append((file, fragments[name]))
            if rank:
                file.content = None  # thousands of names and placeholders a rank

    def read_frozen(self, name: str, start: int, numel: int) -> Tensor:
        """Elements start : start + numel: fp32 [numel]. Padding follows a piece only at the end of the tensor."""
        result, done = torch.empty(numel), 0
        part = self._pieces[name][0][1].numel()
        while done < numel:
            rank, within = divmod(start + done, part)
            file, piece = self._pieces[name][rank]
            count = min(part - within, numel - done)
            result[done : done + count] = file.read(piece, within, count)
            done += count
        return result

    def buffer(self, name: str) -> Tensor:
        """Whole, a copy."""
        return self._module(self._buffer_names[name]).clone()

    def facts(self, *, adam_step: int, scaler: Any, origin: dict[str, Any]) -> Facts:
        return facts_of(self._first, adam_step=adam_step, scaler=scaler, origin=origin)


def facts_of(file: TorchFile, *, adam_step: int, scaler: Any, origin: dict[str, Any]) -> Facts:
    """Counters of model states as `Engine.counters` gives them; `origin` is kept among the extra facts."""
    state: dict[str, Any] = {"adam_step": adam_step}
    state |= {key: file.content[key] for key in _COUNTERS}
    found = vars(scaler) if isinstance(scaler, LossScaler) else {}
    state["loss_scaler"] = {key: found[key] for key in _SCALER_STATE if key in found}
    extra = file.content.get(EXTRA, {})
    try:
        whole_numbers([file.content[key] for key in _COUNTERS])
        json.dumps([state, extra, origin], allow_nan=False)  # what a manifest can hold
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file.path}: its counters: {error}") from error
    return Facts(step=state["global_steps"], state=state, rng_ranks=0, extra={**extra, "origin": origin})


def _shapes(path: Path, shapes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    try:
        return {name: tuple(whole_numbers(list(shape))) for name, shape in shapes.items()}
    except ValueError as error:
        raise ValueError(f"{path}: shapes of parameters: {error}") from error


def model_file(rank: int | None) -> str:
    """Name of the model states; of a rank's at stage 3."""
    return "mp_rank_00_model_states.pt" if rank is None else f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def origin_of(stage: int, ranks: int, group: Mapping[str, Any]) -> dict[str, Any]:
    """What is worth keeping of where a state comes from: also Adam's hyperparameters, which DeepSpeed files hold."""
    optimizer = {key: group[key] for key in _HYPERPARAMETERS if key in group}
    if "betas" in optimizer:
        optimizer["betas"] = list(optimizer["betas"])
    return {"format": "deepspeed", "stage": stage, "ranks": ranks, "optimizer": optimizer}


def step_of(path: Path, state: Mapping[str, Any], group: Mapping[str, Any]) -> int:
    """Adam's step of one flat tensor; 0 where there is no state. Raises ValueError: moments without a step."""
    step = state.get("step", group.get("step"))
    if step is None and state:
        raise ValueError(f"{path}: the optimizer has moments and no step")
    return int(step or 0)


def param_group(facts: Facts) -> dict[str, Any]:
    """A parameter group for torch's AdamW and DeepSpeed's alike, which take all hyperparameters from the file.

    Raises ValueError where the state does not say what they were.
    """
    optim = facts.extra.get("recipe", {}).get("optim", {})
    found = {"lr": optim["peak_lr"], **optim} if "peak_lr" in optim else {}
    found = found or facts.extra.get("origin", {}).get("optimizer", {})
    missing = [key for key in _HYPERPARAMETERS if key not in found]
    if missing:
        raise ValueError(
            f"the checkpoint has no {', '.join(missing)} of AdamW (extra.recipe.optim), which DeepSpeed needs; "
            + _WEIGHTS_ALONE
        )
    return {
        **{key: found[key] for key in _HYPERPARAMETERS}, "betas": tuple(found["betas"]), "bias_correction": True,
        "amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False,
        "fused": True, "decoupled_weight_decay": True,
    }  # fmt: skip


def has_moments(state: TrainingState) -> bool:
    """Whether it was trained. Raises ValueError where some parameters have moments and others none."""
    lacking = [name for name, info in state.tensors.items() if info.trainable and info.kinds[:3] != KINDS]
    stepped = counters_of(state.facts)["adam_step"] > 0
    if stepped == (not lacking):
        return stepped
    num_trainable = sum(info.trainable for info in state.tensors.values())
    if stepped or len(lacking) < num_trainable:
        raise ValueError(f"the checkpoint has no optimizer moments of {len(lacking)} tensors; {_WEIGHTS_ALONE}")
    return False


def counters_of(facts: Facts) -> dict[str, Any]:
    """Step numbers; all 0 where the facts have none, as of a model that this project never trained."""
    return {"adam_step": 0, **dict.fromkeys(_COUNTERS, 0), **facts.state}


def has_loss_scale(facts: Facts) -> bool:
    """Whether there is all of a dynamic loss scale: a state trained in fp16."""
    return all(key in facts.state.get("loss_scaler", {}) for key in _SCALER_STATE)


def loss_scaler(state: Mapping[str, Any], dtype: torch.dtype) -> LossScaler:
    """The object that DeepSpeed puts in place of its own. Raises ValueError: fp16, and no dynamic loss scale saved."""
    if dtype != torch.float16:
        scaler = LossScaler()
        vars(scaler).update(cur_scale=1.0, dynamic=False)
        return scaler
    saved = state.get("loss_scaler", {})
    missing = [key for key in _SCALER_STATE if key not in saved]
    if missing:
        raise ValueError(
            f"the checkpoint has no {', '.join(missing)} of a dynamic loss scale: not trained in fp16; "
            "export it as bf16 or fp32"
        )
    scaler = DynamicLossScaler()
    # What is not saved state: as in ds_configs/zero3_fp16.json.
    vars(scaler).update(
        cur_scale=saved["cur_scale"], dynamic=True, cur_iter=saved["cur_iter"],
        last_overflow_iter=saved["last_overflow_iter"], scale_factor=2.0, scale_window=128, min_scale=1,
        delayed_shift=1, cur_hysteresis=saved["cur_hysteresis"], consecutive_hysteresis=False,
        raise_error_at_min_scale=True, dtype=torch.float16,
    )  # fmt: skip
    return scaler


def ds_config(stage: int, dtype: torch.dtype) -> dict[str, Any]:
    """The part of DeepSpeed's configuration that decided the layout."""
    return {
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }


def model_states(
    state: TrainingState,
    *,
    ranks: int,
    module: Mapping[str, Slot],
    groups: list[list[str]],
    frozen: Mapping[str, Slot],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """Content of a `*_model_states.pt`. module: parameters; the buffers are added. groups: trainable names."""
    counters = counters_of(state.facts)
    shapes = {name: torch.Size(info.shape) for name, info in state.tensors.items()}
    return {
        "module": OrderedDict([*module.items(), *((name, buffer_slot(state, name)) for name in state.buffers)]),
        "buffer_names": list(state.buffers),
        "optimizer": None,
        "param_shapes": [OrderedDict((name, shapes[name]) for name in group) for group in groups],
        "frozen_param_shapes": OrderedDict((name, shapes[name]) for name in frozen),
        "shared_params": {},
        "frozen_param_fragments": OrderedDict(frozen),
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        **{key: counters[key] for key in _COUNTERS},
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": dict(config),
        "ds_version": DEEPSPEED_VERSION,
        EXTRA: state.facts.extra,
    }


def buffer_slot(state: TrainingState, name: str) -> Slot:
    tensor = state.buffer(name)
    return Slot(tuple(tensor.shape), tensor.dtype, lambda start, numel: tensor.reshape(-1)[start : start + numel])


def whole_slot(state: TrainingState, name: str, kind: str, dtype: torch.dtype = torch.float32) -> Slot:
    """A parameter's tensor in its shape."""
    return Slot(state.tensors[name].shape, dtype, _reader(state, name, kind))


def _reader(state: TrainingState, name: str, kind: str) -> Callable[[int, int], Tensor]:
    return lambda start, numel: state.read(name, kind, start, numel)


class FlatPiece(NamedTuple):
    """Elements start : start + numel of a parameter in a flat tensor, where they take `padded` elements."""

    name: str
    start: int
    numel: int
    padded: int


def flat_slot(state: TrainingState, kind: str, pieces: Sequence[FlatPiece], size: int | None = None) -> Slot:
    """A flat fp32 tensor of these pieces, one after the other; `size` elements with the padding at its end."""
    ends = list(itertools.accumulate(piece.padded for piece in pieces))
    total = (ends[-1] if ends else 0) if size is None else size

    def read(start: int, numel: int) -> Tensor:
        result = torch.zeros(numel)
        for index in range(bisect.bisect_right(ends, start), len(pieces)):
            piece, begin = pieces[index], ends[index] - pieces[index].padded
            if begin >= start + numel:
                break
            low, high = max(start, begin), min(start + numel, begin + piece.numel)
            if high > low:
                result[low - start : high - start] = state.read(piece.name, kind, piece.start + low - begin, high - low)
        return result

    return Slot((total,), torch.float32, read)


def step_tensor(step: int) -> Slot:
    """Adam's step as torch's AdamW keeps it."""
    return Slot((), torch.float32, lambda start, numel: torch.full((numel,), float(step)))
