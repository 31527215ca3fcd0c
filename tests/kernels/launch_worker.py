"""Launches on a GPU that is not there: real builds for sm_90, and a driver that writes down what it is told to run."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ofa_kernels import (
    _launch_triton,
    attention_row_triton,
    attention_triton,
    cross_entropy_triton,
    layer_norm_triton,
)
from ofa_kernels._launch_triton import Constants, launch

OF_A_BATCH = {
    "num_examples", "num_queries", "num_keys", "num_entries", "num_rows", "num_parts", "query_places", "key_places",
    "seed",
}  # fmt: skip
launched: list[tuple[Any, ...]] = []


class Launcher:
    """One for each build."""

    def __init__(self, src: object, metadata: object) -> None: ...

    def __call__(self, *arguments: object) -> None:
        """Grid, stream, function, metadata, what profilers read, hooks and every argument of the kernel."""
        told = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]
        launched.append((self, *told[:6], *told[7:]))


class Utils:
    def load_binary(self, *_: object) -> tuple[int, ...]:
        return 1, 2, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def unload_module(self, *_: object) -> None: ...


class Driver:
    launcher_cls, utils = Launcher, Utils()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@triton.jit(do_not_specialize=["size"])
def scaled(x_ptr, bias_ptr, out_ptr, size, stride, scale, BLOCK: tl.constexpr, DOUBLE: tl.constexpr):
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + column * stride, mask=column < size, other=0.0) * scale
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column, mask=column < size, other=0.0)
    tl.store(out_ptr + column, x * 2 if DOUBLE else x, mask=column < size)


def calls() -> list[tuple[list[Any], Constants]]:
    """Each differs from the first in one thing that triton may build another kernel for, or may not."""
    once, twice = (Constants(BLOCK=64, DOUBLE=double, num_warps=1) for double in (False, True))
    wide, narrow = torch.zeros(256), torch.zeros(256, dtype=torch.bfloat16)
    usual = [wide, None, narrow, 50, 2, 0.5]
    changes: dict[int, list[Any]] = {
        0: [narrow, wide[1:], wide[4:]], 1: [wide, narrow], 2: [wide, narrow[1:]], 3: [1, 16, 64, 2**31],
        4: [1, 16, 3, 2**31, 2**31 + 16], 5: [1.0, 3.5],
    }  # fmt: skip
    found = [(usual, once), (usual, twice)]
    for place, values in changes.items():
        found += [([*usual[:place], value, *usual[place + 1 :]], once) for value in values]
    return found


def sizes_that_ask_for_builds() -> list[str]:
    """Arguments that differ between batches and yet have builds of their own for 1 and for multiples of 16."""
    modules = (attention_triton, attention_row_triton, layer_norm_triton, cross_entropy_triton)
    kernels = [each for module in modules for each in vars(module).values() if isinstance(each, JITFunction)]
    parameters = [(kernel.__name__, each) for kernel in kernels for each in kernel.params]
    sizes = [(name, each) for name, each in parameters if each.name in OF_A_BATCH]
    assert len(sizes) > 12
    launched_alone = [(name, each) for name, each in sizes if name.endswith("_kernel")]
    return [f"{name}({each.name})" for name, each in launched_alone if not each.do_not_specialize]


def main() -> None:
    assert not sizes_that_ask_for_builds(), sizes_that_ask_for_builds()
    driver.set_active(Driver())
    assert _launch_triton._CAN_KEEP, f"triton {triton.__version__}: nothing is kept"
    every = calls()
    expected = []
    for arguments, constants in every:
        scaled[3, 2](*arguments, **constants)
        expected.append(launched.pop())
    assert len({each[0] for each in expected}) >= 9, "the calls are to need many builds"
    through_triton = []
    run = scaled.run
    for _ in range(2):
        count = 0

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            return run(*arguments, **options)

        scaled.run = counted
        for (arguments, constants), want in zip(every, expected, strict=True):
            launch(scaled, (3, 2), arguments, constants)
            got = launched.pop()
            assert got == want, f"triton launches {want}, ours {got}"
        through_triton.append(count)
    unusual = sum(any(_is_unusual(x) for x in arguments) for arguments, _ in every)
    assert through_triton[0] > unusual and through_triton[1] == unusual, (through_triton, unusual)
    assert all(compiled.metadata.enable_fp_fusion for compiled, _ in _launch_triton._builds.values())
    print("same launches", len(every))


def _is_unusual(x: object) -> bool:
    return isinstance(x, int) and x >= 1 << 31


if __name__ == "__main__":
    main()
