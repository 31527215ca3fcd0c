"""What a call of an operator makes the host do, counted: launches, and operations of torch beside them.

Times are `python kernels/bench.py --host`; here nothing depends on the machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

import host  # noqa: E402
from test_compiled_layers import LENGTHS, layer_and_call  # noqa: E402

from ofa_kernels.attention import RelativeCodes, Tokens, plan_attention  # noqa: E402


@pytest.fixture(scope="module")
def counts() -> dict[str, tuple[list[int], list[host.Operations]]]:
    with host.stubbed():
        pairs = host.pairs()
    return {pair.name: host.counted(pair) for pair in pairs}


ATTENTIONS = ["attention, encoder", "attention, decoder", "attention, cross"]
NORMS = ["norm", "gelu + norm"]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attentions_backward_has_few_operations_beside_its_launches(counts: dict, name: str) -> None:
    _, (forward, backward) = counts[name]
    assert len(backward.working()) <= 8, backward.working()
    assert len(forward.working()) <= 4, forward.working()


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_has_no_operation_beside_its_launches(counts: dict, name: str) -> None:
    _, (forward, backward) = counts[name]
    assert not forward.working() and not backward.working(), backward.working()


@pytest.mark.parametrize("name", [*ATTENTIONS, *NORMS, "vocabulary loss"])
def test_an_eager_call_goes_past_torch_library(counts: dict, name: str) -> None:
    """An operator of torch.library costs the host three times what the same body does in an autograd.Function."""
    launches, operations = counts[name]
    assert min(launches) > 0, "the kernels did not run: the count says nothing"
    for each in operations:
        assert not {"attention_forward", "attention_backward", "norm", "norm_backward"} & set(each.names)
        assert not {"add_norm", "add_norm_backward", "linear_cross_entropy"} & set(each.names)


@pytest.mark.parametrize("name", [*ATTENTIONS, *NORMS, "vocabulary loss", "three plans, once a batch"])
def test_no_call_reads_a_number_or_a_shape_from_the_device(counts: dict, name: str) -> None:
    for each in counts[name][1]:
        assert not {"_local_scalar_dense", "nonzero", "_unique2", "item", "repeat_interleave"} & set(each.names)
        assert "lift_fresh" not in each.names, "a tensor made of Python numbers is a blocking copy"


@pytest.mark.parametrize("kind, forward_limit, backward_limit", [("encoder", 17, 24), ("decoder", 25, 35)])
def test_a_layer_issues_little_beside_its_products_and_launches(
    kind: str, forward_limit: int, backward_limit: int
) -> None:
    """Six products in an encoder layer and ten in a decoder layer, each two in the backward and a sum for its bias.

    Three more make the relative row.
    """
    layer, call = layer_and_call(kind, dropout=0.1)
    x = torch.randn(sum(LENGTHS), 32, requires_grad=True)
    leaves = [x, *layer.parameters()]
    with host.stubbed():
        with host.Operations() as forward:
            out = call(layer, x)
        upstream = torch.ones_like(out)
        with host.Operations() as backward:
            torch.autograd.grad(out, leaves, upstream)
    assert len(forward.working()) <= forward_limit, " ".join(forward.working())
    assert len(backward.working()) <= backward_limit, " ".join(backward.working())


def test_tokens_are_planned_once_for_all_kinds_of_attention() -> None:
    encoder, decoder = (Tokens(torch.tensor([0, 3, 7]), torch.arange(7) % 4, 4) for _ in range(2))
    codes = RelativeCodes(torch.arange(4) + 3, torch.arange(4), 7)
    with host.Operations() as seen:
        plans = [
            plan_attention(encoder, encoder, relative=codes, causal=False, kernel="triton"),
            plan_attention(decoder, decoder, relative=codes, causal=True, kernel="triton"),
            plan_attention(decoder, encoder, relative=None, causal=False, kernel="triton"),
        ]
    assert plans[0].queries is plans[0].keys is plans[2].keys
    assert plans[1].queries is plans[1].keys is plans[2].queries
    assert seen.names.count("sort") == 2


def test_the_table_has_a_line_for_every_operator_beside_torchs_own() -> None:
    with host.stubbed():
        pairs = host.pairs()
    costs = [host.measure(pair, rounds=1, calls=1) for pair in pairs]
    lines = host.table(costs).splitlines()
    assert len(lines) == 2 + len(pairs) and all(line.count("|") == lines[0].count("|") for line in lines)
    assert all(each.both_us > 0 for each in costs)
