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
    rows = benches.add_parser("data", help="one row of shards at random, beside Arrow's own row access")
    rows.add_argument("--shards", type=Path, help="a directory of shards (default: small scenes, drawn for it)")
    rows.add_argument("--repeats", type=int, default=7, help="of each way (default 7)")
    for bench in (step, saves, rows):
        bench.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.what == "step":
        from ofa_ds.bench.step import bench_step, table

        if min(options.repeats, options.mixed_repeats) < 1:
            parser.error("--repeats and --mixed-repeats: want at least 1")
        result = bench_step(options.repeats, options.mixed_repeats)
    elif options.what == "data":
        from ofa_ds.bench.data import bench_data, table

        if options.repeats < 1:
            parser.error("--repeats: want at least 1")
        try:
            result = bench_data(options.shards, options.repeats)
        except ValueError as error:
            parser.error(f"--shards: {error}")
    else:
        from ofa_ds.bench.checkpoint import bench_checkpoint, table

        result = bench_checkpoint(options.preset, options.folder)
    print(json.dumps(result) if options.json else table(result))


if __name__ == "__main__":
    main()
