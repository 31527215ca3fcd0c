"""A packed batch: every slot once, every patch from its own picture, shared pictures once, stand-ins of weight 0."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ofa_ds.batch import Batch, pack
from ofa_ds.data.example import Example
from ofa_ds.terms import GROUP_OF, GROUPS, TASKS

PATCH, BUCKET = 4, 10
SIZES = [(16, 24), (8, 8)]


def example(rng: np.random.Generator, task: str, image: np.ndarray | None, **fields) -> Example:
    source, target = rng.integers(4, 99, rng.integers(0, 9)), rng.integers(4, 99, rng.integers(0, 9))
    return Example(
        task=task,
        source=np.array([0, *source, 2]),
        target=np.array([*target, 2]),
        prev=np.array([0, *target]),
        image=image,
        **fields,
    )


@st.composite
def example_lists(draw: st.DrawFn) -> list[Example]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    found = []
    for task in draw(st.lists(st.sampled_from(TASKS), max_size=9)):
        if task == "text_infilling":
            found.append(example(rng, task, None, conf=2.0))
        elif task in ("detection", "image_infilling"):
            code = task == "image_infilling"
            pixels = rng.integers(0, 256, (*SIZES[1], 3)).astype(np.uint8)
            found.append(example(rng, task, pixels, code=code, hole=(2, 2, 6, 6) if code else None, conf=2.0))
        else:
            pixels = rng.integers(0, 256, (*SIZES[0], 3)).astype(np.uint8)
            for _ in range(2):
                patches = np.sort(rng.choice(24, rng.integers(1, 25), replace=False)) if rng.random() < 0.7 else None
                found.append(example(rng, task, pixels, patches=patches, conf=0.5))
    return found


def patches_of(image: torch.Tensor) -> torch.Tensor:
    """[3, h, w] -> [patches, 3, PATCH, PATCH], row-major."""
    return image.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4).reshape(-1, 3, PATCH, PATCH)


def numbered_through(batch: Batch) -> torch.Tensor:
    return torch.cat([patches_of(image) for group in batch.images for image in group])


@given(example_lists())
@settings(max_examples=150, deadline=None)
def test_every_slot_of_the_encoder_axis_is_filled_once_patches_before_text(found):
    batch = pack(found, SIZES, PATCH, BUCKET)
    slots = torch.cat([batch.patch_slot, batch.source_slot])
    assert sorted(slots.tolist()) == list(range(int(batch.encoder_offsets[-1])))
    assert batch.num_examples == len(found) == len(batch.encoder_offsets) - 1
    owner_of_slot = torch.repeat_interleave(torch.arange(len(found)), batch.encoder_offsets.diff().long())
    assert torch.equal(torch.bincount(owner_of_slot[batch.patch_slot], minlength=len(found)), batch.num_patches.long())
    for e, each in enumerate(found):
        start, middle, end = int(batch.encoder_offsets[e]), 0, int(batch.encoder_offsets[e + 1])
        middle = start + int(batch.num_patches[e])
        assert ((batch.patch_slot >= start) & (batch.patch_slot < middle)).sum() == batch.num_patches[e]
        mine = (batch.source_slot >= middle) & (batch.source_slot < end)
        assert batch.source_tokens[mine].tolist() == each.source.tolist()
        assert batch.source_position[mine].tolist() == list(range(len(each.source)))
        assert batch.source_slot[mine].tolist() == list(range(middle, end))


@given(example_lists())
@settings(max_examples=150, deadline=None)
def test_every_image_token_shows_its_own_patch_at_its_own_place(found):
    batch = pack(found, SIZES, PATCH, BUCKET)
    shown = numbered_through(batch)[batch.patch_index]
    start = 0
    for each, count in zip(found, batch.num_patches.tolist(), strict=True):
        if each.image is None:
            assert count == 0
            continue
        want = patches_of(torch.from_numpy(each.image).permute(2, 0, 1))
        chosen = torch.arange(len(want)) if each.patches is None else torch.from_numpy(each.patches)
        assert torch.equal(shown[start : start + count], want[chosen])
        columns = each.image.shape[1] // PATCH
        positions = [patch // columns * BUCKET + patch % columns + 1 for patch in chosen.tolist()]
        assert batch.patch_position[start : start + count].tolist() == positions
        start += count
    assert start == len(batch.patch_index)


@given(example_lists())
@settings(max_examples=100, deadline=None)
def test_the_decoder_axis_holds_each_target_with_its_weight_task_and_group(found):
    batch = pack(found, SIZES, PATCH, BUCKET)
    for e, each in enumerate(found):
        run = slice(int(batch.decoder_offsets[e]), int(batch.decoder_offsets[e + 1]))
        assert batch.targets[run].tolist() == each.target.tolist()
        assert batch.decoder_tokens[run].tolist() == each.prev.tolist()
        assert batch.decoder_position[run].tolist() == list(range(len(each.target)))
        assert (batch.loss_weight[run] == each.conf).all()
        assert TASKS[batch.task[e]] == each.task and bool(batch.code_mask[e]) == each.code
        assert GROUPS[batch.group[e]] == GROUP_OF[each.task]
    assert len(batch.targets) == len(batch.loss_weight) == int(batch.decoder_offsets[-1])


@given(example_lists())
@settings(max_examples=50, deadline=None)
def test_dtypes_are_the_written_ones_whatever_the_mixture(found):
    batch = pack(found, SIZES, PATCH, BUCKET)
    int64 = "patch_index patch_position patch_slot source_tokens source_position source_slot decoder_tokens "
    for name in (int64 + "decoder_position targets task group").split():
        assert getattr(batch, name).dtype == torch.int64, name
    for name in "encoder_offsets num_patches decoder_offsets".split():
        assert getattr(batch, name).dtype == torch.int32, name
    assert batch.loss_weight.dtype == torch.float32 and batch.code_mask.dtype == torch.bool
    assert len(batch.images) == len(batch.image_holes) == len(batch.image_weight) == 2
    for images, holes, weight in zip(batch.images, batch.image_holes, batch.image_weight, strict=True):
        assert images.dtype == torch.uint8 and holes.dtype == torch.int32 and weight.dtype == torch.float32
        assert len(images) == len(holes) == len(weight) >= 1


def test_a_shared_picture_is_packed_once():
    rng = np.random.default_rng(0)
    pixels = np.zeros((16, 24, 3), np.uint8)
    batch = pack([example(rng, "caption", pixels), example(rng, "itm", pixels)], SIZES, PATCH, BUCKET)
    assert batch.images[0].shape == (1, 3, 16, 24) and batch.image_weight[0].tolist() == [1]
    assert torch.equal(batch.patch_index[:24], batch.patch_index[24:])


def test_a_size_without_pictures_gets_one_stand_in_of_weight_zero():
    rng = np.random.default_rng(0)
    batch = pack([example(rng, "detection", np.full((8, 8, 3), 7, np.uint8))], SIZES, PATCH, BUCKET)
    assert batch.images[0].shape == (1, 3, 16, 24) and batch.image_weight[0].tolist() == [0]
    assert batch.patch_index.tolist() == [24, 25, 26, 27], "the stand-in's patches are numbered, and not referred to"
    assert (numbered_through(batch)[batch.patch_index] == 7).all()


def test_equal_sizes_are_one_group():
    rng = np.random.default_rng(0)
    pixels = np.zeros((8, 8, 3), np.uint8)
    batch = pack([example(rng, "caption", pixels)], [(8, 8), (8, 8)], PATCH, BUCKET)
    assert len(batch.images) == 1


def test_a_picture_of_another_size_is_named():
    with pytest.raises(ValueError, match=r"caption row .*: picture of 8 x 12, want one of \[\(16, 24\), \(8, 8\)\]"):
        pack([example(np.random.default_rng(0), "caption", np.zeros((8, 12, 3), np.uint8))], SIZES, PATCH, BUCKET)


def test_more_patches_than_the_position_table_has_is_an_error():
    with pytest.raises(ValueError, match="more than 5 rows or columns"):
        pack([], SIZES, PATCH, 5)


def test_a_picture_that_does_not_divide_into_patches_is_refused_with_a_size_that_does():
    with pytest.raises(ValueError, match="480 x 480 does not divide into patches of 14 x 14; use a size such as 476"):
        pack([], [(480, 480)], 14, 42)
