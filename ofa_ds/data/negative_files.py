"""OFA's negative_sample directory: read and check it, or derive one from the rows, and write it among the shards."""

from __future__ import annotations

import io
import json
import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ofa_ds.data.manifest import NEGATIVES
from ofa_ds.data.negative_texts import NegativeTexts
from ofa_ds.data.open_file import OpenFile
from ofa_ds.storage import strict_json

CAPTIONS, OBJECTS, ANSWERS = "all_captions.txt", "object.txt", "type2ans.json"


@dataclass(frozen=True)
class Negatives:
    """Material for wrong captions and answers (docs/ofa.md, Tasks: negatives)."""

    captions: Sequence[str]
    objects: Sequence[str]
    type2ans: Mapping[str, Sequence[str]]
    """Answers by type of question; "other" is always there."""


def read_negatives(folder: Path) -> Negatives:
    """Of a directory of shards; empty where it has none. Raises ValueError or RuntimeError that names the file."""
    given = folder / NEGATIVES
    if not given.is_dir():
        return Negatives((), (), {"other": ()})
    return Negatives(Lines(given / CAPTIONS), list(Lines(given / OBJECTS)), _answers(given / ANSWERS))


class Lines(Sequence[str]):
    """The lines of a UTF-8 file by number, read when asked for; a side file has their positions."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError or RuntimeError where the two files do not belong together."""
        self._path = path
        self._ends_at, self._count = _positions_head(positions_file(path))
        self._text_size = self._end(self._count - 1) if self._count else 0
        if (found := path.stat().st_size) != self._text_size:
            raise RuntimeError(f"{path}: want {self._text_size} bytes as in {positions_file(path).name}, got {found}")

    def __reduce__(self) -> tuple:
        return Lines, (self._path,)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> str:
        if not -len(self) <= i < len(self):
            raise IndexError(f"line {i} of {len(self)}")
        i %= len(self)
        start = self._end(i - 1) if i else 0
        return self._text.read(start, self._end(i) - 1 - start).decode()

    def _end(self, i: int) -> int:
        return _LONG.unpack(self._ends.read(self._ends_at + 8 * i, 8))[0]

    @cached_property
    def _ends(self) -> OpenFile:
        return OpenFile(positions_file(self._path), self._ends_at + 8 * self._count, "its head")

    @cached_property
    def _text(self) -> OpenFile:
        return OpenFile(self._path, self._text_size, positions_file(self._path).name)


_LONG = struct.Struct("<q")


def positions_file(path: Path) -> Path:
    """Side file of `Lines`: int64 [lines], one past the "\\n" of each line."""
    return path.with_suffix(".ends.npy")


def _positions_head(path: Path) -> tuple[int, int]:
    """(first byte, number) of the positions in a side file."""
    with path.open("rb") as file:
        head = io.BytesIO(file.read(_NPY_HEAD_BYTES))
    try:
        if np.lib.format.read_magic(head) != (1, 0):
            raise ValueError("a newer version of .npy")
        shape, _, dtype = np.lib.format.read_array_header_1_0(head)
        if len(shape) != 1 or dtype != np.dtype("<i8"):
            raise ValueError(f"shape {shape}, type {dtype}")
    except (ValueError, TypeError) as error:
        raise RuntimeError(f"{path}: want one row of 64-bit integers ({error}); copy or build it again") from error
    return head.tell(), shape[0]


_NPY_HEAD_BYTES = 1024


def write_negatives(given: Path, folder: Path) -> dict[str, str]:
    """Check and copy: lines stripped, blank ones dropped. -> checksum of each file.

    Raises ValueError "file: reason" for a missing file, for fewer than two captions or objects (a wrong one must differ
    from the right one), invalid UTF-8, and a type2ans.json that is not {type: [answers]} with a type "other".
    """
    captions, objects = _lines(given / CAPTIONS), _lines(given / OBJECTS)
    return write_texts(folder, captions, objects, _answers(given / ANSWERS))


def derive_negatives(texts: NegativeTexts, folder: Path) -> dict[str, str]:
    """From the texts of vision-language rows."""
    return write_texts(folder, texts.kinds["captions"], texts.kinds["objects"], texts.type2ans())


def write_texts(
    folder: Path, captions: Iterable[str], objects: Iterable[str], type2ans: Mapping[str, list[str]]
) -> dict[str, str]:
    """Texts that are known to be good, into a directory of shards. -> checksum of each file."""
    target = folder / NEGATIVES
    target.mkdir()
    for name, texts in ((CAPTIONS, captions), (OBJECTS, objects)):
        ends = array("q")
        with (target / name).open("wb") as file:
            for text in texts:
                file.write(f"{text}\n".encode())
                ends.append(file.tell())
        np.save(positions_file(target / name), np.array(ends, np.int64))
    (target / ANSWERS).write_bytes((json.dumps(type2ans, ensure_ascii=False, indent=1) + "\n").encode())
    return checksums(folder)


def checksums(folder: Path) -> dict[str, str]:
    """Of each file of the negatives of a directory of shards."""
    files = sorted((folder / NEGATIVES).iterdir())
    return {file.name: _checksum(file) for file in files}


def _checksum(path: Path) -> str:
    size = path.stat().st_size
    return f"{OpenFile(path, size, 'the directory').xxh3_64(0, size):016x}"


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; want {CAPTIONS}, {OBJECTS}, {ANSWERS} in --negatives") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: invalid UTF-8 at byte {error.start}: {error.reason}") from error


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in _read(path).split("\n")]
    found = [" ".join(line.split("\r")) for line in lines if line]
    if len(set(found)) < 2:
        raise ValueError(f"{path}: want at least two different lines, got {len(set(found))}")
    return found


def _answers(path: Path) -> dict[str, list[str]]:
    try:
        answers = strict_json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: want JSON: {error.msg}") from error
    except ValueError as error:
        raise ValueError(f"{path}: want JSON: {error}") from error
    if not isinstance(answers, dict) or "other" not in answers:
        raise ValueError(f'{path}: want {{"answer type": ["answer", ...], "other": [...]}}')
    for kind, texts in answers.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{path}: want a list of non-empty strings for type {kind!r}")
    return answers
