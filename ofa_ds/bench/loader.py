"""`bench loader`: what it costs to bring batches to training.

1. The hand-over of a batch from a worker to training: our ring beside torch's DataLoader, the same packed batch.
2. The feed: seconds of a core that a row takes to read, decode, augment and pack, by family and size of picture.
3. The wait: what part of a training step of tiny on one thread is spent waiting, with a worker and without.
"""

from __future__ import annotations

import functools
import io
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ofa_ds.batch import Batch, pack
from ofa_ds.bench import photo_rows
from ofa_ds.bench.step import example, progress
from ofa_ds.config import BatchConfig, DataConfig, MixConfig
from ofa_ds.data.shards import Shards
from ofa_ds.data.vocab import Vocab, load_vocab
from ofa_ds.engine.host_memory import keep_freed_memory
from ofa_ds.model.config import preset
from ofa_ds.model.ofa import OFA
from ofa_ds.storage.sizes import size_text
from ofa_ds.train.loader import Loader
from ofa_ds.train.packed_buffer import from_buffer, packing, to_buffer
from ofa_ds.train.ring import PREFETCH, Ring
from ofa_ds.train.ring_worker import Key

PICTURES, SIDE = 20, 384
"""Of the batch that changes hands."""
BATCHES = 60
"""That are timed in a repeat, after as many batches as workers keep ready."""
FEED_ROWS = 8
"""Of a micro-batch whose making is timed."""
FEED_MICRO_BATCHES = 6
SIDES = {"vision_language": (256, 480), "text": (0,), "image": (), "detection": (256, 480)}
"""Of pictures; none: their own, as those with image codes are never resized."""
WAIT_STEPS = 6
WAIT_PRESET = "tiny"

Result = dict[str, Any]


@functools.cache
def _batch() -> Batch:
    rng = np.random.default_rng(0)
    examples = [example(rng, side=SIDE, source=20, target=12, sample=196) for _ in range(PICTURES)]
    return pack(examples, [(SIDE, SIDE)], 16, 42)


class Made(Dataset):
    """A batch that costs nothing to make, for either way."""

    def prepare(self, *_: object) -> tuple[Batch, list[str]]:
        return _batch(), []

    def __getitem__(self, key: Key) -> tuple[Any, Any, list[str]]:
        """One tensor, the cheapest that a DataLoader can be given to carry."""
        return *to_buffer(_batch()), []


def _keys() -> Iterator[Key]:
    return ((step, 0) for step in itertools.count())


@contextmanager
def _by_ring(workers: int) -> Iterator[Callable[[], Batch]]:
    with closing(Ring(Made().prepare, _keys(), workers=workers, held=1, preload=__name__)) as ring:

        def take() -> Batch:
            ring.release()
            return ring.take().batch()

        yield take


@contextmanager
def _by_data_loader(workers: int) -> Iterator[Callable[[], Batch]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    loader = DataLoader(
        Made(), sampler=_keys(), batch_size=None, num_workers=workers, prefetch_factor=PREFETCH,
        multiprocessing_context=context, worker_init_fn=_one_thread,
    )  # fmt: skip
    held = [iter(loader)]

    def take() -> Batch:
        buffer, layout, _ = next(held[0])
        return from_buffer(buffer, layout)

    try:
        yield take
    finally:
        held.clear()  # with the iterator its workers end


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


WAYS = {"ring": _by_ring, "DataLoader": _by_data_loader}


def hand_over(repeats: int) -> Result:
    """Milliseconds a batch, of the wall and of this process; medians of `repeats`, the ways in turn."""
    found: dict[str, list[tuple[float, float]]] = {}
    for i, workers, way in itertools.product(range(repeats), (1, 2), WAYS):
        progress(f"hand-over by {way}, {workers} workers, {i + 1} of {repeats}")
        with WAYS[way](workers) as take:
            for _ in range(4 * workers * PREFETCH):  # every slot has been written, every page is there
                take()
            began, own = time.perf_counter(), time.process_time()
            for _ in range(BATCHES):
                take()
            times = (time.perf_counter() - began) / BATCHES, (time.process_time() - own) / BATCHES
        found.setdefault(f"{way}.{workers}", []).append(times)
    result: Result = {"batch_bytes": packing(_batch()).size}
    for name, times in found.items():
        wall, own = (statistics.median(each) * 1e3 for each in zip(*times, strict=True))
        result |= {f"{name}.ms": wall, f"{name}.own_ms": own}
    for workers in (1, 2):
        result[f"ratio.{workers}"] = result[f"DataLoader.{workers}.ms"] / result[f"ring.{workers}.ms"]
    return result


def loader_of(shards: Shards, vocab: Vocab, data: DataConfig, micro_rows: int, model: str = "tiny") -> Loader:
    batch = BatchConfig(global_rows=micro_rows, micro_rows=micro_rows)
    return Loader(shards=shards, vocab=vocab, config=data, batch=batch, model=preset(model), seed=1)


def feed(shards: Shards, vocab: Vocab, repeats: int) -> dict[str, list[tuple[int, float]]]:
    """Family -> (pixels of a picture, seconds of one core a row) for each of its sizes; (0, seconds) of texts.

    Reading is from the page cache. Packing into the slot is counted.
    """
    torch.set_num_threads(1)
    return {
        family: [_row_s(shards, vocab, family, side, repeats) for side in SIDES[family] or (_own_side(shards, family),)]
        for family in SIDES
        if shards.families.get(family)
    }


def _own_side(shards: Shards, family: str) -> int:
    with Image.open(io.BytesIO(shards.row(family, 0)["image"])) as picture:
        return picture.width


def _row_s(shards: Shards, vocab: Vocab, family: str, side: int, repeats: int) -> tuple[int, float]:
    mix = MixConfig(**{name: int(name == family) for name in SIDES})
    sizes = {"image_size": side, "infill_image_size": side, "code_image_size": side // 2} if side else {}
    loader = loader_of(shards, vocab, DataConfig(mix=mix, workers=0, **sizes), FEED_ROWS)
    times = []
    for i in range(repeats + 1):
        progress(f"feed: {family}, {side} px, {i} of {repeats}")
        began = time.process_time()
        for step in range(FEED_MICRO_BATCHES):
            to_buffer(loader.micro_batches.build(step, 0))
        times.append((time.process_time() - began) / FEED_MICRO_BATCHES / FEED_ROWS)
    return side * side, statistics.median(times[1:])  # the first fills caches


def wait(shards: Shards, vocab: Vocab) -> Result:
    """Of training steps of tiny on one thread: seconds, and what part of them is waiting, by the number of workers."""
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(0)
    model, result = OFA(preset(WAIT_PRESET, vocab_size=vocab.size)).train(), {}
    for workers in (0, 1):
        data = DataConfig(image_size=256, infill_image_size=256, workers=workers)
        loader = loader_of(shards, vocab, data, 12, WAIT_PRESET)
        with closing(loader.steps()) as steps:
            for i, (batch,) in enumerate(itertools.islice(steps, WAIT_STEPS + 1)):
                progress(f"steps of tiny, {workers} workers, {i} of {WAIT_STEPS}")
                model.zero_grad()
                model(batch)[0].sum().backward()
                if i == 0:  # which waited for the workers to start
                    began, before = time.perf_counter(), loader.wait_seconds
            seconds = time.perf_counter() - began
        result |= {f"step_s.{workers}": seconds / WAIT_STEPS}
        result |= {f"wait.{workers}": (loader.wait_seconds - before) / seconds}
    return result


def fitted(points: list[tuple[int, float]]) -> list[float]:
    """[seconds a row, seconds a pixel]: a line through two measurements; of one, all by its pixels if it has any."""
    (pixels, seconds), *more = points
    if not more:
        return [0.0, seconds / pixels] if pixels else [seconds, 0.0]
    (others, longer) = more[0]
    slope = max((longer - seconds) / (others - pixels), 0.0)
    return [max(seconds - slope * pixels, 0.0), slope]


def bench_feed(folder: Path | None, vocab: Path | None, repeats: int) -> dict[str, list[tuple[int, float]]]:
    """`feed` of the shards in `folder`; without it of drawn photographs."""
    with tempfile.TemporaryDirectory(prefix="ofa_ds_bench_") as place:
        if folder is None or vocab is None:
            progress("drawing photographs")
            return feed(*photo_rows.make(Path(place)), repeats)
        return feed(Shards(folder), load_vocab(vocab), repeats)


def bench_loader(repeats: int) -> Result:
    """All three, on drawn photographs."""
    result: Result = {"hand_over": hand_over(repeats)}
    with tempfile.TemporaryDirectory(prefix="ofa_ds_bench_") as place:
        progress("drawing photographs")
        shards, vocab = photo_rows.make(Path(place))
        result["feed"] = feed(shards, vocab, repeats)
        result["wait"] = wait(shards, vocab)
    progress("")
    return result


def table(result: Result) -> str:
    over, waits = result["hand_over"], result["wait"]
    lines = [f"{'hand-over of a batch of ' + size_text(over['batch_bytes']):42}{'1 worker':>12}{'2 workers':>12}"]
    for way, column, what in (
        ("DataLoader", "ms", "DataLoader, ms"), ("ring", "ms", "ring, ms"),
        ("DataLoader", "own_ms", "DataLoader, CPU ms of training's process"),
        ("ring", "own_ms", "ring, CPU ms of training's process"),
    ):  # fmt: skip
        lines.append(f"  {what:40}" + "".join(f"{over[f'{way}.{workers}.{column}']:12.2f}" for workers in (1, 2)))
    lines.append(f"  {'DataLoader / ring':40}" + "".join(f"{over[f'ratio.{n}']:11.1f}x" for n in (1, 2)))
    lines += ["", feed_table(result["feed"]), ""]
    for workers in (0, 1):
        name = f"tiny, 12 rows at 256 px, {workers} workers"
        lines.append(f"{name:42}{waits[f'step_s.{workers}']:9.2f} s{waits[f'wait.{workers}']:11.2%} waiting for data")
    return "\n".join(lines)


def feed_table(found: dict[str, list[tuple[int, float]]]) -> str:
    lines = [f"{'feed of one core':42}{'ms a row':>12}{'rows/s':>12}{'examples/s':>12}"]
    for family, points in found.items():
        for pixels, seconds in points:
            name = f"{family}, {pixels**0.5:.0f} px" if pixels else family
            rate = 1 / seconds
            examples = rate * (2 if family == "vision_language" else 1)
            lines.append(f"  {name:40}{seconds * 1e3:12.2f}{rate:12.0f}{examples:12.0f}")
    return "\n".join(lines)
