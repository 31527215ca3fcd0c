"""Shards: rows by number, from Arrow files of which nothing is read before it is asked for.

A directory holds `manifest.json`, one Arrow IPC file per shard (uncompressed, nothing nullable, at most 256 rows or
16 MB a record batch, pictures byte for byte as they came), an index for each family (`batch_index`),
`negative_sample/` (of a downstream task its list, `answers.json`), and `quarantine/` and `warnings/` where lines were
bad or doubtful. `data.building` writes it,
`shards_verify` checks it.
"""

from __future__ import annotations

import itertools
import traceback
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from ofa_ds.data.announcing import Faults
from ofa_ds.data.answer_list import read_answer_list
from ofa_ds.data.manifest import TYPED, read_manifest
from ofa_ds.data.negative_files import Negatives, read_negatives
from ofa_ds.data.remote.folder import RemoteFolder
from ofa_ds.data.shard_file import MapPool, ShardFile, ShardFiles
from ofa_ds.storage.file_systems import is_remote, local_path
from ofa_ds.terms import FAMILIES


class Shards:
    """`Shards(dir).row(family, i)` -> dict of one row; depends on `i` alone, never on what was read before.

    Picklable, and safe to use from several threads and after a fork: positions are filled in once and never change.

        vision_language {id, image, width, height, caption, question, answers [(text, confidence)],
                         box (x0, y0, x1, y1) or None, gt_objects [str], dataset,
                         type "caption" | "qa" | "visual_grounding"}
        text            {id, text}
        image           {id, image, codes int16 [n]}
        detection       {id, image, width, height, boxes float32 [n, 4], cat_ids [str], cat_names [str]}
        downstream      {id, image (b"" for none), width, height, image_id, text, text_pair,
                         answers [(text, confidence)], box (x0, y0, x1, y1) or None, objects [str],
                         type: whose rows they are, `Task.row_types`}

    `image` is the encoded picture as it came; boxes are in pixels of it.
    """

    def __init__(self, path: Path | str, *, verify: bool = False, task: str = "") -> None:
        """path: a directory, here or remote; what is read of a remote one is kept in a cache on this machine, checked
        when it comes (`data.remote.folder`). verify: compare each record batch with its checksum when first touched
        (about 1 ms for 10 MB). task: the downstream task whose rows are wanted; it is named where no shards are there.
        """
        self.location = str(path)
        """As it was given, a path or such as s3://bucket/name."""
        self._remote = RemoteFolder(self.location, task) if is_remote(path) else None
        self.path = self._remote.mirror if self._remote else local_path(path)
        """Directory of this machine; of remote shards the one that has their small files."""
        self.verify = verify
        self.manifest = self._remote.manifest if self._remote else read_manifest(self.path, task)
        self.fingerprint = self.manifest.fingerprint
        families = self.manifest.families
        self.families = {family: families[family].rows for family in FAMILIES if family in families}
        typed = [family for family in TYPED if family in families]
        self.types = {kind: count for family in typed for kind, count in families[family].types.items()}
        """Rows of each type, of the families that have types."""
        self._faults = Faults()
        self._pool = MapPool()
        make = self._remote.make_file if self._remote else None
        self._files = {
            family: ShardFiles(self.path, self.manifest, family, self._pool, make) for family in self.families
        }

    def __reduce__(self) -> tuple:
        return _open, (self.location, self.verify)

    def row(self, family: str, i: int) -> dict[str, Any]:
        """Row `i` of a family. Raises IndexError outside the family, ValueError for a family that is not here.

        Raises RuntimeError or OSError, with the name of the file, where that is damaged, was cut, or cannot be read.
        """
        files = self._files.get(family)
        if files is None or not 0 <= i < files.num_rows:
            raise self._outside(family, i)
        k = bisect_right(files.row_ends, i)
        return (files.open[k] or files[k]).row(i - (files.row_ends[k - 1] if k else 0), self.verify)

    def forget_pages(self) -> None:
        """Pages that were touched no longer count as this process's memory; they stay in the system's cache."""
        self._pool.forget()

    def announce(self, rows: Iterable[tuple[str, int]]) -> None:
        """(family, row) that will be read soon: what they need comes from the disk all at once, not row by row.

        Takes some 10 microseconds a row, and next to nothing where all is in memory. Nothing is raised: what is wrong
        with a row is said when it is read. Of remote shards, record batches are fetched meanwhile.
        """
        if self._remote is None and not self._faults.are_due():
            return
        pending = []
        for family, i in rows:
            with suppress(OSError, RuntimeError, ValueError, IndexError):
                file, j = self._place(family, i)
                pending.append(file.announce(j))
        for rest in pending:
            if rest is not None:
                with suppress(OSError, ValueError, IndexError):
                    rest()

    def fields(self, family: str, i: int, columns: Collection[str]) -> dict[str, Any]:
        """Some Arrow columns of row `i`, as they are stored; nothing else of it is read. Raises as `row` does."""
        file, j = self._place(family, i)
        return file.fields(j, columns)

    def where(self, family: str, i: int) -> str:
        """The file that row `i` of a family is in and its number there, for messages. Raises as `row` does."""
        file, j = self._place(family, i)
        return f"{file.path.name} row {j}"

    def lines_before(self, family: str, i: int) -> int:
        """Lines, bad ones too, of the source files before the one that row `i` of a family is from."""
        rows = lines = 0
        for source in self.manifest.families[family].sources:
            rows += source.rows
            if i < rows:
                break
            lines += source.rows + source.quarantined
        return lines

    def at_row(self, family: str, i: int, row: Mapping[str, Any] | None, error: Exception) -> ValueError | RuntimeError:
        """What went wrong with row `i`, with its place; all but ValueErrors (memory, damage) as RuntimeError."""
        what = str(error)
        if not isinstance(error, (ValueError, RuntimeError, OSError)) or not what:
            frame = traceback.extract_tb(error.__traceback__)[-1]  # a worker's traceback does not reach the trainer
            what = f"{type(error).__name__} {error} at {Path(frame.filename).name}:{frame.lineno}"
        place = self.named(family, i, row)
        return (ValueError if isinstance(error, ValueError) else RuntimeError)(f"{place}: {what}")

    def named(self, family: str, i: int, row: Mapping[str, Any] | None = None) -> str:
        """Row `i` of a family as messages name it: directory, family, number, file, row in it, id where it was read."""
        name = "" if row is None else f", id {row['id']!r}"
        return f"{self.location}: {family} row {i} ({self.where(family, i)}{name})"

    def _place(self, family: str, i: int) -> tuple[ShardFile, int]:
        files = self._files.get(family)
        if files is None or not 0 <= i < files.num_rows:
            raise self._outside(family, i)
        k = bisect_right(files.row_ends, i)
        return files[k], i - (files.row_ends[k - 1] if k else 0)

    def _outside(self, family: str, i: int) -> ValueError | IndexError:
        if family not in self.families:
            return ValueError(f"{self.location} has no {family} rows, only {', '.join(self.families)}")
        return IndexError(f"{family} row {i} is outside {self.location}, which has {self.families[family]}")

    def rows_of_types(
        self, family: str, types: Collection[str], *, start: int = 0, max_rows: int | None = None
    ) -> Iterator[int]:
        """Numbers of the rows of these types, in order, from row `start` on; of all rows where `types` is empty.

        Nothing but the type column is read, and nothing at all where the manifest counts no such row. max_rows: look at
        that many rows only.
        """
        count = self.families.get(family, 0)
        end = count if max_rows is None else min(count, start + max_rows)
        if not types:
            yield from range(start, end)
        elif any(self.types.get(kind) for kind in types):
            ends = self._files[family].row_ends
            for number in range(bisect_right(ends, start), len(ends)):
                first = ends[number - 1] if number else 0
                if first >= end:
                    break
                found = self._files[family][number].rows_of_types(types, max(start - first, 0))
                yield from itertools.takewhile(lambda i: i < end, map(first.__add__, found))

    @cached_property
    def answers(self) -> tuple[str, ...]:
        """The list of candidate answers; empty where the shards have none. Raises RuntimeError where it is damaged."""
        with self._naming():
            return read_answer_list(self.path, self.manifest.answers)

    @cached_property
    def negatives(self) -> Negatives:
        """Empty where the shards have none. Raises ValueError or RuntimeError, with the file, where they are wrong."""
        with self._naming():
            return read_negatives(self.path)

    def _naming(self) -> AbstractContextManager[None]:
        """Errors about files of the mirror name the remote ones."""
        return self._remote.naming() if self._remote else nullcontext()


def _open(path: str, verify: bool) -> Shards:
    return Shards(path, verify=verify)
