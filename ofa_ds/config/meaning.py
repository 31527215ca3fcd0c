"""Which keys of a recipe say what a run learns from, in which order, and with which model: they may not change midway.

A checkpoint is gone on from only where these are as they were, or are named in `train.accept_changed`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ofa_ds.config.schema import Recipe

MEANING = (
    "train.seed",
    "batch.global_rows",
    "data.mix",
    "data.mix_changes",
    "data.sets",
    "data.task.name",
    "data.task.prompt",
    "data.task.objects",
    "data.task.premise",
    "data.task.constrained",
    "data.task.decoder_noise",
    "data.task.max_objects",
    "data.task.max_target_tokens",
    "data.task.language",
    "data.image_size",
    "data.infill_image_size",
    "data.code_image_size",
    "data.max_image_size",
    "data.sample_patches",
    "data.augment",
    "data.decode",
    "data.max_source_words",
    "data.max_target_words",
    "data.max_text_tokens",
    "data.extra_confidence",
    "optim.label_smoothing",
    "optim.freeze",
    "criterion.kind",
    "criterion.drop_worst_ratio",
    "criterion.drop_worst_after",
    "criterion.drop_best_ratio",
    "criterion.drop_best_after",
    "criterion.rdrop_alpha",
    "criterion.constraint_range",
    "criterion.log_end",
    "criterion.scst_beams",
    "criterion.scst_max_tokens",
    "criterion.scst_no_repeat_ngram",
    "criterion.scst_document_frequency",
    "criterion.scst_top_k",
    "criterion.scst_vqgan",
    "criterion.scst_clip",
    "model.preset",
    "model.change",
    "model.dropout",
    "model.attention_dropout",
    "model.drop_path",
    "model.batch_norm",
    "model.pixel_norm",
)
"""Order and content of the data, the loss, the model. A section stands for all of its keys."""

FREE = (
    "run_dir",
    "deepspeed",
    "kernels",
    "model.activation_checkpointing",
    "data.shards",
    "data.vocab",
    "data.heldout",
    "data.max_corrupt",
    "data.workers",
    "batch.micro_rows",
    "optim.peak_lr",
    "optim.end_lr",
    "optim.warmup_steps",
    "optim.warmup_ratio",
    "optim.weight_decay",
    "optim.betas",
    "optim.eps",
    "optim.clip_norm",
    "optim.ema_decay",
    "train.num_steps",
    "train.num_epochs",
    "train.evaluate_every",
    "train.evaluate_rows",
    "train.best_metric",
    "train.init_from",
    "train.init_changes",
    "train.accept_changed",
    "train.skip_steps",
    "train.max_bad_steps",
    "train.max_spike_sigma",
    "train.check_every_steps",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.save_in_background",
    "train.sample_every",
    "train.codes_model",
    "train.profile_steps",
    "train.profile_ranks",
    "train.memory_snapshot",
    "train.histograms_every",
    "train.wandb",
    "train.calibration",
)
"""Where and how it is computed and saved; what the fingerprints of data and vocabulary judge; and what people turn
while a run is under way: its length, the optimizer, and steps to pass over, which act from the next step on. Those
changes are told."""


def differences(saved: Recipe, now: Recipe, keys: tuple[str, ...]) -> dict[str, tuple[Any, Any]]:
    """The values of those keys that differ: (saved, now)."""
    pairs = {key: (_value(saved, key), _value(now, key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _value(recipe: Any, key: str) -> Any:
    for name in key.split("."):
        recipe = getattr(recipe, name)
    return recipe
