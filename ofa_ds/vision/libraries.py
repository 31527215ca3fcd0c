"""The libraries of the extra `images`: imported only where pictures are judged; a missing one is said in one line."""

from __future__ import annotations

import importlib
import re
from types import ModuleType

import torch

INSTALL = "pip install 'ofa-ds[images]'"

_MISSING_OPERATOR = re.compile(r"operator torchvision::(\w+) does not exist")
_declared: list[torch.library.Library] = []


def library(name: str, what: str) -> ModuleType:
    """`open_clip` or `torch_fidelity`, or a module of theirs. what: is made with it.

    Raises ValueError that says how to install it.
    """
    try:
        _import_torchvision()
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{what} need {name}, which cannot be imported ({error}): {INSTALL}") from error


def _import_torchvision() -> None:
    """Both libraries import torchvision, and use no compiled operator of it.

    torchvision as built for CUDA cannot load these beside torch as built for CPUs, and its import then stops at the
    first one that it describes. The names are declared, without anything behind them, and the import goes on.
    """
    while True:
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            missing = _MISSING_OPERATOR.search(str(error))
            if missing is None:
                raise
            _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
            _declared[-1].define(f"{missing[1]}() -> ()")
        else:
            return
