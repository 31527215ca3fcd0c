"""config.json of Hugging Face's and ModelScope's OFA, and fairseq's `cfg.model`, from and to our ModelConfig.

Fields and defaults: docs/ofa.md, Foreign files: Hugging Face and ModelScope. Our exports add a key `ofa_ds` with the
whole architecture, so that what no field of theirs can say (a stem of our own, a ViT's heads) comes back exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ofa_ds.convert.architecture import architecture, nearest_preset
from ofa_ds.model.config import ConvConfig, ModelConfig, ResNetConfig, backbone_from

OURS = "ofa_ds"

_RESNETS = {(2, 2, 2): "resnet18", (3, 4, 6): "resnet50", (3, 4, 23): "resnet101", (3, 8, 36): "resnet152"}
_VITS = {768: "vit_base", 1024: "vit_large", 1280: "vit_huge"}
_SAME = (
    "token_bucket_size", "image_bucket_size", "code_image_size", "attn_scale_factor", "interpolate_position",
    "orig_patch_image_size",
)  # fmt: skip


def hints_from_port(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ModelConfig that a config.json tells. Raises ValueError where it is of a model that OFA here is not."""
    _refuse(values, {"activation_function": "gelu", "normformer": True, "scale_embedding": False,
                     "layernorm_embedding": True, "patch_layernorm_embedding": True, "add_type_embedding": True,
                     "encoder_normalize_before": True, "decoder_normalize_before": True, "exclude_mlp": True,
                     "temperature_init_value": None, "use_image_feature": True})  # fmt: skip
    if OURS in values:
        return _ours(values[OURS])
    hints = {"orig_patch_image_size": 224} | {name: values[name] for name in _SAME if name in values}
    use_ofasys = values.get("use_ofasys", False)
    if use_ofasys:
        hints["share_attn_bias"] = values.get("share_attn_bias", False)
        hints["entangle_position_embedding"] = values.get("entangle_position_embedding", False)
        hints["disable_entangle"] = values.get("disable_entangle", False)
        hints["gamma"] = values.get("gamma", 1.0) if values.get("use_gamma_feature") else None
    else:  # this code adds decoder positions only with both flags (docs/ofa.md, Model: layers)
        adds = values.get("entangle_position_embedding", False) and not values.get("disable_entangle", False)
        hints["disable_entangle"] = not adds
    return hints | {"use_ofasys": use_ofasys}


def to_port(config: ModelConfig) -> dict[str, Any]:
    """A config.json, complete."""
    backbone = config.backbone
    is_resnet = isinstance(backbone, ResNetConfig)
    width = None if is_resnet else backbone.channels
    heads = config.num_heads
    adds_positions = config.adds_decoder_positions
    return {
        "model_type": "ofa", "architectures": ["OFAModel"], "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions, "d_model": config.dim,
        "encoder_layers": config.encoder_layers, "encoder_ffn_dim": config.ffn_dim, "encoder_attention_heads": heads,
        "decoder_layers": config.decoder_layers, "decoder_ffn_dim": config.ffn_dim, "decoder_attention_heads": heads,
        "num_hidden_layers": config.encoder_layers, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
        "use_cache": True, "is_encoder_decoder": True, "activation_function": "gelu", "dropout": config.dropout,
        "attention_dropout": config.attention_dropout, "activation_dropout": 0.0, "classifier_dropout": 0.0,
        "init_std": config.init_std, "scale_embedding": False, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 0, "forced_eos_token_id": 2, "encoder_normalize_before": True,
        "decoder_normalize_before": True, "normformer": True, "encoder_drop_path_rate": config.drop_path,
        "decoder_drop_path_rate": config.drop_path, "layernorm_embedding": True, "patch_layernorm_embedding": True,
        "code_layernorm_embedding": not config.use_ofasys, "add_type_embedding": True,
        "share_decoder_input_output_embed": True, "tie_word_embeddings": True,
        "resnet_type": _RESNETS.get(backbone.depths, "custom") if is_resnet else "resnet101",
        "resnet_model_path": None, "resnet_drop_path_rate": config.backbone_drop_path if is_resnet else 0.0,
        "vit_type": _VITS.get(width, "custom") if width else "vit_base",
        "vit_drop_path_rate": 0.0 if is_resnet else config.backbone_drop_path,
        **{name: getattr(config, name) for name in _SAME},
        "entangle_position_embedding": config.entangle_position_embedding if config.use_ofasys else adds_positions,
        "disable_entangle": config.disable_entangle if config.use_ofasys else not adds_positions,
        "share_attn_bias": config.share_attn_bias, "use_image_feature": True, "use_ofasys": config.use_ofasys,
        "use_gamma_feature": config.gamma is not None, "gamma": 1.0 if config.gamma is None else config.gamma,
        "exclude_mlp": True, "temperature_init_value": None, "remove_decoder_type_embedding": False, "mlp_dim": 512,
        OURS: architecture(config),
    }  # fmt: skip


def hints_from_fairseq(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ModelConfig that fairseq's `args` or `cfg.model` tell; what is absent has fairseq's default."""
    _refuse(values, {"activation_fn": "gelu", "scale_attn": True, "scale_fc": True, "scale_heads": True,
                     "scale_resids": False, "no_scale_embedding": True, "add_type_embedding": True})  # fmt: skip
    if OURS in values:
        return _ours(values[OURS])
    hints = {name: values[name] for name in _SAME if name in values}
    # Without the flag fairseq adds decoder positions (docs/ofa.md, Model: layers).
    return hints | {"disable_entangle": values.get("disable_entangle", False), "use_ofasys": False}


def to_fairseq(config: ModelConfig) -> dict[str, Any]:
    """`cfg.model` of a checkpoint."""
    backbone = config.backbone
    sizes = {"embed_dim": config.dim, "ffn_embed_dim": config.ffn_dim, "attention_heads": config.num_heads}
    names = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sizes.items()}
    arch = f"ofa_{nearest_preset(config)[0]}"
    return {
        "_name": arch, "arch": arch, **names,
        "encoder_layers": config.encoder_layers, "decoder_layers": config.decoder_layers,
        "max_source_positions": config.max_positions, "max_target_positions": config.max_positions,
        "resnet_type": _RESNETS.get(backbone.depths, "custom") if isinstance(backbone, ResNetConfig) else "custom",
        "resnet_model_path": None, "resnet_drop_path_rate": config.backbone_drop_path, "freeze_resnet": False,
        "sync_bn": config.batch_norm == "sync", "activation_fn": "gelu", "no_scale_embedding": True,
        "encoder_normalize_before": True, "decoder_normalize_before": True, "share_all_embeddings": True,
        "share_decoder_input_output_embed": True, "layernorm_embedding": True, "patch_layernorm_embedding": True,
        "code_layernorm_embedding": True, "add_type_embedding": True, "scale_attn": True, "scale_fc": True,
        "scale_heads": True, "scale_resids": False, "dropout": config.dropout,
        "attention_dropout": config.attention_dropout, "encoder_drop_path_rate": config.drop_path,
        "decoder_drop_path_rate": config.drop_path, **{name: getattr(config, name) for name in _SAME},
        "entangle_position_embedding": config.entangle_position_embedding,
        "disable_entangle": config.disable_entangle, OURS: architecture(config),
    }  # fmt: skip


def is_official(config: ModelConfig) -> bool:
    """Whether other programs have the code of this model."""
    return not isinstance(config.backbone, ConvConfig)


def _ours(values: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ValueError(
            f"{OURS} in its configuration has fields that this version does not know: {', '.join(unknown)}"
        )
    return {**values, "backbone": backbone_from(values["backbone"])}


def _refuse(values: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, want in wanted.items():
        if name in values and values[name] != want:
            raise ValueError(f"{name} = {values[name]!r} in its configuration; OFA here has {want!r} only")
