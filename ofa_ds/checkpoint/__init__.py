"""Checkpoints: one safetensors file per rank and one manifest; written atomically, read at any world size and stage."""

from ofa_ds.checkpoint.load import load, load_model_weights, load_weights, resume
from ofa_ds.checkpoint.runs import latest
from ofa_ds.checkpoint.save import BackgroundSaver, save
from ofa_ds.checkpoint.verify import describe, verify

__all__ = [
    "BackgroundSaver", "describe", "latest", "load", "load_model_weights", "load_weights", "resume", "save", "verify",
]  # fmt: skip
