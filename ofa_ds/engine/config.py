"""DeepSpeed's JSON: memory layout and precision from a file of ds_configs, the rest from the recipe. No torch."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ofa_ds.config import BatchConfig, OptimConfig
from ofa_ds.engine.deepspeed_keys import check_keys

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

_OF_THE_BACKBONE = {
    "ResNet", "Bottleneck", "ConvStem", "ViT", "Transformer", "Block", "SelfAttention", "Mlp"
}  # fmt: skip
"""Classes of modules that are within `encoder.embed_images`."""

_LOW_PRECISION_AT_STAGE_0 = "ZeRO stage 0 keeps no fp32 master weights here; use stage 1-3 with bf16 or fp16"


def load_deepspeed_config(name_or_path: str | Path, *, nvme: bool = False) -> dict[str, Any]:
    """The JSON of a shipped name (`zero3`) or of a path: memory layout and precision.

    nvme: offload to NVMe may be in it, which can be planned and not run.
    Raises ValueError: no such file, malformed JSON, a key that the recipe owns or that DeepSpeed does not know, a value
    of a wrong type or range.
    """
    path = _find_config(name_or_path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: want a JSON object, got {type(config).__name__}")
    for key, recipe_key in _OWNED_BY_RECIPE.items():
        if key in config:
            raise ValueError(f"{path} sets {key}, which the recipe sets as {recipe_key}; remove it from {path.name}")
    check_keys(config, str(path))
    zero = config.get("zero_optimization", {})
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device") == "nvme" and not nvme:
            raise ValueError(f"{path}: {key} on nvme cannot go into checkpoints; use device cpu, as zero3_offload does")
    for name in zero.get("leaf_module", {}).get("classes", ()):
        if name.rpartition(".")[2] in _OF_THE_BACKBONE:
            raise ValueError(
                f"{path}: leaf_module.classes: {name} is called once for each size of pictures, which a leaf module "
                "must not be (DeepSpeed reduces its gradients twice); leave it out, or name the Encoder"
            )
    low = [key for key in ("bf16", "fp16") if config.get(key, {}).get("enabled") is True]
    if len(low) == 2:
        raise ValueError(f"{path}: bf16 and fp16 are both enabled; want one of them")
    if low and not zero.get("stage", 0):
        raise ValueError(f"{path}: {_LOW_PRECISION_AT_STAGE_0}")
    return config


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are there once: Python takes the last of two."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for n, (key, _) in enumerate(pairs) if key in dict(pairs[:n]))
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _find_config(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.suffix == ".json" or path.is_file():
        if not path.is_file():
            raise ValueError(f"deepspeed {name_or_path}: no such file")
        return path
    shipped = _shipped()
    if path.name in shipped and str(path) == path.name:
        return shipped[path.name]
    near = difflib.get_close_matches(str(name_or_path), shipped, n=1)
    raise ValueError(
        f"deepspeed {name_or_path}: neither a .json file nor one of {', '.join(sorted(shipped))}"
        + (f"; did you mean {near[0]}?" if near else "")
    )


def check_second_copy(config: Mapping[str, Any], world_size: int) -> None:
    """Raises ValueError where so many ranks cannot be cut into groups that hold a second copy of the weights each."""
    size = config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    if 1 < size < world_size and world_size % size:
        raise ValueError(
            f"zero_hpz_partition_size {size} does not divide {world_size} ranks; set it to the number of GPUs of a "
            "host, or leave it out"
        )


def _shipped() -> dict[str, Path]:
    return {file.stem: file for folder in _CONFIG_DIRS for file in sorted(folder.glob("*.json"))}


def shipped_configs() -> dict[str, dict[str, Any]]:
    """The JSON of each file that comes with the package, by name."""
    return {name: load_deepspeed_config(name) for name in sorted(_shipped())}


def derive_config(
    config: Mapping[str, Any], *, optim: OptimConfig, batch: BatchConfig, world_size: int, device: torch.device
) -> dict[str, Any]:
    """What DeepSpeed gets: the file, plus what the recipe says, with `auto` resolved for `device`.

    `auto` in bf16.enabled means bf16 on a GPU and fp32 on a CPU; in overlap_comm, overlap on a GPU only. A second copy
    of the weights (zero_hpz_partition_size) among as many ranks as there are, or more, would be the first: it is left
    out. Raises ValueError where it cannot be cut among them, and for low precision at stage 0.
    """
    on_gpu = device.type == "cuda"
    derived = json.loads(json.dumps(dict(config)))
    zero = derived.setdefault("zero_optimization", {"stage": 0})
    bf16 = derived.setdefault("bf16", {"enabled": False})
    if bf16.get("enabled") == "auto":
        bf16["enabled"] = on_gpu
    if zero.get("overlap_comm") == "auto":
        zero["overlap_comm"] = on_gpu  # gloo has no streams to overlap with
    check_second_copy(derived, world_size)
    if zero.get("zero_hpz_partition_size", 1) >= world_size:
        zero.pop("zero_hpz_partition_size", None)
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
