"""The tensors of a TorchScript archive, read without running anything of it.

`torch.load(weights_only=True)` refuses such archives, and `torch.jit.load` compiles the program that is in them. The
objects of its `data.pkl` are plain: the few instructions of a pickle that they consist of are carried out here, modules
become dicts, and every other instruction is refused.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_PICKLE_BYTES = 64 << 20
MAX_VALUES, MAX_NAME, MAX_DIMS = 100_000, 1000, 64
"""Of all modules together; characters of a weight's name; of a tensor, as torch has them."""
_CODE, _DATA = "constants.pkl", "data.pkl"

_DTYPES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "DoubleStorage": torch.float64,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class _Global(NamedTuple):
    """A name that the pickle mentions; nothing is imported."""

    module: str
    name: str


def is_torchscript(path: Path) -> bool:
    """Whether a file is such an archive, and not one of `torch.save`."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(f"/{_CODE}") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """{"blocks.0.weight": tensor, ...}: parameters and buffers, with the names that `state_dict` would give them.

    Raises ValueError, one line with the file: damaged, or its objects are more than modules, tensors and plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = _Machine(path, archive).run()
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path}: not a TorchScript archive, or damaged: {error}") from error
    return _tensors(path, found)


def _tensors(path: Path, root: dict[str, Any]) -> dict[str, Tensor]:
    """Modules may share others, so that a few bytes could say 2^n names, or names without end."""
    found: dict[str, Tensor] = {}
    pending, count = [("", root)], 0
    while pending:
        before, module = pending.pop()
        count += len(module)
        for key, value in module.items():
            name = f"{before}{key}"
            if count > MAX_VALUES or len(name) > MAX_NAME:
                raise ValueError(f"{path}: refused: more than {MAX_VALUES} values in modules, or modules in themselves")
            if isinstance(value, Tensor):
                found[name] = value
            elif isinstance(value, dict):
                pending.append((f"{name}.", value))
    return found


class _Machine:
    """A stack, a memo, the instructions of `_STEPS`, and the storages of the archive."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path = path
        self.archive = archive
        names = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith(f"/{_DATA}")]
        if len(names) != 1:
            raise ValueError(f"{path}: not a TorchScript archive: want one {_DATA}, got {len(names)}")
        self.folder = names[0].removesuffix(_DATA)
        self.storages: dict[str, Tensor] = {}
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> dict[str, Any]:
        data, position = self.member(_DATA, MAX_PICKLE_BYTES), 0
        try:
            for opcode, argument, position in pickletools.genops(data):
                if opcode.name == "STOP":
                    (found,) = self.stack
                    if not isinstance(found, dict):
                        raise TypeError
                    return found
                if opcode.name not in _STEPS:
                    raise ValueError(
                        f"{self.path}: {_DATA}, byte {position}: the instruction {opcode.name} has no place among "
                        "weights; nothing was run"
                    )
                _STEPS[opcode.name](self, argument)
        except (IndexError, KeyError, TypeError, AttributeError, UnicodeError, RuntimeError) as error:
            raise ValueError(f"{self.path}: {_DATA}, byte {position}: damaged ({type(error).__name__})") from error
        except ValueError as error:
            if str(error).startswith(str(self.path)):
                raise
            raise ValueError(f"{self.path}: {_DATA}, byte {position}: damaged: {error}") from error
        raise ValueError(f"{self.path}: {_DATA} ends before its objects do")

    def member(self, name: str, max_bytes: int) -> bytes:
        """A file of the archive. Tensors are stored as they are: a packed one could unpack to any size."""
        info = self.archive.getinfo(self.folder + name)
        if info.file_size > max_bytes or (info.compress_type != zipfile.ZIP_STORED and name != _DATA):
            raise ValueError(f"{self.path}: {name}: packed, or {info.file_size} bytes where at most {max_bytes} belong")
        return self.archive.read(info)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        at = self.marks.pop()
        found = self.stack[at:]
        del self.stack[at:]
        return found

    def popped(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise IndexError
        found = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return tuple(found)

    def mention(self, name: str) -> None:
        self.stack.append(_Global(*name.split(" ")))

    def append(self, values: list[Any]) -> None:
        if not isinstance(target := self.stack[-1], list):
            raise TypeError
        target += values

    def set_items(self, values: list[Any]) -> None:
        if not isinstance(target := self.stack[-1], dict) or len(values) % 2:
            raise TypeError
        if not all(isinstance(key, str | int) for key in values[::2]):  # to hash a tuple can take 2^n steps
            raise TypeError
        target.update(zip(values[::2], values[1::2], strict=True))

    def new(self) -> None:
        """An object of a class that the archive defines: a dict."""
        kind, _ = self.popped(2)
        if not isinstance(kind, _Global) or kind.module.split(".")[0] != "__torch__":
            raise ValueError(f"{self.path}: refused, it holds more than modules and tensors: a {'.'.join(kind)}")
        self.stack.append({})

    def build(self) -> None:
        target, state = self.popped(2)
        if (
            not isinstance(target, dict)
            or not isinstance(state, dict)
            or not all(isinstance(key, str) for key in state)
        ):
            raise TypeError
        target.update(state)
        self.stack.append(target)

    def call(self) -> None:
        """The three kinds of calls that TorchScript writes."""
        function, arguments = self.popped(2)
        if function == _Global("torch._utils", "_rebuild_tensor_v2"):
            self.stack.append(self.tensor(*arguments[:4]))
        elif function == _Global("collections", "OrderedDict") and not arguments:
            self.stack.append({})
        elif isinstance(function, _Global) and function.module == "torch.jit._pickle":  # a typed list
            self.stack.append(arguments[0])
        else:
            name = ".".join(function) if isinstance(function, _Global) else type(function).__name__
            raise ValueError(f"{self.path}: refused, it holds more than modules and tensors: a call of {name}")

    def storage(self) -> None:
        """("storage", its class, its file in data/, where it lay, elements) -> all of its elements [N]."""
        (kind, storage_class, key, _, numel) = self.popped(1)[0]
        if kind != "storage" or storage_class.module != "torch" or not isinstance(key, str):
            raise TypeError
        dtype = _DTYPES[storage_class.name]
        if key not in self.storages:
            data = self.member(f"data/{key}", numel * dtype.itemsize)
            self.storages[key] = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        if self.storages[key].dtype != dtype or self.storages[key].numel() != numel:
            raise ValueError(f"{self.path}: data/{key}: want {numel} elements of {dtype}")
        self.stack.append(self.storages[key])

    def tensor(self, storage: Tensor, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        if len(shape) != len(stride) or len(shape) > MAX_DIMS:
            raise ValueError(f"a tensor of {len(shape)} sizes and {len(stride)} strides")
        if not all(0 <= n < 1 << 63 for n in (offset, *shape, *stride)):  # their product would take for ever
            raise ValueError(f"a tensor of shape {shape!s:.80} and strides {stride!s:.80} at {offset!s:.20}")
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if math.prod(shape) > storage.numel() or (math.prod(shape) and last >= storage.numel()):
            raise ValueError(
                f"a tensor of shape {shape} and strides {stride} at {offset} of {storage.numel()} elements"
            )
        return storage.as_strided(shape, stride, offset)


_STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda machine, argument: None,
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), _Machine.push),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "NONE": lambda machine, _: machine.push(None),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.push(machine.popped(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.popped(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.popped(3)),
    "APPEND": lambda machine, _: machine.append(list(machine.popped(1))),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items(list(machine.popped(2))),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, at: machine.memo.__setitem__(at, machine.stack[-1])),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, at: machine.push(machine.memo[at])),
    "GLOBAL": _Machine.mention,
    "BINPERSID": lambda machine, _: machine.storage(),
    "REDUCE": lambda machine, _: machine.call(),
    "NEWOBJ": lambda machine, _: machine.new(),
    "BUILD": lambda machine, _: machine.build(),
}  # fmt: skip
"""Of each instruction that TorchScript writes."""
