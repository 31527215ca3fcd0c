"""The integer tables of relative and absolute positions, exactly as the original's."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter import stored_arrays

from ofa_ds.model.positions import RelativeRow, code_image_ids, grid_ids, num_image_rows, token_buckets

pytestmark = pytest.mark.golden("rel_pos_buckets.npz")


@pytest.fixture(scope="module")
def tables(golden_dir: Path) -> dict[str, np.ndarray]:
    return stored_arrays(golden_dir / "rel_pos_buckets.npz")


def of_kind(tables: dict[str, np.ndarray], kind: str) -> list[tuple[list[int], np.ndarray]]:
    """(the numbers in the name, the table) of each table of a kind."""
    return [
        ([int(n) for n in re.findall(r"\d+", name)], table) for name, table in tables.items() if name.startswith(kind)
    ]


def test_token_buckets_are_the_original(tables: dict[str, np.ndarray]) -> None:
    for (bucket_size, max_positions), expected in of_kind(tables, "token/"):
        position = torch.arange(max_positions)
        distance = position[:, None] - position[None, :]
        ours = token_buckets(bucket_size, max_positions)[distance + max_positions - 1]
        np.testing.assert_array_equal(ours.numpy(), expected)


@pytest.mark.parametrize("with_start", [False, True])
def test_image_buckets_are_the_original(tables: dict[str, np.ndarray], with_start: bool) -> None:
    """Through the codes that attention uses; without the start token's id 0 where the encoder has none."""
    for (bucket_size,), expected in of_kind(tables, "image/"):
        arithmetic = RelativeRow(8, bucket_size, 1024, with_start)
        first = 0 if with_start else 1
        query, key = arithmetic.image_codes(torch.arange(first, bucket_size**2 + 1))
        entry = query[:, None] - key[None, :]
        ours = arithmetic.image_rows[entry - arithmetic.num_text]
        np.testing.assert_array_equal(ours.numpy(), expected[first:, first:])
        assert int(arithmetic.image_rows.max()) < num_image_rows(bucket_size)


def test_decoder_steps_of_image_codes_are_the_original(tables: dict[str, np.ndarray]) -> None:
    for (code_image_size, bucket_size), expected in of_kind(tables, "decoder_image_position_idx/"):
        np.testing.assert_array_equal(code_image_ids(code_image_size, bucket_size).numpy(), expected)


def test_encoder_ids_of_a_grid_are_the_original(tables: dict[str, np.ndarray]) -> None:
    for (height, width, bucket_size), expected in of_kind(tables, "encoder_image_position_ids/"):
        ours = grid_ids(height, width, bucket_size)
        np.testing.assert_array_equal(ours.numpy(), expected)


@pytest.mark.parametrize("bucket_size, max_positions", [(42, 1024), (16, 512), (6, 64), (3, 1024)])
def test_text_and_image_positions_have_no_relative_bias(bucket_size: int, max_positions: int) -> None:
    arithmetic = RelativeRow(256, bucket_size, max_positions, with_start=False)
    text_query, text_key = arithmetic.text_codes(torch.arange(max_positions))
    image_query, image_key = arithmetic.image_codes(torch.arange(1, bucket_size**2 + 1))
    assert int((image_query[:, None] - text_key).max()) < 0
    assert int((text_query[:, None] - image_key).min()) >= arithmetic.num_entries
    assert int((text_query[:, None] - text_key).min()) == 0
    assert int((text_query[:, None] - text_key).max()) == arithmetic.num_text - 1
