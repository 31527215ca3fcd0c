"""Recorded samples of fine-tuning: their cases, and our examples of the same lines of the same tables."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ofa_ds.data.example import Example
from ofa_ds.data.tsv import decode_base64
from ofa_ds.data.vocab import Vocab, load_vocab
from ofa_ds.tasks.context import Context, Row
from ofa_ds.tasks.kind import Task
from ofa_ds.tasks.task import DOWNSTREAM, NO_NEGATIVES, candidates_of, data_config_of

VOCAB_DIR = Path(__file__).parents[3] / "shared" / "vocab"
FILES = {"en": "finetune_samples.json", "zh": "finetune_samples_zh.json"}
PATCH_SIZE = 8

_PICTURE_AND_PAIR = ("id", "image", "text", "text_pair", "label")
SELECTED = {
    "caption": ("id", "image", "captions"), "vqa": ("id", "image", "text", "answers", "objects"),
    "refcoco": ("id", "image", "text", "box"), "snli_ve": _PICTURE_AND_PAIR, "cola": ("text", "label"),
    "sst2": ("text", "label"), "imagenet": ("image", "answer"), "gigaword": ("text", "answer"),
    **dict.fromkeys(("mnli", "mrpc", "qnli", "qqp", "rte"), ("text", "text_pair", "label")),
}  # fmt: skip
"""What the original's data set of a task reads, in the order of its option `selected_cols`."""

SELECTED["caption_scst"] = SELECTED["caption"]

_TASK_OF_TABLE = {"image_classify": "imagenet"}
ANSWERS = {"vqa": "vqa", "imagenet": "image_classify"}
"""Where a task's list of answers stands in the file."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A recorded case, and the task that it is of."""

    name: str
    language: str
    task: Task
    stored: Mapping[str, Any]
    """`rows`, `split`, `selected_cols`, `cfg`, `samples`, of the English ones `collated`."""
    table: tuple[str, ...]
    answers: tuple[str, ...]

    @property
    def columns(self) -> dict[str, int]:
        places = (int(place) for place in self.stored["selected_cols"].split(","))
        return dict(zip(SELECTED[self.task.name], places, strict=True))

    @property
    def lines(self) -> list[list[str]]:
        return [self.table[row].split("\t") for row in self.stored["rows"]]

    @property
    def samples(self) -> list[dict[str, Any]]:
        return self.stored["samples"]

    def context(self, vocab: Vocab) -> Context:
        given = self.stored["cfg"]
        options = {
            "prompt": given.get("prompt_type", "none"), "objects": given.get("add_object", False),
            "premise": given.get("add_caption", False), "constrained": not given.get("unconstrained_training", False),
            "max_objects": given.get("max_object_length", 30), "max_target_tokens": given["max_tgt_length"],
            "decoder_noise": given.get("noise_ratio", 0.0), "language": self.language,
        }  # fmt: skip
        config = data_config_of(
            self.task.name, image_size=given.get("patch_image_size", 384), max_source_words=given["max_src_length"],
            max_target_words=given["max_tgt_length"], augment="none", task=options,
        )  # fmt: skip
        return Context(
            vocab=vocab, negatives=NO_NEGATIVES, config=config, patch_size=PATCH_SIZE, max_positions=1024,
            split="train" if self.stored["split"] == "train" else "heldout",
            candidates=candidates_of(self.task.name, self.answers, vocab),
        )  # fmt: skip

    def row(self, line: list[str]) -> Row:
        """As `ofa_ds.data.task_rows` reads it, but for what that refuses, such as a box outside the picture."""
        row: dict[str, Any] = {
            "id": "", "image": b"", "width": 0, "height": 0, "text": "", "text_pair": "", "answers": [], "box": None,
            "objects": [], "type": self.task.row_types[0],
        }  # fmt: skip
        for name, place in self.columns.items():
            row.update(_READ.get(name, lambda text, task, name=name: {name: text})(line[place], self.task))
        return row

    def examples(self, vocab: Vocab, seed: int = 0) -> list[Example]:
        ctx, rng = self.context(vocab), np.random.default_rng(seed)
        built = (self.task.build(self.row(line), None, rng, ctx) for line in self.lines)
        return [dataclasses.replace(example, task=self.task.name) for example in built]


def _picture(text: str, task: Task) -> dict[str, Any]:
    data = decode_base64(text.encode())
    width, height = Image.open(io.BytesIO(data)).size
    return {"image": data, "width": width, "height": height}


def _weighed(text: str, task: Task) -> dict[str, Any]:
    pairs = (answer.split("|!+") for answer in text.split("&&"))
    return {"answers": [(answer, float(confidence)) for confidence, answer in pairs]}


_READ: dict[str, Callable[[str, Task], dict[str, Any]]] = {
    "image": _picture, "answers": _weighed,
    "captions": lambda text, task: {"answers": [(caption, 1.0) for caption in text.split("&&")]},
    "answer": lambda text, task: {"answers": [(text, 1.0)]},
    "label": lambda text, task: {"answers": [(task.labels[text], 1.0)]},
    "box": lambda text, task: {"box": tuple(float(part) for part in text.split(","))},
    "objects": lambda text, task: {"objects": text.split("&&") if text.strip() else []},
}  # fmt: skip


@cache
def cases(folder: Path) -> dict[str, Case]:
    """Those of both languages in a folder of fixtures; text-to-image (`image_gen*`) is no downstream task here."""
    found = {}
    for language, file in FILES.items():
        if not (folder / file).is_file():
            continue
        stored = json.loads((folder / file).read_text(encoding="utf-8"))
        for name, case in stored["cases"].items():
            table = case["table"]
            if table.startswith("image_gen"):
                continue
            task = DOWNSTREAM[_TASK_OF_TABLE.get(table, table.split("_stage")[0])]
            if case["cfg"].get("scst"):
                task = DOWNSTREAM["caption_scst"]
            answers = tuple(stored.get("answers", {}).get(ANSWERS.get(task.name), ()))
            key = name if language == "en" else f"{name}_{language}"
            found[key] = Case(
                name=name, language=language, task=task, stored=case, table=tuple(stored["tables"][table]),
                answers=answers,
            )  # fmt: skip
    return found


@cache
def vocab(language: str) -> Vocab:
    return load_vocab(VOCAB_DIR / language)
