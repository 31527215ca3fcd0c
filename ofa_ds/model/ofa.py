"""OFA: one encoder-decoder for images, text, boxes and image codes, on packed batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ofa_ds.model.allowed_ids import allowed_mask
from ofa_ds.model.config import ModelConfig
from ofa_ds.model.decoder import Decoder
from ofa_ds.model.decoding import DecodingState
from ofa_ds.model.encoder import Encoded, Encoder
from ofa_ds.model.inputs import PackedInput
from ofa_ds.model.tree import decode_block
from ofa_ds.terms import PAD_ID


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

    def forward(
        self, batch: PackedInput, label_smoothing: float = 0.0, *, id_range: tuple[int, int] | None = None,
        logits: bool = False,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """(loss [M], nll [M] in at least fp32, correct [M] bool) of each decoder token; 0 where its target is pad.

        loss is label-smoothed and differentiable, nll and correct are for logs. The loss is over the ids that the batch
        allows, else over the special ones and start <= id < end of id_range, else over all.
        logits: instead (logits [N, V] of the N tokens whose target is not pad, which those are: int64 [N]).
        """
        num_source = len(batch.source_tokens)
        embedded = self.encoder.embed_tokens(torch.cat([batch.source_tokens, batch.decoder_tokens]))
        if torch.is_grad_enabled() and not embedded.requires_grad:
            embedded.requires_grad_()  # frozen: ZeRO-3 takes a stack whose inputs have no gradient for one that is done
        encoded = self.encoder(batch, embedded[:num_source])
        hidden_MD = self.decoder(batch, embedded[num_source:], *self.encoder.memory(batch, encoded))
        return self.losses(hidden_MD, batch, label_smoothing, id_range=id_range, logits=logits)

    def losses(
        self, hidden_MD: Tensor, batch: PackedInput, label_smoothing: float = 0.0, *,
        id_range: tuple[int, int] | None = None, logits: bool = False,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """What `forward` gives, from the decoder's states."""
        counted_N = batch.places.counted
        if logits:
            return self.encoder.embed_tokens(hidden_MD.index_select(0, counted_N)), counted_N
        if not len(batch.allowed_ids):
            return self.encoder.embed_tokens(hidden_MD, batch.targets, label_smoothing, id_range, counted_N)
        # only theirs: a mask of the prompt's positions too would be large
        mask_NV = allowed_mask(batch.allowed_ids, batch.allowed_offsets, counted_N, self.config.vocab_size)
        hidden_ND, target_N = hidden_MD.index_select(0, counted_N), batch.targets.index_select(0, counted_N)
        every_N = torch.arange(len(counted_N), device=counted_N.device)
        losses = self.encoder.embed_tokens(hidden_ND, target_N, label_smoothing, mask_NV, every_N)
        return tuple(each.new_zeros(len(batch.targets)).index_copy(0, counted_N, each) for each in losses)

    def encode(self, batch: PackedInput) -> Encoded:
        """The encoder's states and positions."""
        return self.encoder(batch, self.encoder.embed_tokens(batch.source_tokens))

    def decode(self, batch: PackedInput, encoded: Encoded) -> Tensor:
        """Decoder states [M, D] for the batch's own previous tokens."""
        tokens_MD = self.encoder.embed_tokens(batch.decoder_tokens)
        return self.decoder(batch, tokens_MD, *self.encoder.memory(batch, encoded))

    def logits(self, hidden_MD: Tensor, id_range: tuple[int, int] | None = None) -> Tensor:
        """[M, V]; of the special ids and start <= id < end alone where a range is given."""
        return self.encoder.embed_tokens(hidden_MD, allowed=id_range)

    @torch.no_grad()
    def start_decoding(
        self, batch: PackedInput, beams: int = 1, *, read: Sequence[Sequence[int]] | None = None
    ) -> DecodingState:
        """Encode the batch and prepare generation of `beams` rows per example; its decoder side goes unread.

        read: what each example's decoder has read before its first step, bos first: all but the last token of a prompt,
        which is the first to be fed; may be empty, text only. Raises ValueError past the position table.
        """
        state = DecodingState(self.decoder, batch, self.encode(batch))
        slots = max(map(len, read), default=0) if read is not None else 0
        if slots:
            empty = torch.tensor([slots - len(row) for row in read], device=batch.code_mask.device)
            tokens_EQ = torch.full((len(read), slots), PAD_ID, device=empty.device)
            for row, tokens in zip(tokens_EQ, read, strict=True):
                row[slots - len(tokens) :] = torch.tensor(tokens, dtype=torch.int64)
            state.empty_R = empty if bool(empty.any()) else None
            slot_Q = torch.arange(slots, device=empty.device)
            decode_block(state, self.encoder.embed_tokens(tokens_EQ), slot_Q, slot_Q[:, None] >= slot_Q, keep=True)
        if beams > 1:
            state.repeat(beams)
        return state

    @torch.no_grad()
    def decode_step(
        self, tokens_R: Tensor, state: DecodingState, id_range: tuple[int, int] | None = None
    ) -> Tensor:  # fmt: skip
        """Logits after one more token per row, bos first, as `logits` has them. Raises ValueError past the position
        table."""
        return self.logits(state.advance(self.encoder.embed_tokens(tokens_R)), id_range)

    @torch.no_grad()
    def decode_tree(self, tokens_EQ: Tensor, depth_Q: Tensor, seen_QQ: Tensor, state: DecodingState) -> Tensor:
        """Hidden states [E, Q, D] of Q tokens that branch off where the state is, which stays as it is.

        depth_Q: how many steps ahead each token is, ascending, from 0. seen_QQ: bool, query by key: which of the others
        are before it on its branch, and itself. One row for each example. Raises ValueError past the position table.
        """
        return decode_block(state, self.encoder.embed_tokens(tokens_EQ), state.step + depth_Q, seen_QQ)
