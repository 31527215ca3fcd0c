"""Sizes of a VQGAN, under the names that its released `model.yaml` has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

NORM_GROUPS = 32
"""Groups of every group norm: each width is a multiple of it."""


@dataclass(frozen=True, kw_only=True)
class VqganConfig:
    """Encoder, codebook and decoder. Raises ValueError for sizes that do not go together."""

    quantizer: Literal["gumbel", "vq"] = "gumbel"
    """How a vector becomes a code: the largest of learned logits, or the nearest row of the codebook."""
    n_embed: int = 8192
    """Rows of the codebook."""
    embed_dim: int = 256
    """Width of a row."""
    z_channels: int = 256
    """Channels between encoder and `quant_conv`."""
    resolution: int = 256
    """Nominal side of the pictures in pixels: it says which levels have attention, and nothing else."""
    ch: int = 128
    """Channels of the finest level."""
    ch_mult: tuple[int, ...] = (1, 1, 2, 4)
    """Channels of each level in multiples of `ch`, from the finest; between two levels the side is halved."""
    num_res_blocks: int = 2
    """Of each level of the encoder; the decoder has one more."""
    attn_resolutions: tuple[int, ...] = (32,)
    """Nominal sides of the levels that have attention."""
    in_channels: int = 3
    out_ch: int = 3
    dropout: float = 0.0
    max_side: int = 0
    """Pixels up to which it is right, as a constructed one may be; 0 for any."""

    def __post_init__(self) -> None:
        if self.quantizer not in ("gumbel", "vq"):
            raise ValueError(f"quantizer: want gumbel or vq, got {self.quantizer!r}")
        for name in ("n_embed", "embed_dim", "z_channels", "resolution", "ch", "num_res_blocks"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name}: want a whole number of at least 1, got {value!r}")
        if not isinstance(self.max_side, int) or self.max_side < 0:
            raise ValueError(f"max_side: want a whole number of pixels, 0 for any, got {self.max_side!r}")
        if not self.ch_mult or min(self.ch_mult) < 1:
            raise ValueError(f"ch_mult: want a factor of at least 1 for each level, got {self.ch_mult}")
        if self.ch % NORM_GROUPS:
            raise ValueError(f"ch: want a multiple of {NORM_GROUPS}, the groups of each norm, got {self.ch}")
        if (self.in_channels, self.out_ch) != (3, 3):
            raise ValueError(f"in_channels, out_ch: want 3, as of RGB, got {self.in_channels} and {self.out_ch}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: want 0 <= dropout < 1, got {self.dropout}")
        if self.quantizer == "gumbel" and self.z_channels != self.embed_dim:
            raise ValueError(
                f"z_channels: want embed_dim {self.embed_dim}, which the logits of a Gumbel codebook are made of, "
                f"got {self.z_channels}"
            )

    @property
    def pixels_per_code(self) -> int:
        """Side in pixels of the square that one code stands for."""
        return 1 << (len(self.ch_mult) - 1)


def parse_config(assignments: Sequence[str]) -> VqganConfig:
    """Of `key=value`, with commas between the numbers of a list. Raises ValueError, one line."""
    known = {each.name: each.default for each in fields(VqganConfig)}
    values: dict[str, object] = {}
    for text in assignments:
        key, sign, value = text.partition("=")
        if key not in known or not sign:
            raise ValueError(f"{text}: want KEY=VALUE with a KEY of {', '.join(known)}")
        try:
            if isinstance(known[key], tuple):
                values[key] = tuple(int(part) for part in value.split(",") if part)
            else:
                values[key] = type(known[key])(value)
        except ValueError as error:
            raise ValueError(f"{text}: want a value such as {known[key]}") from error
    return VqganConfig(**values)
