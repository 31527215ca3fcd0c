"""Reading safetensors files as bytes, and checking them against the checksums in their headers."""

from __future__ import annotations

import errno
import math
import mmap
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ofa_ds.storage import strict_json
from ofa_ds.storage.direct import BLOCK_BYTES, set_direct

MAX_HEADER_BYTES = 100_000_000
"""safetensors' own limit."""

CHUNK_BYTES = 1 << 23
"""What is read, converted or checked at once: streaming a tensor of any size takes this much memory."""

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "U8": 1, "I32": 4, "I64": 8, "BOOL": 1}


class DamagedError(ValueError):
    """A file is not what was written, or was never finished; the message names it."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in its file."""

    dtype: str
    """One of ITEM_BYTES."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the end of the header."""
    end: int


class SafetensorsFile:
    """The header is read at once and checked, the rest as asked for.

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
        header = bytearray(length)
        read_into(self._file, memoryview(header), 8, path)
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

    def _parse(self, header: bytearray) -> None:
        try:
            fields = strict_json.loads(header)
            self.metadata: dict[str, str] = fields.pop("__metadata__", {})
            self.entries = {name: _stored(**values) for name, values in fields.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedError(f"{self.path}: not a safetensors header: {error}") from error

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def names(self) -> list[str]:
        return list(self.entries)

    def entry(self, name: str) -> Stored:
        """Raises DamagedError where there is no such tensor."""
        if name not in self.entries:
            raise DamagedError(f"{self.path}: holds no {name}")
        return self.entries[name]

    def read_into(self, name: str, buffer: memoryview, start: int = 0) -> None:
        """Fill the buffer with a tensor's bytes from byte `start` on."""
        entry = self.entry(name)
        if start < 0 or start + len(buffer) > entry.end - entry.start:
            want = f"{start} to {start + len(buffer)}"
            raise DamagedError(f"{self.path}: {name} has {entry.end - entry.start} bytes, want {want}")
        read_into(self._file, buffer, self.begin + entry.start + start, self.path)

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
                problems.append(wrong_sum(self.path, name, found.hexdigest(), want))
        return problems

    def _blocks(self, start: int, end: int) -> Iterator[memoryview]:
        """Bytes start : end after the header, in order; each block is overwritten by the next one."""
        buffer = memoryview(mmap.mmap(-1, CHUNK_BYTES))
        at, end = self.begin + start, self.begin + end
        skipped = at % BLOCK_BYTES
        at -= skipped
        while at < end:
            count = min(CHUNK_BYTES, end - at)
            read_block(self._file, buffer, count, at, self.path)
            yield buffer[skipped:count]
            at, skipped = at + count, 0


def wrong_sum(path: Path, name: str, found: str, want: str | None) -> str:
    """What is said of a tensor with the wrong checksum."""
    return f"{path}: {name} has checksum {found}, was written with {want}"


def read_into(descriptor: int, buffer: memoryview, at: int, path: Path) -> None:
    """Fill the buffer from byte `at` of a file. Raises DamagedError where it ends before that, OSError naming it."""
    while buffer:
        try:
            count = os.preadv(descriptor, [buffer[: 1 << 30]], at)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        if not count:
            raise DamagedError(f"{path}: ends at byte {at}")
        buffer, at = buffer[count:], at + count


def read_block(descriptor: int, buffer: memoryview, count: int, at: int, path: Path) -> None:
    """Fill the first `count` bytes, past the page cache if the descriptor says so: `at` and the buffer are aligned.

    The disk may be asked for a whole last block.
    """
    whole = -(-count // BLOCK_BYTES) * BLOCK_BYTES
    done = 0
    while done < count:
        try:
            got = os.preadv(descriptor, [buffer[done:whole]], at + done)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise OSError(error.errno, error.strerror, str(path)) from error
            set_direct(descriptor, False)  # another alignment is wanted, or a read ended within a block
            read_into(descriptor, buffer[done:count], at + done, path)
            return
        if not got:
            raise DamagedError(f"{path}: ends at byte {at + done}")
        done += got


def _stored(dtype: str, shape: list[int], data_offsets: list[int]) -> Stored:
    start, end = whole_numbers(data_offsets)
    want = math.prod(whole_numbers(shape)) * ITEM_BYTES[dtype]
    if end - start != want:
        raise ValueError(f"{shape} of {dtype} takes {want} bytes, offsets say {end - start}")
    return Stored(dtype, tuple(shape), start, end)


def whole_numbers(values: list[int]) -> list[int]:
    """The values. Raises ValueError where one is no int of at least 0."""
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"want whole numbers, got {values}")
    return values


def check_size(path: Path, num_bytes: int | None = None) -> int:
    """The size of a plain file. Raises DamagedError where it is none (a link is none), or of another size.

    Raises OSError where the system does not tell: that is no damage.
    """
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        status = None
    if status is None or not stat.S_ISREG(status.st_mode):
        raise DamagedError(f"{path}: missing, or not a plain file")
    found = status.st_size
    if num_bytes is not None and found != num_bytes:
        raise DamagedError(f"{path}: has {found} bytes, was written with {num_bytes}")
    return found
