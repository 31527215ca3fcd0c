"""python -m tests.chaos [--seeds 0-34] [--stand-in] [--faults 2] [--out FILE] [--work DIR]   the whole chaos suite

Each seed is one run under `ofa-ds launch --retries` on two or three hosts that are network namespaces (root), with real
ZeRO-3 training; --stand-in: with a program that only behaves like a rank. 35 seeds meet 70 faults, each kind 5 times,
in about half an hour on two cores. A seed gives the same hosts, runner, faults and steps every time.
"""

from __future__ import annotations

import argparse
import collections
import json
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from field import field  # noqa: E402
from plans import KINDS, RUNNERS, plan  # noqa: E402
from play import Outcome, play, say  # noqa: E402
from references import References  # noqa: E402


def seeds_of(text: str) -> list[int]:
    """`0-3,7` -> [0, 1, 2, 3, 7]."""
    ranges = [part.partition("-") for part in text.split(",")]
    return [seed for first, dash, last in ranges for seed in range(int(first), int(last if dash else first) + 1)]


def table(outcomes: list[Outcome]) -> str:
    """How many faults of each kind struck, and in how many of those runs everything held."""
    struck, held = collections.Counter(), collections.Counter()
    for outcome in outcomes:
        for fault in outcome.struck:
            struck[fault.kind] += 1
            held[fault.kind] += not outcome.problems
    rows = [f"{kind:<14}{struck[kind]:>7}{held[kind]:>6}" for kind in KINDS]
    total = f"{'all':<14}{struck.total():>7}{held.total():>6}"
    runs = f"{sum(not one.problems for one in outcomes)} of {len(outcomes)} runs held"
    return "\n".join([f"{'fault':<14}{'struck':>7}{'held':>6}", *rows, total, runs])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--seeds", type=seeds_of, default=list(range(35)), help="such as 0-34 or 3,8")
    parser.add_argument("--stand-in", action="store_true", help="no training: seconds a run")
    parser.add_argument("--faults", type=int, default=2, help="of each run")
    parser.add_argument("--runner", action="append", choices=RUNNERS, help="draw from these, not from all three")
    parser.add_argument("--work", type=Path, help="where to work, and to leave what explains failures")
    parser.add_argument("--out", type=Path, help="a line of JSON for each run")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the hosts go with the block below
    work = options.work or Path(tempfile.mkdtemp(prefix="ofa-chaos-"))
    outcomes = []
    with field(3, work) as stage:
        references = References(stage)
        for seed in options.seeds:
            drawn = plan(seed, faults_each=options.faults, runners=tuple(options.runner or RUNNERS))
            outcomes.append(play(stage, drawn, references, stands_in=options.stand_in))
            say(outcomes[-1])
            if options.out:
                with open(options.out, "a") as out:
                    kinds = [fault.kind for fault in outcomes[-1].struck]
                    out.write(json.dumps({"seed": seed, "struck": kinds, "problems": outcomes[-1].problems}) + "\n")
    say(table(outcomes))
    say(f"work: {work}")
    return int(any(outcome.problems for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
