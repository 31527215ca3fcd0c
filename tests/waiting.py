"""Ops that would make the host wait for a GPU, found on a CPU: each raises where a tensor "of the GPU" meets it.

A tensor is the host's where it was made without a device, on the literal "cpu", or from tensors of the host alone. All
others are the device's: parameters and what else is given at the start, what is computed from them, and what is made on
`engine.device` or another tensor's device. On a GPU the same code runs under `torch.cuda.set_sync_debug_mode("error")`
(tests/kernels/test_gpu_step.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.unique_dim_consecutive, aten.equal, aten.is_nonzero, aten.bincount, aten.argwhere,
    aten.item,
}  # fmt: skip
"""Their result, or its size, is known to the host only when the device has come so far."""
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
COPIES = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.cuda}
FACTORIES = {
    torch.arange, torch.zeros, torch.ones, torch.empty, torch.full, torch.rand, torch.randn, torch.randint,
    torch.randperm, torch.linspace, torch.eye,
}  # fmt: skip
UPLOADS = {torch.tensor, torch.as_tensor, torch.asarray}


class Waits(AssertionError):
    """The host would wait."""


class Watch:
    """Which tensors are the device's, and whether anybody looks."""

    def __init__(self) -> None:
        self.paused = False
        self.making_on_host = False
        self.num_ops = 0
        self._storages: dict[int, Any] = {}  # kept, so that no other takes the place of one that is gone

    def is_there(self, x: object) -> bool:
        return isinstance(x, Tensor) and x.numel() > 0 and x.untyped_storage().data_ptr() in self._storages

    def put(self, tensors: Iterable[Tensor]) -> None:
        """These are the device's."""
        for x in tensors:
            storage = x.untyped_storage()
            self._storages[storage.data_ptr()] = storage

    @contextmanager
    def off(self) -> Iterator[None]:
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(_Ops(self))
            stack.enter_context(_Calls(self))
            yield


class _Ops(TorchDispatchMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        watch, kwargs = self.watch, kwargs or {}
        if watch.paused:
            return func(*args, **kwargs)
        watch.num_ops += 1
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.numel()]
        there = [x for x in given if watch.is_there(x)]
        if there:
            self._check(func, args, kwargs, given)
        out = func(*args, **kwargs)
        if there or not given and not watch.making_on_host:
            watch.put(x for x in tree_leaves(out) if isinstance(x, Tensor))
        return out

    def _check(self, func: Any, args: tuple, kwargs: dict, given: list[Tensor]) -> None:
        packet = func.overloadpacket
        if packet in READS:
            raise Waits(f"{func}: the host reads what the device computes")
        if packet in INDEXING and any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            raise Waits(f"{func} with a mask: the host needs the number of places in it")
        if packet is aten.repeat_interleave and kwargs.get("output_size") is None:
            raise Waits(f"{func} without output_size: the host needs the sum")
        stray = [tuple(x.shape) for x in given if x.ndim and not self.watch.is_there(x)]
        if stray:
            raise Waits(f"{func}: {stray} of the host meets tensors of the device: copied there and waited for")


class _Calls(TorchFunctionMode):
    """What leaves no trace among a CPU's operations."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        watch, kwargs = self.watch, kwargs or {}
        if watch.paused:
            return func(*args, **kwargs)
        if func in COPIES and watch.is_there(args[0]):
            raise Waits(f"Tensor.{func.__name__}: the host waits for the device")
        device = kwargs.get("device")
        on_device = isinstance(device, torch.device)
        if func in UPLOADS and on_device and not watch.is_there(args[0]):
            raise Waits(f"torch.{func.__name__} on a device: the copy is waited for")
        if func is Tensor.new_tensor and watch.is_there(args[0]):
            raise Waits("Tensor.new_tensor: the copy is waited for")
        if func is Tensor.to and not watch.is_there(args[0]) and args[0].numel():
            wanted = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.device)]
            if wanted and not kwargs.get("non_blocking"):
                raise Waits("Tensor.to a device without non_blocking: the copy is waited for")
        if func not in FACTORIES:
            return func(*args, **kwargs)
        before, watch.making_on_host = watch.making_on_host, not on_device
        try:
            return func(*args, **kwargs)
        finally:
            watch.making_on_host = before


def unwatched_launches(watch: Watch, monkeypatch: Any) -> None:
    """Triton's interpreter copies what it is given, where a GPU would run: nobody looks inside."""
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__

    def quietly(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not watch.paused:
            arrays = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.numel()]
            stray = [tuple(x.shape) for x in arrays if not watch.is_there(x)]
            if stray:
                raise Waits(f"a kernel is given tensors of the host: {stray}")
        with watch.off():
            return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", quietly)


def marked(watch: Watch, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, a copy to the device that is not waited for, with its result the device's."""

    def call(*args: Any) -> Tensor:
        with watch.off():
            out = function(*args).clone()
        watch.put([out])
        return out

    return call
