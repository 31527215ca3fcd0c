"""The vocabulary that a run keeps beside its checkpoints, so that they work from any directory.

    RUN_DIR/vocab_FINGERPRINT/          the files as they were given
    RUN_DIR/step_00000500/              its manifest names the fingerprint, and so the folder beside it

A checkpoint that is copied elsewhere is asked with `--vocab`, unless the folder goes with it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ofa_ds.storage.atomic import new_directory, sync

if TYPE_CHECKING:
    from ofa_ds.data.vocab import Vocab


def folder(run_dir: Path, fingerprint: str) -> Path:
    """Where a run keeps the vocabulary of this fingerprint."""
    return run_dir / f"vocab_{fingerprint[:16]}"


def keep(run_dir: Path, source: Path, fingerprint: str) -> Path:
    """Copy the files of the vocabulary in `source` into the run, where they are not yet. Returns their folder.

    Raises ValueError: what is there under that name is another vocabulary. OSError: the disk is full.
    """
    from ofa_ds.data.vocab_files import KNOWN_FILES  # not above: `carry` needs no tokenizer

    target = folder(run_dir, fingerprint)
    _copy(target, (source / name for name in KNOWN_FILES))
    return _checked(target, fingerprint, "remove that folder, it is made anew")[0]


def carry(checkpoint: Path, destination: Path, fingerprint: str | None) -> None:
    """Let the vocabulary that lies beside a checkpoint lie beside another one too; nothing where there is none."""
    if fingerprint and (source := folder(checkpoint.resolve().parent, fingerprint)).is_dir():
        _copy(folder(destination.resolve().parent, fingerprint), source.iterdir())


def _copy(target: Path, files: Iterable[Path]) -> None:
    """The files that are there, into the new folder `target`; nothing where there is one already."""
    if target.is_dir():
        return
    try:
        with new_directory(target) as partial:
            for file in files:
                if file.is_file():
                    shutil.copyfile(file, partial / file.name)
                    sync(partial / file.name)
    except (ValueError, OSError):
        if not target.is_dir():  # else another process was quicker
            raise


def find(
    checkpoint: Path, *, fingerprint: str | None, recipe_path: str, given: Path | None = None
) -> tuple[Path, Vocab] | None:
    """The vocabulary of a checkpoint and where it is: `given`, the one that the run keeps, or that of its recipe.

    fingerprint: what the manifest says; None where the model came without one. Returns None where nothing names a
    vocabulary. Raises ValueError, with what to do: none of the places has it, or has another one.
    """
    way_out = "give the one it was trained with: --vocab DIR"
    if given is not None:
        return _checked(given, fingerprint, way_out)
    if fingerprint is not None and (kept := folder(checkpoint.resolve().parent, fingerprint)).is_dir():
        return _checked(kept, fingerprint, way_out)
    if not recipe_path or not Path(recipe_path).is_dir():
        if fingerprint is None:
            return None
        was = f", and the one it was in ({recipe_path}) is not here" if recipe_path else ""
        raise ValueError(f"{checkpoint}: its vocabulary {fingerprint} is not beside it{was}; {way_out}")
    return _checked(Path(recipe_path), fingerprint, way_out)


def _checked(path: Path, fingerprint: str | None, way_out: str) -> tuple[Path, Vocab]:
    from ofa_ds.data.vocab import load_vocab  # not above: `carry` needs no tokenizer

    vocab = load_vocab(path)
    if fingerprint is not None and vocab.fingerprint != fingerprint:
        raise ValueError(f"{path}: holds vocabulary {vocab.fingerprint}, want {fingerprint}; {way_out}")
    return path, vocab
