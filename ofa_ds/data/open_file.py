"""Files read at any place: by `pread`, where one that is cut is an error and never a SIGBUS; or mapped, for speed."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import xxhash

_HASHED_AT_ONCE = 1 << 20


class OpenFile:
    """A file open for reading. It is closed when nobody refers to it, so that no thread loses it in the middle."""

    def __init__(self, path: Path, size: int, promise: str) -> None:
        """Raises RuntimeError where its size in bytes is not `size`, which `promise` says."""
        self.path, self.size, self._promise = path, size, promise
        self._number = -1
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if (found := os.fstat(self._number).st_size) != size:
            raise wrong_size(path, size, found, promise)

    def __del__(self) -> None:
        if self._number >= 0:
            os.close(self._number)

    def read(self, start: int, size: int) -> bytes:
        """Raises RuntimeError where the bytes are not in the file as promised, or no longer in it."""
        if size < 0 or start < 0 or start + size > self.size:
            place = f"bytes {start} ... {start + size} of {self.size}"
            raise RuntimeError(f"{self.path}: damaged: it points at {place}; build it again")
        data = os.pread(self._number, size, start)
        if len(data) == size:
            return data
        parts = [data]
        while (size := size - len(parts[-1])) and parts[-1]:  # a read stops after 2 GiB, and at an interrupt
            start += len(parts[-1])
            parts.append(os.pread(self._number, size, start))
        if size:
            found = os.fstat(self._number).st_size
            raise wrong_size(self.path, self.size, found, self._promise)
        return b"".join(parts)

    def xxh3_64(self, start: int, stop: int) -> int:
        """Checksum of bytes start ... stop - 1. Raises as `read` does."""
        digest = xxhash.xxh3_64()
        for place in range(start, stop, _HASHED_AT_ONCE):
            digest.update(self.read(place, min(_HASHED_AT_ONCE, stop - place)))
        return digest.intdigest()


class MappedFile:
    """A file mapped for reading: its pages are those of all processes that map it. Unmapped when nobody refers to it.

    A file that is cut under its mapping ends the process by SIGBUS when what was cut is touched; so readers compare
    `data.size()`, what the file has now, with `size` before each row. What is left is a cut in the microseconds between
    that and the row's last byte.
    """

    __slots__ = ("path", "size", "data", "ints", "_promise")

    def __init__(self, path: Path, size: int, promise: str) -> None:
        """size: in bytes, more than 0. Raises RuntimeError where it is not the file's, which `promise` says."""
        self.path, self.size, self._promise = path, size, promise
        with path.open("rb") as file:
            if (found := os.fstat(file.fileno()).st_size) != size:
                raise wrong_size(path, size, found, promise)
            self.data = mmap.mmap(file.fileno(), size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        self.ints = memoryview(self.data)[: size & ~3].cast("i")
        """The whole file as int32."""

    def wrong_size(self) -> RuntimeError:
        return wrong_size(self.path, self.size, self.data.size(), self._promise)


def wrong_size(path: Path, want: int, found: int, promise: str) -> RuntimeError:
    return RuntimeError(
        f"{path}: want {want} bytes as in {promise}, got {found}; copy or build it again, and do not write it in place"
    )
