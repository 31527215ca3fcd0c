"""Parquet files, and Hugging Face data sets as they are on a disk: Parquet, or the Arrow files of `save_to_disk`."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ofa_ds.data.building.source import Record, Row, SourceError, SourceFile, source_file
from ofa_ds.data.importing.item import Into
from ofa_ds.data.importing.loose import item_of
from ofa_ds.storage import file_systems

COLUMNS = {
    "id": "id image_id __key__", "image": "image jpg png", "caption": "caption text sentence captions",
    "text": "text", "question": "question", "answers": "answers answer multiple_choice_answer", "names": "objects",
    "box": "box bbox", "objects": "boxes",
}  # fmt: skip
"""Field -> names of columns, the first that is there."""

BATCH_ROWS = 64
"""Rows that are in memory at once."""

MAX_GROUP_BYTES = 1 << 31
"""Largest row group that is read: it is in memory as a whole while its pages are decoded."""


@dataclass(frozen=True)
class TablePiece:
    """Row group `group` of a Parquet file; all of an Arrow file, where it is -1."""

    file: SourceFile
    group: int
    share_bytes: int
    into: Into
    columns: tuple[tuple[str, str], ...]

    @property
    def files(self) -> Sequence[SourceFile]:
        return [self.file]

    @property
    def num_bytes(self) -> int:
        return self.share_bytes

    def key(self) -> Any:
        return ["table", asdict(self.file), self.group, repr(self.into), self.columns]

    def records(self, part: int) -> Iterator[Record]:
        number = 0
        try:
            for batch in _batches(self.file.location, self.group):
                for row in batch.to_pylist():
                    number += 1
                    where = f"row {number}" if self.group < 0 else f"row group {self.group} row {number}"
                    size = sum(len(value) for value in _flat(row) if isinstance(value, str | bytes)) + 256
                    yield Record(number, None, size, functools.partial(self._read, where, row), where)
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None):
                raise
            what = " ".join(str(error).split())
            raise SourceError(
                f"{self.file.location}: damaged after row {number}: {what:.200}; copy it again"
            ) from error

    def _read(self, where: str, row: Mapping[str, Any]) -> Row:
        found = {name: next((row[each] for each in names.split() if each in row), None) for name, names in self.columns}
        identity = found.pop("id", None)
        key = f"{self.file.name} {where}" if identity is None else str(identity)
        return self.into.row(item_of(key, found))


def _flat(row: Mapping[str, Any]) -> Iterator[Any]:
    for value in row.values():
        yield from _flat(value) if isinstance(value, Mapping) else [value]


def pieces_of(locations: Sequence[str], into: Into, columns: tuple[tuple[str, str], ...]) -> list[TablePiece]:
    """Raises SourceError for what is no table, or has none of the columns."""
    found = []
    for location in (each for given in locations for each in _files_of(given)):
        file = source_file(location)
        names, groups = _head(location)
        if not any(each in names for name, ends in columns if name != "id" for each in ends.split()):
            raise SourceError(
                f"{location}: has none of the columns that are read; it has {', '.join(names)}; say which is which "
                "with --column FIELD=NAME"
            )
        found += [TablePiece(file, group, file.num_bytes // max(len(groups), 1), into, columns) for group in groups]
    return found


def _files_of(location: str) -> list[str]:
    """Of a directory as `save_to_disk`, the hub or a Parquet writer leaves it: its data files, in order of name."""
    path = file_systems.local_path(location)
    if file_systems.is_remote(location) or not path.is_dir():
        return [location]
    found = sorted(path.rglob("*.parquet")) or _saved(path) or sorted(path.rglob("*.arrow"))
    found = [each for each in found if not each.name.startswith((".", "_", "cache-"))]
    if not found:
        raise SourceError(f"{location}: no .parquet and no .arrow files in it")
    splits = sorted({_split_of(each, path) for each in found} - {""})
    if len(splits) > 1:
        raise SourceError(
            f"{location}: holds several splits ({', '.join(splits):.100}); import each by itself: give the folder or "
            "the files of one"
        )
    return [str(each) for each in found]


def _saved(path: Path) -> list[Path]:
    """Files that `save_to_disk` lists: beside them, `map` leaves others, of rows that are no part of the data set."""
    found = []
    for state in sorted(path.rglob("state.json")):
        try:
            names = [each["filename"] for each in json.loads(state.read_bytes())["_data_files"]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SourceError(f"{state}: not what save_to_disk writes ({type(error).__name__})") from error
        for name in names:
            if not isinstance(name, str) or name in ("", ".", "..") or "/" in name:
                raise SourceError(f"{state}: the file name {name!r:.80} leads out of its folder")
            found.append(state.parent / name)
    return found


def _split_of(file: Path, folder: Path) -> str:
    """By its folder in what a `DatasetDict` saved, by its name on the hub: train-00000-of-00009.parquet; else empty."""
    if (folder / "dataset_dict.json").is_file():
        return file.relative_to(folder).parts[0]
    named = re.fullmatch(r"(.+)-[0-9]+-of-[0-9]+(-[0-9a-f]+)?[.](parquet|arrow)", file.name)
    return named[1] if named else ""


def _head(location: str) -> tuple[list[str], list[int]]:
    """(names of columns, row groups)."""
    try:
        with file_systems.open_input(location) as source:
            if not location.endswith(".parquet"):
                return _arrow(source).schema.names, [-1]
            file = pq.ParquetFile(source)
            groups = range(file.metadata.num_row_groups)
            largest = max((file.metadata.row_group(group).total_byte_size for group in groups), default=0)
            if largest > MAX_GROUP_BYTES:
                raise SourceError(
                    f"{location}: a row group of {largest} bytes; at most {MAX_GROUP_BYTES} are read at once: write it "
                    "again with smaller row groups"
                )
            return file.schema_arrow.names, list(groups)
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise
        what = " ".join(str(error).split())
        raise SourceError(f"{location}: neither Parquet nor Arrow, or damaged: {what:.200}") from error


def _batches(location: str, group: int) -> Iterator[pa.RecordBatch]:
    with file_systems.open_input(location) as source:
        if group >= 0:
            yield from pq.ParquetFile(source).iter_batches(BATCH_ROWS, row_groups=[group])
            return
        reader = _arrow(source)
        batches = reader if isinstance(reader, pa.RecordBatchStreamReader) else map(
            reader.get_batch, range(reader.num_record_batches)
        )  # fmt: skip
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield batch.slice(start, BATCH_ROWS)


def _arrow(source: pa.NativeFile) -> Any:
    """A reader of an Arrow stream, which `save_to_disk` writes, or of an Arrow file."""
    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source)
