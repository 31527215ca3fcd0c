"""OFA: one encoder-decoder for images, text, boxes and image codes, on packed batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ofa_ds.model.config import ModelConfig
from ofa_ds.model.decoder import Decoder
from ofa_ds.model.decoding import DecodingState
from ofa_ds.model.encoder import Encoded, Encoder
from ofa_ds.model.inputs import PackedInput


class OFA(nn.Module):
    """Parameters have the official fairseq names; `ofa_ds.model.names` maps the others.

    The same modules run in the same order whatever the batch holds, except that one without image groups (G = 0) skips
    the image modules.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(self, batch: PackedInput, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """(loss [M], nll [M] in at least fp32, correct [M] bool) of each decoder token; 0 where its target is pad.

        loss is label-smoothed and differentiable, nll and correct are for logs.
        """
        num_source = len(batch.source_tokens)
        embedded = self.encoder.embed_tokens(torch.cat([batch.source_tokens, batch.decoder_tokens]))
        encoded = self.encoder(batch, embedded[:num_source])
        hidden_MD = self.decoder(batch, embedded[num_source:], encoded, self.encoder.tokens(batch, encoded))
        return self.encoder.embed_tokens(hidden_MD, batch.targets, label_smoothing)

    def encode(self, batch: PackedInput) -> Encoded:
        """The encoder's states and positions."""
        return self.encoder(batch, self.encoder.embed_tokens(batch.source_tokens))

    def decode(self, batch: PackedInput, encoded: Encoded) -> Tensor:
        """Decoder states [M, D] for the batch's own previous tokens."""
        tokens_MD = self.encoder.embed_tokens(batch.decoder_tokens)
        return self.decoder(batch, tokens_MD, encoded, self.encoder.tokens(batch, encoded))

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """[M, V]."""
        return self.encoder.embed_tokens(hidden_MD)

    @torch.no_grad()
    def start_decoding(self, batch: PackedInput, beams: int = 1) -> DecodingState:
        """Encode the batch and prepare generation of `beams` rows per example; its decoder side goes unread."""
        return DecodingState(self.decoder, batch, self.encode(batch), beams)

    @torch.no_grad()
    def decode_step(self, tokens_R: Tensor, state: DecodingState) -> Tensor:
        """Logits [R, V] after one more token per row, bos first. Raises ValueError past the position table."""
        return self.logits(state.advance(self.encoder.embed_tokens(tokens_R)))
