"""In how many pictures' captions each n-gram of words stands: what CIDEr-D weighs n-grams with.

(docs/ofa.md, Fine-tuning: SCST). A file of them is JSON: {"images": how many, "ngrams": {"a red circle": count, ...}}.
"""

from __future__ import annotations

import json
import math
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ofa_ds.data.shards import Shards
from ofa_ds.progress import track
from ofa_ds.storage.atomic import new_file
from ofa_ds.storage.strict_json import loads

MAX_WORDS = 4
"""Of an n-gram."""
END = "<eos>"
"""The word that ends every caption, so that breaking off has a price."""

CAPTIONS = "caption"
"""`type` of the rows of both tasks of captions."""

Ngram = tuple[str, ...]
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def caption_words(text: str) -> Ngram:
    """A caption as SCST compares it: without punctuation, between blanks, with its end."""
    return (*text.translate(_NO_PUNCTUATION).split(), END)


def ngrams(words: Sequence[str], size: int) -> Iterator[Ngram]:
    """All runs of `size` words, in order."""
    return zip(*(words[k:] for k in range(size)), strict=False)


@dataclass(frozen=True, kw_only=True)
class DocumentFrequency:
    """Of a set of pictures, each with one caption or several."""

    images: int
    counts: Mapping[Ngram, int]
    """Pictures with that n-gram in any caption. One that is not here counts as 1, which is why none need be 1."""

    def weight(self, ngram: Ngram) -> float:
        """ln(pictures / those with the n-gram)."""
        return math.log(self.images) - math.log(max(1, self.counts.get(ngram, 1)))


def count_ngrams(captions_of: Iterable[Iterable[str]]) -> DocumentFrequency:
    """From the captions of each picture. What stands with one picture alone is left out, three quarters of all."""
    counts: Counter[Ngram] = Counter()
    images = 0
    for captions in captions_of:
        words = [caption_words(text) for text in captions]
        counts.update({ngram for each in words for size in range(1, MAX_WORDS + 1) for ngram in ngrams(each, size)})
        images += 1
    return DocumentFrequency(images=images, counts={ngram: count for ngram, count in counts.items() if count > 1})


def of_shards(shards: Shards) -> DocumentFrequency:
    """From the reference captions of downstream shards, those of one picture (its image id) together.

    Raises ValueError: rows of another task, no captions, or those of fewer than two pictures, which say nothing about
    what is rare.
    """
    if other := sorted(set(shards.types) - {CAPTIONS}):
        raise ValueError(f"{shards.path}: want rows of captions, got rows of {', '.join(other)}")
    captions: dict[str, list[str]] = defaultdict(list)
    for i in track(range(shards.families.get("downstream", 0)), "counting n-grams", "rows"):
        row = shards.fields("downstream", i, ("id", "image_id", "answer_text"))
        captions[row["image_id"] or row["id"]] += row["answer_text"]
    found = sum(map(bool, captions.values()))
    if found < 2:
        raise ValueError(f"{shards.path}: has the captions of {found} pictures; document frequencies need two or more")
    return count_ngrams(each for each in captions.values() if each)


def write_document_frequency(frequency: DocumentFrequency, path: Path) -> None:
    """Raises ValueError where something is at `path`."""
    named = {" ".join(ngram): count for ngram, count in sorted(frequency.counts.items())}
    with new_file(path) as partial:
        partial.write_text(json.dumps({"images": frequency.images, "ngrams": named}, ensure_ascii=False), "utf-8")


def read_document_frequency(path: Path) -> DocumentFrequency:
    """Raises ValueError, with the file and what is wrong in it; OSError where it cannot be read."""
    try:
        stored = loads(path.read_bytes())
        if not isinstance(stored, dict) or set(stored) != {"images", "ngrams"}:
            raise ValueError('want an object with "images" and "ngrams"')
        images, named = stored["images"], stored["ngrams"]
        if type(images) is not int or images < 2:
            raise ValueError(f'"images" is {images!r}, want 2 or more')
        for name, count in named.items() if isinstance(named, dict) else [("", named)]:
            if type(count) is not int or not 1 <= count <= images or not 1 <= len(name.split()) <= MAX_WORDS:
                raise ValueError(f"n-gram {name[:80]!r}: {count!r}, want up to {MAX_WORDS} words: 1 to {images}")
    except ValueError as error:
        raise ValueError(f"{path}: no document frequencies: {error}; `ofa-ds shards frequencies` makes them") from error
    return DocumentFrequency(images=images, counts={tuple(name.split()): count for name, count in named.items()})
