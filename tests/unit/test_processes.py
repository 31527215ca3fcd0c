"""What a process sets up for itself, beside its rank (tests of `rendezvous` are with the engine's)."""

from __future__ import annotations

import ctypes
import resource

from ofa_ds.processes import keep_freed_memory

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
    if keep_freed_memory():
        page_faults_of_a_block()
        assert page_faults_of_a_block() < SIZE // resource.getpagesize() // 8
