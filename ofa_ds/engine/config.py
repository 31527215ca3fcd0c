"""DeepSpeed's JSON: memory layout and precision from a file of ds_configs, the rest from the recipe. No torch."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ofa_ds.config import BatchConfig, OptimConfig

if TYPE_CHECKING:
    import torch

_CONFIG_DIRS = (Path(__file__).parents[1] / "ds_configs", Path(__file__).parents[2] / "ds_configs")
"""Beside the package files once installed, beside the package in a checkout."""

_OWNED_BY_RECIPE = {
    "train_batch_size": "batch.global_rows",
    "train_micro_batch_size_per_gpu": "batch.micro_rows",
    "gradient_accumulation_steps": "batch.global_rows and batch.micro_rows",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "[optim]",
    "scheduler": "optim.peak_lr, optim.warmup_steps and train.num_steps",
}

_LOW_PRECISION_AT_STAGE_0 = "ZeRO stage 0 keeps no fp32 master weights here; use stage 1-3 with bf16 or fp16"


def load_deepspeed_config(name_or_path: str | Path) -> dict[str, Any]:
    """The JSON of a shipped name (`zero3`) or of a path: memory layout and precision.

    Raises ValueError: no such file, malformed JSON, or a key that the recipe owns.
    """
    path = _find_config(name_or_path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: want a JSON object, got {type(config).__name__}")
    for key, recipe_key in _OWNED_BY_RECIPE.items():
        if key in config:
            raise ValueError(f"{path} sets {key}, which the recipe sets as {recipe_key}; remove it from {path.name}")
    zero = _section(config, "zero_optimization", path)
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise ValueError(f"{path}: zero_optimization.stage {zero['stage']!r}: want 0, 1, 2 or 3")
    for key in ("offload_optimizer", "offload_param"):
        if _section(zero, key, path).get("device") == "nvme":
            raise ValueError(f"{path}: {key} on nvme cannot go into checkpoints; use device cpu, as zero3_offload does")
    if not zero.get("stage", 0) and any(_section(config, key, path).get("enabled") is True for key in ("bf16", "fp16")):
        raise ValueError(f"{path}: {_LOW_PRECISION_AT_STAGE_0}")
    return config


def _section(values: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    section = values.get(key, {})
    if not isinstance(section, dict):
        raise ValueError(f"{path}: {key}: want a JSON object, got {section!r}")
    return section


def _find_config(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.suffix == ".json" or path.is_file():
        if not path.is_file():
            raise ValueError(f"deepspeed {name_or_path}: no such file")
        return path
    shipped = {file.stem: file for folder in _CONFIG_DIRS for file in folder.glob("*.json")}
    if path.name in shipped and str(path) == path.name:
        return shipped[path.name]
    near = difflib.get_close_matches(str(name_or_path), shipped, n=1)
    raise ValueError(
        f"deepspeed {name_or_path}: neither a .json file nor one of {', '.join(sorted(shipped))}"
        + (f"; did you mean {near[0]}?" if near else "")
    )


def derive_config(
    config: Mapping[str, Any], *, optim: OptimConfig, batch: BatchConfig, world_size: int, device: torch.device
) -> dict[str, Any]:
    """What DeepSpeed gets: the file, plus what the recipe says, with `auto` resolved for `device`.

    `auto` in bf16.enabled means bf16 on a GPU and fp32 on a CPU; in overlap_comm, overlap on a GPU only.
    """
    on_gpu = device.type == "cuda"
    derived = json.loads(json.dumps(dict(config)))
    zero = derived.setdefault("zero_optimization", {"stage": 0})
    bf16 = derived.setdefault("bf16", {"enabled": False})
    if bf16.get("enabled") == "auto":
        bf16["enabled"] = on_gpu
    if zero.get("overlap_comm") == "auto":
        zero["overlap_comm"] = on_gpu  # gloo has no streams to overlap with
    if bf16["enabled"] or derived.get("fp16", {}).get("enabled"):
        if not zero.get("stage"):
            raise ValueError(_LOW_PRECISION_AT_STAGE_0)
        # DeepSpeed casts BatchNorm buffers of a model built under zero.Init, fp32 statistics must stay.
        derived.setdefault("data_types", {})["keep_in_fp32_modules"] = ["running_mean", "running_var"]
    derived["train_micro_batch_size_per_gpu"] = batch.micro_rows
    derived["gradient_accumulation_steps"] = batch.accumulation_steps(world_size)
    derived["gradient_clipping"] = optim.clip_norm
    derived["steps_per_print"] = 2**31 - 1  # ours is the log
    return derived
