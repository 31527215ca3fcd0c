"""A checkpoint from any training state: what an import has read of another program's."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from ofa_ds.checkpoint.format import rng_prefix
from ofa_ds.checkpoint.state import TrainingState
from ofa_ds.checkpoint.tensor_file import bytes_of, spec_of
from ofa_ds.checkpoint.writing import THREADS, Small, write_files
from ofa_ds.storage.safetensors_file import CHUNK_BYTES


def write_checkpoint(destination: Path, state: TrainingState, *, ranks: int, stage: int) -> Path:
    """A checkpoint as `ranks` ranks at ZeRO `stage` would save it; see `write_files`."""
    with ThreadPoolExecutor(THREADS) as pool:
        return write_files(destination, _State(state), pool, ranks=ranks, stage=stage)


class _State:
    """A training state, as a source."""

    def __init__(self, state: TrainingState) -> None:
        self.tensors, self.buffers, self.ema_buffers = state.tensors, state.buffers, state.ema_buffers
        self.facts = state.facts
        self._state = state

    def views(self, name: str, kind: str) -> Iterator[memoryview]:
        numel, step = self.tensors[name].numel, CHUNK_BYTES // 4
        for at in range(0, numel, step):
            yield bytes_of(self._state.read(name, kind, at, min(step, numel - at)))

    def small(self, rank: int, ranks: int) -> dict[str, Small]:
        """Generator states of this rank and of those that no longer have a file; rank 0 also the buffers."""
        found: dict[str, Tensor] = {}
        for origin in range(rank, self.facts.rng_ranks or 0, ranks):
            states = self._state.rng(origin)
            found |= {f"{rng_prefix(origin, ranks)}{name}": value for name, value in states.items()}
        if rank == 0:
            found |= {f"buffer|{name}": self._state.buffer(name) for name in self.buffers}
            found |= {f"ema_buffer|{name}": self._state.ema_buffer(name) for name in self.ema_buffers}
        return {name: _small(name, tensor) for name, tensor in found.items()}


def _small(name: str, tensor: Tensor) -> Small:
    spec = spec_of(name, tensor.dtype, tuple(tensor.shape))
    return Small(spec.dtype, spec.shape, bytes_of(tensor))
