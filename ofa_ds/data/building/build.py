"""Building shards: pieces of the sources become Arrow files, each by itself; the manifest is written last.

What is written depends on the sources and on the sizes asked for, not on the number of workers or ranks. Everything
happens in a directory beside the target that takes its place when all is done; a build that was stopped, at whatever
instant, goes on from the pieces that were done.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import xxhash

from ofa_ds.data import answer_list, task_rows
from ofa_ds.data.batch_index import write_index
from ofa_ds.data.building import notes, tsv_source
from ofa_ds.data.building.piece_builder import (
    TEXTS,
    At,
    BadRecord,
    Built,
    Job,
    Rules,
    build_piece,
    done_before,
    encoded,
    entries_of,
)  # fmt: skip
from ofa_ds.data.building.source import Piece
from ofa_ds.data.building.work import ITEMS, JOURNAL, PLAN, clear, place, was_placed, work_directory
from ofa_ds.data.doubts import without_negative_answer, without_negative_caption
from ofa_ds.data.manifest import MANIFEST, Family, Manifest, Source, fingerprint, read_manifest
from ofa_ds.data.negative_files import derive_negatives, read_negatives, write_negatives
from ofa_ds.data.negative_texts import NegativeTexts
from ofa_ds.data.pool import run_jobs, serve_if_worker
from ofa_ds.data.shard_writer import chained
from ofa_ds.data.tsv import TYPES
from ofa_ds.progress import Progress
from ofa_ds.storage import file_systems
from ofa_ds.storage.atomic import sync_tree
from ofa_ds.terms import FAMILIES, ROWS_PER_SHARD, SHARD_BYTES

LINE_BYTES = 4 / 3
"""Of a TSV file for a byte of a shard: base64 takes a third more than what it stands for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """Options of a build that are not about its rows."""

    rows_per_shard: int = ROWS_PER_SHARD
    """Rows of one Arrow file, at most."""
    shard_bytes: int = SHARD_BYTES
    """Bytes of one Arrow file, about; large sources are cut into pieces of it, small ones share a piece."""
    workers: int = 2
    on_error: str = "stop"
    """What a bad record does: stop, or quarantine."""
    strict: bool = False
    """A record that looks like a mistake is a bad one."""
    work: Path | None = None
    """Of a remote target: local directory, in a hidden one of which it is built."""


def build_shards(
    out: Path | str,
    *,
    negatives: Path | str | None = None,
    lines: task_rows.TaskLines | None = None,
    answers: Sequence[str] = (),
    rows_per_shard: int = ROWS_PER_SHARD,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 2,
    on_error: str = "stop",
    strict: bool = False,
    work: Path | None = None,
    **sources: Sequence[Path | str],
) -> Manifest:
    """Turn OFA's TSV files into shards in `out`, which must not exist yet (or be empty).

    sources: vision_language, text, image, detection = files or patterns of files, plain, .gz or .zst, here or remote;
    any of them, read in the order given; or downstream = files of one task, whose lines read as `lines` says, with the
    list of `answers` that the task may give. negatives: OFA's negative_sample directory; without it one is derived
    from the vision-language rows. The others: `How`. on_error "stop" raises ValueError "file:line: column: reason";
    "quarantine" puts a bad line into out/quarantine and counts it. Well-formed lines that look like a mistake
    (`doubts`) are listed in out/warnings and counted. The same sources and sizes give the same bytes with any number
    of workers. Under MPI, rank 0 gives the work to the other ranks, which leave the program when it is done.
    """
    how = How(rows_per_shard=rows_per_shard, shard_bytes=shard_bytes, workers=workers, on_error=on_error,
              strict=strict, work=work)  # fmt: skip
    serve_if_worker()
    _refuse(sources, how, lines)
    files = {family: file_systems.expand(sources[family]) for family in FAMILIES if sources.get(family)}
    piece_bytes = max(1, int(shard_bytes * LINE_BYTES))
    cut = {family: tsv_source.cut(found, piece_bytes) for family, found in files.items()}
    if lines is not None and "id" not in lines.columns:
        cut["downstream"] = _with_line_numbers(cut["downstream"], workers)

    def pieces(folder: Path, answers_sum: str) -> dict[str, list[Piece]]:
        listed = (str(folder), answers_sum) if answers_sum else ("", "")
        return {
            family: [tsv_source.TsvPiece(family, parts, lines, listed) for parts in found]
            for family, found in cut.items()
        }

    return build_pieces(str(out), pieces, how, negatives=negatives, answers=answers, own_ids=_own_ids(lines))


def build_pieces(
    out: str,
    pieces: Callable[[Path, str], Mapping[str, Sequence[Piece]]],
    how: How,
    *,
    negatives: Path | str | None = None,
    answers: Sequence[str] = (),
    own_ids: bool | None = None,
) -> Manifest:
    """Shards of any pieces. pieces(work directory, checksum of the list of answers in it) -> family -> its pieces.

    own_ids: of downstream rows, whether ids are those of the source. Raises as `build_shards`.
    """
    remote = file_systems.is_remote(out)
    target = Path(out) if remote else file_systems.local_path(out)
    with work_directory(out, how.work) as work:
        answers_sum = _write_answers(work, answers)
        jobs = _jobs(work, pieces(work, answers_sum), how, out if remote else "", answers_sum, bool(negatives))
        plan = xxhash.xxh3_128_hexdigest(" ".join(job.key() for job in jobs).encode())
        if not remote and was_placed(target, plan):
            return read_manifest(target)
        refuse_target(out, target)
        built = _run(jobs, how, work)
        manifest = _finish(work, jobs, built, how, negatives, answers_sum, own_ids)
        (work / JOURNAL / PLAN).write_text(plan, encoding="utf-8")
        if remote:
            _upload(work, out)
            clear(work, ())
        else:
            sync_tree(work)
            place(work, target)
    return manifest


def _write_answers(work: Path, answers: Sequence[str]) -> str:
    """Checksum of the list of answers; empty where there is none."""
    path = work / answer_list.FILE
    path.unlink(missing_ok=True)
    return answer_list.write_answer_list(path, answers) if answers else ""


def _refuse(sources: Mapping[str, Sequence[Path | str]], how: How, lines: object) -> None:
    if how.on_error not in ("stop", "quarantine"):
        raise ValueError(f"want on_error stop or quarantine, got {how.on_error!r}")
    unknown = set(sources) - set(FAMILIES)
    if unknown or not any(sources.values()):
        raise ValueError(f"want TSV files of {', '.join(FAMILIES)}; got {', '.join(sorted(unknown)) or 'none'}")
    if ("downstream" in sources) != (lines is not None) or (lines is not None and len(sources) > 1):
        raise ValueError("downstream files come alone, with what their lines are (lines)")


def refuse_target(out: str, target: Path) -> None:
    """Raises ValueError where something is there."""
    if file_systems.is_remote(out):
        if file_systems.exists(f"{out}/{MANIFEST}"):
            raise ValueError(f"{out}: shards are there already; give another --out")
    elif target.is_symlink():
        raise ValueError(f"{target}: is a symbolic link; remove it, or give the place that it leads to")
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty directory; give another --out or remove it")


def _own_ids(lines: task_rows.TaskLines | None) -> bool | None:
    return None if lines is None else "id" in lines.columns


def _with_line_numbers(
    pieces: Sequence[tuple[tsv_source.Part, ...]], workers: int
) -> list[tuple[tsv_source.Part, ...]]:
    """Rows without an id are called by their line's number: lines are counted before they are read."""
    parts = [part for piece in pieces for part in piece]
    starts: list[int] = []
    seen: Counter[str] = Counter()
    for part, count in zip(parts, run_jobs(tsv_source.count_lines, parts, workers), strict=True):
        starts.append(seen[part.file.location] + 1)
        seen[part.file.location] += count
    first = iter(starts)
    return [tuple(dataclasses.replace(part, first_line=next(first)) for part in piece) for piece in pieces]


def _jobs(
    work: Path, pieces: Mapping[str, Sequence[Piece]], how: How, upload: str, answers_sum: str, given: bool
) -> list[Job]:
    jobs = []
    for family in FAMILIES:
        texts = family == "vision_language" and not given
        rules = Rules(how.on_error, how.strict, how.rows_per_shard, how.shard_bytes, texts)
        listed = (work, answers_sum) if answers_sum else None
        for number, piece in enumerate(pieces.get(family, ())):
            jobs.append(Job(work, number, family, piece, rules, listed, upload))
    return jobs


def _run(jobs: Sequence[Job], how: How, work: Path) -> list[Built]:
    """What became of each piece, done now or before. Raises ValueError at the first bad record, in order."""
    found = {k: done for k, job in enumerate(jobs) if (done := done_before(job)) is not None}
    _drop_what_is_not_done(work, [jobs[k] for k in found], list(found.values()))
    left = [k for k in range(len(jobs)) if k not in found]
    progress = Progress(sum(job.piece.num_bytes for job in jobs) >> 20, "building shards", "MB")
    progress.skip(sum(jobs[k].piece.num_bytes for k in found) / (1 << 20))
    bad = 0
    try:
        for k, done in zip(left, run_jobs(_attempt, [jobs[k] for k in left], how.workers), strict=True):
            if isinstance(done, BadRecord):
                raise _stopped(jobs, found, k, done)
            found[k] = done
            bad += sum(part.quarantined for part in done.parts)
            progress.note = f"bad lines so far: {bad}" if bad else ""
            progress.add(jobs[k].piece.num_bytes / (1 << 20))
    finally:
        progress.close()
    return [found[k] for k in range(len(jobs))]


def _attempt(job: Job) -> Built | BadRecord:
    """A bad record as a value: an exception of one piece must not hide that of an earlier one."""
    try:
        return build_piece(job)
    except BadRecord as error:
        return error


def _stopped(jobs: Sequence[Job], found: Mapping[int, Built], k: int, error: BadRecord) -> ValueError:
    """The message of a bad record. All pieces before it are done."""
    if error.number is None:
        return ValueError(error.reason)
    lines = notes.Lines(jobs[:k], [found[before] for before in range(k)])
    return ValueError(f"{lines.place(jobs[k], At(error.part, error.number), error.place)}: {error.reason}")


def _drop_what_is_not_done(work: Path, jobs: Sequence[Job], built: Sequence[Built]) -> None:
    arrow = {shard.file for done in built for shard in done.shards}
    clear(work, {*arrow, JOURNAL, answer_list.FILE})
    stems = {job.stem for job in jobs} | {ITEMS}
    clear(work / JOURNAL, {path.name for path in (work / JOURNAL).iterdir() if path.name.split(".")[0] in stems})


def _finish(
    work: Path, jobs: Sequence[Job], built: Sequence[Built], how: How, negatives: Path | str | None,
    answers_sum: str, own_ids: bool | None,
) -> Manifest:  # fmt: skip
    lines = notes.Lines(jobs, built)
    _one_side(jobs, built, lines)
    sums = _negatives(work, Path(negatives) if negatives else None, jobs)
    notes.gather(work, jobs, lines)
    _doubt_negatives(work, jobs, built, lines, how.strict)
    families = {}
    for family in dict.fromkeys(job.family for job in jobs):
        mine = [(job, done) for job, done in zip(jobs, built, strict=True) if job.family == family]
        families[family] = _family(family, mine, own_ids if family == "downstream" else None)
        write_index(work, family, (entries for job, done in mine for entries in entries_of(job, done)))
    name = fingerprint(families, sums, answers_sum)
    manifest = Manifest(families=families, negatives=sums, fingerprint=name, answers=answers_sum)
    manifest.write(work)
    return manifest


def _one_side(jobs: Sequence[Job], built: Sequence[Built], lines: notes.Lines) -> None:
    """Raises ValueError where pictures of the image family differ in size: their codes would not line up."""
    first: dict[int, str] = {}
    for job, done in zip(jobs, built, strict=True):
        for side, at in done.sides.items():
            first.setdefault(side, f"{lines.place(job, at)}: {side} x {side}")
    if len(first) > 1:
        one, other = list(first.values())[:2]
        raise ValueError(f"{other}: image: want all pictures of one size, but {one}")


def _negatives(work: Path, given: Path | None, jobs: Sequence[Job]) -> dict[str, str]:
    """Checksum of each file of negatives that was written."""
    if given is not None:
        return write_negatives(given, work)
    files = [job.note(0, TEXTS) for job in jobs if job.rules.texts]
    if not files:
        return {}
    texts = NegativeTexts()
    for path in files:
        texts.add_file(path)
    return derive_negatives(texts, work)


def _doubt_negatives(work: Path, jobs: Sequence[Job], built: Sequence[Built], lines: notes.Lines, strict: bool) -> None:
    """Warn, at the first row that needs one, where no wrong caption or answer can be made. Raises it where strict."""
    found = read_negatives(work)
    for kind, doubt in (
        ("caption", without_negative_caption(found.captions)),
        ("qa", without_negative_answer(found.type2ans)),
    ):
        pairs = zip(jobs, built, strict=True)
        job, done = next(((job, done) for job, done in pairs if kind in done.first), (None, None))
        if doubt is None or job is None or done is None:
            continue
        at = done.first[kind]
        message = f"{lines.place(job, at)}: {doubt}"
        if strict:
            raise ValueError(f"{message} (--strict)")
        notes.add_warning(work, jobs, job.piece.files[at.part].location, encoded(f"{message}\n"))
        done.parts[at.part].warnings += 1


def _family(family: str, mine: Sequence[tuple[Job, Built]], own_ids: bool | None) -> Family:
    shards = [shard for _, done in mine for shard in done.shards]
    counts: dict[str, list[int]] = {}
    names: dict[str, str] = {}
    types, records = Counter[str](), 0
    for job, done in mine:
        types += done.types
        for file, part in zip(job.piece.files, done.parts, strict=True):
            names[file.location] = file.name
            before = counts.get(file.location, [0, 0, 0])
            new = (part.rows, part.quarantined, part.warnings)
            counts[file.location] = [a + b for a, b in zip(before, new, strict=True)]
            records += part.records
    if not shards:
        first = mine[0][0].piece.files[0].location
        way = "use --on-error stop to see what is wrong"
        raise ValueError(f"{first}: none of {records} {family} lines is good; {way}")
    return Family(
        rows=sum(shard.rows for shard in shards),
        types={kind: types[kind] for kind in (*TYPES, *types) if types[kind]},
        quarantined=sum(quarantined for _, quarantined, _ in counts.values()),
        warnings=sum(warnings for _, _, warnings in counts.values()),
        unanswered=sum(done.unanswered for _, done in mine),
        unlisted=sum(done.unlisted for _, done in mine),
        digest=chained(shards),
        own_ids=own_ids,
        sources=tuple(Source(names[location], *numbers) for location, numbers in counts.items()),
        shards=tuple(shards),
    )


def _upload(work: Path, out: str) -> None:
    """All but Arrow files, which are there; the manifest last: with it the shards are complete."""
    files = [path for path in sorted(work.rglob("*")) if path.is_file() and JOURNAL not in path.parts]
    for path in sorted(files, key=lambda path: path == work / MANIFEST):
        file_systems.upload(path, f"{out.rstrip('/')}/{path.relative_to(work)}")
