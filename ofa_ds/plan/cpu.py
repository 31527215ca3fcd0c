"""Peak memory and step time of a run on a CPU, from what a calibration measured of it.

A rank computes with one thread, as `OMP_NUM_THREADS=1` has it. P parameters' bytes in fp32, W ranks, E bytes of the
vocabulary's matrix.

    step    f x the pieces of each micro-batch (`plan.cpu_pieces`), f being what W ranks at once slow each other by,
            another one under stage 3, whose hooks copy what modules give; AdamW; and for stage s and W ranks: seconds
            a parameter tensor, and seconds an element (reduction, gathering, clipping)
    memory  the process; what stage s holds of the state (arithmetic); what is held at the highest of these times: when
            the backward begins and after the decoder, the encoder and the backbone (what is kept still, gradients made
            by then, the bucket), and when the optimizer steps (gradients, and all of them in one); and what is gathered
            or copied for a while: so many P and so many E, measured for stage s and W ranks.

The memory is that of a process with MALLOC_MMAP_THRESHOLD_=1048576 in its environment. Without it malloc keeps large
blocks for the next step, which is faster; what then lies free in holes between them differs from run to run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ofa_ds.config.architecture import ModelConfig
from ofa_ds.plan.calibration import Calibration
from ofa_ds.plan.cpu_pieces import kept_bytes, pieces, seconds_of
from ofa_ds.plan.layout import Layout
from ofa_ds.plan.parameters import parameters
from ofa_ds.plan.work import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuPlan:
    """Of one rank."""

    bytes: dict[str, float]
    """Of the peak of its resident memory, by part."""
    seconds: dict[str, float]
    """Of one optimizer step, by part."""
    bytes_error: float
    """Relative: the largest that predictions of this calibration were found to be wrong by."""
    seconds_error: float

    @property
    def peak_bytes(self) -> float:
        return sum(self.bytes.values())

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())


MMAP_THRESHOLD = 1 << 20
"""Bytes from which on each block is a mapping of its own in the processes whose memory is measured and planned."""
IN_BACKWARD = 0.9
"""Bytes at the backward's peak a byte that pieces keep: 0.82 to 0.87 in runs of medium and tiny on pictures, since what
one piece gives and the next one keeps is counted in both."""
DEFAULT_ERRORS = {"step": 0.2, "memory": 0.15}
"""Where a calibration was not checked (`bench plan` does): no measurement, a guess on the safe side."""


def predict_cpu(
    config: ModelConfig, work: Work, layout: Layout, *, calibration: Calibration, accumulation: int = 1
) -> CpuPlan:
    """Of `accumulation` micro-batches of `work` a rank and one update. Raises ValueError: the calibration lacks it."""
    if calibration.device != "cpu":
        raise ValueError(f"the calibration is of {calibration.device}; want one of a CPU: ofa-ds bench step")
    if layout.hosts != 1 or layout.precision != "fp32" or "none" != layout.offload_optimizer or layout.hpz > 1:
        raise ValueError("on a CPU one host in fp32 without offload or hpZ is predicted; plan for a GPU")
    try:
        held = memory_parts(config, work, layout, calibration)
        took = step_parts(config, work, layout, calibration, accumulation)
    except IndexError as error:
        raise ValueError(
            "this calibration has too few numbers for a piece; make a new one: ofa-ds bench step"
        ) from error
    return CpuPlan(
        bytes=held,
        seconds=took,
        bytes_error=_error(calibration, "memory", layout.world),
        seconds_error=_error(calibration, "step", layout.world),
    )


def _error(calibration: Calibration, what: str, world: int) -> float:
    """The largest found on as many ranks, else on any."""
    return calibration.error(f"{what}.{world}", calibration.error(what, DEFAULT_ERRORS[what]))


def step_parts(
    config: ModelConfig, work: Work, layout: Layout, calibration: Calibration, accumulation: int = 1
) -> dict[str, float]:
    """Seconds of a step."""
    costs, parts = calibration.costs, dict.fromkeys(("backbone", "encoder", "decoder", "vocabulary", "rest"), 0.0)
    slower = measured(calibration, "costs", f"ranks.{layout.world}")[layout.stage == 3]
    names = {"encoder_layer": "encoder", "decoder_layer": "decoder", "vocabulary": "vocabulary", "rest": "rest"}
    for each in pieces(config, work):
        parts[names.get(each.name, "backbone")] += accumulation * slower * seconds_of(each, costs)
    elements, tensors = counts(config)
    of_tensor, of_element = measured(calibration, "costs", f"zero{layout.stage}.{layout.world}")
    again = accumulation if layout.stage >= 2 else 1
    optimizer = elements / (layout.world if layout.stage else 1) * measured(calibration, "costs", "optimizer")[0]
    around = tensors * of_tensor + elements * of_element
    return {**parts, "optimizer": optimizer, "ZeRO and gloo": again * around}


def memory_parts(config: ModelConfig, work: Work, layout: Layout, calibration: Calibration) -> dict[str, float]:
    """Bytes of the peak of a rank's resident memory."""
    whole = 4.0 * counts(config)[0]
    share, stage = whole / layout.world, layout.stage
    around = measured(calibration, "sizes", f"zero{stage}.{layout.world}")
    if len(around) != 3:
        raise ValueError("this calibration's memory was measured in another way; again: ofa-ds bench memory")
    vocabulary = config.vocab_size * config.dim * 4.0
    bucket = min(layout.reduce_bucket * 4.0, whole) if stage else 0.0
    held = {}
    if stage == 3:  # for good; of other stages the bucket lives for the backward
        held = {"reduction bucket": bucket, "prefetched": min(layout.prefetch_bucket * 4.0, whole)}
        bucket = 0.0
    phases = _backward(config, work, calibration, 1.0 if stage < 2 else 1 / layout.world, bucket)
    phases.append({"gradients": share, "gradients in one": share} if stage else {"gradients": 2 * whole})
    return {
        "process": measured(calibration, "sizes", "process")[0] + around[0],
        "weights": share if stage == 3 else whole,
        "masters": share if stage else 0.0,
        "moments": 2 * (share if stage else whole),
        "gathered, and copies": around[1] * whole + around[2] * vocabulary,
        **max(phases, key=lambda phase: sum(phase.values())),
        **held,
    }


def _backward(
    config: ModelConfig, work: Work, calibration: Calibration, part: float, bucket: float
) -> list[dict[str, float]]:
    """When it begins, and after the decoder, the encoder and the backbone: what is kept still, and gradients by then.

    part: of the gradients made, what stays; below 1 it stays once they have left the bucket.
    """
    kept = Counter[str]()
    for each in pieces(config, work):
        kept[each.name if each.name in ("encoder_layer", "decoder_layer") else "rest"] += kept_bytes(
            each, calibration.sizes, work
        )
    made = Counter[str]()
    for parameter in parameters(config):
        made[parameter.name.partition(".layers.")[0]] += 4 * parameter.numel
    vocabulary = config.vocab_size * config.dim * 4.0
    phases, gradients = [], vocabulary

    def phase(more: float, what: str) -> dict[str, float]:
        inside = min(bucket, gradients)
        stay = part * (gradients if part == 1 else gradients - inside)
        return {"gradients": stay, "reduction bucket": inside, what: more}

    for name in ("decoder", "encoder", "rest"):
        phases.append(phase(IN_BACKWARD * sum(kept.values()), "activations"))
        gradients += made[name]
        kept.pop(f"{name}_layer", None)
    gradients = sum(made.values())
    return [*phases, phase(vocabulary, "vocabulary's gradients")]


def counts(config: ModelConfig) -> tuple[int, int]:
    """(elements, tensors) of the parameters."""
    sizes = [each.numel for each in parameters(config)]
    return sum(sizes), len(sizes)


def measured(calibration: Calibration, what: str, key: str) -> list[float]:
    """Factors of a calibration. Raises ValueError: they are not in it."""
    found = getattr(calibration, what)
    if key not in found:
        step = "step" if what == "costs" else "memory"
        raise ValueError(f"this calibration has no {what} of {key}; measure them: ofa-ds bench {step} --output FILE")
    return found[key]
