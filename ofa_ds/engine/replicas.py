"""What every rank, or one rank twice, should have bit for bit: for finding silent corruption.

Across ranks: what is replicated. Stage 3: the parameters that stay gathered; stages 1 and 2: all in the precision of
the forward; stage 0: masters and moments too. Within a rank: the weights of the forward are its fp32 masters, rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ofa_ds.engine.state import local_state

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers of as many bytes."""


def replicated(wrapped: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all that is the same on every rank, without buffers; the same names in the same order on each.

    Between optimizer steps only.
    """
    local = local_state(wrapped)
    for name, parameter in wrapped.module.named_parameters():
        if hasattr(parameter, "ds_id"):
            if parameter.ds_persist and parameter.data.numel() == parameter.ds_numel:
                yield name, parameter.data
        elif hasattr(parameter, "_hp_mapping") or not parameter.requires_grad:
            yield name, parameter.data
        else:
            yield from ((f"{kind} of {name}", tensor) for kind, tensor in local.replicated(parameter).items())


def bits(tensor: Tensor) -> Tensor:
    """The sum of a tensor's words as whole numbers, int64 scalar: a bit that turns over changes it."""
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(_WORDS[flat.element_size()]).sum(dtype=torch.int64)


@torch.no_grad()
def sums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """`bits` of each, brought to the host at once."""
    found = [bits(tensor) for tensor in tensors.values()]
    values = torch.stack([each.to(found[0].device) for each in found]).tolist() if found else []
    return dict(zip(tensors, values, strict=True))


@torch.no_grad()
def unlike_master(wrapped: Any) -> list[str]:
    """Parameters whose share on this rank is not its fp32 master, rounded to the precision of the forward."""
    local = local_state(wrapped)
    names, apart = [], []
    for name, parameter in wrapped.module.named_parameters():
        weights = _weights(parameter, *local.owned(parameter)[1:3])
        views = None if weights is None else local.views(parameter, weights.numel())
        if weights is None or views is None or views["weight"].device != weights.device:
            continue
        names.append(name)
        apart.append((bits(weights) != bits(views["weight"].to(weights.dtype))).view(()))
    wrong = torch.stack(apart).tolist() if apart else []
    return [name for name, is_wrong in zip(names, wrong, strict=True) if is_wrong]


def _weights(parameter: nn.Parameter, start: int, numel: int) -> Tensor | None:
    """This rank's share as the forward takes it; None where it has none that has a master."""
    if not numel:
        return None
    if hasattr(parameter, "ds_id"):
        return parameter.ds_tensor.detach().view(-1)[:numel]
    if hasattr(parameter, "_hp_mapping"):
        return parameter.detach().view(-1)[start : start + numel]
    return None
