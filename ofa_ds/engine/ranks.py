"""This process among the others, and the device it computes on."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch

from ofa_ds.engine.host_memory import keep_freed_memory


@dataclass(frozen=True, kw_only=True)
class Ranks:
    rank: int
    world_size: int
    local_rank: int
    """Number of this process on its host."""
    device: torch.device
    """`cpu`, or this process's GPU."""


def choose_device(local_rank: int, env: MutableMapping[str, str], wanted: str | None) -> torch.device:
    """This process's device; also tells DeepSpeed, which reads DS_ACCELERATOR and LOCAL_RANK.

    wanted: "cpu", "cuda", or None for a GPU where there is one.
    """
    kind = wanted or env.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device {kind!r}: want cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("a GPU was asked for and torch finds none; check nvidia-smi and the torch build, or use cpu")
    env["DS_ACCELERATOR"] = kind
    if kind == "cpu":
        keep_freed_memory()
        return torch.device("cpu")
    index = local_rank % torch.cuda.device_count()  # srun may show each process just its own GPU
    env["LOCAL_RANK"] = str(index)
    return torch.device("cuda", index)
