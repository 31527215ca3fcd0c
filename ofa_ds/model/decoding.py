"""Generation one token at a time: cached keys and values, beams that share their example's memory, reordering.

Legend: R rows (examples x beams, example-major), E examples, H heads, d head dim, K memory tokens of the longest
example, C steps the caches have room for, U distinct positions of the memory, D channels. Tables with a leading 2 have
one part for text rows and one for rows of image codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ofa_ds.model.decoder import Decoder
from ofa_ds.model.encoder import Encoded
from ofa_ds.model.inputs import PackedInput
from ofa_kernels.attention import position_logits, relative_logits

MASKED = -1e30
_FIRST_ROOM = 32


class DecodingState:
    """What the rows have generated so far. Steps go in lock-step; `reorder` replaces, repeats or drops rows."""

    def __init__(self, decoder: Decoder, batch: PackedInput, encoded: Encoded, beams: int) -> None:
        self.step = 0
        self._decoder = decoder
        self._position_UD = encoded.position_UD
        self._code_R = batch.code_mask.repeat_interleave(beams)
        lengths = batch.encoder_offsets.diff().long()
        slot_K = torch.arange(int(lengths.max()), device=lengths.device)
        token_EK = (batch.encoder_offsets[:-1, None] + slot_K).clamp(max=len(encoded.memory_ND) - 1)
        mask_EK = (slot_K >= lengths[:, None]).float() * MASKED
        self._memory = _Memory(beams, encoded.position_N[token_EK], mask_EK)
        self._caches = []
        for layer in decoder.layers:
            k, v = (_heads(proj(encoded.memory_ND)[token_EK], decoder) for proj in _memory_projections(layer))
            self._caches.append(
                (
                    _SelfCache(self, decoder.config.attention_scale),
                    _MemoryCache(self._memory, k, v, decoder.config.attention_scale),
                )
            )
        self._grow(_FIRST_ROOM)

    @property
    def num_rows(self) -> int:
        return len(self._code_R)

    def reorder(self, index_R: Tensor) -> None:
        """Row i goes on from what row index_R[i] was. The number of rows may change."""
        self._code_R = self._code_R[index_R]
        for own, _ in self._caches:
            own.k, own.v = (x[:, :, : self.step].index_select(0, index_R) for x in (own.k, own.v))
        example_E = self._memory.reorder(index_R)
        if example_E is not None:
            for _, memory in self._caches:
                memory.k, memory.v = memory.k.index_select(0, example_E), memory.v.index_select(0, example_E)

    def advance(self, tokens_RD: Tensor) -> Tensor:
        """Embedded tokens of this step -> hidden states [R, D] after the last norm."""
        if self.step == self._room:
            self._grow(2 * self._room)
        decoder, limit = self._decoder, self._decoder.embed_positions.num_embeddings
        if self.step >= limit and not bool(self._code_R.all()):
            raise ValueError(f"generation: step {self.step} is past the {limit} positions of text; stop earlier")
        position_RD = self.rows_of(self._raw_2CD[:, self.step]) if decoder.config.adds_decoder_positions else None
        x_RD = decoder.embed(tokens_RD, self._code_R, position_RD)
        self._memory.set_step(self._cross_2CHU, self.step, self._code_R)
        for layer, cores in zip(decoder.layers, self._caches, strict=True):
            x_RD = layer(x_RD, None, cores, self._code_R, self.num_rows)
        self.step += 1
        return decoder.layer_norm(x_RD)

    def rows_of(self, table_2X: Tensor) -> Tensor:
        """The part of each row: [R, ...], or [1, ...] where all rows generate text."""
        return table_2X[self._code_R.long()] if self._any_code else table_2X[:1]

    def _grow(self, room: int) -> None:
        """Positions and biases for `room` steps; the caches themselves grow as they are written."""
        self._room = room
        self._any_code = bool(self._code_R.any())
        decoder = self._decoder
        step_C = torch.arange(room, device=self._code_R.device)
        text_C, code_C = (
            step_C.clamp(max=decoder.embed_positions.num_embeddings - 1),
            step_C.clamp(max=len(decoder.code_ids) - 1),
        )
        is_code = torch.arange(2, device=step_C.device).repeat_interleave(room).bool()
        raw_VD, normed_VD, row_2C, codes = decoder.positions(torch.cat([text_C, code_C]), is_code)
        row_2C = row_2C.view(2, room)
        self._raw_2CD = raw_VD[row_2C]
        sizes = (decoder.config.num_heads, decoder.config.attention_scale)
        own, cross = (
            position_logits(*pair, *sizes) if pair else ()
            for pair in decoder.position_vectors(normed_VD, self._position_UD)
        )
        self._cross_2CHU = cross[0].transpose(0, 1)[row_2C] if cross else None
        for i, (cache, _) in enumerate(self._caches):
            row_HR = decoder.relative(i, decoder.token_rel_pos_table_list, decoder.image_rel_pos_table_list)
            bias_HVV = relative_logits(row_HR, codes)
            if own:
                bias_HVV = bias_HVV + own[0]
            cache.bias_2HCC = torch.stack([bias_HVV[:, row_C][:, :, row_C] for row_C in row_2C])


class _SelfCache:
    """Self-attention of one layer over the steps so far."""

    def __init__(self, state: DecodingState, scale: float) -> None:
        self.state, self.scale = state, scale
        self.k: Tensor | None = None  # [R, H, at least step, d]
        self.v: Tensor | None = None
        self.bias_2HCC = torch.empty(0)

    def __call__(self, q_RD: Tensor, k_RD: Tensor, v_RD: Tensor, head_scale_H: Tensor, dropout: float) -> Tensor:
        step = self.state.step
        q, k, v = (x.view(len(x), len(head_scale_H), 1, -1) for x in (q_RD, k_RD, v_RD))
        if self.k is None or step == self.k.shape[2]:
            room = k.new_empty(*k.shape[:2], max(step, _FIRST_ROOM), k.shape[3])
            self.k = torch.cat([x for x in (self.k, room) if x is not None], 2)
            self.v = torch.cat([x for x in (self.v, room) if x is not None], 2)
        self.k[:, :, step], self.v[:, :, step] = k[:, :, 0], v[:, :, 0]
        bias = self.state.rows_of(self.bias_2HCC[:, :, step, : step + 1])[:, :, None]
        out = _attend(q, self.k[:, :, : step + 1], self.v[:, :, : step + 1], bias, self.scale)
        return (out * head_scale_H[:, None, None]).flatten(1)


class _Memory:
    """Which part of the memory each row sees, the same in every layer."""

    def __init__(self, beams: int, position_EK: Tensor, mask_EK: Tensor) -> None:
        self.beams, self.position_EK, self.mask_EK = beams, position_EK, mask_EK
        self.bias_EHK = torch.empty(0)

    def set_step(self, cross_2CHU: Tensor | None, step: int, code_R: Tensor) -> None:
        self.bias_EHK = self.mask_EK[:, None]
        if cross_2CHU is not None:
            bias_EHU = cross_2CHU[:, step][code_R[:: self.beams].long()]
            index = self.position_EK[:, None].expand(-1, bias_EHU.shape[1], -1)
            self.bias_EHK = self.bias_EHK + bias_EHU.gather(2, index)

    def reorder(self, index_R: Tensor) -> Tensor | None:
        """The examples to keep memory of, one per `beams` rows; None where that changes nothing."""
        example_R = torch.div(index_R, self.beams, rounding_mode="floor")
        groups = example_R.view(-1, self.beams) if len(index_R) % self.beams == 0 else None
        if groups is None or not bool((groups == groups[:, :1]).all()):
            self.beams = 1  # rows of different examples are mixed: each row gets a memory of its own
            groups = example_R[:, None]
        example_E = groups[:, 0]
        if torch.equal(example_E, torch.arange(len(self.mask_EK), device=example_E.device)):
            return None
        self.position_EK, self.mask_EK = self.position_EK[example_E], self.mask_EK[example_E]
        return example_E


@dataclass(slots=True)
class _MemoryCache:
    """Cross-attention of one layer."""

    memory: _Memory
    k: Tensor
    """[E, H, K, d]"""
    v: Tensor
    scale: float

    def __call__(self, q_RD: Tensor, k_RD: None, v_RD: None, head_scale_H: Tensor, dropout: float) -> Tensor:
        beams = self.memory.beams
        q = q_RD.view(-1, beams, len(head_scale_H), self.k.shape[3]).transpose(1, 2)
        out = _attend(q, self.k, self.v, self.memory.bias_EHK[:, :, None], self.scale)
        return (out * head_scale_H[:, None, None]).transpose(1, 2).reshape(len(q_RD), -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """q [B, H, Q, d], k and v [B, H, K, d] -> [B, H, Q, d]; softmax in at least fp32."""
    logits = torch.matmul(q, k.transpose(2, 3)).to(bias.dtype) * scale + bias
    return torch.matmul(logits.softmax(-1).to(v.dtype), v)


def _heads(x_EKD: Tensor, decoder: Decoder) -> Tensor:
    return x_EKD.unflatten(2, (decoder.config.num_heads, -1)).transpose(1, 2).contiguous()


def _memory_projections(layer: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    return layer.encoder_attn.k_proj, layer.encoder_attn.v_proj
