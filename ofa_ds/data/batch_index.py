"""`FAMILY.index`: where each record batch of a family's shards is, and each of its buffers; mapped, never parsed.

One entry a record batch, the shards' one after another, little-endian:

    rows_end  u8      one past its last row within the shard
    byte_end  u8      one past its last byte in the file; the first batch of a file begins at byte 0, with the header
    xxh3      u8      xxh3-64 of its bytes
    places    u4 [n]  where each buffer of `KEPT` begins, from the batch's first byte on; 0 for an empty one

and zeros up to a multiple of 8 bytes. The manifest has the checksum of each shard's entries, which is compared when
that shard is first touched: at 10^9 rows nothing else would have to read all of them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import xxhash

from ofa_ds.data.columns import KEPT, SCHEMAS
from ofa_ds.data.manifest import MANIFEST, Shard
from ofa_ds.data.open_file import MappedFile


def index_file(folder: Path, family: str) -> Path:
    return folder / f"{family}.index"


@lru_cache
def entry_type(family: str) -> np.dtype:
    """Of one entry: fields rows_end, byte_end, xxh3 (u8 each) and places (u4 [buffers])."""
    num_places = sum(len(KEPT[kind]) for kind in SCHEMAS[family].types)
    size = 24 + 4 * (num_places + num_places % 2)
    formats = ["<u8", "<u8", "<u8", ("<u4", (num_places,))]
    names = ["rows_end", "byte_end", "xxh3", "places"]
    return np.dtype({"names": names, "formats": formats, "offsets": [0, 8, 16, 24], "itemsize": size})


@lru_cache
def entry_reader(family: str) -> Callable[[memoryview, int], tuple[int, ...]]:
    """(entries of a shard, batch) -> (first row, first byte, one past the last row and the last byte, *places)."""
    size, num_places = entry_type(family).itemsize, entry_type(family)["places"].shape[0]
    alone = struct.Struct(f"<QQ8x{num_places}I").unpack_from
    with_the_one_before = struct.Struct(f"<QQ{size - 16}xQQ8x{num_places}I").unpack_from

    def read(entries: memoryview, batch: int) -> tuple[int, ...]:
        return with_the_one_before(entries, size * (batch - 1)) if batch else (0, 0, *alone(entries, 0))

    return read


def write_index(folder: Path, family: str, entries: Iterable[np.ndarray]) -> None:
    """entries: of each shard, in the order of the manifest, as `ShardWriter.close` gave them."""
    with index_file(folder, family).open("wb") as file:
        for part in entries:
            file.write(part.tobytes())


class BatchIndex:
    """The entries of one family. Nothing is read before a shard's are asked for; safe in threads and after a fork."""

    def __init__(self, folder: Path, family: str, shards: Sequence[Shard]) -> None:
        self.path, self._family, self._shards = index_file(folder, family), family, shards
        size = entry_type(family).itemsize
        self._ends = [size * count for count in accumulate(shard.batches for shard in shards)]

    @cached_property
    def _file(self) -> MappedFile:
        return MappedFile(self.path, self._ends[-1], MANIFEST)

    def entries(self, number: int) -> memoryview:
        """The bytes of the entries of shard `number`.

        Raises RuntimeError, with the file, where they are not those that the manifest describes, or contradict it;
        OSError.
        """
        if self._file.data.size() != self._file.size:
            raise self._file.wrong_size()
        shard, start = self._shards[number], self._ends[number - 1] if number else 0
        found = memoryview(self._file.data)[start : self._ends[number]]
        if xxhash.xxh3_64_hexdigest(found) != shard.index_xxh3:
            raise RuntimeError(
                f"{self.path}: what it says of {shard.file} has another checksum than {MANIFEST} says; "
                "copy or build it again"
            )
        if problem := contradiction(np.frombuffer(found, entry_type(self._family)), shard):
            raise RuntimeError(f"{self.path}: {shard.file}: {problem}; build it again")
        return found


def contradiction(entries: np.ndarray, shard: Shard) -> str | None:
    """What in the entries of a shard cannot be, by itself and by the manifest."""
    for name, total in (("rows_end", shard.rows), ("byte_end", shard.num_bytes)):
        ends = entries[name]
        if ends[0] < 1 or not (ends[1:] > ends[:-1]).all():
            return f"{name}: want each larger than the one before"
        if name == "rows_end" and ends[-1] != total:
            return f"rows_end: the last is {ends[-1]}, {MANIFEST} says {total} rows"
        if name == "byte_end" and ends[-1] >= total:
            return f"byte_end: the last is {ends[-1]} of {total} bytes"
    if (entries["places"] % 8).any() or (entries["byte_end"] % 8).any():
        return "places: want multiples of 8"
    sizes = np.diff(entries["byte_end"], prepend=np.uint64(0))
    if (entries["places"] > sizes[:, None]).any():
        return "places: one is outside its record batch"
    return None
