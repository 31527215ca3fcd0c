"""The reader of TSV files beside one written plainly, on 20,000 files of every byte there is."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ofa_ds.data import tsv
from ofa_ds.data.building.source import SourceError
from ofa_ds.data.building.tsv_source import cut, lines_of

CASES = 20_000
FILES = 4
"""Of one draw, which costs more than the reading of a file."""

PIECES = (
    *[b"\t", b"\n"] * 4, b"\r\n", b"\r", b"\x00", b"\xef\xbb\xbf", b"\xff\xfe", b"\xc3\x28",
    *map(str.encode, ["7", "id", " ", "word", "\u00fc", "\u2028", "\x85", "\x0b", "\U0001d11e", "&&", '"']),
)  # fmt: skip
ANY = 64
"""Of 256 drawn bytes so many say that the next one is meant itself."""


def file_of(drawn: bytes) -> bytes:
    """A file of what drawn bytes stand for."""
    rest = iter(drawn)
    return b"".join(bytes([next(rest, 0)]) if each < ANY else PIECES[each % len(PIECES)] for each in rest)


def plain(data: bytes) -> list[tuple[int, dict[str, str] | None]] | None:
    """(line, its row or None for a bad one) of each line of a text file; None where the file is refused as a whole."""
    lines = data.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    if not lines or (lines[0].endswith(b"\r") and data[len(lines[0]) : len(lines[0]) + 1] == b"\n"):
        return None
    found: list[tuple[int, dict[str, str] | None]] = []
    for number, line in enumerate(lines, 1):
        row = None
        if line.count(b"\t") == 1 and b"\r" not in line:
            try:
                name, text = (column.decode("utf-8") for column in line.split(b"\t"))
            except UnicodeDecodeError:
                name = text = ""
            if name.strip() and text.strip() and not name.startswith("\ufeff") and not text.startswith("\ufeff"):
                row = {"id": name, "text": text}
        found.append((number, row))
    return found


def ours(path: Path, size: int) -> list[tuple[int, dict[str, str] | None]] | None:
    """The same by the builder's way, the file cut into pieces of `size` bytes."""
    found: list[tuple[int, dict[str, str] | None]] = []
    try:
        for part in (part for piece in cut([str(path)], size) for part in piece):
            for _, line in lines_of(part):
                try:
                    row = tsv.parse("text", line)
                except ValueError as error:
                    assert not isinstance(error, UnicodeError) and "\n" not in str(error)
                    row = None
                found.append((len(found) + 1, row))
    except SourceError:
        return None
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tsv") / "a.tsv"


@settings(max_examples=CASES // FILES, suppress_health_check=list(HealthCheck), deadline=None)
@given(drawn=st.binary(min_size=FILES * 8, max_size=FILES * 25))
def test_any_bytes_read_as_by_a_plain_parser(path: Path, drawn: bytes) -> None:
    for k in range(FILES):
        size, *pieces = drawn[k::FILES]
        path.write_bytes(data := file_of(bytes(pieces)))
        assert ours(path, 1 + size % 60) == (plain(data) if data else None), (data, size)


def test_every_byte_and_every_piece_is_drawn() -> None:
    drawn = b"".join(bytes([0, value]) for value in range(256)) + bytes(range(ANY, 256))
    file = file_of(drawn)
    assert file.startswith(bytes(range(256))) and all(piece in file[256:] for piece in PIECES)


@pytest.mark.parametrize("last", [b"\n", b""], ids=["ended", "not ended"])
def test_huge_fields_read_as_by_a_plain_parser(last: bytes, path: Path) -> None:
    """Fields of megabytes, cut in their middle and at their very ends."""
    draw = random.Random(1)
    fields = [draw.randbytes(size).translate(None, b"\t\n\r") for size in (3 << 20, 1, (1 << 20) - 3, 5 << 20)]
    texts = [b"%d\t%s" % (k, field if k % 2 else field.hex().encode()) for k, field in enumerate(fields)]
    path.write_bytes(data := b"\n".join(texts) + last)
    ends = [0, *(at for at in range(len(data)) if data[at : at + 1] == b"\n")]
    for size in (1 << 20, len(data), *(end + step for end in ends for step in (-1, 0, 1, 2) if end + step > 1 << 18)):
        assert ours(path, size) == plain(data), size
