"""Reading checkpoints: into an engine of any ZeRO stage and world size, or as plain weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ofa_ds.checkpoint.format import Manifest, read_manifest
from ofa_ds.checkpoint.runs import find, report, step_directories
from ofa_ds.checkpoint.state import Reader
from ofa_ds.checkpoint.tensor_file import DamagedError
from ofa_ds.checkpoint.verify import check_files

if TYPE_CHECKING:
    from ofa_ds.engine import Engine


def resume(engine: Engine, run_dir: str | Path) -> Manifest | None:
    """Load the newest checkpoint whose every byte is right; None where there is none. All ranks call it together.

    Raises ValueError where that checkpoint is of another model.
    """
    names = [directory.name for _, directory in step_directories(Path(run_dir))]
    for name in engine.gather(names)[0]:
        try:
            return load(engine, Path(run_dir) / name)
        except DamagedError as error:
            report(f"{error}; skipped")
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
    if states := reader.rng(engine.ranks.rank):  # a rank that was not there: each step is seeded from its number anyway
        engine.set_rng_states(states)
    return manifest


def _checked(engine: Engine, directory: Path) -> tuple[Manifest | None, str | None]:
    """The manifest, and what is wrong with this rank's share of the files."""
    rank, world_size = engine.ranks.rank, engine.ranks.world_size
    try:
        manifest = read_manifest(directory)
        problems = check_files(directory, manifest["files"][rank::world_size], progress=False)
    except (DamagedError, OSError) as error:
        return None, str(error)
    return manifest, problems[0] if problems else None


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
    manifest = read_manifest(directory)
    if problems := check_files(directory, manifest["files"]):
        raise DamagedError(problems[0])
    reader = Reader(directory, manifest)
    weights = {
        name: reader.read(name, "weight", 0, tensor.numel).reshape(tensor.shape)
        for name, tensor in reader.tensors.items()
    }
    return weights | {name: reader.buffer(name) for name in reader.buffers}
