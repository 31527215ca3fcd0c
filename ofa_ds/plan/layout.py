"""Where the state of a run lies, and in which types it travels: what a plan needs of DeepSpeed's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Device = Literal["none", "cpu", "nvme"]
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
Precision = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Defaults are DeepSpeed 0.19.8's."""

    stage: int
    hosts: int
    ranks_per_host: int
    precision: Precision = "fp32"
    reduce_precision: Precision = "fp32"
    """Type in which gradients travel (`communication_data_type`)."""
    accumulate_precision: Precision = "fp32"
    """Type in which gradients of micro-batches are summed (`data_types.grad_accum_dtype`)."""
    offload_optimizer: Device = "none"
    offload_param: Device = "none"
    hpz: int = 1
    """Ranks that hold a second copy of all weights among them (`zero_hpz_partition_size`); 1: none."""
    qwz: bool = False
    """Weights travel in 8 bits (`zero_quantized_weights`)."""
    qgz: bool = False
    """Gradients travel in 4 bits between hosts (`zero_quantized_gradients`)."""
    reduce_bucket: int = 500_000_000
    """Elements."""
    prefetch_bucket: int = 50_000_000
    persistence_threshold: int = 100_000
    """Parameters with fewer elements stay whole on every rank under stage 3."""
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    leaf_classes: tuple[str, ...] = ()
    overlap: bool = True
    ema: bool = False
    """A moving average of the weights is kept (`optim.ema_decay`)."""

    @property
    def world(self) -> int:
        return self.hosts * self.ranks_per_host

    @property
    def weight_bytes(self) -> int:
        """Of an element that the forward reads."""
        return BYTES[self.precision]

    @property
    def keeps_whole_gradients(self) -> bool:
        """Whether DeepSpeed takes its BF16_Optimizer, whose gradients are fp32, whole everywhere, always there."""
        sums_wide = self.precision == "bf16" and self.accumulate_precision == "fp32"
        return self.stage == 1 and sums_wide and self.offload_optimizer == "none"


def layout_of(config: Mapping[str, Any], *, hosts: int, ranks_per_host: int, on_gpu: bool, ema: bool = False) -> Layout:
    """Of DeepSpeed's JSON as a file of ds_configs has it; `auto`, and a second copy of the weights among as many ranks
    as there are, become what `ofa_ds.engine.config.derive_config` makes of them for a run."""
    zero = config.get("zero_optimization", {})
    bf16 = config.get("bf16", {}).get("enabled", False)
    precision = "bf16" if bf16 is True or (bf16 == "auto" and on_gpu) else "fp32"
    if config.get("fp16", {}).get("enabled") is True:
        precision = "fp16"
    stage = int(zero.get("stage", 0))
    hpz = int(zero.get("zero_hpz_partition_size", 1))
    overlap = zero.get("overlap_comm", stage == 3)
    values: dict[str, Any] = {
        "stage": stage, "precision": precision, "ema": ema,
        "reduce_precision": config.get("communication_data_type") or precision,
        "accumulate_precision": config.get("data_types", {}).get("grad_accum_dtype") or precision,
        "offload_optimizer": zero.get("offload_optimizer", {}).get("device", "none"),
        "offload_param": zero.get("offload_param", {}).get("device", "none"),
        "hpz": hpz if hpz < hosts * ranks_per_host else 1,
        "qwz": bool(zero.get("zero_quantized_weights", False)),
        "qgz": bool(zero.get("zero_quantized_gradients", False)),
        "leaf_classes": tuple(zero.get("leaf_module", {}).get("classes", ())),
        "overlap": on_gpu if overlap == "auto" else bool(overlap),
    }  # fmt: skip
    for name, key in (
        ("reduce_bucket", "reduce_bucket_size"), ("prefetch_bucket", "stage3_prefetch_bucket_size"),
        ("persistence_threshold", "stage3_param_persistence_threshold"), ("max_live", "stage3_max_live_parameters"),
        ("max_reuse", "stage3_max_reuse_distance"), ("sub_group", "sub_group_size"),
    ):  # fmt: skip
        if key in zero and zero[key] != "auto":
            values[name] = int(zero[key])
    return Layout(hosts=hosts, ranks_per_host=ranks_per_host, **values)
