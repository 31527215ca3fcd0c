"""Batch normalisation over two ranks equals one process on all their images; stand-ins do not count."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from ofa_ds.engine.state import agree_on_buffers, saved_buffers
from ofa_ds.model.resnet import BatchNorm, ResNet

WORLD_SIZE = 2
CHANNELS = 5
COUNTED = ((3, 2), (3, 0), (0, 0))
"""Images that count on each rank, call after call; every rank has a stand-in more."""


def pixels(call: int, dtype: torch.dtype) -> list[Tensor]:
    """What each rank sees in a call: its images, then a stand-in full of large values."""
    generator = torch.Generator().manual_seed(call)
    parts = []
    for count in COUNTED[call]:
        images = torch.randn(count, CHANNELS, 4, 6, generator=generator) * 3 + 7
        parts.append(torch.cat([images, torch.full((1, CHANNELS, 4, 6), 1000.0)]).to(dtype))
    return parts


def weight_of(images: Tensor) -> Tensor:
    return torch.tensor([1.0] * (len(images) - 1) + [0.0])


def upstream(shape: torch.Size, rank: int, dtype: torch.dtype) -> Tensor:
    """The gradient that reaches the output of a rank: none for its stand-in."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(100 + rank)).to(dtype)
    gradient[-1] = 0
    return gradient


def run_norm(rank: int) -> dict[str, object]:
    """Two calls of a synchronised layer on this rank's share, and a third where no rank has an image."""
    torch.manual_seed(0)
    norm, out, grad = BatchNorm(CHANNELS, "sync"), [], []
    for call in range(len(COUNTED)):
        images = pixels(call, torch.float32)[rank].requires_grad_()
        features = norm(images, weight_of(images))
        features.backward(upstream(features.shape, rank, torch.float32))
        out.append(features.detach()[:-1])
        grad.append(images.grad[:-1])
    buffers = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    return {"out": out, "grad": grad, "weight": norm.weight.grad, "bias": norm.bias.grad, "buffers": buffers}


def run_resnet(rank: int) -> dict[str, object]:
    """A whole backbone: rank 0 has two images, rank 1 one and a stand-in."""
    torch.manual_seed(0)
    model = ResNet((1, 1, 1), batch_norm="sync").double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    mine = images[:2] if rank == 0 else torch.cat([images[2:], torch.zeros(1, 3, 32, 32, dtype=torch.float64)])
    features = model(mine, torch.ones(2) if rank == 0 else torch.tensor([1.0, 0.0]))
    (features[: 2 - rank].square().sum()).backward()
    return {"out": features.detach()[: 2 - rank], "grad": {name: p.grad for name, p in model.named_parameters()}}


def run_averaging(rank: int) -> dict[str, object]:
    norm = BatchNorm(CHANNELS, "batch")
    for _ in range(rank + 1):
        norm(torch.full((2, CHANNELS, 3, 3), float(10 * rank)))
    before = norm.running_mean.clone()
    agree_on_buffers(dict(norm.named_buffers()))
    return {"before": before, "mean": norm.running_mean, "var": norm.running_var, "count": norm.num_batches_tracked}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE)
    results = {"norm": run_norm(rank), "resnet": run_resnet(rank), "averaging": run_averaging(rank)}
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict]]:
    """What each rank got."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(worker, args=(str(folder),), nprocs=WORLD_SIZE, start_method="spawn")
    yield [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


def assert_near(out: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (out - expected).norm() <= tolerance * expected.norm()


def one_process() -> tuple[BatchNorm, list[Tensor], list[Tensor]]:
    """The layer on all images that count, in float64: outputs and input gradients of the first two calls."""
    norm, out, grad = BatchNorm(CHANNELS, "sync").double(), [], []
    for call in range(2):
        parts = pixels(call, torch.float64)
        images = torch.cat([part[:-1] for part in parts]).requires_grad_()
        features = norm(images)
        gradients = [upstream(part.shape, rank, torch.float64)[:-1] for rank, part in enumerate(parts)]
        features.backward(torch.cat(gradients))
        out.append(features.detach())
        grad.append(images.grad)
    return norm, out, grad


def test_outputs_and_gradients_are_those_of_one_process_without_the_stand_ins(ranks: list[dict]) -> None:
    norm, out, grad = one_process()
    results = [rank["norm"] for rank in ranks]
    for call in range(2):
        assert_near(torch.cat([result["out"][call] for result in results]), out[call], 1e-6)
        assert_near(torch.cat([result["grad"][call] for result in results]), grad[call], 2e-6)
    for name in ("weight", "bias"):
        assert_near(sum(result[name] for result in results), getattr(norm, name).grad, 1e-6)


def test_running_statistics_are_those_of_one_process_and_bit_equal_on_all_ranks(ranks: list[dict]) -> None:
    norm, _, _ = one_process()
    first, second = (rank["norm"]["buffers"] for rank in ranks)
    for name, buffer in norm.named_buffers():
        assert torch.equal(first[name], second[name]), name
        assert_near(first[name].double(), buffer.double(), 1e-6)


def test_a_call_without_any_image_leaves_the_running_statistics_alone(ranks: list[dict]) -> None:
    norm, _, _ = one_process()
    assert len(COUNTED) == 3 and COUNTED[2] == (0, 0)
    assert int(ranks[0]["norm"]["buffers"]["num_batches_tracked"]) == int(norm.num_batches_tracked) == 2


def test_a_whole_backbone_gives_features_and_gradients_of_one_process(ranks: list[dict]) -> None:
    torch.manual_seed(0)
    model = ResNet((1, 1, 1), batch_norm="sync").double()
    features = model(torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.ones(3))
    features.square().sum().backward()
    results = [rank["resnet"] for rank in ranks]
    assert_near(torch.cat([result["out"] for result in results]), features.detach(), 1e-9)
    for name, parameter in model.named_parameters():
        assert_near(sum(result["grad"][name] for result in results), parameter.grad, 1e-8)


def test_averaging_makes_the_statistics_of_batch_mode_the_mean_over_ranks(ranks: list[dict]) -> None:
    first, second = (rank["averaging"] for rank in ranks)
    assert not torch.equal(first["before"], second["before"])
    for name in ("mean", "var", "count"):
        assert torch.equal(first[name], second[name]), name
    assert_near(first["mean"], (first["before"] + second["before"]) / 2, 1e-6)
    assert int(first["count"]) == WORLD_SIZE


def test_saved_buffers_are_those_of_the_state_dict():
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Sequential(torch.nn.BatchNorm1d(2)))
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    module.register_buffer("absent", None)
    parameters = dict(module.named_parameters())
    want = {name: each for name, each in module.state_dict().items() if name not in parameters}
    found = saved_buffers(module)
    assert list(found) == list(want) and all(found[name].data_ptr() == want[name].data_ptr() for name in want)
