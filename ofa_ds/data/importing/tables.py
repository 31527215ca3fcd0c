"""Parquet files, and Hugging Face data sets as they are on a disk: Parquet, or the Arrow files of `save_to_disk`."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ofa_ds.data.building.source import OneFile, Record, Row, SourceError, source_file
from ofa_ds.data.importing.arrow_messages import check_stream, to_stream
from ofa_ds.data.importing.item import Into
from ofa_ds.data.importing.loose import item_of
from ofa_ds.data.importing.parquet_pages import BATCH_ROWS, batch_rows, leaves
from ofa_ds.data.importing.table_rows import is_read, rows_of
from ofa_ds.storage import file_systems

COLUMNS = {
    "id": "id image_id __key__", "image": "image jpg png", "caption": "caption text sentence captions",
    "text": "text", "question": "question", "answers": "answers answer multiple_choice_answer", "names": "objects",
    "box": "box bbox", "objects": "boxes",
}  # fmt: skip
"""Field -> names of columns, the first that is there."""

_LIMITS: dict[str, Any] = {
    "pre_buffer": False, "buffer_size": 1 << 23, "thrift_string_size_limit": 1 << 26,
    "thrift_container_size_limit": 100_000,
}  # fmt: skip
"""A column is read page by page, not as a whole; what the file's directory may say of its own size."""


@dataclass(frozen=True)
class TablePiece(OneFile):
    """Row group `group` of a Parquet file; all of an Arrow file, where it is -1."""

    group: int
    share_bytes: int
    into: Into
    columns: tuple[tuple[str, str], ...]

    @property
    def num_bytes(self) -> int:
        return self.share_bytes

    def key(self) -> Any:
        return ["table", asdict(self.file), self.group, repr(self.into), self.columns]

    def records(self, part: int) -> Iterator[Record]:
        number = 0
        wanted = {each for _, names in self.columns for each in names.split()}
        try:
            for batch in _batches(self.file.location, self.group, wanted):
                for row in rows_of(batch):
                    number += 1
                    where = f"row {number}" if self.group < 0 else f"row group {self.group} row {number}"
                    yield Record(number, None, functools.partial(self._read, where, row), where)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if getattr(error, "errno", None):
                raise
            what = " ".join(str(error).split())
            raise SourceError(
                f"{self.file.location}: damaged after row {number}: {what:.200}; copy it again"
            ) from error

    def _read(self, where: str, row: Mapping[str, Any] | ValueError) -> Row:
        if isinstance(row, ValueError):
            raise row
        found = {name: next((row[each] for each in names.split() if each in row), None) for name, names in self.columns}
        identity = found.pop("id", None)
        if not isinstance(identity, int | str | None) or isinstance(identity, bool):
            raise ValueError(f"id: want a whole number or a text, got {identity!r:.60}")
        key = f"{self.file.name} {where}" if identity is None else str(identity)
        return self.into.row(item_of(key, found))


def pieces_of(locations: Sequence[str], into: Into, columns: tuple[tuple[str, str], ...]) -> list[TablePiece]:
    """Raises SourceError for what is no table, or has none of the columns."""
    found = []
    for location in (each for given in locations for each in _files_of(given)):
        file = source_file(location)
        known, names, groups = _head(location, {each for _, ends in columns for each in ends.split()})
        if not any(each in names for name, ends in columns if name != "id" for each in ends.split()):
            raise SourceError(
                f"{location}: has none of the columns that are read; it has {', '.join(known)}; say which is "
                "which with --column FIELD=NAME"
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


def _head(location: str, wanted: Set[str]) -> tuple[list[str], list[str], list[int]]:
    """(names of columns, of those that are read, row groups)."""
    try:
        with _opened(location) as source:
            if not location.endswith(".parquet"):
                to_stream(source)
                schema, groups = pa.ipc.open_stream(source).schema, [-1]
            else:
                file = pq.ParquetFile(source, **_LIMITS)
                schema, groups = file.schema_arrow, list(range(file.metadata.num_row_groups))
            return schema.names, _read_names(location, schema, wanted), groups
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None):
            raise
        what = " ".join(str(error).split())
        raise SourceError(f"{location}: neither Parquet nor Arrow, or damaged: {what:.200}") from error


def _batches(location: str, group: int, wanted: Set[str]) -> Iterator[pa.RecordBatch]:
    """Of the columns that are wanted and there. Raises SourceError."""
    with _opened(location) as source:
        if group >= 0:
            yield from _of_group(location, source, group, wanted)
            return
        check_stream(source, location)
        to_stream(source)
        for batch in pa.ipc.open_stream(source):
            mine = batch.select(_read_names(location, batch.schema, wanted))
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield mine.slice(start, BATCH_ROWS)


def _of_group(location: str, source: pa.NativeFile, group: int, wanted: Set[str]) -> Iterator[pa.RecordBatch]:
    file = pq.ParquetFile(source, **_LIMITS)
    names = _read_names(location, file.schema_arrow, wanted)
    rows = batch_rows(file, source, location, group, names)
    # In a list, a text of a dictionary would be copied as often as it is there, however often that is.
    columns = [file.schema.column(number) for number in leaves(file, names)]
    lists = [each.path for each in columns if each.max_repetition_level and each.physical_type == "BYTE_ARRAY"]
    file = pq.ParquetFile(source, metadata=file.metadata, read_dictionary=lists, **_LIMITS)
    yield from file.iter_batches(rows, row_groups=[group], columns=names, use_threads=False)


def _read_names(location: str, schema: pa.Schema, wanted: Set[str]) -> list[str]:
    names = [each.name for each in schema if each.name in wanted]
    for name in names:
        if names.count(name) > 1:
            raise SourceError(f"{location}: the column {name} is there twice")
        if not is_read(kind := schema.field(name).type):
            raise SourceError(f"{location}: column {name}: {kind!s:.80} is not read; say which is which with --column")
    return names


def _opened(location: str) -> pa.NativeFile:
    if file_systems.is_remote(location):
        return file_systems.open_input(location)
    path = str(file_systems.local_path(location))
    # Of Parquet only what is decoded next is read, and a cut is an error; an Arrow batch may be as large as its file.
    return pa.OSFile(path) if location.endswith(".parquet") else pa.memory_map(path)
