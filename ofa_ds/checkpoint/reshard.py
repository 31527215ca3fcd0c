"""A checkpoint as another number of ranks, or another ZeRO stage, would have saved it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from ofa_ds.checkpoint.format import rng_prefix
from ofa_ds.checkpoint.manifest import Manifest, read_manifest
from ofa_ds.checkpoint.runs import find
from ofa_ds.checkpoint.stream import CheckedStream
from ofa_ds.checkpoint.writing import THREADS, Small, write_files
from ofa_ds.storage.atomic import refuse_inside


def reshard(source: str | Path, destination: Path, *, ranks: int, stage: int | None = None) -> tuple[Path, Manifest]:
    """Write the same training state for `ranks` ranks. stage: None keeps it. Raises ValueError, DamagedError, OSError.

    Returns the checkpoint that was read and its manifest, for who carries along what lies beside it.

    One pass, whatever the numbers of files: each byte is compared with its checksum on its way. Nobody needs this to go
    on with a run, which reads any checkpoint; it is for files that are staged beforehand.
    """
    directory = find(source)
    refuse_inside(destination, Path(source), directory)
    manifest = read_manifest(directory)
    own = manifest.zero_stage if stage is None else stage
    with ThreadPoolExecutor(THREADS) as pool, closing(CheckedStream(directory, manifest, pool)) as stream:
        write_files(destination, _Checkpoint(manifest, stream), pool, ranks=ranks, stage=own)
    return directory, manifest


class _Checkpoint:
    """One of ours, as a source."""

    def __init__(self, manifest: Manifest, stream: CheckedStream) -> None:
        self.tensors, self.buffers, self.ema_buffers = manifest.tensors, manifest.buffers, manifest.ema_buffers
        self.facts = manifest.facts
        self._manifest, self._stream = manifest, stream

    def views(self, name: str, kind: str) -> Iterator[memoryview]:
        return self._stream.read(name, kind, 0, self.tensors[name].numel)

    def small(self, rank: int, ranks: int) -> dict[str, Small]:
        """Generator states of this rank and of those that no longer have a file; rank 0 also the buffers."""
        found: dict[str, Small] = {}
        saved_by, small = self._manifest.world_size, self._stream.small
        for origin in range(rank, self._manifest.rng_ranks, ranks):
            old, new = rng_prefix(origin, saved_by), rng_prefix(origin, ranks)
            mine = {name: each for name, each in small[origin % saved_by].items() if name.startswith(old)}
            found |= {f"{new}{name.removeprefix(old)}": each for name, each in mine.items()}
        if rank == 0:
            found |= {name: each for name, each in small[0].items() if name.startswith(("buffer|", "ema_buffer|"))}
        return found
