"""DeepSpeed, imported once and with what must be said to it before."""

from __future__ import annotations

import os
import warnings

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by the import below, which warns when it has to find out
import deepspeed  # noqa: E402

# DeepSpeed 0.19 calls two functions that torch 2.13 renamed; torch would say so in every step.
warnings.filterwarnings("ignore", r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor`", FutureWarning)

__all__ = ["deepspeed"]
