"""One record of a foreign data set, in this project's words, and its way into a checked row."""

from __future__ import annotations

import io
import math
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from PIL import Image

from ofa_ds.data.building.source import Row
from ofa_ds.data.image import decode
from ofa_ds.data.picture import check_image, orientation
from ofa_ds.data.tsv import checked_row
from ofa_ds.terms import IMPORTED

Box = tuple[float, float, float, float]
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a pair, which JSON lets pass and UTF-8 does not."""

UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
"""In a name: line ends and other controls too."""


class Named(NamedTuple):
    """An object of a picture."""

    box: Box
    category: str
    name: str


@dataclass(kw_only=True)
class Item:
    """Fields that a kind does not have stay empty. Boxes are x0, y0, x1, y1 in pixels of the picture."""

    id: str
    image: bytes = b""
    caption: str = ""
    question: str = ""
    answers: Sequence[tuple[str, float]] = ()
    """Each with its confidence, 0 to 1."""
    box: Box | None = None
    objects: Sequence[Named] = ()
    names: Sequence[str] = ()
    """Of what is in the picture, without boxes."""
    text: str = ""
    size: tuple[int, int] | None = None
    """Width and height that the boxes are of, where the data set says so."""


@dataclass(frozen=True, kw_only=True)
class Shrink:
    """What becomes of pictures on the way."""

    max_side: int = 0
    """Longest side in pixels; larger pictures are made smaller, 0 none."""
    quality: int = 0
    """JPEG quality that every picture is written again with; 0 keeps the bytes of those that stay as they are."""

    def apply(self, image: bytes) -> tuple[bytes, tuple[float, float]]:
        """(picture, factors of its width and height). Raises ValueError "image: reason"."""
        width, height = check_image(image)
        longest = max(width, height)
        if not self.quality and (not self.max_side or longest <= self.max_side):
            return image, (1.0, 1.0)
        pixels = Image.fromarray(decode(image))
        if self.max_side and longest > self.max_side:
            size = [max(1, round(side * self.max_side / longest)) for side in (width, height)]
            pixels = pixels.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        pixels.save(out := io.BytesIO(), "JPEG", quality=self.quality or 90, subsampling=0)
        return out.getvalue(), (pixels.width / width, pixels.height / height)


@dataclass(frozen=True, kw_only=True)
class Into:
    """What items become."""

    kind: str
    """One of IMPORTED."""
    dataset: str = ""
    """Name in the dataset column."""
    shrink: Shrink = field(default_factory=Shrink)

    @property
    def family(self) -> str:
        return IMPORTED[self.kind]

    def row(self, item: Item) -> Row:
        """Raises ValueError "column: reason"."""
        doubts: list[str] = []
        _check_texts(item)
        if self.family == "text":
            return Row(checked_row("text", {"uniq_id": item.id, "text": item.text}, None))
        if not item.image:
            raise ValueError("image: is empty or missing")
        if item.size is not None and tuple(item.size) != (found := check_image(item.image)):
            raise ValueError(
                f"image: is {found[0]} x {found[1]}, its boxes are of a picture of {item.size[0]} x {item.size[1]}"
            )
        if (turn := orientation(item.image)) != 1:
            doubts.append(f"image: EXIF data turn it for viewers (orientation {turn}); it is taken as stored")
        image, scale = self.shrink.apply(item.image)
        return Row(checked_row(self.family, self._fields(item, scale), image), doubts)

    def _fields(self, item: Item, scale: tuple[float, float]) -> dict[str, str]:
        """The columns of the family, as OFA's files have them."""
        if self.family == "detection":
            if not item.objects:
                raise ValueError("label: the picture has no object")
            return {"uniq_id": item.id, "label": "&&".join(_labelled(each, scale) for each in item.objects)}
        refs = ""
        if self.kind == "qa":
            refs = "&&".join(f"{share!r}|!+{plain('answers', text)}" for text, share in item.answers)
        elif self.kind == "visual_grounding":
            if item.box is None:
                raise ValueError("box: is missing")
            refs = ",".join(map(repr, scaled(item.box, scale)))
        return {
            "uniq_id": item.id, "caption": item.caption, "question": item.question, "refs": refs,
            "gt_objects": "&&".join(plain("objects", name) for name in item.names), "dataset_name": self.dataset,
            "type": self.kind,
        }  # fmt: skip


def _check_texts(item: Item) -> None:
    """Half of a surrogate pair, which JSON lets pass, is no text."""
    texts = {
        "id": [item.id], "caption": [item.caption], "question": [item.question], "text": [item.text],
        "answers": [text for text, _ in item.answers], "names": item.names,
        "objects": [text for each in item.objects for text in (each.category, each.name)],
    }  # fmt: skip
    for name, found in texts.items():
        if wrong := [text for text in found if SURROGATE.search(text)]:
            raise ValueError(f"{name}: want a text, got {short(wrong[0])}")


def scaled(box: Box, scale: tuple[float, float]) -> Box:
    """Raises ValueError for a value that is not finite."""
    if not all(map(math.isfinite, box)):
        raise ValueError(f"box: want four finite numbers, got {list(box)}")
    return (box[0] * scale[0], box[1] * scale[1], box[2] * scale[0], box[3] * scale[1])


def _labelled(each: Named, scale: tuple[float, float]) -> str:
    numbers = ",".join(map(repr, scaled(each.box, scale)))
    if "," in each.category:
        raise ValueError(f"label: a comma is in the category {each.category!r}")
    return f"{numbers},{each.category},{plain('label', each.name)}"


def plain(column: str, text: str) -> str:
    """Raises ValueError where a text has what separates texts in OFA's columns."""
    for mark in ("&&", "|!+"):
        if mark in text:
            raise ValueError(f"{column}: {mark!r} is in {text[:60]!r}, which separates texts here")
    return text


def xywh(box: Any) -> Box:
    """COCO's x, y, width, height -> x0, y0, x1, y1. Raises ValueError."""
    if not isinstance(box, list) or len(box) != 4:
        raise ValueError(f"box: want x, y, width, height in pixels, got {short(box)}")
    x, y, width, height = (number_of("box", value) for value in box)
    return x, y, x + width, y + height


def number_of(name: str, value: Any) -> float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(number := float(value)):
            return number
    except OverflowError:
        pass  # a whole number of hundreds of digits
    raise ValueError(f"{name}: want a finite number, got {short(value)}")


def short(value: Any) -> str:
    """As Python writes it, cut; of values that are nested without end the outermost."""
    return f"{reprlib.repr(value):.80}"
