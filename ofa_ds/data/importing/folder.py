"""A folder of pictures with captions: NAME.txt beside NAME.jpg, or metadata.jsonl or metadata.csv in the folder.

The folder is listed once, into lines of JSON; pieces are runs of them. Pictures and texts are read by the workers.
"""

from __future__ import annotations

import csv
import functools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from ofa_ds.data.building.source import Record, Row, SourceError, SourceFile
from ofa_ds.data.building.work import ITEMS
from ofa_ds.data.importing.item import Into, Item
from ofa_ds.data.importing.item_lines import PIECE_ROWS, Lines, read_picture, write_lines
from ofa_ds.data.importing.loose import text_of
from ofa_ds.storage import file_systems, strict_json

COLUMNS = {"image": "file_name image file", "caption": "text caption"}
"""Field -> its column in the metadata, the first that is there."""

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv")
MAX_TEXT_BYTES = 1 << 20
WANT = f"want a text in NAME.txt beside NAME.jpg, or a line for it in {' or '.join(METADATA)}"


@dataclass(frozen=True)
class FolderPiece:
    """Items of a folder, as `_items` gives them."""

    lines: Lines
    folder: SourceFile
    """Its stamp is of all that was listed."""
    num_bytes: int
    into: Into

    @property
    def files(self) -> Sequence[SourceFile]:
        return [self.folder]

    def key(self) -> Any:
        return ["folder", asdict(self.folder), self.lines.start, self.lines.stop, repr(self.into)]

    def records(self, part: int) -> Iterator[Record]:
        for number, line, (name, identity, _, caption, beside) in self.lines.read():
            yield Record(number, line, functools.partial(self._read, name, identity, caption, beside), name)

    def _read(self, name: str, identity: str, caption: str, beside: str) -> Row:
        folder = Path(self.folder.location)
        if beside:
            try:
                caption = text_of("caption", file_systems.read_bytes(folder / beside, MAX_TEXT_BYTES).decode().strip())
            except UnicodeDecodeError as error:
                raise ValueError(f"caption: {beside} is not UTF-8: {error.reason} at byte {error.start}") from error
            except (FileNotFoundError, ValueError) as error:
                raise ValueError(f"caption: {error}") from error
        if not caption:
            raise ValueError(f"caption: {f'{beside} is empty' if beside else 'there is none'}; {WANT}")
        return self.into.row(Item(id=identity, image=read_picture(str(folder / name)), caption=caption))


def pieces_of(
    folders: Sequence[str], into: Into, columns: Sequence[tuple[str, str]], journal: Path
) -> list[FolderPiece]:
    """journal: directory for the lists. Raises SourceError for a folder without pictures, or with wrong metadata."""
    found = []
    for number, location in enumerate(folders):
        folder = Path(location)
        if file_systems.is_remote(location) or not folder.is_dir():
            raise SourceError(f"{location}: want a folder of this machine")
        found += _pieces(folder, into, dict(columns), journal / f"{ITEMS}.{number}.jsonl")
    return found


def _pieces(folder: Path, into: Into, columns: Mapping[str, str], items: Path) -> list[FolderPiece]:
    sizes, digest = [], xxhash.xxh3_64()

    def listed() -> Iterator[tuple[str, str, int, str, str]]:
        for stamp, item in _items(folder, columns):
            digest.update(repr((stamp, item)).encode())
            sizes.append(item[2])
            yield item

    lines = write_lines(items, listed())
    source = SourceFile(str(folder.resolve()), sum(sizes), digest.intdigest() >> 1)
    starts = range(0, len(sizes), PIECE_ROWS)
    return [
        FolderPiece(each, source, sum(sizes[start : start + PIECE_ROWS]), into)
        for each, start in zip(lines, starts, strict=True)
    ]


def _items(folder: Path, columns: Mapping[str, str]) -> Iterator[tuple[Any, tuple[str, str, int, str, str]]]:
    """(when it was changed, (picture, id, bytes, caption, file of the caption)), in order of name, or of the metadata.

    A picture that nobody speaks of comes too: it is a bad record.
    """
    listed = _listed(folder)
    if not listed:
        raise SourceError(f"{folder}: has no picture: want files that end in {', '.join(PICTURES)}")
    metadata = [name for name in METADATA if (folder / name).is_file()]
    if len(metadata) > 1:
        raise SourceError(f"{folder}: has {' and '.join(metadata)}; want one of them")
    if not metadata and not any(beside for *_, beside in listed.values()):
        raise SourceError(f"{folder}: none of its {len(listed)} pictures has a caption: {WANT}")
    times: Counter[str] = Counter()
    for name, caption in _captions(folder / metadata[0], listed, columns) if metadata else ():
        times[name] += 1
        stamp, num_bytes, _ = listed[name]
        yield stamp, (name, name if times[name] == 1 else f"{name}#{times[name]}", num_bytes, caption, "")
    for name, (stamp, num_bytes, beside) in listed.items():
        if name not in times:
            yield stamp, (name, name, num_bytes, "", "" if metadata else beside)


def _listed(folder: Path) -> dict[str, tuple[Any, int, str]]:
    """Name of a picture from the folder on -> (when it and its text were changed, their bytes, name of its text or "").

    What begins with a dot is left out, also folders.
    """
    found: dict[str, tuple[Any, int, str]] = {}
    bases = [""]
    while bases:
        base = bases.pop()
        with os.scandir(f"{folder}/{base}") as entries:
            seen = [each for each in entries if not each.name.startswith(".")]
        inside = sorted((each.name for each in seen if each.is_dir(follow_symlinks=False)), reverse=True)
        bases += [f"{base}{name}/" for name in inside]
        files = {each.name: each for each in seen if each.is_file()}
        for name in sorted(files):
            stem, end = os.path.splitext(name)
            if end.lower() not in PICTURES:
                continue
            status, text = files[name].stat(), files.get(f"{stem}.txt")
            beside = text.stat() if text else None
            changed = (status.st_mtime_ns, beside and (beside.st_mtime_ns, beside.st_size))
            size = status.st_size + (beside.st_size if beside else 0)
            found[base + name] = changed, size, f"{base}{text.name}" if text else ""
    return found


def _captions(path: Path, listed: Mapping[str, Any], columns: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(picture, caption) of each line. Raises SourceError with the line."""
    for line, table in _csv(path) if path.suffix == ".csv" else _jsonl(path):
        found = {}
        for field, names in columns.items():
            known = [name for name in names.split() if name in table]
            if not known:
                raise SourceError(f"{path}:{line}: has no {' or '.join(names.split())}; say --column {field}=NAME")
            try:
                found[field] = text_of(known[0], table[known[0]]).strip()
            except ValueError as error:
                raise SourceError(f"{path}:{line}: {error}") from error
        if (name := found["image"]) not in listed:
            raise SourceError(f"{path}:{line}: {name!r:.80} is no picture in {path.parent}")
        yield name, found["caption"]


def _jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                table = strict_json.loads(line)
            except ValueError as error:
                raise SourceError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(table, dict):
                raise SourceError(f'{path}:{number}: want a table such as {{"file_name": ...}}, got {table!r:.60}')
            yield number, table


def _csv(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for table in reader:
                yield reader.line_num, {name: text for name, text in table.items() if isinstance(name, str)}
        except (csv.Error, UnicodeDecodeError) as error:
            raise SourceError(f"{path}:{reader.line_num + 1}: not CSV: {error}") from error
