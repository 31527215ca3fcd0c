"""One rank of a run that has no more memory from some step on: a real limit, a micro-batch that is too large for it.

python -m torch.distributed.run ... out_of_memory_worker.py RANK STEP RECIPE [KEY=VALUE ...]
"""

from __future__ import annotations

import os
import resource
import sys
from typing import Any

from ofa_ds.batch import repeated
from ofa_ds.cli.main import leave, main
from ofa_ds.train import trainer
from ofa_ds.train.memory_limits import host_memory

COPIES = 200
ROOM = 64 << 20
"""Bytes of address space beyond what is taken when the step begins."""


def limited(rank: int, at_step: int) -> None:
    taken, count = trainer.train_step, 0

    def train_step(engine: Any, micro_batches: list[Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == at_step and os.environ["RANK"] == str(rank):
            micro_batches[:] = [repeated(batch, COPIES) for batch in micro_batches]
            size = host_memory()["virtual"] + ROOM
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
        return taken(engine, micro_batches, *args, **kwargs)

    trainer.train_step = train_step


if __name__ == "__main__":
    limited(int(sys.argv[1]), int(sys.argv[2]))
    leave(main(["pretrain", *sys.argv[3:]]))
