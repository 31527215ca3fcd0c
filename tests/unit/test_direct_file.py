"""Files written past the page cache hold what was written, whatever the sizes and the file system."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ofa_ds.storage import direct_file
from ofa_ds.storage.direct import BLOCK_BYTES
from ofa_ds.storage.direct_file import DirectFile

STAGE = 4 * BLOCK_BYTES


@pytest.fixture(autouse=True)
def small_stage(monkeypatch):
    monkeypatch.setattr(direct_file, "_STAGE_BYTES", STAGE)


def written(path: Path, head: bytes, pieces: list[bytes]) -> bytes:
    file = DirectFile(path, len(head))
    try:
        for piece in pieces:
            file.write(piece)
        file.finish(head)
    finally:
        file.close()
    return path.read_bytes()


sizes = st.one_of(st.integers(0, 40), st.sampled_from([BLOCK_BYTES - 1, BLOCK_BYTES, STAGE - 1, STAGE, 2 * STAGE + 7]))


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(sizes, max_size=7), head_blocks=st.integers(0, 6))
def test_pieces_of_any_size_arrive_whole_and_in_order(tmp_path_factory, sizes: list[int], head_blocks: int) -> None:
    head = os.urandom(head_blocks * BLOCK_BYTES)
    pieces = [os.urandom(size) for size in sizes]
    path = tmp_path_factory.mktemp("direct") / "file"
    assert written(path, head, pieces) == head + b"".join(pieces)


def test_a_stage_is_not_filled_again_before_it_is_written(tmp_path, monkeypatch) -> None:
    pwrite = os.pwrite

    def slow(descriptor, data, at):
        time.sleep(0.005)
        return pwrite(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", slow)
    head, raw = os.urandom(BLOCK_BYTES), os.urandom(9 * STAGE + 5)
    with ThreadPoolExecutor(3) as pool:
        file = DirectFile(tmp_path / "file", len(head), pool=pool)
        file.write(raw)
        file.finish(head)
        file.close()
    assert (tmp_path / "file").read_bytes() == head + raw


def test_a_write_that_fails_beside_the_work_is_an_error(tmp_path, monkeypatch) -> None:
    def fails(descriptor, data, at):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fails)
    with ThreadPoolExecutor(1) as pool:
        file = DirectFile(tmp_path / "file", 0, pool=pool)
        with pytest.raises(OSError, match="No space left"):
            file.write(bytes(4 * STAGE))
        file.close()


def test_a_last_stage_that_could_not_be_written_fails_the_file(tmp_path, monkeypatch) -> None:
    pwrite, calls = os.pwrite, []

    def second_fails(descriptor, data, at):
        calls.append(at)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return pwrite(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", second_fails)
    with ThreadPoolExecutor(1) as pool:
        file = DirectFile(tmp_path / "file", 0, pool=pool)
        file.write(bytes(2 * STAGE))
        with pytest.raises(OSError, match="Input/output"):
            file.finish(b"")
        file.close()


def test_a_file_system_in_memory_is_written_through_the_cache() -> None:
    path = Path(f"/dev/shm/ofa-ds-test-{os.getpid()}")
    try:
        assert written(path, b"h" * BLOCK_BYTES, [b"x" * 9999]) == b"h" * BLOCK_BYTES + b"x" * 9999
    finally:
        path.unlink()


def test_a_disk_that_refuses_direct_writes_is_written_through_the_cache(tmp_path, monkeypatch) -> None:
    refused = []
    pwrite = os.pwrite

    def once(descriptor, data, at):
        if not refused:
            refused.append(at)
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", once)
    monkeypatch.setattr(direct_file, "set_direct", lambda descriptor, on: on)
    assert written(tmp_path / "file", b"", [b"y" * (STAGE + 3)]) == b"y" * (STAGE + 3)
    assert refused


def test_a_short_write_is_continued(tmp_path, monkeypatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: pwrite(descriptor, data[:BLOCK_BYTES], at))
    content = os.urandom(2 * STAGE + 5)
    assert written(tmp_path / "file", b"", [content]) == content


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_or_failing_disk_is_an_error(tmp_path, monkeypatch, code) -> None:
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError, match=os.strerror(code)):
        written(tmp_path / "file", b"", [b"z"])


def test_a_wrong_head_and_a_file_that_exists_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="want a multiple of 4096"):
        DirectFile(tmp_path / "a", 100)
    file = DirectFile(tmp_path / "a", BLOCK_BYTES)
    with pytest.raises(ValueError, match="a head of 3 bytes where 4096 were kept"):
        file.finish(b"abc")
    file.close()
    with pytest.raises(FileExistsError):
        DirectFile(tmp_path / "a", 0)
