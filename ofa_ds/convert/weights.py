"""Tensors of foreign files by name, read piece by piece, and which names, shapes and buffers OFA's formats have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ofa_ds.model.config import MAX_TOKEN_DISTANCE, ModelConfig
from ofa_ds.model.names import ALIASES, to_port_name
from ofa_ds.model.ofa import OFA
from ofa_ds.model.positions import RelativeRow, code_image_ids, token_buckets
from ofa_ds.storage.safetensors_file import CHUNK_BYTES

_VERSION = 3.0
"""Of fairseq's layers: what `encoder.version` and `decoder.version` hold."""


@dataclass(frozen=True, eq=False)
class Weight:
    """A tensor of a file, or one to be written to a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]
    """read(start, numel) -> the flat elements; their dtype may be another one than `dtype`."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @classmethod
    def of(cls, tensor: Tensor) -> Weight:
        """One that is in memory."""
        flat = tensor.reshape(-1)
        return cls(tuple(tensor.shape), tensor.dtype, lambda start, numel: flat[start : start + numel])

    def fp32(self, start: int, numel: int) -> Tensor:
        """Elements start : start + numel, fp32."""
        return self.read(start, numel).float()

    def whole(self) -> Tensor:
        """All of it, in its shape and dtype."""
        return self.read(0, self.numel).to(self.dtype).reshape(self.shape)

    def chunks(self) -> Iterator[Tensor]:
        """All of it in its dtype, CHUNK_BYTES at a time."""
        step = max(1, CHUNK_BYTES // self.dtype.itemsize)
        for start in range(0, self.numel, step):
            yield self.read(start, min(step, self.numel - start)).to(self.dtype)

    def equals(self, other: Weight) -> bool:
        """Whether shape and every element are the same."""
        return self.shape == other.shape and all(
            torch.equal(one, two.to(one.dtype)) for one, two in zip(self.chunks(), other.chunks(), strict=True)
        )


Weights = Mapping[str, Weight]


def shapes_of(config: ModelConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """(parameters, persistent buffers) of a model by official name."""
    with torch.device("meta"):
        model = OFA(config)
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    buffers = {name: tuple(each.shape) for name, each in model.state_dict().items() if name not in parameters}
    return parameters, buffers


def recomputed(config: ModelConfig, *, port: bool) -> dict[str, Weight]:
    """The official buffers that follow from the configuration (docs/ofa.md, Model: names), by official name.

    port: as Hugging Face's and ModelScope's code has them: no versions, one step of filler less.
    """
    token = Weight.of(_token_table(config))
    image = Weight.of(_image_table(config))
    found = {"encoder.token_rp_bucket": token, "encoder.image_rp_bucket": image, "decoder.token_rp_bucket": token}
    if not config.use_ofasys:
        steps = code_image_ids(config.code_image_size, config.image_bucket_size)
        found["decoder.image_rp_bucket"] = image
        found["decoder.image_position_idx"] = Weight.of(steps[:-1] if port else steps)
    if not port:
        found |= dict.fromkeys(("encoder.version", "decoder.version"), Weight.of(torch.tensor([_VERSION])))
    return found


def entries_of(config: ModelConfig, tensors: Weights, *, port: bool, aliases: bool = True) -> dict[str, Weight]:
    """What a file of the other format holds: the tensors under its names, tied ones too, and its own buffers."""
    tensors = dict(tensors)
    if aliases:
        tensors |= {alias: tensors[name] for alias, name in ALIASES.items()}
    tensors |= recomputed(config, port=port)
    return {to_port_name(name): weight for name, weight in tensors.items()} if port else tensors


def _token_table(config: ModelConfig) -> Tensor:
    position = torch.arange(MAX_TOKEN_DISTANCE)
    return token_buckets(config.token_bucket_size)[position[:, None] - position[None, :] + MAX_TOKEN_DISTANCE - 1]


def _image_table(config: ModelConfig) -> Tensor:
    arithmetic = RelativeRow(config.token_bucket_size, config.image_bucket_size, MAX_TOKEN_DISTANCE, True)
    query, key = arithmetic.image_codes(torch.arange(config.image_bucket_size**2 + 1))
    return arithmetic.image_rows[query[:, None] - key[None, :] - arithmetic.num_text]
