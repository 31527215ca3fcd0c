"""Files on this machine, S3, GCS or HDFS under one name: what pyarrow.fs reads and writes, with errors of one line.

A location is a path, or `s3://bucket/key`, `gs://`, `hdfs://`, `file://`. Credentials, region and endpoint come from
the environment, as each service's own tools take them (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `AWS_REGION`, ...).
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")
_KNOWN = ("s3", "gs", "gcs", "hdfs", "viewfs", "file")
_WILD = re.compile(r"[*?\[]")

STALLED_S = 20
"""A request to S3 that gets no byte for so long has failed; the library tries it three times."""


def is_remote(location: str | Path) -> bool:
    """Whether it names a service rather than a path of this machine."""
    found = _SCHEME.match(str(location))
    return found is not None and found[1] != "file"


def local_path(location: str | Path) -> Path:
    """Of a location that is not remote."""
    return Path(str(location).removeprefix("file://"))


def file_system(location: str | Path) -> tuple[fs.FileSystem, str]:
    """(file system, path in it). Raises ValueError for a scheme that is not known, OSError where it is not reached."""
    text = str(location)
    found = _SCHEME.match(text)
    if found is None or found[1] == "file":
        return fs.LocalFileSystem(), os.path.abspath(local_path(text))
    if found[1] not in _KNOWN:
        raise ValueError(f"{text}: want a path or one of {', '.join(f'{each}://' for each in _KNOWN)}")
    rest = text[found.end() :].rstrip("/")
    if not rest or rest.startswith("/"):
        raise ValueError(f"{text}: want {found[1]}://BUCKET/NAME")
    with _named(text):
        if found[1] == "s3":
            return _s3(_s3_settings()), rest
        opened, path = fs.FileSystem.from_uri(text.replace("gcs://", "gs://"))
        return opened, path


def _s3_settings() -> tuple[str, str]:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return endpoint, os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""


@lru_cache(8)
def _s3(settings: tuple[str, str]) -> fs.FileSystem:
    endpoint, region = settings
    options: dict[str, Any] = {"region": region} if region else {}
    if endpoint:
        scheme, _, host = endpoint.rpartition("://")
        options |= {"endpoint_override": host.rstrip("/"), "scheme": scheme or "https"}
        options.setdefault("region", "us-east-1")  # what stands behind an own endpoint seldom has regions
    return fs.S3FileSystem(connect_timeout=10, request_timeout=STALLED_S, **options)


@contextmanager
def _named(location: str | Path) -> Iterator[None]:
    """Errors of a file system with the location, on one line; those of the machine keep their number."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if str(location) in str(error):
            raise
        what, number = " ".join(str(error).split()), getattr(error, "errno", None)
        kind = type(error) if isinstance(error, FileNotFoundError | PermissionError) else OSError
        raise (kind(number, what, str(location)) if number else kind(f"{location}: {what}")) from error


def info(location: str | Path) -> fs.FileInfo:
    """Of one file or directory; `type` NotFound where nothing is there."""
    system, path = file_system(location)
    with _named(location):
        return system.get_file_info(path)


def exists(location: str | Path) -> bool:
    return info(location).type != fs.FileType.NotFound


def open_input(location: str | Path) -> pa.NativeFile:
    """To read at any place. Raises FileNotFoundError, OSError."""
    system, path = file_system(location)
    with _named(location):
        return system.open_input_file(path)


def read_bytes(location: str | Path, limit: int) -> bytes:
    """A whole small file. Raises ValueError where it has more than `limit` bytes."""
    with open_input(location) as file, _named(location):
        if file.size() > limit:
            raise ValueError(f"{location}: {file.size()} bytes are more than {limit}, which such a file has at most")
        return file.read()


def upload(path: Path, location: str | Path) -> None:
    """A local file of any size; an object store shows it when it is complete."""
    system, target = file_system(location)
    with _named(location), path.open("rb") as source, system.open_output_stream(target) as file:
        try:
            while block := source.read(1 << 23):
                file.write(block)
        except BaseException:
            with suppress(AttributeError, OSError):
                file.abort()  # closing would show what was written so far
            raise


def names_in(location: str | Path) -> list[str]:
    """Locations of the files in a directory (or under a prefix, not deeper), sorted; none where it is not there."""
    system, path = file_system(location)
    with _named(location):
        found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    base = str(location).rstrip("/")
    return sorted(f"{base}/{each.base_name}" for each in found if each.type == fs.FileType.File)


def expand(patterns: Iterable[str | Path]) -> list[str]:
    """Each pattern's files, sorted within it; a location without wildcards is kept as it is.

    Raises ValueError for a pattern that fits nothing. Wildcards of remote locations are in the last part alone.
    """
    found: list[str] = []
    for pattern in map(str, patterns):
        if not _WILD.search(pattern) or (not is_remote(pattern) and os.path.exists(pattern)):
            found.append(pattern)
            continue
        if is_remote(pattern):
            folder, _, name = pattern.rpartition("/")
            if _WILD.search(folder):
                raise ValueError(f"{pattern}: wildcards are only read in the last part of a remote name")
            mine = [each for each in names_in(folder) if fnmatch.fnmatchcase(each.rpartition("/")[2], name)]
        else:
            mine = sorted(glob.glob(str(local_path(pattern)), recursive=True))
        if not mine:
            raise ValueError(f"{pattern}: fits no file")
        found += mine
    return found
