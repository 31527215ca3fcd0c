"""Several directories of shards as one: files are copied as they are, one directory's rows after another's."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import xxhash

from ofa_ds.data import answer_list
from ofa_ds.data.batch_index import write_index
from ofa_ds.data.manifest import NEGATIVES, Family, Manifest, fingerprint
from ofa_ds.data.negative_files import read_negatives, write_texts
from ofa_ds.data.negative_texts import MAX_DERIVED
from ofa_ds.data.pool import need_one_process, run_jobs
from ofa_ds.data.shard_file import ShardFiles
from ofa_ds.data.shard_writer import Written, chained
from ofa_ds.data.shards import Shards
from ofa_ds.data.shards_verify import need_checksums
from ofa_ds.data.tools.rewrite import need_space
from ofa_ds.progress import Progress
from ofa_ds.storage.atomic import new_directory, refuse_inside, sync_tree
from ofa_ds.terms import FAMILIES


def merge_shards(paths: Sequence[Path], out: Path, *, workers: int = 2) -> Manifest:
    """Write the rows of all `paths`, in the order given, to `out`, which must not be there yet.

    Raises ValueError where they do not belong together, RuntimeError where some are damaged, OSError.
    """
    need_one_process("shards merge")
    refuse_inside(out, *paths)
    sources = [Shards(path) for path in paths]
    _need_alike(sources)
    with new_directory(out) as folder:
        need_space(folder, sources)
        for source in sources:
            need_checksums(source.path, workers)
        families, copies = {}, []
        for family in FAMILIES:
            mine = [source for source in sources if family in source.families]
            if mine:
                pairs = list(_files(mine, family))
                copies += [(path, folder / written.shard.file) for path, written in pairs]
                families[family] = _family(mine, family, [written for _, written in pairs])
                write_index(folder, family, [written.entries for _, written in pairs])
        _copy_all(copies, workers)
        negatives = _negatives(folder, sources)
        answers = sources[0].manifest.answers
        if answers:
            shutil.copyfile(sources[0].path / answer_list.FILE, folder / answer_list.FILE)
        name = fingerprint(families, negatives, answers)
        manifest = Manifest(families=families, negatives=negatives, fingerprint=name, answers=answers)
        manifest.write(folder)
        sync_tree(folder)
    return manifest


def _need_alike(sources: Sequence[Shards]) -> None:
    first = sources[0]
    places = [source.path.resolve() for source in sources]
    for source in sources[1:]:
        if places.count(source.path.resolve()) > 1:
            raise ValueError(f"{source.path}: is given twice; its rows would be there twice")
        if ("downstream" in source.families) != ("downstream" in first.families):
            raise ValueError(f"{source.path}: pretraining and downstream rows are not kept together ({first.path})")
        if source.manifest.answers != first.manifest.answers:
            raise ValueError(f"{source.path}: its list of answers is not that of {first.path}; build it with the same")
    codes = {len(source.row("image", 0)["codes"]): source.path for source in sources if "image" in source.families}
    if len(codes) > 1:
        one, other = list(codes.values())[:2]
        raise ValueError(f"{other}: its square pictures have another size than those of {one}; want all of one size")


def _files(sources: Sequence[Shards], family: str) -> Iterable[tuple[Path, Written]]:
    """(file, what is to be known of its copy) of a family, with their new names."""
    number = 0
    for source in sources:
        for file in ShardFiles(source.path, source.manifest, family):
            entries = file.entries
            name, digest = f"{family}-{number:05d}.arrow", xxhash.xxh3_64_hexdigest(entries)
            yield file.path, Written(dataclasses.replace(file.shard, file=name, index_xxh3=digest), entries)
            number += 1


def _family(sources: Sequence[Shards], family: str, written: Sequence[Written]) -> Family:
    parts = [source.manifest.families[family] for source in sources]
    shards = tuple(each.shard for each in written)
    own_ids = {part.own_ids for part in parts}
    types: Counter[str] = Counter()
    for part in parts:
        types.update(part.types)
    return Family(
        rows=sum(part.rows for part in parts),
        types=dict(types),
        quarantined=sum(part.quarantined for part in parts),
        digest=chained(shards),
        sources=tuple(source for part in parts for source in part.sources),
        shards=shards,
        warnings=sum(part.warnings for part in parts),
        unanswered=sum(part.unanswered for part in parts),
        unlisted=sum(part.unlisted for part in parts),
        own_ids=own_ids.pop() if len(own_ids) == 1 else True,
    )


def _copy_all(copies: Sequence[tuple[Path, Path]], workers: int) -> None:
    sizes = [path.stat().st_size for path, _ in copies]
    progress = Progress(sum(sizes) >> 20, "copying shards", "MB")
    try:
        for size, _ in zip(sizes, run_jobs(_copy, copies, workers), strict=True):
            progress.add(size / (1 << 20))
    finally:
        progress.close()


def _copy(job: tuple[Path, Path]) -> None:
    shutil.copyfile(*job)


def _negatives(folder: Path, sources: Sequence[Shards]) -> dict[str, str]:
    """All texts of all, each once, in order; as they are where all have the same."""
    having = [source for source in sources if source.manifest.negatives]
    if not having:
        return {}
    first = having[0].manifest.negatives
    if all(source.manifest.negatives == first for source in having):
        shutil.copytree(having[0].path / NEGATIVES, folder / NEGATIVES)
        return dict(first)
    found = [read_negatives(source.path) for source in having]
    types = sorted({kind for each in found for kind in each.type2ans}, key=lambda kind: (kind == "other", kind))
    type2ans = {kind: list(_once([each.type2ans.get(kind, ()) for each in found])) for kind in types}
    captions, objects = _once([each.captions for each in found]), _once([each.objects for each in found])
    return write_texts(folder, captions, objects, type2ans)


def _once(lists: Sequence[Sequence[str]]) -> dict[str, None]:
    """Each text once, in order; no more of them than the largest list has, or MAX_DERIVED."""
    most = max(MAX_DERIVED, *map(len, lists)) if lists else 0
    found: dict[str, None] = {}
    for texts in lists:
        for text in texts:
            if len(found) == most:
                return found
            found[text] = None
    return found
