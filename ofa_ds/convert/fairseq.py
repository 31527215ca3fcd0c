"""The official `.pt` file: weights in `model`, configuration in `cfg` (or `args`), EMA in `extra_state`.

docs/ofa.md, Foreign files: fairseq.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ofa_ds.convert import torch_file
from ofa_ds.convert.foreign import Foreign
from ofa_ds.convert.port import slots, torch_weights
from ofa_ds.convert.port_config import hints_from_fairseq, to_fairseq
from ofa_ds.convert.weights import Weights, entries_of
from ofa_ds.model.config import ModelConfig

_EMA = ("ema_fp32_params", "ema")
"""In order of preference (docs/ofa.md, Foreign files: fairseq)."""


def read_fairseq(source: Path) -> Foreign:
    """Raises ValueError naming what is missing or wrong; a file that holds other classes than plain ones is refused."""
    file = torch_file.TorchFile(source)
    content = file.content
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise ValueError(f"{source}: want fairseq's checkpoint, a dict with `model`; is it only a part of one?")
    try:
        model, task = _settings(content)
        hints = hints_from_fairseq(model)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    state = _mapping(content, "extra_state", str(source))
    average = next((state[key] for key in _EMA if state.get(key)), None)
    size = task.get("patch_image_size")
    return Foreign(
        origin=str(source),
        weights=torch_weights(file, content["model"]),
        hints=hints,
        ema=None if average is None else torch_weights(file, average),
        data={"image_size": size} if isinstance(size, int) and size >= 16 else {},
        num_updates=_num_updates(content.get("optimizer_history")),
    )


def _num_updates(history: Any) -> int:
    """Of the last optimizer; 0 where the file does not say, since nothing but a note depends on it."""
    last = history[-1] if isinstance(history, list) and history else {}
    updates = last.get("num_updates") if isinstance(last, Mapping) else 0
    return updates if isinstance(updates, int) and updates >= 0 else 0


def _mapping(content: Mapping[str, Any], key: str, where: str = "") -> Mapping[str, Any]:
    """A part of the file, empty where it is not there. Raises ValueError: it is something else."""
    part = content.get(key)
    part = vars(part) if isinstance(part, argparse.Namespace) else {} if part is None else part
    if not isinstance(part, Mapping):
        raise ValueError(f"{where + ': ' if where else ''}want a dict as {key}, got a {type(part).__name__}")
    return part


def _settings(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """(of the model, of the task); in old files both are `args`, which then count before `cfg`."""
    arguments = content.get("args")
    if isinstance(arguments, argparse.Namespace):
        return vars(arguments), vars(arguments)
    cfg = _mapping(content, "cfg")
    return _mapping(cfg, "model"), _mapping(cfg, "task")


def write_fairseq(
    path: Path, config: ModelConfig, weights: Weights, *, average: Weights | None, num_updates: int, image_size: int
) -> None:
    """A file that fairseq's OFA loads. average: the moving average of all weights, into `extra_state.ema`."""
    task = {
        "_name": "unify_task", "data": "", "bpe": "gpt2", "bpe_dir": "", "selected_cols": "",
        "patch_image_size": image_size, "orig_patch_image_size": config.orig_patch_image_size,
        "code_image_size": config.code_image_size, "max_image_size": 512, "num_bins": 1000, "code_dict_size": 8192,
        "max_source_positions": config.max_positions, "max_target_positions": config.max_positions,
    }  # fmt: skip
    model = to_fairseq(config)
    train = {"epoch": 1, "iterations_in_epoch": 0, "shuffle": True}
    extra_state: dict[str, Any] = {"train_iterator": train, "metrics": [], "previous_training_time": 0}
    if average is not None:
        extra_state["ema"] = extra_state["ema_fp32_params"] = slots(entries_of(config, average, port=False))
    history = {
        "criterion_name": "AdjustLabelSmoothedCrossEntropyCriterion", "optimizer_name": "FairseqAdam",
        "lr_scheduler_state": {}, "num_updates": num_updates,
    }  # fmt: skip
    content = {
        "args": None,
        "cfg": {"_name": None, "common": {"fp16": False, "seed": 1}, "model": model, "task": task},
        "model": slots(entries_of(config, weights, port=False)),
        "criterion": None,
        "optimizer_history": [history],
        "task_state": {},
        "extra_state": extra_state,
    }
    torch_file.save(path, content)
