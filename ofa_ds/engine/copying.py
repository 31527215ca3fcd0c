"""Copies between the host and a GPU that the host does not wait for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`, in order with what is computed there."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def later(x: Tensor) -> Callable[[], list[float]]:
    """x [K] as it is now; the numbers are read when the result is called, by when they have long been copied."""
    if not x.is_cuda:
        return x.clone().tolist
    copy = x.to("cpu", non_blocking=True)  # pinned by torch
    done = torch.cuda.Event()
    done.record()

    def read() -> list[float]:
        done.synchronize()
        return copy.tolist()

    return read
