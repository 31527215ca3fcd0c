"""Which rows of the position and relative tables a token uses.

A text position is its index; an image position is r * n + c + 1 in a grid of at most n x n patches, n being
`image_bucket_size`, and 0 is the start token of a sequence of image codes (docs/ofa.md, Model: positions). Relative
biases (docs/ofa.md, Model: relative buckets) are a look-up in

    row = [ text: one entry per distance | images: one entry per (dr, dc) | start token's entries ]

at query code - key code, with codes chosen so that a text and an image position always land outside the row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ofa_ds.model.config import MAX_TOKEN_DISTANCE


def token_buckets(bucket_size: int, max_distance: int = MAX_TOKEN_DISTANCE) -> Tensor:
    """[2 * max_distance - 1] int64: row of the token table for the distances 1 - max_distance ... max_distance - 1."""
    middle = bucket_size // 2
    # numpy: under ZeRO-3's zero.Init torch makes floating-point tensors in the training dtype
    distance = np.arange(1 - max_distance, max_distance)
    far = np.log(np.maximum(np.abs(distance), middle) / middle) / np.log((max_distance - 1) / middle) * (middle - 1)
    bucket = np.where(np.abs(distance) <= middle, distance, np.sign(distance) * (np.ceil(far) + middle))
    return torch.from_numpy(bucket.astype(np.int64) + bucket_size - 1)


def num_token_rows(bucket_size: int) -> int:
    return 2 * bucket_size - 1


def num_image_rows(bucket_size: int) -> int:
    """One per (dr, dc), and three for the start token."""
    return (2 * bucket_size - 1) ** 2 + 3


def image_id_to_cell(image_id: Tensor, bucket_size: int) -> tuple[Tensor, Tensor]:
    """Row and column of image positions (1 based ids; the start token has none)."""
    cell = image_id - 1
    return torch.div(cell, bucket_size, rounding_mode="floor"), cell.remainder(bucket_size)


def grid_ids(height: int, width: int, bucket_size: int, device: torch.device | None = None) -> Tensor:
    """Position ids [height * width] of a whole grid of patches, row by row."""
    r, c = torch.arange(height, device=device), torch.arange(width, device=device)
    return (r[:, None] * bucket_size + c + 1).flatten()


def code_image_ids(code_image_size: int, bucket_size: int) -> Tensor:
    """Image position id of each decoder step of a sequence of image codes: 0, then the codes row by row.

    Then come 769 steps of the id 1024, which the original has as filler and no step of a real sequence reaches.
    """
    side = code_image_size // 8
    cell = torch.arange(side * side)
    ids = torch.div(cell, side, rounding_mode="floor") * bucket_size + cell % side + 1
    return torch.cat([torch.zeros(1, dtype=torch.int64), ids, torch.full((769,), 1024)])


class RelativeRow:
    """The arithmetic of a relative row: which table rows it is made of, and the codes that address it.

    T text entries, n = bucket size. With m = (2n - 1) r + c, the difference of two cells is (dr, dc) in one number.
    """

    def __init__(
        self, token_bucket_size: int, image_bucket_size: int | None, max_positions: int, with_start: bool
    ) -> None:
        self.max_text = min(max_positions, MAX_TOKEN_DISTANCE)
        self.bucket_size = image_bucket_size
        self.with_start = with_start
        buckets = token_buckets(token_bucket_size)
        margin = MAX_TOKEN_DISTANCE - self.max_text
        self.token_rows = buckets[margin : len(buckets) - margin]
        """Row of the token table behind each text entry."""
        self.num_text = len(self.token_rows)
        self.image_rows = torch.zeros(0, dtype=torch.int64)
        """Row of the image table behind each further entry."""
        if image_bucket_size is not None:
            self.max_code = 2 * image_bucket_size * (image_bucket_size - 1)
            self.image_rows = torch.arange((2 * image_bucket_size - 1) ** 2)
            if with_start:
                self._add_start(len(self.image_rows))

    def _add_start(self, num_cells: int) -> None:
        """The start token as query, as key, as both: three constants, each spread over all differences it can have."""
        span = self.max_code + 1
        self.from_start = self.num_text + num_cells
        self.to_start = self.from_start + span
        both = self.from_start + self.to_start - self.num_text
        blank = both - (self.to_start + span)
        constant = [torch.full((size,), num_cells + i) for i, size in enumerate((span, span + blank, 1))]
        self.image_rows = torch.cat([self.image_rows, *constant])

    @property
    def num_entries(self) -> int:
        return self.num_text + len(self.image_rows)

    def text_codes(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """(query codes, key codes) of text positions."""
        position = position.clamp(max=self.max_text - 1)
        return position + self.max_text - 1, position

    def image_codes(self, image_id: Tensor) -> tuple[Tensor, Tensor]:
        """(query codes, key codes) of image positions.

        Query codes are so low that an image query and a text key differ by less than 0, and key codes so much lower
        that a text query and an image key differ by at least the length of the row.
        """
        r, c = image_id_to_cell(image_id, self.bucket_size)
        m = r * (2 * self.bucket_size - 1) + c
        query_shift, key_shift = self._shifts()
        query, key = m + query_shift, m + key_shift
        if self.with_start:
            start = image_id == 0
            query = torch.where(start, self.from_start + self.max_code + key_shift, query)
            key = torch.where(start, query_shift - self.to_start, key)
        return query, key

    def _shifts(self) -> tuple[int, int]:
        query_shift = self.max_text - 1 - self.num_entries
        return query_shift, query_shift - self.num_text - self.max_code
