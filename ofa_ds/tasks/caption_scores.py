"""What a caption is worth, as COCO's evaluation and `pycocoevalcap` compute it (docs/downstream.md, Scores)."""

from __future__ import annotations

import re
import shutil
import string
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
ROUGE_L, CIDER, METEOR, SPICE = "ROUGE-L", "CIDEr", "METEOR", "SPICE"

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PTB_PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""Words of the tokeniser that COCO's evaluation leaves out."""
_JAVA_SECONDS = 600

Split = Callable[[list[str]], list[str]]
"""Texts -> their words in lower case, with single spaces between."""


def bare(text: str) -> str:
    """Without ASCII punctuation, as captions are handed in: what stood around it stays, blanks too."""
    return text.translate(_NO_PUNCTUATION).strip()


def word_split(texts: list[str]) -> list[str]:
    return [" ".join(re.findall(r"\w+", text.lower())) for text in texts]


def character_split(texts: list[str]) -> list[str]:
    """For Chinese, where nothing stands between words."""
    return [" ".join("".join(re.findall(r"\w+", text.lower()))) for text in texts]


def coco_split(texts: list[str]) -> list[str]:
    """Words as COCO's evaluation finds them, with Stanford's tokeniser; as `word_split` where there is no Java."""
    jar = _jar()
    if not jar or not texts:
        return word_split(texts)
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    lines = "\n".join(" ".join(text.split()) for text in texts) + "\n"
    try:
        done = subprocess.run(
            [*command, "-preserveLines", "-lowerCase"], input=lines.encode(), capture_output=True,
            timeout=_JAVA_SECONDS, check=True,
        )  # fmt: skip
        found = done.stdout.decode("utf-8", "replace").split("\n")[: len(texts)]
        if len(found) != len(texts):
            raise OSError(f"{len(found)} lines came back of {len(texts)}")
    except (OSError, subprocess.SubprocessError) as error:
        print(f"words are found more simply than by COCO's evaluation, as its program fails: {error}", file=sys.stderr)
        return word_split(texts)
    return [" ".join(word for word in line.split() if word not in _PTB_PUNCTUATION) for line in found]


def caption_scores(
    references: Sequence[Sequence[str]], texts: Sequence[str], split: Split = coco_split
) -> dict[str, float | None]:
    """BLEU-1 ... 4, ROUGE-L (0 ... 1) and CIDEr (0 ... 10) of one caption per picture beside all that are right.

    All None without `pycocoevalcap`; CIDEr needs two pictures. Its document frequencies are those of the references.
    """
    names = (*BLEU, ROUGE_L, CIDER)
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError:
        return dict.fromkeys(names)
    if not texts:
        return dict.fromkeys(names)
    right, given = _split_all(references, texts, split)
    bleu, _ = Bleu(4).compute_score(right, given, verbose=0)
    rouge, _ = Rouge().compute_score(right, given)
    cider = float(Cider().compute_score(right, given)[0]) if len(texts) > 1 else None
    return dict(zip(names, (*map(float, bleu), float(rouge), cider), strict=True))


def slow_caption_scores(
    references: Sequence[Sequence[str]], texts: Sequence[str], split: Split = coco_split
) -> dict[str, float | None]:
    """METEOR and SPICE, which are Java programs: each only where it, and what it needs, is there."""
    if not texts or _jar() is None:
        return {}
    from pycocoevalcap.spice import spice

    scorers: dict[str, Callable[[], Any]] = {METEOR: _meteor}
    if list((Path(spice.__file__).parent / "lib").glob("stanford-corenlp-3.6.0*.jar")):  # it downloads them itself
        scorers[SPICE] = spice.Spice
    right, given = _split_all(references, texts, split)
    result: dict[str, float | None] = {}
    for name, scorer in scorers.items():
        try:
            result[name] = float(scorer().compute_score(right, given)[0])
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            _meteor.cache_clear()
            print(f"{name}: left out, as its program fails ({error})", file=sys.stderr)
    return result


def constant_caption(references: Sequence[Sequence[str]]) -> str:
    """The most frequent of all right captions; of equally frequent ones that whose words most pictures have."""
    split = [[" ".join(caption.lower().split()) for caption in captions] for captions in references]
    captions = Counter(caption for each in split for caption in each)
    words = Counter(word for each in split for word in {word for caption in each for word in caption.split()})

    def commonness(caption: str) -> tuple[int, float]:
        found = caption.split()
        return captions[caption], sum(words[word] for word in found) / max(len(found), 1)

    return max(captions, key=commonness, default="")


def _split_all(
    references: Sequence[Sequence[str]], texts: Sequence[str], split: Split
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """What the library's scorers take; one call of `split` for all."""
    words = iter(split([*(caption for each in references for caption in each), *texts]))
    right = {place: [next(words) for _ in each] for place, each in enumerate(references)}
    return right, {place: [next(words)] for place in range(len(texts))}


@cache
def _meteor() -> Any:
    """Its program takes seconds to begin, and goes on until this process ends."""
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor()


@cache
def _jar() -> Path | None:
    """Stanford's tokeniser, where it and a Java are there."""
    try:
        from pycocoevalcap.tokenizer import ptbtokenizer
    except ImportError:
        return None
    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    if jar.is_file() and shutil.which("java"):
        return jar
    print("no Java here: no METEOR, and words are found more simply than by COCO's evaluation", file=sys.stderr)
    return None
