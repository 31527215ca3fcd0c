"""The operators of `bench.py` and what they are measured against, all computing the same function.

A contender is a forward whose inputs are leaves: the same values for each, packed for ours, padded for the others.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ofa_kernels.attention import RelativeCodes, Tokens, attention, plan_attention, position_terms
from ofa_kernels.cross_entropy import linear_cross_entropy
from ofa_kernels.layer_norm import add_layer_norm, gelu_layer_norm, layer_norm

Lengths = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Contender:
    name: str
    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    """Inputs that want a gradient."""
    packed: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor)
    """From the layout of the result (or of a gradient of its shape) to ours, for comparison."""
    same: bool = True
    """Whether it computes what ours does; else it shows what a part of ours costs."""


def _ours(like: Tensor) -> str:
    """On a GPU the kernels at every shape: where they are slower than torch is what is to be seen."""
    return "triton" if like.is_cuda else "auto"


def _leaf(*shape: int, like: Tensor, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator, device=like.device, dtype=torch.float32) * scale
    return values.to(like.dtype).requires_grad_()


def attentions(heads: int, dim: int, examples: Lengths, *, causal: bool, like: Tensor) -> list[Contender]:
    """OFA's attention with both kinds of bias and their gradients: ours, eager, SDPA, and on a GPU FlexAttention.

    examples: (queries, keys) of each; relative biases where all of them are self-attention. like: device and dtype.
    """
    width, longest = heads * dim, max(max(pair) for pair in examples)
    scale = (2 * dim) ** -0.5
    relative = all(queries == keys for queries, keys in examples)
    position_q, position_k = _leaf(longest, width, like=like), _leaf(longest, width, like=like, scale=0.9)
    row = _leaf(heads, 2 * longest - 1, like=like.float()) if relative else None
    head_scale = _leaf(heads, like=like.float())
    queries, keys = ([pair[side] for pair in examples] for side in (0, 1))
    q, k, v = (
        _leaf(sum(lengths), width, like=like, scale=s) for lengths, s in ((queries, 1), (keys, 1.1), (keys, 0.8))
    )
    own = functools.partial(_packed_attention, (q, k, v), queries=queries, keys=keys, scale=scale, causal=causal)
    terms = (position_q, position_k, row, head_scale)
    shared = tuple(each for each in (position_q, position_k, row, head_scale) if each is not None)
    padded = [_pad(x, lengths, heads) for x, lengths in ((q, queries), (k, keys), (v, keys))]
    index = torch.arange(longest, device=like.device)
    bucket = index[: max(queries), None] - index[None, : max(keys)] + longest - 1
    hidden = _hidden(queries, keys, causal, like.device)

    def bias() -> Tensor:
        """[B, H, Q, K], as the original makes it in every layer."""
        heads_of = [x.view(longest, heads, dim).transpose(0, 1).float() for x in (position_q, position_k)]
        absolute = scale * heads_of[0][:, : max(queries)] @ heads_of[1][:, : max(keys)].transpose(1, 2)
        both = absolute if row is None else absolute + row[:, bucket]
        return both.masked_fill(hidden, -torch.inf)

    def finish(out: Tensor) -> Tensor:
        return (out * head_scale[:, None, None].to(out.dtype)).transpose(1, 2).flatten(2)

    def eager() -> Tensor:
        logits = scale * (padded[0] @ padded[1].transpose(2, 3)).float() + bias()
        return finish(logits.softmax(-1).to(like.dtype) @ padded[2])

    def sdpa() -> Tensor:
        return finish(F.scaled_dot_product_attention(*padded, attn_mask=bias().to(like.dtype), scale=scale))

    def to_packed(out: Tensor) -> Tensor:
        return torch.cat([out[e, :n] for e, n in enumerate(queries)])

    others = [("eager", eager), ("sdpa, dense bias", sdpa)]
    if like.is_cuda:
        others.append(("flex", _flex(padded, bias, scale, finish)))
    found = [Contender("ofa-ds", own(terms), (q, k, v, *shared))]
    if relative:
        bare = (position_q, position_k, None, head_scale)
        without = tuple(x for x in shared if x is not row)
        found.append(Contender("ofa-ds, no tables", own(bare), (q, k, v, *without), same=False))
    return [*found, *(Contender(name, run, (*padded, *shared), to_packed) for name, run in others)]


def _packed_attention(
    qkv: tuple[Tensor, Tensor, Tensor],
    shared: tuple[Tensor, Tensor, Tensor | None, Tensor],
    queries: Sequence[int],
    keys: Sequence[int],
    scale: float,
    causal: bool,
) -> Callable[[], Tensor]:
    position_q, position_k, row, head_scale = shared
    device, longest, heads = qkv[0].device, position_q.shape[0], head_scale.shape[0]

    def tokens(lengths: Sequence[int]) -> Tokens:
        offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
        return Tokens(offsets, torch.cat([torch.arange(n, device=device) for n in lengths]), longest)

    own = tokens(queries)
    index = torch.arange(longest, device=device)
    codes = None if row is None else RelativeCodes(index + longest - 1, index, 2 * longest - 1)
    other = own if list(queries) == list(keys) else tokens(keys)
    plan = plan_attention(own, other, relative=codes, causal=causal, like=qkv[0], kernel=_ours(qkv[0]))

    def run() -> Tensor:
        positions = position_terms(position_q, position_k, heads, scale, plan)
        return attention(qkv, plan, positions, row, head_scale, scale=scale, dropout=0.0)

    return run


def _pad(x: Tensor, lengths: Sequence[int], heads: int) -> Tensor:
    """[B, H, S, d], a leaf of its own."""
    parts = x.detach().split(list(lengths))
    padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    return padded.unflatten(2, (heads, -1)).transpose(1, 2).contiguous().requires_grad_()


def _hidden(queries: Sequence[int], keys: Sequence[int], causal: bool, device: torch.device) -> Tensor:
    """[B, 1, Q, K] bool: keys that a query must not see."""
    key = torch.arange(max(keys), device=device)
    hidden = (key >= torch.tensor(keys, device=device)[:, None])[:, None, None, :].expand(-1, 1, max(queries), -1)
    if causal:
        hidden = hidden | (key[None, :] > torch.arange(max(queries), device=device)[:, None])
    return hidden


def _flex(
    padded: Sequence[Tensor], bias: Callable[[], Tensor], scale: float, finish: Callable[[Tensor], Tensor]
) -> Callable[[], Tensor]:
    @functools.cache
    def compiled() -> Callable[..., Tensor]:
        from torch.nn.attention.flex_attention import flex_attention  # fails, if at all, as this contender alone

        return torch.compile(flex_attention)

    def run() -> Tensor:
        dense = bias()

        def add_bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + dense[batch, head, query, key]

        return finish(compiled()(*padded, score_mod=add_bias, scale=scale))

    return run


def norms(kind: str, rows: int, width: int, like: Tensor) -> list[Contender]:
    """kind: `norm`, `gelu + norm`, `residual + norm`. Beside torch, torch.compile and, where installed, Liger."""
    x, residual = _leaf(rows, width, like=like), _leaf(rows, width, like=like, scale=0.7)
    weight, bias = _leaf(width, like=like), _leaf(width, like=like, scale=0.1)
    leaves = (x, residual, weight, bias) if kind == "residual + norm" else (x, weight, bias)

    def plain() -> Tensor:
        value = {"norm": lambda: x, "gelu + norm": lambda: F.gelu(x), "residual + norm": lambda: residual + x}[kind]()
        return F.layer_norm(value, (width,), weight, bias)

    ours = {
        "norm": lambda: layer_norm(x, weight, bias, kernel=_ours(like)),
        "gelu + norm": lambda: gelu_layer_norm(x, weight, bias, kernel=_ours(like)),
        "residual + norm": lambda: add_layer_norm(residual, x, weight, bias, kernel=_ours(like))[1],
    }[kind]
    found = [Contender("ofa-ds", ours, leaves), Contender("torch", plain, leaves)]
    if like.is_cuda:
        found.append(Contender("torch.compile", torch.compile(plain), leaves))
        if kind == "norm" and importlib.util.find_spec("liger_kernel"):

            def liger() -> Tensor:
                from liger_kernel.ops.layer_norm import LigerLayerNormFunction

                return LigerLayerNormFunction.apply(x, weight, bias, 1e-5)

            found.append(Contender("liger", liger, leaves))
    return found


def losses(rows: int, width: int, vocab: int, like: Tensor) -> list[Contender]:
    """Linear and cross-entropy, losses per token. Beside eager, torch.compile and, where installed, Liger."""
    hidden, weight = _leaf(rows, width, like=like), _leaf(vocab, width, like=like, scale=width**-0.5)
    target = torch.randint(4, vocab, (rows,), generator=torch.Generator().manual_seed(0)).to(like.device)
    leaves = (hidden, weight)

    def eager() -> Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), target, ignore_index=1, reduction="none")

    found = [
        Contender("ofa-ds", lambda: linear_cross_entropy(hidden, weight, target, kernel=_ours(like))[0], leaves),
        Contender("eager", eager, leaves),
    ]
    if like.is_cuda:
        found.append(Contender("torch.compile", torch.compile(eager), leaves))
        if importlib.util.find_spec("liger_kernel"):

            def liger() -> Tensor:
                from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

                result = Liger.apply(hidden, weight, target, None, None, 1, 0.0, 0.0, "none")
                return result[0] if isinstance(result, tuple) else result

            found.append(Contender("liger", liger, leaves))
    return found
