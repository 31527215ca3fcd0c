"""The keys of DeepSpeed's JSON with their types and ranges, as DeepSpeed 0.19.8 has them: a wrong one is told at once.

DeepSpeed itself ignores a key at the top that it does not know, and imports torch before it looks. A test compares this
table with DeepSpeed's own configuration. Left out are deprecated keys, and those that the recipe owns.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict, is_typeddict

from ofa_ds.config.values import STRICT, first_problem, label, nearest, shown


def _number(value: Any) -> Any:
    if isinstance(value, (bool, str)):
        raise ValueError("want a number")
    return value


def _stage(value: int) -> int:
    if not 0 <= value <= 3:
        raise ValueError("want 0, 1, 2 or 3")
    return value


Whole = Annotated[int, Field(ge=0), BeforeValidator(_number)]
"""5e8 is one too."""
Positive = Annotated[int, Field(gt=0), BeforeValidator(_number)]
Stage = Annotated[int, BeforeValidator(_number), AfterValidator(_stage)]
Share = Annotated[float, Field(ge=0, le=1), BeforeValidator(_number)]
Auto = Literal["auto"]
"""Resolved by `ofa_ds.engine.config.derive_config`."""
Dtype = Literal["fp32", "fp16", "bf16"]


@with_config(STRICT)
class OffloadParam(TypedDict, total=False):
    device: Literal["none", "cpu", "nvme"]
    nvme_path: str | None
    buffer_count: Whole
    buffer_size: Whole
    max_in_cpu: Whole
    pin_memory: StrictBool


@with_config(STRICT)
class OffloadOptimizer(TypedDict, total=False):
    device: Literal["none", "cpu", "nvme"]
    nvme_path: str | None
    buffer_count: Whole
    pin_memory: StrictBool
    pipeline_read: StrictBool
    pipeline_write: StrictBool
    fast_init: StrictBool
    ratio: Share
    super_offload: StrictBool
    cpuadam_cores_perc: Share


@with_config(STRICT)
class LeafModule(TypedDict, total=False):
    classes: list[str]
    names: list[str]
    name_suffixes: list[str]


@with_config(STRICT)
class ZeroOptimization(TypedDict, total=False):
    stage: Stage
    contiguous_gradients: StrictBool
    reduce_scatter: StrictBool
    reduce_bucket_size: Positive
    use_multi_rank_bucket_allreduce: StrictBool
    allgather_partitions: StrictBool
    allgather_bucket_size: Whole
    overlap_comm: StrictBool | Auto
    compute_grad_norm: Literal[True]
    """False would hide gradients that are not finite."""
    load_from_fp32_weights: StrictBool
    elastic_checkpoint: StrictBool
    offload_param: OffloadParam
    offload_optimizer: OffloadOptimizer
    zenflow: dict[str, Any] | None
    sub_group_size: Whole
    stage3_prefetch_bucket_size: Whole
    stage3_param_persistence_threshold: Whole
    stage3_model_persistence_threshold: Whole
    stage3_max_live_parameters: Whole
    stage3_max_reuse_distance: Whole
    stage3_gather_16bit_weights_on_model_save: StrictBool
    stage3_module_granularity_threshold: Whole
    stage3_use_all_reduce_for_fetch_params: StrictBool
    stage3_allgather_sequential: StrictBool
    ignore_unused_parameters: StrictBool
    legacy_stage1: Literal[False]
    """DeepSpeed has no longer what it asks for."""
    round_robin_gradients: StrictBool
    parameter_alignment: StrictBool
    zero_hpz_partition_size: Whole
    zero_quantized_weights: StrictBool
    zero_quantized_nontrainable_weights: StrictBool
    zero_quantized_gradients: StrictBool
    memory_efficient_linear: StrictBool
    pipeline_loading_checkpoint: StrictBool
    override_module_apply: StrictBool
    log_trace_cache_warnings: StrictBool
    enable_sanity_checks: StrictBool
    save_muon_momentum_buffer_in_memory: StrictBool
    leaf_module: LeafModule


@with_config(STRICT)
class Bf16(TypedDict, total=False):
    enabled: StrictBool | Auto
    immediate_grad_update: StrictBool
    check_grad_overflow: Literal[True]
    """False would let a step that is not finite ruin the weights."""
    bf16_master_weights_and_grads: StrictBool
    bf16_optimizer_states: StrictBool


@with_config(STRICT)
class Fp16(TypedDict, total=False):
    enabled: StrictBool
    auto_cast: StrictBool
    loss_scale: Annotated[float, Field(ge=0), BeforeValidator(_number)]
    initial_scale_power: Annotated[int, Field(ge=0, le=127), BeforeValidator(_number)]
    loss_scale_window: Positive
    hysteresis: Positive
    consecutive_hysteresis: StrictBool
    min_loss_scale: Positive
    fp16_master_weights_and_grads: StrictBool


@with_config(STRICT)
class ActivationCheckpointing(TypedDict, total=False):
    partition_activations: StrictBool
    number_checkpoints: Whole | None
    contiguous_memory_optimization: StrictBool
    synchronize_checkpoint_boundary: StrictBool
    profile: StrictBool
    cpu_checkpointing: StrictBool


@with_config(STRICT)
class CommsLogger(TypedDict, total=False):
    enabled: StrictBool
    prof_all: StrictBool
    prof_ops: list[str]
    verbose: StrictBool
    debug: StrictBool


@with_config(STRICT)
class Aio(TypedDict, total=False):
    block_size: Positive
    queue_depth: Positive
    intra_op_parallelism: Positive
    single_submit: StrictBool
    overlap_events: StrictBool
    use_gds: StrictBool


@with_config(STRICT)
class FlopsProfiler(TypedDict, total=False):
    enabled: StrictBool
    recompute_fwd_factor: Annotated[float, Field(ge=0), BeforeValidator(_number)]
    profile_step: Whole
    module_depth: Annotated[int, Field(ge=-1), BeforeValidator(_number)]
    top_modules: Positive
    detailed: StrictBool
    output_file: str | None


@with_config(STRICT)
class DataTypes(TypedDict, total=False):
    grad_accum_dtype: Dtype | None
    keep_in_fp32_modules: list[str] | None


UNCHECKED = (
    "amp", "autotuning", "checkpoint", "comet", "compile", "compression_training", "csv_monitor", "curriculum_learning",
    "data_efficiency", "datastates_ckpt", "eigenvalue", "elasticity", "expert_parallel", "graph_harvesting",
    "hybrid_engine", "nebula", "pipeline", "progressive_layer_drop", "quantize_training", "sparse_attention",
    "tensor_parallel", "tensorboard", "timers", "torch_autocast", "wandb", "weight_quantization",
)  # fmt: skip
"""Sections of DeepSpeed's that have nothing to do with memory layout and precision: they are handed on as they are."""

Top = with_config(STRICT)(
    TypedDict(
        "Top",
        {
            "zero_optimization": ZeroOptimization,
            "bf16": Bf16,
            "fp16": Fp16,
            "activation_checkpointing": ActivationCheckpointing,
            "comms_logger": CommsLogger,
            "aio": Aio,
            "flops_profiler": FlopsProfiler,
            "data_types": DataTypes,
            "communication_data_type": Dtype | None,
            "seq_parallel_communication_data_type": Dtype | None,
            "dataloader_drop_last": StrictBool,
            "disable_allgather": StrictBool,
            "disable_python_gc": StrictBool,
            "dump_state": StrictBool,
            "gradient_allreduce_op": str,
            "gradient_predivide_factor": Annotated[float, Field(gt=0), BeforeValidator(_number)],
            "log_level": str | None,
            "memory_breakdown": StrictBool,
            "prescale_gradients": StrictBool,
            "sparse_gradients": StrictBool,
            "steps_per_print": Whole | None,
            "use_data_before_expert_parallelism": StrictBool,
            "vocabulary_size": Whole | None,
            "wall_clock_breakdown": StrictBool,
            "zero_allow_untested_optimizer": StrictBool,
            "zero_force_ds_cpu_optimizer": StrictBool,
            **dict.fromkeys(UNCHECKED, Any),
        },
        total=False,
    )
)


def check_keys(config: dict[str, Any], origin: str) -> None:
    """Raises ValueError, one line that begins with `origin`, for an unknown key or a value of a wrong type or range."""
    _refuse_unknown(config, Top, origin)
    try:
        TypeAdapter(Top).validate_python(config)
    except ValidationError as error:
        raise ValueError(f"{origin}: {first_problem(error, without=('auto', 'bool', _LITERAL))}") from error


_LITERAL = "literal['auto']"
"""What pydantic adds to the place of a value that may be a switch or `auto`."""


def _refuse_unknown(values: dict[str, Any], kind: type, origin: str, prefix: str = "") -> None:
    known = get_type_hints(kind)
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{origin}: unknown key {prefix}{label(key)}{nearest(key, known)}")
        if not is_typeddict(known[key]):
            continue
        if not isinstance(value, dict):
            raise ValueError(f"{origin}: {prefix}{key}: want a JSON object, got {shown(value)}")
        _refuse_unknown(value, known[key], origin, f"{prefix}{key}.")
