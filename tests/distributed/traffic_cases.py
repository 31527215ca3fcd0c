"""Cases of test_traffic.py: which model under which DeepSpeed layout. Light enough to import while collecting."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from ofa_ds.config.architecture import ModelConfig, ResNetConfig, ViTConfig, preset

VOCAB = 220
_NANO = preset("nano", vocab_size=VOCAB, dim=36, ffn_dim=70, num_heads=2, batch_norm="frozen")
MODELS: dict[str, ModelConfig] = {
    "nano": _NANO,
    "resnet": dataclasses.replace(_NANO, backbone=ResNetConfig(depths=(1, 2, 1))),
    "sync": dataclasses.replace(_NANO, backbone=ResNetConfig(depths=(1, 1, 2)), batch_norm="sync"),
    "6b": dataclasses.replace(
        _NANO, use_ofasys=True, disable_entangle=False, encoder_layers=3, gamma=0.5,
        backbone=ViTConfig(resolution=32, patch_size=16, channels=24, layers=2, heads=2),
    ),
    "shared": dataclasses.replace(
        _NANO, use_ofasys=True, disable_entangle=False, share_attn_bias=True, entangle_position_embedding=True,
    ),
}  # fmt: skip
LEAF = {"leaf_module": {"classes": ["EncoderLayer", "DecoderLayer"]}}


class Case(NamedTuple):
    stage: int
    model: str = "nano"
    zero: dict[str, Any] = {}
    """Of `zero_optimization`."""
    top: dict[str, Any] = {}
    """The rest of DeepSpeed's JSON."""
    accumulation: int = 1
    checkpointing: bool = False

    @property
    def config(self) -> ModelConfig:
        return dataclasses.replace(MODELS[self.model], activation_checkpointing=self.checkpointing)

    @property
    def deepspeed(self) -> dict[str, Any]:
        persistence = {"stage3_param_persistence_threshold": 0} if self.stage == 3 else {}
        return {
            "zero_optimization": {"stage": self.stage, "overlap_comm": False, **persistence, **self.zero},
            **self.top,
        }


BF16 = {"bf16": {"enabled": True}}
FP32_REDUCE = {**BF16, "communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
SMALL = {"reduce_bucket_size": 5000, "stage3_prefetch_bucket_size": 3000}
TIGHT = {"stage3_max_live_parameters": 4000, "stage3_max_reuse_distance": 2000, **SMALL}
MIDDLE = {"stage3_max_reuse_distance": 30_000, "stage3_prefetch_bucket_size": 20_000, "reduce_bucket_size": 20_000}
PERSISTENT = {"stage3_param_persistence_threshold": 100}
SUB_GROUPS = {"sub_group_size": 20_000}
CASES: dict[str, Case] = {
    "stage 0": Case(0, accumulation=2),
    "stage 0, norms of all ranks": Case(0, "sync"),
    "stage 1": Case(1, zero={"reduce_bucket_size": 5000}, accumulation=2),
    "stage 1, overlap": Case(1, zero={"reduce_bucket_size": 5000, "overlap_comm": True}, accumulation=2),
    "stage 1, bf16, fp32 reduction": Case(1, zero={"reduce_bucket_size": 5000}, top=FP32_REDUCE, accumulation=2),
    "stage 2": Case(2, zero={"reduce_bucket_size": 5000}, accumulation=2),
    "stage 2, bf16, fp32 reduction": Case(2, "6b", {"reduce_bucket_size": 5000}, FP32_REDUCE, checkpointing=True),
    "stage 3": Case(3, accumulation=2),
    "stage 3 tight, leaf": Case(3, zero={**TIGHT, **LEAF}),
    "stage 3 tight, leaf, checkpointing": Case(3, "6b", {**TIGHT, **LEAF}, checkpointing=True),
    "stage 3 tight, checkpointing": Case(3, "6b", TIGHT, checkpointing=True),
    "stage 3 tight, shared tables": Case(3, "shared", TIGHT),
    "stage 3 tight, resnet": Case(3, "resnet", TIGHT),
    "stage 3 middle, 6b": Case(3, "6b", MIDDLE, accumulation=2),
    "stage 3 middle, leaf, persistent": Case(3, "6b", {**MIDDLE, **LEAF, **PERSISTENT}, BF16, accumulation=2),
    "stage 3 middle, leaf, sub groups": Case(3, "nano", {**MIDDLE, **LEAF, **SUB_GROUPS}, FP32_REDUCE, accumulation=2),
    "stage 3 middle, norms of all ranks": Case(3, "sync", {**MIDDLE, **PERSISTENT}, checkpointing=True, accumulation=2),
    "stage 3, whole stacks": Case(3, zero={"leaf_module": {"classes": ["Encoder", "Decoder", "TokenEmbedding"]}}),
    "stage 3, second copy": Case(3, "6b", {**MIDDLE, **LEAF, "zero_hpz_partition_size": 2}, FP32_REDUCE, 2, True),
    "stage 3 tight, second copy": Case(3, "nano", {**TIGHT, **PERSISTENT, "zero_hpz_partition_size": 2}, BF16, 2),
}

SECOND_COPY = tuple(name for name in CASES if "second copy" in name)
RUNS: dict[int, tuple[str, ...]] = {
    3: ("stage 2, bf16, fp32 reduction", "stage 3 tight, leaf"),
    4: ("stage 1", *SECOND_COPY),
}
"""Ranks -> cases. DeepSpeed's groups of a second copy stay for good: they come last in their processes."""
RUNS[2] = tuple(name for name in CASES if not any(name in names for names in RUNS.values()))
