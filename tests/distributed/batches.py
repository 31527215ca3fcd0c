"""Random packed batches of any task mixture, in the shape that the loader makes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ofa_ds.batch import Batch
from ofa_ds.terms import PAD_ID

IMAGE_SIZES = (64, 32)
"""Pixels: of vision-language rows, of image rows."""


def random_batch(
    seed: tuple[int, ...], *, kinds: str, first: int = 0, vocab_size: int, patch_size: int = 16, bucket: int = 16
) -> Batch:
    """kinds: one letter per example; v vision-language, i image infilling (codes), d detection, t text alone.

    Example `first + n` is the same in whatever batch it stands, so that one global batch can be cut in any way.
    """
    sizes = {"v": 0, "d": 0, "i": 1, "t": None}
    images: list[list[Tensor]] = [[], []]
    columns: dict[str, list[int]] = {name: [] for name in (
        "patch_index", "patch_position", "patch_slot", "source_tokens", "source_position", "source_slot",
        "decoder_tokens", "decoder_position", "targets")}  # fmt: skip
    encoder_ends, decoder_ends, num_patches, weights = [0], [0], [], []
    grids = [size // patch_size for size in IMAGE_SIZES]
    owners = [[n for n, kind in enumerate(kinds) if sizes[kind] == group] for group in (0, 1)]
    first_patch = [0, max(len(owners[0]), 1) * grids[0] ** 2]
    for number, kind in enumerate(kinds):
        rng = np.random.default_rng((*seed, first + number))
        slot = encoder_ends[-1]
        group = sizes[kind]
        patches = 0
        if group is not None:
            grid = grids[group]
            patches = grid * grid
            at = first_patch[group] + len(images[group]) * patches
            picture = rng.integers(0, 256, (3, IMAGE_SIZES[group], IMAGE_SIZES[group]), dtype=np.uint8)
            images[group].append(torch.from_numpy(picture))
            columns["patch_index"] += range(at, at + patches)
            columns["patch_position"] += [(n // grid) * bucket + n % grid + 1 for n in range(patches)]
            columns["patch_slot"] += range(slot, slot + patches)
        length = int(rng.integers(3, 14))
        columns["source_tokens"] += rng.integers(4, vocab_size, length).tolist()
        columns["source_position"] += range(length)
        columns["source_slot"] += range(slot + patches, slot + patches + length)
        encoder_ends.append(slot + patches + length)
        num_patches.append(patches)
        target = rng.integers(4, vocab_size, 16 if kind == "i" else int(rng.integers(2, 12))).tolist()
        columns["decoder_tokens"] += [0, *target[:-1]]
        columns["decoder_position"] += range(len(target))
        columns["targets"] += [PAD_ID if rng.random() < 0.15 and n else token for n, token in enumerate(target)]
        decoder_ends.append(decoder_ends[-1] + len(target))
        weights += [1.0 if kind == "v" else 2.0] * len(target)
    index = {name: torch.tensor(values, dtype=torch.int64) for name, values in columns.items()}
    stacks = [torch.stack(group) if group else torch.zeros(1, 3, size, size, dtype=torch.uint8)
              for group, size in zip(images, IMAGE_SIZES, strict=True)]  # fmt: skip
    return Batch(
        images=tuple(stacks),
        image_holes=tuple(torch.zeros(len(stack), 4, dtype=torch.int32) for stack in stacks),
        image_weight=tuple(torch.full((len(s),), float(bool(group))) for s, group in zip(stacks, images, strict=True)),
        encoder_offsets=torch.tensor(encoder_ends, dtype=torch.int32),
        decoder_offsets=torch.tensor(decoder_ends, dtype=torch.int32),
        num_patches=torch.tensor(num_patches, dtype=torch.int32),
        loss_weight=torch.tensor(weights),
        code_mask=torch.tensor([kind == "i" for kind in kinds]),
        task=torch.tensor([{"v": 0, "d": 5, "i": 6, "t": 7}[kind] for kind in kinds]),
        group=torch.tensor([int(kind != "v") for kind in kinds]),
        **index,
    )
