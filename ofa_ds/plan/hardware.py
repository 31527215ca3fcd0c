"""GPUs and networks that a plan knows: what they have, and what published measurements reach of it.

Units: bytes, seconds, FLOP/s of dense 16-bit products, watts. Every figure has its source beside it. Sources by letter:
    A   NVIDIA's data sheets (A100, H100, H200): dense rates, memory, power
    B   stas00/ml-engineering, compute/accelerator: what the best matrix product reaches (MAMF): A100 271.2, H100 and
        H200 794.5 TFLOP/s, over shapes that suit it
    C   kernels/roofline.py: 4.3 of an H200's 4.8 TB/s in a copy; the same share is taken for the others
    D   Azure/azurehpc-health-checks: what a host must reach to be let into a cluster: NCCL's all-reduce over NVLink 228
        (A100), 460 (H100), 431 GB/s (H200); GPU-direct reads of 180 of 200 and 380 of 400 Gb/s an adapter
    E   stas00/ml-engineering, network: 340 Gb/s measured of 400 Gb/s EFA, 512 A100s (IDEFICS)
    F   NVIDIA/nccl, src/graph/tuning.cc: its own model of a ring, of which it takes the fastest protocol: microseconds
        to start 8.4, 10, 3.6 (Simple, LL128, LL), of a step over NVLink 3.4, 1.9, 0.85, over a network 9.6, 4.0, 2.7;
        LL128 has 92 % and LL 25 % of the bandwidth
    G   published MFU without activation checkpointing, beside what plan.rates says of the same model; each is computed
        anew in tests/unit/test_step_time.py. A100-80GB: FlashAttention's GPT 2.7B 72 % (1.12), IBM's Llama-7B with
        compile on 128 68 % (1.27), llm-foundry's MPT 7B 64.23 % (1.27), 3B 62.11 % (1.29), 13B 59.57 % (1.37).
        A100-40GB: the slowest is MPT-7B's on 128, 50.1 % (1.63). H100: llm-foundry's MPT-7B 46.44 % (1.55), IBM's
        Llama-7B 46 % (1.64); the fastest is KempnerForge's 7B on one H200, 57.8 % with checkpointing (about 1)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import NamedTuple


class Gpu(NamedTuple):
    name: str
    memory_bytes: float
    peak_flops: float
    """Dense bf16, by the data sheet: what MFU is a share of."""
    attainable: float
    """Share of it that the largest matrix products reach."""
    hbm_bytes_per_s: float
    """By the data sheet."""
    hbm_attainable: float
    """Share of it that a copy reaches."""
    tdp_watts: float
    link_bytes_per_s: float
    """What a ring of the host's GPUs moves, each way."""
    host_link_bytes_per_s: float
    """To the host's memory, each way."""
    multiprocessors: int
    issue_per_s: float
    """Warp instructions that attention's loops are taken to issue (kernels/roofline.py); 0 where it is not known."""
    sources: dict[str, str]
    beyond: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """How many times longer than their rooflines published runs computed: the fastest, the middle, the slowest."""


_SOURCES = {
    "peak_flops": "A", "memory_bytes": "A", "tdp_watts": "A", "hbm_bytes_per_s": "A", "attainable": "B",
    "hbm_attainable": "C", "link_bytes_per_s": "D", "multiprocessors": "A", "issue_per_s": "kernels/roofline.py",
    "beyond": "G", "host_link_bytes_per_s": "D: 21 (A100) and 48 GB/s (H100, H200) of PCIe 4 and 5",
}  # fmt: skip
_HBM_SHARE = 4.3 / 4.8


def _gpu(
    name: str, memory_gb: float, peak: float, attainable: float, hbm: float, watts: float, link: float, host: float,
    multiprocessors: int, issue: float, beyond: tuple[float, float, float],
) -> Gpu:  # fmt: skip
    """memory_gb: what the driver leaves, in 2^30 bytes."""
    return Gpu(
        name, memory_gb * 2**30, peak, attainable / peak, hbm, _HBM_SHARE, watts, link, host, multiprocessors, issue,
        _SOURCES, beyond,
    )  # fmt: skip


_A100_ISSUE, _H100_ISSUE = 108 * 4 * 1.41e9 * 0.53, 132 * 4 * 1.75e9 * 0.65
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40gb", 39.4, 312e12, 271.2e12, 1.555e12, 400, 228e9, 21e9, 108, _A100_ISSUE, (1.12, 1.27, 1.63)),
        _gpu("a100-80gb", 79.1, 312e12, 271.2e12, 2.039e12, 400, 228e9, 21e9, 108, _A100_ISSUE, (1.12, 1.27, 1.37)),
        _gpu("h100", 79.1, 989.4e12, 794.5e12, 3.35e12, 700, 460e9, 48e9, 132, _H100_ISSUE, (1.0, 1.55, 1.64)),
        _gpu("h200", 139.8, 989.4e12, 794.5e12, 4.8e12, 700, 431e9, 48e9, 132, _H100_ISSUE, (1.0, 1.55, 1.64)),
    )
}
"""`cpu` is none of these: its rates are measured (`ofa-ds bench`)."""


_DEVICES = (
    (r"(NVIDIA )?A100[ -]SXM4?[ -](?P<GB>40|80)GB|(NVIDIA )?A100-PCIE-(?P<GB2>40|80)GB|NVIDIA A100 (?P<GB3>80)GB PCIe",
     "a100-{GB}gb"),
    (r"NVIDIA H100 80GB HBM3", "h100"),
    (r"NVIDIA H200", "h200"),
)  # fmt: skip
"""Names as the driver has them -> `GPUS`. Whole names: H100 PCIe, H200 NVL and slices (MIG) have others,
and other peaks."""


def gpu_of_device(device: str) -> str | None:
    """The name in `GPUS` of a device as the driver calls it; None: it is none of them."""
    for pattern, name in _DEVICES:
        if found := re.fullmatch(pattern, device):
            size = next((value for value in found.groupdict().values() if value), "")
            return name.format(GB=size)
    return None


class Network(NamedTuple):
    """Between hosts; within one it is the GPU's link."""

    name: str
    host_bytes_per_s: float
    """What a host sends while it receives as much, all adapters together, as measured."""
    sources: str


_NETWORKS = (
    ("infiniband-8x200", 8 * 180, "D: 180 of 200 Gb/s an adapter"),
    ("infiniband-8x400", 8 * 380, "D: 380 of 400 Gb/s an adapter"),
    ("infiniband-8x100", 8 * 90, "D: the same share of 100 Gb/s an adapter"),
    ("roce-16x100", 16 * 85, "E: the share of EFA, of 1,600 Gb/s as in llm-foundry's tables"),
    ("roce-8x200", 8 * 170, "E: the share of EFA, of 1,600 Gb/s"),
    ("roce-8x400", 8 * 340, "E: the share of EFA, of 3,200 Gb/s"),
    ("efa-4x100", 340, "E: measured on 512 A100s"),
    ("efa-32x100", 32 * 85, "E: the share of 400 Gb/s, of 3,200 Gb/s"),
    ("ethernet-1x100", 85, "E: the share of EFA, of 100 Gb/s"),
)
NETWORKS: dict[str, Network] = {name: Network(name, gbits * 1e9 / 8, source) for name, gbits, source in _NETWORKS}
DEFAULT_NETWORK = "infiniband-8x200"

RING_S = {
    "Simple": (8.4e-6, 3.4e-6, 9.6e-6, 1.0),
    "LL128": (10.0e-6, 1.9e-6, 4.0e-6, 0.92),
    "LL": (3.6e-6, 0.85e-6, 2.7e-6, 0.25),
}
"""Of NCCL's protocols: start, a step over NVLink, a step over the network, share of the bandwidth (F)."""


def gpu(name: str) -> Gpu:
    """Raises ValueError, one line with the nearest name."""
    if name.lower() not in GPUS:
        raise ValueError(f"gpu: {_unknown(name, GPUS)}")
    return GPUS[name.lower()]


def network(name: str) -> Network:
    """Raises ValueError, one line with the nearest name."""
    if name.lower() not in NETWORKS:
        raise ValueError(f"network: {_unknown(name, NETWORKS)}")
    return NETWORKS[name.lower()]


def _unknown(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    return f"want one of {', '.join(known)}, got {name}" + (f"; did you mean {near[0]}?" if near else "")


def ring_s(moved: float, ranks: int, ranks_per_host: int, gpu: Gpu, network: Network, *, passes: int = 1) -> float:
    """Of one collective in rings over whole hosts, seconds: NCCL's own model, its fastest protocol.

    moved: bytes of the whole, as gathered or before it is scattered. passes: 1 for an all-gather and a reduce-scatter,
    2 for an all-reduce.
    """
    if ranks <= 1 or not moved:
        return 0.0
    hosts = -(-ranks // ranks_per_host)
    bandwidth = gpu.link_bytes_per_s if hosts == 1 else min(gpu.link_bytes_per_s, network.host_bytes_per_s)
    steps, between = passes * (ranks - 1), passes * (hosts - 1)
    return min(
        start + (steps - between) * near + between * far + moved * steps / ranks / (bandwidth * share)
        for start, near, far, share in RING_S.values()
    )
