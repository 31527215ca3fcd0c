"""How much one micro-batch holds: what its cost and its memory follow from. Counts alone, of a batch or of a recipe.

Legend: P image tokens, T source text tokens, N = P + T encoder tokens, M decoder tokens, E examples.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class ExampleShape(NamedTuple):
    """Tokens of one example. A run of image codes has `code`."""

    task: str
    """One of terms.TASKS; empty where it does not matter."""
    patches: float
    source: float
    target: float
    code: bool = False
    has_loss: float = -1.0
    """Of the target's tokens, how many have a loss; all where negative."""
    count: float = 1.0
    """How many such examples there are: in a mean not always a whole number."""

    @property
    def encoder(self) -> float:
        return self.patches + self.source

    @property
    def counted(self) -> float:
        return self.target if self.has_loss < 0 else self.has_loss


class ImageGroup(NamedTuple):
    """Pictures of one size that go through the backbone together."""

    count: float
    height: int
    width: int
    stand_ins: float = 0.0
    """How many of them are stand-ins for a size that the batch lacks: computed, and of no use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One micro-batch of one rank. Numbers may be means: a plan is of many batches."""

    images: tuple[ImageGroup, ...]
    """As `Batch.images`, with stand-ins."""
    examples: tuple[ExampleShape, ...]
    distinct: tuple[float, float, float, float] | None = None
    """Distinct positions of pictures, source texts, target texts, image codes (`ofa_ds.places`); None: the longest
    example's, which is what a batch of whole runs has."""

    @property
    def num_examples(self) -> float:
        return sum(each.count for each in self.examples)

    @property
    def encoder_tokens(self) -> float:
        return sum(each.count * each.encoder for each in self.examples)

    @property
    def decoder_tokens(self) -> float:
        return sum(each.count * each.target for each in self.examples)

    @property
    def tokens(self) -> float:
        return self.encoder_tokens + self.decoder_tokens

    @property
    def counted_tokens(self) -> float:
        """Decoder tokens that have a loss: the vocabulary's product is for them alone."""
        return sum(each.count * each.counted for each in self.examples)

    @property
    def pairs(self) -> tuple[float, float, float]:
        """Query-key pairs of one head in the encoder, in the decoder (those that a causal mask keeps), across."""
        return (
            sum(each.count * each.encoder**2 for each in self.examples),
            sum(each.count * each.target * (each.target + 1) / 2 for each in self.examples),
            sum(each.count * each.target * each.encoder for each in self.examples),
        )


def work_of(
    images: Iterable[tuple[int, ...]],
    encoder_offsets: list[int],
    num_patches: list[int],
    decoder_offsets: list[int],
    code_mask: list[bool],
    counted: int,
) -> Work:
    """Of a packed batch: shapes of its pictures [I, 3, h, w], its offsets, and how many targets have a loss.

    The loss is spread evenly over the examples: it only counts in sum.
    """
    total = max(decoder_offsets[-1], 1)
    examples = []
    for i, patches in enumerate(num_patches):
        target = decoder_offsets[i + 1] - decoder_offsets[i]
        source = encoder_offsets[i + 1] - encoder_offsets[i] - patches
        examples.append(ExampleShape("", patches, source, target, code_mask[i], target * counted / total))
    groups = tuple(ImageGroup(shape[0], shape[2], shape[3]) for shape in images)
    return Work(images=groups, examples=tuple(examples))
