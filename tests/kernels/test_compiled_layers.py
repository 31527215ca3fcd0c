"""torch.compile of whole layers with every kernel in them: one graph, the numbers of eager; fake tensors suffice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from ofa_ds.config.architecture import KernelConfig
from ofa_ds.model.config import ModelConfig, preset
from ofa_ds.model.layers import DecoderLayer, EncoderLayer, PackedCore
from ofa_kernels.attention import RelativeCodes, Tokens, plan_attention, position_terms

ALL_ON = KernelConfig(attention="triton", layer_norm="triton", cross_entropy="triton")
LENGTHS = (5, 9)


def config(**changes: object) -> ModelConfig:
    sizes = {"dim": 32, "ffn_dim": 48, "num_heads": 2, "vocab_size": 64, "kernels": ALL_ON}
    return preset("nano", **(sizes | changes))


def tokens() -> Tokens:
    position = torch.cat([torch.arange(n) for n in LENGTHS])
    return Tokens(torch.tensor([0, *LENGTHS]).cumsum(0), position, max(LENGTHS))


def core(config: ModelConfig, queries: Tokens, keys: Tokens, *, relative: bool, causal: bool) -> PackedCore:
    index = torch.arange(max(LENGTHS))
    codes = RelativeCodes(index + len(index) - 1, index, 2 * len(index) - 1) if relative else None
    plan = plan_attention(queries, keys, relative=codes, causal=causal, kernel="triton")
    vectors = [torch.randn(max(LENGTHS), config.dim) for _ in range(2)]
    positions = position_terms(*vectors, config.num_heads, config.attention_scale, plan)
    row = torch.randn(config.num_heads, 2 * len(index) - 1) if relative else None
    return PackedCore(plan, positions, row, config.attention_scale)


def layer_and_call(kind: str, **changes: object) -> tuple[nn.Module, Callable[..., Tensor]]:
    """(the layer, a call of it with x [N, D] that needs nothing else)."""
    torch.manual_seed(0)
    settings = config(**changes)
    own, num = tokens(), len(LENGTHS)
    example_N = torch.repeat_interleave(torch.arange(num), torch.tensor(LENGTHS))
    if kind == "encoder":
        layer, cores = EncoderLayer(settings, 0.1), core(settings, own, own, relative=True, causal=False)
        return layer, lambda layer, x: layer(x, cores, example_N, num)
    layer, memory = DecoderLayer(settings, 0.1), tokens()
    cores = (
        core(settings, own, own, relative=True, causal=True), core(settings, own, memory, relative=False, causal=False)
    )  # fmt: skip
    memory_MD = torch.randn(sum(LENGTHS), settings.dim)
    return layer, lambda layer, x: layer(x, memory_MD, cores, example_N, num)


def results(layer: nn.Module, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    layer.zero_grad()
    x = torch.randn(sum(LENGTHS), 32, requires_grad=True)
    out = call(x)
    out.sum().backward()
    return [out, x.grad, *(each.grad for each in layer.parameters() if each.grad is not None)]


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_whole_layer_is_one_graph_with_the_numbers_of_eager(kind: str) -> None:
    layer, call = layer_and_call(kind)
    layer.eval()  # no masks: they are drawn in another order
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    eager, ours = results(layer, lambda x: call(layer, x)), results(layer, lambda x: compiled(layer, x))
    assert counter.frame_count == 1 and len(eager) == len(ours) > 10
    for expected, got in zip(eager, ours, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_dropout_and_drop_path_break_no_graph(kind: str) -> None:
    layer, call = layer_and_call(kind, dropout=0.1, attention_dropout=0.1)
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert all(each.isfinite().all() for each in results(layer, lambda x: compiled(layer, x)))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_fake_tensors_pass_through_a_whole_layer_forward_and_backward(kind: str) -> None:
    layer, call = layer_and_call(kind)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in layer.modules():
            for name, each in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(mode.from_tensor(each.detach())))
        shapes = [each.shape for each in results(layer, lambda x: call(layer, x))]
    assert shapes[:2] == [(sum(LENGTHS), 32)] * 2 and len(shapes) > 10
