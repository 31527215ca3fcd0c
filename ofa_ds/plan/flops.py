"""Floating-point operations of a micro-batch, module by module, from shapes: a multiplication and an addition are two.

Counted are matrix products, convolutions and attention, as torch's `FlopCounterMode` does; norms, activations and
look-ups are not. Useful is what the mathematics asks for:

    product [m, k] x [k, n]   2 m n k forward, as much for the gradient of each of its two factors
    attention                 two products over the query-key pairs that its mask keeps (half of them and the diagonal
                              where it is causal), four in the backward; positional logits once a forward, over pairs of
                              distinct positions, as the model's terms are the same in every layer
    vocabulary's loss         over the tokens that have one

No pad and no stand-in is useful, and nothing that is computed twice: a layer's second forward under activation
checkpointing, logits that kernels make again in the backward, positional products that they make in every layer.
That is `recomputed`, counted apart; executed = useful + recomputed.

Everything is linear in a few sums over the batch (`Sums`), so a trainer can ask for each micro-batch: `UsefulFlops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ofa_ds.config.architecture import ModelConfig
from ofa_ds.plan.module_flops import How, Kind, ModuleFlops, Sums, modules
from ofa_ds.plan.work import ImageGroup, Work

__all__ = ["Flops", "Kind", "ModuleFlops", "Sums", "UsefulFlops", "flops", "flops_of_sums", "sums_of"]


@dataclass(frozen=True)
class Flops:
    modules: tuple[ModuleFlops, ...]

    @cached_property
    def forward(self) -> float:
        return sum(each.forward for each in self.modules)

    @cached_property
    def backward(self) -> float:
        return sum(each.backward for each in self.modules)

    @cached_property
    def recomputed(self) -> float:
        return sum(each.recomputed for each in self.modules)

    @property
    def useful(self) -> float:
        return self.forward + self.backward

    @property
    def executed(self) -> float:
        return self.useful + self.recomputed

    def of(self, kind: Kind) -> Flops:
        """Those of one kind."""
        return Flops(tuple(each for each in self.modules if each.kind == kind))

    def within(self, prefix: str) -> Flops:
        """Those of a module and of all in it."""
        return Flops(tuple(each for each in self.modules if f"{each.name}.".startswith(f"{prefix}.")))


def flops(
    config: ModelConfig, work: Work, *, on_gpu: bool = True, stage: int = 3, frozen_embedding: bool = False,
    gpu_bytes: float = 0.0,
) -> Flops:  # fmt: skip
    """Of one micro-batch, forward and backward.

    What is computed again depends on on_gpu: the Triton kernels, or plain torch; stage: of ZeRO, below 3 a layer's
    second forward may stop short of its last product; gpu_bytes: memory of the GPU, of which a share holds logits.
    frozen_embedding: the vocabulary's matrix has no gradient (`optim.freeze`).
    """
    how = How(config, on_gpu, stage, frozen_embedding, gpu_bytes)
    return Flops(tuple(modules(how, sums_of(config, work), work.images)))


def flops_of_sums(
    config: ModelConfig, sums: Sums, images: Sequence[ImageGroup], *, on_gpu: bool = True, stage: int = 3,
    frozen_embedding: bool = False, gpu_bytes: float = 0.0,
) -> Flops:  # fmt: skip
    """The same of a batch's sums."""
    return Flops(tuple(modules(How(config, on_gpu, stage, frozen_embedding, gpu_bytes), sums, images)))


def sums_of(config: ModelConfig, work: Work) -> Sums:
    """Where a work tells no distinct positions they are the longest example's."""
    examples = work.examples
    pictures, sources, targets, codes = work.distinct or (
        max((each.patches for each in examples), default=0.0),
        max((each.source for each in examples), default=0.0),
        max((each.target for each in examples if not each.code), default=0.0),
        max((each.target for each in examples if each.code), default=0.0),
    )
    if config.interpolate_position:  # every group has the rows of its whole grid
        pictures = sum((g.height // config.patch_size) * (g.width // config.patch_size) for g in work.images)
    if not work.images:
        pictures = 0.0
    own, other = pictures + sources, targets + codes
    return Sums(
        sum(each.count * each.patches for each in examples) if work.images else 0.0,
        work.encoder_tokens, work.decoder_tokens, work.encoder_tokens, work.counted_tokens, *work.pairs,
        own, other, own * own, other * other, own * other,
    )  # fmt: skip


class UsefulFlops:
    """The useful operations of any micro-batch of a model, in microseconds: coefficients are found once."""

    def __init__(self, config: ModelConfig, *, frozen_embedding: bool = False) -> None:
        def useful(sums: Sums, images: Sequence[ImageGroup] = ()) -> float:
            return flops_of_sums(config, sums, images, frozen_embedding=frozen_embedding).useful

        self._of_picture = lambda height, width: useful(Sums(), [ImageGroup(1, height, width)])
        self._pictures: dict[tuple[int, int], float] = {}
        self.coefficients = Sums(*(useful(Sums(**{name: 1.0})) for name in Sums._fields))

    def __call__(self, sums: Sequence[float], images: Sequence[tuple[float, int, int]] = ()) -> float:
        """sums: as `Sums` has them. images: (number without stand-ins, height, width) of each size."""
        total = sum(each * number for each, number in zip(self.coefficients, sums, strict=True))
        for count, height, width in images:
            size = height, width
            if size not in self._pictures:
                self._pictures[size] = self._of_picture(height, width)
            total += count * self._pictures[size]
        return total
