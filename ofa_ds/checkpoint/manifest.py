"""The manifest of a checkpoint: read and checked once, typed and unchangeable from then on."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import xxhash

import ofa_ds
from ofa_ds.checkpoint.format import BEST, COUNTS, FORMAT, MANIFEST, RUN, VERSION, Facts, Parts, TensorInfo
from ofa_ds.checkpoint.layout import Layout
from ofa_ds.checkpoint.schema import parse
from ofa_ds.storage.safetensors_file import DamagedError, check_size
from ofa_ds.storage.tensor_writer import FileEntry

_FIRST_LINE = re.compile(rb'\{"xxh3_128": "([0-9a-f]{32})",\n')
_MAX_BYTES = 1 << 26
"""The 6B's at 1,024 ranks has under a megabyte; a hostile one of this size takes a gigabyte to parse."""


class FormatVersionError(ValueError):
    """Of another version of the format: not damaged, and nobody's to skip or delete."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint is: who holds what, counters, recipe. Each value is of the type that is said here."""

    step: int
    zero_stage: int
    created: str
    """When; ISO 8601."""
    code: Mapping[str, str]
    """Versions of what wrote it."""
    state: dict[str, Any]
    """What `Engine.counters` gave; see format.NO_STEPS."""
    extra: dict[str, Any]
    """JSON values of who saved; those that have a meaning are `recipe`, `identity` and `origin`."""
    rng_ranks: int
    """Ranks of the run whose generator states there are."""
    files: tuple[FileEntry, ...]
    """One of each rank, in order."""
    buffers: Mapping[str, tuple[int, ...]]
    """Shapes by name; so is `ema_buffers`, the moving average's own."""
    ema_buffers: Mapping[str, tuple[int, ...]]
    tensors: Mapping[str, TensorInfo]
    parts: Parts

    @property
    def world_size(self) -> int:
        return len(self.files)

    @property
    def recipe(self) -> dict[str, Any] | None:
        """The run's settings, as `recipe_to_dict` gives them."""
        return self.extra.get("recipe")

    @property
    def preset(self) -> str | None:
        """The model's, by the recipe."""
        model = (self.recipe or {}).get("model")
        return model.get("preset") if isinstance(model, dict) else None

    @property
    def identity(self) -> Mapping[str, str | None]:
        """Fingerprints of what it was trained with, by name; None: not known."""
        return self.extra.get("identity", {})

    @property
    def origin(self) -> Mapping[str, Any]:
        """Where an imported one comes from."""
        return self.extra.get("origin", {})

    @property
    def facts(self) -> Facts:
        """Those of the training state. Which run saved it is none: a copy is not that run's to delete."""
        extra = {name: value for name, value in self.extra.items() if name not in (RUN, COUNTS, BEST)}
        return Facts(step=self.step, state=self.state, rng_ranks=self.rng_ranks, extra=extra)

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(entry.bytes for entry in self.files)

    @cached_property
    def layout(self) -> Layout:
        header_bytes = [entry.header_bytes for entry in self.files]
        return Layout(self.tensors, self.parts, self.world_size, header_bytes=header_bytes)

    def document(self) -> dict[str, Any]:
        """The JSON of the file, without its checksum."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "world_size": self.world_size,
            "zero_stage": self.zero_stage,
            "created": self.created,
            "code": dict(self.code),
            "state": self.state,
            "extra": self.extra,
            "rng_ranks": self.rng_ranks,
            "files": [dataclasses.asdict(entry) for entry in self.files],
            "buffers": {name: list(shape) for name, shape in self.buffers.items()},
            "ema_buffers": {name: list(shape) for name, shape in self.ema_buffers.items()},
            "tensors": {name: _tensor(info, self.parts[name]) for name, info in self.tensors.items()},
        }


def _tensor(info: TensorInfo, cut: Any) -> dict[str, Any]:
    parts = cut if isinstance(cut, str) else [list(part) for part in cut]
    return {"shape": list(info.shape), "trainable": info.trainable, "kinds": list(info.kinds), "parts": parts}


def manifest_of(
    tensors: Mapping[str, TensorInfo],
    parts: Parts,
    *,
    files: Sequence[FileEntry],
    stage: int,
    facts: Facts,
    buffers: Mapping[str, tuple[int, ...]],
    ema_buffers: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Manifest:
    """That of files written just now, by this code."""
    return Manifest(
        step=facts.step,
        zero_stage=stage,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        code={
            "ofa_ds": ofa_ds.__version__,
            "torch": version("torch"),
            "deepspeed": version("deepspeed"),
            "python": platform.python_version(),
        },
        state=facts.state,
        extra=facts.extra,
        rng_ranks=len(files) if facts.rng_ranks is None else facts.rng_ranks,
        files=tuple(files),
        buffers=buffers,
        ema_buffers=ema_buffers,
        tensors=tensors,
        parts=parts,
    )


def write_manifest(path: Path, manifest: Manifest) -> None:
    write_document(path, manifest.document())


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """JSON, a line a key, under the checksum of all of it. Raises ValueError: it holds what JSON has no word for."""
    lines = (f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in document.items())
    body = ",\n".join(lines).encode() + b"}\n"
    with open(path, "xb") as file:
        file.write(b'{"xxh3_128": "%s",\n' % xxhash.xxh3_128_hexdigest(body).encode() + body)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint, checked, and its files' sizes with it. Errors are one line.

    Raises DamagedError where it or a file's size is wrong, FormatVersionError where it is of another version, OSError
    where it cannot be read: neither of these two says anything about its bytes.
    """
    path = directory / MANIFEST
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        found = None
    if found is None or not stat.S_ISREG(found.st_mode):
        raise DamagedError(f"{directory}: has no {MANIFEST}: not a checkpoint, or one that was never finished")
    if found.st_size > _MAX_BYTES:
        raise DamagedError(f"{path}: {found.st_size} bytes are too many for a manifest")
    document = _document(path)
    try:
        manifest = Manifest(**parse(document))
        for entry, held in zip(manifest.files, manifest.layout.sizes(), strict=True):
            if 8 + entry.header_bytes + held > entry.bytes:
                raise ValueError(f"{entry.name} of {entry.bytes} bytes is too small for its tensors")
    except ValueError as error:
        raise DamagedError(f"{path}: {error}") from error
    for entry in manifest.files:
        check_size(directory / entry.name, entry.bytes)
    return manifest


def _document(path: Path) -> dict[str, Any]:
    """The JSON, of our format and version, without its checksum, which is right."""
    raw = path.read_bytes()
    first = _FIRST_LINE.match(raw)
    is_whole = first is not None and xxhash.xxh3_128_hexdigest(raw[first.end() :]).encode() == first[1]
    if first is not None and not is_whole:
        raise DamagedError(f"{path}: its checksum is wrong: changed after it was written")
    try:
        document = json.loads(raw, object_pairs_hook=_object, parse_constant=_no_number, parse_float=_number)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: not JSON as we write it: {str(error)[:200]}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DamagedError(f"{path}: want the manifest of an {FORMAT!r}")
    found = document.get("version")
    if type(found) is int and found != VERSION:  # also where that version has other checksums
        age, advice = ("a newer", "upgrade") if found > VERSION else ("an older", "read it with that one")
        raise FormatVersionError(
            f"{path}: written by {age} ofa-ds: format version {found}, this one reads {VERSION}; {advice}"
        )
    if not is_whole or found != VERSION or type(found) is not int:
        raise DamagedError(f"{path}: its first lines are not those that we write: changed after it was written")
    del document["xxh3_128"]
    return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for k, name in enumerate(names) if name in names[:k])
        raise ValueError(f"{ascii(twice)[:80]} is there twice")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON's")


def _number(text: str) -> float:
    found = float(text)
    if found - found:  # infinite
        raise ValueError(f"{text[:40]} is too large a number")
    return found
