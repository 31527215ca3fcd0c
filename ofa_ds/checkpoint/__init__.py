"""Checkpoints: one safetensors file per rank and one manifest; written atomically, read at any world size and stage.

The names below come with what they need: those who only look at checkpoints never wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ofa_ds.checkpoint.loading import load, load_model_weights, resume
    from ofa_ds.checkpoint.runs import latest
    from ofa_ds.checkpoint.saving import BackgroundSaver, save
    from ofa_ds.checkpoint.verifying import describe, verify

__all__ = [
    "BackgroundSaver", "describe", "latest", "load", "load_model_weights", "resume", "save", "verify",
]  # fmt: skip

_HOMES = {
    "loading": ("load", "load_model_weights", "resume"),
    "runs": ("latest",),
    "saving": ("BackgroundSaver", "save"),
    "verifying": ("describe", "verify"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
