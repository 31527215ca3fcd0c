"""`ofa-ds plan RECIPE --measure N`: lengths of texts from the run's own data. The only plan that imports torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from ofa_ds.cli.heavy_imports import heavy_imports

if TYPE_CHECKING:
    from ofa_ds.batch import Batch
    from ofa_ds.config import Recipe
    from ofa_ds.plan.lengths import Lengths
    from ofa_ds.plan.work import Work


def measured_lengths(recipe: Recipe, number: int) -> Lengths:
    """Of the first `number` micro-batches that the run would see. Raises ValueError where the data is not here."""
    with heavy_imports():
        from ofa_ds.data.sets import open_data
        from ofa_ds.data.vocab import load_vocab
        from ofa_ds.model.config import model_config
        from ofa_ds.train.loader import Loader
    from ofa_ds.plan.lengths import lengths_of
    from ofa_ds.terms import PRETRAINING_FAMILIES

    recipe.data.check_given("--measure wants")
    vocab = load_vocab(recipe.data.vocab)
    loader = Loader(
        shards=open_data(recipe.data), vocab=vocab, config=recipe.data,
        batch=recipe.batch, model=model_config(recipe, vocab.size), seed=recipe.train.seed,
    )  # fmt: skip
    works: list[Work] = []
    rows: Counter[str] = Counter()
    per_step = recipe.batch.global_rows // recipe.batch.micro_rows
    for k in range(number):
        step, micro = divmod(k, per_step)
        works.append(work_of_batch(loader.micro_batches.build(step, micro)))
        rows.update(family for family, _ in loader.micro_batches.rows(step, [micro]))
    own = {family: rows[family] for family in PRETRAINING_FAMILIES if rows[family]}
    return lengths_of(works, own, f"measured on {number} micro-batches of {loader.shards.path}")


def work_of_batch(batch: Batch) -> Work:
    """Of a packed batch, with the task of each example."""
    from ofa_ds.plan.work import work_of
    from ofa_ds.terms import PAD_ID, TASKS

    plain = work_of(
        [tuple(each.shape) for each in batch.images], batch.encoder_offsets.tolist(), batch.num_patches.tolist(),
        batch.decoder_offsets.tolist(), batch.code_mask.tolist(), 0,
    )  # fmt: skip
    ends = batch.decoder_offsets.tolist()
    has_loss = (batch.targets != PAD_ID).tolist()
    examples = [
        each._replace(task=TASKS[task], has_loss=float(sum(has_loss[ends[i] : ends[i + 1]])))
        for i, (each, task) in enumerate(zip(plain.examples, batch.task.tolist(), strict=True))
    ]
    return replace(plain, examples=tuple(examples))
