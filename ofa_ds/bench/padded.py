"""What the original computes, in the way that it does, on our weights: the yardstick of `ofa_ds.bench`.

Written from docs/ofa.md, Model, since the original does not run with a current torch. One padded batch, time
first; one picture an example; a backbone of plain NCHW convolutions with BatchNorm and ReLU apart; a dense bias
[B, H, S, S] made anew for every layer; logits of all decoder positions at once. Loss and gradients are those of `OFA`
(a test holds the two together), so a difference in time comes from the way of computing alone.

Legend: B examples, P patches, T source tokens, S = P + T, L decoder tokens, D channels, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofa_ds.data.example import Example
from ofa_ds.model.ofa import OFA
from ofa_ds.model.positions import grid_ids, image_id_to_cell, token_buckets
from ofa_ds.model.resnet import BatchNorm, Bottleneck, ResNet
from ofa_ds.terms import PAD_ID


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedBatch:
    images: Tensor
    """[B, 3, h, w] normalised; zeros where the example has none."""
    has_image: Tensor
    """[B] bool."""
    patches: Tensor | None
    """[B, P] the patches drawn of each picture, or None for all."""
    source: Tensor
    """[B, T], padded as all that follow."""
    previous: Tensor
    """[B, L]."""
    target: Tensor
    """[B, L]."""
    code: Tensor
    """[B] bool."""


def pad(examples: Sequence[Example], side: int) -> PaddedBatch:
    """side: of the (square) pictures, in pixels."""

    def rows(name: str) -> Tensor:
        return nn.utils.rnn.pad_sequence(
            [torch.from_numpy(getattr(example, name)) for example in examples], batch_first=True, padding_value=PAD_ID
        )

    images = np.zeros((len(examples), 3, side, side), np.float32)
    for i, example in enumerate(examples):
        if example.image is not None:
            images[i] = example.image.transpose(2, 0, 1) / np.float32(127.5) - 1
    return PaddedBatch(
        images=torch.from_numpy(images),
        has_image=torch.tensor([example.image is not None for example in examples]),
        patches=None if examples[0].patches is None else rows("patches"),
        source=rows("source"),
        previous=rows("prev"),
        target=rows("target"),
        code=torch.tensor([example.code for example in examples]),
    )


class PaddedOFA:
    """`PaddedOFA(model)(batch)` is the summed loss of an official ResNet model without dropout and drop-path."""

    def __init__(self, model: OFA) -> None:
        self.encoder, self.decoder, self.config = model.encoder, model.decoder, model.config
        distances = torch.arange(min(self.config.max_positions, 1024))
        self.token_bucket = token_buckets(self.config.token_bucket_size)[distances[:, None] - distances + 1023]
        n = self.config.image_bucket_size
        r, c = image_id_to_cell(torch.arange(n**2 + 1), n)
        self.image_bucket = (r[:, None] - r + n - 1) * (2 * n - 1) + c[:, None] - c + n - 1
        start = (2 * n - 1) ** 2  # the rows of the start token: as query, as key, as both
        self.image_bucket[0], self.image_bucket[:, 0], self.image_bucket[0, 0] = start, start + 1, start + 2

    def __call__(self, batch: PaddedBatch, label_smoothing: float = 0.0) -> Tensor:
        hidden_LBD = self.decode(batch, *self.encode(batch))
        logits_BLV = F.linear(hidden_LBD.transpose(0, 1), self.encoder.embed_tokens.weight)
        logp = F.log_softmax(logits_BLV, -1, dtype=_at_least_fp32(logits_BLV)).view(-1, logits_BLV.shape[-1])
        target = batch.target.view(-1)
        logp, target = logp[target != PAD_ID], target[target != PAD_ID]
        nll, smooth = -logp.gather(-1, target[:, None])[:, 0], -logp.sum(-1)
        eps_i = label_smoothing / (logp.shape[-1] - 1)
        return ((1 - label_smoothing - eps_i) * nll + eps_i * smooth).sum()

    def encode(self, batch: PaddedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(memory [S, B, D], which of it does not count [B, S], normed positions [B, S, D])."""
        encoder, num_text = self.encoder, batch.source.shape[1]
        features = _resnet(encoder.embed_images, batch.images)
        ids_BP = grid_ids(*features.shape[2:], self.config.image_bucket_size)[None].expand(len(features), -1)
        features = features.flatten(2).transpose(1, 2)
        if batch.patches is not None:
            features = features.gather(1, batch.patches[:, :, None].expand(-1, -1, features.shape[2]))
            ids_BP = ids_BP.gather(1, batch.patches)
        num_patches = features.shape[1]
        no_image = ~batch.has_image[:, None].expand(-1, num_patches)
        ignored_BS = torch.cat([no_image, batch.source == PAD_ID], dim=1)
        text = F.embedding(batch.source, encoder.embed_tokens.weight) + encoder.type_embedding(batch.source * 0)
        image = encoder.image_proj(features) + encoder.type_embedding(torch.ones_like(ids_BP))
        x = torch.cat([encoder.patch_layernorm_embedding(image), encoder.layernorm_embedding(text)], dim=1)
        if ignored_BS.any():
            x = x * (1 - ignored_BS[:, :, None].to(x.dtype))
        x = x.transpose(0, 1)
        text_position = encoder.pos_ln(encoder.embed_positions(_count(batch.source)))
        position = torch.cat([encoder.image_pos_ln(encoder.embed_image_positions(ids_BP)), text_position], dim=1)
        absolute = self._products(encoder.pos_q_linear(position), encoder.pos_k_linear(position))
        key_mask, scale = ignored_BS if ignored_BS.any() else None, self.config.attention_scale
        for i, layer in enumerate(encoder.layers):
            bias = absolute.clone()
            token_table, image_table = encoder.token_rel_pos_table_list[i], encoder.image_rel_pos_table_list[i]
            text_bias = token_table(self.token_bucket[:num_text, :num_text]).expand(len(ids_BP), -1, -1, -1)
            bias[:, :, num_patches:, num_patches:] += text_bias.permute(0, 3, 1, 2)
            all_ids = self.image_bucket.expand(len(ids_BP), -1, -1)
            bucket = all_ids.gather(1, ids_BP[:, :, None].expand(-1, -1, all_ids.shape[2]))
            bucket = bucket.gather(2, ids_BP[:, None, :].expand(-1, num_patches, -1))
            bias[:, :, :num_patches, :num_patches] += image_table(bucket).permute(0, 3, 1, 2)
            x = layer(x, PaddedCore(bias, None, key_mask, scale), None, 0)
        return encoder.layer_norm(x), ignored_BS, position

    def decode(self, batch: PaddedBatch, memory: Tensor, ignored_BS: Tensor, memory_position: Tensor) -> Tensor:
        """-> [L, B, D] after the last norm."""
        decoder, code, length = self.decoder, batch.code, batch.previous.shape[1]
        position = decoder.embed_positions(_count(batch.previous))
        code_ids = decoder.code_ids[:length]
        if code.any():
            position[code] = decoder.embed_image_positions(code_ids.expand(len(code), -1))[code]
        bias, cross_bias = self._decoder_products(decoder.pos_ln(position), memory_position)
        x = F.embedding(batch.previous, self.encoder.embed_tokens.weight)
        if code.any():
            code_bias, code_cross_bias = self._decoder_products(decoder.image_pos_ln(position), memory_position)
            bias[code], cross_bias[code] = code_bias[code], code_cross_bias[code]
            x[~code], x[code] = decoder.layernorm_embedding(x[~code]), decoder.code_layernorm_embedding(x[code])
        else:
            x = decoder.layernorm_embedding(x)
        x, absolute = x.transpose(0, 1), bias
        future = torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)
        pads, scale = batch.previous == PAD_ID, self.config.attention_scale
        pads = pads if pads.any() else None
        cross_core = PaddedCore(cross_bias, None, ignored_BS, scale)
        for i, layer in enumerate(decoder.layers):
            bias = absolute.clone()
            text_bias = decoder.token_rel_pos_table_list[i](self.token_bucket[:length, :length]).permute(2, 0, 1)
            if code.any():
                image_table = decoder.image_rel_pos_table_list[i]
                bias[~code] += text_bias
                bias[code] += image_table(self.image_bucket[code_ids][:, code_ids]).permute(2, 0, 1)
            else:
                bias += text_bias
            x = layer(x, memory, (PaddedCore(bias, future, pads, scale), cross_core), None, 0)
        return decoder.layer_norm(x)

    def _decoder_products(self, position: Tensor, memory_position: Tensor) -> tuple[Tensor, Tensor]:
        decoder = self.decoder
        own = self._products(decoder.self_pos_q_linear(position), decoder.self_pos_k_linear(position))
        return own, self._products(decoder.cross_pos_q_linear(position), decoder.cross_pos_k_linear(memory_position))

    def _products(self, q_BSD: Tensor, k_BSD: Tensor) -> Tensor:
        """The absolute bias [B, H, S, S']."""
        q, k = (x.view(*x.shape[:2], self.config.num_heads, -1).transpose(1, 2) for x in (q_BSD, k_BSD))
        return torch.matmul(q * self.config.attention_scale, k.transpose(2, 3))


@dataclass(frozen=True, slots=True)
class PaddedCore:
    """Attention inside a layer of the model (see `ofa_ds.model.layers.AttentionCore`), as the original computes it."""

    bias: Tensor
    """[B, H, L, S]."""
    future: Tensor | None
    """[L, S], -inf at keys that lie in the future; added."""
    ignored_BS: Tensor | None
    """True at keys that do not count."""
    scale: float

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, head_scale_H: Tensor, dropout: float) -> Tensor:
        """q [L, B, D], k and v [S, B, D] -> [L, B, D]."""
        (length, num, dim), num_heads = q.shape, head_scale_H.shape[0]
        q *= self.scale
        q, k, v = (x.view(-1, num * num_heads, dim // num_heads).transpose(0, 1) for x in (q, k, v))
        logits = torch.bmm(q, k.transpose(1, 2))
        logits += self.bias.reshape(logits.shape)
        if self.future is not None:
            logits += self.future
        if self.ignored_BS is not None:
            by_example = logits.view(num, num_heads, length, -1)
            logits = by_example.masked_fill(self.ignored_BS[:, None, None], float("-inf")).view(logits.shape)
        probs = F.softmax(logits, -1, dtype=_at_least_fp32(logits)).type_as(logits)
        out = torch.bmm(probs, v).transpose(0, 1).contiguous().view(length, num, num_heads, -1)
        return (out * head_scale_H[:, None]).view(length, num, dim)


def _resnet(resnet: ResNet, x: Tensor) -> Tensor:
    x = F.max_pool2d(F.relu_(_norm(resnet.bn1, _convolve(resnet.conv1, x))), 3, stride=2, padding=1)
    for stage in (resnet.layer1, resnet.layer2, resnet.layer3):
        for block in stage:
            x = _bottleneck(block, x)
    return x


def _bottleneck(block: Bottleneck, x: Tensor) -> Tensor:
    out = F.relu_(_norm(block.bn1, _convolve(block.conv1, x)))
    out = F.relu_(_norm(block.bn2, _convolve(block.conv2, out)))
    out = _norm(block.bn3, _convolve(block.conv3, out))
    if block.downsample is not None:
        x = _norm(block.downsample[1], _convolve(block.downsample[0], x))
    return F.relu_(x + out)


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding)


def _norm(norm: BatchNorm, x: Tensor) -> Tensor:
    batch_statistics = norm.training and norm.mode != "frozen"
    moments = norm.running_mean, norm.running_var
    return F.batch_norm(x, *moments, norm.weight, norm.bias, batch_statistics, norm.momentum, norm.eps)


def _count(tokens_BT: Tensor) -> Tensor:
    return torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)


def _at_least_fp32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
