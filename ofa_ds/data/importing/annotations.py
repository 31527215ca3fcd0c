"""Annotation files beside a folder of pictures: COCO captions and instances, VQA v2, RefCOCO.

Each is read once, into a list of items without pictures, a line of JSON each; pieces are runs of its lines.
"""

from __future__ import annotations

import functools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ofa_ds.data.building.source import Record, Row, SourceError, SourceFile, source_file
from ofa_ds.data.building.work import ITEMS
from ofa_ds.data.importing.item import Into, Item, Named, xywh
from ofa_ds.storage import file_systems

MAX_JSON_BYTES = 1 << 31
MAX_PICTURE_BYTES = 1 << 28
PIECE_ROWS = 5_000

Table = Mapping[str, Any]
Identity = (int, str)
"""What ids are; a list or a table as one would be no key."""


@dataclass(frozen=True)
class ItemsPiece:
    """Lines start ... stop - 1 (in bytes) of a list of items."""

    items: str
    start: int
    stop: int
    sources: tuple[SourceFile, ...]
    images: str
    into: Into

    @property
    def files(self) -> Sequence[SourceFile]:
        return self.sources[:1]

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    def key(self) -> Any:
        sources = [asdict(each) for each in self.sources]
        return ["items", sources, self.start, self.stop, self.images, repr(self.into)]

    def records(self, part: int) -> Iterator[Record]:
        with open(self.items, "rb") as file:
            file.seek(self.start)
            number = 0
            while file.tell() < self.stop:
                line = file.readline()
                number += 1
                table = json.loads(line)
                path = f"{self.images.rstrip('/')}/{table['image']}"
                size = table.get("bytes", 0) + len(line)
                yield Record(number, line.rstrip(b"\n"), size, functools.partial(self._read, table, path), table["id"])

    def _read(self, table: Table, path: str) -> Row:
        try:
            image = file_systems.read_bytes(path, MAX_PICTURE_BYTES)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"image: {error}") from error
        return self.into.row(
            Item(
                id=table["id"], image=image, caption=table.get("caption", ""), question=table.get("question", ""),
                answers=[(text, share) for text, share in table.get("answers", ())],
                box=tuple(table["box"]) if table.get("box") else None, size=tuple(table["size"]) if "size" in table
                else None,
                objects=[Named(tuple(box), category, name) for box, category, name in table.get("objects", ())],
                names=table.get("names", ()),
            )
        )  # fmt: skip


def pieces_of(form: str, locations: Sequence[str], images: str, into: Into, journal: Path) -> list[ItemsPiece]:
    """form: one of READERS. journal: directory for the list of items."""
    sources = tuple(source_file(location) for location in locations)
    tables = [_json(location) for location in locations]
    path = journal / f"{ITEMS}.jsonl"
    cuts = [0]
    with path.open("wb") as file:
        for number, item in enumerate(READERS[form](tables, locations)):
            if number and number % PIECE_ROWS == 0:
                cuts.append(file.tell())
            file.write(json.dumps(item, sort_keys=True).encode() + b"\n")
        cuts.append(file.tell())
    if cuts[-1] == 0:
        raise SourceError(f"{locations[0]}: has no annotations")
    pairs = zip(cuts, cuts[1:], strict=False)
    return [ItemsPiece(str(path), start, stop, sources, images, into) for start, stop in pairs if stop > start]


def _json(location: str) -> Any:
    try:
        return json.loads(file_systems.read_bytes(location, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        way = "; a pickle is not read: write it as JSON" if location.endswith((".p", ".pkl", ".pickle")) else ""
        raise SourceError(f"{location}: not JSON: {error}{way}") from error
    except FileNotFoundError as error:
        raise SourceError(f"{location}: no such file") from error


def _list(table: Any, key: str, location: str) -> list[Table]:
    found = table.get(key) if isinstance(table, dict) else None
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise SourceError(f"{location}: {key}: want a list of tables; is it the right file for this format?")
    return found


def _need(table: Table, key: str, kind: type | tuple[type, ...], location: str, where: str) -> Any:
    value = table.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise SourceError(f"{location}: {where}: {key}: want {_words(kind)}, got {value!r:.60}")
    return value


def _words(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(
        {str: "a text", int: "a whole number", list: "a list"}.get(each, each.__name__) for each in kinds
    )


def _images(table: Any, location: str) -> dict[Any, Table]:
    """id -> image; names that lead out of the folder are refused."""
    found: dict[Any, Table] = {}
    for number, image in enumerate(_list(table, "images", location)):
        where = f"images.{number}"
        identity = _need(image, "id", Identity, location, where)
        _safe(_need(image, "file_name", str, location, where), location, where)
        if identity in found:
            raise SourceError(f"{location}: {where}: the id {identity} is there twice")
        found[identity] = image
    return found


def _by_id(tables: Sequence[Table], key: str, location: str, name: str) -> dict[Any, tuple[Table, str]]:
    """id -> (table, its place). Of two with one id, which is meant cannot be known."""
    found: dict[Any, tuple[Table, str]] = {}
    for number, each in enumerate(tables):
        identity = _need(each, key, Identity, location, where := f"{name}.{number}")
        if identity in found:
            raise SourceError(f"{location}: {where}: the {key} {identity!r:.40} is there twice")
        found[identity] = (each, where)
    return found


def _safe(name: str, location: str, where: str) -> str:
    if PurePosixPath(name).is_absolute() or ".." in name.replace("\\", "/").split("/") or not name.strip():
        raise SourceError(f"{location}: {where}: the file name {name!r:.80} leads out of the folder of pictures")
    return name


def _size(image: Table) -> dict[str, Any]:
    width, height = image.get("width"), image.get("height")
    return {"size": [width, height]} if isinstance(width, int) and isinstance(height, int) else {}


def coco_captions(tables: Sequence[Any], locations: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each caption, in the order of the file."""
    for table, location in zip(tables, locations, strict=True):
        images = _images(table, location)
        for number, each in enumerate(_list(table, "annotations", location)):
            where = f"annotations.{number}"
            image = _image_of(each, images, location, where)
            caption = " ".join(_need(each, "caption", str, location, where).split())
            yield {"id": str(each.get("id", number)), "image": image["file_name"], "caption": caption}


def _image_of(each: Table, images: Mapping[Any, Table], location: str, where: str) -> Table:
    identity = each.get("image_id")
    if not isinstance(identity, int | str) or identity not in images:
        raise SourceError(f"{location}: {where}: image_id {identity!r:.40} is not among the images")
    return images[identity]


def coco_instances(tables: Sequence[Any], locations: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each picture that has an object, with all of them; crowds are left out."""
    for table, location in zip(tables, locations, strict=True):
        images = _images(table, location)
        names = {
            identity: str(each.get("name", ""))
            for identity, (each, _) in _by_id(
                _list(table, "categories", location), "id", location, "categories"
            ).items()
        }
        objects: dict[Any, list[Any]] = defaultdict(list)
        for number, each in enumerate(_list(table, "annotations", location)):
            where = f"annotations.{number}"
            _image_of(each, images, location, where)
            if each.get("iscrowd"):
                continue
            if _need(each, "category_id", Identity, location, where) not in names:
                raise SourceError(f"{location}: {where}: category_id {each['category_id']!r:.40} has no name")
            box = _box(each, location, where)
            objects[each["image_id"]].append([box, str(each["category_id"]), names[each["category_id"]]])
        for identity, image in images.items():
            if objects[identity]:
                mine = {"image": image["file_name"], "objects": objects[identity]} | _size(image)
                yield {"id": str(identity)} | mine


def _box(each: Table, location: str, where: str) -> list[float]:
    try:
        return list(xywh(_need(each, "bbox", list, location, where)))
    except ValueError as error:
        raise SourceError(f"{location}: {where}: {error}") from error


VQA_PICTURE = "COCO_{split}_{id:012d}.jpg"


def vqa_v2(tables: Sequence[Any], locations: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Questions and annotations, two files in either order: answers with min(1, people / 3), the official measure."""
    if len(tables) != 2:
        raise SourceError(f"vqa-v2: want a file of questions and one of annotations, got {len(tables)}")
    order = (0, 1) if isinstance(tables[0], dict) and "questions" in tables[0] else (1, 0)
    (asked, told), (asked_at, told_at) = (tuple(each[k] for k in order) for each in (tables, locations))
    answers = _by_id(_list(told, "annotations", told_at), "question_id", told_at, "annotations")
    questions = _by_id(_list(asked, "questions", asked_at), "question_id", asked_at, "questions")
    split = str(asked.get("data_subtype", "train2014"))
    for identity, (each, where) in questions.items():
        if identity not in answers:
            raise SourceError(f"{asked_at}: {where}: question_id {identity} has no annotation in {told_at}")
        image = _need(each, "image_id", int, asked_at, where)
        given = [str(one.get("answer", "")) for one in _list(answers[identity][0], "answers", told_at)]
        counts = Counter(" ".join(text.split()) for text in given if text.strip())
        name = VQA_PICTURE.format(split=_safe(split, asked_at, "data_subtype"), id=image)
        question = " ".join(_need(each, "question", str, asked_at, where).split())
        shares = [[text, min(1.0, count / 3)] for text, count in counts.items()]
        yield {"id": str(identity), "image": name, "question": question, "answers": shares}


def refcoco(tables: Sequence[Any], locations: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Refs (a JSON list) and instances, two files in either order: a row for each sentence of each ref."""
    if len(tables) != 2:
        raise SourceError(f"refcoco: want a file of refs (as JSON) and one of instances, got {len(tables)}")
    order = (0, 1) if isinstance(tables[0], list) else (1, 0)
    (refs, instances), (refs_at, instances_at) = (tuple(each[k] for k in order) for each in (tables, locations))
    images = _images(instances, instances_at)
    found = _by_id(_list(instances, "annotations", instances_at), "id", instances_at, "annotations")
    for number, ref in enumerate(_list({"refs": refs}, "refs", refs_at)):
        where = f"refs.{number}"
        if _need(ref, "ann_id", Identity, refs_at, where) not in found:
            raise SourceError(f"{refs_at}: {where}: ann_id {ref['ann_id']!r:.40} is not in {instances_at}")
        each, place = found[ref["ann_id"]]
        image = _image_of(each, images, instances_at, place)
        for sentence in _list(ref, "sentences", f"{refs_at}: {where}"):
            text = " ".join(str(sentence.get("sent") or sentence.get("raw") or "").split())
            row = {"id": str(sentence.get("sent_id", f"{number}")), "image": image["file_name"], "caption": text}
            yield row | {"box": _box(each, instances_at, place)} | _size(image)


READERS: dict[str, Callable[[Sequence[Any], Sequence[str]], Iterator[dict[str, Any]]]] = {
    "coco-captions": coco_captions, "coco-instances": coco_instances, "vqa-v2": vqa_v2, "refcoco": refcoco,
}  # fmt: skip
"""Of each of terms.ANNOTATIONS."""
