"""What a process sets up for itself, beside its rank."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ofa_ds.engine.host_memory import keep_freed_memory, mmap_threshold, release_freed_memory

SIZE = 64 << 20


def of_its_own_process(expression: str, **environment: str) -> list[int]:
    """What an expression of this file is in a new process; after thousands of tests a heap has holes of any size."""
    python_path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    code = f"from test_processes import *; print(*{expression})"
    said = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": python_path} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(word) for word in said.stdout.split()]


def resident_bytes() -> int:
    with open(f"/proc/{os.getpid()}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def bytes_held_after_each_of_two_blocks() -> list[int]:
    """Of SIZE bytes each, taken, filled and freed; first whether freed memory can be kept at all."""
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    said = [int(keep_freed_memory())]
    before = resident_bytes()
    for _ in range(2):
        block = library.malloc(SIZE)
        ctypes.memset(block, 1, SIZE)
        library.free(block)
        said.append(resident_bytes() - before)
    return said


def test_a_large_block_takes_the_memory_of_the_freed_one() -> None:
    kept, first, second = of_its_own_process("bytes_held_after_each_of_two_blocks()")
    if kept:
        assert SIZE // 2 < first <= second < 3 * SIZE // 2


def test_where_the_environment_has_a_threshold_a_freed_block_goes_back_to_the_system_at_once() -> None:
    threshold = str(1 << 20)
    kept, *held = of_its_own_process("bytes_held_after_each_of_two_blocks()", MALLOC_MMAP_THRESHOLD_=threshold)
    if kept:
        assert max(held) < SIZE // 2


def bytes_released_below_a_block_in_use() -> list[int]:
    kept = keep_freed_memory()
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    blocks = [library.malloc(SIZE) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, SIZE)
    for block in blocks[:3]:  # the last one keeps the heap from shrinking
        library.free(block)
    before = resident_bytes()
    release_freed_memory()
    released = before - resident_bytes()
    library.free(blocks[3])
    return [int(kept), released]


def test_released_memory_goes_back_to_the_system_also_from_below_a_block_in_use() -> None:
    kept, released = of_its_own_process("bytes_released_below_a_block_in_use()")
    if kept:
        assert released > 2 * SIZE


@pytest.mark.parametrize(("text", "size"), [("1048576", 1 << 20), ("", 0), ("1m", 0), ("-1", 0), ("9" * 30, 1 << 30)])
def test_a_threshold_is_read_as_malloc_would(monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", text)
    assert mmap_threshold() == size
