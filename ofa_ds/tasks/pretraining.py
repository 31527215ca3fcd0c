"""From a source row to the examples of the eight pretraining tasks (docs/ofa.md, Tasks).

A pure function of (row, generator, context): augmentation, negatives, masking and patch sampling all draw from one
generator seeded per row. The original's faults that docs/ofa.md, Tasks names are mended, each in a test.
Legend: T source tokens, M target tokens, N boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ofa_ds.config import DataConfig
from ofa_ds.data import image as pictures
from ofa_ds.data.augment import random_augment
from ofa_ds.data.example import Example
from ofa_ds.data.image import Framed
from ofa_ds.data.text import clean_caption, clean_question
from ofa_ds.tasks.negatives import negative_answer, negative_caption
from ofa_ds.tasks.noising import mask_spans
from ofa_ds.terms import FAMILIES, PAD_ID

if TYPE_CHECKING:
    from ofa_ds.data.shards import Negatives
    from ofa_ds.data.vocab import Vocab

MAX_TOKENS = 1024
"""Rows of the position tables: neither a source nor a target may be longer."""

MAX_DETECTION_TOKENS = 1023
PIXELS_PER_CODE = 8
UNPENALISED_CC12M_TOKENS = 2

CAPTION_PROMPT = " what does the image describe?"
CAPTION_MATCH_PROMPT = ' does the image describe " {} "?'
ANSWER_MATCH_PROMPT = ' what is the answer to question " {} ". is " {} "?'
GROUNDING_PROMPT = ' which region does the text " {} " describe?'
REGION_PROMPT = "  what does the region describe? region:"  # two leading spaces, as released models were trained
DETECTION_PROMPT = " what are the objects in the image?"
INFILL_IMAGE_PROMPT = " what is the image in the middle part?"
INFILL_TEXT_PROMPT = ' what is the complete text of "', ' "?'
YES, NO = " yes", " no"

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Context:
    """What every row needs besides itself. Raises ValueError where coordinates would have no bin."""

    vocab: Vocab
    negatives: Negatives
    config: DataConfig
    patch_size: int = 16
    split: Literal["train", "heldout"] = "train"
    """`heldout`: no augmentation, no patch sampling, no image-text matching (see `matching_pair`)."""
    readable: bool = True
    """Write out the texts of text infilling too, which takes longer than the rest of it; training does without."""

    def __post_init__(self) -> None:
        config = self.config
        side = max(config.image_size, config.infill_image_size)
        if side > config.max_image_size:
            raise ValueError(
                f"data.max_image_size {config.max_image_size} is less than the pictures' side {side}; coordinates up "
                f"to {side} would have no bin; raise max_image_size to {side}"
            )
        if config.code_image_size > config.infill_image_size:
            raise ValueError(
                f"data.code_image_size {config.code_image_size} is more than data.infill_image_size "
                f"{config.infill_image_size}, whose centre it is"
            )

    @property
    def train(self) -> bool:
        return self.split == "train"

    @cached_property
    def answer_types(self) -> dict[str, str]:
        """Type of each answer, `other` left out; later types win."""
        types = ((kind, answers) for kind, answers in self.negatives.type2ans.items() if kind != "other")
        return {answer: kind for kind, answers in types for answer in answers}


def row_generator(seed: int, family: str, epoch: int, row: int) -> np.random.Generator:
    """The generator of one row in one epoch; nothing else draws from it."""
    return np.random.default_rng((seed, FAMILIES.index(family), epoch, row))


def examples(family: str, row: Row, rng: np.random.Generator, ctx: Context) -> list[Example]:
    """The examples of one row: two of a vision-language row in training, else one (two for visual grounding).

    Raises ValueError: undecodable image, or one whose size or codes do not fit the configuration.
    """
    if family == "vision_language":
        return VISION_LANGUAGE[row["type"]](row, rng, ctx)
    return [{"text": text_infilling, "image": image_infilling, "detection": detection}[family](row, rng, ctx)]


def matching_pair(row: Row, rng: np.random.Generator, ctx: Context) -> tuple[Example, Example]:
    """The image-text matching examples of a caption or qa row, the true one first; for evaluation."""
    main = VISION_LANGUAGE[row["type"]](row, rng, ctx)[0]
    return _matching(main, row, rng, ctx, match=True), _matching(main, row, rng, ctx, match=False)


def caption(row: Row, rng: np.random.Generator, ctx: Context) -> list[Example]:
    """Captioning, and in training image-text matching with this or another caption."""
    text = " " + clean_caption(row["caption"], ctx.config.max_target_words)
    main = _build(
        "caption", row, ctx, CAPTION_PROMPT, text, image=_view(row, rng, ctx).image, patches=_sample(rng, ctx)
    )
    if row["dataset"] == "cc12m":  # its captions begin with boilerplate; the original takes no loss on two tokens
        main.target[:UNPENALISED_CC12M_TOKENS] = PAD_ID
        main.target[-1] = ctx.vocab.eos
    return [main, _matching(main, row, rng, ctx, match=rng.random() >= 0.5)] if ctx.train else [main]


def vqa(row: Row, rng: np.random.Generator, ctx: Context) -> list[Example]:
    """Question answering, and in training image-text matching with this or another answer."""
    question = " " + clean_question(row["question"], ctx.config.max_source_words)
    answer, conf = best_answer(row)
    view = _view(row, rng, ctx)
    main = _build("vqa", row, ctx, question, " " + answer, image=view.image, patches=_sample(rng, ctx), conf=conf)
    return [main, _matching(main, row, rng, ctx, match=rng.random() >= 0.5)] if ctx.train else [main]


def best_answer(row: Row) -> tuple[str, float]:
    """The answer of highest confidence, the first of equals."""
    return max(row["answers"], key=lambda answer: answer[1])


def visual_grounding(row: Row, rng: np.random.Generator, ctx: Context) -> list[Example]:
    """The box of a phrase, and the phrase of a box."""
    view, config = _view(row, rng, ctx), ctx.config
    coordinates = bin_ids(view.boxes, ctx)[0]
    readable = _readable_bins(coordinates, ctx)
    grounding = _build(
        "visual_grounding", row, ctx,
        GROUNDING_PROMPT.format(clean_caption(row["caption"], config.max_source_words)), readable, target=coordinates,
        image=view.image, boxes=view.boxes, patches=_sample(rng, ctx),
    )  # fmt: skip
    phrase = clean_caption(row["caption"], config.max_target_words)
    described = _build(
        "grounded_caption", row, ctx, f"{REGION_PROMPT} {readable}", " " + phrase,
        source=ctx.vocab.encode(REGION_PROMPT) + coordinates,
        image=view.image, boxes=view.boxes, patches=_sample(rng, ctx),
    )  # fmt: skip
    return [grounding, described]


VISION_LANGUAGE: dict[str, Callable[[Row, np.random.Generator, Context], list[Example]]] = {
    "caption": caption, "qa": vqa, "visual_grounding": visual_grounding,
}  # fmt: skip
"""Builder per row type."""


def text_infilling(row: Row, rng: np.random.Generator, ctx: Context) -> Example:
    """The text from what is left of it after masking."""
    vocab, limit = ctx.vocab, ctx.config.max_text_tokens
    text = " " + row["text"].strip().lower()
    ids = vocab.encode(text)[: 2 * limit][-limit:]
    tokens = np.array([vocab.bos, *ids, vocab.eos])
    noised = mask_spans(tokens, vocab.word_starts[tokens], vocab.mask, rng)[1:-1].tolist()
    before, after = INFILL_TEXT_PROMPT
    texts = (f"{before}{vocab.decode(noised)}{after}", vocab.decode(ids)) if ctx.readable else ("", "")
    return _build(
        "text_infilling", row, ctx, *texts,
        source=vocab.encode(before) + noised + vocab.encode(after), target=ids, conf=ctx.config.extra_confidence,
    )  # fmt: skip


def image_infilling(row: Row, rng: np.random.Generator, ctx: Context) -> Example:
    """The codes of the central square, which the picture no longer shows."""
    side, hole_side = ctx.config.infill_image_size, ctx.config.code_image_size
    picture = pictures.decode(row["image"])
    if picture.shape[:2] != (side, side):
        raise ValueError(
            f"image row {row['id']}: the picture is {picture.shape[1]} x {picture.shape[0]}, want {side} x {side} "
            "(data.infill_image_size): codes describe its centre, so it is never resized"
        )
    want_codes = (hole_side // PIXELS_PER_CODE) ** 2
    if len(row["codes"]) != want_codes:
        raise ValueError(
            f"image row {row['id']}: {len(row['codes'])} codes, want {want_codes} (data.code_image_size {hole_side}, "
            f"one per {PIXELS_PER_CODE} x {PIXELS_PER_CODE} pixels)"
        )
    start = (side - hole_side) // 2
    codes = [ctx.vocab.code(int(code)) for code in row["codes"]]
    return _build(
        "image_infilling", row, ctx, INFILL_IMAGE_PROMPT, " ".join(f"<code_{code}>" for code in row["codes"]),
        target=codes, image=picture, hole=(start, start, start + hole_side, start + hole_side), code=True,
        conf=ctx.config.extra_confidence,
    )  # fmt: skip


def detection(row: Row, rng: np.random.Generator, ctx: Context) -> Example:
    """Boxes and names of all objects in file order, as many as fit."""
    framed = Framed(pictures.decode(row["image"]), np.asarray(row["boxes"], np.float32).reshape(-1, 4))
    side = ctx.config.infill_image_size
    if ctx.train and rng.random() < 0.5:
        framed = pictures.flip(framed)
    if ctx.train and ctx.config.augment == "ofa":
        framed = pictures.large_scale_jitter(framed, side, rng)
    else:
        framed = pictures.resize_framed(framed, side, side)
    visible_N = pictures.has_area(framed.boxes)
    boxes_N4 = framed.boxes[visible_N]
    names = [name for name, visible in zip(row["cat_names"], visible_N, strict=True) if visible]
    target: list[int] = []
    readable: list[str] = []
    for name, coordinates in zip(names, bin_ids(boxes_N4, ctx), strict=True):
        ids = coordinates + ctx.vocab.encode(f" {name}")
        if len(target) + len(ids) + 1 > MAX_DETECTION_TOKENS:  # the original overran the position table here
            break
        target += ids
        readable.append(f"{_readable_bins(coordinates, ctx)} {name}")
    kept = len(readable)
    return _build(
        "detection", row, ctx, DETECTION_PROMPT, " ".join(readable), target=target, image=framed.image,
        boxes=boxes_N4[:kept], labels=tuple(names[:kept]), conf=ctx.config.extra_confidence,
    )  # fmt: skip


def bin_ids(boxes_N4: np.ndarray, ctx: Context) -> list[list[int]]:
    """Vocabulary ids of each box: round-half-even in float32, over max_image_size (not the picture's size)."""
    scaled_N4 = boxes_N4.astype(np.float32) / np.float32(ctx.config.max_image_size) * np.float32(ctx.vocab.num_bins - 1)
    return [[ctx.vocab.bin(int(k)) for k in box] for box in np.rint(scaled_N4)]


def _readable_bins(ids: Iterable[int], ctx: Context) -> str:
    return " ".join(f"<bin_{token - ctx.vocab.bin_start}>" for token in ids)


def _matching(main: Example, row: Row, rng: np.random.Generator, ctx: Context, *, match: bool) -> Example:
    """Does this caption, or this answer, go with the picture? Picture and weight are the main example's."""
    limit = ctx.config.max_source_words
    if row["type"] == "caption":
        text = clean_caption(row["caption"], limit)
        if not match:
            text = negative_caption(row["caption"], row["gt_objects"], ctx.negatives, rng, limit)
        source = CAPTION_MATCH_PROMPT.format(text)
    else:
        answer, conf = best_answer(row)
        if not match:
            answer = negative_answer(answer, conf, ctx.negatives, ctx.answer_types, rng)
        source = ANSWER_MATCH_PROMPT.format(clean_question(row["question"], limit), answer)
    return _build(
        "itm", row, ctx, source, YES if match else NO, image=main.image, patches=_sample(rng, ctx), conf=main.conf
    )


def _view(row: Row, rng: np.random.Generator, ctx: Context) -> Framed:
    """The picture of a vision-language row as the network sees it."""
    box = row["box"]
    framed = Framed(pictures.decode(row["image"]), np.array([] if box is None else [box], np.float32).reshape(-1, 4))
    side = ctx.config.image_size
    if not ctx.train or ctx.config.augment == "none":
        return pictures.resize_framed(framed, side, side)
    framed = pictures.random_resize(framed, side, rng)
    if row["type"] == "visual_grounding":
        return pictures.box_crop(framed, side)
    return Framed(random_augment(pictures.center_crop(framed.image, side), rng), framed.boxes)


def _sample(rng: np.random.Generator, ctx: Context) -> np.ndarray | None:
    """Patches of a picture that the encoder reads; sorted, which the model cannot see and memory can."""
    num_patches, wanted = (ctx.config.image_size // ctx.patch_size) ** 2, ctx.config.sample_patches
    if not ctx.train or not 0 < wanted < num_patches:
        return None
    return np.sort(rng.choice(num_patches, wanted, replace=False, shuffle=False))


def _build(
    task: str, row: Row, ctx: Context, source_text: str, target_text: str,
    *, source: list[int] | None = None, target: list[int] | None = None, **fields: Any,
) -> Example:  # fmt: skip
    """Source and target framed by bos and eos; ids are those of the texts where none are given."""
    vocab = ctx.vocab
    source = (vocab.encode(source_text) if source is None else source)[: MAX_TOKENS - 2]
    target = (vocab.encode(target_text) if target is None else target)[: MAX_TOKENS - 1]
    return Example(
        task=task, source_text=source_text, target_text=target_text, row_id=row["id"], dataset=row.get("dataset", ""),
        source=np.array([vocab.bos, *source, vocab.eos]), target=np.array([*target, vocab.eos]),
        prev=np.array([vocab.bos, *target]), **fields,
    )  # fmt: skip
