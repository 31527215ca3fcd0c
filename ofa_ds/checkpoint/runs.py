"""The checkpoints of a run directory: which there are, which is the newest, which may go.

What a run may delete (docs/checkpoints.md, "What is deleted"): checkpoints whose manifest names this run, beyond the
newest `keep`; and what killed saves left, which is known by its name. Of these only the files that we write: where
anything else lies in between, it stays. Never a link, nor what cannot be read.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import sys
from pathlib import Path

from ofa_ds.checkpoint.format import BEST, COUNTS, MANIFEST, RUN
from ofa_ds.checkpoint.manifest import FormatVersionError, Manifest, read_manifest
from ofa_ds.storage.atomic import PARTIAL
from ofa_ds.storage.lease import held
from ofa_ds.storage.safetensors_file import DamagedError
from ofa_ds.terms import CHECKPOINT

_STEP = re.compile(CHECKPOINT + r"(\.old)?")
_LEFTOVER = re.compile(rf"(?:{re.escape(PARTIAL)}|\.trash_)(step_\d{{8,}})(?:\.old)?(?:_[0-9a-f]{{8}})?")
"""A save that was killed, or a checkpoint half-deleted. Other programs' hidden directories have other names."""
_OURS = re.compile(r"rank_\d{5,}\.safetensors|" + re.escape(MANIFEST))
WAY_OUT = "to start anew on purpose, take another run_dir, or move the step_* of this one away"


def step_directories(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, path) of all that has a checkpoint's name, newest first; a replaced one after its successor.

    Raises OSError where the directory cannot be looked into: that does not mean that there are none.
    """
    try:
        names = os.listdir(run_dir)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [match for name in names if (match := _STEP.fullmatch(name))]
    found.sort(key=lambda match: (-int(match[1]), match[2] is not None))
    return [(int(match[1]), run_dir / match[0]) for match in found]


def look(directory: Path) -> Manifest:
    """`read_manifest`, where a link that leads nowhere is an OSError: its disk may only not be mounted."""
    if directory.is_symlink() and not directory.exists():
        raise FileNotFoundError(errno.ENOENT, "is a link that leads nowhere", str(directory))
    return read_manifest(directory)


def latest(run_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run whose manifest and file sizes are right; a damaged one is reported and skipped.

    Checksums are compared by `load`, `resume` and `verify`. Raises FormatVersionError and OSError: a checkpoint that
    cannot be read here may be right, and an older one is not to be taken for the newest.
    """
    found, problems = _newest(Path(run_dir))
    for problem in problems:
        report(f"{problem}; skipped")
    return found


def newest_good(run_dir: str | Path) -> Path | None:
    """The newest whole checkpoint that is not of a bad stretch; None where there is none, or none can be read."""
    for _, directory in step_directories(Path(run_dir)):
        try:
            if look(directory).extra.get(COUNTS, True):
                return directory
        except (DamagedError, FormatVersionError, OSError):
            continue
    return None


def _newest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and what is wrong with the newer ones."""
    problems: list[str] = []
    for _, directory in step_directories(run_dir):
        try:
            look(directory)
        except DamagedError as error:
            problems.append(str(error))
            continue
        return directory, problems
    return None, problems


def find(path: str | Path) -> Path:
    """A checkpoint directory: `path`, the newest one of the run directory `path`, or the one that RUN_DIR/best names.

    Raises ValueError, OSError.
    """
    path = Path(path)
    if path.name == BEST and path.is_file():
        named = path.read_text(encoding="utf-8", errors="replace").strip()
        if not _STEP.fullmatch(named) or not (path.parent / named).is_dir():
            raise ValueError(f"{path}: names {named[:40]!r}, which is no checkpoint beside it")
        path = path.parent / named
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory; want a checkpoint or a run directory")
    if (path / MANIFEST).exists() or not step_directories(path):
        return path
    found, problems = _newest(path)
    if found is None:
        raise ValueError(f"{path}: none of its checkpoints is whole: {'; '.join(problems)}")
    for problem in problems:
        report(f"{problem}; skipped")
    return found


def own(directory: Path, run: str) -> Manifest | None:
    """The manifest of a whole checkpoint that the run `run` has written; None for all else."""
    match = _STEP.fullmatch(directory.name)
    if match is None or directory.is_symlink():
        return None
    try:
        manifest = read_manifest(directory)
    except (DamagedError, FormatVersionError, OSError):
        return None
    return manifest if manifest.extra.get(RUN) == run and manifest.step == int(match[1]) else None


def best_step(manifest: Manifest) -> int | None:
    """The step of the best checkpoint of its run, as far as that was known when this one was saved."""
    known = manifest.extra.get(BEST)
    step = known.get("step") if isinstance(known, dict) else None
    return step if isinstance(step, int) else None


def retire(run_dir: Path, step: int, keep: int, run: str) -> list[Path]:
    """Delete the checkpoints of the run `run` up to `step` but the newest `keep`, and those that were replaced.

    The best one, as the newest says, stays beside these.
    Of a bad stretch: these count for nothing; the newest `keep` of them stay that are newer than every good one.
    What cannot be deleted is reported. Returns what was deleted.
    """
    mine = [(at, path, own(path, run)) for at, path in step_directories(run_dir) if at <= step]
    best = next((best_step(manifest) for _, _, manifest in mine if manifest is not None), None)
    good, bad, seen = 0, 0, set()
    gone = []
    for at, path, manifest in mine:
        if manifest is None:
            continue
        is_good, is_first = bool(manifest.extra.get(COUNTS, True)), at not in seen
        seen.add(at)
        stays = is_first and (good < keep if is_good else not good and bad < keep)
        good, bad = good + (stays and is_good), bad + (stays and not is_good)
        if not stays and not (is_first and at == best) and remove(path):
            gone.append(path)
    return gone


def prune(run_dir: str | Path, keep: int, *, dry_run: bool = False) -> list[Path]:
    """Delete all but the newest `keep` checkpoints that are whole by their manifest and sizes, and nothing else.

    The best one of a run, as the newest whole one says, stays too.
    Damaged ones count for nothing and go with the old ones, unless they are newer than every whole one; what has no
    manifest, and links, stay. Returns what was deleted, or would be. Raises ValueError where there is no checkpoint,
    LeaseError where a job is at work there; and FormatVersionError or OSError where one cannot be judged, before any is
    deleted.
    """
    run_dir = Path(run_dir)
    if dry_run:
        return _superfluous(run_dir, keep)
    if not step_directories(run_dir):
        raise ValueError(f"{run_dir}: want a run directory with step_NNNNNNNN checkpoints, found none")
    with held(run_dir):
        return [path for path in _superfluous(run_dir, keep) if remove(path)]


def _superfluous(run_dir: Path, keep: int) -> list[Path]:
    found = step_directories(run_dir)
    if not found:
        raise ValueError(f"{run_dir}: want a run directory with step_NNNNNNNN checkpoints, found none")
    gone: list[Path] = []
    whole, best = 0, None
    for at, path in found:
        try:
            manifest = look(path)
        except DamagedError as error:
            report(str(error))
            is_ours = os.path.lexists(path / MANIFEST) and not path.is_symlink()
            if whole and is_ours:  # else newer than all that is whole: someone may want to look at it
                gone.append(path)
            continue
        if path.is_symlink():
            report(f"{path}: is a link, and stays")
            continue
        whole += 1
        best = best_step(manifest) if whole == 1 else best
        if whole > keep and at != best:
            gone.append(path)
    return gone


def set_aside(path: Path, why: str) -> Path:
    """Give what is not ours to delete another name, which no checkpoint has. Returns it."""
    name = path.with_name(f"{path.name}.{why}")
    if os.path.lexists(name):
        name = name.with_name(f"{name.name}_{secrets.token_hex(4)}")
    os.rename(path, name)
    return name


def remove(directory: Path) -> bool:
    """Delete a checkpoint, or report why not. Returns whether it is gone.

    Out of sight first: a half-deleted checkpoint must not look like a damaged one.
    """
    trash = directory.with_name(f".trash_{directory.name}_{secrets.token_hex(4)}")
    try:
        os.rename(directory, trash)
        _clear(trash)
    except OSError as error:
        report(f"{directory} could not be deleted: {error}")
        return False
    return True


def remove_leftovers(run_dir: Path) -> None:
    """What killed saves left. What cannot be deleted is reported."""
    for name in os.listdir(run_dir):
        path = run_dir / name
        if not _LEFTOVER.fullmatch(name) or path.is_symlink() or not path.is_dir():
            continue
        try:
            _clear(path)
        except OSError as error:
            report(f"{path} could not be deleted: {error}")


def _clear(hidden: Path) -> None:
    """Delete what we write in a checkpoint, and the directory; what else is in there comes to light again."""
    for entry in list(os.scandir(hidden)):
        if _OURS.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)
    if all(_OURS.fullmatch(name) for name in os.listdir(hidden)):
        try:
            os.rmdir(hidden)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # a writer that has not noticed yet may still add to it: the next time
                raise
        return
    match = _LEFTOVER.fullmatch(hidden.name)
    assert match is not None
    rest = hidden.with_name(f"{match[1]}.rest_{secrets.token_hex(4)}")
    os.rename(hidden, rest)
    report(f"{match[1]} is deleted but for what is not the checkpoint's, now in {rest}")


def report(text: str) -> None:
    """One line for the user, from rank 0 alone. A process that has not imported torch has no ranks."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_initialized() or dist.get_rank() == 0:
        print(f"checkpoint: {text}", file=sys.stderr)
