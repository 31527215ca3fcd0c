"""What may stand in a manifest: the type and range of each value. Errors name key, value and what was wanted."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable
from typing import Any

from ofa_ds.checkpoint.format import FORMAT, KINDS, MAX_RANKS, NO_STEPS, VERSION, Cut, Part, TensorInfo, file_name
from ofa_ds.storage.safetensors_file import MAX_HEADER_BYTES
from ofa_ds.storage.tensor_writer import FileEntry

_KEYS = (
    "format", "version", "step", "world_size", "zero_stage", "created", "code", "state", "extra", "rng_ranks", "files",
    "buffers", "ema_buffers", "tensors",
)  # fmt: skip
_MAX_ELEMENTS = 2**48
_MAX_COUNT = 2**53
"""Of whatever is counted; larger ones are not the same number to every reader of JSON."""
_MAX_DIMENSIONS = 32
_MAX_NAME = 1000
_SUM = re.compile(r"[0-9a-f]{32}")


def parse(document: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `Manifest` from its JSON. Nothing is left out, filled in or converted but lists to tuples.

    Raises ValueError, one line.
    """
    _keys("the manifest", document, _KEYS)
    if document["format"] != FORMAT or document["version"] != VERSION:
        raise ValueError(f"want {FORMAT!r} version {VERSION}")
    world_size = _whole("world_size", document["world_size"], MAX_RANKS)
    files = _list("files", document["files"])
    if not world_size or len(files) != world_size:
        raise ValueError(f"world_size {world_size} with {len(files)} files; want one a rank, and at least one")
    tensors, parts = _tensors(document["tensors"], world_size)
    return {
        "step": _whole("step", document["step"]),
        "zero_stage": _whole("zero_stage", document["zero_stage"], 3),
        "created": _text("created", document["created"]),
        "code": {name: _text(f"code.{name}", each) for name, each in _names("code", document["code"])},
        "state": _state(document["state"]),
        "extra": _extra(document["extra"]),
        "rng_ranks": _whole("rng_ranks", document["rng_ranks"], MAX_RANKS),
        "files": tuple(_file(entry, rank) for rank, entry in enumerate(files)),
        "buffers": _shapes("buffers", document["buffers"]),
        "ema_buffers": _shapes("ema_buffers", document["ema_buffers"]),
        "tensors": tensors,
        "parts": parts,
    }


def _file(entry: Any, rank: int) -> FileEntry:
    where = f"files[{rank}]"
    _keys(where, entry, ("name", "bytes", "header_bytes", "header_xxh3_128"))
    if entry["name"] != file_name(rank):  # so no name can lead out of the directory
        raise ValueError(f"{where}.name is {_shown(entry['name'])}, want {file_name(rank)}")
    if not isinstance(entry["header_xxh3_128"], str) or not _SUM.fullmatch(entry["header_xxh3_128"]):
        raise ValueError(f"{where}.header_xxh3_128 is {_shown(entry['header_xxh3_128'])}, want 32 hexadecimal digits")
    _whole(f"{where}.bytes", entry["bytes"])
    if _whole(f"{where}.header_bytes", entry["header_bytes"], MAX_HEADER_BYTES) < 2:
        raise ValueError(f"{where}.header_bytes is {entry['header_bytes']}, want at least 2")
    return FileEntry(**entry)


def _tensors(tensors: Any, world_size: int) -> tuple[dict[str, TensorInfo], dict[str, Cut]]:
    infos: dict[str, TensorInfo] = {}
    parts: dict[str, Cut] = {}
    elements = 0
    for name, entry in _names("tensors", tensors):
        where = f"tensors.{name}"
        _keys(where, entry, ("shape", "trainable", "kinds", "parts"))
        shape, kinds = _shape(f"{where}.shape", entry["shape"]), tuple(_list(f"{where}.kinds", entry["kinds"]))
        if kinds[:1] != KINDS[:1] or kinds != tuple(kind for kind in KINDS if kind in kinds):
            raise ValueError(f"{where}.kinds is {_shown(entry['kinds'])}, want of {KINDS} some, in this order")
        if type(entry["trainable"]) is not bool:
            raise ValueError(f"{where}.trainable is {_shown(entry['trainable'])}, want true or false")
        infos[name] = TensorInfo(shape=shape, trainable=entry["trainable"], kinds=kinds)
        elements += infos[name].numel
        if elements > _MAX_ELEMENTS:
            raise ValueError(f"{where} of shape {list(shape)}: more than {_MAX_ELEMENTS} elements in all")
        cut = entry["parts"]
        parts[name] = "even" if cut == "even" else _cut(f"{where}.parts", cut, infos[name].numel, world_size)
    return infos, parts


def _cut(where: str, parts: Any, total: int, world_size: int) -> tuple[Part, ...]:
    end, seen, cut = 0, set(), []
    for each in _list(where, parts):
        if len(_list(where, each)) != 3:
            raise ValueError(f"{where} has {_shown(each)}, want [rank, start, numel]")
        part = Part(*(_whole(where, value) for value in each))
        if part.rank >= world_size or part.start != end or not part.numel or part.rank in seen:
            raise ValueError(f"{where} has {list(part)} after element {end}, with {world_size} ranks")
        end += part.numel
        seen.add(part.rank)
        cut.append(part)
    if end != total:
        raise ValueError(f"{where} holds {end} of {total} elements")
    return tuple(cut)


def _shapes(where: str, shapes: Any) -> dict[str, tuple[int, ...]]:
    found = {name: _shape(f"{where}.{name}", shape) for name, shape in _names(where, shapes)}
    if sum(map(math.prod, found.values())) > _MAX_ELEMENTS:
        raise ValueError(f"{where}: more than {_MAX_ELEMENTS} elements in all")
    return found


def _shape(where: str, shape: Any) -> tuple[int, ...]:
    if len(_list(where, shape)) > _MAX_DIMENSIONS:
        raise ValueError(f"{where} has {len(shape)} dimensions, want at most {_MAX_DIMENSIONS}")
    return tuple(_whole(where, value, _MAX_ELEMENTS) for value in shape)


def _state(state: Any) -> dict[str, Any]:
    _keys("state", state, NO_STEPS)
    for name in NO_STEPS:
        if name != "loss_scaler":
            _whole(f"state.{name}", state[name])
    for name, value in _names("state.loss_scaler", state["loss_scaler"]):
        if type(value) not in (int, float):
            raise ValueError(f"state.loss_scaler.{name} is {_shown(value)}, want a number")
    return state


def _extra(extra: Any) -> dict[str, Any]:
    for name, value in _names("extra", extra):
        if name in ("recipe", "identity", "origin"):
            _names(f"extra.{name}", value)
    for name, value in extra.get("identity", {}).items():
        if value is not None:
            _text(f"extra.identity.{name}", value)
    return extra


def _keys(where: str, value: Any, wanted: Iterable[str]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {_shown(value)}, want an object")
    missing, unknown = [key for key in wanted if key not in value], sorted(value.keys() - set(wanted))
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has {_shown(unknown[0])}, which is not known"
        raise ValueError(f"{where} {what}")


def _names(where: str, value: Any) -> list[tuple[str, Any]]:
    """(name, value) of an object whose keys are names, fit to be printed."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {_shown(value)}, want an object")
    for name in value:
        if not name or not name.isprintable() or len(name) > _MAX_NAME:
            raise ValueError(f"{where} has the key {_shown(name)}, want 1 to {_MAX_NAME} printable characters")
    return list(value.items())


def _list(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where} is {_shown(value)}, want a list")
    return value


def _whole(where: str, value: Any, most: int = _MAX_COUNT) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{where} is {_shown(value)}, want a whole number from 0 to {most}")
    return value


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value) > _MAX_NAME:
        raise ValueError(f"{where} is {_shown(value)}, want a text of up to {_MAX_NAME} printable characters")
    return value


def _shown(value: Any) -> str:
    return reprlib.repr(value)[:100].encode("ascii", "backslashreplace").decode()
