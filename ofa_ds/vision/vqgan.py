"""A VQGAN (Esser et al. 2021): pictures to codes and back.

Legend: B pictures, H, W pixels, h, w codes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ofa_ds.vision.blocks import Decoder, Encoder
from ofa_ds.vision.codebook import GumbelCodebook, NearestCodebook, Quantized
from ofa_ds.vision.config import VqganConfig


class Vqgan(nn.Module):
    """Names of parameters are those of the released checkpoints, without their `loss.*`."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        codebook = GumbelCodebook if config.quantizer == "gumbel" else NearestCodebook
        self.quantize = codebook(config.n_embed, config.embed_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    @torch.no_grad()
    def encode(self, image_B3HW: Tensor) -> Tensor:
        """Pictures in [-1, 1] -> codes int64 [B, h, w], as many as are whole.

        Raises ValueError for sides of less than one code, and where the encoder gives what is not finite.
        """
        side = self.config.pixels_per_code
        height, width = image_B3HW.shape[2:]
        if min(height, width) < side:
            raise ValueError(f"want sides of at least {side} pixels, one code's, got {width} x {height}")
        h_BEHW = self.quant_conv(self.encoder(image_B3HW))
        if not torch.isfinite(h_BEHW).all():
            raise ValueError("the encoder's vectors are not all finite; are the weights damaged?")
        return self.quantize.codes(h_BEHW)

    @torch.no_grad()
    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Codes int64 [B, h, w] -> pictures [B, 3, H, W], not clamped. Raises ValueError for codes outside."""
        if codes_Bhw.numel() and not 0 <= int(codes_Bhw.min()) <= int(codes_Bhw.max()) < self.config.n_embed:
            found = f"{int(codes_Bhw.min())} ... {int(codes_Bhw.max())}"
            raise ValueError(f"want codes 0 ... {self.config.n_embed - 1} of the codebook, got {found}")
        return self._paint(functional.embedding(codes_Bhw, self.quantize.rows).permute(0, 3, 1, 2))

    def forward(self, image_B3HW: Tensor, noise_BNhw: Tensor | None = None) -> tuple[Tensor, Quantized]:
        """(pictures painted again, what the codebook made of them), with gradients.

        noise_BNhw: of a Gumbel codebook, see there.
        """
        quantized = self.quantize(self.quant_conv(self.encoder(image_B3HW)), noise_BNhw)
        return self._paint(quantized.vectors), quantized

    def _paint(self, vectors_BEhw: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(vectors_BEhw))
