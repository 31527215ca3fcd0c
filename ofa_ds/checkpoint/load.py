"""Reading checkpoints: into an engine of any ZeRO stage and world size, or as plain weights."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ofa_ds.checkpoint.format import (
    DamagedError,
    Manifest,
    TensorFile,
    check_file,
    overlaps,
    read_manifest,
    step_directories,
)

if TYPE_CHECKING:
    from ofa_ds.engine import Engine


class Reader:
    """Flat ranges of a checkpoint's tensors; files are opened when first needed and only the asked bytes are read."""

    def __init__(self, directory: Path, manifest: Manifest, *, check: bool = False) -> None:
        """check: compare each tensor that is read, in each file, with its checksum."""
        self.directory = directory
        self.manifest = manifest
        self._check = check
        self._files: dict[int, TensorFile] = {}

    def file(self, rank: int) -> TensorFile:
        if rank not in self._files:
            entry = self.manifest["files"][rank]
            self._files[rank] = TensorFile(self.directory / entry["name"], num_bytes=entry["bytes"])
        return self._files[rank]

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Elements start : start + numel of `kind` (weight, exp_avg, exp_avg_sq) of a parameter: fp32 [numel]."""
        result = torch.empty(numel)
        tensor, key = self.manifest["tensors"][name], f"{kind}|{name}"
        for rank, at, size in overlaps(tensor, self.manifest["world_size"], start, numel):
            file = self.file(rank)
            low, high = max(start, at), min(start + numel, at + size)
            result[low - start : high - start] = file.read(key, low - at, high - low)
            if self._check and (problem := file.check(key)):
                raise DamagedError(problem)
        return result

    def buffer(self, name: str) -> Tensor:
        return self.file(0).read(f"buffer|{name}")


def latest(run_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run whose manifest and file sizes are right; what is not is reported and skipped.

    Checksums of the files are compared by `load`, `resume` and `verify`.
    """
    for _, directory in step_directories(Path(run_dir)):
        try:
            read_manifest(directory)
        except DamagedError as error:
            _report(f"{error}; skipped")
            continue
        return directory
    return None


def find(path: str | Path) -> Path:
    """A checkpoint directory: `path`, or the newest one of the run directory `path`."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory; want a checkpoint or a run directory")
    if not step_directories(path):
        return path
    found = latest(path)
    if found is None:
        raise ValueError(f"{path}: holds no complete checkpoint")
    return found


def resume(engine: Engine, run_dir: str | Path) -> Manifest | None:
    """Load the newest checkpoint whose every byte is right; None where there is none. All ranks call it together.

    Raises ValueError where that checkpoint is of another model.
    """
    names = [directory.name for _, directory in step_directories(Path(run_dir))]
    for name in engine.gather(names)[0]:
        try:
            return load(engine, Path(run_dir) / name)
        except DamagedError as error:
            _report(f"{error}; skipped")
    return None


def load(engine: Engine, path: str | Path) -> Manifest:
    """Fill the engine from a checkpoint of any stage and world size; all ranks call it together. Returns the manifest.

    The checksum of each file is compared first, by one rank. Raises DamagedError where a file is wrong, ValueError
    where the checkpoint is of another model; the engine is then as it was.
    """
    directory = Path(path)
    manifest, problem = _checked(engine, directory)
    found = [text for text in engine.gather(problem) if text]
    if manifest is None or found:
        raise DamagedError(found[0])
    _compare_parameters(directory, manifest, engine.parameter_shapes(), set(engine.buffers()))
    reader = Reader(directory, manifest)
    engine.restore(reader.read, reader.buffer, manifest["state"])
    if engine.ranks.world_size == manifest["world_size"]:  # the engine seeds each step from its number and rank anyway
        own = reader.file(engine.ranks.rank)
        engine.set_rng_states(
            {name.removeprefix("rng|"): own.read(name) for name in own.names() if name.startswith("rng|")}
        )
    return manifest


def _checked(engine: Engine, directory: Path) -> tuple[Manifest | None, str | None]:
    """The manifest, and what is wrong with this rank's share of the files."""
    rank, world_size = engine.ranks.rank, engine.ranks.world_size
    try:
        manifest = read_manifest(directory)
        for entry in manifest["files"][rank::world_size]:
            check_file(directory / entry["name"], entry)
    except (DamagedError, OSError) as error:
        return None, str(error)
    return manifest, None


def _compare_parameters(
    directory: Path, manifest: Manifest, shapes: dict[str, tuple[int, ...]], buffers: set[str]
) -> None:
    saved = {name: tuple(tensor["shape"]) for name, tensor in manifest["tensors"].items()}
    saved_buffers = set(manifest["buffers"])
    missing = sorted((shapes.keys() - saved.keys()) | (buffers - saved_buffers))
    extra = sorted((saved.keys() - shapes.keys()) | (saved_buffers - buffers))
    other = [name for name in shapes.keys() & saved.keys() if shapes[name] != saved[name]]
    if missing or extra or other:
        detail = [f"{len(missing)} tensors are missing ({', '.join(missing[:3])})"] if missing else []
        detail += [f"{len(extra)} are not the model's ({', '.join(extra[:3])})"] if extra else []
        detail += [f"{name} is {saved[name]}, the model's is {shapes[name]}" for name in sorted(other)[:3]]
        raise ValueError(f"{directory}: holds another model: {'; '.join(detail)}; use the recipe it was made with")


def load_model_weights(path: str | Path) -> dict[str, Tensor]:
    """Every parameter (fp32) and buffer by name, whole, on the CPU; needs no engine and no other process.

    path: a checkpoint, or a run directory (its newest one). Raises ValueError; DamagedError where a checksum is wrong.
    """
    directory = find(path)
    reader = Reader(directory, read_manifest(directory), check=True)
    tensors = reader.manifest["tensors"]
    weights = {
        name: reader.read(name, "weight", 0, math.prod(tensor["shape"])).reshape(tensor["shape"])
        for name, tensor in tensors.items()
    }
    return weights | {name: reader.buffer(name) for name in reader.manifest["buffers"]}


def verify(path: str | Path) -> list[str]:
    """Every problem of a checkpoint (or of the newest one of a run directory), each with its file and tensor."""
    directory = find(path)
    try:
        manifest = read_manifest(directory)
    except DamagedError as error:
        return [str(error)]
    problems: list[str] = []
    for entry in manifest["files"]:
        try:
            check_file(directory / entry["name"], entry)
        except DamagedError as error:
            problems += _damaged_tensors(directory, entry) or [str(error)]
    return problems


def _damaged_tensors(directory: Path, entry: dict[str, Any]) -> list[str]:
    try:
        file = TensorFile(directory / entry["name"], num_bytes=entry["bytes"])
    except DamagedError as error:
        return [str(error)]
    return [problem for name in file.names() if (problem := file.check(name))]


def describe(path: str | Path) -> dict[str, Any]:
    """What `ofa-ds checkpoint show` prints: a few facts about a checkpoint or the newest one of a run."""
    directory = find(path)
    manifest = read_manifest(directory)
    tensors = manifest["tensors"].values()
    return {
        "path": str(directory),
        "step": manifest["step"],
        "ranks": manifest["world_size"],
        "stage": manifest["zero_stage"],
        "tensors": len(tensors),
        "parameters": sum(math.prod(tensor["shape"]) for tensor in tensors),
        "bytes": sum(entry["bytes"] for entry in manifest["files"]),
        "created": manifest["created"],
        "code": manifest["code"],
    }


def _report(text: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"checkpoint: {text}", file=sys.stderr)
