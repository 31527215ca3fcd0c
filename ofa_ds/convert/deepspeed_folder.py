"""DeepSpeed's own checkpoints (ZeRO stages 1-3): read at any world size, written for one; of stage 0 only read.

    SAVE_DIR/latest                                             name of the tag directory
    SAVE_DIR/global_stepN/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt      fp32 masters and moments, flat
    SAVE_DIR/global_stepN/mp_rank_00_model_states.pt            names, shapes, buffers, counters; at stage 3 one a rank

Stage 3: each group's flat tensor holds ceil(n / ranks) elements of each parameter, padded, in the order of
`param_shapes`. Stages 1 and 2: one flat buffer a group, padded to 2 x ranks, cut evenly; the masters without the
padding, the moments with it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ofa_ds.checkpoint.format import TensorInfo
from ofa_ds.checkpoint.state import ForeignState, TrainingState
from ofa_ds.convert.deepspeed_stage0 import read_stage0
from ofa_ds.convert.deepspeed_states import (
    DEEPSPEED_VERSION,
    STAND_INS,
    FlatPiece,
    Fragment,
    ModelStates,
    counters_of,
    ds_config,
    find_tag,
    flat_slot,
    has_moments,
    loss_scaler,
    model_file,
    model_states,
    one_line,
    open_states,
    origin_of,
    param_group,
    plain_name,
    step_of,
    step_tensor,
    whole_slot,
)
from ofa_ds.convert.torch_file import Slot, save
from ofa_ds.engine.partition import KINDS, MOMENTS, even_range, flat_parts
from ofa_ds.progress import track
from ofa_ds.storage.atomic import check_space, new_directory, sync

_OPTIM_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_BYTES_A_NAME = 2000
_BYTES_A_FILE = 100_000


def read_deepspeed(source: Path) -> ForeignState:
    """The state in DeepSpeed's save directory, or in one of its tag directories. Reads only what is asked for.

    Raises ValueError, one line: a file is missing, damaged, of another world size, or holds foreign classes.
    """
    directory = find_tag(source, "latest")
    with one_line(directory):
        files = _optimizer_files(directory)
        if not files and (directory / model_file(None)).is_file():
            return read_stage0(directory / model_file(None))
        return _Folder(directory, files).state()


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies: element e is in the file of rank (first + e) // part, at offset + (first + e) % part."""

    shape: tuple[int, ...]
    group: int
    first: int
    part: int
    offset: int


class _Folder:
    """A tag directory with all its files open; their tensors are mapped, not read."""

    def __init__(self, directory: Path, found: list[Path]) -> None:
        if not found:
            raise ValueError(
                f"{directory}: has no *zero_pp_rank_0_mp_rank_00_optim_states.pt: not DeepSpeed's checkpoint"
            )
        self.files = [open_states(path, "optimizer_state_dict") for path in found]
        first = self._optimizer(0)
        self.stage = int(first.get("zero_stage", 1))  # stage 1 in bf16 does not say
        if self.stage not in (1, 2, 3):
            raise ValueError(f"{found[0]}: ZeRO stage {self.stage}: want 1, 2 or 3")
        self.model = ModelStates(directory, by_rank=self.stage == 3)
        self._check_ranks(found)
        self.weights = [self._flat(rank, "weight") for rank in range(len(found))]
        self.param_groups: list[dict[str, Any]] = self._base(0).get("param_groups") or [{}]
        self.adam_step = self._steps()
        kinds = MOMENTS if self.adam_step else ()
        self.moments = {kind: [self._flat(rank, kind) for rank in range(len(found))] for kind in kinds}
        groups = range(len(self.model.groups))
        self.places = {plain_name(name): place for group in groups for name, place in self._places(group)}

    def state(self) -> ForeignState:
        kinds = KINDS if self.adam_step else KINDS[:1]
        trained = {name: TensorInfo(shape=place.shape, kinds=kinds) for name, place in self.places.items()}
        frozen = {name: TensorInfo(shape=shape, trainable=False) for name, shape in self.model.frozen.items()}
        facts = self.model.facts(
            adam_step=self.adam_step,
            scaler=self._optimizer(0).get("loss_scaler"),
            origin=origin_of(self.stage, len(self.files), self.param_groups[0]),
        )
        return ForeignState(
            tensors=trained | frozen,
            buffers=self.model.buffers,
            facts=facts,
            read=self.read,
            buffer=self.model.buffer,
        )

    def _optimizer(self, rank: int) -> dict[str, Any]:
        return self.files[rank].content["optimizer_state_dict"]

    def _base(self, rank: int) -> dict[str, Any]:
        """State dict of the AdamW inside; at stages 1 and 2 an elastic checkpoint has a list of states instead."""
        found = self._optimizer(rank)["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]
        if isinstance(found, list):
            groups = [{"step": self._optimizer(rank).get("base_optimizer_state_step")}]
            return {"state": dict(enumerate(found)), "param_groups": groups}
        return found

    def _check_ranks(self, found: list[Path]) -> None:
        for path, rank in zip(found, range(len(found)), strict=True):
            count = self._optimizer(rank).get("partition_count", len(found))
            count = max(count) if isinstance(count, list) else count
            if count != self.model.ranks or len(found) != self.model.ranks:
                raise ValueError(f"{path}: of {count} ranks, among {len(found)} files, model states of "
                                 f"{self.model.ranks}: want one world size")  # fmt: skip

    def _flat(self, rank: int, kind: str) -> list[Tensor]:
        """The flat tensor of each group."""
        if kind == "weight":
            key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
            tensors = self._optimizer(rank).get(key)
        else:
            state = self._base(rank)["state"]
            tensors = [state[group].get(kind) for group in sorted(state)]
        if not isinstance(tensors, list) or not all(isinstance(each, Tensor) for each in tensors):
            raise ValueError(f"{self.files[rank].path}: has no {kind} of every group")
        if len(tensors) != len(self.model.groups):
            want = len(self.model.groups)
            raise ValueError(f"{self.files[rank].path}: {len(tensors)} groups of {kind}, param_shapes has {want}")
        return tensors

    def _steps(self) -> int:
        steps = {
            step_of(self.files[rank].path, state, self.param_groups[0])
            for rank in range(len(self.files))
            for state in self._base(rank)["state"].values() or [{}]
        }
        if len(steps) > 1:
            raise ValueError(f"{self.model.directory}: its optimizer counts different steps: {sorted(steps)}")
        return steps.pop()

    def _places(self, group: int) -> Iterator[tuple[str, _Place]]:
        """The parameters of a group. Raises ValueError where a rank's flat tensors are too small for them."""
        ranks, at = len(self.files), 0
        optimizer = self._optimizer(0)
        paddings = (optimizer.get("param_alignment_paddings") or {group: None})[group]
        share = self.weights[0][group].numel() + (optimizer.get("group_paddings") or {group: 0})[group]
        for index, (name, shape) in enumerate(self.model.groups[group].items()):
            if self.stage == 3:
                part = -(-math.prod(shape) // ranks)
                yield name, _Place(shape, group, 0, part, at)
                at += part
            else:
                yield name, _Place(shape, group, at, share, 0)
                at += math.prod(shape) + (paddings[index] if paddings else 0)
        for rank in range(ranks):
            left = at - rank * share
            want = at if self.stage == 3 else max(0, left if rank == ranks - 1 else min(share, left))
            for flats in (self.weights, *self.moments.values()):
                if flats[rank][group].numel() < want:
                    found = f"{flats[rank][group].numel()} elements in group {group}"
                    raise ValueError(f"{self.files[rank].path}: {found}, its parameters take {want}")

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Elements start : start + numel: fp32 [numel]."""
        if name in self.model.frozen:
            return self.model.read_frozen(name, start, numel)
        place = self.places[name]
        flats = self.weights if kind == "weight" else self.moments[kind]
        result, done = torch.empty(numel), 0
        while done < numel:
            rank, within = divmod(place.first + start + done, place.part)
            count = min(place.part - within, numel - done)
            flat = flats[rank][place.group]
            result[done : done + count] = self.files[rank].read(flat, place.offset + within, count)
            done += count
        return result


def _optimizer_files(directory: Path) -> list[Path]:
    """By rank. Raises ValueError where one is missing."""
    found: dict[int, Path] = {}
    for path in directory.iterdir():
        if match := _OPTIM_FILE.fullmatch(path.name):
            if int(match[2]):
                raise ValueError(f"{path}: of a model cut into several parts, want mp_rank_00 alone")
            if int(match[1]) in found:
                raise ValueError(f"{path}: and {found[int(match[1])].name}: two files of one rank")
            found[int(match[1])] = path
    for rank in range(max(found, default=0)):
        if rank not in found:
            name = found[max(found)].name.replace(f"rank_{max(found)}_", f"rank_{rank}_", 1)
            raise ValueError(f"{directory / name}: missing, and {found[max(found)].name} is there")
    return [found[rank] for rank in range(len(found))]


def write_deepspeed(
    state: TrainingState,
    destination: Path,
    *,
    ranks: int,
    stage: int,
    dtype: torch.dtype,
    sub_group_size: int = 10**9,
) -> None:
    """The new directory `destination`, which DeepSpeed loads at `ranks` ranks, that stage and that precision.

    sub_group_size: of the loading engine's stage 3, in elements. Frozen parameters stay fp32 in the files; DeepSpeed
    rounds them when it loads, as this project does. Without moments DeepSpeed starts them at the next step. Memory: a
    few chunks. Raises ValueError: `destination` exists, or the state lacks hyperparameters, some of its moments or,
    for fp16, a loss scale; OSError: the disk is full.
    """
    if stage not in (1, 2, 3) or ranks < 1 or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"stage {stage}, {ranks} ranks, {dtype}: want stage 1, 2 or 3, a rank or more, fp32, bf16, fp16"
        )
    plan = _Plan(state, ranks, stage, dtype, sub_group_size)
    with new_directory(destination) as partial:
        check_space(partial, plan.num_bytes, 2 * ranks + 3)
        tag = partial / f"global_step{counters_of(state.facts)['global_steps']}"
        tag.mkdir()
        for rank in track(range(ranks), "writing", "files"):
            prefix = "bf16_" if dtype == torch.bfloat16 else ""
            save(tag / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", plan.optimizer(rank), STAND_INS)
        for rank in range(ranks) if stage == 3 else (None,):
            save(tag / model_file(rank), plan.model(rank or 0))
        sync(tag)
        pointer = partial / "latest"
        pointer.write_text(tag.name, encoding="utf-8")
        sync(pointer)


class _Plan:
    """Which pieces go into which file, and the content of each file with slots for its tensors."""

    def __init__(self, state: TrainingState, ranks: int, stage: int, dtype: torch.dtype, sub_group_size: int) -> None:
        self.trained = has_moments(state)
        self.state, self.ranks, self.stage, self.dtype = state, ranks, stage, dtype
        self.param_group = param_group(state.facts)
        self.scaler = loss_scaler(state.facts.state, dtype)
        trainable = {name: info.numel for name, info in state.tensors.items() if info.trainable}
        self.frozen = [name for name, info in state.tensors.items() if not info.trainable]
        self.share = -(-sum(trainable.values()) // (2 * ranks)) * 2
        self.parts = {} if stage == 3 else flat_parts(trainable, ranks)
        size = sub_group_size if stage == 3 else sum(trainable.values())
        self.groups = _sub_groups({name: -(-numel // ranks) for name, numel in trainable.items()}, size)

    @property
    def num_bytes(self) -> int:
        """What the files take, about; never less."""
        numel = sum(info.numel for info in self.state.tensors.values())
        copy = self.dtype.itemsize if self.stage < 3 else 0
        return numel * (12 + copy) + self.ranks * (len(self.state.tensors) * _BYTES_A_NAME + _BYTES_A_FILE)

    def pieces(self, rank: int, group: list[str]) -> list[FlatPiece]:
        """A rank's flat tensor of a group: (name, start, numel, numel with padding) each."""
        if self.stage == 3:
            cut = [(name, self.state.tensors[name].numel, self.ranks) for name in group]
            return [FlatPiece(name, *even_range(numel, rank, ranks), -(-numel // ranks)) for name, numel, ranks in cut]
        held = [(name, part) for name in group for part in self.parts[name] if part[0] == rank]
        return [FlatPiece(name, start, numel, numel) for name, (_, start, numel) in held]

    def optimizer(self, rank: int) -> dict[str, Any]:
        """Content of a rank's `*_optim_states.pt`."""
        pieces = [self.pieces(rank, group) for group in self.groups]
        weights = [flat_slot(self.state, "weight", each) for each in pieces]
        size = None if self.stage == 3 else self.share
        step = counters_of(self.state.facts)["adam_step"]
        moments = {  # a step of each group's own: one that is shared would count every group's update
            index: {"step": step_tensor(step)} | {kind: flat_slot(self.state, kind, each, size) for kind in MOMENTS}
            for index, each in enumerate(pieces if self.trained else [])
        }
        base = {"state": moments, "param_groups": [{**self.param_group, "params": list(range(len(pieces)))}]}
        content = {
            "zero_stage": self.stage,
            "loss_scaler": self.scaler,
            "dynamic_loss_scale": self.dtype == torch.float16,
            "overflow": False,
            "ds_version": DEEPSPEED_VERSION,
        }
        if self.stage == 3:
            content |= {"partition_count": self.ranks, "optimizer_state_dict": base, "fp32_flat_groups": weights}
        else:
            content |= {"base_optimizer_state": base, "single_partition_of_fp32_groups": weights}
            content |= self._layout(pieces[0])
        config = ds_config(self.stage, self.dtype)
        return {"optimizer_state_dict": content, "ds_config": config, "ds_version": DEEPSPEED_VERSION}

    def _layout(self, pieces: list[FlatPiece]) -> dict[str, Any]:
        """What stages 1 and 2 say of one flat buffer; stage 1 in bf16 reads less of it."""
        offsets = itertools.accumulate((piece.padded for piece in pieces), initial=0)
        addresses = [(piece.name, Fragment(piece.numel, at)) for piece, at in zip(pieces, offsets, strict=False)]
        return {
            "group_paddings": [self.share - sum(piece.numel for piece in pieces)],
            "param_alignment_paddings": [[0] * len(self.groups[0])],
            "partition_count": [self.ranks],
            "param_slice_mappings": [OrderedDict(addresses)],
        }

    def model(self, rank: int) -> dict[str, Any]:
        """Content of the model states; at stage 3 a rank's, with placeholders for what is partitioned."""
        state = self.state
        if self.stage == 3:
            nothing = Slot((0,), self.dtype, lambda start, numel: torch.empty(numel))
            module = dict.fromkeys(state.tensors, nothing)
            frozen = {name: flat_slot(state, "weight", self.pieces(rank, [name])) for name in self.frozen}
        else:
            frozen = {name: whole_slot(state, name, "weight") for name in self.frozen}
            names = [name for name in state.tensors if name not in frozen]
            module = {name: whole_slot(state, name, "weight", self.dtype) for name in names} | frozen
        return model_states(
            state, ranks=self.ranks, module=module, groups=self.groups, frozen=frozen,
            config=ds_config(self.stage, self.dtype),
        )  # fmt: skip


def _sub_groups(numels: Mapping[str, int], size: int) -> list[list[str]]:
    """As DeepSpeed forms them at stage 3: a group ends with the parameter that brings it to `size` elements a rank."""
    groups: list[list[str]] = [[]]
    total = 0
    for name, numel in numels.items():
        if total >= size:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += numel
    return groups
