"""A tar is read to its last byte or refused in one line: whatever is cut off, damaged, or put behind its end."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from ofa_ds.data.importing.tars import groups


def whole_tar(form: int = tarfile.GNU_FORMAT) -> bytes:
    """Four records; the third has a name of 150 characters, which takes a header of its own."""
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w", format=form) as file:
        for name, data in RECORDS.items():
            info = tarfile.TarInfo(f"{name}.txt")
            info.size = len(data["txt"])
            file.addfile(info, io.BytesIO(data["txt"]))
    return out.getvalue()


RECORDS = {name: {"txt": name.encode() * times} for name, times in (("a", 5), ("b", 600), ("c" * 150, 2), ("d", 512))}
END = whole_tar().rindex(b"d" * 512) + 512
"""Of the last member: the end mark begins there."""


def read(path: Path, data: bytes) -> dict | str:
    """The records, or the line that refuses them."""
    path.write_bytes(data)
    try:
        return dict(groups(str(path)))
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error), error
        return str(error)


def test_a_tar_that_is_cut_anywhere_before_its_end_mark_is_refused(tmp_path: Path) -> None:
    whole = whole_tar()
    assert read(tmp_path / "x.tar", whole) == RECORDS
    cuts = {start + more for start in range(0, len(whole), 512) for more in (0, 1, 100, 257, 511)}
    for cut in cuts:
        found = read(tmp_path / "x.tar", whole[:cut])
        assert found == RECORDS if cut >= END + 512 else isinstance(found, str), cut
    assert f"ends at byte {END} without its end mark" in read(tmp_path / "x.tar", whole[:END])


def test_a_compressed_tar_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(whole_tar())
    assert read(tmp_path / "x.tar.gz", whole) == RECORDS
    for cut in range(0, len(whole), 7):
        assert isinstance(read(tmp_path / "x.tar.gz", whole[:cut]), str), cut


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_a_damaged_byte_of_any_header_is_refused_with_its_place(form: int, tmp_path: Path, monkeypatch) -> None:
    if form == tarfile.USTAR_FORMAT:
        monkeypatch.delitem(RECORDS, "c" * 150)
    whole = whole_tar(form)
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    assert len(headers) == {tarfile.GNU_FORMAT: 5, tarfile.PAX_FORMAT: 5, tarfile.USTAR_FORMAT: 3}[form]
    for header in headers:
        for at in range(header + 2, header + 512, 3):
            damaged = bytearray(whole)
            damaged[at] ^= 0x15
            found = read(tmp_path / "x.tar", bytes(damaged))
            if at - header == 155:  # the checksum is six digits and a NUL; what follows says nothing
                assert found == RECORDS
            else:
                assert isinstance(found, str) and f"byte {header}: want the header of a member" in found, (header, at)


def test_a_header_of_zeros_in_the_middle_does_not_end_a_tar(tmp_path: Path) -> None:
    whole = whole_tar()
    second = whole.index(b"b.txt")
    found = read(tmp_path / "x.tar", whole[:second] + bytes(512) + whole[second + 512 :])
    assert f"byte {second + 512}: something follows the end mark" in found


@pytest.mark.parametrize("end", ["tar", "tar.gz"])
def test_what_follows_the_end_mark_is_not_lost_without_a_word(end: str, tmp_path: Path) -> None:
    pack = gzip.compress if end == "tar.gz" else bytes
    whole = whole_tar()
    found = read(tmp_path / f"x.{end}", pack(whole) + pack(whole))
    assert f"byte {len(whole)}: something follows the end mark" in found
    assert read(tmp_path / f"x.{end}", pack(whole + bytes(100_000))) == RECORDS
    late = whole + bytes(3 << 20) + b"x"
    assert f"byte {len(late) - 1}: something follows" in read(tmp_path / f"x.{end}", pack(late))


def test_padding_without_end_is_not_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ofa_ds.data.importing.tar_stream.MAX_PADDING_BYTES", 1 << 20)
    assert "more than 1048576 bytes" in read(tmp_path / "x.tar.gz", gzip.compress(whole_tar() + bytes(4 << 20)))


def test_an_empty_tar_has_no_records_and_an_empty_file_is_no_tar(tmp_path: Path) -> None:
    assert read(tmp_path / "x.tar", bytes(10240)) == {}
    assert "ends at byte 0 without its end mark" in read(tmp_path / "x.tar", b"")


def test_a_record_in_two_places_is_refused(tmp_path: Path) -> None:
    with tarfile.open(path := tmp_path / "x.tar", "w") as file:
        for name in ("a.jpg", "b.jpg", "a.txt", "b.txt"):
            file.addfile(tarfile.TarInfo(name))
    assert "member a.txt: the record a was there before" in read(path, path.read_bytes())


@pytest.mark.parametrize("name", [b"a\nb.txt", b"a\xff.txt", b"a\x7f.txt"])
def test_a_name_that_is_no_plain_utf8_is_refused(name: bytes, tmp_path: Path) -> None:
    info = tarfile.TarInfo(name.decode(errors="surrogateescape"))
    assert "want plain UTF-8" in read(tmp_path / "x.tar", info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))


@pytest.mark.parametrize(
    "header",
    [{"size": "-5"}, {"size": "9" * 30}, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, {"GNU.sparse.map": "x"},
     {"GNU.sparse.size": "x"}],
)  # fmt: skip
def test_headers_of_numbers_that_cannot_be_are_one_line(header: dict, tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.txt")
    info.pax_headers = header
    assert isinstance(read(tmp_path / "x.tar", info.tobuf(tarfile.PAX_FORMAT) + bytes(10240)), str)
