"""What a healthy machine reaches: every number that a verdict compares with, in one place, with its source.

Kinds of GPU: Azure's node health checks (github.com/Azure/azurehpc-health-checks, conf/nd96amsr_a100_v4.conf and
conf/nd96isr_h200_v5.conf, and the H100 file beside them), which fail a node below these figures.
The rest is ours: below `fail` training breaks or crawls, below `warn` somebody should look.
"""

from __future__ import annotations

from dataclasses import dataclass

GiB = 1 << 30


@dataclass(frozen=True)
class Kind:
    """One kind of GPU node."""

    host_all_reduce_GBps: float
    """Bus bandwidth of an all-reduce over the NVLinks of one host."""
    nic_Gbps: float
    """Of one NIC that reads GPU memory itself (GDR)."""
    line_Gbps: int
    """Link rate of one NIC."""


KINDS = {"A100": Kind(228, 180, 200), "H100": Kind(460, 380, 400), "H200": Kind(431, 360, 400)}

CLOCK_WARN_S, CLOCK_FAIL_S = 0.5, 5.0
DISK_WARN_BYTES, DISK_FAIL_BYTES = 20 * GiB, 1 * GiB
INODES_WARN, INODES_FAIL = 100_000, 1_000
MEMORY_WARN_SHARE, MEMORY_FAIL_BYTES = 0.25, 2 * GiB
SHM_WARN_BYTES, SHM_FAIL_BYTES = 1 * GiB, 64 << 20
"""Docker's default is 64 MiB in all: NCCL and data loaders then die of SIGBUS."""
NOFILE_WARN, NOFILE_FAIL = 4096, 1024
WRITE_WARN_BYTES_PER_S, WRITE_PROBE_BYTES = 20 << 20, 16 << 20
WRITE_OUTLIER = 4.0
"""A host that writes so many times slower than the median is told."""
GPU_HOT_CELSIUS = 85
IB_MTU_BYTES = 4096
SLOW_LOGIN_S = 10.0

SLOW_FACTOR = 3.0
"""An exchange that takes so many times longer than those of healthy hosts is slow, where no figure of KINDS applies."""
GROUP_SHARE = 0.8
"""Of the NICs' GDR rate that an all-reduce over hosts should reach (ml-engineering, network/benchmarks: about 80 %)."""


def kind_of(name: str | None) -> Kind | None:
    """That of a GPU by its product name, such as "NVIDIA A100-SXM4-80GB"."""
    return next((kind for word, kind in KINDS.items() if name and word in name), None)
