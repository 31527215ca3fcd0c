"""Which OFA a set of tensors is: sizes from the shapes, switches from what the file's configuration says."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ofa_ds.convert.weights import shapes_of
from ofa_ds.model.config import PRESETS, Backbone, ConvConfig, ModelConfig, ResNetConfig, ViTConfig

Shapes = Mapping[str, tuple[int, ...]]

RUN_FIELDS = (
    "vocab_size", "dropout", "attention_dropout", "drop_path", "backbone_drop_path", "batch_norm",
    "pixel_norm", "activation_checkpointing", "init_std", "kernels",
)  # fmt: skip
"""Fields of ModelConfig that a recipe sets, or that only matter while a model is made; the rest is architecture."""

_SIZES = ("dim", "ffn_dim", "num_heads", "encoder_layers", "decoder_layers", "backbone", "use_ofasys")
_SHOWN = 12
_VIT_HEADS = {768: 12, 1024: 16, 1280: 16, 1408: 16}
"""Heads of CLIP's towers by width: no shape tells them."""


def architecture(config: ModelConfig) -> dict[str, Any]:
    """The fields that make two models the same model, as plain values."""
    values = dataclasses.asdict(config)
    return {name: value for name, value in values.items() if name not in RUN_FIELDS}


def nearest_preset(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The preset that differs in the fewest fields, and these fields as this model has them."""
    wanted = architecture(config)

    def change(name: str) -> dict[str, Any]:
        have = architecture(PRESETS[name])
        return {field: value for field, value in wanted.items() if have[field] != value}

    best = min(PRESETS, key=lambda name: (len(change(name)), abs(PRESETS[name].dim - config.dim)))
    return best, change(best)


def recipe_change(config: ModelConfig) -> dict[str, Any]:
    """The recipe's `[model]` preset and change for this model."""
    name, change = nearest_preset(config)
    change.pop("code_image_size", None)  # [data] has it
    return {"preset": name, "change": change}


def config_of(shapes: Shapes, hints: Mapping[str, Any], origin: str) -> ModelConfig:
    """The configuration whose model has these shapes.

    hints: values of ModelConfig's fields that shapes cannot tell, such as code_image_size, or that are known anyway.
    Raises ValueError where the tensors that sizes are read from are missing.
    """
    try:
        sizes = _sizes(shapes, hints)
    except ValueError as error:
        raise ValueError(f"{origin}: not an OFA: a tensor that tells a size has another rank: {error}") from error
    except (KeyError, IndexError) as error:
        name, parameters = _closest(shapes)
        missing = len(parameters.keys() - shapes.keys())
        text = f"{origin}: not an OFA, or not all of it: {error} is missing, which sizes are read from"
        raise ValueError(f"{text}; closest is preset {name}, of which {missing} tensors are missing") from error
    alike = [preset for preset in PRESETS.values() if all(sizes[key] == getattr(preset, key) for key in _SIZES)]
    try:
        if alike:  # its switches, where nobody says anything else
            return dataclasses.replace(alike[0], **{**hints, **sizes})
        return ModelConfig(**{**hints, **sizes})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{origin}: its configuration is of no OFA: {error}") from error


def _sizes(shapes: Shapes, hints: Mapping[str, Any]) -> dict[str, Any]:
    """Every field that shapes tell."""
    vocab_size, dim = shapes["encoder.embed_tokens.weight"]
    token_rows = shapes["encoder.token_rel_pos_table_list.0.weight"][0]
    image_rows = shapes["encoder.image_rel_pos_table_list.0.weight"][0]
    encoder_layers, decoder_layers = _count(shapes, "encoder.layers"), _count(shapes, "decoder.layers")
    use_ofasys = "decoder.embed_image_positions.weight" not in shapes
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "dim": dim,
        "ffn_dim": shapes["encoder.layers.0.fc1.weight"][0],
        "num_heads": shapes["encoder.layers.0.self_attn.c_attn"][0],
        "encoder_layers": encoder_layers,
        "decoder_layers": decoder_layers,
        "max_positions": shapes["encoder.embed_positions.weight"][0] - 2,
        "token_bucket_size": (token_rows + 1) // 2,
        "image_bucket_size": (math.isqrt(image_rows - 3) + 1) // 2,
        "backbone": _backbone(shapes, hints.get("backbone")),
        "use_ofasys": use_ofasys,
    }
    if use_ofasys:
        if encoder_layers > 1:
            sizes["share_attn_bias"] = _count(shapes, "encoder.token_rel_pos_table_list") == 1
        sizes["entangle_position_embedding"] = "encoder.pos_q_linear.weight" not in shapes
        has_gamma = "encoder.layers.0.weight_ffn" in shapes
        sizes["gamma"] = (hints.get("gamma") or 1.0) if has_gamma else None
    return sizes


def _count(shapes: Shapes, prefix: str) -> int:
    """Members of a list of modules; 1 where the shapes lack it, so that what is missing is told by name."""
    found = {int(match[1]) for name in shapes if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))}
    return max(found, default=0) + 1


def _backbone(shapes: Shapes, hint: Backbone | None) -> Backbone:
    stem = "encoder.embed_images."
    if f"{stem}positional_embedding" in shapes:
        rows, channels = shapes[f"{stem}positional_embedding"]
        patch = shapes[f"{stem}conv1.weight"][-1]
        layers = _count(shapes, f"{stem}transformer.resblocks")
        known = hint.heads if isinstance(hint, ViTConfig) else _VIT_HEADS.get(channels, max(1, channels // 64))
        side = math.isqrt(rows - 1) * patch
        return ViTConfig(resolution=side, patch_size=patch, channels=channels, layers=layers, heads=known)
    if f"{stem}convs.0.weight" in shapes:
        count = _count(shapes, f"{stem}convs")
        return ConvConfig(patch_size=2**count, channels=shapes[f"{stem}convs.{count - 1}.weight"][0])
    one, two, three = (_count(shapes, f"{stem}layer{stage}") for stage in (1, 2, 3))
    return ResNetConfig(depths=(one, two, three))


def compare(shapes: Shapes, config: ModelConfig, origin: str, *, allow_missing: Sequence[str] = ()) -> list[str]:
    """Names that are missing and may be. Raises ValueError with both lists where any other is missing, or one is extra.

    allow_missing: patterns such as `encoder.layers.*.attn_ln.*`.
    """
    parameters, buffers = shapes_of(config)
    expected = parameters | buffers
    optional = {name for name in expected if name.endswith("num_batches_tracked")}  # a frozen BatchNorm has none
    missing = sorted(expected.keys() - shapes.keys())
    allowed = [name for name in missing if any(fnmatch.fnmatchcase(name, pattern) for pattern in allow_missing)]
    missing = [name for name in missing if name not in allowed and name not in optional]
    extra = sorted(shapes.keys() - expected.keys())
    other = [
        f"{name} is {list(shapes[name])}, want {list(expected[name])}"
        for name in sorted(expected.keys() & shapes.keys())
        if shapes[name] != expected[name]
    ]
    if missing or extra or other:
        best = _closest(shapes)[0]
        parts = [f"missing {_listed(missing)}"] if missing else []
        parts += [f"extra {_listed(extra)}"] if extra else []
        parts += [f"of another shape {_listed(other)}"] if other else []
        raise ValueError(
            f"{origin}: its tensors are not those of an OFA: {'; '.join(parts)}; the preset that fits best is {best}; "
            "--allow-missing PATTERN lets missing ones start fresh, --drop PATTERN leaves extra ones out"
        )
    return [*allowed, *(name for name in optional if name not in shapes)]


def _closest(shapes: Shapes) -> tuple[str, Shapes]:
    """The preset that shares the most names and shapes, and its own."""
    rows = shapes.get("encoder.embed_tokens.weight", (ModelConfig.__dataclass_fields__["vocab_size"].default,))[0]
    found = {}
    for name, preset in PRESETS.items():
        parameters, buffers = shapes_of(dataclasses.replace(preset, vocab_size=rows))
        found[name] = parameters | buffers

    def score(name: str) -> int:
        same = sum(shapes.get(key) == shape for key, shape in found[name].items())
        return 2 * same - len(found[name])

    best = max(found, key=score)
    return best, found[best]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{len(names)} ({shown}{', ...' if len(names) > _SHOWN else ''})"
