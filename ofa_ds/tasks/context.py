"""What every row of a task needs besides itself, and how its texts become an example that the model can read.

Legend: T source tokens, M target tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ofa_ds.config import DataConfig
from ofa_ds.data import image as pictures
from ofa_ds.data.augment import random_augment
from ofa_ds.data.example import Example
from ofa_ds.data.image import Framed
from ofa_ds.tasks.candidates import Candidates
from ofa_ds.terms import FAMILIES

if TYPE_CHECKING:
    from ofa_ds.data.shards import Negatives
    from ofa_ds.data.vocab import Vocab

Row = Mapping[str, Any]
"""As `Shards.row` gives it."""

PIXELS_PER_CODE = 8

PaintCodes = Callable[[Sequence[Sequence[int]]], list[np.ndarray]]
"""Ids of image codes, as many as a square has, of each picture -> what they stand for, uint8 [H, W, 3] each."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What every row needs besides itself. Raises ValueError where sizes of pictures say against each other."""

    vocab: Vocab
    negatives: Negatives
    config: DataConfig
    patch_size: int
    """The model's (`ModelConfig.patch_size`): pixels per patch side."""
    max_positions: int
    """The model's (`ModelConfig.max_positions`): no source and no target of text is longer, bos and eos included."""
    split: Literal["train", "heldout"] = "train"
    """`heldout`: no augmentation, no patch sampling, and the tasks are asked as `Task.held_out` says."""
    candidates: Candidates | None = None
    """The answers that the task may give, where they are a list."""
    readable: bool = True
    """Write out the texts of text infilling too, which takes longer than the rest of it; training does without."""
    paint: PaintCodes | None = None
    """Where a VQGAN is at hand for what people look at."""

    def __post_init__(self) -> None:
        self.config.check_sizes()

    @property
    def train(self) -> bool:
        return self.split == "train"

    @property
    def num_codes(self) -> int:
        """Image codes of the central square."""
        return (self.config.code_image_size // PIXELS_PER_CODE) ** 2

    @cached_property
    def answer_types(self) -> dict[str, str]:
        """Type of each answer, `other` left out; later types win."""
        types = ((kind, answers) for kind, answers in self.negatives.type2ans.items() if kind != "other")
        return {answer: kind for kind, answers in types for answer in answers}


def row_generator(seed: int, family: str, epoch: int, row: int) -> np.random.Generator:
    """The generator of one row in one epoch; nothing else draws from it."""
    return np.random.default_rng((seed, FAMILIES.index(family), epoch, row))


def substitute_generator(seed: int, family: str, epoch: int, row: int) -> np.random.Generator:
    """For what stands in for a damaged row in one epoch; it draws which row that is, too."""
    return np.random.default_rng((seed, FAMILIES.index(family), epoch, row, _SUBSTITUTE))


_SUBSTITUTE = 1
"""Makes another generator of the same numbers."""


def frame(
    row: Row, ctx: Context, source_text: str, target_text: str,
    *, source: Sequence[int] | None = None, target: Sequence[int] | None = None, code: bool = False, **fields: Any,
) -> Example:  # fmt: skip
    """Source and target between bos and eos, as long as the model's positions at most; the task is not yet named.

    source, target: ids; those of the texts where not given. code: the target is a run of image codes, which have a
    position table of their own.
    """
    vocab, source_room, target_room = ctx.vocab, max(ctx.max_positions - 2, 0), max(ctx.max_positions - 1, 0)
    source = vocab.encode(source_text, source_room + 1) if source is None else source
    target = vocab.encode(target_text, target_room + 1) if target is None else target
    cut = fields.pop("cut", False) or len(source) > source_room
    source = source[:source_room]
    if not code:
        cut = cut or len(target) > target_room
        target = target[:target_room]
    return Example(
        task="", source_text=source_text, target_text=target_text, row_id=row["id"], dataset=row.get("dataset", ""),
        row_type=row.get("type", ""), source=np.array([vocab.bos, *source, vocab.eos]),
        target=np.array([*target, vocab.eos]), prev=np.array([vocab.bos, *target]), code=code, cut=cut, **fields,
    )  # fmt: skip


def question(ctx: Context, text: str, source: Sequence[int] | None = None, **fields: Any) -> Example:
    """What a user asks, as `frame` of a row that has no answer yet."""
    return frame({"id": ""}, ctx, text, "", source=source, target=(), **fields)


def view(row: Row, rng: np.random.Generator, ctx: Context) -> Framed:
    """The picture of a vision-language row as the network sees it; drawn once for all tasks of the row."""
    boxes_N4 = np.array([] if row["box"] is None else [row["box"]], np.float32).reshape(-1, 4)
    framed = Framed(pictures.load(row["image"], ctx.config.decode), boxes_N4)
    side = ctx.config.image_size
    if not ctx.train or ctx.config.augment == "none":
        return pictures.resize_framed(framed, side, side)
    framed = pictures.random_resize(framed, side, rng)
    if row["type"] == "visual_grounding":
        return pictures.box_crop(framed, side)
    return Framed(random_augment(pictures.center_crop(framed.image, side), rng), framed.boxes)


def sample_patches(rng: np.random.Generator, ctx: Context) -> np.ndarray | None:
    """Patches of a picture that the encoder reads; sorted, which the model cannot see and memory can."""
    num_patches, wanted = (ctx.config.image_size // ctx.patch_size) ** 2, ctx.config.sample_patches
    if not ctx.train or not 0 < wanted < num_patches:
        return None
    return np.sort(rng.choice(num_patches, wanted, replace=False, shuffle=False))
