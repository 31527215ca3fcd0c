"""TSV files in pieces: every line once, with its number, however the files are cut, packed and compressed."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofa_ds.data import tsv
from ofa_ds.data.building.source import SourceError
from ofa_ds.data.building.tsv_source import Part, cut, lines_of

LINES = st.lists(
    st.binary(max_size=30).map(lambda b: b.replace(b"\n", b" ").replace(b"\r", b" ")), min_size=1, max_size=40
)


def numbered(pieces: list[tuple[Part, ...]]) -> list[tuple[str, int, bytes]]:
    """(file, number in it, line) of every line, in order; numbers are counted on from part to part."""
    before: Counter[str] = Counter()
    found = []
    for part in (part for piece in pieces for part in piece):
        mine = list(lines_of(part))
        assert [number for number, _ in mine] == list(range(1, len(mine) + 1))
        found += [(part.file.name, before[part.file.name] + number, line) for number, line in mine]
        before[part.file.name] += len(mine)
    return found


def compressed(path: Path, data: bytes, codec: str) -> Path:
    path = path.with_name(f"{path.name}.{'gz' if codec == 'gzip' else 'zst'}")
    with pa.CompressedOutputStream(str(path), codec) as out:
        out.write(data)
    return path


@given(files=st.lists(LINES, min_size=1, max_size=3), size=st.integers(1, 200), ended=st.booleans())
def test_pieces_hold_every_line_once_in_order_with_its_number(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[bytes]], size: int, ended: bool
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    paths, wanted = [], []
    for k, lines in enumerate(files):
        lines = lines if ended or lines[-1] else [*lines[:-1], b"x"]
        (path := folder / f"{k}.tsv").write_bytes(b"\n".join(lines) + b"\n" * ended)
        paths.append(str(path))
        wanted += [(path.name, number, line) for number, line in enumerate(lines, 1)]
    pieces = cut(paths, size)
    assert numbered(pieces) == wanted
    assert all(sum(part.stop - part.start for part in piece) <= size for piece in pieces)


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_compressed_files_give_the_lines_of_plain_ones(codec: str, tmp_path: Path) -> None:
    data = b"".join(b"%d\t%s\n" % (k, b"x" * (k * 7919 % 30_000)) for k in range(120))
    path = compressed(tmp_path / "a.tsv", data, codec)
    (tmp_path / "b.tsv").write_bytes(data)
    packed, plain = numbered(cut([str(path)], 1000)), numbered(cut([str(tmp_path / "b.tsv")], 100_000))
    assert [line[1:] for line in packed] == [line[1:] for line in plain] and len(plain) == 120


def test_a_file_of_several_gzip_members_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv.gz"
    path.write_bytes(gzip.compress(b"1\ta\n2\tb") + gzip.compress(b"b\n3\tc\n"))
    assert [line for _, _, line in numbered(cut([str(path)], 10))] == [b"1\ta", b"2\tbb", b"3\tc"]


@pytest.mark.parametrize(
    "codec, damage",
    [("gzip", "cut"), ("gzip", "flipped"), ("gzip", "no such format"), ("zstd", "cut"), ("zstd", "no such format")],
)  # a flipped bit is in a zstd file's checksum, which this writer leaves out
def test_a_damaged_compressed_file_is_named_and_never_ends_early(codec: str, damage: str, tmp_path: Path) -> None:
    data = b"".join(b"%d\t%d\n" % (k, k * k) for k in range(100_000))
    path = compressed(tmp_path / "a.tsv", data, codec)
    whole = bytearray(path.read_bytes())
    if damage == "flipped":
        whole[len(whole) // 2] ^= 0x55
    content = {"cut": whole[: len(whole) // 2], "flipped": whole, "no such format": b"1\ta\n2\tb\n"}[damage]
    path.write_bytes(content)
    with pytest.raises(SourceError, match=rf"{re.escape(str(path))}: damaged .*not whole {codec}"):
        numbered(cut([str(path)], 1000))


def test_small_files_share_a_piece_and_large_ones_are_cut(tmp_path: Path) -> None:
    for name, size in (("a", 40), ("b", 50), ("c", 250), ("d", 10)):
        (tmp_path / name).write_bytes(b"x" * (size - 1) + b"\n")
    pieces = cut([str(tmp_path / name) for name in "abcd"], 100)
    spans = [[(part.file.name, part.start, part.stop) for part in piece] for piece in pieces]
    large = [[("c", 0, 100)], [("c", 100, 200)], [("c", 200, 250)]]
    assert spans == [*large, [("a", 0, 40), ("b", 0, 50), ("d", 0, 10)]] or spans == [
        [("a", 0, 40), ("b", 0, 50)], *large, [("d", 0, 10)]
    ]  # fmt: skip


def test_separators_of_other_standards_do_not_end_a_line(tmp_path: Path) -> None:
    (path := tmp_path / "a.tsv").write_bytes("1\ta\u2028b\x0bc\x85d\n2\te\n".encode())
    assert len(numbered(cut([str(path)], 1000))) == 2


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_an_empty_and_a_missing_file_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(SourceError, match=f"{name}: no such file"):
        cut([str(path)], 10)
    path.write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    with pytest.raises(SourceError, match=f"{name}: the file is empty"):
        numbered(cut([str(path)], 10))


def test_a_crlf_file_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"1\ta\r\n2\tb\r\n")
    with pytest.raises(SourceError, match=r"a.tsv:1: line: ends in CRLF.* sed -i"):
        numbered(cut([str(tmp_path / "a.tsv")], 10))


def test_a_line_beyond_the_limit_is_named_before_it_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tsv, "MAX_LINE_BYTES", 100)
    (tmp_path / "a.tsv").write_bytes(b"1\t%s\n2\t%s\n" % (b"x" * 97, b"x" * 98))
    with pytest.raises(SourceError, match="the line is longer than 100 bytes") as error:
        numbered(cut([str(tmp_path / "a.tsv")], 1000))
    assert error.value.number == 2
