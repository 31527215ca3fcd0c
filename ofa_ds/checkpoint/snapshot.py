"""A copy of a rank's tensors in memory shared with a process of its own, which writes them to a file."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import select
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ofa_ds.checkpoint.tensor_file import spec_of
from ofa_ds.storage.tensor_writer import FileEntry

_ALIGNMENT = 64
_HEAD = _ALIGNMENT
"""Its first byte is 1 when the trainer waits for the writer."""
_MADV_POPULATE_WRITE = 23
_CLAIM_BYTES = 1 << 25
"""What is claimed at once: a tenth of a second, for which the end of a process may have to wait."""
_libc = ctypes.CDLL(None)
_WRITER = "ofa_ds.storage.background_writer"
_PACKAGE_ROOT = Path(__file__).parents[2]


class Snapshot:
    """Room for one copy of the state and the process that writes it. `take` copies; `wait` says how it went."""

    def __init__(self, size: int, *, share: float, pin: bool) -> None:
        """size: bytes, as `room` counts them, of the largest set of tensors that `take` will be given.

        share: of a core that the process takes while nobody waits for it: where training needs every core, a writer at
        full speed would slow its steps. pin: page-lock the memory, so that copies from a GPU run at full speed; where
        that fails they are slower.
        """
        self._size = _HEAD + size
        self._descriptor = os.memfd_create("ofa-ds snapshot")
        os.ftruncate(self._descriptor, self._size)
        self._map = mmap.mmap(self._descriptor, self._size)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._closing = threading.Event()
        self._claimer = threading.Thread(target=_claim, args=(self._bytes, self._closing))
        self._claimer.start()  # no daemon: one that comes back from the kernel while Python ends aborts the process
        if pin:
            with contextlib.suppress(RuntimeError):
                torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), self._size, 0)
        python_path = os.pathsep.join([str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", _WRITER, str(self._descriptor), str(self._size), str(share)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            pass_fds=[self._descriptor], env={**os.environ, "PYTHONPATH": python_path},
        )  # fmt: skip
        self._end = weakref.finalize(self, _end, self._process, self._descriptor)  # at the latest when Python ends
        self._answer: dict[str, Any] | None = None
        self._specs: list[tuple[str, torch.dtype, tuple[int, ...]]] | None = None
        self._targets: list[Tensor] = []
        self._rows = "[]"

    def take(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Copy the tensors and have them written to `path`. The tensors may change as soon as this returns.

        The job before must have been waited for. Raises OSError where the process is gone.
        """
        specs = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        if specs != self._specs:
            self._lay_out(specs)
        with torch.no_grad():
            torch._foreach_copy_(self._targets, list(tensors.values()), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._answer = None
        self._bytes[0] = 0
        assert self._process.stdin is not None
        self._process.stdin.write(f'{{"path": {json.dumps(str(path))}, "tensors": {self._rows}}}\n')
        self._process.stdin.flush()

    def _lay_out(self, specs: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        """Where each tensor goes: the same in every save of a run."""
        at, rows, targets = _HEAD, [], []
        for name, dtype, shape in specs:
            spec = spec_of(name, dtype, shape)
            if at + room(spec.num_bytes) > self._size:
                raise ValueError(f"a snapshot of {self._size} bytes has no room for {name}")
            targets.append(self._bytes[at : at + spec.num_bytes].view(dtype).view(shape))
            rows.append([spec.name, spec.dtype, spec.shape, spec.num_bytes, at])
            at += room(spec.num_bytes)
        self._specs, self._targets, self._rows = specs, targets, json.dumps(rows)

    def is_alive(self) -> bool:
        """Whether another `take` is possible."""
        return self._process.poll() is None

    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._answer is not None or bool(select.select([self._process.stdout], [], [], 0)[0])

    def wait(self) -> FileEntry:
        """The manifest entry of the file, once it is durable. Raises OSError where it could not be written."""
        if self._answer is None:
            assert self._process.stdout is not None
            self._bytes[0] = 1  # do not rest any more
            line = self._process.stdout.readline()
            gone = {"problem": f"the process that writes it ended with code {self._process.wait() if not line else 0}"}
            self._answer = json.loads(line) if line else gone
        if "problem" in self._answer:
            raise OSError(self._answer["problem"])
        return FileEntry(**self._answer["entry"])

    def close(self) -> None:
        """End the process, whatever it is doing, and the thread that claims memory. Safe to call twice."""
        self._closing.set()
        self._end()
        self._claimer.join()


def _claim(memory: Tensor, closing: threading.Event) -> None:
    """Have the kernel find the pages while training starts: the first save would wait seconds a gigabyte for them.

    Kernels before 5.14 do not know this advice; there the first save waits. memory: uint8, whole pages from its start.
    """
    for at in range(0, len(memory), _CLAIM_BYTES):
        if closing.is_set() or not threading.main_thread().is_alive():  # Python ends, perhaps by an exception
            return
        address, size = memory.data_ptr() + at, min(_CLAIM_BYTES, len(memory) - at)
        _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _MADV_POPULATE_WRITE)


def _end(process: subprocess.Popen[str], descriptor: int) -> None:
    process.kill()
    process.communicate()
    os.close(descriptor)


def room(num_bytes: int) -> int:
    """Bytes that a tensor of so many takes here."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
