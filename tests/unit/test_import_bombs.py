"""Tables of kilobytes that unpack to gigabytes take bounded memory, and damaged ones are one line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ofa_ds.data.importing import arrow_messages, parquet_pages, table_rows, tables
from ofa_ds.data.importing.item import Into

ZEROS = b"\0" * (16 << 20)
PACKED = pa.ipc.IpcWriteOptions(compression="zstd")


def pieces(path: Path, kind: str = "caption") -> list[tables.TablePiece]:
    return tables.pieces_of([str(path)], Into(kind=kind), tuple(tables.COLUMNS.items()))


def read(path: Path, kind: str = "caption") -> list[str]:
    """What is wrong with each row."""
    found = []
    for piece in pieces(path, kind):
        for record in piece.records(0):
            try:
                record.read()
            except ValueError as error:
                found.append(str(error))
    return found


def repeated(times: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(times, np.int32)), pa.array([ZEROS]))


def parquet(path: Path, image: pa.Array, **options) -> Path:
    table = pa.table({"image": image, "caption": ["x"] * len(image)})
    pq.write_table(table, path, compression="zstd", write_statistics=False, store_schema=False, **options)
    return path


PEAK = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from ofa_ds.engine.host_memory import peak_resident_bytes
from test_import_bombs import read
before = peak_resident_bytes()
for path in sys.argv[2:]:
    assert len(read(Path(path), "text")) == 40, path
print(peak_resident_bytes() - before >> 20)
"""


CUT = """
import os, sys
sys.path.insert(0, sys.argv[1])
from ofa_ds.engine.host_memory import peak_resident_bytes
from test_import_bombs import pieces
before = peak_resident_bytes()
(piece,) = pieces(sys.argv[2])
for record in piece.records(0):
    pass
print(peak_resident_bytes() - before >> 20)
try:
    for record in piece.records(0):
        os.truncate(sys.argv[2], 150_000_000)
except ValueError as error:
    print(error)
"""


def test_a_value_that_is_in_every_row_is_not_decoded_as_often_as_that(tmp_path: Path) -> None:
    one = parquet(tmp_path / "dictionary.parquet", repeated(40))
    assert one.stat().st_size < 4096
    command = [sys.executable, "-c", PEAK, str(Path(__file__).parent), str(one)]
    peak_MiB = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert peak_MiB < 450, f"{peak_MiB} MiB; all of its 40 rows of 16 MiB are 640 MiB"


def test_a_file_that_is_cut_while_it_is_read_is_one_line_and_no_page_of_it_is_kept(tmp_path: Path) -> None:
    """As pyarrow writes it by default: the first 1,024 pictures are one dictionary."""
    rng = np.random.default_rng(0)
    path = parquet(tmp_path / "x.parquet", pa.array([rng.bytes(150_000) for _ in range(1100)]))
    command = [sys.executable, "-c", CUT, str(Path(__file__).parent), str(path)]
    peak_MiB, problem = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n", 1)
    assert int(peak_MiB) < 400, f"{peak_MiB} MiB; its dictionary has 147 MiB, packed as many, the whole file 158"
    assert re.match(rf"{path}: damaged after row \d+: .*; copy it again$", problem)


def test_pages_that_unpack_to_more_than_the_limit_are_refused(tmp_path: Path, monkeypatch) -> None:
    path = parquet(tmp_path / "x.parquet", repeated(2))
    monkeypatch.setattr(parquet_pages, "MAX_PAGES_BYTES", 16 << 20)
    with pytest.raises(ValueError, match=r"row group 0: its pages take 167\d+ bytes at once, at most 16777216"):
        read(path)


def test_the_files_directory_is_read_once_for_all_columns(tmp_path: Path, monkeypatch) -> None:
    read_directory, times = parquet_pages._directory, []
    monkeypatch.setattr(parquet_pages, "_directory", lambda source: times.append(source) or read_directory(source))
    assert len(read(parquet(tmp_path / "x.parquet", pa.array([b"x", b"y"])))) == 2 and len(times) == 1


def test_a_list_that_repeats_a_value_is_measured_before_it_is_one(tmp_path: Path) -> None:
    times = 1_000_000
    lists = pa.ListArray.from_arrays(pa.array([0, times], pa.int32()), repeated(times))
    pq.write_table(pa.table({"caption": lists, "image": [b"x"]}), path := tmp_path / "x.parquet", compression="zstd",
                   store_schema=False, write_statistics=False)  # fmt: skip
    assert read(path) == [f"the row has {times * len(ZEROS) + 8 * times + 8 + 8 + 1} bytes, at most 268435456 are read"]


def test_lists_of_more_values_than_the_limit_are_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(parquet_pages, "MAX_LIST_VALUES", 999)
    for times in (999, 1000):
        pq.write_table(pa.table({"caption": [["a"] * times], "image": [b"x"]}), path := tmp_path / f"{times}.parquet")
        if times == 1000:
            with pytest.raises(ValueError, match="column caption.list.element: 1000 values in lists, at most 999"):
                read(path)
        else:
            assert "caption: want a text" in read(path)[0]


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_encodings_whose_numbers_nothing_checks_are_refused(encoding: str, version: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": ["x"]}), path := tmp_path / "x.parquet", use_dictionary=False,
                   column_encoding={"caption": encoding}, data_page_version=version)  # fmt: skip
    with pytest.raises(ValueError, match=f"column caption: the encoding {encoding} is not read; write it again"):
        read(path)


@pytest.mark.parametrize("kind", ["stream", "file", "dictionary"])
def test_packed_arrow_buffers_that_unpack_to_more_than_the_limit_are_refused(
    kind: str, tmp_path: Path, monkeypatch
) -> None:
    image = repeated(3) if kind == "dictionary" else pa.array([ZEROS] * 3)
    table = pa.table({"image": image, "caption": ["x"] * 3})
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with new(path := tmp_path / "x.arrow", table.schema, options=PACKED) as writer:
        writer.write_table(table)
    assert path.stat().st_size < 1 << 14
    assert ["image: undecodable" in each for each in read(path)] == [True] * 3
    monkeypatch.setattr(arrow_messages, "MAX_BATCH_BYTES", len(ZEROS) - 1)
    with pytest.raises(ValueError, match=r"x.arrow: message 1: its buffers unpack to \d+ bytes, at most 16777215"):
        read(path)


def test_an_arrow_file_is_looked_through_once(tmp_path: Path, monkeypatch) -> None:
    table, looked = pa.table({"image": [b"x"], "caption": ["x"]}), []
    with pa.ipc.new_stream(path := tmp_path / "x.arrow", table.schema) as writer:
        writer.write_table(table)

    def check(source: pa.NativeFile, location: str) -> None:
        looked.append(location)
        arrow_messages.check_stream(source, location)

    monkeypatch.setattr(tables, "check_stream", check)
    read(path)
    assert looked == [str(path)]


def test_a_row_without_bytes_and_without_end_is_not_made(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(table_rows, "MAX_ROW_BYTES", 1 << 20)
    lists = pa.ListArray.from_arrays(pa.array([0, 2_000_000_000], pa.int32()), pa.nulls(2_000_000_000))
    batch = pa.record_batch([lists], ["caption"])
    with pa.ipc.new_stream(path := tmp_path / "x.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    assert "at most 1048576 are read" in read(path)[0]


def test_an_invalid_text_is_one_bad_row(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xff", b"b"]).view(pa.string())
    with pa.ipc.new_stream(path := tmp_path / "x.arrow", pa.schema({"text": pa.string()})) as writer:
        writer.write_batch(pa.record_batch([texts], ["text"]))
    (problem,) = read(path, "text")
    assert "Invalid UTF8" in problem


def test_a_type_that_is_not_read_is_told(tmp_path: Path) -> None:
    views = pa.array([["x"]], pa.list_(pa.string_view()))
    with pa.ipc.new_stream(path := tmp_path / "x.arrow", pa.schema({"caption": views.type})) as writer:
        writer.write_batch(pa.record_batch([views], ["caption"]))
    with pytest.raises(ValueError, match="x.arrow: column caption: list<item: string_view> is not read"):
        read(path)


@pytest.mark.parametrize("kind", ["parquet", "stream", "packed"])
def test_a_damaged_or_cut_table_is_one_line_or_its_rows_are_bad(kind: str, tmp_path: Path) -> None:
    table = pa.table({"caption": [["a b"], ["c"]], "image": [b"x", b"y"], "id": [1, 2]})
    path = tmp_path / f"x.{'parquet' if kind == 'parquet' else 'arrow'}"
    if kind == "parquet":
        pq.write_table(table, path, store_schema=False)
    else:
        with pa.ipc.new_stream(path, table.schema, options=PACKED if kind == "packed" else None) as writer:
            writer.write_table(table)
    whole = path.read_bytes()
    changed = [(at, whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :]) for at in range(0, len(whole), 9)
               for bit in (1, 128)]  # fmt: skip
    for at, data in changed + [(at, whole[:at]) for at in range(0, len(whole), 29)]:
        path.write_bytes(data)
        try:
            read(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error), (at, error)
        else:
            assert len(data) == len(whole), f"{at} bytes of {len(whole)} are taken for the whole"
