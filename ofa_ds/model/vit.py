"""Vision transformer backbone: the first blocks of a CLIP tower, without class token or final norm.

docs/ofa.md, Model: ViT.

Legend: I images, P patches, C width, H heads. Parameter names are the original's: conv1, positional_embedding, ln_pre,
transformer.resblocks.0.attn.in_proj_weight, ...
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ofa_ds.model.init import Linear
from ofa_ds.model.products import linear
from ofa_ds.model.resnet import DropPath

MLP_RATIO = 4


class SelfAttention(nn.Module):
    """Bidirectional attention with one projection for query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"ViT width {width} is not a multiple of its {heads} heads")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)

    def forward(self, x_IPC: Tensor) -> Tensor:
        """[I, P, C] -> [I, P, C]."""
        projected = linear(x_IPC, self.in_proj_weight, self.in_proj_bias)
        query, key, value = projected.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers around the quick GELU x * sigmoid(1.702 x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = Linear(width, MLP_RATIO * width)
        self.c_proj = Linear(MLP_RATIO * width, width)

    def forward(self, x_IPC: Tensor) -> Tensor:
        """[I, P, C] -> [I, P, C]."""
        hidden = self.c_fc(x_IPC)
        return self.c_proj(hidden * torch.sigmoid(1.702 * hidden))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); drop-path at one rate on both branches."""

    def __init__(self, width: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        self.ln_2 = nn.LayerNorm(width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_IPC: Tensor) -> Tensor:
        """[I, P, C] -> [I, P, C]."""
        x_IPC = x_IPC + self.drop_path(self.attn(self.ln_1(x_IPC)))
        return x_IPC + self.drop_path(self.mlp(self.ln_2(x_IPC)))


class Transformer(nn.Module):
    """The blocks, under the name the original gives them; optionally recomputed in the backward."""

    def __init__(self, width: int, layers: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, drop_path) for _ in range(layers))
        self.activation_checkpointing = False

    def forward(self, x_IPC: Tensor) -> Tensor:
        """[I, P, C] -> [I, P, C]."""
        for block in self.resblocks:
            if self.activation_checkpointing and self.training:
                x_IPC = checkpoint(block, x_IPC, use_reentrant=False)
            else:
                x_IPC = block(x_IPC)
        return x_IPC


class ViT(nn.Module):
    """Patches of `patch` pixels, `layers` blocks of `width` channels.

    image_size: the side for which the position table is made; for others it is resized bilinearly.
    drop_path: the same rate in every block, drawn per image.
    """

    def __init__(
        self, image_size: int, patch: int, width: int, layers: int, heads: int, *, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.patch = patch
        self.grid = image_size // patch
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        # Row 0 is the class token's; nothing reads it, official checkpoints have it.
        self.positional_embedding = nn.Parameter(torch.empty(self.grid**2 + 1, width).normal_(std=width**-0.5))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, drop_path)

    def forward(self, images: Tensor, weight: Tensor | None) -> Tensor:
        """images [I, 3, h, w] float -> [I, C, h / patch, w / patch]. `weight` is unused: nothing here mixes images."""
        del weight
        features = self.conv1(images)
        height, width = features.shape[-2:]
        x_IPC = features.flatten(2).transpose(1, 2) + self._positions(height, width).to(features.dtype)
        x_IPC = self.transformer(self.ln_pre(x_IPC))
        return x_IPC.transpose(1, 2).unflatten(2, (height, width))

    def _positions(self, height: int, width: int) -> Tensor:
        """Position vectors [height * width, C] of a patch grid."""
        table = self.positional_embedding[1:]
        if (height, width) == (self.grid, self.grid):
            return table
        square = table.T.unflatten(1, (self.grid, self.grid))[None]
        resized = F.interpolate(square, size=(height, width), mode="bilinear", align_corners=False)
        return resized[0].flatten(1).T
