"""Record batches read one after another, past the page cache: the rows that are there, each byte once."""

from __future__ import annotations

import mmap
import os
import shutil
from pathlib import Path

import pytest
from tiny_sources import write_sources

from ofa_ds.data.building.build import build_shards
from ofa_ds.data.manifest import read_manifest
from ofa_ds.data.shard_writer import row_digest
from ofa_ds.data.shards import Shards
from ofa_ds.data.shards_verify import verify_shards
from ofa_ds.data.tools import sweep as sweeping
from ofa_ds.data.tools.chunks import Chunk, chunks_of
from ofa_ds.data.tools.sweep import record_batches, sweep
from ofa_ds.storage.direct import BLOCK_BYTES


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ofa_ds.data.shard_writer.MAX_BATCH_ROWS", 2)
        build_shards(folder / "out", **write_sources(folder), workers=1)
    return folder / "out"


def chunks(folder: Path) -> list[Chunk]:
    return [chunk for chunk in chunks_of(folder, read_manifest(folder)) if isinstance(chunk, Chunk)]


@pytest.mark.parametrize("stretch", [1, 5000, 1 << 20])
def test_rows_and_checksums_are_those_of_the_files_and_every_byte_is_read_once(
    stretch: int, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "STRETCH_BYTES", stretch)
    read: list[tuple[int, int]] = []

    def read_block(descriptor: int, buffer: memoryview, count: int, at: int, path: Path) -> None:
        read.append((at, at + count))
        real(descriptor, buffer, count, at, path)

    real = sweeping.read_block
    monkeypatch.setattr(sweeping, "read_block", read_block)
    shards, found = Shards(built), {family: [] for family in Shards(built).families}
    for chunk in chunks(built):
        for file, batch in sweep(chunk):
            assert file.checksum_problem(batch) is None
        assert_each_block_once(read, chunk.file.path.stat().st_size)
        read.clear()
        for file, batch in record_batches(chunk):
            found[chunk.family] += [row_digest(file.row(i)) for i in file.rows_of(batch)]
        assert_each_block_once(read, chunk.file.path.stat().st_size)
        read.clear()
        assert chunk.file._file is None, "nothing is mapped"
    for family, count in shards.families.items():
        assert found[family] == [row_digest(shards.row(family, i)) for i in range(count)]


def assert_each_block_once(read: list[tuple[int, int]], num_bytes: int) -> None:
    """From the file's first byte to its last; of a block that two stretches share each reads the whole."""
    assert [at for at, _ in read] == [0, *(stop // BLOCK_BYTES * BLOCK_BYTES for _, stop in read[:-1])]
    assert read[-1][1] == num_bytes


def test_memory_is_taken_once_and_sweeps_beside_each_other_have_their_own(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "_spare", [])
    taken: list[int] = []

    def new(descriptor: int, size: int, **how: int) -> mmap.mmap:
        taken.extend([size] if descriptor < 0 else [])
        return real(descriptor, size, **how)

    real = mmap.mmap
    monkeypatch.setattr(sweeping.mmap, "mmap", new)
    largest = max(chunks(built), key=lambda chunk: chunk.num_bytes)
    for _ in range(2):
        for (file, batch), (other, same) in zip(sweep(largest), sweep(largest), strict=True):
            assert file.checksum_problem(batch) is None and other.checksum_problem(same) is None
            assert file.held.data is not other.held.data
    assert len(taken) == 4


def test_checksums_are_taken_in_threads_and_what_is_wrong_is_told_in_order(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(built, folder := tmp_path / "shards")
    for path in folder.glob("*.arrow"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    monkeypatch.setattr("ofa_ds.data.tools.chunks.CHUNK_BYTES", 1)
    monkeypatch.setattr("multiprocessing.get_context", lambda *_: pytest.fail("a process is started"))
    problems = verify_shards(folder, workers=1, decode=False)
    assert len(problems) == len(list(folder.glob("*.arrow"))) > 2
    assert verify_shards(folder, workers=3, decode=False) == problems


def test_a_file_that_is_cut_while_it_is_read_is_one_line(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "STRETCH_BYTES", 1)
    (chunk, *_) = chunks(built)
    path, content = chunk.file.path, chunk.file.path.read_bytes()
    try:
        batches = sweep(chunk)
        next(batches)
        os.truncate(path, 8)
        with pytest.raises(RuntimeError, match=rf"{path.name}: want {len(content)} bytes as in manifest.json, got 8"):
            for _ in range(3):
                next(batches)
    finally:
        path.write_bytes(content)
