"""A checkpoint as another number of ranks, or another ZeRO stage, would have saved it."""

from __future__ import annotations

from pathlib import Path

from ofa_ds.checkpoint.format import read_manifest
from ofa_ds.checkpoint.runs import find
from ofa_ds.checkpoint.state import Reader
from ofa_ds.checkpoint.tensor_file import DamagedError
from ofa_ds.checkpoint.verify import check_files
from ofa_ds.checkpoint.write import write_checkpoint


def open_checked(path: str | Path, left_out: tuple[str, ...] = ()) -> Reader:
    """A checkpoint, or the newest one of a run, every byte of it checked. Raises ValueError, DamagedError.

    left_out: beginnings of names (`exp_avg|`, ...) that will not be read.
    """
    directory = find(path)
    manifest = read_manifest(directory)
    if problems := check_files(directory, manifest["files"], left_out=left_out):
        raise DamagedError(problems[0])
    return Reader(directory, manifest)


def reshard(source: str | Path, destination: Path, *, ranks: int, stage: int | None = None) -> Path:
    """Write the same training state for `ranks` ranks. stage: None keeps it. Raises ValueError, DamagedError, OSError.

    Nobody needs this to go on with a run, which reads any checkpoint; it is for files that are staged beforehand.
    """
    reader = open_checked(source)
    own = int(reader.manifest["zero_stage"]) if stage is None else stage
    return write_checkpoint(destination, reader, ranks=ranks, stage=own)
