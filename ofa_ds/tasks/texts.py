"""Every text of shards as the tasks present it: what a vocabulary is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ofa_ds.data.shards import Shards
from ofa_ds.data.text import clean_caption, clean_question
from ofa_ds.data.vocab import Vocab, train_vocab
from ofa_ds.progress import track
from ofa_ds.tasks.pretraining import (
    ANSWER_MATCH_PROMPT,
    CAPTION_MATCH_PROMPT,
    CAPTION_PROMPT,
    DETECTION_PROMPT,
    GROUNDING_PROMPT,
    INFILL_IMAGE_PROMPT,
    INFILL_TEXT_PROMPT,
    NO,
    REGION_PROMPT,
    YES,
)


def train_from_shards(
    shards: Path | str, *, size: int, out: Path | str, num_codes: int = 8192, num_bins: int = 1000
) -> Vocab:
    """`train_vocab` on the text of shards, cleaned as the tasks clean it and with their instructions."""
    return train_vocab(shard_texts(Shards(shards)), size, out, num_codes, num_bins)


def shard_texts(shards: Shards) -> Iterator[str]:
    """Every text of the shards as the tasks present it: cleaned, with its leading space, inside its instruction."""

    for family, count in shards.families.items():
        for i in track(range(count), f"reading {family} texts", "rows"):
            yield from _row_texts(family, shards.row(family, i))


def _row_texts(family: str, row: dict) -> list[str]:
    if family == "text":
        return [INFILL_TEXT_PROMPT[0], f" {row['text'].strip().lower()}", INFILL_TEXT_PROMPT[1]]
    if family == "image":
        return [INFILL_IMAGE_PROMPT]
    if family == "detection":
        return [DETECTION_PROMPT, *(f" {name}" for name in row["cat_names"])]
    caption, question = clean_caption(row["caption"]), clean_question(row["question"])
    if row["type"] == "visual_grounding":
        return [GROUNDING_PROMPT.format(caption), REGION_PROMPT, f" {caption}"]
    if row["type"] == "qa":
        answers = [text for text, _ in row["answers"]]
        prompts = [ANSWER_MATCH_PROMPT.format(question, answer) for answer in answers]
        return [f" {question}", *prompts, *(f" {answer}" for answer in answers), YES, NO]
    match = CAPTION_MATCH_PROMPT.format(caption)
    return [CAPTION_PROMPT, f" {caption}", match, YES, NO]
