"""The benchmark: its padded stand-in does the same work as our model, and its numbers are what they say they are."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import TOLERANCE, assert_close
from torch import Tensor

from ofa_ds.batch import Batch, pack
from ofa_ds.bench import __main__ as command
from ofa_ds.bench import step as bench
from ofa_ds.bench.padded import PaddedBatch, PaddedCore, PaddedOFA, pad
from ofa_ds.data.example import Example
from ofa_ds.model.config import ResNetConfig, preset
from ofa_ds.model.ofa import OFA
from ofa_ds.model.products import without_onednn
from ofa_ds.model.stem import normalize
from ofa_ds.terms import PAD_ID

VOCAB = 90
SIDE = 64
"""Of the pictures, in pixels: 4 x 4 patches."""
CONFIG = preset(
    "tiny", vocab_size=VOCAB, dim=16, ffn_dim=24, num_heads=2, encoder_layers=2, decoder_layers=2, init_std=0.2,
    backbone=ResNetConfig(depths=(1, 1, 1)), token_bucket_size=8, image_bucket_size=6, code_image_size=32,
)  # fmt: skip


def example(
    rng: np.random.Generator, source: int, target: int, *, image: bool = True, sample: int = 0, code: bool = False
) -> Example:
    """sample: so many of the 16 patches; 0: all. Pixels are 0 or 255: exact in fp32, in which the stand-in has them."""
    ids = rng.integers(4, VOCAB, target)
    return Example(
        task="image_infilling" if code else "caption",
        source=rng.integers(4, VOCAB, source),
        target=ids,
        prev=np.concatenate([[0], ids[:-1]]),
        image=rng.integers(0, 2, (SIDE, SIDE, 3), dtype=np.uint8) * np.uint8(255) if image else None,
        patches=np.sort(rng.choice(16, sample, replace=False)) if sample else None,
        code=code,
    )


def packed(examples: Sequence[Example]) -> Batch:
    return pack(examples, [(SIDE, SIDE)], CONFIG.patch_size, CONFIG.image_bucket_size)


def built(batch_norm: str = "batch") -> OFA:
    """In train mode. No weight or statistic keeps the 0 or 1 it starts with, which could hide that it is unused."""
    torch.manual_seed(0)
    model = OFA(dataclasses.replace(CONFIG, batch_norm=batch_norm)).train()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor), alpha=0.05)
    return model


def gradients(model: OFA, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter: zeros where the loss does not depend on it."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def assert_same_work(model: OFA, examples: Sequence[Example], label_smoothing: float = 0.0) -> None:
    """Our packed model and the padded stand-in have the same summed loss and gradients, in fp64."""
    model, tolerance = model.double(), TOLERANCE[torch.float64]
    padded = pad(examples, SIDE)
    padded = dataclasses.replace(padded, images=padded.images.double())
    ours = model(packed(examples), label_smoothing)[0].sum()
    theirs = PaddedOFA(model)(padded, label_smoothing)
    assert_close(theirs, ours.detach(), tolerance, "loss")
    expected, got = gradients(model, ours), gradients(model, theirs)
    # The floor is for gradients that are 0 but for rounding, such as that of a key's bias.
    floor = 1e-6 * math.hypot(*(gradient.norm().item() for gradient in expected.values()))
    for name, gradient in expected.items():
        assert_close(got[name], gradient, tolerance, f"gradient of {name}", floor)


def test_padded_text_and_image_codes_have_the_loss_and_gradients_of_our_model() -> None:
    rng = np.random.default_rng(0)
    lengths = (7, 3, False), (2, 17, True), (12, 21, False), (5, 17, True)
    examples = [example(rng, source, target, code=code) for source, target, code in lengths]
    examples[2].target[:4] = PAD_ID  # a prompt in the decoder: read, but without a loss
    assert_same_work(built(), examples, label_smoothing=0.1)


def test_sampled_patches_have_the_loss_and_gradients_of_our_model() -> None:
    rng = np.random.default_rng(1)
    assert_same_work(built(), [example(rng, source, target, sample=9) for source, target in ((7, 3), (4, 5), (9, 2))])


def test_text_among_pictures_has_the_loss_and_gradients_of_our_model() -> None:
    """BatchNorm is frozen: its statistics would count the zero pictures that the stand-in gives to text."""
    rng = np.random.default_rng(2)
    examples = [example(rng, source, 4, image=image) for source, image in ((7, True), (11, False), (3, True))]
    assert_same_work(built("frozen"), examples)


def test_one_example_without_padding_costs_the_same_flops_both_ways() -> None:
    model, one = built(), [example(np.random.default_rng(3), 6, 5)]
    with without_onednn():  # which pads
        ours = bench.count_flops(bench.packed_step(model, packed(one)))
    assert ours == bench.count_flops(bench.padded_step(model, [pad(one, SIDE)]))


def test_a_product_that_is_added_in_place_is_counted() -> None:
    a, b = torch.ones(3, 4, 5), torch.ones(3, 5, 6)
    total = torch.zeros(3, 4, 6)
    assert bench.count_flops(lambda: total.baddbmm_(a, b, alpha=0.5)) == 2 * 3 * 4 * 5 * 6
    assert bench.count_flops(lambda: torch.baddbmm(total, a, b)) == 2 * 3 * 4 * 5 * 6


def linear_step() -> None:
    x, weight = torch.ones(7, 5, requires_grad=True), torch.ones(3, 5, requires_grad=True)
    F.linear(x, weight).sum().backward()


def convolution_step() -> None:
    image, weight = torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3, requires_grad=True)
    F.conv2d(image, weight, stride=2, padding=1).sum().backward()


def attention_step() -> None:
    q, k, v = (torch.ones(length, 2, 12, requires_grad=True) for length in (5, 7, 7))
    core = PaddedCore(torch.zeros(2, 3, 5, 7), None, None, 1.0)
    core(q * 1, k, v, torch.ones(3), 0.0).sum().backward()


@pytest.mark.parametrize(
    "step, flops",
    [
        (linear_step, 3 * 2 * 7 * 5 * 3),  # the output and both gradients
        (convolution_step, 2 * 2 * 2 * 4 * 4**2 * 3 * 3**2),  # no gradient of the image
        (attention_step, 3 * 2 * 2 * 2 * 5 * 7 * 12),  # two products, each with two gradients
    ],
)
def test_flops_are_two_for_each_multiplication_of_the_products(step: Callable[[], None], flops: int) -> None:
    assert bench.count_flops(step) == flops


SECONDS = {
    "pair": ((3.0, 1.0, 2.0), (4.0, 10.0, 5.0)),
    "mixed": ((6.0, 2.0), (8.0, 8.0)),
}
"""(ours, the original's way) of each turn."""
WARM_UP_S = 1000.0


class Stage:
    """Stands in for what `bench_step` times: steps that take SECONDS by its clock and cost 1 (ours) or 2 GFLOP."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.ran: list[str] = []
        self.packed: list[Batch] = []
        self.passes: list[list[PaddedBatch]] = []
        self.threads: list[int] = []
        rates = iter([50.0, 80.0])
        replacements = {
            "preset": lambda name, vocab_size: CONFIG,
            "time": SimpleNamespace(perf_counter=lambda: self.now),
            "matmul_rate": lambda: next(rates),
            "packed_step": self.packed_step,
            "padded_step": self.padded_step,
            "keep_freed_memory": lambda: None,
        }
        for name, value in replacements.items():
            monkeypatch.setattr(bench, name, value)
        monkeypatch.setattr(torch, "set_num_threads", self.threads.append)

    def packed_step(self, model: OFA, batch: Batch) -> Callable[[], None]:
        self.packed.append(batch)
        return self._step("ours", list(SECONDS.values())[len(self.packed) - 1][0], 1)

    def padded_step(self, model: OFA, passes: list[PaddedBatch]) -> Callable[[], None]:
        self.passes.append(passes)
        return self._step("theirs", list(SECONDS.values())[len(self.passes) - 1][1], 2)

    def _step(self, name: str, seconds: Sequence[float], gflop: int) -> Callable[[], None]:
        left = iter((WARM_UP_S, *seconds))

        def run() -> None:
            self.ran.append(name)
            self.now += next(left)
            a = torch.empty(500, 1000 * gflop, device="meta")
            torch.mm(a, torch.empty(1000 * gflop, 1000, device="meta"))

        return run


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    command.main()


COMMAND = ("step", "--repeats", "3", "--mixed-repeats", "2")


def test_json_has_medians_and_ratios_of_steps_timed_in_turns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = Stage(monkeypatch)
    run_command(monkeypatch, *COMMAND, "--json")
    expected = {
        "pair_s": 2.0, "pair_best_s": 1.0, "pair_gflop": 1.0,
        "pair_padded_s": 5.0, "pair_padded_best_s": 4.0, "pair_padded_gflop": 2.0,
        "pair_ratio": 2 / 5, "pair_best_ratio": 1 / 4, "pair_original_s": bench.ORIGINAL_PAIR_S,
        "mixed_s": 4.0, "mixed_best_s": 2.0, "mixed_gflop": 1.0,
        "mixed_padded_s": 8.0, "mixed_padded_best_s": 8.0, "mixed_padded_gflop": 2.0,
        "mixed_ratio": 4 / 8, "mixed_best_ratio": 2 / 8,
        "matmul_gflop_per_s": 80.0,
    }  # fmt: skip
    assert json.loads(capsys.readouterr().out) == pytest.approx(expected)
    assert stage.ran == ["ours", "theirs"] * (1 + 3 + 1 + 2)
    assert stage.threads == [1]


def test_the_table_says_how_much_of_the_original_s_time_ours_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Stage(monkeypatch)
    run_command(monkeypatch, *COMMAND)
    ratios = [line.split()[-2:] for line in capsys.readouterr().out.splitlines() if "ofa-ds / original" in line]
    assert ratios == [["0.40x", "0.25x"], ["0.50x", "0.25x"]]


def test_both_ways_are_given_the_same_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch)
    bench.bench_step(3, 2)
    assert [[len(one.code) for one in passes] for passes in stage.passes] == [[2], [16, 4]]
    assert [[len(group) for group in batch.images] for batch in stage.packed] == [[2], [8, 2]]
    for batch, passes in zip(stage.packed, stage.passes, strict=True):
        for name, ours in (("source", batch.source_tokens), ("previous", batch.decoder_tokens)):
            rows = torch.cat([getattr(one, name).flatten() for one in passes])
            assert torch.equal(rows[rows != PAD_ID], ours)
        for group, one in zip(batch.images, passes, strict=True):
            shown = one.images[one.has_image][:: int(one.has_image.sum()) // len(group)]
            assert_close(shown, normalize(group, torch.zeros(len(group), 4), torch.float32), 1e-6, "pixels")
        counted = sum(int(one.has_image.sum()) * (one.images.shape[2] // 16) ** 2 for one in passes[1:])
        counted += passes[0].images.shape[0] * (256 if passes[0].patches is None else passes[0].patches.shape[1])
        assert counted == len(batch.patch_index)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("step", "--repeats", "0"), "argument --repeats: want at least 1, got 0"),
        (("step", "--mixed-repeats", "two"), "argument --mixed-repeats: want at least 1, got two"),
        (("remote", "--mb-per-s", "0"), "argument --mb-per-s: want more than 0, got 0"),
        (("remote", "--latency-ms", "nan"), "argument --latency-ms: want at least 0, got nan"),
        (("steps",), "invalid choice: 'steps'"),
        ((), "the following arguments are required: WHAT"),
    ],
)
def test_wrong_arguments_are_exit_code_2_before_anything_is_timed(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "bench_step", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit) as end:
        run_command(monkeypatch, *arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
