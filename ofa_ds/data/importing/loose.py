"""Values of foreign tables, whose types nobody checked, as the types of an `Item`. ValueErrors are "field: reason"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ofa_ds.data.importing.item import Box, Item, Named, number_of, short


def text_of(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise ValueError(f"{name}: want a text, got {short(value)}")
    return " ".join(value.split("\n")).replace("\t", " ").replace("\r", " ")


def texts_of(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [text_of(name, each) for each in values]


def image_of(value: Any) -> bytes:
    """Bytes, or a table with them, as Hugging Face's data sets keep pictures."""
    if isinstance(value, Mapping):
        if value.get("bytes") is None and value.get("path"):
            raise ValueError(f"image: only the path {short(value['path'])} is stored, not the picture")
        value = value.get("bytes")
    if value is None:
        return b""
    if not isinstance(value, bytes):
        raise ValueError(f"image: want bytes, got {type(value).__name__}")
    return value


def box_of(name: str, value: Any) -> Box | None:
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or len(value) != 4:
        raise ValueError(f"{name}: want x0, y0, x1, y1 in pixels, got {short(value)}")
    x0, y0, x1, y1 = (number_of(name, each) for each in value)
    return x0, y0, x1, y1


def answers_of(value: Any) -> list[tuple[str, float]]:
    """A text; texts, each as likely as it is often among them; or {text: confidence}."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [(text_of("answers", text), number_of("answers", share)) for text, share in value.items()]
    texts = texts_of("answers", value)
    counts = dict.fromkeys(texts, 0)
    for text in texts:
        counts[text] += 1
    return [(text, count / len(texts)) for text, count in counts.items()]


def objects_of(value: Any) -> list[Named]:
    """A list of {box, category, name}."""
    if value is not None and not isinstance(value, list):
        raise ValueError(f"objects: want a list, got {short(value)}")
    found = []
    for each in value or []:
        if not isinstance(each, Mapping):
            raise ValueError(f"objects: want tables with box, category, name, got {short(each)}")
        box = box_of("objects", each.get("box"))
        if box is None:
            raise ValueError("objects: one has no box")
        category = each.get("category", "")
        if not isinstance(category, int | str) or isinstance(category, bool):
            raise ValueError(f"objects: category: want a whole number or a text, got {short(category)}")
        found.append(Named(box, str(category), text_of("objects", each.get("name"))))
    return found


def item_of(key: str, found: Mapping[str, Any]) -> Item:
    """An item of loosely typed fields: texts, lists, numbers. Raises ValueError "field: reason"."""
    return Item(
        id=key, image=image_of(found.get("image")), caption=text_of("caption", found.get("caption")),
        question=text_of("question", found.get("question")), answers=answers_of(found.get("answers")),
        box=box_of("box", found.get("box")), objects=objects_of(found.get("objects")),
        names=texts_of("names", found.get("names")), text=text_of("text", found.get("text")),
    )  # fmt: skip
