"""OFA's encoder on packed tokens: image patches and text of each example, with positions that stay out of the content.

Legend: N = P + T encoder tokens (P patches, T text), D channels, Q patches of all images, U distinct positions,
E examples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ofa_ds.model.config import ModelConfig
from ofa_ds.model.init import Embedding, Linear
from ofa_ds.model.inputs import PackedInput
from ofa_ds.model.layers import EncoderLayer, LayerNorm, PackedCore, RelativeTables, TokenEmbedding, rows_of
from ofa_ds.model.positions import RelativeRow, grid_ids, image_id_to_cell, num_image_rows, num_token_rows
from ofa_ds.model.stem import build_backbone, normalize
from ofa_kernels.attention import RelativeCodes, Tokens, plan_attention, position_terms


class Encoded(NamedTuple):
    """The encoder's result; its tensors stand in it plainly for ZeRO-3's hooks."""

    memory_ND: Tensor
    """After the last norm."""
    position_UD: Tensor
    """Positional vectors, normed where the model norms them; the decoder's cross-attention uses them."""
    position_N: Tensor
    """Which of the U vectors each token has."""
    tokens: Tokens
    """The same for the attention's plan: this very object, with what was already planned of it."""


def linear_schedule(rate: float, num_layers: int) -> list[float]:
    """Drop-path of each layer: from 0 at the first to `rate` at the last."""
    return [rate * i / max(num_layers - 1, 1) for i in range(num_layers)]


class Encoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, std = config.dim, config.init_std
        self.config = config
        self.embed_tokens = TokenEmbedding(config.vocab_size, dim, std, config.kernels.cross_entropy)
        self.layernorm_embedding = LayerNorm(dim, config.kernels)
        self.type_embedding = Embedding(2, dim, std)
        self.embed_images = build_backbone(config)
        self.image_proj = Linear(config.backbone.channels, dim, std)
        self.patch_layernorm_embedding = LayerNorm(dim, config.kernels)
        self.embed_positions = Embedding(config.max_positions + 2, dim, std)
        self.embed_image_positions = Embedding(config.image_bucket_size**2 + 1, dim, std)
        if not config.use_ofasys:
            self.pos_ln = LayerNorm(dim, config.kernels)
        self.image_pos_ln = LayerNorm(dim, config.kernels)  # in OFASys it is a parameter that nothing reads
        if not config.entangle_position_embedding:
            self.pos_q_linear = Linear(dim, dim, std)
            self.pos_k_linear = Linear(dim, dim, std)
        rates = linear_schedule(config.drop_path, config.encoder_layers)
        self.layers = nn.ModuleList(EncoderLayer(config, rate) for rate in rates)
        self.layer_norm = LayerNorm(dim, config.kernels)
        num_tables = 1 if config.share_attn_bias else config.encoder_layers
        sizes = num_token_rows(config.token_bucket_size), num_image_rows(config.image_bucket_size)
        self.token_rel_pos_table_list = nn.ModuleList(
            Embedding(sizes[0], config.num_heads, std) for _ in range(num_tables)
        )
        self.image_rel_pos_table_list = nn.ModuleList(
            Embedding(sizes[1], config.num_heads, std) for _ in range(num_tables)
        )
        self.arithmetic = RelativeRow(config.token_bucket_size, config.image_bucket_size, config.max_positions, False)
        self.relative = RelativeTables(self.arithmetic)

    def forward(self, batch: PackedInput, text_TD: Tensor) -> Encoded:
        """text_TD: the embedded source tokens. A batch without image groups (G = 0) runs no image module."""
        has_images = len(batch.images) > 0
        types = self.type_embedding(torch.arange(2, device=text_TD.device))
        features_PC, grids = self._patch_features(batch) if has_images else (None, [])
        position_UD, position_N, codes = self._positions(batch, grids)
        added_ND = rows_of(position_UD, position_N) if self.config.entangle_position_embedding else None
        text_slot, patch_slot = batch.source_slot, batch.patch_slot
        text_TD = text_TD if added_ND is None else text_TD + added_ND.index_select(0, text_slot)
        text_TD = self._dropout(self.layernorm_embedding(text_TD + types[0]))
        x_ND = text_TD
        if features_PC is not None:
            image_PD = self.image_proj(features_PC)
            image_PD = image_PD if added_ND is None else image_PD + added_ND.index_select(0, patch_slot)
            image_PD = self._dropout(self.patch_layernorm_embedding(image_PD + types[1]))
            x_ND = torch.cat([image_PD, text_TD])
        x_ND = x_ND.index_select(0, batch.places.encoder_row)
        tokens = Tokens(batch.encoder_offsets, position_N, position_UD.shape[0], batch.num_patches)
        x_ND = self._layers(x_ND, batch, tokens, position_UD, codes)
        return Encoded(self.layer_norm(x_ND), position_UD, position_N, tokens)

    def memory(self, batch: PackedInput, encoded: Encoded) -> tuple[Encoded, Tokens]:
        """What each run of the decoder reads, one after another, and that axis as the attention's plan wants it."""
        if not len(batch.encoder_of):
            return encoded, encoded.tokens
        places = batch.places
        index_L, offsets, num_patches = places.memory_index, places.memory_offsets, places.memory_patches
        memory_LD, position_L = rows_of(encoded.memory_ND, index_L), encoded.position_N.index_select(0, index_L)
        tokens = Tokens(offsets, position_L, encoded.position_UD.shape[0], num_patches)
        return Encoded(memory_LD, encoded.position_UD, position_L, tokens), tokens

    def _layers(
        self, x_ND: Tensor, batch: PackedInput, tokens: Tokens, position_UD: Tensor, codes: RelativeCodes
    ) -> Tensor:
        plan = plan_attention(
            tokens, tokens, relative=codes, causal=False, kernel=self.config.kernels.attention, like=x_ND
        )
        positions: tuple[Tensor, ...] = ()
        if not self.config.entangle_position_embedding:
            pos_q_UD, pos_k_UD = self.pos_q_linear(position_UD), self.pos_k_linear(position_UD)
            positions = position_terms(pos_q_UD, pos_k_UD, self.config.num_heads, self.config.attention_scale, plan)
        example_N, num_examples = batch.places.encoder_example, len(batch.num_patches)
        for i, layer in enumerate(self.layers):
            row_HR = self.relative(i, self.token_rel_pos_table_list, self.image_rel_pos_table_list)
            args = (x_ND, PackedCore(plan, positions, row_HR, self.config.attention_scale), example_N, num_examples)
            if self.config.activation_checkpointing and self.training:
                x_ND = checkpoint(layer, *args, use_reentrant=False)
            else:
                x_ND = layer(*args)
        return x_ND

    def _patch_features(self, batch: PackedInput) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Features [P, C] of the patches that are tokens, and (images, rows, columns) of each image group."""
        features, grids = [], []
        dtype = self.type_embedding.weight.dtype
        for images, holes, weight, all_count in zip(
            batch.images, batch.image_holes, batch.image_weight, batch.places.all_images_count, strict=True
        ):
            pixels = normalize(images, holes, dtype, self.config.pixel_norm)
            features_ICHW = self.embed_images(pixels, None if all_count else weight)
            num_images, num_channels, height, width = features_ICHW.shape
            features.append(features_ICHW.permute(0, 2, 3, 1).reshape(-1, num_channels))
            grids.append((num_images, height, width))
        features_QC = features[0] if len(features) == 1 else torch.cat(features)
        return rows_of(features_QC, batch.patch_index), grids

    def _positions(self, batch: PackedInput, grids: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, RelativeCodes]:
        """Vectors [U, D] of the distinct positions, [N] which one each token has, and their relative codes."""
        places = batch.places
        text_ids, position_N = places.text_positions, places.encoder_position
        text_UD = self.embed_positions(text_ids)
        if not self.config.use_ofasys:
            text_UD = self.pos_ln(text_UD)
        if not grids:
            codes = RelativeCodes(*self.arithmetic.text_codes(text_ids), self.arithmetic.num_entries)
            return text_UD, position_N, codes
        image_UD, image_ids, image_P = self._image_positions(batch, grids)
        if not self.config.use_ofasys:
            image_UD = self.image_pos_ln(image_UD)
        query, key = (
            torch.cat(pair)
            for pair in zip(self.arithmetic.image_codes(image_ids), self.arithmetic.text_codes(text_ids), strict=True)
        )
        if self.config.interpolate_position:  # the rows of pictures are then those of whole grids
            position_N = torch.cat([image_P, places.text_position + len(image_ids)]).index_select(0, places.encoder_row)
        return torch.cat([image_UD, text_UD]), position_N, RelativeCodes(query, key, self.arithmetic.num_entries)

    def _image_positions(self, batch: PackedInput, grids: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """(vectors [U, D] before the norm, position id [U], which one each patch has [P])."""
        if not self.config.interpolate_position:
            image_ids = batch.places.image_positions
            return self.embed_image_positions(image_ids), image_ids, batch.places.image_position
        bucket_size = self.config.image_bucket_size
        native = self.config.orig_patch_image_size // self.config.patch_size
        image_P = torch.empty_like(batch.patch_position)
        r, c = image_id_to_cell(batch.patch_position, bucket_size)
        vectors, ids, first_patch, first_row = [], [], 0, 0
        for num_images, height, width in grids:  # every group has its own rows, whether resized or not
            group_ids = grid_ids(height, width, bucket_size, image_P.device)
            resized = height * width > native**2
            vectors_XD = self.embed_image_positions(
                grid_ids(native, native, bucket_size, image_P.device) if resized else group_ids
            )
            if resized:
                square = vectors_XD.T.reshape(1, -1, native, native)
                vectors_XD = (
                    F.interpolate(square, size=(height, width), mode="bilinear", align_corners=False)[0].flatten(1).T
                )
            last_patch = first_patch + num_images * height * width
            inside = (batch.patch_index >= first_patch) & (batch.patch_index < last_patch)
            image_P = torch.where(inside, first_row + r * width + c, image_P)
            vectors.append(vectors_XD)
            ids.append(group_ids)
            first_patch, first_row = last_patch, first_row + height * width
        return torch.cat(vectors), torch.cat(ids), image_P

    def _dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training) if self.config.dropout else x
