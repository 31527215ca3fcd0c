"""Parameter names. The model's own are the official fairseq ones; this is the one table for everything else.

HF and ModelScope checkpoints, and the 6B, use the port's names (docs/ofa.md, Model: names).
"""

from __future__ import annotations

ALIASES = {
    "decoder.embed_tokens.weight": "encoder.embed_tokens.weight",
    "decoder.output_projection.weight": "encoder.embed_tokens.weight",
}
"""Names under which official files repeat a tensor."""

RECOMPUTED = ("version", "token_rp_bucket", "image_rp_bucket", "image_position_idx")
"""Last parts of the names of official buffers that follow from the configuration: written, never read."""

_PORT_PARTS = {
    "encoder": {"attn_ln": "self_attn_mid_layer_norm", "ffn_layernorm": "ffn_layer_norm"},
    "decoder": {
        "self_attn_ln": "self_attn_mid_layer_norm",
        "cross_attn_ln": "cross_attn_mid_layer_norm",
        "encoder_attn": "cross_attn",
        "encoder_attn_layer_norm": "cross_attn_layer_norm",
        "ffn_layernorm": "ffn_layer_norm",
    },
}
"""Part of a layer's parameter name -> what the port calls it."""


def to_port_name(name: str) -> str:
    """The HF/ModelScope name of an official one."""
    return _renamed(name, _PORT_PARTS)


def from_port_name(name: str) -> str:
    """The official name of an HF/ModelScope one."""
    return _renamed(name, {side: {new: old for old, new in parts.items()} for side, parts in _PORT_PARTS.items()})


def is_recomputed(name: str) -> bool:
    """Whether an official name is a buffer that follows from the configuration."""
    return name.rsplit(".", 1)[-1] in RECOMPUTED


def _renamed(name: str, table: dict[str, dict[str, str]]) -> str:
    side, *rest = name.split(".")
    if len(rest) < 3 or rest[0] != "layers":
        return name
    rest[2] = table[side].get(rest[2], rest[2])
    return ".".join([side, *rest])
