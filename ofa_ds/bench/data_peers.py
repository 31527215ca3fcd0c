"""Formats that training data are kept in: how each writes the same rows, opens them, and gives them back.

Each is used as its own documentation says. Where a format has no lists, one column is JSON. Those of other projects are
imported where they are installed, in the process of this benchmark alone.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import importlib.machinery
import importlib.util
import io
import json
import sys
import types
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ofa_ds.bench.data_records import FAMILY, LISTS, Columns, Records, flat, unflat
from ofa_ds.data.batch_index import write_index
from ofa_ds.data.columns import SCHEMAS, from_columns
from ofa_ds.data.manifest import Family, Manifest, Source, fingerprint
from ofa_ds.data.shard_writer import ShardWriter, chained
from ofa_ds.data.shards import Shards

SHARD_BYTES = 64 << 20
BLOCK = 20
"""Rows that are asked for at once where a format can do that, as a micro-batch has about."""


class Opened(NamedTuple):
    """What a format offers of opened rows; None: not that."""

    row: Callable[[int], Columns] | None = None
    rows: Callable[[], Iterator[Columns]] | None = None
    block: Callable[[list[int]], Sequence[Columns]] | None = None


class Format(NamedTuple):
    """A format: its name, the module it needs, and what it does in a folder of its own."""

    name: str
    module: str
    write: Callable[[Records, Path], None]
    open: Callable[[Path], Opened]
    few: bool = False
    """Rows at random cost milliseconds: some are read, not all."""


def installed(module: str) -> bool:
    """Whether it can be imported; said where it is there and cannot."""
    if importlib.util.find_spec(module) is None:
        return False
    if module in ("streaming", "litdata"):
        _feign_torchvision()
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(f"{module}: cannot be imported, left out: {error}", file=sys.stderr)
        return False
    return True


def _feign_torchvision() -> None:
    """MDS imports it, and reads rows without it. One that was built for another torch ends its import."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, AttributeError):
        for name in ("", ".transforms", ".transforms.functional", ".datasets"):
            sys.modules["torchvision" + name] = stub = types.ModuleType("torchvision" + name)
            stub.__spec__ = importlib.machinery.ModuleSpec("torchvision" + name, None)
            stub.__getattr__ = _feigned  # type: ignore[method-assign]


def _feigned(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def _write_ours(records: Records, folder: Path) -> None:
    written, rows_a_file, writer, inside = [], _rows_a_file(records), None, 0
    kinds: dict[str, int] = {}
    for columns in records:
        if writer is None or inside == rows_a_file:
            if writer is not None:
                written.append(writer.close())
            writer, inside = ShardWriter(folder / f"{FAMILY}-{len(written):05d}.arrow", FAMILY), 0
        writer.add(from_columns(FAMILY, dict(columns)), len(columns["image"]))
        kinds[columns["type"]] = kinds.get(columns["type"], 0) + 1
        inside += 1
    written.append(writer.close())
    write_index(folder, FAMILY, [one.entries for one in written])
    shards = tuple(one.shard for one in written)
    family = Family(
        rows=len(records), types=kinds, quarantined=0, digest=chained(shards),
        sources=(Source("made", len(records), 0),), shards=shards,
    )  # fmt: skip
    Manifest(families={FAMILY: family}, negatives={}, fingerprint=fingerprint({FAMILY: family}, {})).write(folder)


def _rows_a_file(records: Records) -> int:
    return max(SHARD_BYTES // len(records[0]["image"]), 1)


def _open_ours(folder: Path) -> Opened:
    shards = Shards(folder)
    number = shards.families[FAMILY]
    return Opened(lambda i: shards.row(FAMILY, i), lambda: (shards.row(FAMILY, i) for i in range(number)))


TSV_COLUMNS = tuple(name for name in SCHEMAS[FAMILY].names if name not in LISTS) + ("lists",)


def _write_tsv(records: Records, folder: Path) -> None:
    with (folder / "rows.tsv").open("w", encoding="utf-8") as file:
        for columns in records:
            row = flat(columns) | {"image": base64.b64encode(columns["image"]).decode("ascii")}
            file.write("\t".join(str(row[name]) for name in TSV_COLUMNS) + "\n")


def _open_tsv(folder: Path) -> Opened:
    """As the original does: the places of all lines by a scan, then text that is read and split at each row."""
    file = (folder / "rows.tsv").open(encoding="utf-8")
    places = [0]
    with (folder / "rows.tsv").open("rb") as scanned:
        for line in scanned:
            places.append(places[-1] + len(line))

    def parsed(line: str) -> Columns:
        row: Columns = dict(zip(TSV_COLUMNS, line.rstrip("\n").split("\t"), strict=True))
        row["image"] = base64.urlsafe_b64decode(row["image"])
        return unflat(row)

    def row(i: int) -> Columns:
        file.seek(places[i])
        return parsed(file.readline())

    def rows() -> Iterator[Columns]:
        file.seek(0)
        return map(parsed, iter(file.readline, ""))

    return Opened(row, rows)


def _write_parquet(records: Records, folder: Path) -> None:
    schema, rows = SCHEMAS[FAMILY], []
    with pq.ParquetWriter(folder / "rows.parquet", schema, compression="none") as writer:
        for columns in records:
            rows.append(columns)
            if len(rows) == PARQUET_ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows = []
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))


PARQUET_ROWS = 256
"""Of a row group."""


def _open_parquet(folder: Path) -> Opened:
    file = pq.ParquetFile(folder / "rows.parquet", memory_map=True)

    def rows() -> Iterator[Columns]:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            names = table.column_names
            for values in zip(*(column.to_pylist() for column in table.columns), strict=True):
                yield dict(zip(names, values, strict=True))

    return Opened(rows=rows)


def _write_huggingface(records: Records, folder: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features.from_arrow_schema(SCHEMAS[FAMILY])
    datasets.Dataset.from_generator(
        records.__iter__, features=features, cache_dir=str(folder), fingerprint="rows", split="train"
    )


def _open_huggingface(folder: Path) -> Opened:
    import datasets

    files = sorted(folder.rglob("*.arrow"))
    rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])

    def block(numbers: list[int]) -> list[Columns]:
        found = rows[numbers]
        return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]

    return Opened(rows.__getitem__, lambda: iter(rows), block)


MDS_COLUMNS = {name: "str" for name in TSV_COLUMNS if name not in ("image", "width", "height")} | {
    "image": "bytes", "width": "int32", "height": "int32",
}  # fmt: skip


def _write_mds(records: Records, folder: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns=MDS_COLUMNS, size_limit=SHARD_BYTES) as writer:
        for columns in records:
            writer.write(flat(columns))


def _open_mds(folder: Path) -> Opened:
    from streaming import StreamingDataset

    rows = StreamingDataset(local=str(folder), batch_size=1)
    number = len(rows)
    return Opened(lambda i: unflat(rows[i]), lambda: (unflat(rows[i]) for i in range(number)))


def _open_mds_reader(folder: Path) -> Opened:
    """The files of MDS without what StreamingDataset adds to each row."""
    from streaming.base.format import reader_from_json

    index = json.loads((folder / "index.json").read_text())
    readers = [reader_from_json(str(folder), None, shard) for shard in index["shards"]]
    ends = list(accumulate(reader.samples for reader in readers))

    def row(i: int) -> Columns:
        k = bisect_right(ends, i)
        return unflat(readers[k][i - (ends[k - 1] if k else 0)])

    return Opened(row, lambda: map(row, range(ends[-1])))


def _write_webdataset(records: Records, folder: Path) -> None:
    import webdataset

    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxsize=SHARD_BYTES, maxcount=1 << 30, verbose=0) as writer:
        for i, columns in enumerate(records):
            rest = {name: value for name, value in columns.items() if name != "image"}
            writer.write({"__key__": f"{i:09d}", "jpg": columns["image"], "json": rest})


def _open_webdataset(folder: Path) -> Opened:
    import webdataset

    files = [str(file) for file in sorted(folder.glob("*.tar"))]

    def row(sample: dict[str, Any]) -> Columns:
        return json.loads(sample["json"]) | {"image": sample["jpg"]}

    return Opened(rows=lambda: map(row, iter(webdataset.WebDataset(files, shardshuffle=False))))


class _Flat:
    """`_Flat(records)(i)` -> what litData is given of a row; picklable."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def __call__(self, i: int) -> Columns:
        return flat(self._records[i])


def _write_litdata(records: Records, folder: Path) -> None:
    import litdata

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        litdata.optimize(
            _Flat(records), list(range(len(records))), output_dir=str(folder), chunk_bytes=SHARD_BYTES, num_workers=1,
            reorder_files=False,
        )  # fmt: skip


def _open_litdata(folder: Path) -> Opened:
    import litdata

    rows = litdata.StreamingDataset(str(folder), shuffle=False)
    return Opened(lambda i: unflat(rows[i]), lambda: map(unflat, iter(rows)))


OURS = "ours"
TSV = "TSV, the original's way"
HUGGING_FACE, MDS, MDS_READER, LITDATA = "Hugging Face datasets", "MDS, StreamingDataset", "MDS, its reader", "litData"

FORMATS = (
    Format(OURS, "ofa_ds", _write_ours, _open_ours),
    Format(TSV, "ofa_ds", _write_tsv, _open_tsv),
    Format("Parquet", "pyarrow", _write_parquet, _open_parquet),
    Format(HUGGING_FACE, "datasets", _write_huggingface, _open_huggingface),
    Format(MDS, "streaming", _write_mds, _open_mds),
    Format(MDS_READER, "streaming", _write_mds, _open_mds_reader),
    Format("WebDataset", "webdataset", _write_webdataset, _open_webdataset),
    Format(LITDATA, "litdata", _write_litdata, _open_litdata, few=True),
)
