"""`ofa-ds shards verify`, `stats`, `merge`, `split`, `shuffle`: what is done with shards that are there."""

from __future__ import annotations

import argparse
from pathlib import Path

from ofa_ds.cli.parser import Commands, UsageError, command, drawing, natural
from ofa_ds.cli.shards_build import add_shard_bytes, add_workers


def add_tools(shards: Commands) -> None:
    verify = command(
        shards, "verify", _verify, "Check every checksum, row and picture; --no-decode checks checksums alone.",
        example="ofa-ds shards verify data/shards --workers 8",
    )  # fmt: skip
    verify.add_argument("dir", type=here, metavar="DIR", help="shards")
    verify.add_argument(
        "--no-decode",
        action="store_true",
        help="checksums and counts alone, by workers that are threads",
    )
    add_workers(verify)
    stats = command(
        shards, "stats", _stats, "Say what is in shards: rows, lengths, sizes, boxes, pictures that are there twice.",
        example="ofa-ds shards stats data/shards --vocab data/vocab --png stats.png",
    )  # fmt: skip
    stats.add_argument("dir", type=here, metavar="DIR", help="shards")
    stats.add_argument("--vocab", type=Path, metavar="DIR", help="vocabulary, to see how well it covers the texts")
    stats.add_argument("--json", action="store_true", help="print JSON in place of a table")
    stats.add_argument("--png", type=drawing, metavar="FILE", help="draw the distributions here")
    add_workers(stats)
    merge = command(
        shards, "merge", _merge, "Put several directories of shards together, one's rows after another's.",
        example="ofa-ds shards merge data/coco data/cc12m --out data/both",
    )  # fmt: skip
    merge.add_argument("dirs", type=here, nargs="+", metavar="DIR", help="shards, two or more")
    _out(merge)
    split = command(
        shards, "split", _split, "Divide the rows of shards at random into directories that share none.",
        example="ofa-ds shards split data/shards --part train=rest --part heldout=0.02 --by-image --out data/split",
    )  # fmt: skip
    split.add_argument("dir", type=here, metavar="DIR", help="shards")
    split.add_argument(
        "--part", action="append", required=True, type=_part, metavar="NAME=SHARE",
        help="directory in --out, and a fraction such as 0.02, a number of rows of each family, or rest; twice or more",
    )  # fmt: skip
    split.add_argument(
        "--by-image", action="store_true", help="rows of the same picture go to the same part; fractions hold about"
    )
    _seed(split)
    _out(split)
    shuffle = command(
        shards, "shuffle", _shuffle, "Write the rows of shards in a random order.",
        example="ofa-ds shards shuffle data/shards --seed 7 --out data/shuffled",
    )  # fmt: skip
    shuffle.add_argument("dir", type=here, metavar="DIR", help="shards")
    _seed(shuffle)
    _out(shuffle)


def here(given: str) -> Path:
    """A path of this machine, for argparse."""
    if "://" in given:
        raise argparse.ArgumentTypeError(f"want a directory of this machine, got {given}; copy it here first")
    return Path(given)


def _out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=here, required=True, metavar="DIR", help="directory to make")
    if not parser.prog.endswith(" merge"):
        add_shard_bytes(parser)
    add_workers(parser)


def _seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=natural, default=1, metavar="N", help="another seed draws otherwise")


def _part(given: str) -> tuple[str, str]:
    """`train=0.98` -> its name and share, for argparse."""
    name, mark, share = given.partition("=")
    if not mark or not name or not share:
        raise argparse.ArgumentTypeError(f"want NAME=SHARE such as train=0.98, heldout=5000, train=rest, got {given!r}")
    return name, share


def _verify(options: argparse.Namespace) -> int:
    from ofa_ds.data.shards_verify import verify_shards

    problems = verify_shards(options.dir, workers=options.workers, decode=not options.no_decode)
    for problem in problems:
        print(problem)
    right = "every checksum is right" if options.no_decode else "every checksum, row and picture is right"
    print(f"{options.dir}: {f'problems: {len(problems)}' if problems else right}")
    return 1 if problems else 0


def _stats(options: argparse.Namespace) -> None:
    import json

    from ofa_ds.data.tools.stats import shards_stats
    from ofa_ds.data.tools.stats_report import as_json, table

    found = shards_stats(options.dir, vocab=options.vocab, workers=options.workers)
    print(json.dumps(as_json(found), indent=1, ensure_ascii=False) if options.json else table(found))
    if options.png:
        from ofa_ds.data.tools.stats_picture import draw

        draw(found, options.png)


def _merge(options: argparse.Namespace) -> None:
    from ofa_ds.data.tools.merge import merge_shards

    if len(options.dirs) < 2:
        raise UsageError(f"want two directories or more to merge, got {options.dirs[0]} alone")
    manifest = merge_shards(options.dirs, options.out, workers=options.workers)
    _say(options.out, manifest)


def _split(options: argparse.Namespace) -> None:
    from ofa_ds.data.tools.split import parse_shares, split_shards

    try:
        shares = parse_shares(options.part, by_image=options.by_image)
    except ValueError as error:
        raise UsageError(str(error)) from error
    made = split_shards(
        options.dir, options.out, shares, seed=options.seed, by_image=options.by_image,
        shard_bytes=options.shard_bytes, workers=options.workers,
    )  # fmt: skip
    for name, manifest in made.items():
        _say(options.out / name, manifest)


def _shuffle(options: argparse.Namespace) -> None:
    from ofa_ds.data.tools.shuffle import shuffle_shards

    how = {"seed": options.seed, "shard_bytes": options.shard_bytes, "workers": options.workers}
    _say(options.out, shuffle_shards(options.dir, options.out, **how))


def _say(out: Path, manifest: object) -> None:
    from ofa_ds.data.manifest import Manifest

    assert isinstance(manifest, Manifest)
    counts = ", ".join(f"{part.rows} {family}" for family, part in manifest.families.items())
    print(f"{out}: rows: {counts}; fingerprint {manifest.fingerprint}")
