"""Contenders in a process of their own: one that hangs, or breaks the device for all after it, is left out by name.

python kernels/speed_watch.py [FLAGS of bench.py] --skip N       the process: a JSON line as each begins and ends
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

PATIENCE_S = 120.0
"""For one contender, building included."""
BROKEN = ("CUDA error", "illegal memory access", "device-side assert", "unspecified launch failure")
"""In what a contender raised: nothing runs on the device in that process any more."""

Row = dict[str, Any]


def watched(command: Sequence[str], *, seconds: float, patience_s: float = PATIENCE_S) -> Iterator[Row]:
    """The rows of `command`, which prints [number, row] a line, twice each; it begins anew after what ended it.

    Ends after `seconds`, too; what then was under way is the last row. Each row has a `problem` or its times.
    """
    skip, until = 0, time.monotonic() + seconds
    while True:
        under_way: tuple[int, Row] | None = None
        end = ""
        for number, row in _lines(command, skip, until, patience_s):
            if number < 0:
                end = row["problem"]
                break
            under_way = number, row
            if row["problem"] or any(row["both_us"]):
                skip, under_way = number + 1, None
                yield row
                if any(text in row.get("problem", "") for text in BROKEN):
                    end = "broken"
                    break
        if under_way is not None:
            yield under_way[1] | {"problem": end or "its process ended"}
            skip = under_way[0] + 1
        elif end != "broken":  # it has done all it had, or cannot even begin
            if end:
                yield {"operator": "all that is left", "size": "", "rows": 0, "contender": "", "problem": end}
            return
        if time.monotonic() >= until:
            return


def _lines(command: Sequence[str], skip: int, until: float, patience_s: float) -> Iterator[tuple[int, Row]]:
    """What one process says; number -1: how it ended, where that was not well. It is gone afterwards."""
    process = subprocess.Popen([*command, "--skip", str(skip)], stdout=subprocess.PIPE, text=True)
    said: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for text in process.stdout:
            said.put(text)
        said.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            left_s = until - time.monotonic()
            try:
                text = said.get(timeout=max(0.0, min(patience_s, left_s)))
            except queue.Empty:
                why = "out of time" if left_s <= patience_s else f"took more than {patience_s:.0f} s"
                yield -1, {"problem": why}
                return
            if text is None:
                code = process.wait()
                if code:
                    yield -1, {"problem": f"ended its process with {code}"}
                return
            try:
                number, row = json.loads(text)
            except ValueError:  # another line of a library
                print(text, end="", file=sys.stderr)
                continue
            yield number, row
    finally:
        process.kill()
        process.wait()


def add_filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where speed is measured")
    parser.add_argument("--small", action="store_true", help="speed at tiny shapes: whether all of it runs")
    for name, about in (("size", "sizes of this name"), ("case", "examples: mix, 8 x 980"), ("contender", "names")):
        parser.add_argument(f"--{name}", nargs="+", default=[], metavar="NAME", help=f"of speed: {about}")


def arguments_of(options: argparse.Namespace) -> list[str]:
    """The command line of the process."""
    found = ["--device", options.device, *(["--small"] if options.small else [])]
    for name in ("only", "size", "case", "contender"):
        values = getattr(options, name)
        found += [f"--{name}", *values] if values else []
    return [sys.executable, __file__, *found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_filters(parser)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--skip", type=int, default=0)
    options = parser.parse_args()
    import speed

    names = ("only", "size", "case", "contender")
    wanted = speed.Filter(**{name: tuple(getattr(options, name)) for name in names})
    for number, each in speed.run(options.device, options.small, wanted, options.skip):
        print(json.dumps([number, speed.row(each)]), flush=True)


if __name__ == "__main__":
    main()
