"""One hop of a run that moves: `torchrun chain_worker.py FOLDER NUMBER`. Loads what the last one saved, goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from chain_cases import ACCUMULATION, FIRST_STEPS, HOPS, STEPS_A_HOP
from engine_worker import build_engine, ds_config, make_ofa, train_ofa

from ofa_ds import checkpoint
from ofa_ds.cli.main import leave
from ofa_ds.engine.process_group import init_distributed, leave_distributed


def main(folder: Path, hop: int) -> None:
    ranks = init_distributed("cpu")
    world_size, stage = HOPS[hop]
    accumulation = ACCUMULATION[hop]
    engine = build_engine(ranks, make_ofa, ds_config(stage), accumulation)
    result = {}
    if hop == 0:
        done, steps = 0, FIRST_STEPS
    else:
        done, steps = FIRST_STEPS + (hop - 1) * STEPS_A_HOP, STEPS_A_HOP
        manifest = checkpoint.load(engine, folder / f"hop_{hop - 1}" / f"step_{done:08d}")
        assert (manifest.step, engine.num_updates) == (done, done)
        checkpoint.save(engine, folder / f"loaded_{hop}", done, extra={})
    losses, _ = train_ofa(engine, steps, accumulation, world_size, done)
    result["losses"] = losses
    checkpoint.save(engine, folder / f"hop_{hop}", done + steps, extra={})
    if hop == 0:  # where the run would have come without moving
        result["stayed"], _ = train_ofa(engine, STEPS_A_HOP * (len(HOPS) - 1), accumulation, world_size, steps)
    if ranks.rank == 0:
        (folder / f"results_{world_size}.json").write_text(json.dumps(result))
    leave_distributed()
    leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
