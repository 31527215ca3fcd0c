"""ResNet backbone: the stem and the first three stages, 1024 channels at stride 16 (docs/ofa.md, Model: ResNet).

Legend: I images, C channels, h w height and width. Parameter names are the original's: conv1, bn1, layer1.0.conv1, ...,
layer1.0.downsample.0 (convolution) and .1 (norm). Features are kept channels-last: 1x1 convolutions are then matrix
products without a copy, and batch-norm and pooling run over contiguous channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ofa_ds.model.init import Conv2d
from ofa_ds.model.products import linear

BATCH_NORM_MODES = ("frozen", "batch", "sync")
EXPANSION = 4
OUT_CHANNELS = 256 * EXPANSION
STAGE_CHANNELS = (64, 128, 256)


class BatchNorm(nn.Module):
    """Batch normalisation over images and pixels, with fp32 statistics and arithmetic whatever the weights' dtype.

    mode "frozen": running statistics, weight and bias are constants (buffers).
    mode "batch": the statistics of this rank's images; running averages are kept, and differ between ranks until
        a checkpoint takes their mean (`engine_state.agree_on_buffers`).
    mode "sync": the statistics of the images of all ranks (one all-reduce forward, one backward), eps 1e-3 as in the
        original.
    In evaluation every mode uses the running statistics. Training in "batch" or "sync" mode updates them, so the module
    must not run inside activation checkpointing, whose second forward would update again.
    """

    momentum = 0.1

    def __init__(self, num_channels: int, mode: str = "batch") -> None:
        super().__init__()
        if mode not in BATCH_NORM_MODES:
            raise ValueError(f"batch_norm {mode!r}: want one of {', '.join(BATCH_NORM_MODES)}")
        self.mode = mode
        self.eps = 1e-3 if mode == "sync" else 1e-5
        weight, bias = torch.ones(num_channels), torch.zeros(num_channels)
        if mode == "frozen":
            self.register_buffer("weight", weight)
            self.register_buffer("bias", bias)
            self.register_buffer("running_var", torch.full((num_channels,), 1 - self.eps))
        else:
            self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
            self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))
            self.register_buffer("running_var", torch.ones(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))

    def forward(self, x: Tensor, image_weight: Tensor | None = None, relu: bool = False) -> Tensor:
        """x [I, C, h, w] -> the same shape and dtype.

        image_weight [I]: 0 leaves an image out of the statistics; None: all count.
        relu: also rectify, in place; outside it could not be, since ZeRO-3 makes a module's output a view.
        """
        out = self._normalize(x, image_weight)
        return out.relu_() if relu else out

    def _normalize(self, x: Tensor, image_weight: Tensor | None) -> Tensor:
        mean, var, dtype = self.running_mean, self.running_var, self.running_mean.dtype
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        if not self.training or self.mode == "frozen":
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
        synchronize = self.mode == "sync" and _world_size() > 1
        if image_weight is None and not synchronize:
            self.num_batches_tracked += 1
            return F.batch_norm(x, mean, var, weight, bias, True, self.momentum, self.eps)
        x_full = x.to(dtype)
        mean, var = self._statistics(x_full, image_weight, synchronize)
        scale = weight * (var + self.eps).rsqrt()
        return torch.addcmul(_channels(bias - mean * scale), x_full, _channels(scale)).to(x.dtype)

    def _statistics(self, x: Tensor, image_weight: Tensor | None, synchronize: bool) -> tuple[Tensor, Tensor]:
        """Mean and biased variance [C] of the images that count; the running ones if none does. Updates these."""
        count, local_mean, local_var = _local_moments(x, image_weight)
        # Moments about the running mean, which is near and the same everywhere: E[x^2] - E[x]^2 about 0 would cancel.
        offset = local_mean - self.running_mean
        sums = torch.cat([count, count * offset, count * (local_var + offset.square())])
        if synchronize:
            sums = _AllReduce.apply(sums)
        num_channels = x.shape[1]
        total = sums[:1].detach()
        first, second = (sums[1:] / total.clamp(min=1)).split(num_channels)
        some = total > 0
        mean = torch.where(some, self.running_mean + first, self.running_mean)
        var = torch.where(some, (second - first.square()).clamp(min=0), self.running_var)
        with torch.no_grad():
            unbiased = torch.where(some, var * total / (total - 1).clamp(min=1), var)
            # past autograd's count of changes: an earlier group's batch_norm has saved them, and does not read them
            self.running_mean.data.lerp_(mean, self.momentum)
            self.running_var.data.lerp_(unbiased, self.momentum)
            self.num_batches_tracked += some[0].to(torch.long)
        return mean, var

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchNorm:
        """Moves the module, but never rounds the buffers below fp32: `model.bfloat16()` casts weights only."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = before[name].to(buffer.device)
        return self


class DropPath(nn.Module):
    """Drops the whole branch of an image with probability `rate` and scales the others by 1 / (1 - rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """x [I, ...], one draw per image."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        mask = torch.rand(x.shape[:1], device=x.device).add_(keep).floor_().to(x.dtype)
        return x * (mask / keep).view(-1, *[1] * (x.ndim - 1))


class PointwiseConv(Conv2d):
    """1x1 convolution without bias, as one matrix product over all pixels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [I, C, h, w], channels-last -> [I, C', ceil(h / stride), ceil(w / stride)], channels-last."""
        if x.is_cuda:
            return super().forward(x)
        stride = self.stride[0]
        pixels = x.permute(0, 2, 3, 1)
        if stride > 1:
            pixels = pixels[:, ::stride, ::stride]
        return linear(pixels, self.weight.flatten(1)).permute(0, 3, 1, 2)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 convolutions around a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int, mode: str, drop_path: float) -> None:
        super().__init__()
        out_channels = channels * EXPANSION
        self.conv1 = PointwiseConv(in_channels, channels)
        self.bn1 = BatchNorm(channels, mode)
        self.conv2 = Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = BatchNorm(channels, mode)
        self.conv3 = PointwiseConv(channels, out_channels)
        self.bn3 = BatchNorm(out_channels, mode)
        self.drop_path = DropPath(drop_path)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            projection = PointwiseConv(in_channels, out_channels, stride)
            self.downsample = nn.ModuleList([projection, BatchNorm(out_channels, mode)])

    def forward(self, x: Tensor, image_weight: Tensor | None) -> Tensor:
        """[I, C, h, w] -> [I, 4 * channels, h', w']."""
        out = self.bn1(self.conv1(x), image_weight, relu=True)
        out = self.bn2(self.conv2(out), image_weight, relu=True)
        out = self.drop_path(self.bn3(self.conv3(out), image_weight))
        if self.downsample is not None:
            convolution, norm = self.downsample
            x = norm(convolution(x), image_weight)
        return (out + x).relu_()


class ResNet(nn.Module):
    """The stem and three stages of `depths` blocks, e.g. (3, 4, 6) for ResNet-50's.

    drop_path: rate of a stage's last block; grows linearly from 0 at its first, and is drawn per image.
    """

    def __init__(self, depths: Sequence[int], *, batch_norm: str = "batch", drop_path: float = 0.0) -> None:
        super().__init__()
        if len(depths) != len(STAGE_CHANNELS) or min(depths) < 1:
            raise ValueError(f"ResNet depths {tuple(depths)}: want {len(STAGE_CHANNELS)} numbers of blocks, each >= 1")
        self.conv1 = Conv2d(3, STAGE_CHANNELS[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm(STAGE_CHANNELS[0], batch_norm)
        in_channels = STAGE_CHANNELS[0]
        for i, (channels, depth) in enumerate(zip(STAGE_CHANNELS, depths, strict=True)):
            rates = [drop_path * block / max(depth - 1, 1) for block in range(depth)]
            blocks = nn.ModuleList()
            for block, rate in enumerate(rates):
                stride = 2 if i > 0 and block == 0 else 1
                blocks.append(Bottleneck(in_channels, channels, stride, batch_norm, rate))
                in_channels = channels * EXPANSION
            setattr(self, f"layer{i + 1}", blocks)

    def forward(self, images: Tensor, weight: Tensor | None) -> Tensor:
        """images [I, 3, h, w] float -> [I, 1024, h / 16, w / 16] (rounded up), channels-last.

        weight [I]: 0 for a stand-in, which does not count in statistics; None: all count.
        """
        counted = None if not self.training or self.bn1.mode == "frozen" else weight
        x = self.conv1(images.contiguous(memory_format=torch.channels_last))
        x = self.bn1(x, counted, relu=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:
                x = block(x, counted)
        return x


class _AllReduce(torch.autograd.Function):
    """Sum over ranks. Every rank's result depends on every rank's input, so the gradients are summed too."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def _channels(value_C: Tensor) -> Tensor:
    return value_C[:, None, None]


def _local_moments(x: Tensor, image_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Number [1] of pixels that count in x [I, C, h, w], their mean [C] and biased variance [C] (0 if none does)."""
    num_pixels = x.shape[2] * x.shape[3]
    if image_weight is None:
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        return x.new_full((1,), x.shape[0] * num_pixels), mean, var
    weight = (image_weight > 0).to(x.dtype)
    count = weight.sum()[None] * num_pixels
    share = (weight / count.clamp(min=1)).view(-1, 1, 1, 1)
    mean = (x * share).sum((0, 2, 3))
    var = ((x - _channels(mean)).square() * share).sum((0, 2, 3))
    return count, mean, var


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
