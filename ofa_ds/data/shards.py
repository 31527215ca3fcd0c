"""Arrow shards: rows by number, from mapped files of which nothing is read before it is asked for.

A directory holds `manifest.json`, one Arrow IPC file per shard (uncompressed, nothing nullable, at most 256 rows or
16 MB a record batch, pictures byte for byte as they came), `negative_sample/`, and `quarantine/` where lines were bad.
"""

from __future__ import annotations

import json
import math
import mmap
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from ofa_ds.terms import FAMILIES

MANIFEST = "manifest.json"
NEGATIVES = "negative_sample"
FORMAT = {"format": "ofa-ds shards", "version": 1}


def _list_of(item: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", item, nullable=False))


_BOX = pa.list_(pa.field("item", pa.float32(), nullable=False), 4)


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


_PICTURE = {"id": pa.utf8(), "image": pa.binary(), "width": pa.int32(), "height": pa.int32()}

SCHEMAS = {
    "vision_language": _schema(
        **_PICTURE, caption=pa.utf8(), question=pa.utf8(), answer_text=_list_of(pa.utf8()),
        answer_confidence=_list_of(pa.float64()), box=_BOX, gt_objects=_list_of(pa.utf8()), dataset=pa.utf8(),
        type=pa.utf8(),
    ),
    "text": _schema(id=pa.utf8(), text=pa.utf8()),
    "image": _schema(id=pa.utf8(), image=pa.binary(), codes=_list_of(pa.int16())),
    "detection": _schema(
        **_PICTURE, boxes=_list_of(_BOX), cat_ids=_list_of(pa.utf8()), cat_names=_list_of(pa.utf8())
    ),
}  # fmt: skip
"""Columns of each family. A vision-language box of NaN means none."""


def to_columns(family: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as `Shards.row` gives it -> its Arrow columns."""
    columns = dict(row)
    if family == "vision_language":
        answers = columns.pop("answers")
        columns["answer_text"] = [text for text, _ in answers]
        columns["answer_confidence"] = [confidence for _, confidence in answers]
        columns["box"] = columns["box"] or (math.nan,) * 4
    elif family == "detection":
        columns["boxes"] = columns["boxes"].tolist()
    return columns


def from_columns(family: str, columns: dict[str, Any]) -> dict[str, Any]:
    """The other way round. Takes `columns` over."""
    if family == "vision_language":
        columns["answers"] = list(zip(columns.pop("answer_text"), columns.pop("answer_confidence"), strict=True))
        if math.isnan(columns["box"][0]):
            columns["box"] = None
    return columns


class Lines(Sequence[str]):
    """The lines of a UTF-8 file by number; mapped, with a side file of their positions."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ends = np.load(positions_file(path), mmap_mode="r")
        self._text = np.memmap(path, np.uint8, mode="r") if self._ends.size else b""

    def __reduce__(self) -> tuple:
        return Lines, (self._path,)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> str:
        if not -len(self) <= i < len(self):
            raise IndexError(f"line {i} of {len(self)}")
        i %= len(self)
        start = int(self._ends[i - 1]) if i else 0
        return bytes(self._text[start : int(self._ends[i]) - 1]).decode()


def positions_file(path: Path) -> Path:
    """Side file of `Lines`: int64 [lines], one past the "\\n" of each line."""
    return path.with_suffix(".ends.npy")


@dataclass(frozen=True)
class Negatives:
    """Material for wrong captions and answers (docs/ofa.md, Tasks: negatives)."""

    captions: Sequence[str]
    objects: Sequence[str]
    type2ans: Mapping[str, Sequence[str]]
    """Answers by type of question; "other" is always there."""


class Shards:
    """`Shards(dir).row(family, i)` -> dict of one row; depends on `i` alone, never on what was read before.

    Picklable, and safe to use from several threads and after a fork: positions are filled in once and never change.

        vision_language {id, image, width, height, caption, question, answers [(text, confidence)],
                         box (x0, y0, x1, y1) or None, gt_objects [str], dataset,
                         type "caption" | "qa" | "visual_grounding"}
        text            {id, text}
        image           {id, image, codes int16 [n]}
        detection       {id, image, width, height, boxes float32 [n, 4], cat_ids [str], cat_names [str]}

    `image` is a view of the encoded bytes in the file; boxes are in pixels of that picture.
    """

    def __init__(self, path: Path | str, *, verify: bool = False) -> None:
        """verify: compare each record batch with its checksum when first touched (about 1 ms for 10 MB)."""
        self.path = Path(path)
        self.verify = verify
        self.manifest = read_manifest(self.path)
        self.fingerprint: str = self.manifest["fingerprint"]
        parts = {family: self.manifest["families"].get(family) for family in FAMILIES}
        self.families: dict[str, int] = {family: part["rows"] for family, part in parts.items() if part}
        self.types: dict[str, int] = parts["vision_language"]["types"] if parts["vision_language"] else {}
        """Vision-language rows of each type."""
        self._files = {
            family: [ShardFile(self.path, family, shard) for shard in parts[family]["shards"]]
            for family in self.families
        }
        self._ends = {
            family: list(accumulate(file.num_rows for file in files)) for family, files in self._files.items()
        }

    def __reduce__(self) -> tuple:
        return _open, (self.path, self.verify)

    def row(self, family: str, i: int) -> dict[str, Any]:
        """Row `i` of a family. Raises IndexError outside the family, ValueError for a family that is not here."""
        ends = self._ends.get(family)
        if ends is None:
            raise ValueError(f"{self.path} has no {family} rows, only {', '.join(self.families)}")
        if not 0 <= i < ends[-1]:
            raise IndexError(f"{family} row {i} is outside {self.path}, which has {ends[-1]}")
        k = bisect_right(ends, i)
        return self._files[family][k].row(i - (ends[k - 1] if k else 0), self.verify)

    @cached_property
    def negatives(self) -> Negatives:
        """Empty where the shards have no vision-language rows."""
        folder = self.path / NEGATIVES
        if not folder.is_dir():
            return Negatives((), (), {"other": ()})
        type2ans = json.loads((folder / "type2ans.json").read_bytes())
        objects = list(Lines(folder / "object.txt"))
        return Negatives(Lines(folder / "all_captions.txt"), objects, type2ans)


def _open(path: Path, verify: bool) -> Shards:
    return Shards(path, verify=verify)


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises ValueError where `path` is no directory of shards."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        build = f"ofa-ds shards build --out {path} --vision-language TSV ..."
        raise ValueError(f"{path}: no shards there (no {MANIFEST}); build them with: {build}") from error
    except ValueError as error:
        raise ValueError(f"{path / MANIFEST}: not JSON ({error}); build the shards again") from error
    if not isinstance(manifest, dict) or {key: manifest.get(key) for key in FORMAT} != FORMAT:
        raise ValueError(f"{path / MANIFEST}: want {FORMAT}; build the shards with this version of ofa-ds")
    return manifest


class ShardFile:
    """Rows of one mapped Arrow file. Kept are 8 bytes for each buffer of each batch touched, and no Arrow object."""

    def __init__(self, folder: Path, family: str, shard: Mapping[str, Any]) -> None:
        self.path = folder / shard["file"]
        self.family = family
        self.num_rows: int = shard["rows"]
        self.batch_ends = array("q", accumulate(shard["batch_rows"]))
        self.byte_ends: list[int] = shard["byte_ends"]
        self.checksums: list[str] = shard["xxh3"]

    @cached_property
    def _view(self) -> _View:
        """The whole file. Raises RuntimeError where its size is not the manifest's."""
        with self.path.open("rb") as file:
            size = file.seek(0, 2)
            if size != self.byte_ends[-1]:
                raise RuntimeError(
                    f"{self.path}: want {self.byte_ends[-1]} bytes as in {MANIFEST}, got {size}; copy or build it again"
                )
            return _View(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))

    @cached_property
    def _positions(self) -> np.ndarray:
        """int64 [batches, buffers]: place of each buffer in the file; 0 in the first column means not yet asked for."""
        columns = SCHEMAS[self.family]
        return np.zeros((len(self.batch_ends), sum(len(_KEPT[kind]) for kind in columns.types)), np.int64)

    @cached_property
    def _columns(self) -> list[tuple[str, Any, slice]]:
        """(name, reader, its positions) of each column."""
        columns, first = [], 0
        for field in SCHEMAS[self.family]:
            last = first + len(_KEPT[field.type])
            columns.append((field.name, _READERS[field.type], slice(first, last)))
            first = last
        return columns

    def row(self, i: int, verify: bool) -> dict[str, Any]:
        batch = bisect_right(self.batch_ends, i)
        positions = self._positions[batch].tolist()
        if not positions[0]:
            positions = self._touch(batch, verify)
        j = i - (self.batch_ends[batch - 1] if batch else 0)
        view = self._view
        return from_columns(self.family, {name: read(view, positions[at], j) for name, read, at in self._columns})

    def _touch(self, batch: int, verify: bool) -> list[int]:
        """Find where the buffers of a batch are. A reader of its own each time: nothing that threads would share."""
        if verify and (problem := self.checksum_problem(batch)):
            raise RuntimeError(f"{problem}; copy or build the shards again")
        buffer = pa.py_buffer(self._view.data)
        reader = pa.ipc.open_file(pa.BufferReader(buffer))
        if not reader.schema.equals(SCHEMAS[self.family]):
            raise RuntimeError(f"{self.path}: its columns are not those of this version of ofa-ds; build it again")
        positions: list[int] = []
        for column in reader.get_batch(batch).columns:
            buffers = column.buffers()
            kept = [buffers[k] for k in _KEPT[column.type]]
            positions += [part.address - buffer.address if part and part.size else 0 for part in kept]
        if any(position % 8 for position in positions):
            raise RuntimeError(f"{self.path}: its buffers are not aligned; build it again")
        self._positions[batch] = positions
        return positions

    def checksum_problem(self, batch: int) -> str | None:
        """What is wrong with the bytes of a batch, the header with the first; one past the last is the footer."""
        start = self.byte_ends[batch - 1] if batch else 0
        got = xxhash.xxh3_64_hexdigest(self._view.data[start : self.byte_ends[batch]])
        if got == self.checksums[batch]:
            return None
        what = "the footer"
        if batch < len(self.batch_ends):
            first = self.batch_ends[batch - 1] if batch else 0
            what = f"record batch {batch} (rows {first} ... {self.batch_ends[batch] - 1})"
        return f"{self.path}: {what} has checksum {got}, {MANIFEST} says {self.checksums[batch]}"


class _View:
    """The bytes of a mapped file, and the same as 4-byte integers, 4-byte and 8-byte floats."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.ints, self.floats = data[: len(data) & ~3].cast("i"), data[: len(data) & ~3].cast("f")
        self.doubles = data[: len(data) & ~7].cast("d")


_At = Sequence[int]
"""Positions of a column's buffers. Arrow aligns each to 64 bytes, so that they are whole numbers of any item."""


def _bytes(view: _View, at: _At, j: int) -> memoryview:
    start, stop = view.ints[at[0] // 4 + j : at[0] // 4 + j + 2]
    return view.data[at[1] + start : at[1] + stop]


def _str(view: _View, at: _At, j: int) -> str:
    return str(_bytes(view, at, j), "utf-8")


def _int(view: _View, at: _At, j: int) -> int:
    return view.ints[at[0] // 4 + j]


def _box(view: _View, at: _At, j: int) -> tuple[float, ...]:
    start = at[0] // 4 + 4 * j
    return tuple(view.floats[start : start + 4])


def _boxes(view: _View, at: _At, j: int) -> np.ndarray:
    start, stop = view.ints[at[0] // 4 + j : at[0] // 4 + j + 2]
    return np.frombuffer(view.data, np.float32, 4 * (stop - start), at[1] + 16 * start).reshape(-1, 4)


def _strs(view: _View, at: _At, j: int) -> list[str]:
    start, stop = view.ints[at[0] // 4 + j : at[0] // 4 + j + 2]
    return [_str(view, at[1:], k) for k in range(start, stop)]


def _doubles(view: _View, at: _At, j: int) -> list[float]:
    start, stop = view.ints[at[0] // 4 + j : at[0] // 4 + j + 2]
    return view.doubles[at[1] // 8 + start : at[1] // 8 + stop].tolist()


def _codes(view: _View, at: _At, j: int) -> np.ndarray:
    start, stop = view.ints[at[0] // 4 + j : at[0] // 4 + j + 2]
    return np.frombuffer(view.data, np.int16, stop - start, at[1] + 2 * start)


_READERS = {
    pa.utf8(): _str, pa.binary(): _bytes, pa.int32(): _int, _BOX: _box, _list_of(_BOX): _boxes,
    _list_of(pa.utf8()): _strs, _list_of(pa.int16()): _codes, _list_of(pa.float64()): _doubles,
}  # fmt: skip
"""How row j of a column is read, given the positions of its buffers."""

_KEPT = {
    pa.utf8(): (1, 2), pa.binary(): (1, 2), pa.int32(): (1,), _BOX: (2,), _list_of(_BOX): (1, 4),
    _list_of(pa.utf8()): (1, 3, 4), _list_of(pa.int16()): (1, 3), _list_of(pa.float64()): (1, 3),
}  # fmt: skip
"""Which of a column's buffers have content: the others are validity bitmaps, absent as nothing is nullable."""


def build_shards(
    out: Path | str,
    *,
    negatives: Path | str | None = None,
    rows_per_shard: int = 50_000,
    workers: int = 2,
    on_error: str = "stop",
    **sources: Sequence[Path | str],
) -> dict[str, Any]:
    """Turn OFA's TSV files into shards in `out`, which must not exist yet (or be empty). -> the manifest.

    sources: vision_language, text, image, detection = files; any of them, read in the order given. negatives: OFA's
    negative_sample directory; without it one is derived from the vision-language rows. on_error: what a bad line does:
    "stop" raises ValueError "file:line: column: reason" and leaves nothing behind, "quarantine" puts it into
    out/quarantine and counts it. The same sources and rows_per_shard give the same bytes with any number of workers.
    Under MPI, rank 0 gives the work to the other ranks, which leave the program when it is done.
    """
    from ofa_ds.data.shards_build import build  # not above: reading needs none of it

    paths = {family: [Path(file) for file in files] for family, files in sources.items()}
    return build(Path(out), paths, Path(negatives) if negatives else None, rows_per_shard, workers, on_error)


def verify_shards(path: Path | str, *, workers: int = 2) -> list[str]:
    """Compare every checksum and decode every picture. -> what is wrong, one line each."""
    from ofa_ds.data.shards_verify import verify

    return verify(Path(path), workers)
