"""Batch normalisation in one process: stand-ins, precision, modes; drop-path."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ofa_ds.model.resnet import BatchNorm, DropPath, ResNet


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0)) * 2 + 3


def test_a_stand_in_changes_neither_statistics_nor_the_features_of_others(images: Tensor) -> None:
    alone, beside = BatchNorm(4), BatchNorm(4)
    stand_in = torch.full((1, 4, 5, 6), 1e4)
    expected = alone(images)
    out = beside(torch.cat([images, stand_in]), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    torch.testing.assert_close(out[:3], expected)
    for name, buffer in alone.named_buffers():
        torch.testing.assert_close(beside.get_buffer(name), buffer)


def test_only_stand_ins_are_normalised_by_the_running_statistics_and_change_nothing(images: Tensor) -> None:
    norm = BatchNorm(4)
    norm(images)
    before = copy.deepcopy(norm.state_dict())
    out = norm(images, torch.zeros(3))
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    torch.testing.assert_close(out, norm.eval()(images))


def test_gradients_with_a_stand_in_are_those_of_the_other_images(images: Tensor) -> None:
    inputs = images.double().requires_grad_()
    weight = torch.tensor([1.0, 0.0, 1.0])
    norm = BatchNorm(4).double()
    upstream = torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    upstream[1] = 0
    norm(inputs, weight).backward(upstream)
    others = images.double()[[0, 2]].requires_grad_()
    reference = BatchNorm(4).double()
    reference(others).backward(upstream[[0, 2]])
    torch.testing.assert_close(inputs.grad[[0, 2]], others.grad)
    assert inputs.grad[1].abs().sum() == 0
    torch.testing.assert_close(norm.weight.grad, reference.weight.grad)


def test_bf16_weights_leave_statistics_and_arithmetic_in_fp32(images: Tensor) -> None:
    norm = BatchNorm(4).bfloat16()
    assert norm.weight.dtype == torch.bfloat16
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    out = norm(images.bfloat16())
    assert out.dtype == torch.bfloat16
    exact = F.batch_norm(images.bfloat16().double(), None, None, training=True)
    assert (out.double() - exact).abs().max() < 0.02
    mean = images.bfloat16().double().mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean.double(), 0.1 * mean, rtol=1e-5, atol=1e-6)


def test_frozen_norms_have_no_parameters_and_keep_their_statistics_in_training(images: Tensor) -> None:
    norm = BatchNorm(4, "frozen").train()
    before = copy.deepcopy(norm.state_dict())
    assert set(before) == {"weight", "bias", "running_mean", "running_var"} and not list(norm.parameters())
    norm(images)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_batch_mode_is_the_batch_norm_of_torch(images: Tensor) -> None:
    ours, theirs = BatchNorm(4), nn.BatchNorm2d(4)
    torch.testing.assert_close(ours(images), theirs(images))
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)


def test_resnet_features_have_1024_channels_at_a_sixteenth_of_the_size_and_reach_every_weight() -> None:
    model = ResNet((1, 2, 1), drop_path=0.5)
    features = model(torch.randn(2, 3, 48, 80), torch.ones(2))
    assert features.shape == (2, 1024, 3, 5)
    features.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    rates = [block.drop_path.rate for stage in (model.layer1, model.layer2, model.layer3) for block in stage]
    assert rates == [0, 0, 0.5, 0]


def test_drop_path_drops_whole_images_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    out = DropPath(0.25).train()(torch.ones(4000, 2, 3))
    assert sorted(set(out.flatten().tolist())) == pytest.approx([0, 4 / 3])
    assert torch.equal(out.flatten(1).amax(1), out.flatten(1).amin(1))
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(DropPath(0.25).eval()(torch.ones(5, 2)), torch.ones(5, 2))


def test_unknown_modes_and_depths_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_norm 'global': want one of frozen, batch, sync"):
        ResNet((1, 1, 1), batch_norm="global")
    with pytest.raises(ValueError, match="want 3 numbers of blocks"):
        ResNet((3, 4, 6, 3))
