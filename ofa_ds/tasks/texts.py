"""Every text of shards as the tasks present it: what a vocabulary is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import Vocab, train_vocab
from ofa_ds.progress import track
from ofa_ds.tasks.task import row_texts


def train_from_shards(
    shards: Path | str, *, size: int, out: Path | str, num_codes: int = 8192, num_bins: int = 1000
) -> Vocab:
    """`train_vocab` on the text of shards, cleaned as the tasks clean it and with their instructions."""
    return train_vocab(shard_texts(Shards(shards)), size, out, num_codes, num_bins)


def shard_texts(shards: Shards) -> Iterator[str]:
    """Every text of the shards as the tasks present it: cleaned, with its leading space, inside its instruction."""
    for family, count in shards.families.items():
        for i in track(range(count), f"reading {family} texts", "rows"):
            yield from row_texts(family, shards.row(family, i))
