"""Imports of torch and what needs it, without looking for garbage in it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Around the imports of a command: they, and the end of the process, take two thirds of the time.

    Modules stay to the end. Python's collector would go through torch's quarter of a million objects several times
    while they are imported, and once more at the end.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
