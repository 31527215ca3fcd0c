"""Annotation files beside a folder of pictures: COCO captions and instances, VQA v2, RefCOCO.

Each is read once, into a list of items without pictures, a line of JSON each; pieces are runs of its lines.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ofa_ds.data import plain_pickle
from ofa_ds.data.building.source import Record, Row, SourceError, SourceFile, source_file
from ofa_ds.data.building.work import ITEMS
from ofa_ds.data.importing.item import SURROGATE, UNPRINTABLE, Into, Item, Named, short, xywh
from ofa_ds.data.importing.item_lines import Lines, read_picture, write_lines
from ofa_ds.storage import file_systems, strict_json

MAX_JSON_BYTES = 1 << 31

Table = Mapping[str, Any]
PICKLES = (".p", ".pkl", ".pickle")
"""Ends of names: RefCOCO's refs are one."""

MAX_ID_CHARACTERS = 256


@dataclass(frozen=True)
class ItemsPiece:
    lines: Lines
    sources: tuple[SourceFile, ...]
    images: str
    into: Into

    @property
    def files(self) -> Sequence[SourceFile]:
        return self.sources[:1]

    @property
    def num_bytes(self) -> int:
        return self.lines.stop - self.lines.start

    def key(self) -> Any:
        sources = [asdict(each) for each in self.sources]
        return ["items", sources, self.lines.start, self.lines.stop, self.images, repr(self.into)]

    def records(self, part: int) -> Iterator[Record]:
        for number, line, table in self.lines.read():
            path = f"{self.images.rstrip('/')}/{table['image']}"
            yield Record(number, line, functools.partial(self._read, table, path), table["id"])

    def _read(self, table: Table, path: str) -> Row:
        image = read_picture(path)
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
    if form != "refcoco" and (pickles := [each for each in locations if each.endswith(PICKLES)]):
        raise SourceError(f"{pickles[0]}: a pickle; {form} is read from JSON")
    tables = [_content(location) for location in locations]
    lines = write_lines(journal / f"{ITEMS}.jsonl", READERS[form](tables, locations))
    if not lines:
        raise SourceError(f"{locations[0]}: has no annotations")
    return [ItemsPiece(each, sources, images, into) for each in lines]


def _content(location: str) -> Any:
    try:
        data = file_systems.read_bytes(location, MAX_JSON_BYTES)
    except FileNotFoundError as error:
        raise SourceError(f"{location}: no such file") from error
    try:
        return plain_pickle.loads(data) if location.endswith(PICKLES) else strict_json.loads(data)
    except ValueError as error:
        kind = "pickle of plain values" if location.endswith(PICKLES) else "JSON"
        raise SourceError(f"{location}: not a {kind}: {error}") from error


def _list(table: Any, key: str, location: str) -> list[Table]:
    found = table.get(key) if isinstance(table, dict) else None
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise SourceError(f"{location}: {key}: want a list of tables; is it the right file for this format?")
    return found


def _text(table: Table, key: str, location: str, where: str) -> str:
    """Its words, with a space between."""
    value = table.get(key)
    if not isinstance(value, str) or SURROGATE.search(value):
        raise SourceError(f"{location}: {where}: {key}: want a text, got {short(value)}")
    return " ".join(value.split())


def _id(table: Table, key: str, location: str, where: str) -> int | str:
    """A list or a table as one would be no key; what has a line end would be no place."""
    value = table.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63:
        return value
    if isinstance(value, str) and len(value) <= MAX_ID_CHARACTERS and not UNPRINTABLE.search(value) and value.strip():
        return value
    raise SourceError(f"{location}: {where}: {key}: want a whole number or a text, got {short(value)}")


def _images(table: Any, location: str) -> dict[Any, Table]:
    """id -> image; names that lead out of the folder are refused."""
    found = _by_id(_list(table, "images", location), "id", location, "images")
    for image, where in found.values():
        _safe(image.get("file_name"), location, f"{where}: file_name")
    return {identity: image for identity, (image, _) in found.items()}


class _Once:
    """Ids that a source says are its own: one that is there twice shows that the file is damaged."""

    def __init__(self, key: str, location: str) -> None:
        self._key, self._location = key, location
        self._seen: set[int | str] = set()

    def of(self, table: Table, where: str) -> int | str:
        identity = _id(table, self._key, self._location, where)
        if identity in self._seen:
            raise SourceError(f"{self._location}: {where}: the {self._key} {identity!r:.40} is there twice")
        self._seen.add(identity)
        return identity


def _by_id(tables: Sequence[Table], key: str, location: str, name: str) -> dict[Any, tuple[Table, str]]:
    """id -> (table, its place). Of two with one id, which is meant cannot be known."""
    once = _Once(key, location)
    return {once.of(each, where := f"{name}.{number}"): (each, where) for number, each in enumerate(tables)}


def _safe(name: Any, location: str, where: str) -> str:
    if not isinstance(name, str) or not name.strip() or UNPRINTABLE.search(name):
        raise SourceError(f"{location}: {where}: want the name of a picture, got {short(name)}")
    if PurePosixPath(name).is_absolute() or ".." in name.replace("\\", "/").split("/"):
        raise SourceError(f"{location}: {where}: {name!r:.80} leads out of the folder of pictures")
    return name


def _size(image: Table) -> dict[str, Any]:
    width, height = image.get("width"), image.get("height")
    return {"size": [width, height]} if isinstance(width, int) and isinstance(height, int) else {}


def coco_captions(tables: Sequence[Any], locations: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each caption, in the order of the file."""
    for table, location in zip(tables, locations, strict=True):
        images = _images(table, location)
        once = _Once("id", location)
        for number, each in enumerate(_list(table, "annotations", location)):
            where = f"annotations.{number}"
            image = _image_of(each, images, location, where)
            identity = once.of(each, where) if "id" in each else number
            caption = _text(each, "caption", location, where)
            yield {"id": str(identity), "image": image["file_name"], "caption": caption}


def _image_of(each: Table, images: Mapping[Any, Table], location: str, where: str) -> Table:
    identity = _id(each, "image_id", location, where)
    if identity not in images:
        raise SourceError(f"{location}: {where}: image_id {identity!r:.40} is not among the images")
    return images[identity]


def coco_instances(tables: Sequence[Any], locations: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each picture that has an object, with all of them; crowds are left out."""
    for table, location in zip(tables, locations, strict=True):
        images = _images(table, location)
        names = {
            identity: _text(each, "name", location, where)
            for identity, (each, where) in _by_id(
                _list(table, "categories", location), "id", location, "categories"
            ).items()
        }
        objects: dict[Any, list[Any]] = defaultdict(list)
        once = _Once("id", location)
        for number, each in enumerate(_list(table, "annotations", location)):
            where = f"annotations.{number}"
            _image_of(each, images, location, where)
            if "id" in each:
                once.of(each, where)
            if (crowd := each.get("iscrowd", 0)) not in (0, 1):
                raise SourceError(f"{location}: {where}: iscrowd: want 0 or 1, got {short(crowd)}")
            if crowd:
                continue
            if _id(each, "category_id", location, where) not in names:
                raise SourceError(f"{location}: {where}: category_id {each['category_id']!r:.40} has no name")
            box = _box(each, location, where)
            objects[each["image_id"]].append([box, str(each["category_id"]), names[each["category_id"]]])
        for identity, image in images.items():
            if objects[identity]:
                mine = {"image": image["file_name"], "objects": objects[identity]} | _size(image)
                yield {"id": str(identity)} | mine


def _box(each: Table, location: str, where: str) -> list[float]:
    try:
        return list(xywh(each.get("bbox")))
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
    split = _safe(asked.get("data_subtype", "train2014"), asked_at, "data_subtype")
    for identity, (each, where) in questions.items():
        if identity not in answers:
            raise SourceError(f"{asked_at}: {where}: question_id {identity} has no annotation in {told_at}")
        if not isinstance(image := _id(each, "image_id", asked_at, where), int):
            raise SourceError(f"{asked_at}: {where}: image_id: want a whole number, got {short(image)}")
        told_where = f"{told_at}: {answers[identity][1]}"
        given = [
            _text(one, "answer", told_where, "answers") for one in _list(answers[identity][0], "answers", told_where)
        ]
        counts = Counter(text for text in given if text)
        name = VQA_PICTURE.format(split=split, id=image)
        question = _text(each, "question", asked_at, where)
        shares = [[text, min(1.0, count / 3)] for text, count in counts.items()]
        yield {"id": str(identity), "image": name, "question": question, "answers": shares}


def refcoco(tables: Sequence[Any], locations: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Refs (a list) and instances, two files in either order: a row for each sentence of each ref."""
    if len(tables) != 2:
        raise SourceError(f"refcoco: want a file of refs and one of instances, got {len(tables)}")
    order = (0, 1) if isinstance(tables[0], list) else (1, 0)
    (refs, instances), (refs_at, instances_at) = (tuple(each[k] for k in order) for each in (tables, locations))
    images = _images(instances, instances_at)
    once = _Once("sent_id", refs_at)
    found = _by_id(_list(instances, "annotations", instances_at), "id", instances_at, "annotations")
    for number, ref in enumerate(_list({"refs": refs}, "refs", refs_at)):
        where = f"refs.{number}"
        if _id(ref, "ann_id", refs_at, where) not in found:
            raise SourceError(f"{refs_at}: {where}: ann_id {ref['ann_id']!r:.40} is not in {instances_at}")
        each, place = found[ref["ann_id"]]
        image = _image_of(each, images, instances_at, place)
        for sentence in _list(ref, "sentences", f"{refs_at}: {where}"):
            identity = once.of(sentence, f"{where}: sentences")
            text = _text(sentence, "sent" if sentence.get("sent") else "raw", refs_at, f"{where}: sentences")
            row = {"id": str(identity), "image": image["file_name"], "caption": text}
            yield row | {"box": _box(each, instances_at, place)} | _size(image)


READERS: dict[str, Callable[[Sequence[Any], Sequence[str]], Iterator[dict[str, Any]]]] = {
    "coco-captions": coco_captions, "coco-instances": coco_instances, "vqa-v2": vqa_v2, "refcoco": refcoco,
}  # fmt: skip
"""Of each of terms.ANNOTATIONS."""
