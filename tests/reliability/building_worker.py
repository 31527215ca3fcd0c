"""Builds shards from the files of a folder, once it is told to: for tests that kill it.

argument 1: folder of sources      2: target     3: workers
"""

from __future__ import annotations

import sys
from pathlib import Path

from ofa_ds.data.building.build import build_shards

if __name__ == "__main__":
    folder, out, workers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    print("ready", flush=True)
    sys.stdin.readline()
    sources = {"vision_language": [folder / "vl.tsv"], "text": [folder / "*.text.tsv", folder / "packed.tsv.gz"]}
    build_shards(out, **sources, workers=workers, on_error="quarantine", shard_bytes=20_000, rows_per_shard=40)
