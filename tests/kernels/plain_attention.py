"""OFA's attention by dense operators that all compute in the dtype they are given: what 16 bits cost in plain torch.

The reference of `ofa_kernels.attention` computes in fp32 inside, and so does not show that.
"""

from __future__ import annotations

import torch
from test_attention_kernel import NAMES, Case
from torch import Tensor


def plain_results(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """As `case.results`, with every product, sum and softmax rounded to `dtype`."""
    inputs = case.inputs(dtype)
    out = plain_attention(case, inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)) / 2
    out.backward(upstream.to(out))
    grads = {name: x.grad for name, x in zip(NAMES, inputs, strict=True) if x.grad is not None}
    return {"out": out.detach(), **grads}


def plain_attention(case: Case, inputs: list[Tensor]) -> Tensor:
    q, k, v, pos_q, pos_k, row_HR, head_scale = inputs
    queries, keys = case.sides()
    codes = case.codes()

    def heads(x_ND: Tensor) -> Tensor:
        return x_ND.unflatten(1, (case.heads, -1)).transpose(0, 1)

    outputs = []
    query_ends, key_ends = queries.offsets.tolist(), keys.offsets.tolist()
    for example in range(len(query_ends) - 1):
        own, other = slice(*query_ends[example : example + 2]), slice(*key_ends[example : example + 2])
        at_query, at_key = queries.position[own], keys.position[other]
        logits = case.scale * heads(q[own]) @ heads(k[other]).transpose(1, 2)
        if case.positions:
            logits = logits + case.scale * heads(pos_q[at_query]) @ heads(pos_k[at_key]).transpose(1, 2)
        if codes is not None:
            entry = codes.query[at_query][:, None] - codes.key[at_key]
            is_there = (entry >= 0) & (entry < row_HR.shape[1])
            logits = logits + row_HR[:, entry.clamp(0, row_HR.shape[1] - 1)] * is_there
        if case.causal:
            later = torch.ones(logits.shape[1:], dtype=torch.bool, device=logits.device).triu(1)
            logits = logits.masked_fill(later, -torch.inf)
        outputs.append((logits.softmax(-1) @ heads(v[other]) * head_scale[:, None, None]).transpose(0, 1).flatten(1))
    return torch.cat(outputs)
