"""Predictions of a CPU's steps: padding as the model pads, factors found again, what is missing told in one line."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from ofa_ds.batch import pack
from ofa_ds.bench.calibrate import layout_of_case, memory_cases, step_cases, with_memory, with_ranks
from ofa_ds.bench.gpu_rates import measure_rates
from ofa_ds.bench.pieces import fit
from ofa_ds.bench.plan import CASES, compared, errors, table
from ofa_ds.bench.ranks_case import Case, Rows, measure
from ofa_ds.bench.step import example
from ofa_ds.config.architecture import preset
from ofa_ds.plan.calibration import Calibration
from ofa_ds.plan.cpu import memory_parts, predict_cpu, step_parts
from ofa_ds.plan.cpu_pieces import RESNET_PIECES, Piece, padded_pairs, pieces, seconds_of
from ofa_ds.plan.work import ExampleShape, Work
from ofa_kernels.attention import Tokens
from ofa_kernels.attention_plan import plan_padded

CASE = Case(model="tiny", rows=(Rows(count=2, side=256, source=32, target=16),), stage=3, ranks=2)


def invented() -> Calibration:
    """Costs of everything, each another."""
    rng = random.Random(0)
    lengths = {"encoder_layer": 4, "decoder_layer": 5, "rest": 4, "vocabulary": 3, "conv_stem": 2}
    names = {f"{name}.{width}": n for name, n in lengths.items() for width in (128, 256, 768)}
    names |= {f"{name}.forward.{width}": n for name, n in lengths.items() for width in (128, 256, 768)}
    names |= {f"resnet.{name}": 2 for name in RESNET_PIECES}
    costs = {key: [rng.random() * 1e-7 for _ in range(n)] for key, n in names.items()}
    sizes = {key: [rng.random() for _ in range(n)] for key, n in names.items() if "forward" not in key}
    around = {f"zero{stage}.2": [1e-5 * (stage + 1), 1e-10 * (stage + 1)] for stage in range(4)}
    free = {f"zero{stage}.2": [1e7 * (stage + 1), 0.1 * (stage + 1), 0.5 * (stage + 1)] for stage in range(4)}
    return Calibration(
        device="cpu", machine="a machine", date="2026-11-28",
        costs={**costs, "optimizer": [1e-9], "ranks.2": [1.25, 1.4], **around},
        sizes={**sizes, "process": [3e8], **free},
    )  # fmt: skip


def lengths_of_examples(seed: int) -> list[tuple[int, int, int, bool]]:
    rng = random.Random(seed)
    return [
        (rng.choice([0, 16, 64]), rng.randint(1, 90), rng.randint(1, 60), rng.random() < 0.3)
        for _ in range(rng.randint(1, 14))
    ]


@pytest.mark.parametrize("seed", range(8))
def test_pairs_are_padded_as_the_attention_pads_them(seed: int) -> None:
    shapes = lengths_of_examples(seed)
    examples = [ExampleShape("", *shape) for shape in shapes]
    work = Work(images=(), examples=tuple(examples))

    def tokens(lengths: list[int], lead: list[int] | None) -> Tokens:
        offsets = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
        position = torch.cat([torch.arange(each) for each in lengths])
        return Tokens(offsets, position, max(lengths), None if lead is None else torch.tensor(lead, dtype=torch.int32))

    encoder = tokens([p + s for p, s, _, _ in shapes], [p for p, _, _, _ in shapes])
    decoder = tokens([t for _, _, t, _ in shapes], None)
    kind = torch.tensor([code for *_, code in shapes])
    plans = {
        "encoder": plan_padded(encoder, encoder, relative=None, causal=False),
        "decoder": plan_padded(decoder, decoder, relative=None, causal=True, kind=kind),
        "cross": plan_padded(decoder, encoder, relative=None, causal=False, kind=kind),
    }
    for name, plan in plans.items():
        pairs = sum(bucket.num_examples * bucket.num_queries * bucket.num_keys for bucket in plan.buckets)
        assert padded_pairs(work, name) == pairs, name


def test_the_work_of_a_case_is_that_of_its_packed_batch() -> None:
    rng = np.random.default_rng(0)
    examples = [
        example(rng, side=row.side, source=row.source, target=row.target) for row in CASE.rows for _ in range(row.count)
    ]
    batch, work = pack(examples, [(256, 256)], 16, 42), CASE.work()
    assert work.encoder_tokens == int(batch.encoder_offsets[-1]) and work.decoder_tokens == len(batch.decoder_tokens)
    assert [(group.count, group.height) for group in work.images] == [(2, 256)]


def test_factors_are_found_again_and_none_is_negative() -> None:
    rng = np.random.default_rng(0)
    features = np.c_[np.ones(8), rng.uniform(10, 1000, (8, 2))]
    assert fit(features, features @ [0.5, 0.0, 2e-3]) == pytest.approx([0.5, 0.0, 2e-3], abs=1e-9)
    assert min(fit(features, features @ [5.0, -1e-3, 2e-3])) >= 0


def test_a_prediction_is_linear_in_micro_batches_and_less_with_smaller_ones() -> None:
    layout, known = layout_of_case(CASE), invented()
    once = predict_cpu(CASE.config, CASE.work(), layout, calibration=known)
    twice = predict_cpu(CASE.config, CASE.work(), layout, calibration=known, accumulation=2)
    assert twice.seconds["optimizer"] == once.seconds["optimizer"]
    for part in ("backbone", "encoder", "decoder", "vocabulary"):
        assert twice.seconds[part] == pytest.approx(2 * once.seconds[part])
    assert twice.peak_bytes == once.peak_bytes
    smaller = dataclasses.replace(CASE, rows=(Rows(count=1, side=256, source=32, target=16),))
    less = predict_cpu(smaller.config, smaller.work(), layout, calibration=known)
    assert less.step_s < once.step_s and less.peak_bytes <= once.peak_bytes


def test_checkpointing_keeps_less_and_takes_longer() -> None:
    layout, known = layout_of_case(CASE), invented()
    config, work = CASE.config, Case(model="tiny", rows=(Rows(count=8, side=0, source=99, target=99),), stage=3,
                                     ranks=2).work()  # fmt: skip
    again = dataclasses.replace(config, activation_checkpointing=True)
    sizes = {key: [1e5 if key.startswith(("encoder", "decoder")) else 1.0] * len(value)
             for key, value in known.sizes.items() if not key.startswith(("zero", "process"))}  # fmt: skip
    known = dataclasses.replace(known, sizes=known.sizes | sizes)
    whole, checked = (predict_cpu(each, work, layout, calibration=known) for each in (config, again))
    assert checked.step_s > whole.step_s and checked.bytes["activations"] < whole.bytes["activations"] / 3


def test_a_batch_whose_activations_outgrow_the_gradients_holds_more_and_checkpointing_less() -> None:
    known = invented()
    sizes = {key: [1e5 if key.startswith(("encoder", "decoder")) else 1.0] * len(value)
             for key, value in known.sizes.items() if not key.startswith(("zero", "process"))}  # fmt: skip
    known, peaks = dataclasses.replace(known, sizes=known.sizes | sizes), []
    for checkpointing in (False, True):
        for count in (9, 5):
            case = dataclasses.replace(
                CASE, rows=(Rows(count=count, side=0, source=99, target=99),), checkpointing=checkpointing
            )
            peaks.append(predict_cpu(case.config, case.work(), layout_of_case(case), calibration=known).peak_bytes)
    assert peaks[0] > peaks[1] > peaks[2]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_state_is_cut_as_the_stage_cuts_it(stage: int) -> None:
    case = dataclasses.replace(CASE, stage=stage)
    parts = memory_parts(case.config, case.work(), layout_of_case(case), invented())
    whole = 4 * sum(parameter.numel() for parameter in _meta(case))
    assert parts["weights"] == pytest.approx(whole / (2 if stage == 3 else 1))
    assert parts["masters"] == pytest.approx(whole / 2 if stage else 0)
    assert parts["moments"] == pytest.approx(2 * whole / (2 if stage else 1))


def _meta(case: Case) -> list[torch.nn.Parameter]:
    from ofa_ds.model.ofa import OFA

    with torch.device("meta"):
        return list(OFA(case.config).parameters())


def test_costs_between_two_measured_widths_lie_between_theirs_and_grow_beyond() -> None:
    costs = {"encoder_layer.128": [1e-3, 1e-5, 0, 1e-8], "encoder_layer.512": [4e-3, 1.6e-4, 1e-8, 1e-8]}

    def at(width: int) -> float:
        return seconds_of(Piece("encoder_layer", width, 1, (1, 500, 1000, 1000)), costs)

    assert at(128) < at(192) < at(256) < at(512) < at(1024)
    assert at(1024) == pytest.approx(500 * 4 * 1.6e-4 + 2 * (4e-3 + 2 * 1000 * 1e-8), rel=0.2)


@pytest.mark.parametrize("world", [2])
def test_what_is_around_the_pieces_is_found_again(world: int) -> None:
    known = invented()
    cases = step_cases(world)
    found = [
        {"step_s": sum(step_parts(case.config, case.work(), layout_of_case(case), known).values())} for case in cases
    ]
    blank = dataclasses.replace(known, costs={key: value for key, value in known.costs.items() if ".2" not in key[-2:]})
    again = with_ranks(blank, world, cases, found)
    for case in [*cases, CASE]:
        want = predict_cpu(case.config, case.work(), layout_of_case(case), calibration=known).step_s
        got = predict_cpu(case.config, case.work(), layout_of_case(case), calibration=again).step_s
        assert got == pytest.approx(want, rel=1e-3), case.name


def test_what_a_process_holds_is_found_again() -> None:
    known, cases = invented(), memory_cases(2)
    found = [
        {
            "joined_bytes": 3e8,
            "peak_bytes": sum(memory_parts(case.config, case.work(), layout_of_case(case), known).values()),
        }
        for case in cases
    ]
    sizes = {key: value for key, value in known.sizes.items() if not key.startswith(("zero", "process"))}
    again = with_memory(dataclasses.replace(known, sizes=sizes), 2, cases, found)
    for case in [*cases, CASE]:
        want = predict_cpu(case.config, case.work(), layout_of_case(case), calibration=known).peak_bytes
        got = predict_cpu(case.config, case.work(), layout_of_case(case), calibration=again).peak_bytes
        assert got == pytest.approx(want, rel=1e-3), case.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "NVIDIA H100"}, "the calibration is of NVIDIA H100; want one of a CPU"),
        ({"costs": {}}, "this calibration has no costs of"),
        ({"costs": {key: [] for key in invented().costs}}, "this calibration has (too few|no)"),
        ({"sizes": {}}, "this calibration has no sizes of zero3.2; measure them: ofa-ds bench memory"),
    ],
)
def test_a_calibration_that_lacks_something_says_what_to_measure(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        lacking = dataclasses.replace(invented(), **change)
        predict_cpu(CASE.config, CASE.work(), layout_of_case(CASE), calibration=lacking)
    assert "\n" not in str(caught.value)


def test_a_backbone_that_was_not_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="a ViT is not measured on CPUs"):
        pieces(preset("6b"), CASE.work())


def test_no_checked_case_is_one_of_those_that_are_fitted_on() -> None:
    fitted = {case.name for ranks in (1, 2, 3) for case in [*step_cases(ranks), *memory_cases(ranks)]}
    assert len(CASES) >= 8 and not fitted & {case.name for case in CASES}
    assert {case.stage for case in CASES} == {0, 1, 2, 3} and {case.ranks for case in CASES} == {1, 2, 3}
    assert {"nano", "tiny", "base"} <= {case.model for case in CASES}
    assert {case.checkpointing for case in CASES} == {False, True}


def test_real_steps_are_measured_and_compared() -> None:
    case = Case(model="nano", vocab=300, rows=(Rows(count=1, side=32, source=3, target=2),), stage=3, ranks=2, steps=1)
    (found,) = measure([case])
    assert 0 < found["step_s"] < 60 and found["joined_bytes"] < found["peak_bytes"]
    row = compared(invented(), case, found, found)
    memory = abs(row["memory_error"])
    largest = errors([row, {"step_error": -9, "memory_error": 0, "ranks": 1}])
    assert largest == {"step": 9, "memory": memory, "step.1": 9, "memory.1": 0, "memory.2": memory,
                     "step.2": abs(row["step_error"])}  # fmt: skip
    held = compared(invented(), case, None, found)
    assert errors([held]).keys() == {"memory", "memory.2"}
    assert table([row, held]).count(case.name) == 2


def test_rates_of_a_gpu_are_positive_numbers() -> None:
    config = preset("nano", vocab_size=300)
    rows = (Rows(count=2, side=32, source=3, target=2),)
    rates, memory = measure_rates("cpu", config, rows, 64)
    assert rates.keys() == {"peak", "matmul", "conv", "step"} and min(*rates.values(), memory) > 0
