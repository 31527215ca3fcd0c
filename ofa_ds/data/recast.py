"""Rows of pretraining in the form of each downstream task: real pictures and texts to try a task on.

What is right is the rows' own where they say it (captions, questions, regions), else it follows from a rule that
`FORMS` names. Good for seeing that a task is learnt; no benchmark.
"""

from __future__ import annotations

import base64
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from ofa_ds.data.answer_list import best_answer
from ofa_ds.data.shards import Shards
from ofa_ds.data.text import clean_caption
from ofa_ds.storage.atomic import new_files

Row = dict[str, Any]
Columns = tuple[str, ...]

MAX_WORDS = 20
"""Of a sentence that is cut out of a text."""
HEADLINE_WORDS = 8
MIN_ARTICLE_WORDS = 2 * HEADLINE_WORDS

UNSEEN = ("and it is a monday", "and nobody has called yet", "and the next day is a holiday")
"""What no picture shows."""

GOOD = frozenset("good great love sweet fair happy joy best beautiful noble gentle kind dear pleasure won".split())
BAD = frozenset("bad poor death sad fear worst ugly cruel evil grief hate sorrow war killed lost".split())


def write_recast(source: Path, out: Path, task: str, *, rows: int | None = None, seed: int = 1) -> tuple[Path, int]:
    """Write `out`/TASK.tsv, and `out`/answers.txt where the task has a list, from shards of pretraining.

    rows: at most so many; all that the shards give where not given. Returns the file and how many it holds. Raises
    ValueError where the shards have none of the rows that the task is made of, or another file is there: none is
    overwritten (`new_files`).
    """
    if task not in FORMS:
        raise ValueError(f"{task}: rows of pretraining have no codes of a whole picture; see ofa-ds codes encode")
    given = _Given(Shards(source), seed)
    family, form = FORMS[task]
    if family not in given.shards.families:
        raise ValueError(f"{source}: has no {family} rows, of which {task} is made")
    lines = list(islice(form(given), rows))
    if not lines:
        raise ValueError(f"{source}: none of its {family} rows can be made into rows of {task}")
    with new_files(out, task) as folder:
        (folder / f"{task}.tsv").write_text("".join("\t".join(columns) + "\n" for columns in lines), "utf-8")
        if task in ANSWER_OF:
            counts = Counter(ANSWER_OF[task](columns) for columns in lines)
            answers = [answer for answer, _ in counts.most_common()]
            (folder / "answers.txt").write_text("\n".join(answers) + "\n", "utf-8")
    return out / f"{task}.tsv", len(lines)


@dataclass(frozen=True)
class _Given:
    """The rows, and what is drawn for them: a function of (seed, task, number of the row)."""

    shards: Shards
    seed: int

    def rows(self, family: str, kind: str = "") -> Iterator[Row]:
        for i in self.shards.rows_of_types(family, [kind] if kind else []):
            yield self.shards.row(family, i)

    def draw(self, task: str, number: int) -> random.Random:
        return random.Random(f"recast/{self.seed}/{task}/{number}")

    @cached_property
    def sentences(self) -> list[str]:
        """The beginning of each text, in plain words; each once."""
        texts = (_plain(row["text"]).split() for row in self.rows("text"))
        found = list(dict.fromkeys(" ".join(words[:MAX_WORDS]) for words in texts if len(words) >= 4))
        if len(found) < 2:
            raise ValueError(f"{self.shards.path}: want at least two different texts of four words, got {len(found)}")
        return found

    def other(self, draw: random.Random, sentence: str) -> str:
        """Another sentence; there are two at least."""
        return next(each for each in draw.sample(self.sentences, 2) if each != sentence)


def _plain(text: str) -> str:
    """One line without what separates columns and answers."""
    return " ".join(text.replace("&&", "and").split())


def _image(row: Row) -> str:
    return base64.b64encode(row["image"]).decode()


def _captions(given: _Given) -> Iterator[Columns]:
    for number, row in enumerate(given.rows("vision_language", "caption"), 1):
        caption = _plain(row["caption"])
        yield str(number), str(number), caption, "&&".join(map(_plain, row["gt_objects"])), _image(row)


def _captions_of_a_picture(given: _Given) -> Iterator[Columns]:
    """All captions of a picture are references of its one row."""
    pictures: dict[bytes, list[Row]] = {}
    for row in given.rows("vision_language", "caption"):
        pictures.setdefault(row["image"], []).append(row)
    for number, rows in enumerate(pictures.values(), 1):
        captions = dict.fromkeys(_plain(row["caption"]) for row in rows)
        yield str(number), str(number), "&&".join(captions), "", _image(rows[0])


def _vqa(given: _Given) -> Iterator[Columns]:
    for number, row in enumerate(given.rows("vision_language", "qa"), 1):
        answers: dict[str, float] = {}
        for text, confidence in row["answers"]:
            answers[_plain(text)] = max(confidence, answers.get(_plain(text), 0))
        joined = "&&".join(f"{confidence}|!+{text}" for text, confidence in answers.items())
        objects = "&&".join(map(_plain, row["gt_objects"]))
        yield str(number), str(number), _plain(row["question"]), joined, objects, _image(row)


def _refcoco(given: _Given) -> Iterator[Columns]:
    for number, row in enumerate(given.rows("vision_language", "visual_grounding"), 1):
        box = ",".join(f"{value:g}" for value in row["box"])
        yield str(number), str(number), _plain(row["caption"]), box, _image(row)


def _snli_ve(given: _Given) -> Iterator[Columns]:
    """The picture's caption; one without a word of its; its own and something unseen."""
    rows = list(given.rows("vision_language", "caption"))
    for number, row in enumerate(rows, 1):
        draw, own = given.draw("snli_ve", number), _plain(row["caption"])
        label = draw.choice(("entailment", "contradiction", "neutral"))
        hypothesis = own if label == "entailment" else f"{own.rstrip(' .')} {draw.choice(UNSEEN)}"
        if label == "contradiction":
            strange = draw.sample(rows, min(len(rows), 20))
            others = [_plain(each["caption"]) for each in strange if not _words(own) & _words(each["caption"])]
            if not others:
                continue
            hypothesis = others[0]
        objects = " and ".join(map(_plain, row["gt_objects"]))
        premise = f"a photo with {objects}" if objects else "a photo"
        yield str(number), str(number), _image(row), hypothesis, premise, label


def _words(caption: str) -> set[str]:
    """Those that mean something: of four letters at least."""
    return {word for word in clean_caption(caption).split() if len(word) > 3}


def _imagenet(given: _Given) -> Iterator[Columns]:
    """The largest box names the picture."""
    numbers: dict[str, int] = {}
    for row in given.rows("detection"):
        sizes = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in row["boxes"].tolist()]
        name = _plain(row["cat_names"][sizes.index(max(sizes))])
        yield _image(row), str(numbers.setdefault(name, len(numbers) + 1)), name


def _cola(given: _Given) -> Iterator[Columns]:
    """A sentence, or one with two different neighbouring words exchanged."""
    for number, sentence in enumerate(given.sentences, 1):
        draw, words = given.draw("cola", number), sentence.split()
        right = draw.random() < 0.5
        places = [k for k in range(len(words) - 1) if words[k] != words[k + 1]]
        if not places:
            continue
        at = draw.choice(places)
        if not right:
            words[at : at + 2] = words[at + 1], words[at]
        yield str(number), " ".join(words), str(int(right))


def _pairs(given: _Given, task: str) -> Iterator[tuple[int, str, str, str]]:
    """(number, sentence, its beginning | a denial of it | the beginning of another, yes | no | maybe)."""
    for number, sentence in enumerate(given.sentences, 1):
        draw = given.draw(task, number)
        label = draw.choice(("yes", "no", "maybe"))
        begins = _beginning(given.other(draw, sentence) if label == "maybe" else sentence)
        yield number, sentence, f"it is not true that {begins}" if label == "no" else begins, label


def _beginning(sentence: str) -> str:
    words = sentence.split()
    return " ".join(words[: max(len(words) // 2, 2)])


def _mnli(given: _Given) -> Iterator[Columns]:
    for _, sentence, hypothesis, label in _pairs(given, "mnli"):
        yield sentence, hypothesis, {"maybe": "0", "yes": "1", "no": "2"}[label]


def _rte(given: _Given) -> Iterator[Columns]:
    for number, sentence, hypothesis, label in _pairs(given, "rte"):
        yield str(number), sentence, hypothesis, "entailment" if label == "yes" else "not_entailment"


def _mrpc(given: _Given) -> Iterator[Columns]:
    """A sentence and its halves exchanged, or another sentence's halves."""
    for number, sentence in enumerate(given.sentences, 1):
        draw = given.draw("mrpc", number)
        same = draw.random() < 0.5
        words = (sentence if same else given.other(draw, sentence)).split()
        half = len(words) // 2
        yield sentence, " ".join((*words[half:], *words[:half])), str(int(same))


def _qnli(given: _Given) -> Iterator[Columns]:
    """Does a sentence have the word that is asked for?"""
    for number, sentence in enumerate(given.sentences, 1):
        draw, words = given.draw("qnli", number), sentence.split()
        told = draw.random() < 0.5
        strange = [word for word in given.other(draw, sentence).split() if word not in words]
        if not told and not strange:
            continue
        asked = draw.choice(words[:-1] if told else strange)
        yield str(number), f"what comes after {asked} ?", sentence, "entailment" if told else "not_entailment"


def _qqp(given: _Given) -> Iterator[Columns]:
    """A question of a picture and the same one politely, or another question politely."""
    questions = list(dict.fromkeys(_plain(row["question"]) for row in given.rows("vision_language", "qa")))
    for number, question in enumerate(questions, 1):
        draw = given.draw("qqp", number)
        same = draw.random() < 0.5
        if not same and len(questions) == 1:
            continue
        other = question if same else next(each for each in draw.sample(questions, 2) if each != question)
        yield str(number), str(2 * number - 1), str(2 * number), question, f"please tell me {other}", str(int(same))


def _sst2(given: _Given) -> Iterator[Columns]:
    """Texts with good words and no bad ones, and the other way round."""
    for sentence in given.sentences:
        words = {word.strip(".,;:!?'\"").lower() for word in sentence.split()}
        if bool(words & GOOD) != bool(words & BAD):
            yield sentence, str(int(bool(words & GOOD)))


def _gigaword(given: _Given) -> Iterator[Columns]:
    """The headline is how the text begins."""
    for row in given.rows("text"):
        words = clean_caption(_plain(row["text"])).split()
        if len(words) >= MIN_ARTICLE_WORDS:
            yield " ".join(words), " ".join(words[:HEADLINE_WORDS])


FORMS: dict[str, tuple[str, Callable[[_Given], Iterator[Columns]]]] = {
    "caption": ("vision_language", _captions), "vqa": ("vision_language", _vqa),
    "caption_scst": ("vision_language", _captions_of_a_picture), "refcoco": ("vision_language", _refcoco),
    "refcocoplus": ("vision_language", _refcoco), "refcocog": ("vision_language", _refcoco),
    "snli_ve": ("vision_language", _snli_ve), "cola": ("text", _cola), "mnli": ("text", _mnli), "mrpc": ("text", _mrpc),
    "qnli": ("text", _qnli), "qqp": ("vision_language", _qqp), "rte": ("text", _rte), "sst2": ("text", _sst2),
    "imagenet": ("detection", _imagenet), "gigaword": ("text", _gigaword),
}  # fmt: skip
"""Of each downstream task but text to image, whose codes no row has: the family of rows that it is made of, and what
makes it (columns as in `Task.columns`)."""


def _best(refs: str) -> str:
    answers = [item.split("|!+") for item in refs.split("&&")]
    return best_answer([(text, float(confidence)) for confidence, text in answers])


ANSWER_OF: dict[str, Callable[[Sequence[str]], str]] = {
    "vqa": lambda columns: _best(columns[3]),
    "imagenet": lambda columns: columns[2],
}
"""The answer of a line, of the tasks that have a list: the list holds each, the commonest first."""
