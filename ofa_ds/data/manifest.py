"""`manifest.json` of a directory of shards: typed, frozen, checked once when it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any

import xxhash
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ofa_ds.data.columns import SCHEMAS
from ofa_ds.terms import FAMILIES

MANIFEST = "manifest.json"
NEGATIVES = "negative_sample"
MAX_MANIFEST_BYTES = 1 << 30
FORMAT = {"format": "ofa-ds shards", "version": 2}
"""What a manifest begins with. Version 1, which had lists of batches here and no index files, is still read."""

TYPED = tuple(family for family in FAMILIES if "type" in SCHEMAS[family].names)
"""Families whose rows have a type."""

_STRICT = ConfigDict(strict=True)
_Count = Annotated[int, Field(ge=0, lt=1 << 62)]
_Positive = Annotated[int, Field(ge=1, lt=1 << 62)]
_Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
"""Of a file in the directory: no way leads out of it."""


@dataclass(frozen=True, config=_STRICT)
class Source:
    file: str
    rows: _Count
    quarantined: _Count
    warnings: _Count = 0


@dataclass(frozen=True, config=_STRICT)
class Shard:
    """One Arrow file."""

    file: _Name
    rows: _Positive
    batches: _Positive
    num_bytes: _Positive
    """Size of the file."""
    digest: _Count
    """Of the rows alone."""
    footer_xxh3: _Checksum
    """Of what follows the last record batch."""
    index_xxh3: _Checksum
    """Of its entries in the family's index file (`data.batch_index`), which has a checksum for each record batch."""


@dataclass(frozen=True, config=_STRICT)
class Family:
    rows: _Positive
    types: dict[str, _Count]
    """Rows of each type, of the families that have types: vision-language and downstream rows."""
    quarantined: _Count
    digest: _Count
    sources: tuple[Source, ...]
    shards: Annotated[tuple[Shard, ...], Field(min_length=1)]
    warnings: _Count = 0
    """Lines that are well formed and look like a mistake."""
    unanswered: _Count = 0
    """Downstream: rows that do not say what is right. They can be answered, not trained on or judged."""
    unlisted: _Count = 0
    """Downstream: rows whose best answer is not in the list of answers. They can be judged, not trained on with it."""
    own_ids: bool | None = None
    """Downstream: ids are those of an id column, else line numbers; None where an earlier version wrote it."""


@dataclass(frozen=True, config=_STRICT)
class Manifest:
    families: Annotated[dict[str, Family], Field(min_length=1)]
    negatives: dict[_Name, _Checksum]
    """Checksum of each file of the negatives."""
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """Of the rows, the negatives and the answer list in order, not of how they are cut into files."""
    answers: Annotated[str, Field(pattern=r"^([0-9a-f]{16})?$")] = ""
    """Checksum of the list of candidate answers (`data.answer_list`); empty where there is none."""

    def write(self, folder: Path) -> None:
        """Last of all files: with it the directory is complete."""
        (folder / MANIFEST).write_text(json.dumps(FORMAT | asdict(self), indent=1) + "\n")

    def problem(self) -> str | None:
        """What in it contradicts the rest of it, after the name of the key."""
        for family, part in self.families.items():
            if family not in FAMILIES:
                return f"families.{family}: want {', '.join(FAMILIES)}"
            typed = part.rows if family in TYPED else 0
            if sum(part.types.values()) != typed:
                return f"families.{family}.types: their sum is {sum(part.types.values())}, want {typed}"
            if (total := sum(shard.rows for shard in part.shards)) != part.rows:
                return f"families.{family}.rows: is {part.rows}, its shards have {total}"
            if len({shard.file for shard in part.shards}) < len(part.shards):
                return f"families.{family}.shards: one file is there twice"
        return None


def fingerprint(families: Mapping[str, Family], negatives: Mapping[str, str], answers: str = "") -> str:
    """See `Manifest.fingerprint`."""
    rows = {family: [part.rows, part.digest] for family, part in families.items()}
    content = [rows, negatives, answers] if answers else [rows, negatives]
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


@dataclass(frozen=True, config=_STRICT)
class OldShard:
    """One Arrow file, as version 1 described it."""

    file: _Name
    rows: _Positive
    digest: _Count
    batch_rows: tuple[_Positive, ...]
    byte_ends: tuple[_Positive, ...]
    """One past the last byte of each record batch, then of the file."""
    xxh3: tuple[_Checksum, ...]
    """Of the bytes up to each of `byte_ends`."""

    def problem(self) -> str | None:
        """What in it contradicts the rest of it, after the name of the key."""
        if sum(self.batch_rows) != self.rows:
            return f"batch_rows: their sum is {sum(self.batch_rows)}, rows is {self.rows}"
        for name, found in (("byte_ends", self.byte_ends), ("xxh3", self.xxh3)):
            if len(found) != len(self.batch_rows) + 1:
                return f"{name}: want one for each of {len(self.batch_rows)} record batches and one, got {len(found)}"
        if any(a >= b for a, b in zip(self.byte_ends, self.byte_ends[1:], strict=False)):
            return "byte_ends: want each larger than the one before"
        return None

    def as_shard(self) -> Shard:
        """With an index of which nothing is known: there is none."""
        shape = {"rows": self.rows, "batches": len(self.batch_rows), "num_bytes": self.byte_ends[-1]}
        return Shard(file=self.file, **shape, digest=self.digest, footer_xxh3=self.xxh3[-1], index_xxh3="0" * 16)


@dataclass(frozen=True, config=_STRICT)
class OldFamily(Family):
    shards: Annotated[tuple[OldShard, ...], Field(min_length=1)]


@dataclass(frozen=True, config=_STRICT)
class OldManifest(Manifest):
    """`manifest.json` of version 1."""

    families: Annotated[dict[str, OldFamily], Field(min_length=1)]

    def problem(self) -> str | None:
        """As in `Manifest.problem`."""
        for family, part in self.families.items():
            for number, shard in enumerate(part.shards):
                if found := shard.problem():
                    return f"families.{family}.shards.{number}.{found}"
        return super().problem()

    def converted(self) -> ConvertedManifest:
        families, old = {}, {}
        for family, part in self.families.items():
            old[family] = part.shards
            families[family] = Family(**vars(part) | {"shards": tuple(shard.as_shard() for shard in part.shards)})
        return ConvertedManifest(**vars(self) | {"families": families}, old_shards=old)


@dataclass(frozen=True, config=_STRICT)
class ConvertedManifest(Manifest):
    """What was version 1: there are no index files, `data.old_index` makes what would be in them."""

    old_shards: dict[str, tuple[OldShard, ...]] = field(default_factory=dict)


def read_manifest(folder: Path, task: str = "") -> Manifest:
    """Raises ValueError of one line, with file and key, where `folder` is no directory of shards of this version.

    task: the downstream task whose shards are wanted, where they are of one; the message says how to build them.
    """
    path = folder / MANIFEST
    try:
        if (size := path.stat().st_size) > MAX_MANIFEST_BYTES:
            raise ValueError(f"{size} bytes are more than the {MAX_MANIFEST_BYTES} that one of a million files takes")
        data = path.read_bytes()
        head = json.loads(data)
    except (FileNotFoundError, NotADirectoryError) as error:
        rows = f"--task {task} --out {folder} TSV ..." if task else f"--out {folder} --vision-language TSV ..."
        build = f"ofa-ds shards build {rows}"
        raise ValueError(f"{folder}: no shards there (no {MANIFEST}); build them with: {build}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); build the shards again") from error
    version = head.get("version") if isinstance(head, dict) and head.get("format") == FORMAT["format"] else None
    if type(version) is not int or version not in _ADAPTERS:
        raise ValueError(f"{path}: want {FORMAT}; build the shards with this version of ofa-ds")
    try:
        manifest = _ADAPTERS[version].validate_json(data)
    except ValidationError as error:
        raise ValueError(f"{path}: {_first(error)}; copy or build the shards again") from error
    if found := manifest.problem():
        raise ValueError(f"{path}: {found}; copy or build the shards again")
    return manifest.converted() if isinstance(manifest, OldManifest) else manifest


_ADAPTERS: dict[int, TypeAdapter] = {1: TypeAdapter(OldManifest), 2: TypeAdapter(Manifest)}
"""Of each version."""


def _first(error: ValidationError) -> str:
    """The first of its problems: key, what was wanted, what came."""
    found: Mapping[str, Any] = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in found["loc"])
    if found["type"] == "missing":
        return f"{key}: is missing"
    came = repr(found["input"])
    return f"{key}: {found['msg'][:1].lower()}{found['msg'][1:]}, got {came if len(came) <= 60 else came[:57] + '...'}"
