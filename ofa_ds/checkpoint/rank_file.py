"""Opening a rank's file. What its header says is compared with the manifest: the two are one description, or none."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from ofa_ds.checkpoint.format import payload_specs, rng_prefix
from ofa_ds.checkpoint.manifest import Manifest
from ofa_ds.storage.safetensors_file import DamagedError, SafetensorsFile, Stored

File = TypeVar("File", bound=SafetensorsFile)


def open_rank(directory: Path, manifest: Manifest, rank: int, kind: type[File], *, direct: bool = False) -> File:
    """A rank's file, with its header read and found to be what the manifest says. Raises DamagedError, OSError.

    direct: only for `check`, which then asks the disk and not the page cache.
    """
    entry = manifest.files[rank]
    file = kind(directory / entry.name, num_bytes=entry.bytes, header_xxh3_128=entry.header_xxh3_128, direct=direct)
    if file.begin != 8 + entry.header_bytes:
        raise DamagedError(f"{file.path}: a header of {file.begin - 8} bytes, the manifest says {entry.header_bytes}")
    rest = _compare_pieces(file, manifest, rank)
    _compare_others(file, manifest, rank, rest)
    return file


def _compare_pieces(file: SafetensorsFile, manifest: Manifest, rank: int) -> dict[str, Stored]:
    """Pieces of parameters: the same names in the same order with the same sizes. Returns what comes after them."""
    found = iter(file.entries.items())
    end = 0
    for spec in payload_specs(manifest.tensors, manifest.parts, rank, manifest.world_size):
        name, stored = next(found, ("no more", None))
        want = Stored(spec.dtype, spec.shape, end, end + spec.num_bytes)
        if name != spec.name or stored != want:
            what = f"{name} {stored.dtype} {list(stored.shape)} at byte {stored.start}" if stored else name
            raise DamagedError(
                f"{file.path}: holds {what} where the manifest says {spec.name} {spec.dtype} {list(spec.shape)} "
                f"at byte {end}"
            )
        end = want.end
    return dict(found)


def _compare_others(file: SafetensorsFile, manifest: Manifest, rank: int, rest: dict[str, Stored]) -> None:
    """Buffers and generator states, which lie behind the pieces."""
    shapes: dict[str, tuple[int, ...]] = {}
    if rank == 0:
        shapes |= {f"buffer|{name}": shape for name, shape in manifest.buffers.items()}
        shapes |= {f"ema_buffer|{name}": shape for name, shape in manifest.ema_buffers.items()}
    missing = {
        rng_prefix(origin, manifest.world_size) for origin in range(rank, manifest.rng_ranks, manifest.world_size)
    }
    known = frozenset(missing)
    for name, stored in rest.items():
        prefix = f"{name.partition('|')[0]}|"
        if name in shapes:
            if stored.shape != shapes[name]:
                raise DamagedError(
                    f"{file.path}: holds {name} {list(stored.shape)}, the manifest says {list(shapes[name])}"
                )
        elif prefix in known and stored.dtype == "U8" and len(stored.shape) == 1:
            missing.discard(prefix)
        else:
            raise DamagedError(f"{file.path}: holds {name} {stored.dtype} {list(stored.shape)}, the manifest does not")
    if lacking := [*(shapes.keys() - rest.keys()), *missing]:
        raise DamagedError(f"{file.path}: lacks {min(lacking)}, the manifest says it is there")
