"""Checkpoints: one safetensors file per rank and one manifest; written atomically, read at any world size and stage."""

from ofa_ds.checkpoint.load import describe, latest, load, load_model_weights, resume, verify
from ofa_ds.checkpoint.save import save

__all__ = ["describe", "latest", "load", "load_model_weights", "resume", "save", "verify"]
