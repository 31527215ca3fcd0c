"""Encoder and decoder of a VQGAN; names of parameters are those of taming-transformers' checkpoints.

Legend: B pictures, C channels, H, W pixels (or places of a level).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ofa_ds.vision.config import NORM_GROUPS, VqganConfig

NORM_EPS = 1e-6


class Norm(nn.GroupNorm):
    """Of one value too, as a picture of one code has it where a group is one channel; torch's module refuses that."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.group_norm(x_BCHW, self.num_groups, self.weight, self.bias, self.eps)


def norm(channels: int) -> Norm:
    return Norm(NORM_GROUPS, channels, eps=NORM_EPS)


class ResBlock(nn.Module):
    """x + conv2(dropout(swish(norm2(conv1(swish(norm1(x))))))), x by a 1 x 1 convolution where the width changes."""

    def __init__(self, old: int, new: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(old), nn.Conv2d(old, new, 3, padding=1)
        self.norm2, self.conv2 = norm(new), nn.Conv2d(new, new, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        if old != new:
            self.nin_shortcut = nn.Conv2d(old, new, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(functional.silu(self.norm1(x_BCHW)))
        h_BCHW = self.conv2(self.dropout(functional.silu(self.norm2(h_BCHW))))
        shortcut = getattr(self, "nin_shortcut", None)
        return (x_BCHW if shortcut is None else shortcut(x_BCHW)) + h_BCHW


class AttnBlock(nn.Module):
    """One head over all places of a picture, scaled by C^-1/2, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.norm(x_BCHW)
        q, k, v = (part(h_BCHW).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        out = functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x_BCHW + self.proj_out(out.transpose(1, 2).reshape(x_BCHW.shape))


class Downsample(nn.Module):
    """Half the side: a column and a row of zeros at the right and the bottom, then 3 x 3 of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(functional.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the side: every place four times, then 3 x 3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where the level has it."""

    def __init__(self, old: int, new: int, blocks: int, dropout: float, *, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(old if k == 0 else new, new, dropout) for k in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(new) for _ in range(blocks if attention else 0))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for k, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if len(self.attn):
                x_BCHW = self.attn[k](x_BCHW)
        return x_BCHW


class Middle(nn.Module):
    """Of the coarsest resolution; always with attention."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, dropout)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResBlock(channels, channels, dropout)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x_BCHW)))


class Encoder(nn.Module):
    """Pictures [B, 3, H, W] -> [B, z_channels, H / p, W / p], p pixels per code (rounded down at each halving)."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        widths = [config.ch * factor for factor in config.ch_mult]
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        old = config.ch
        for k, width in enumerate(widths):
            attention = config.resolution >> k in config.attn_resolutions
            level = Level(old, width, config.num_res_blocks, config.dropout, attention=attention)
            if k < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
            old = width
        self.mid = Middle(old, config.dropout)
        self.norm_out = norm(old)
        self.conv_out = nn.Conv2d(old, config.z_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(x_BCHW)
        for level in self.down:
            x_BCHW = level(x_BCHW)
            if hasattr(level, "downsample"):
                x_BCHW = level.downsample(x_BCHW)
        return self.conv_out(functional.silu(self.norm_out(self.mid(x_BCHW))))


class Decoder(nn.Module):
    """The other way round, one residual block a level more; the picture is not bounded by any activation."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        widths = [config.ch * factor for factor in config.ch_mult]
        old = widths[-1]
        self.conv_in = nn.Conv2d(config.z_channels, old, 3, padding=1)
        self.mid = Middle(old, config.dropout)
        levels: list[Level] = []
        for k in reversed(range(len(widths))):  # coarsest first, as they run; numbered from the finest
            attention = config.resolution >> k in config.attn_resolutions
            level = Level(old, widths[k], config.num_res_blocks + 1, config.dropout, attention=attention)
            if k > 0:
                level.upsample = Upsample(widths[k])
            levels.append(level)
            old = widths[k]
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = norm(old)
        self.conv_out = nn.Conv2d(old, config.out_ch, 3, padding=1)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        x_BCHW = self.mid(self.conv_in(z_BCHW))
        for k in reversed(range(len(self.up))):
            x_BCHW = self.up[k](x_BCHW)
            if hasattr(self.up[k], "upsample"):
                x_BCHW = self.up[k].upsample(x_BCHW)
        return self.conv_out(functional.silu(self.norm_out(x_BCHW)))
