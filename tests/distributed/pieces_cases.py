"""Models that are built in pieces, for tests; light enough to import while tests are collected."""

from __future__ import annotations

STEPS, SAVED = 3, 2
"""Of the 6B in full depth: steps on 3 ranks, and after which of them it is saved."""
LONG_STEPS, LONG_SAVED = 20, 10
START_MODEL = (
    "model.change.dim=512", "model.change.ffn_dim=2048", "model.change.num_heads=8", "model.change.encoder_layers=12",
    "model.change.decoder_layers=8", "data.image_size=56", "data.infill_image_size=28", "data.code_image_size=16",
    "data.vocab=vocab", "data.shards=shards",
    "model.change.backbone={resolution=28,patch_size=14,channels=64,layers=1,heads=2}",
)  # fmt: skip
"""A 6B of 73 M parameters."""
START_VOCAB = 400


def start_value(name: str) -> float:
    """Of every element of a tensor; exact in bfloat16."""
    return (sum(name.encode()) % 200 - 100) / 128
