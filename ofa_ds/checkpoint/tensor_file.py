"""Reading and writing the safetensors files of a checkpoint with torch's tensors."""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from ofa_ds.direct_file import BLOCK_BYTES, set_direct
from ofa_ds.tensor_writer import TensorSpec, TensorWriter

MAX_HEADER_BYTES = 100_000_000
"""safetensors' own limit."""

CHUNK_BYTES = 1 << 23
"""What is read, converted or checked at once: streaming a tensor of any size takes this much memory."""

_DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
    torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}


class DamagedError(ValueError):
    """A checkpoint is not what was written, or was never finished; the message names the file."""


def spec_of(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(name, _DTYPES[dtype], shape, math.prod(shape) * dtype.itemsize)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; its own memory where it is contiguous and on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """Write a safetensors file and make it durable. Returns its manifest entry."""
    with TensorWriter(path, [spec_of(name, each.dtype, tuple(each.shape)) for name, each in tensors.items()]) as file:
        for tensor in tensors.values():
            file.write(bytes_of(tensor))
    return file.entry


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the end of the header."""
    end: int


class TensorFile:
    """A safetensors file: the header is read at once and checked, the rest as asked for.

    Raises DamagedError where the header does not describe exactly the bytes of the file.
    """

    def __init__(
        self, path: Path, *, num_bytes: int | None = None, header_xxh3_128: str | None = None, direct: bool = False
    ) -> None:
        """num_bytes, header_xxh3_128: what the manifest says; None for a file that no manifest of ours describes.

        direct: only for `check`, which then asks the disk and not the page cache.
        """
        self.path = path
        num_bytes = check_size(path, num_bytes)
        self._file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        length = int.from_bytes(os.pread(self._file, 8, 0), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, num_bytes - 8):
            raise DamagedError(f"{path}: a header of {length} bytes in a file of {num_bytes}")
        header = os.pread(self._file, length, 8)
        if header_xxh3_128 is not None and xxhash.xxh3_128_hexdigest(header) != header_xxh3_128:
            raise DamagedError(f"{path}: its header has another checksum than the manifest says")
        self.begin = 8 + length
        self._parse(header)
        end = 0
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start != end:
                raise DamagedError(f"{path}: {name} starts at byte {entry.start}, want {end}")
            end = entry.end
        if self.begin + end != num_bytes:
            raise DamagedError(f"{path}: tensors end at byte {self.begin + end} of {num_bytes}")
        if direct:
            set_direct(self._file, True)

    def _parse(self, header: bytes) -> None:
        try:
            fields = json.loads(header)
            self.metadata: dict[str, str] = fields.pop("__metadata__", {})
            self.entries = {name: _stored(**values) for name, values in fields.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedError(f"{self.path}: not a safetensors header: {error}") from error

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def names(self) -> list[str]:
        return list(self.entries)

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        """Elements start : start + numel of the flat tensor, or the whole tensor in its shape."""
        entry = self.entries.get(name)
        if entry is None:
            raise DamagedError(f"{self.path}: holds no {name}")
        total = math.prod(entry.shape)
        count = total if numel is None else numel
        if start < 0 or start + count > total:
            raise DamagedError(f"{self.path}: {name} has {total} elements, want {start} to {start + count}")
        flat = torch.empty(count, dtype=entry.dtype)
        read_into(self._file, bytes_of(flat), self.begin + entry.start + start * entry.dtype.itemsize, self.path)
        return flat.reshape(entry.shape) if numel is None else flat

    def check(self, names: Sequence[str]) -> list[str]:
        """What is wrong with the bytes of these tensors, which lie one after the other."""
        problems = []
        blocks = self._blocks(self.entries[names[0]].start, self.entries[names[-1]].end) if names else iter(())
        part = memoryview(b"")
        for name in names:
            found, left = xxhash.xxh3_64(), self.entries[name].end - self.entries[name].start
            while left:
                part = part or next(blocks)
                count = min(left, len(part))
                found.update(part[:count])
                part, left = part[count:], left - count
            if found.hexdigest() != (want := self.metadata.get(name)):
                problems.append(f"{self.path}: {name} has checksum {found.hexdigest()}, was written with {want}")
        return problems

    def _blocks(self, start: int, end: int) -> Iterator[memoryview]:
        """Bytes start : end after the header, in order; each block is overwritten by the next one."""
        buffer = memoryview(mmap.mmap(-1, CHUNK_BYTES))
        at, end = self.begin + start, self.begin + end
        skipped = at % BLOCK_BYTES
        at -= skipped
        while at < end:
            count = min(CHUNK_BYTES, end - at)
            _read_block(self._file, buffer, count, at, self.path)
            yield buffer[skipped:count]
            at, skipped = at + count, 0


def read_into(descriptor: int, buffer: memoryview, at: int, path: Path) -> None:
    """Fill the buffer from byte `at` of a file. Raises DamagedError where it ends before that."""
    while buffer:
        count = os.preadv(descriptor, [buffer[: 1 << 30]], at)
        if not count:
            raise DamagedError(f"{path}: ends at byte {at}")
        buffer, at = buffer[count:], at + count


def _read_block(descriptor: int, buffer: memoryview, count: int, at: int, path: Path) -> None:
    """Fill the first `count` bytes, which may ask the disk for a whole last block."""
    whole = -(-count // BLOCK_BYTES) * BLOCK_BYTES
    done = 0
    while done < count:
        try:
            got = os.preadv(descriptor, [buffer[done:whole]], at + done)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            set_direct(descriptor, False)  # another alignment is wanted, or a read ended within a block
            read_into(descriptor, buffer[done:count], at + done, path)
            return
        if not got:
            raise DamagedError(f"{path}: ends at byte {at + done}")
        done += got


def _stored(dtype: str, shape: list[int], data_offsets: list[int]) -> Stored:
    start, end = whole_numbers(data_offsets)
    want = math.prod(whole_numbers(shape)) * _TORCH_DTYPES[dtype].itemsize
    if end - start != want:
        raise ValueError(f"{shape} of {dtype} takes {want} bytes, offsets say {end - start}")
    return Stored(_TORCH_DTYPES[dtype], tuple(shape), start, end)


def whole_numbers(values: list[int]) -> list[int]:
    """The values. Raises ValueError where one is no int of at least 0."""
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"want whole numbers, got {values}")
    return values


def check_size(path: Path, num_bytes: int | None = None) -> int:
    """The size of a plain file. Raises DamagedError where it is none (a link is none), or of another size."""
    if path.is_symlink() or not path.is_file():
        raise DamagedError(f"{path}: missing, or not a plain file")
    found = path.stat().st_size
    if num_bytes is not None and found != num_bytes:
        raise DamagedError(f"{path}: has {found} bytes, was written with {num_bytes}")
    return found


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
