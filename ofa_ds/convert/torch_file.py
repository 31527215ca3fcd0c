"""`torch.save` files larger than memory: written and read piece by piece, never unpickled without `weights_only`."""

from __future__ import annotations

import argparse
import ctypes
import errno
import mmap
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ofa_ds.convert import numpy_values
from ofa_ds.storage.atomic import sync
from ofa_ds.storage.safetensors_file import CHUNK_BYTES, check_size

_PAGE = mmap.PAGESIZE
_FOREIGN_CLASS = re.compile(r"GLOBAL ([\w.]+)")
_UNPICKLER_SAYS = re.compile(r"WeightsUnpickler error:\s*(.+)")


class TorchFile:
    """A `torch.save` file. `content` is what was saved; its tensors are mapped: only what is touched is read."""

    def __init__(self, path: Path, allow: Sequence[type | tuple[type, str]] = ()) -> None:
        """allow: classes to rebuild beside torch's own, plain containers, argparse.Namespace and NumPy's numbers; as
        (class, "a.Name") in place of the class of that name. Raises ValueError, one line: it holds any other class, or
        is not torch's.
        """
        check_size(path)
        self.path = path
        self._mapped = zipfile.is_zipfile(path)  # before torch 1.6 files were no archives; they are read whole
        self.content: Any = self._load([argparse.Namespace, *numpy_values.STAND_INS, *allow])

    def _load(self, allow: Sequence[type | tuple[type, str]]) -> Any:
        try:
            with torch.serialization.safe_globals(list(allow)):
                return torch.load(self.path, map_location="cpu", mmap=self._mapped or None, weights_only=True)
        except pickle.UnpicklingError as error:
            found, other = _FOREIGN_CLASS.search(str(error)), _UNPICKLER_SAYS.search(str(error))
            reason = f"a {found[1]}" if found else other[1] if other else _first_line(error)
            raise ValueError(f"{self.path}: refused, it holds more than tensors and plain values: {reason}") from error
        except (RuntimeError, EOFError, LookupError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.path}: not a file of torch.save, or damaged: {_first_line(error)}") from error
        except OSError as error:
            if error.errno != errno.EINVAL:  # which is torch's way to say that an archive has no end
                raise
            raise ValueError(f"{self.path}: not a file of torch.save, or damaged: it has no end") from error

    def chunks(self, tensor: Tensor, start: int, numel: int) -> Iterator[Tensor]:
        """Elements start : start + numel in row-major order, some at a time; their memory is given back after each."""
        flat = tensor.detach().reshape(-1)
        step = max(1, CHUNK_BYTES // flat.element_size())
        for at in range(start, start + numel, step):
            piece = flat[at : min(at + step, start + numel)]
            yield piece
            if self._mapped:
                _forget(piece)

    def read(self, tensor: Tensor, start: int, numel: int) -> Tensor:
        """Elements start : start + numel of one of the file's tensors as fp32 [numel]."""
        result, at = torch.empty(numel), 0
        for piece in self.chunks(tensor, start, numel):
            result[at : at + piece.numel()] = piece
            at += piece.numel()
        return result


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@dataclass(frozen=True, eq=False)
class Slot:
    """A tensor of the file to be, whose elements come when it is written. The same Slot twice is one tensor, shared."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]
    """read(start, numel) -> the flat elements, in any floating dtype."""


def save(path: Path, content: Any, allow: Sequence[type | tuple[type, str]] = ()) -> None:
    """`torch.save` of nested dicts and lists in which a Slot stands for a tensor. Durable when it returns.

    Takes the memory of one piece: torch writes the file without the bytes of tensors, which are then filled in.
    allow: classes in the content beside plain ones, as in TorchFile; a (class, "a.Name") is written under that name.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a third of a second, which reading need not pay

    names = {each[0]: each[1] for each in allow if isinstance(each, tuple)}
    slots: dict[Slot, Tensor] = {}
    with FakeTensorMode():

        def fake(slot: Slot) -> Tensor:
            if slot not in slots:
                slots[slot] = torch.empty(slot.shape, dtype=slot.dtype)
            return slots[slot]

        stub = _replaced(content, fake)
        with torch.serialization.skip_data(materialize_fake_tensors=True), open(path, "xb") as file:
            torch.save(stub, file, pickle_module=_pickle_with(names))
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        file = TorchFile(path, allow)
    filled: set[Slot] = set()
    for slot, tensor in _pairs(content, file.content):
        if slot not in filled:
            filled.add(slot)
            _fill(file, slot, tensor)
    sync(path)


def _pickle_with(names: Mapping[type, str]) -> ModuleType:
    """A `pickle` that writes these classes under other names: of a package that need not be there to write for it."""

    class Pickler(pickle._Pickler):  # the one in C looks each class up by its name
        def save_global(self, obj: Any, name: str | None = None) -> None:
            if not isinstance(obj, type) or obj not in names:
                return super().save_global(obj, name)
            self.write(pickle.GLOBAL + "{}\n{}\n".format(*names[obj].rsplit(".", 1)).encode())
            self.memoize(obj)

    module = ModuleType("pickle_with_names")
    module.Pickler = Pickler
    return module


def _fill(file: TorchFile, slot: Slot, tensor: Tensor) -> None:
    start = 0
    for piece in file.chunks(tensor, 0, tensor.numel()):
        piece.copy_(slot.read(start, piece.numel()))
        start += piece.numel()


def _replaced(content: Any, fake: Callable[[Slot], Tensor]) -> Any:
    if isinstance(content, Slot):
        return fake(content)
    if isinstance(content, dict):
        return type(content)((key, _replaced(value, fake)) for key, value in content.items())
    if isinstance(content, (list, tuple)) and type(content) in (list, tuple):
        return type(content)(_replaced(value, fake) for value in content)
    return content


def _pairs(content: Any, saved: Any) -> Iterator[tuple[Slot, Tensor]]:
    if isinstance(content, Slot):
        yield content, saved
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _pairs(value, saved[key])
    elif isinstance(content, (list, tuple)):
        for value, other in zip(content, saved, strict=True):
            yield from _pairs(value, other)


def _forget(piece: Tensor) -> None:
    """Tell the kernel that these mapped pages are not needed here: its cache keeps them, this process does not.

    Pages that hold neighbours' bytes too stay.
    """
    begin = -(-piece.data_ptr() // _PAGE) * _PAGE
    end = (piece.data_ptr() + piece.numel() * piece.element_size()) // _PAGE * _PAGE
    if end > begin:
        _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


_libc = ctypes.CDLL(None, use_errno=True)
