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


def page_faults_of_a_block() -> int:
    """Of taking, filling and freeing SIZE bytes."""
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = library.malloc(SIZE)
    ctypes.memset(block, 1, SIZE)
    library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_large_block_takes_the_memory_of_the_freed_one_without_new_page_faults() -> None:
    """In a process of its own: where a heap cannot grow any more, as after thousands of tests, malloc maps instead."""
    code = "import test_processes as t; print(int(t.keep_freed_memory()), *(t.page_faults_of_a_block() for _ in '12'))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    kept, first, second = map(int, said.stdout.split())
    if kept:
        assert second < SIZE // resource.getpagesize() // 8 < first


def resident_bytes() -> int:
    with open(f"/proc/{os.getpid()}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_released_memory_goes_back_to_the_system_also_from_below_a_block_in_use() -> None:
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    if not keep_freed_memory():
        return
    blocks = [library.malloc(SIZE) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, SIZE)
    for block in blocks[:3]:  # the last one keeps the heap from shrinking
        library.free(block)
    before = resident_bytes()
    release_freed_memory()
    library.free(blocks[3])
    assert before - resident_bytes() > 2 * SIZE


def test_where_the_environment_has_a_threshold_a_freed_block_goes_back_to_the_system_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 20))
    if not keep_freed_memory():
        return
    try:
        page_faults_of_a_block()
        assert page_faults_of_a_block() >= SIZE // resource.getpagesize() // 8
    finally:
        monkeypatch.undo()
        keep_freed_memory()


@pytest.mark.parametrize(("text", "size"), [("1048576", 1 << 20), ("", 0), ("1m", 0), ("-1", 0), ("9" * 30, 1 << 30)])
def test_a_threshold_is_read_as_malloc_would(monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", text)
    assert mmap_threshold() == size
