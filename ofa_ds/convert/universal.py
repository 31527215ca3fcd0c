"""DeepSpeed's universal checkpoints, which it loads at any ZeRO stage and world size (`"load_universal": true`).

    SAVE_DIR/latest_universal                               name of the tag directory
    SAVE_DIR/global_stepN_universal/zero/NAME/fp32.pt       each parameter whole; beside it exp_avg.pt, exp_avg_sq.pt
                                    zero/NAME/step.pt       Adam's step; what came from stage 3 has none
                                    zero/optimizer_state.pt loss scale, hyperparameters, Adam's step
                                    mp_rank_00_model_states.pt, zero_pp_rank_0_mp_rank_00_model_states.pt
                                                            names, shapes, buffers, counters: for stages 1-2 and 3

DeepSpeed itself takes trainable parameters and counters from it, not buffers and frozen parameters, which are in the
model states all the same. At stage 3 with several
sub-groups DeepSpeed 0.19 gives one step tensor to all of them, so that torch's AdamW counts one for each: load such a
model at stage 1 or 2, or with one sub-group.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ofa_ds.checkpoint.format import TensorInfo
from ofa_ds.checkpoint.state import ForeignState, TrainingState
from ofa_ds.convert.deepspeed_states import (
    DEEPSPEED_VERSION,
    STAND_INS,
    ModelStates,
    ds_config,
    find_tag,
    has_loss_scale,
    has_moments,
    loss_scaler,
    model_file,
    model_states,
    one_line,
    open_states,
    origin_of,
    param_group,
    plain_name,
    safe_name,
    step_of,
    step_tensor,
    whole_slot,
)
from ofa_ds.convert.torch_file import TorchFile, save
from ofa_ds.engine.partition import KINDS, MOMENTS
from ofa_ds.progress import track
from ofa_ds.storage.atomic import check_space, new_directory, sync

_POINTER = "latest_universal"
_FILES = {"weight": "fp32.pt", **{kind: f"{kind}.pt" for kind in MOMENTS}}
_BYTES_A_FILE = 2000


def read_universal(source: Path) -> ForeignState:
    """The state in a universal checkpoint: the directory with `latest_universal`, or the one it names.

    Reads only what is asked for. Raises ValueError, one line: a file is missing, damaged or holds foreign classes.
    """
    directory = find_tag(source, _POINTER)
    with one_line(directory):
        return _Universal(directory).state()


class _Universal:
    def __init__(self, directory: Path) -> None:
        self.zero = directory / "zero"
        self.model = ModelStates(directory)
        self.names = {plain_name(key): key for group in self.model.groups for key in group}
        self.shapes = {name: shape for group in self.model.groups for name, shape in group.items()}
        self.optimizer = open_states(self.zero / "optimizer_state.pt", "param_groups")
        self.adam_step = self._step()

    def _step(self) -> int:
        """The step that all parameters share."""
        path, content = self.optimizer.path, self.optimizer.content
        group = content["param_groups"][0]
        states = content.get("optimizer_state_dict", {}).get("state", {})
        steps = {step_of(path, state, group) for state in states.values()}
        for key in self.shapes:
            path = self._folder(key) / "step.pt"
            if path.is_file():
                steps.add(int(TorchFile(path).content))
        if len(steps) != 1:
            raise ValueError(f"{self.zero}: its parameters were updated {sorted(steps)} times, want one number")
        return steps.pop()

    def _folder(self, key: str) -> Path:
        return self.zero / safe_name(key)

    def state(self) -> ForeignState:
        kinds = KINDS if self.adam_step else KINDS[:1]
        trained = {name: TensorInfo(shape=self.shapes[key], kinds=kinds) for name, key in self.names.items()}
        for key, kind in itertools.product(self.shapes, kinds):
            self._tensor(key, kind)  # so that what is missing is missed before anything is written
        frozen = {name: TensorInfo(shape=shape, trainable=False) for name, shape in self.model.frozen.items()}
        content = self.optimizer.content
        stage = int(content.get("zero_stage", 1))
        return ForeignState(
            tensors=trained | frozen,
            buffers=self.model.buffers,
            facts=self.model.facts(
                adam_step=self.adam_step,
                scaler=content.get("loss_scaler"),
                origin=origin_of(stage, self.model.ranks, content["param_groups"][0]),
            ),
            read=self.read,
            buffer=self.model.buffer,
        )

    def _tensor(self, key: str, kind: str) -> tuple[TorchFile, Tensor]:
        """A parameter's file and tensor, flat or in its shape. Raises ValueError where it is neither."""
        file = TorchFile(self._folder(key) / _FILES[kind])
        tensor = file.content.get("param") if isinstance(file.content, dict) else file.content
        if not isinstance(tensor, Tensor) or tensor.numel() != math.prod(self.shapes[key]):
            found = f"{tensor.numel()} elements" if isinstance(tensor, Tensor) else "no tensor"
            raise ValueError(f"{file.path}: {found}, want {self.shapes[key]} of {key}")
        return file, tensor

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Elements start : start + numel: fp32 [numel]."""
        if name in self.model.frozen:
            return self.model.read_frozen(name, start, numel)
        file, tensor = self._tensor(self.names[name], kind)
        return file.read(tensor, start, numel)


def write_universal(state: TrainingState, destination: Path) -> None:
    """The new directory `destination`, which DeepSpeed loads with `"checkpoint": {"load_universal": true}`.

    Memory: a few chunks. Raises ValueError: `destination` exists, or the state lacks moments or hyperparameters;
    OSError: the disk is full.
    """
    if not has_moments(state):
        raise ValueError(
            "the checkpoint has no optimizer moments, without which DeepSpeed loads no universal one; write "
            "`--format deepspeed`, or `huggingface` or `fairseq` for the weights alone"
        )
    trained = [name for name, info in state.tensors.items() if info.trainable]
    optimizer = _optimizer_state(state)
    num_files = (len(KINDS) + 1) * len(trained) + 4
    with new_directory(destination) as partial:
        numel = sum(info.numel * 4 * (3 if info.trainable else 1) for info in state.tensors.values())
        check_space(partial, numel + num_files * _BYTES_A_FILE, num_files + len(trained))
        tag = partial / f"global_step{state.facts.state['global_steps']}_universal"
        (tag / "zero").mkdir(parents=True)
        for name in track(trained, "writing", "tensors"):
            _write_parameter(tag / "zero" / safe_name(name), state, name)
        save(tag / "zero" / "optimizer_state.pt", optimizer, STAND_INS)
        sync(tag / "zero")
        for rank in (None, 0):
            save(tag / model_file(rank), _model(state, trained, with_frozen=rank is None))
        sync(tag)
        (partial / _POINTER).write_text(tag.name, encoding="utf-8")
        sync(partial / _POINTER)


def _write_parameter(folder: Path, state: TrainingState, name: str) -> None:
    folder.mkdir()
    for kind, file in _FILES.items():
        save(folder / file, {"param": whole_slot(state, name, kind)})
    save(folder / "step.pt", step_tensor(state.facts.state["adam_step"]))
    sync(folder)


def _optimizer_state(state: TrainingState) -> dict[str, Any]:
    """Stages 1 and 2 read `param_groups`, stage 3 `optimizer_state_dict`; without a loss scale an engine keeps its."""
    groups = [{**param_group(state.facts), "params": [0]}]
    steps: Mapping[int, Any] = {0: {"step": step_tensor(state.facts.state["adam_step"])}}
    scaler = {}
    if has_loss_scale(state.facts):
        scaler = {"loss_scaler": loss_scaler(state.facts.state, torch.float16), "dynamic_loss_scale": True}
    return {
        **scaler,
        "overflow": False,
        "zero_stage": 3,
        "partition_count": 1,
        "ds_version": DEEPSPEED_VERSION,
        "optimizer_state_dict": {"state": steps, "param_groups": groups},
        "param_groups": groups,
    }


def _model(state: TrainingState, trained: list[str], *, with_frozen: bool) -> dict[str, Any]:
    """Content of the model states: of the parameters only those that no optimizer owns."""
    names = [name for name, info in state.tensors.items() if with_frozen and not info.trainable]
    frozen = OrderedDict((name, whole_slot(state, name, "weight")) for name in names)
    content = model_states(
        state, ranks=1, module=frozen, groups=[trained], frozen=frozen, config=ds_config(3, torch.float32)
    )
    return {**content, "universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}
