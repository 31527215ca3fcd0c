"""Generation one token at a time: cached keys and values, beams that share their example's memory, reordering.

Legend: R rows (examples x beams, example-major), E examples, H heads, d head dim, K memory tokens of the longest
example, P prompt tokens of the longest prompt, C positions there are tables for, U distinct positions of the memory, D
channels. Tables with a leading 2 have one part for text rows and one for rows of image codes, or the one that occurs.
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
    """What the rows have generated so far. Steps go in lock-step; `reorder` replaces, repeats or drops rows.

    What a row has read stands in slots, one a step. Prompts are laid out to end in the same slot, so that those which
    are shorter leave the first slots empty, and a token's position is its slot less the empty ones of its row.
    """

    def __init__(self, decoder: Decoder, batch: PackedInput, encoded: Encoded) -> None:
        """A row for each example; `repeat` makes beams of it."""
        self.step = 0
        """Slots that are filled."""
        self.empty_R: Tensor | None = None
        """int64: first slots that a row leaves empty; None where no row does."""
        self.decoder = decoder
        self._position_UD = encoded.position_UD
        self.code_R = batch.code_mask
        any_code = bool(batch.code_mask.any())
        self._kinds = [kind for kind in (False, True) if any_code == kind or (any_code and not batch.code_mask.all())]
        """Which parts the tables have: of text rows, of rows of image codes, of both."""
        lengths = batch.encoder_offsets.diff().long()
        slot_K = torch.arange(int(lengths.max()), device=lengths.device)
        token_EK = (batch.encoder_offsets[:-1, None] + slot_K).clamp(max=len(encoded.memory_ND) - 1)
        mask_EK = (slot_K >= lengths[:, None]).float() * MASKED
        self.memory = Memory(encoded.position_N[token_EK], mask_EK)
        self.caches: list[tuple[SelfCache, _MemoryCache]] = []
        for layer in decoder.layers:
            k, v = (_heads(proj(encoded.memory_ND)[token_EK], decoder) for proj in _memory_projections(layer))
            scale = decoder.config.attention_scale
            self.caches.append((SelfCache(self, scale), _MemoryCache(self.memory, k, v, scale)))
        self._room = 0
        self.make_room(_FIRST_ROOM)

    @property
    def num_rows(self) -> int:
        return len(self.code_R)

    def repeat(self, beams: int) -> None:
        """Each example's row becomes `beams` rows."""
        self.code_R, self.empty_R, self.memory.beams = *self._repeated(beams), beams
        for own, _ in self.caches:
            if own.k is not None:
                own.k, own.v = (x[:, :, : self.step].repeat_interleave(beams, 0) for x in (own.k, own.v))

    def _repeated(self, beams: int) -> list[Tensor | None]:
        return [None if x is None else x.repeat_interleave(beams) for x in (self.code_R, self.empty_R)]

    def reorder(self, index_R: Tensor) -> None:
        """Row i goes on from what row index_R[i] was. The number of rows may change."""
        self.code_R = self.code_R[index_R]
        self.empty_R = None if self.empty_R is None else self.empty_R[index_R]
        for own, _ in self.caches:
            own.k, own.v = (x[:, :, : self.step].index_select(0, index_R) for x in (own.k, own.v))
        example_E = self.memory.reorder(index_R)
        if example_E is not None:
            for _, memory in self.caches:
                memory.k, memory.v = memory.k.index_select(0, example_E), memory.v.index_select(0, example_E)

    def advance(self, tokens_RD: Tensor) -> Tensor:
        """Embedded tokens of this step -> hidden states [R, D] after the last norm."""
        slot_1 = torch.tensor([self.step], device=tokens_RD.device)
        self.check_slot(self.step)
        self.make_room(self.step + 1)
        x_RD = self.embed(tokens_RD[:, None], slot_1)[:, 0]
        self.memory.bias_EHK = self.memory_bias(slot_1)[:, :, 0]
        for layer, cores in zip(self.decoder.layers, self.caches, strict=True):
            x_RD = layer(x_RD, None, cores, self.code_R, self.num_rows)
        self.step += 1
        return self.decoder.layer_norm(x_RD)

    def check_slot(self, slot: int) -> None:
        """Raises ValueError where a token of text there has no position."""
        position = slot - (0 if self.empty_R is None else int(self.empty_R.min()))
        limit = self.decoder.embed_positions.num_embeddings
        if position >= limit and (self.decoder.config.use_ofasys or not bool(self.code_R.all())):
            raise ValueError(f"generation: step {position} is past the {limit} positions of text; stop earlier")

    def embed(self, tokens_RQD: Tensor, slot_Q: Tensor) -> Tensor:
        """Embedded tokens that stand in these slots, as the first layer takes them: [R, Q, D]."""
        size, code_RQ = tokens_RQD.shape, self.code_R[:, None].expand(tokens_RQD.shape[:2])
        position = None
        if self.decoder.config.adds_decoder_positions:
            position = self._raw_2CD[self._part(code_RQ), self._positions(slot_Q)].flatten(0, 1)
        return self.decoder.embed(tokens_RQD.flatten(0, 1), code_RQ.flatten(), position).view(size)

    def _positions(self, slot_Q: Tensor) -> Tensor:
        """[1 or R, Q]"""
        return slot_Q[None] if self.empty_R is None else (slot_Q - self.empty_R[:, None]).clamp(min=0)

    def memory_bias(self, slot_Q: Tensor) -> Tensor:
        """[E, 1 or H, 1 or Q, K]: what is added to the logits of the memory of a token in each of these slots."""
        mask_E11K = self.memory.mask_EK[:, None, None]
        if self._cross_2CHU is None:
            return mask_E11K
        code_E, position = self._part(self.code_R[:: self.memory.beams]), self._positions(slot_Q)
        position = position if self.empty_R is None else position[:: self.memory.beams]
        bias_EQHU = self._cross_2CHU[code_E[:, None], position.expand(len(code_E), -1)]
        index = self.memory.position_EK[:, None, None].expand(-1, *bias_EQHU.shape[1:3], -1)
        return bias_EQHU.gather(3, index).transpose(1, 2) + mask_E11K

    def own_bias(self, bias_2HCC: Tensor, slot_Q: Tensor, slot_K: Tensor) -> Tensor:
        """[1 or R, H, Q, K]: what is added to the logits between tokens in these slots; no slot sees an empty one."""
        if self.empty_R is None:
            return self._rows_of(bias_2HCC[:, :, slot_Q[:, None], slot_K])
        query_RQ, key_RK = self._positions(slot_Q), self._positions(slot_K)
        bias_HRQK = bias_2HCC[0][:, query_RQ[:, :, None], key_RK[:, None]]
        empty_RK = (slot_K < self.empty_R[:, None]).to(bias_HRQK.dtype) * MASKED
        return bias_HRQK.transpose(0, 1) + empty_RK[:, None, None]

    def _rows_of(self, table_2X: Tensor) -> Tensor:
        """The part of each row: [R, ...], or [1, ...] where all rows are of one kind."""
        return table_2X if len(self._kinds) == 1 else table_2X[self.code_R.long()]

    def _part(self, code: Tensor) -> Tensor:
        """Which part of the tables these are in."""
        return code.long() if len(self._kinds) == 2 else torch.zeros_like(code, dtype=torch.int64)

    def make_room(self, slots: int) -> None:
        """Positions and biases for this many slots at least; the caches themselves grow as they are written."""
        if slots <= self._room:
            return
        # By a quarter each time: the tables take memory by the square, which for 1,025 slots would else be four times.
        self._room = room = max(slots, self._room + max(self._room // 4, _FIRST_ROOM))
        decoder = self.decoder
        num_texts = decoder.embed_positions.num_embeddings
        num_codes = num_texts if decoder.config.use_ofasys else len(decoder.code_ids)
        step_C = torch.arange(room, device=self.code_R.device)
        texts, codes = step_C[:num_texts], step_C[:num_codes]
        raw_VD, normed_VD, relative = decoder.positions(texts, codes)
        both = (step_C.clamp(max=num_texts - 1), step_C.clamp(max=num_codes - 1) + len(texts))
        row_2C = torch.stack([both[kind] for kind in self._kinds])
        self._raw_2CD = raw_VD[row_2C]
        sizes = (decoder.config.num_heads, decoder.config.attention_scale)
        own, cross = (
            position_logits(*pair, *sizes) if pair else ()
            for pair in decoder.position_vectors(normed_VD, self._position_UD)
        )
        self._cross_2CHU = cross[0].transpose(0, 1)[row_2C] if cross else None
        for i, (cache, _) in enumerate(self.caches):
            row_HR = decoder.relative(i, decoder.token_rel_pos_table_list, decoder.image_rel_pos_table_list)
            bias_HVV = relative_logits(row_HR, relative)
            if own:
                bias_HVV = bias_HVV + own[0]
            cache.bias_2HCC = torch.stack([bias_HVV[:, row_C][:, :, row_C] for row_C in row_2C])


class SelfCache:
    """Self-attention of one layer over the slots so far."""

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
        slot_K = torch.arange(step + 1, device=k.device)
        bias = self.state.own_bias(self.bias_2HCC, slot_K[step:], slot_K)
        out = attend(q, self.k[:, :, : step + 1], self.v[:, :, : step + 1], bias, self.scale)
        return (out * head_scale_H[:, None, None]).flatten(1)


class Memory:
    """Which part of the memory each row sees, the same in every layer."""

    def __init__(self, position_EK: Tensor, mask_EK: Tensor) -> None:
        self.beams, self.position_EK, self.mask_EK = 1, position_EK, mask_EK
        self.bias_EHK = torch.empty(0)

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

    memory: Memory
    k: Tensor
    """[E, H, K, d]"""
    v: Tensor
    scale: float

    def __call__(self, q_RD: Tensor, k_RD: None, v_RD: None, head_scale_H: Tensor, dropout: float) -> Tensor:
        beams = self.memory.beams
        q = q_RD.view(-1, beams, len(head_scale_H), self.k.shape[3]).transpose(1, 2)
        out = attend(q, self.k, self.v, self.memory.bias_EHK[:, :, None], self.scale)
        return (out * head_scale_H[:, None, None]).transpose(1, 2).reshape(len(q_RD), -1)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """q [B, H, Q, d], k and v [B, H, K, d] -> [B, H, Q, d]; softmax in at least fp32."""
    logits = torch.matmul(q, k.transpose(2, 3))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale + bias
    return torch.matmul(logits.softmax(-1).to(v.dtype), v)


def _heads(x_EKD: Tensor, decoder: Decoder) -> Tensor:
    return x_EKD.unflatten(2, (decoder.config.num_heads, -1)).transpose(1, 2).contiguous()


def _memory_projections(layer: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    return layer.encoder_attn.k_proj, layer.encoder_attn.v_proj
