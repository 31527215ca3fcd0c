"""From pixels to the features of patches: normalisation, the small stem of the nano preset, the choice of backbone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofa_ds.config.architecture import PixelNorm
from ofa_ds.model.config import ConvConfig, ModelConfig, ViTConfig
from ofa_ds.model.init import Conv2d
from ofa_ds.model.resnet import ResNet
from ofa_ds.model.vit import ViT

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of red, green and blue in 0 ... 1, over ImageNet."""


class ConvStem(nn.Module):
    """3x3 convolutions of stride 2, each twice as wide as the one before, with ReLU between: patches of 2^n pixels.

    Not an official backbone. It sees edges at a hundredth of a ResNet's cost, and has no batch statistics.
    """

    def __init__(self, config: ConvConfig) -> None:
        super().__init__()
        num_convs = int(math.log2(config.patch_size))
        if 2**num_convs != config.patch_size:
            raise ValueError(f"convolutional stem: want a patch size that is a power of 2, got {config.patch_size}")
        widths = [3, *(config.channels >> (num_convs - 1 - i) for i in range(num_convs))]
        self.convs = nn.ModuleList(Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1) for i in range(num_convs))

    def forward(self, images: Tensor, weight: Tensor | None) -> Tensor:
        """images [I, 3, h, w] float -> [I, C, h / patch, w / patch]. `weight` is unused: nothing here mixes images."""
        del weight
        x = images.contiguous(memory_format=torch.channels_last)
        for conv in self.convs[:-1]:
            x = F.relu(conv(x))
        return self.convs[-1](x)


def build_backbone(config: ModelConfig) -> nn.Module:
    """The module behind `encoder.embed_images`: (images [I, 3, h, w], weight [I] or None) -> [I, C, h', w']."""
    backbone = config.backbone
    if isinstance(backbone, ConvConfig):
        return ConvStem(backbone)
    if isinstance(backbone, ViTConfig):
        sizes = (backbone.resolution, backbone.patch_size, backbone.channels, backbone.layers, backbone.heads)
        return ViT(*sizes, drop_path=config.backbone_drop_path)
    return ResNet(backbone.depths, batch_norm=config.batch_norm, drop_path=config.backbone_drop_path)


def normalize(images: Tensor, holes: Tensor, dtype: torch.dtype, norm: PixelNorm = "half") -> Tensor:
    """uint8 pixels [I, 3, h, w] -> (value / 255 - mean) / deviation; floats pass as they are.

    norm: `half`, which gives [-1, 1], or `imagenet`, per channel. Each image's hole (y0, x0, y1, x1) is 0 afterwards.
    """
    if images.is_floating_point():
        return images.to(dtype)
    if norm == "half":
        pixels = images.to(dtype).mul_(1 / 127.5).sub_(1)
    else:
        wide = torch.promote_types(dtype, torch.float32)  # factors rounded to bfloat16 would shift whole channels
        mean_311, deviation_311 = (  # filled there, not copied: a copy would be waited for
            torch.cat([torch.full((1, 1, 1), value, dtype=wide, device=images.device) for value in values])
            for values in IMAGENET
        )
        pixels = images.to(wide).mul_(1 / (255 * deviation_311)).sub_(mean_311 / deviation_311).to(dtype)
    y0, x0, y1, x1 = holes[:, :, None].unbind(1)
    y, x = torch.arange(images.shape[2], device=images.device), torch.arange(images.shape[3], device=images.device)
    in_rows, in_columns = (y >= y0) & (y < y1), (x >= x0) & (x < x1)
    return pixels.masked_fill_((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0)
