"""OFA's decoder on packed tokens: text or image codes, by example.

Legend: M decoder tokens, N encoder tokens, D channels, U distinct positions, E examples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ofa_ds.model.config import ModelConfig
from ofa_ds.model.encoder import Encoded, linear_schedule
from ofa_ds.model.init import Embedding, Linear
from ofa_ds.model.inputs import PackedInput
from ofa_ds.model.layers import DecoderLayer, LayerNorm, PackedCore, RelativeTables, rows_of
from ofa_ds.model.positions import RelativeRow, code_image_ids, num_image_rows, num_token_rows
from ofa_kernels.attention import RelativeCodes, Tokens, plan_attention, position_terms


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, std = config.dim, config.init_std
        self.config = config
        self.layernorm_embedding = LayerNorm(dim, config.kernels)
        self.code_layernorm_embedding = LayerNorm(dim, config.kernels)
        self.embed_positions = Embedding(config.max_positions + 2, dim, std)
        num_tables = 1 if config.share_attn_bias else config.decoder_layers
        token_rows = num_token_rows(config.token_bucket_size)
        self.token_rel_pos_table_list = nn.ModuleList(
            Embedding(token_rows, config.num_heads, std) for _ in range(num_tables)
        )
        self.image_rel_pos_table_list: nn.ModuleList | None = None
        if config.use_ofasys:  # image codes are placed like text there
            self.type_embedding = Embedding(1, dim, std)  # a parameter that nothing reads
        else:
            self.embed_image_positions = Embedding(config.image_bucket_size**2 + 1, dim, std)
            self.pos_ln = LayerNorm(dim, config.kernels)
            self.image_pos_ln = LayerNorm(dim, config.kernels)
            image_rows = num_image_rows(config.image_bucket_size)
            self.image_rel_pos_table_list = nn.ModuleList(
                Embedding(image_rows, config.num_heads, std) for _ in range(num_tables)
            )
        if not config.entangle_position_embedding:
            self.self_pos_q_linear = Linear(dim, dim, std)
            self.self_pos_k_linear = Linear(dim, dim, std)
        self.cross_pos_q_linear = Linear(dim, dim, std)
        self.cross_pos_k_linear = Linear(dim, dim, std)
        rates = linear_schedule(config.drop_path, config.decoder_layers)
        self.layers = nn.ModuleList(DecoderLayer(config, rate) for rate in rates)
        self.layer_norm = LayerNorm(dim, config.kernels)
        image_bucket_size = None if config.use_ofasys else config.image_bucket_size
        self.arithmetic = RelativeRow(config.token_bucket_size, image_bucket_size, config.max_positions, True)
        self.relative = RelativeTables(self.arithmetic)
        code_ids = code_image_ids(config.code_image_size, config.image_bucket_size)
        self.register_buffer("code_ids", code_ids.clamp(max=config.image_bucket_size**2), persistent=False)

    def forward(self, batch: PackedInput, tokens_MD: Tensor, encoded: Encoded, memory: Tokens) -> Tensor:
        """tokens_MD: the embedded previous tokens -> hidden [M, D] after the last norm."""
        places = batch.places
        example_M, position_M = places.decoder_example, places.decoder_index
        code_M = batch.code_mask.index_select(0, example_M)
        raw_UD, normed_UD, codes = self.positions(places.decoder_texts, places.decoder_codes)
        x_MD = self.embed(
            tokens_MD, code_M, rows_of(raw_UD, position_M) if self.config.adds_decoder_positions else None
        )
        tokens = Tokens(batch.decoder_offsets, position_M, normed_UD.shape[0])
        options = {"kind": batch.code_mask, "kernel": self.config.kernels.attention, "like": x_MD}
        plans = (
            plan_attention(tokens, tokens, relative=codes, causal=True, **options),
            plan_attention(tokens, memory, relative=None, causal=False, **options),
        )
        vectors = self.position_vectors(normed_UD, encoded.position_UD)
        sizes = (self.config.num_heads, self.config.attention_scale)
        self_positions, cross_positions = (
            position_terms(*pair, *sizes, plan) if pair else () for pair, plan in zip(vectors, plans, strict=True)
        )
        scale = self.config.attention_scale
        cross_core = PackedCore(plans[1], cross_positions, None, scale)
        for i, layer in enumerate(self.layers):
            row_HR = self.relative(i, self.token_rel_pos_table_list, self.image_rel_pos_table_list)
            cores = (PackedCore(plans[0], self_positions, row_HR, scale), cross_core)
            args = (x_MD, encoded.memory_ND, cores, example_M, len(batch.code_mask))
            if self.config.activation_checkpointing and self.training:
                x_MD = checkpoint(layer, *args, use_reentrant=False)
            else:
                x_MD = layer(*args)
        return self.layer_norm(x_MD)

    def embed(self, tokens_MD: Tensor, code_M: Tensor, position_MD: Tensor | None) -> Tensor:
        """Norm and dropout of the embedded tokens; both norms run whatever the batch holds, to keep ranks in step."""
        if position_MD is not None:
            tokens_MD = tokens_MD + position_MD
        as_text, as_code = self.layernorm_embedding(tokens_MD), self.code_layernorm_embedding(tokens_MD)
        x_MD = torch.where(code_M[:, None], as_code, as_text)
        return F.dropout(x_MD, self.config.dropout, self.training) if self.config.dropout else x_MD

    def positions(self, text_X: Tensor, code_Y: Tensor) -> tuple[Tensor, Tensor, RelativeCodes]:
        """Of X positions of text and Y of image codes: (vectors [X + Y, D], the same normed, relative codes)."""
        if self.config.use_ofasys:
            text = torch.cat([text_X, code_Y])
            raw_UD = self.embed_positions(text)
            return raw_UD, raw_UD, RelativeCodes(*self.arithmetic.text_codes(text), self.arithmetic.num_entries)
        image_ids = self.code_ids.index_select(0, code_Y)
        text_UD, image_UD = self.embed_positions(text_X), self.embed_image_positions(image_ids)
        normed_UD = torch.cat([self.pos_ln(text_UD), self.image_pos_ln(image_UD)])
        query, key = (
            torch.cat(pair)
            for pair in zip(self.arithmetic.text_codes(text_X), self.arithmetic.image_codes(image_ids), strict=True)
        )
        return torch.cat([text_UD, image_UD]), normed_UD, RelativeCodes(query, key, self.arithmetic.num_entries)

    def position_vectors(self, own_UD: Tensor, memory_VD: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(queries' and keys' vectors of self-attention, of cross-attention), the same in every layer; () for none."""
        if self.config.entangle_position_embedding:
            return (), ()
        own = (self.self_pos_q_linear(own_UD), self.self_pos_k_linear(own_UD))
        return own, (self.cross_pos_q_linear(own_UD), self.cross_pos_k_linear(memory_VD))
