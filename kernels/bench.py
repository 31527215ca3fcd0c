"""Time every kernel beside the alternatives; compile it for GPUs that need not be there; say what it takes at best.

    python kernels/bench.py [--json] [--only NAME ...] [--size NAME ...] [--case NAME ...] [--contender NAME ...]
    python kernels/bench.py --roofline                  by arithmetic; --json: counts for kernels/instructions.json
    python kernels/bench.py --host [--json]             launches left out: what calls cost the host
    python kernels/bench.py --compile [--every] [--json] [--arch sm_80 sm_90] [--only NAME]
    python kernels/bench.py --instructions [--every] [--json] [--arch sm_80 sm_90] [--only NAME]

Speed wants a GPU and prints each contender as it is done, with --json one object a line; a contender that fails, hangs
or breaks the device is named and the others go on. --compile and --instructions are those of compile_gate.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict

import speed
import torch
from compile_gate import SHARED_LIMIT, run_compile, run_instructions
from speed_watch import add_filters, arguments_of, watched


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=__doc__, formatter_class=_Help)
    parser.add_argument("--compile", action="store_true", help="compile every kernel for --arch; needs no GPU")
    parser.add_argument("--instructions", action="store_true", help="count each main loop's, beside those before")
    parser.add_argument("--every", action="store_true", help="attention at head dims that no preset has, too")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    parser.add_argument("--arch", nargs="+", default=list(SHARED_LIMIT), choices=list(SHARED_LIMIT))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="kernels or operators that contain NAME")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--roofline", action="store_true", help="print what each kernel takes at best, by arithmetic")
    parser.add_argument("--host", action="store_true", help="what calls cost the host beside torch's; needs no GPU")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of speed: no more than that in all")
    add_filters(parser)
    options = parser.parse_args()
    if options.roofline:
        import roofline

        if options.json:
            roofline.print_instructions(options.workers)
        else:
            roofline.print_table()
        return 0
    if options.host:
        import host

        costs = host.run()
        print(json.dumps([asdict(each) for each in costs]) if options.json else host.table(costs))
        return 0
    if options.compile or options.instructions:
        options.only = " ".join(options.only)
        return run_compile(options) if options.compile else run_instructions(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("speed is measured on a GPU and torch finds none; --compile and --roofline need none")
    return run_speed(options)


def run_speed(options: argparse.Namespace) -> int:
    """Prints what is measured; 1 where nothing was."""
    if not options.json:
        print(speed.HEAD, flush=True)
    results = []
    for row in watched(arguments_of(options), seconds=options.seconds):
        results.append(speed.Measured(**row))
        print(json.dumps(row) if options.json else speed.line(results[-1]), flush=True)
    if not options.json:
        print("", *speed.slower(results), sep="\n")
    return 0 if any(not each.problem for each in results) else 1


class _Help(argparse.RawDescriptionHelpFormatter):
    pass


if __name__ == "__main__":
    sys.exit(main())
