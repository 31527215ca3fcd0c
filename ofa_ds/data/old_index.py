"""What an index file would say of shards of version 1, from their manifest and from Arrow itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa

from ofa_ds.data.arrow_layout import buffer_places
from ofa_ds.data.batch_index import contradiction, entry_type
from ofa_ds.data.manifest import MANIFEST, OldShard
from ofa_ds.data.open_file import OpenFile


class OldIndex:
    """Stands in for `batch_index.BatchIndex`. The metadata of a shard are read when it is first touched."""

    def __init__(self, folder: Path, family: str, shards: Sequence[OldShard]) -> None:
        self._folder, self._family, self._shards = folder, family, shards

    def entries(self, number: int) -> memoryview:
        """The bytes of the entries of shard `number`. Raises RuntimeError, OSError with the name of the file."""
        shard = self._shards[number]
        path = self._folder / shard.file
        entries = np.zeros(len(shard.batch_rows), entry_type(self._family))
        entries["rows_end"] = list(accumulate(shard.batch_rows))
        entries["byte_end"] = shard.byte_ends[:-1]
        entries["xxh3"] = [int(digest, 16) for digest in shard.xxh3[:-1]]
        file = OpenFile(path, shard.byte_ends[-1], MANIFEST)
        for batch, rows in enumerate(shard.batch_rows):
            start = shard.byte_ends[batch - 1] if batch else 0
            entries["places"][batch] = self._places(file, batch, rows, start, shard.byte_ends[batch])
        if problem := contradiction(entries, shard.as_shard()):
            raise RuntimeError(f"{path}: {problem}; build it again")
        return memoryview(entries.tobytes())

    def _places(self, file: OpenFile, batch: int, rows: int, start: int, end: int) -> list[int]:
        try:
            found, places = buffer_places(file.read, self._family, start, end)
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None):  # of the machine: the library's own OSErrors, for damage, have none
                raise
            raise RuntimeError(f"{file.path}: record batch {batch} cannot be read ({error}); build it again") from error
        if found != rows:
            raise RuntimeError(f"{file.path}: record batch {batch} has {found} rows, {MANIFEST} says {rows}")
        return places
