"""What a batch's contents alone tell: torch's own answers, found once, carried along, and never another batch's."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from hypothesis import given, settings
from test_pack import BUCKET, PATCH, SIZES, example_lists
from torch import Tensor

from ofa_ds import batch as batch_module
from ofa_ds.batch import Batch, pack, repeated
from ofa_ds.data.example import Example
from ofa_ds.places import TENSORS, Places
from ofa_ds.terms import PAD_ID
from ofa_ds.train.packed_buffer import from_buffer, to_buffer


def packed(examples: list[Example]) -> Batch:
    return pack(examples, SIZES, PATCH, BUCKET)


def owners(offsets: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff().long())


def assert_same(found: Places, wanted: Places) -> None:
    assert found.all_images_count == wanted.all_images_count
    for name in TENSORS:
        one, two = getattr(found, name), getattr(wanted, name)
        assert one.dtype == two.dtype and torch.equal(one, two), name


@given(example_lists())
@settings(max_examples=60, deadline=None)
def test_places_are_what_torch_finds_in_the_batch(examples: list[Example]) -> None:
    batch = packed(examples)
    places = batch.places
    for positions, index, values in (
        (places.image_positions, places.image_position, batch.patch_position),
        (places.text_positions, places.text_position, batch.source_position),
    ):
        distinct, inverse = values.unique(return_inverse=True)
        assert torch.equal(positions, distinct) and torch.equal(index, inverse)
    slot_N = torch.cat([batch.patch_slot, batch.source_slot])
    assert torch.equal(slot_N[places.encoder_row], torch.arange(len(slot_N)))
    position_N = torch.cat([places.image_positions, places.text_positions])[places.encoder_position]
    assert torch.equal(position_N[batch.patch_slot], batch.patch_position)
    assert torch.equal(position_N[batch.source_slot], batch.source_position)
    assert (places.encoder_position[batch.source_slot] >= len(places.image_positions)).all()
    assert torch.equal(places.encoder_example, owners(batch.encoder_offsets))
    assert torch.equal(places.decoder_example, owners(batch.decoder_offsets))
    both = torch.cat([places.decoder_texts, places.decoder_codes])
    assert torch.equal(both[places.decoder_index], batch.decoder_position)
    is_code_M = batch.code_mask[places.decoder_example]
    assert torch.equal(places.decoder_index >= len(places.decoder_texts), is_code_M)
    assert torch.equal(places.decoder_codes, batch.decoder_position[is_code_M].unique())
    assert torch.equal(places.counted, (batch.targets != PAD_ID).nonzero()[:, 0])
    assert places.all_images_count == tuple(bool((weight > 0).all()) for weight in batch.image_weight)
    assert not len(places.memory_index) and places.memory_offsets.tolist() == [0]
    assert all(getattr(places, name).dtype in (torch.int64, torch.int32) for name in TENSORS)


@given(example_lists().filter(lambda examples: sum(len(each.target) for each in examples) >= 3))
@settings(max_examples=30, deadline=None)
def test_runs_read_their_example_from_first_to_last(examples: list[Example]) -> None:
    batch = packed(examples)
    example_R = torch.tensor([0, 0, batch.num_examples - 1])
    places = dataclasses.replace(
        batch, encoder_of=example_R, decoder_tokens=batch.decoder_tokens[:3], targets=batch.targets[:3],
        decoder_position=batch.decoder_position[:3] * 0, decoder_offsets=torch.arange(4, dtype=torch.int32),
        code_mask=torch.zeros(3, dtype=torch.bool),
    ).places  # fmt: skip
    starts = batch.encoder_offsets.tolist()
    wanted = [list(range(starts[example], starts[example + 1])) for example in example_R.tolist()]
    ends = places.memory_offsets.tolist()
    assert [places.memory_index[a:b].tolist() for a, b in zip(ends, ends[1:], strict=False)] == wanted
    assert torch.equal(places.memory_patches, batch.num_patches[example_R])


@given(example_lists().filter(bool))
@settings(max_examples=30, deadline=None)
def test_a_worker_hands_over_the_places_with_the_batch(examples: list[Example]) -> None:
    batch = packed(examples)
    again = from_buffer(*to_buffer(batch))
    assert again._places is not None
    assert_same(again.places, batch.places)
    assert_same(again.places, dataclasses.replace(again).places)


def text_only() -> Batch:
    row = np.array([0, 5, 6, 2])
    return packed([Example(task="text_infilling", source=row, target=row, prev=row)])


def test_a_changed_batch_has_places_of_its_own() -> None:
    batch = text_only()
    changed = dataclasses.replace(batch, targets=torch.tensor([PAD_ID, 5, PAD_ID, 2]))
    assert changed.places.counted.tolist() == [1, 3] and batch.places.counted.tolist() == [0, 1, 2, 3]
    assert repeated(changed, 2).places.counted.tolist() == [1, 3, 5, 7]


def test_places_are_found_once_and_go_along_to_the_device(monkeypatch) -> None:
    batch = dataclasses.replace(text_only())
    calls: list[Batch] = []
    places_of = batch_module.places_of
    monkeypatch.setattr(batch_module, "places_of", lambda each: calls.append(each) or places_of(each))
    assert batch.places is batch.places and batch.to("cpu") is batch
    moved = batch.to("meta")
    assert moved.places.counted.device.type == moved.targets.device.type == "meta" and len(calls) == 1
