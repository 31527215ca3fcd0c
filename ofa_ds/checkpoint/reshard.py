"""A checkpoint as another number of ranks, or another ZeRO stage, would have saved it."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

from ofa_ds.checkpoint.format import MANIFEST, Parts, file_name, num_bytes_of, parts_of, payload_specs, rng_prefix
from ofa_ds.checkpoint.layout import Layout
from ofa_ds.checkpoint.manifest import Manifest, manifest_of, read_manifest, write_manifest
from ofa_ds.checkpoint.runs import find
from ofa_ds.checkpoint.stream import BUFFER_BYTES, MAX_FILES, THREADS, CheckedStream, Small
from ofa_ds.progress import Progress
from ofa_ds.storage.atomic import check_space, new_directory, refuse_inside
from ofa_ds.storage.direct_file import BLOCK_BYTES
from ofa_ds.storage.tensor_writer import FileEntry, TensorWriter

_MIB = 1 << 20
_MAX_STAGE_BYTES = 4 * _MIB


def reshard(source: str | Path, destination: Path, *, ranks: int, stage: int | None = None) -> Path:
    """Write the same training state for `ranks` ranks. stage: None keeps it. Raises ValueError, DamagedError, OSError.

    Nobody needs this to go on with a run, which reads any checkpoint; it is for files that are staged beforehand.
    """
    directory = find(source)
    refuse_inside(destination, Path(source), directory)
    manifest = read_manifest(directory)
    own = manifest.zero_stage if stage is None else stage
    if max(ranks, manifest.world_size) > MAX_FILES:  # checked first and copied then
        from ofa_ds.checkpoint.loading import open_checked
        from ofa_ds.checkpoint.write import write_checkpoint  # with torch, which the way below does without

        return write_checkpoint(destination, open_checked(directory), ranks=ranks, stage=own)
    infos = manifest.tensors
    parts = parts_of(infos, ranks, own)
    with new_directory(destination) as partial:
        check_space(partial, num_bytes_of(infos, ranks), ranks + 2)
        with ThreadPoolExecutor(THREADS) as pool, closing(CheckedStream(directory, manifest, pool)) as stream:
            files = _copy(stream, manifest, partial=partial, parts=parts, ranks=ranks, pool=pool)
        new = manifest_of(
            infos, parts, files=files, stage=own, facts=manifest.facts, buffers=manifest.buffers,
            ema_buffers=manifest.ema_buffers,
        )  # fmt: skip
        write_manifest(partial / MANIFEST, new)
    return destination


def _copy(
    stream: CheckedStream, manifest: Manifest, *, partial: Path, parts: Parts, ranks: int, pool: Executor
) -> list[FileEntry]:
    """Write every rank's file in one pass over the checkpoint; returns the manifest's entries."""
    infos = manifest.tensors
    layout = Layout(infos, parts, ranks)
    small = [_small(stream, manifest, rank, ranks) for rank in range(ranks)]
    stage_bytes = min(_MAX_STAGE_BYTES, BUFFER_BYTES // (2 * ranks) // BLOCK_BYTES * BLOCK_BYTES)
    with ExitStack() as stack:
        files = []
        for rank in range(ranks):
            specs = payload_specs(infos, parts, rank, ranks) + [each.spec(name) for name, each in small[rank].items()]
            writer = TensorWriter(partial / file_name(rank), specs, stage_bytes=stage_bytes, pool=pool)
            files.append(stack.enter_context(writer))
        meter = Progress(manifest.num_bytes // _MIB, "writing", "MiB")
        stack.callback(meter.close)
        for name, info in infos.items():
            shares = [(files[part.rank], 4 * part.numel) for part in layout.overlaps(name, 0, info.numel)]
            for kind in info.kinds:
                _deal(stream.read(name, kind, 0, info.numel), shares)
            meter.add(4 * info.numel * len(info.kinds) / _MIB)
        for rank, file in enumerate(files):
            for each in small[rank].values():
                file.write(each.data)
    return [file.entry for file in files]


def _deal(views: Iterable[memoryview], shares: list[tuple[TensorWriter, int]]) -> None:
    """Give each file, in turn, as many bytes as are its own."""
    turns = iter(shares)
    left = 0
    for view in views:
        while view:
            if not left:
                file, left = next(turns)
            count = min(left, len(view))
            file.write(view[:count])
            view, left = view[count:], left - count


def _small(stream: CheckedStream, manifest: Manifest, rank: int, ranks: int) -> dict[str, Small]:
    """Generator states of this rank and of those that no longer have a file; rank 0 also the buffers."""
    found: dict[str, Small] = {}
    saved_by = manifest.world_size
    for origin in range(rank, manifest.rng_ranks, ranks):
        old, new = rng_prefix(origin, saved_by), rng_prefix(origin, ranks)
        mine = {name: each for name, each in stream.small[origin % saved_by].items() if name.startswith(old)}
        found |= {f"{new}{name.removeprefix(old)}": each for name, each in mine.items()}
    if rank == 0:
        found |= {name: each for name, each in stream.small[0].items() if name.startswith(("buffer|", "ema_buffer|"))}
    return found
