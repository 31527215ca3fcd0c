"""A copy of a rank's tensors in memory shared with a process of its own, which writes them to a file."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ofa_ds.checkpoint.tensor_file import spec_of

_ALIGNMENT = 64
_PACKAGE_ROOT = Path(__file__).parents[2]


class Snapshot:
    """Room for one copy of the state and the process that writes it. `take` copies; `wait` says how it went."""

    def __init__(self, size: int, *, pin: bool) -> None:
        """size: bytes, as `room` counts them, of the largest set of tensors that `take` will be given.

        pin: page-lock the memory, so that copies from a GPU run at full speed; where that fails they are slower.
        """
        self._size = size
        self._descriptor = os.memfd_create("ofa-ds snapshot")
        os.ftruncate(self._descriptor, self._size)
        self._map = mmap.mmap(self._descriptor, self._size)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        if pin:
            with contextlib.suppress(RuntimeError):
                torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), size, 0)
        python_path = os.pathsep.join([str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ofa_ds.background_writer", str(self._descriptor), str(self._size)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            pass_fds=[self._descriptor], env={**os.environ, "PYTHONPATH": python_path},
        )  # fmt: skip
        self._answer: dict[str, Any] | None = None

    def take(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Copy the tensors and have them written to `path`. The tensors may change as soon as this returns.

        The job before must have been waited for. Raises OSError where the process is gone.
        """
        at, job = 0, []
        for name, tensor in tensors.items():
            spec = spec_of(name, tensor.dtype, tuple(tensor.shape))
            if at + room(spec.num_bytes) > self._size:
                raise ValueError(f"a snapshot of {self._size} bytes has no room for {name}")
            target = self._bytes[at : at + spec.num_bytes].view(tensor.dtype).view(tensor.shape)
            target.copy_(tensor.detach(), non_blocking=True)
            job.append([spec.name, spec.dtype, spec.shape, spec.num_bytes, at])
            at += room(spec.num_bytes)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._answer = None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"path": str(path), "tensors": job}) + "\n")
        self._process.stdin.flush()

    def is_alive(self) -> bool:
        """Whether another `take` is possible."""
        return self._process.poll() is None

    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._answer is not None or bool(select.select([self._process.stdout], [], [], 0)[0])

    def wait(self) -> dict[str, Any]:
        """The manifest entry of the file, once it is durable. Raises OSError where it could not be written."""
        if self._answer is None:
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            gone = {"problem": f"the process that writes it ended with code {self._process.wait() if not line else 0}"}
            self._answer = json.loads(line) if line else gone
        if "problem" in self._answer:
            raise OSError(self._answer["problem"])
        return self._answer["entry"]

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.communicate()
        os.close(self._descriptor)


def room(num_bytes: int) -> int:
    """Bytes that a tensor of so many takes here."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
