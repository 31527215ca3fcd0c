"""What each rank of test_scst.py runs: `torchrun ... scst_worker.py FOLDER`. Rank 0 writes the results."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from batches import random_batch
from engine_cases import result_file

from ofa_ds.batch import Batch, pack_references
from ofa_ds.cli.main import leave
from ofa_ds.config import BatchConfig, CriterionConfig, OptimConfig, TrainConfig
from ofa_ds.data.document_frequency import count_ngrams
from ofa_ds.data.vocab import Vocab, load_vocab
from ofa_ds.engine.config import load_deepspeed_config
from ofa_ds.engine.engine import Engine, build
from ofa_ds.engine.process_group import init_distributed, leave_distributed
from ofa_ds.inference.generate import GenerationConfig, generate
from ofa_ds.model.config import preset
from ofa_ds.model.ofa import OFA
from ofa_ds.train.metrics import Window
from ofa_ds.train.scst import CaptionCritical
from ofa_ds.train.step import train_step

OPTIM = OptimConfig(peak_lr=1e-3, eps=1e-6)
CASES = {1: ((0, 1), (3, 1), (3, 2)), 2: ((0, 1), (3, 1), (3, 2))}
"""World size -> (ZeRO stage, accumulation steps)."""
ROWS = 4
MAX_TOKENS = 6


def start(ranks: Any, stage: int, accumulation: int, vocab_size: int) -> Engine:
    config = {"zero_optimization": {"stage": 0}} if stage == 0 else load_deepspeed_config(f"zero{stage}")
    batch = BatchConfig(global_rows=ROWS, micro_rows=ROWS // ranks.world_size // accumulation)
    train = TrainConfig(num_steps=30, seed=3)

    def make() -> OFA:
        return OFA(preset("nano", vocab_size=vocab_size, dim=32, ffn_dim=64, num_heads=2))

    return build(make, deepspeed=config, optim=OPTIM, batch=batch, train=train, ranks=ranks)


def rows_of(first: int, rows: int, vocab_size: int) -> Batch:
    return random_batch((7,), kinds="vtvt"[first : first + rows], first=first, vocab_size=vocab_size)


def said_at_first(engine: Engine, vocab: Vocab) -> list[list[str]]:
    """References that the untrained model meets: its second caption of each picture, and its third of another."""
    with engine.gathered() as model:
        found = generate(model, rows_of(0, ROWS, vocab.size), GenerationConfig(beams=5, max_len_b=MAX_TOKENS))
    texts = [[vocab.decode(hypothesis.tokens[:-1]) for hypothesis in hypotheses] for hypotheses in found]
    return [[own[1], other[2]] for own, other in zip(texts, texts[1:] + texts[:1], strict=True)]


def run_case(ranks: Any, vocab: Vocab, stage: int, accumulation: int) -> dict[str, Any]:
    """Losses and rewards of three steps, and the sum and norm of the weights after them."""
    engine = start(ranks, stage, accumulation, vocab.size)
    references = said_at_first(engine, vocab)
    criterion = CriterionConfig(kind="scst", scst_max_tokens=MAX_TOKENS)
    objective = CaptionCritical(count_ngrams(references), vocab, criterion)
    rows, losses, rewards = ROWS // ranks.world_size // accumulation, [], []
    for _ in range(3):
        window = Window(engine.device, logged=objective.logged)
        firsts = range(ranks.rank * rows, ROWS, ranks.world_size * rows)
        batches = [
            dataclasses.replace(rows_of(at, rows, vocab.size), **pack_references(references[at : at + rows]))
            for at in firsts
        ]
        train_step(engine, batches, window, objective)
        values = window.close(engine.all_reduce)
        losses.append(values["loss"])
        rewards.append(values["reward"])
    weights = engine.full_weights()
    engine._wrapped.destroy()
    del engine
    gc.collect()
    result = {"stage": stage, "accumulation": accumulation, "losses": losses, "rewards": rewards}
    if weights is not None:
        whole = torch.cat([value.double().flatten() for value in weights.values()])
        result["weights"] = [float(whole.sum()), float(whole.norm())]
    return result


def main() -> None:
    folder = Path(sys.argv[1])
    ranks, vocab = init_distributed("cpu"), load_vocab(folder / "vocab")
    results = [run_case(ranks, vocab, *case) for case in CASES[ranks.world_size]]
    if ranks.rank == 0:
        result_file(folder, ranks.world_size).write_text(json.dumps(results))
    leave_distributed()
    leave(0)


if __name__ == "__main__":
    main()
