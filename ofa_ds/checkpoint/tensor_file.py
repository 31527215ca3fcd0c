"""safetensors files with torch's tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ofa_ds.storage.safetensors_file import SafetensorsFile
from ofa_ds.storage.tensor_writer import FileEntry, TensorSpec, TensorWriter

_DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
    torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}


def spec_of(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(name, _DTYPES[dtype], shape, math.prod(shape) * dtype.itemsize)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; its own memory where it is contiguous and on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write a safetensors file and make it durable. Returns its manifest entry."""
    with TensorWriter(path, [spec_of(name, each.dtype, tuple(each.shape)) for name, each in tensors.items()]) as file:
        for tensor in tensors.values():
            file.write(bytes_of(tensor))
    return file.entry


class TensorFile(SafetensorsFile):
    """A safetensors file whose tensors are read as torch's."""

    def dtype(self, name: str) -> torch.dtype:
        return _TORCH_DTYPES[self.entry(name).dtype]

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        """Elements start : start + numel of the flat tensor, or the whole tensor in its shape.

        Raises DamagedError where there are no such.
        """
        shape, dtype = self.entry(name).shape, self.dtype(name)
        flat = torch.empty(math.prod(shape) if numel is None else numel, dtype=dtype)
        self.read_into(name, bytes_of(flat), start * dtype.itemsize)
        return flat.reshape(shape) if numel is None else flat
