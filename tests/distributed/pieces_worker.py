"""What each rank of test_in_pieces.py runs: `torchrun ... pieces_worker.py FOLDER JOB...`. Rank 0 writes results."""

from __future__ import annotations

import dataclasses
import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from batches import random_batch
from deepspeed.utils import groups
from engine_cases import VOCAB, result_file
from engine_worker import OPTIM, TRAIN, different, dispose, state_of
from pieces_cases import LONG_SAVED, LONG_STEPS, SAVED, START_MODEL, START_VOCAB, STEPS, start_value
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ofa_ds import checkpoint
from ofa_ds.cli.main import leave
from ofa_ds.config import BatchConfig, load_recipe
from ofa_ds.convert.commands import read_foreign
from ofa_ds.engine import coalesced
from ofa_ds.engine.config import derive_config, load_deepspeed_config
from ofa_ds.engine.construction import construct
from ofa_ds.engine.engine import Engine, build
from ofa_ds.engine.partition import MOMENTS
from ofa_ds.engine.process_group import init_distributed, leave_distributed
from ofa_ds.model.config import ModelConfig, ViTConfig, model_config, preset
from ofa_ds.model.ofa import OFA
from ofa_ds.train.metrics import Window
from ofa_ds.train.objective import TokenLoss
from ofa_ds.train.starting import start_from
from ofa_ds.train.step import train_step

KINDS = "vtvdvt"
"""Of a global batch; the 6B has no image codes."""
LAYOUT = load_deepspeed_config("zero3_6b_a100")
SCALED = {
    **LAYOUT["zero_optimization"], "reduce_bucket_size": 13_500, "stage3_prefetch_bucket_size": 13_500,
    "stage3_param_persistence_threshold": 600, "stage3_max_live_parameters": 130_000,
    "stage3_max_reuse_distance": 130_000,
}  # fmt: skip
"""Its sizes in the narrow model's proportions: a decoder layer has 13.1 k elements, its matrices 1,024 and more. What
is smaller stays whole, which the 6B's own file does not ask for: so both kinds of parameters are there."""


def six_b(encoder: int, decoder: int, vit: int, **changes: Any) -> ModelConfig:
    """The 6B, that deep and narrow, with all that its recipe draws."""
    backbone = ViTConfig(resolution=32, patch_size=16, channels=16, layers=vit, heads=2)
    return preset(
        "6b", vocab_size=VOCAB, dim=32, ffn_dim=64, num_heads=2, encoder_layers=encoder, decoder_layers=decoder,
        backbone=backbone, dropout=0.1, attention_dropout=0.1, drop_path=0.1, **changes,
    )  # fmt: skip


FULL_DEPTH = six_b(36, 24, 24, activation_checkpointing=True)


def engine_of(ranks: Any, config: ModelConfig, **layout: Any) -> Engine:
    """Built in pieces."""
    given, rows = {**LAYOUT, "zero_optimization": SCALED, **layout}, rows_on(ranks)
    return build(
        lambda: OFA(config), deepspeed=given, optim=OPTIM, train=TRAIN, ranks=ranks, zero_init=True,
        batch=BatchConfig(global_rows=rows, micro_rows=rows // ranks.world_size),
    )  # fmt: skip


def rows_on(ranks: Any) -> int:
    """Of a global batch."""
    return len(KINDS) * (1 if len(KINDS) % ranks.world_size == 0 else 2)


def train(engine: Engine, first: int, last: int) -> list[float]:
    """Losses of these steps."""
    size = rows_on(engine.ranks) // engine.ranks.world_size
    at, losses, window = engine.ranks.rank * size, [], Window(engine.device)
    for step in range(first, last):
        kinds = (2 * KINDS)[at : at + size]
        batch = random_batch((step,), kinds=kinds, first=at, vocab_size=VOCAB, bucket=FULL_DEPTH.image_bucket_size)
        train_step(engine, [batch], window, TokenLoss())
        losses.append(window.close(engine.all_reduce)["loss"])
    return losses


def whole(ranks: Any, folder: Path, steps: int = STEPS, saved: int = SAVED) -> dict[str, Any]:
    """The 6B in full depth from its first step, and once more from the checkpoint on."""
    config = dataclasses.replace(FULL_DEPTH, dropout=0.0, attention_dropout=0.0, drop_path=0.0)  # drawn by each rank
    engine = engine_of(ranks, config)
    losses = train(engine, 0, saved)
    path = checkpoint.save(engine, folder / "saved", saved, extra={})
    losses += train(engine, saved, steps)
    want, layers = state_of(engine), engine.module
    depth = [len(layers.encoder.layers), len(layers.decoder.layers)]
    depth.append(len(layers.encoder.embed_images.transformer.resblocks))
    dispose(engine)
    engine = engine_of(ranks, config)
    checkpoint.load(engine, path)
    again = train(engine, saved, steps)
    apart = different(state_of(engine), want)
    dispose(engine)
    return {"losses": losses, "again": again, "apart": sorted(set().union(*ranks_gather(ranks, apart))), "depth": depth}


def ranks_gather(ranks: Any, value: list[str]) -> list[list[str]]:
    values: list[Any] = [None] * ranks.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def moved(ranks: Any, folder: Path, steps: int = STEPS, saved: int = SAVED) -> dict[str, Any]:
    config = dataclasses.replace(FULL_DEPTH, dropout=0.0, attention_dropout=0.0, drop_path=0.0)
    engine = engine_of(ranks, config)
    checkpoint.load(engine, folder / "saved" / f"step_{saved:08d}")
    losses = train(engine, saved, steps)
    dispose(engine)
    return {"losses": losses}


def recomputed(ranks: Any, folder: Path) -> list[dict[str, Any]]:
    """Two steps with and without recomputation, in each precision: losses, weights, moments, all that is saved."""
    results = []
    for precision in ("fp32", "bf16"):
        found = []
        for recompute in (False, True):
            layout = {"bf16": {"enabled": precision == "bf16"}}
            engine = engine_of(ranks, six_b(3, 2, 2, activation_checkpointing=recompute), **layout)
            calls = count_calls(engine.module.encoder.layers[0])
            losses = train(engine, 0, 2)
            found.append((losses, state_of(engine), calls[0]))
            dispose(engine)
        (plain, state, once), (again, state_again, twice) = found
        apart = different(state, state_again)
        results.append({"precision": precision, "losses": plain, "again": again, "apart": apart, "calls": [once, twice],
                        "tensors": len(state)})  # fmt: skip
    return results


def second_copy(ranks: Any, folder: Path) -> dict[str, Any]:
    """Three steps without a second copy of the weights, with one among each two ranks, and as DeepSpeed itself does it.

    The second has a checkpoint of other weights loaded before, whose copies are not to be used any more.
    """
    config = six_b(3, 2, 2, activation_checkpointing=True)
    results, want = {}, {}
    for name, size in (("without", 1), ("with", 2), ("DeepSpeed's own", 2)):
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # of the process: DeepSpeed makes it for one engine
        zero = {**SCALED, "zero_hpz_partition_size": size}
        engine = engine_of(ranks, config, zero_optimization=zero)
        if name == "without":
            path = checkpoint.save(engine, folder / "begun", 0, extra={})
        else:
            train(engine, 5, 6)
            checkpoint.load(engine, path)
        if name == "DeepSpeed's own":
            coalesced._Handle.wait = coalesced._wait_row_by_row
            coalesced.stage3.reduce_scatter_coalesced = coalesced.coalesced_collectives.reduce_scatter_coalesced
        copies = [0]

        def count(module: nn.Module, _: Any, engine: Engine = engine, copies: list[int] = copies) -> None:
            copies[0] = sum(each.ds_secondary_tensor is not None for each in engine.module.parameters())

        engine.module.decoder.layer_norm.register_forward_pre_hook(count)
        losses = train(engine, 0, 3)
        state = state_of(engine)
        want = want or state
        results[name] = {"losses": losses, "apart": different(state, want), "copies": copies[0]}
        dispose(engine)
    return results


def count_calls(module: nn.Module) -> list[int]:
    calls = [0]
    module.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return calls


class LiveBytes(TorchDispatchMode):
    """How much memory tensors hold that were made inside, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.device.type != "meta":
                self._see(each.untyped_storage())
        self.most = max(self.most, self.now)
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        self.now += size
        self._known[key] = weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.now -= size


def built(ranks: Any, folder: Path) -> dict[str, Any]:
    """What a rank holds while a model is built in pieces."""
    config = dataclasses.replace(six_b(12, 8, 3), image_bucket_size=16)
    layout = {**LAYOUT, "bf16": {"enabled": True}}
    batch = BatchConfig(global_rows=ranks.world_size, micro_rows=1)
    derived = derive_config(layout, optim=OPTIM, batch=batch, world_size=ranks.world_size, device=ranks.device)
    with LiveBytes() as live:
        model = construct(lambda: OFA(config), derived, in_pieces=True)
    sizes = [each.ds_numel for each in model.parameters()]
    return {"most": live.most, "now": live.now, "share": sum(each.ds_tensor.nbytes for each in model.parameters()),
            "largest": 2 * max(sizes), "whole": 2 * sum(sizes),
            "buffers": sum(each.nbytes for each in model.buffers())}  # fmt: skip


def peak_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def started(ranks: Any, folder: Path) -> dict[str, Any]:
    """From another program's file, in an engine that was built in pieces."""
    recipe = load_recipe("pretrain-6b", [*START_MODEL, f"train.init_from={folder / 'official'}"])
    config = model_config(recipe, START_VOCAB)
    engine = engine_of(ranks, config, zero_optimization=LAYOUT["zero_optimization"])
    read_foreign(folder / "official")  # names and sizes alone, and what Python imports for them
    Path("/proc/self/clear_refs").write_text("5")  # the largest so far is forgotten
    before = peak_bytes()
    start_from(engine, recipe, config, "")
    grown = peak_bytes() - before
    wrong = [
        piece.name for piece in engine.pieces() for kind, tensor in piece.tensors.items()
        if kind in MOMENTS or not bool((tensor == start_value(piece.name)).all())
    ]  # fmt: skip
    total = sum(parameter.ds_numel for parameter in engine.module.parameters())
    dispose(engine)
    return {"grown": grown, "whole": 4 * total, "wrong": wrong}


JOBS: dict[str, Callable[[Any, Path], Any]] = {
    "whole": whole, "moved": moved, "recomputed": recomputed, "built": built, "started": started,
    "second_copy": second_copy,
    "long": lambda ranks, folder: whole(ranks, folder, LONG_STEPS, LONG_SAVED),
    "long_moved": lambda ranks, folder: moved(ranks, folder, LONG_STEPS, LONG_SAVED),
}  # fmt: skip


def main(folder: Path, jobs: list[str]) -> None:
    ranks = init_distributed("cpu")
    results = {job: JOBS[job](ranks, folder) for job in jobs}
    if ranks.rank == 0:
        result_file(folder, ranks.world_size).write_text(json.dumps(results))
    leave_distributed()
    leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
