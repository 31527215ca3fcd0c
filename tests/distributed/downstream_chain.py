"""Command line after command line in one process, which has imported everything once: `python downstream_chain.py`.

Reads a JSON list of command lines (lists of words) from standard input; prints what each prints between marks.
"""

from __future__ import annotations

import json
import sys

from ofa_ds.cli import main

MARK = "---- command ----"

if __name__ == "__main__":
    for arguments in json.load(sys.stdin):
        print(MARK, flush=True)
        code = main(arguments)
        if code:
            sys.exit(f"{arguments}: exit code {code}")
