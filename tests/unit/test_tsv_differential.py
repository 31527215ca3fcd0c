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

PIECES = st.one_of(
    st.sampled_from([b"\t", b"\n", b"\t", b"\n", b"\r\n", b"\r", b"\x00", b"\xef\xbb\xbf", b"\xff\xfe", b"\xc3\x28"]),
    st.sampled_from(["7", "id", " ", "word", "ü", "\u2028", "\x85", "\x0b", "𝄞", "&&", '"', ""]).map(str.encode),
    st.binary(max_size=4),
    st.integers(0, 255).map(lambda value: bytes([value])),
)


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


@settings(max_examples=CASES, suppress_health_check=list(HealthCheck))
@given(pieces=st.lists(PIECES, max_size=14), size=st.integers(1, 60))
def test_any_bytes_read_as_by_a_plain_parser(path: Path, pieces: list[bytes], size: int) -> None:
    path.write_bytes(data := b"".join(pieces))
    assert ours(path, size) == (plain(data) if data else None)


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
