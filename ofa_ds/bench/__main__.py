"""`python -m ofa_ds.bench WHAT`: measures beside the alternative, in one run; prints a table, or JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ofa_ds.bench", description=__doc__.split(": ")[1])
    benches = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    step = benches.add_parser("step", help="forward + backward of tiny on one thread, beside the original's way")
    step.add_argument("--repeats", type=int, default=7, help="of the pair (default 7)")
    step.add_argument("--mixed-repeats", type=int, default=1, help="of the mixed micro-batch (default 1)")
    saves = benches.add_parser("checkpoint", help="save, reshard and export beside DeepSpeed's and torch's own ways")
    saves.add_argument("--folder", type=Path, help="where 25 GB may be written for a while (default: a temporary one)")
    saves.add_argument("--preset", default="base", help="size of the model (default base, cut to 173 M parameters)")
    formats = benches.add_parser("data", help="the same rows written and read by our shards and by other formats")
    formats.add_argument("--records", type=int, default=20_000, help="drawn, or of the file at most (default 20000)")
    formats.add_argument("--tsv", type=Path, help="a file of vision-language rows in place of drawn ones")
    formats.add_argument("--repeats", type=int, default=3, help="of each way (default 3)")
    formats.add_argument("--folder", type=Path, help="where 6 GB may be written for a while (default: a temporary one)")
    rows = benches.add_parser("rows", help="one row of shards at random, beside Arrow's own row access")
    rows.add_argument("--shards", type=Path, help="a directory of shards (default: small scenes, drawn for it)")
    rows.add_argument("--repeats", type=int, default=7, help="of each way (default 7)")
    verifying = benches.add_parser("verify", help="checksums of shards, beside a plain read of the same files")
    verifying.add_argument("--shards", type=Path, required=True, help="a directory of shards, of some gigabytes")
    verifying.add_argument("--repeats", type=int, default=3, help="of each way (default 3)")
    decoding = benches.add_parser("decode", help="JPEGs decoded and resized, exactly and by the DCT, beside Pillow")
    decoding.add_argument("--tsv", type=Path, help="a file with JPEGs in its second column, beside drawn ones")
    decoding.add_argument("--pictures", type=int, default=100, help="of the file and of each size (default 100)")
    decoding.add_argument("--repeats", type=int, default=5, help="of each way (default 5)")
    coding = benches.add_parser("codes", help="pictures into image codes on one thread, beside the original's way")
    coding.add_argument("--pictures", type=int, default=4, help="of a round (default 4)")
    coding.add_argument("--repeats", type=int, default=5, help="rounds of both ways (default 5)")
    feeding = benches.add_parser("loader", help="batches on their way to training, beside torch's DataLoader")
    feeding.add_argument("--repeats", type=int, default=3, help="of each measurement (default 3)")
    remote = benches.add_parser("remote", help="rows of shards in S3 behind a link with latency and a bandwidth")
    remote.add_argument("--latency-ms", type=float, default=30.0, help="that the link adds (default 30)")
    remote.add_argument("--mb-per-s", type=float, default=10.0, help="that it carries at most (default 10)")
    scale = benches.add_parser("scale", help="opening and reading a billion rows, their order, their shuffle")
    scale.add_argument("--shards", type=int, default=10_000, help="of 100,000 rows each (default 10,000)")
    scale.add_argument("--workers", type=int, default=4, help="that open them at once (default 4)")
    scale.add_argument("--repeats", type=int, default=5, help="of each order (default 5)")
    scale.add_argument("--folder", type=Path, help="where 2 GB may be written for a while (default: a temporary one)")
    rewards = benches.add_parser("cider", help="the reward of SCST for 320 captions, beside the library's scorer")
    rewards.add_argument("--repeats", type=int, default=7, help="of each way (default 7)")
    critical = benches.add_parser("scst", help="the parts of an SCST micro-batch of tiny on one thread")
    critical.add_argument("--repeats", type=int, default=3, help="of each part (default 3)")
    answers = benches.add_parser("generate", help="captions and candidate answers beside the original's way")
    answers.add_argument("--repeats", type=int, default=3, help="of each way (default 3)")
    answers.add_argument("--questions", type=int, default=2, help="that the candidates answer at once (default 2)")
    answers.add_argument("--chunks", type=int, default=4, help="of the original's 157 that are timed (default 4)")
    answers.add_argument("--only", choices=("captions", "candidates"), default="both")
    painting = benches.add_parser("text_to_image", help="24 pictures of 1,024 codes beside sampling without caches")
    painting.add_argument("--repeats", type=int, default=1, help="of ours (default 1)")
    build = benches.add_parser("construction", help="a model built in pieces on the CPU: seconds and memory of a rank")
    build.add_argument("--preset", default="large", help="its size (default large); 6b takes 14 GB with two ranks")
    build.add_argument("--ranks", type=int, default=2, help="on this host (default 2)")
    build.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    many = benches.add_parser("many-ranks", help="what the host does around a collective of a layer")
    many.add_argument("--repeats", type=int, default=5, help="of each way (default 5)")
    for bench in benches.choices.values():
        bench.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.what == "step":
        from ofa_ds.bench.step import bench_step, table

        if min(options.repeats, options.mixed_repeats) < 1:
            parser.error("--repeats and --mixed-repeats: want at least 1")
        result = bench_step(options.repeats, options.mixed_repeats)
    elif options.what == "generate":
        from ofa_ds.bench.generate import bench_generate, table

        if min(options.repeats, options.questions, options.chunks) < 1:
            parser.error("--repeats, --questions and --chunks: want at least 1")
        result = bench_generate(options.repeats, options.questions, options.chunks, options.only)
    elif options.what == "data":
        from ofa_ds.bench.data_formats import bench_formats, table

        if min(options.records, options.repeats) < 1:
            parser.error("--records and --repeats: want at least 1")
        try:
            result = bench_formats(options.records, options.repeats, options.tsv, options.folder)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    elif options.what == "rows":
        from ofa_ds.bench.rows import bench_rows, table

        if options.repeats < 1:
            parser.error("--repeats: want at least 1")
        try:
            result = bench_rows(options.shards, options.repeats)
        except ValueError as error:
            parser.error(f"--shards: {error}")
    elif options.what == "verify":
        from ofa_ds.bench.verify import bench_verify, table

        if options.repeats < 1:
            parser.error("--repeats: want at least 1")
        try:
            result = bench_verify(options.shards, options.repeats)
        except (ValueError, RuntimeError) as error:
            parser.error(f"--shards: {error}")
    elif options.what == "decode":
        from ofa_ds.bench.decode import bench_decode, table

        if min(options.pictures, options.repeats) < 1:
            parser.error("--pictures and --repeats: want at least 1")
        try:
            result = bench_decode(options.tsv, options.pictures, options.repeats)
        except (OSError, ValueError) as error:
            parser.error(f"--tsv: {error}")
    elif options.what == "codes":
        from ofa_ds.bench.codes import bench_codes, table

        if min(options.pictures, options.repeats) < 1:
            parser.error("--pictures and --repeats: want at least 1")
        result = bench_codes(options.repeats, pictures=options.pictures)
    elif options.what == "loader":
        from ofa_ds.bench.loader import bench_loader, table

        if options.repeats < 1:
            parser.error("--repeats: want at least 1")
        result = bench_loader(options.repeats)
    elif options.what == "remote":
        from ofa_ds.bench.remote import bench_remote, table

        if options.latency_ms < 0 or options.mb_per_s <= 0:
            parser.error("--latency-ms: want at least 0; --mb-per-s: want more than 0")
        result = bench_remote(options.latency_ms, options.mb_per_s)
    elif options.what == "scale":
        from ofa_ds.bench.scale import bench_scale, table

        if min(options.shards, options.workers, options.repeats) < 1:
            parser.error("--shards, --workers and --repeats: want at least 1")
        result = bench_scale(options.shards, options.workers, options.repeats, options.folder)
    elif options.what == "scst":
        from ofa_ds.bench.scst import bench_scst, table

        if options.repeats < 1:
            parser.error("--repeats: want at least 1")
        result = bench_scst(options.repeats)
    elif options.what == "cider":
        from ofa_ds.bench.cider import bench_cider, table

        if options.repeats < 1:
            parser.error("--repeats: want at least 1")
        result = bench_cider(options.repeats)
    elif options.what == "text_to_image":
        from ofa_ds.bench.text_to_image import bench_text_to_image, table

        if options.repeats < 1:
            parser.error("--repeats: want at least 1")
        result = bench_text_to_image(options.repeats)
    elif options.what == "many-ranks":
        from ofa_ds.bench.many_ranks import bench_many_ranks, table

        if options.repeats < 1:
            parser.error("--repeats: want at least 1")
        result = bench_many_ranks(options.repeats)
    elif options.what == "construction":
        from ofa_ds.bench.construction import bench_construction, table

        result = bench_construction(options.preset, options.ranks, options.precision)
    else:
        from ofa_ds.bench.checkpoint import bench_checkpoint, table

        result = bench_checkpoint(options.preset, options.folder)
    print(json.dumps(result) if options.json else table(result))


if __name__ == "__main__":
    main()
