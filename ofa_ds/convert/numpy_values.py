"""NumPy's numbers in a file of `torch.save`, read without running NumPy's own unpickling.

fairseq's trainer leaves numbers such as `np.float64` among its metrics. A pickle names NumPy's functions for them; the
stand-ins here take those names and give plain Python values. Arrays, which nothing here looks at, stay bags of bytes.
"""

from __future__ import annotations

from pickle import UnpicklingError
from typing import Any

import numpy as np

_KINDS = "biufcSU"
"""Booleans, whole numbers, floats, complex numbers, bytes and text: types whose values are their bytes alone."""
_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
"""Before NumPy 2, and since."""


class Dtype:
    """Stands in for `numpy.dtype`: made from a type's short name, then told its byte order."""

    def __init__(self, name: Any, align: bool = False, copy: bool = True) -> None:
        """Raises UnpicklingError for a type that is not a plain number or text, such as object."""
        try:
            kind = np.dtype(name) if isinstance(name, str) and len(name) <= 16 else None
        except (TypeError, ValueError, SyntaxError):
            kind = None
        if kind is None or kind.kind not in _KINDS:
            raise UnpicklingError(f"a NumPy value of type {str(name)[:40]!r}, want a number or text")
        self.dtype = kind

    def __setstate__(self, state: Any) -> None:
        """state: numpy.dtype's own, whose second item is the byte order."""
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise UnpicklingError(f"a NumPy type with byte order {str(order)[:10]!r}")
        self.dtype = self.dtype.newbyteorder(order)


def scalar(dtype: Any, data: Any) -> bool | int | float | complex | bytes | str:
    """Stands in for NumPy's function that makes a number of its bytes. Raises UnpicklingError for anything else."""
    if not isinstance(dtype, Dtype) or not isinstance(data, bytes) or len(data) != dtype.dtype.itemsize:
        raise UnpicklingError("a NumPy value that is not a number's bytes")
    value = np.frombuffer(data, dtype.dtype)[0].item()
    return complex(value) if dtype.dtype.kind == "c" else float(value) if dtype.dtype.kind == "f" else value


class Array:
    """Stands in for an array; holds what the pickle says of it."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def reconstruct(kind: Any, shape: Any, typecode: Any) -> Array:
    """Stands in for NumPy's function that makes an empty array to be filled."""
    return Array()


STAND_INS: list[tuple[Any, str]] = [
    (Dtype, "numpy.dtype"),
    (Array, "numpy.ndarray"),
    *((scalar, f"{module}.scalar") for module in _MODULES),
    *((reconstruct, f"{module}._reconstruct") for module in _MODULES),
]
"""For `TorchFile(allow=...)`."""
