"""A VQGAN of `scenes`, constructed and not trained: it gives the codes of the rule and paints what the rule paints.

The construction follows signals, one number a place each, through layers that were made for something else.

Group norms that change nothing. Signal k has the three channels of group k: (x, -x, B), the last a constant from a
bias. The mean of the group is B / 3; its deviation is S = sqrt(2) / 3 B, but for a share of 1.5 E[x^2] / B^2. Weight
g S and bias g B / 3 + b give g x + b; the error of x is that share, and E[x^2] / (2 B), alike in both channels.

Swish that is wanted. At x + 30 it is x + 30: half the difference of the pair is x, and 0 outside the picture (`_linear`
then `_of`). At g x, g large, it is g relu(x) where |g x| is 20 or more, and where x is 0 (`_rectify`, `_positive`).

Blocks that do nothing: a residual block whose second convolution is 0; attention whose projection is 0.

Encoder. At 64 x 64: has this pixel color c? Each color is a corner of the palette: R, G, B, added where the color has
more of it than the ground and subtracted where less, are larger at that color than at all others. Two halvings average:
the share of c in each quarter of a cell. At 16 x 16: are 8 of the 16 pixels filled (from 0 at 7 to 1 at 8)? Has none
color c? A halving puts the four quarters' answers to the first beside each other, and adds up those to the second. At
8 x 8: c is absent where this sum is 4. The logit of a code is 6 times the agreement of its pattern with the four
quarters (-4, -2, ..., 4), plus c where color c is there: the pattern first, then the largest color, as in the rule. The
next logit is less by 1 or more.

Decoder. A row of the codebook has RGB of the four quarters, and a 1. On even ground no convolution sees which places
of the doubled grid are the left halves of cells. Borders tell: a ramp 1, 2, 3, ... over the cells, to which every
convolution adds one from the outside, which is 0; doubled it is 1, 1, 2, 2, 3, 3, ..., and its step from the left is 1
at left halves and 0 at right ones; rows likewise. Then a block adds up, over the quarters, relu(RGB - 2 (this column is
another) - 2 (this row is another)), RGB in [0, 2]: what is left is the quarter that the place belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import product

import torch
from torch import nn

from ofa_ds.data.scenes import CELL, COLORS, GROUND, NUM_CODES, SIDE, picture_of_codes
from ofa_ds.vision.blocks import ResBlock
from ofa_ds.vision.config import NORM_GROUPS, VqganConfig
from ofa_ds.vision.vqgan import Vqgan

MAX_SIDE = 10 * CELL
"""Pixels of a picture that is painted right: as far as the ramp goes."""

_B = 2048.0
"""A power of two: sums of its square, over whatever many places and in whatever order, have no rounding in fp32."""
_S = math.sqrt(2) / 3 * _B
_QUARTERS = tuple(product((0, 1), repeat=2))
"""(row, column) within a cell, in the order of a pattern's bits."""
_CENTER = (1, 1)
_BEFORE = ((0, 1), (1, 0))
"""Taps of a 3 x 3 kernel that see the row above, the column to the left."""

Ends = dict[int, float]
"""Channels of a convolution, with factors."""

# Signals of the encoder: RGB; pixels of each color; quarters that are filled; colors that a quarter, a cell is without.
_RGB, _COLOR, _FILLED, _ABSENT, _NOWHERE = range(3), range(3, 9), range(9, 13), range(13, 19), range(19, 25)
# Signals of the decoder: RGB of each quarter, ramp of rows and of columns, RGB of the picture.
_QUARTER_RGB, _RAMP, _PAINTED = range(12), range(12, 14), range(14, 17)
# Of a vector of the codebook; the encoder uses the first 4, of quarters, and 6, of colors.
_WIDTH = len(_QUARTER_RGB) + 1


def scenes_vqgan() -> Vqgan:
    """In evaluation mode; always the same weights."""
    config = VqganConfig(
        quantizer="gumbel", n_embed=NUM_CODES, embed_dim=_WIDTH, z_channels=_WIDTH, resolution=SIDE,
        ch=3 * NORM_GROUPS, ch_mult=(1, 1, 1, 1), num_res_blocks=1, attn_resolutions=(), max_side=MAX_SIDE,
    )  # fmt: skip
    model = Vqgan(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    _set_encoder(model)
    _set_codebook(model)
    _set_decoder(model)
    return model


def _set_encoder(model: Vqgan) -> None:
    encoder, levels = model.encoder, model.encoder.down
    for k in _RGB:
        _connect(encoder.conv_in, _to(k), {k: 1.0})
    _find_colors(levels[0].block[0])
    for level, color, at in product(levels[:2], _COLOR, _QUARTERS):
        _connect(level.downsample.conv, _to(color), _of(color), 1 / len(_QUARTERS), at)
    _judge_quarters(levels[2].block[0])
    for k, at in enumerate(_QUARTERS):
        _connect(levels[2].downsample.conv, _to(_FILLED[k]), _of(_FILLED[0]), at=at)
        for absent in _ABSENT:
            _connect(levels[2].downsample.conv, _to(absent), _of(absent), at=at)
    _judge_cells(levels[3].block[0])
    _linear(encoder.norm_out)
    for k, signal in enumerate((*_FILLED, *_NOWHERE)):
        _connect(encoder.conv_out, {k: 1.0}, _of(signal))
    for conv in (encoder.conv_in, *(level.downsample.conv for level in levels[:3])):
        _set_constants(conv)


def _find_colors(block: ResBlock) -> None:
    gain = 100.0
    _activate(block)
    for k, (color, (weights, bias)) in enumerate(zip(_COLOR, _corners(), strict=True)):
        for rgb, weight in zip(_RGB, weights, strict=True):
            _connect(block.conv1, _to(k), _of(rgb), weight / 4)
        _shift(block.conv1, _to(k), bias / 4)
        _rectify(block.norm2, k, gain)
        _connect(block.conv2, _to(color), _positive(k), 4 / gain)


def _judge_quarters(block: ResBlock) -> None:
    """Colors are shares of a quarter; in units of 4 pixels, of its 16, is what is rectified."""
    gain = 250.0
    _activate(block)
    for k, pixels in enumerate((7, 8)):  # between them from 0 to 1
        for color in _COLOR:
            _connect(block.conv1, _to(k), _of(color), 4.0)
        _shift(block.conv1, _to(k), -pixels / 4)
        _rectify(block.norm2, k, gain)
        _connect(block.conv2, _to(_FILLED[0]), _positive(k), (4, -4)[k] / gain)
    for k, (color, absent) in enumerate(zip(_COLOR, _ABSENT, strict=True), 2):  # half a pixel less those there
        _connect(block.conv1, _to(k), _of(color), -4.0)
        _shift(block.conv1, _to(k), 0.5 / 4)
        _rectify(block.norm2, k, gain)
        _connect(block.conv2, _to(absent), _positive(k), 8 / gain)


def _judge_cells(block: ResBlock) -> None:
    gain = 100.0
    _activate(block)
    for k, (absent, nowhere) in enumerate(zip(_ABSENT, _NOWHERE, strict=True)):  # of 4 quarters, but not of 3
        _connect(block.conv1, _to(k), _of(absent))
        _shift(block.conv1, _to(k), -3.5)
        _rectify(block.norm2, k, gain)
        _connect(block.conv2, _to(nowhere), _positive(k), 2 / gain)


def _corners() -> Iterator[tuple[list[float], float]]:
    """Of each color weights of R, G, B in [-1, 1] and bias: 1 at this color, -1 or less at all others."""
    palette = torch.tensor([GROUND, *COLORS.values()]) / 127.5 - 1
    for color in palette[1:]:
        sign = (color - palette[0]).sign()
        first, second = (palette @ sign).topk(2).values.tolist()
        yield (sign * 2 / (first - second)).tolist(), -(first + second) / (first - second)


def _set_codebook(model: Vqgan) -> None:
    for conv in (model.quant_conv, model.post_quant_conv):
        nn.init.dirac_(conv.weight)
    proj, rows, num_quarters = model.quantize.proj, model.quantize.rows, len(_QUARTERS)
    for code in range(NUM_CODES):
        cell = torch.from_numpy(picture_of_codes([code])[:: CELL // 2, :: CELL // 2]).flatten()
        rows[code] = torch.cat((cell / 127.5, torch.ones(1)))
        color, pattern = divmod(code - 1, 2**num_quarters - 1) if code else (0, -1)
        if color >= len(COLORS):
            proj.bias[code] = -1000.0  # never given
            continue
        for k in range(num_quarters):
            agreement = 6.0 if pattern + 1 >> k & 1 else -6.0
            proj.weight[code, k] = 2 * agreement
            proj.bias[code] -= agreement
        if code:
            proj.weight[code, num_quarters + color] = -(color + 1.0)
            proj.bias[code] += color + 1.0


def _set_decoder(model: Vqgan) -> None:
    decoder = model.decoder
    for k in _QUARTER_RGB:
        _connect(decoder.conv_in, _to(k), {k: 1.0})
    for ramp, at in zip(_RAMP, _BEFORE, strict=True):
        _connect(decoder.conv_in, _to(ramp), {_WIDTH - 1: 1.0}, at=at)
        _shift(decoder.conv_in, _to(ramp), 1.0)
    for block in (decoder.mid.block_1, decoder.mid.block_2, *decoder.up[3].block):
        _lengthen(block)

    _keep(decoder.up[3].upsample.conv, (*_QUARTER_RGB, *_RAMP))
    for ramp, at in zip(_RAMP, _BEFORE, strict=True):
        _connect(decoder.up[3].upsample.conv, _to(ramp), _of(ramp), -1.0, at)
    _choose_quarter(decoder.up[2].block[0])
    for level in (decoder.up[2], decoder.up[1]):
        _keep(level.upsample.conv, _PAINTED)
    _linear(decoder.norm_out)
    for k, painted in enumerate(_PAINTED):
        _connect(decoder.conv_out, {k: 1.0}, _of(painted))
        _shift(decoder.conv_out, {k: 1.0}, 0.5 / 127.5 - 1)  # fractions of 8 bits are cut off
    for conv in (decoder.conv_in, *(level.upsample.conv for level in decoder.up[1:])):
        _set_constants(conv)


def _lengthen(block: ResBlock) -> None:
    """Both ramps, right up to n cells from the border, by two cells; elsewhere they stay n."""
    _activate(block)
    _linear(block.norm2)
    for k, (ramp, at) in enumerate(zip(_RAMP, _BEFORE, strict=True)):
        _connect(block.conv1, _to(k), _of(ramp), at=at)
        _shift(block.conv1, _to(k), 1.0)
        _connect(block.conv1, _to(2 + k), _of(ramp))
        _connect(block.conv2, _to(ramp), _of(k), at=at)
        _shift(block.conv2, _to(ramp), 1.0)
        _connect(block.conv2, _to(ramp), _of(2 + k), -1.0)


def _choose_quarter(block: ResBlock) -> None:
    gain = 200.0
    _activate(block)
    for signal, (quarter, k) in enumerate(product(_QUARTERS, _RGB)):
        _connect(block.conv1, _to(signal), _of(signal))
        for half, ramp in zip(quarter, _RAMP, strict=True):  # its step is 1 at the first half
            _connect(block.conv1, _to(signal), _of(ramp), -2.0 if half else 2.0)
            _shift(block.conv1, _to(signal), 0.0 if half else -2.0)
        _rectify(block.norm2, signal, gain)
        _connect(block.conv2, _to(_PAINTED[k]), _positive(signal), 1 / gain)


# Signals and layers -------------------------------------------------------


def _to(signal: int) -> Ends:
    return {3 * signal: 1.0, 3 * signal + 1: -1.0}


def _of(signal: int) -> Ends:
    return {3 * signal: 0.5, 3 * signal + 1: -0.5}


def _positive(signal: int) -> Ends:
    """Behind `_rectify`."""
    return {3 * signal: 1.0}


def _connect(conv: nn.Conv2d, to: Ends, of: Ends, weight: float = 1.0, at: tuple[int, int] = _CENTER) -> None:
    for (out, a), (into, b) in product(to.items(), of.items()):
        conv.weight[out, into, at[0], at[1]] += a * b * weight


def _shift(conv: nn.Conv2d, to: Ends, value: float) -> None:
    for out, a in to.items():
        conv.bias[out] += a * value


def _keep(conv: nn.Conv2d, signals: Iterable[int]) -> None:
    for signal in signals:
        _connect(conv, _to(signal), _of(signal))


def _set_constants(conv: nn.Conv2d) -> None:
    conv.bias[2::3] = _B


def _activate(block: ResBlock) -> None:
    """Its first half passes signals on; its second is to be set."""
    _linear(block.norm1)
    _set_constants(block.conv1)


def _linear(norm: nn.GroupNorm) -> None:
    norm.weight.view(-1, 3)[:, :2] = _S
    norm.bias.view(-1, 3)[:, :2] = _B / 3 + 30


def _rectify(norm: nn.GroupNorm, signal: int, gain: float) -> None:
    norm.weight[3 * signal] = gain * _S
    norm.bias[3 * signal] = gain * _B / 3
