"""Reads rows of remote shards in an order of its own until it is killed, or until all are right; prints what it read.

argument 1: location      2: seed      3: rows to read
"""

from __future__ import annotations

import random
import sys

from ofa_ds.data.shard_writer import row_digest
from ofa_ds.data.shards import Shards

if __name__ == "__main__":
    location, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    draw = random.Random(seed)
    print("ready", flush=True)
    shards = Shards(location)
    rows = [(family, i) for family, total in shards.families.items() for i in range(total)]
    for start in range(0, count, 5):
        wanted = [rows[draw.randrange(len(rows))] for _ in range(min(5, count - start))]
        shards.announce(wanted)
        for family, i in wanted:
            print(family, i, row_digest(shards.row(family, i)), flush=True)
