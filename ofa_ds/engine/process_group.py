"""Joining the other processes of a job, failing together with them, and leaving."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ofa_ds.engine.deepspeed_import import deepspeed
from ofa_ds.engine.ranks import Ranks, choose_device
from ofa_ds.engine.rendezvous import rendezvous

_TIMEOUT_MINUTES = 10
"""How long a rank waits for the others in one collective; DEEPSPEED_TIMEOUT (minutes) overrides it."""


def init_distributed(device: str | None = None) -> Ranks:
    """Join the other processes of this job; alone where no launcher is. Safe to call twice.

    device: "cpu", "cuda", or None for a GPU where there is one.
    """
    os.environ.update(rendezvous(os.environ))
    local_rank = int(os.environ["LOCAL_RANK"])
    place = choose_device(local_rank, os.environ, device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    else:  # a shared-memory all-reduce that only DeepSpeed's inference calls: compiling it takes a minute and g++
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.utils.nvtx.enable_nvtx = False  # marks for a GPU profiler, two calls around each hook
    minutes = float(os.environ.get("DEEPSPEED_TIMEOUT", _TIMEOUT_MINUTES))
    deepspeed.init_distributed(
        dist_backend="nccl" if place.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(minutes=minutes),
    )
    return Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), local_rank=local_rank, device=place)


def leave_distributed() -> None:
    """Wait for the other processes of this job and end the connections; a rank that just exits may abort another.

    Only after success: a rank that failed must not wait for the others, who may be waiting for it in another place.
    """
    if dist.is_initialized():
        dist.barrier()
        deepspeed.comm.destroy_process_group()


def gather(ranks: Ranks, value: Any) -> list[Any]:
    """A picklable value of every rank, by rank; all ranks must call it together."""
    if ranks.world_size == 1:
        return [value]
    values = [None] * ranks.world_size
    dist.all_gather_object(values, value)
    return values


@contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """What one rank raises inside, all raise, so that none goes on to wait for it; all ranks must enter it together.

    The rank itself raises its own error; the others a ValueError or RuntimeError with its text, and which rank it was.
    """
    own: Exception | None = None
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        own = error
    told = None if own is None else (isinstance(own, ValueError), str(own))
    problems = [(rank, *each) for rank, each in enumerate(gather(ranks, told)) if each is not None]
    if own is not None:
        raise own
    if problems:
        rank, is_value_error, text = problems[0]
        raise (ValueError if is_value_error else RuntimeError)(f"rank {rank}: {text}")
