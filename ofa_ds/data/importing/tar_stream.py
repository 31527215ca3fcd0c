"""The members of a tar, one after another, to its last byte: what is cut, damaged or hostile is one line."""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, Self

import pyarrow as pa

from ofa_ds.data.building.source import SourceError
from ofa_ds.data.building.tsv_source import CODECS
from ofa_ds.data.importing.item import UNPRINTABLE
from ofa_ds.storage import file_systems

MAX_MEMBER_BYTES = 1 << 28
"""Largest member that is read."""

MAX_HEADER_BYTES = 1 << 20
"""Most that may be read to reach a member: long names and other headers have sizes of their own, which may lie."""

MAX_NAME_CHARACTERS = 4096

MAX_PADDING_BYTES = 1 << 26
"""Most zeros after the end mark: a writer fills its last record with them, of 10 KiB as a rule."""

_BUFFER_BYTES = 1 << 20


class _Header(tarfile.TarInfo):
    """`tarfile` takes a header that it cannot read for the end, unless it is the first; here that is an error."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        """Raises EOFHeaderError at the end mark, ReadError for anything else that is no header."""
        at = tarfile_.fileobj.tell()
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.EOFHeaderError, SourceError):
            raise
        except tarfile.EmptyHeaderError as error:
            raise tarfile.ReadError(f"ends at byte {at} without its end mark") from error
        except (tarfile.HeaderError, ValueError, LookupError, OverflowError) as error:
            raise tarfile.ReadError(f"byte {at}: want the header of a member: {error}") from error


class _Bounded:
    """A stream that gives no more than it is allowed to: `tarfile` holds a header of any size in memory."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        self._file, self._location = file, location
        self.allow(0)

    def allow(self, num_bytes: int) -> None:
        """From here on; a header may follow."""
        self._left = num_bytes + MAX_HEADER_BYTES

    def read(self, num_bytes: int) -> bytes:
        data = self._file.read(num_bytes)
        self._left -= len(data)
        if self._left < 0:
            raise SourceError(f"{self._location}: headers of a member have more than {MAX_HEADER_BYTES} bytes")
        return data


def members_of(location: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each plain file, in order. Raises SourceError "location: ..." unless the tar is whole."""
    try:
        with _opened(location) as raw, _tar(file := _Bounded(raw, location)) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # it would keep the header of each
                file.allow(0)
                if member.isdir():
                    continue
                _check(location, member)
                file.allow(member.size)
                content = tar.extractfile(member)
                data = content.read() if content is not None else b""
                if len(data) != member.size:
                    raise SourceError(f"{location}: member {member.name!r:.100}: {len(data)} of {member.size} bytes")
                file.allow(0)
                yield member.name, data
            _check_padding(location, tar, file)
    except RecursionError as error:
        raise SourceError(f"{location}: a member has headers without end") from error
    except (tarfile.TarError, EOFError, pa.ArrowException) as error:
        raise SourceError(f"{location}: not a whole tar: {' '.join(str(error).split())}; copy it again") from error
    except OSError as error:
        if error.errno:
            raise
        raise SourceError(f"{location}: damaged: {' '.join(str(error).split())}; copy it again") from error


def _tar(file: _Bounded) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="r|", tarinfo=_Header, encoding="utf-8")


def _check_padding(location: str, tar: tarfile.TarFile, file: _Bounded) -> None:
    """Of what follows the end mark; a compressed file is read to its checksum by it."""
    file.allow(MAX_PADDING_BYTES)
    stream, left = tar.fileobj, MAX_PADDING_BYTES
    while block := stream.read(_BUFFER_BYTES):
        left -= len(block)
        if left < 0:
            raise SourceError(f"{location}: more than {MAX_PADDING_BYTES} bytes of zeros follow its end mark")
        if zeros := block.strip(b"\0"):
            at = stream.tell() - len(block) + block.index(zeros)
            raise SourceError(
                f"{location}: byte {at}: something follows the end mark, as where two tars were put together; split "
                "them, or join their members with tar --concatenate"
            )


def _check(location: str, member: tarfile.TarInfo) -> None:
    name = member.name
    if len(name) > MAX_NAME_CHARACTERS:
        raise SourceError(f"{location}: member {name!a:.100}: its name has {len(name)} characters")
    if not member.isreg() or member.issparse():
        raise SourceError(f"{location}: member {name!r:.100}: want plain files, got a link, a device or a sparse file")
    if unprintable := UNPRINTABLE.search(name):
        raise SourceError(f"{location}: member {name!a:.100}: its name has {unprintable[0]!a}, want plain UTF-8")
    if posixpath.isabs(name) or ".." in name.split("/"):
        raise SourceError(f"{location}: member {name!r:.100}: its name leads out of the tar")
    if not 0 <= member.size <= MAX_MEMBER_BYTES:
        raise SourceError(f"{location}: member {name!r:.100}: {member.size} bytes, at most {MAX_MEMBER_BYTES} are read")


def _opened(location: str) -> BinaryIO:
    raw = file_systems.open_input(location)
    codec = next((codec for suffix, codec in CODECS.items() if location.endswith(suffix)), None)
    codec = "gzip" if location.endswith(".tgz") else codec
    return io.BufferedReader(pa.CompressedInputStream(raw, codec) if codec else raw, _BUFFER_BYTES)
