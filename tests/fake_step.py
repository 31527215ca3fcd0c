"""Training steps with shapes alone: real models, real sizes, no memory and no arithmetic, and what they would hold.

torch without CUDA has no backward for tensors of a fake CUDA device ("Cannot access accelerator device"), so these are
fake tensors of the CPU, and `as_on_a_gpu` makes every choice that looks at the device choose what it would there:
Triton's kernels (their fake versions, which give shapes), convolutions, flash attention.
"""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ofa_ds.batch import Batch
from ofa_ds.model.config import ModelConfig
from ofa_ds.model.ofa import OFA
from ofa_ds.model.resnet import PointwiseConv
from ofa_ds.places import places_of
from ofa_ds.plan.coordinator import Held
from ofa_ds.plan.gathering import GatheredBytes
from ofa_ds.plan.layout import Layout
from ofa_ds.plan.work import Work
from ofa_kernels import _launch, attention, cross_entropy, layer_norm


class Watch(TorchDispatchMode):
    """Bytes of the storages that were made inside and are still there, and the most that there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.largest: dict[str, int] = {}
        """Bytes at the peak by the operator that made them."""
        self._known: dict[int, tuple[weakref.ref, int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(Tensor, lambda x: self.see(x, str(func)), out)
        return out

    def see(self, x: Tensor, name: str) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = (weakref.ref(storage, lambda _, key=key: self._forget(key)), size, name)
        self.live += size
        if self.live > self.peak:
            self.peak = self.live

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)[1]

    def known(self, tensors: Any) -> None:
        """These are not counted: they were there before."""
        for x in tensors:
            storage = x.untyped_storage()
            self._known[storage._cdata] = (
                weakref.ref(storage, lambda _, key=storage._cdata: self._known.pop(key)),
                0,
                "",
            )

    def by_operator(self) -> dict[str, int]:
        """What is there now."""
        sums: dict[str, int] = {}
        for _, size, name in self._known.values():
            sums[name] = sums.get(name, 0) + size
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _use_triton(kernel: str, x: Tensor, pays: bool = True, dtype: torch.dtype | None = None) -> bool:
    """As `ofa_kernels._launch.use_triton` on a GPU."""
    dtype = x.dtype if dtype is None else dtype
    return kernel == "triton" or (kernel == "auto" and pays and dtype in _launch.SIXTEEN_BITS)


def _pointwise(self: PointwiseConv, x: Tensor) -> Tensor:
    return F.conv2d(x, self.weight, None, self.stride)


@contextmanager
def as_on_a_gpu(budget: int = 0) -> Iterator[FakeTensorMode]:
    """budget: bytes of logits that the GPU may hold, 1/256 of its memory; see `cross_entropy_ops_triton`."""
    from ofa_kernels import cross_entropy_ops_triton

    patches = [
        *(mock.patch.object(each, "use_triton", _use_triton) for each in (attention, layer_norm, cross_entropy)),
        mock.patch.object(PointwiseConv, "forward", _pointwise),
        mock.patch.object(cross_entropy_ops_triton, "_device_budget", lambda device: budget),
    ]
    for each in patches:
        each.start()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        for each in patches:
            each.stop()


def fake_model(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> OFA:
    """Inside `as_on_a_gpu`. Parameters in `dtype`, running statistics in fp32."""
    nothing: Callable[..., Tensor] = lambda x, *args, **kwargs: x  # noqa: E731
    names = ("normal_", "zeros_", "kaiming_normal_", "kaiming_uniform_", "xavier_uniform_", "uniform_", "ones_")
    with mock.patch.multiple(nn.init, **dict.fromkeys(names, nothing)):
        model = OFA(config).train()
    for module in model.modules():
        for name, each in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(each.shape, dtype=dtype)))
    return model


def batch_of(config: ModelConfig, work: Work) -> Batch:
    """A real batch with these counts; its ids mean nothing."""
    patches, positions, patch_slots, source_slots, sources = [], [], [], [], []
    place = 0
    for each in work.examples:
        num_patches, source = int(each.patches), int(each.source)
        patches.append(num_patches)
        positions.append(torch.arange(1, num_patches + 1))
        patch_slots.append(torch.arange(place, place + num_patches))
        source_slots.append(torch.arange(place + num_patches, place + num_patches + source))
        sources.append(torch.arange(source))
        place += num_patches + source
    targets = [int(each.target) for each in work.examples]
    counted = [int(each.counted) for each in work.examples]
    encoder = [p + len(s) for p, s in zip(patches, sources, strict=True)]
    num, num_patches, num_source, num_target = len(targets), sum(patches), sum(map(len, sources)), sum(targets)
    batch = Batch(
        images=tuple(torch.zeros(int(g.count), 3, g.height, g.width, dtype=torch.uint8) for g in work.images),
        image_holes=tuple(torch.zeros(int(g.count), 4, dtype=torch.int32) for g in work.images),
        image_weight=tuple(torch.ones(int(g.count)) for g in work.images),
        patch_index=torch.arange(num_patches), patch_position=torch.cat(positions), patch_slot=torch.cat(patch_slots),
        source_tokens=torch.zeros(num_source, dtype=torch.int64), source_position=torch.cat(sources),
        source_slot=torch.cat(source_slots), encoder_offsets=_offsets(encoder),
        num_patches=torch.tensor(patches, dtype=torch.int32),
        decoder_tokens=torch.zeros(num_target, dtype=torch.int64),
        decoder_position=torch.cat([torch.arange(n) for n in targets]), decoder_offsets=_offsets(targets),
        targets=torch.cat([(torch.arange(n) < c).long() * 4 + 1 for n, c in zip(targets, counted, strict=True)]),
        loss_weight=torch.ones(num_target), code_mask=torch.tensor([each.code for each in work.examples]),
        task=torch.zeros(num, dtype=torch.int64), group=torch.zeros(num, dtype=torch.int64),
    )  # fmt: skip
    return batch.with_places(places_of(batch))


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def fake(batch: Batch, mode: FakeTensorMode) -> Batch:
    """The same with fake tensors."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    convert = mode.from_tensor
    moved = {name: tuple(map(convert, x)) if isinstance(x, tuple) else convert(x) for name, x in values.items()}
    return Batch(**moved).with_places(batch.places.map(convert))


def tensors_of(batch: Batch) -> list[Tensor]:
    found = [getattr(batch, name) for name in batch.__dataclass_fields__]
    places = [getattr(batch.places, name) for name in batch.places.__dataclass_fields__]
    flat: list[Tensor] = []
    for each in (*found, *places):
        flat += [x for x in (each if isinstance(each, tuple) else (each,)) if isinstance(x, Tensor)]
    return flat


class _Pieces:
    """Where the coordinator takes its buffers: fake tensors of so many bytes, which a `Watch` sees."""

    @staticmethod
    def take(size: float, part: str) -> Tensor:
        return torch.empty(int(size), dtype=torch.uint8)


class Zero:
    """DeepSpeed's hooks of stages 2 and 3: gradients go into a bucket; at 3, weights beside the real ones come and go.

    What is gathered when is `ofa_ds.plan.coordinator`'s, which tests/distributed/test_gathering.py compares with
    DeepSpeed's; the order of calls, and what lies between them, is the model's own.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.layout = layout
        leaf = set(layout.leaf_classes)
        self.weights = list(model.parameters())
        number = {id(each): i for i, each in enumerate(self.weights)}
        self.held = Held([each.numel() for each in self.weights], {}, {}, {}, set())
        self.bucket: list[Tensor] = []
        self.elements = 0
        self.coordinator: GatheredBytes | None = None
        if layout.stage == 2:
            for each in self.weights:
                each.register_post_accumulate_grad_hook(self._add)
            return
        self._hook(model, "", leaf, number)
        for table in (self.held.own, self.held.direct, self.held.below):
            table["encoder"].append(number[id(model.encoder.type_embedding.weight)])
        self.coordinator = self._new(None)

    def _new(self, order: list[str] | None) -> GatheredBytes:
        return GatheredBytes(self.held, self.layout, _Pieces(), order)

    def again(self) -> None:
        """The next step: the order of modules is known."""
        self.coordinator = self._new(self.coordinator.seen)

    def finish(self) -> None:
        self._reduce()
        if self.coordinator is not None:
            self.coordinator.end_backward()

    def _hook(self, module: nn.Module, name: str, leaf: set[str], number: dict[int, int]) -> None:
        is_leaf = type(module).__name__ in leaf
        own = list(module.parameters(recurse=is_leaf))
        direct, below = ([number[id(each)] for each in module.parameters(recurse=deep)] for deep in (False, True))
        self.held.direct[name], self.held.below[name] = direct, below
        self.held.own[name] = list(below if is_leaf else direct)
        if is_leaf:
            self.held.leaves.add(name)
        remaining = [0]

        def enter(inputs: Any) -> Any:
            remaining[0] = 0
            self.coordinator.enter(name, True)
            return _mapped(lambda x: _After.apply(x, count), inputs)

        def count(forward: bool) -> None:
            remaining[0] += 1 if forward else -1
            if not forward and not remaining[0]:
                self.coordinator.leave(name, False)

        def leave(output: Any) -> Any:
            self.coordinator.leave(name, True)
            return _mapped(lambda x: _Before.apply(x, lambda: self.coordinator.enter(name, False)), output)

        module.register_forward_pre_hook(lambda module, inputs: enter(inputs))
        module.register_forward_hook(lambda module, inputs, output: leave(output))
        if is_leaf:
            module.register_full_backward_hook(lambda *_: [self._add(each) for each in own] and None)
            return
        for each in own:
            each.register_post_accumulate_grad_hook(self._add)
        for child, each in module.named_children():
            self._hook(each, f"{name}.{child}".lstrip("."), leaf, number)

    def _add(self, weight: nn.Parameter) -> None:
        gradient, weight.grad = weight.grad, None
        size = weight.numel()
        if self.elements and self.elements + size > self.layout.reduce_bucket:
            self._reduce()
        if self.elements + size > self.layout.reduce_bucket:
            self.bucket.append(gradient)
        self.elements += size

    def _reduce(self) -> None:
        """Cast what is not in the bucket, lay out the pieces of all ranks."""
        wide = [each.float() for each in self.bucket]
        if self.layout.stage == 3 and (len(self.bucket) != 1 or self.elements != self.bucket[0].numel()):
            torch.empty(self.elements, dtype=torch.float32)
        del wide
        self.bucket, self.elements = [], 0


class _After(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: Callable[[bool], None]) -> Tensor:
        ctx.count = count
        if x.requires_grad:
            count(True)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.count(False)
        return gradient, None


class _Before(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, enter: Callable[[], None]) -> Tensor:
        ctx.enter = enter
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.enter()
        return gradient, None


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """As DeepSpeed's `apply_to_tensors_only`; tensors without a gradient need no change here."""
    if isinstance(value, (tuple, list)):
        parts = [_mapped(change, each) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {name: _mapped(change, each) for name, each in value.items()}
    return change(value) if isinstance(value, Tensor) and value.requires_grad else value


class Step(NamedTuple):
    """Bytes beside weights, batch and state."""

    after_forward: int
    peak: int
    seconds: float


def step(config: ModelConfig, work: Work, layout: Layout, *, budget: int = 0) -> Step:
    """The peak of a forward and backward; at stage 3 of the second one, when the order of modules is known."""
    real, begin = batch_of(config, work), time.perf_counter()
    with as_on_a_gpu(budget) as mode:
        model, batch = fake_model(config), fake(real, mode)
        hooks = Zero(model, layout) if layout.stage >= 2 else None
        for number in range(2 if layout.stage == 3 else 1):
            if number:
                hooks.again()
            watch = Watch()
            watch.known([*model.parameters(), *model.buffers(), *tensors_of(batch)])
            with watch:
                loss, *_ = model(batch)
                after_forward = watch.live
                loss = loss.sum()
                loss.backward()
                if hooks:
                    hooks.finish()
            del loss, _
    return Step(after_forward, watch.peak, time.perf_counter() - begin)
