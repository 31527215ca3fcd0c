"""A file read ahead gives the bytes that were asked for, whatever the ranges, their order and the file system."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ofa_ds.storage.direct import BLOCK_BYTES
from ofa_ds.storage.direct_reader import DirectReader
from ofa_ds.storage.safetensors_file import DamagedError

SIZE = 9 * BLOCK_BYTES + 123
OFFSETS = st.one_of(st.integers(0, SIZE), st.sampled_from([0, 1, 4095, 4096, 8192, SIZE - 1, SIZE]))


def read(path: Path, ranges: list[tuple[int, int]], block_bytes: int = 2 * BLOCK_BYTES) -> list[bytes]:
    with ThreadPoolExecutor(2) as pool, closing(DirectReader(path, pool, block_bytes, [(0, SIZE)])) as file:
        return [b"".join(bytes(view) for view in file.read(start, count)) for start, count in ranges]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "file"
    path.write_bytes(os.urandom(SIZE))
    return path


@settings(max_examples=100, deadline=None)
@given(ends=st.lists(st.tuples(OFFSETS, OFFSETS), max_size=8), blocks=st.integers(1, 12), in_order=st.booleans())
def test_any_ranges_in_any_order_are_the_bytes_of_the_file(path, ends, blocks, in_order):
    ranges = [(min(pair), max(pair) - min(pair)) for pair in (sorted(ends) if in_order else ends)]
    raw = path.read_bytes()
    assert read(path, ranges, blocks * BLOCK_BYTES) == [raw[start : start + count] for start, count in ranges]


def test_each_block_is_read_once_when_ranges_follow_each_other(path, monkeypatch):
    asked = []
    preadv = os.preadv

    def counted(descriptor, buffers, at):
        asked.append(at)
        return preadv(descriptor, buffers, at)

    monkeypatch.setattr(os, "preadv", counted)
    read(path, [(start, min(1000, SIZE - start)) for start in range(0, SIZE, 1000)])
    assert sorted(asked) == list(range(0, SIZE, 2 * BLOCK_BYTES))


def test_a_buffer_is_not_given_to_another_block_while_it_is_being_filled(path, monkeypatch):
    preadv = os.preadv

    def slow_ahead(descriptor, buffers, at):
        time.sleep(0.05 if at == BLOCK_BYTES else 0)
        return preadv(descriptor, buffers, at)

    monkeypatch.setattr(os, "preadv", slow_ahead)
    raw = path.read_bytes()
    with (
        ThreadPoolExecutor(2) as pool,
        closing(DirectReader(path, pool, BLOCK_BYTES, [(0, SIZE)], num_buffers=2)) as file,
    ):
        next(file.read(0, 1))  # block 1 is on its way
        for number in (7, 8):
            view = next(file.read(number * BLOCK_BYTES, BLOCK_BYTES))
            time.sleep(0.1)
            assert view == raw[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]


def test_a_range_beyond_the_end_is_a_damaged_file(path):
    with pytest.raises(DamagedError, match=f"ends at byte {SIZE}"):
        read(path, [(SIZE - 10, 11)])


def test_a_file_that_shrinks_while_it_is_read_is_a_damaged_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    with ThreadPoolExecutor(2) as pool, closing(DirectReader(path, pool, BLOCK_BYTES, [(0, SIZE)])) as file:
        os.truncate(path, BLOCK_BYTES)
        with pytest.raises(DamagedError, match="ends at byte"):
            list(file.read(0, SIZE))


def test_a_link_is_not_followed(path, tmp_path):
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError, match="symbolic links"):
        read(tmp_path / "link", [(0, 1)])


def test_a_disk_that_refuses_direct_reads_is_read_through_the_cache(path, monkeypatch):
    refused = []
    preadv = os.preadv

    def once(descriptor, buffers, at):
        if not refused:
            refused.append(at)
            raise OSError(errno.EINVAL, "Invalid argument")
        return preadv(descriptor, buffers, at)

    monkeypatch.setattr(os, "preadv", once)
    assert read(path, [(0, SIZE)]) == [path.read_bytes()] and refused


def test_a_file_system_in_memory_is_read_through_the_cache():
    path = Path(f"/dev/shm/ofa-ds-test-reader-{os.getpid()}")
    try:
        path.write_bytes(raw := os.urandom(SIZE))
        assert read(path, [(0, SIZE), (5, 6)]) == [raw, raw[5:11]]
    finally:
        path.unlink()
