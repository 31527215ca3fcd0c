"""What a plan knows of GPUs and networks, and what a collective takes by NCCL's own model."""

from __future__ import annotations

import pytest

from ofa_ds.plan.hardware import GPUS, NETWORKS, RING_S, gpu, network, ring_s


def test_an_unknown_gpu_is_told_in_one_line_with_the_nearest():
    with pytest.raises(ValueError, match=r"^gpu: want one of a100-40gb.*, got a100-80; did you mean a100-80gb\?$"):
        gpu("a100-80")


def test_an_unknown_network_is_told_in_one_line_with_the_nearest():
    with pytest.raises(ValueError, match=r"^network: want one of infiniband.*did you mean infiniband-8x200\?$"):
        network("infiniband-8x20")


def test_names_are_taken_in_capitals_too():
    assert gpu("H100") is GPUS["h100"] and network("EFA-4x100") is NETWORKS["efa-4x100"]


@pytest.mark.parametrize("name", GPUS)
def test_what_a_gpu_attains_is_less_than_its_data_sheet_and_has_a_source(name):
    found = gpu(name)
    assert 0.5 < found.attainable < 1 and 0.5 < found.hbm_attainable < 1
    measured = set(found._fields) - {"name", "sources"}
    assert measured == found.sources.keys()
    assert found.beyond[0] <= found.beyond[1] <= found.beyond[2]


def test_a_large_all_gather_takes_what_the_slowest_link_lets_through():
    a100, slow = gpu("a100-80gb"), network("efa-4x100")
    moved = 1e12
    assert ring_s(moved, 64, 8, a100, slow) == pytest.approx(moved * 63 / 64 / slow.host_bytes_per_s, rel=1e-3)
    assert ring_s(moved, 8, 8, a100, slow) == pytest.approx(moved * 7 / 8 / a100.link_bytes_per_s, rel=1e-3)


def test_a_small_one_takes_its_steps_in_the_fastest_protocol():
    start, near, far, _ = RING_S["LL"]
    steps = 960 * near + 127 * far + start - 64 * near  # 1,024 ranks on 128 hosts: 1,023 steps, 127 between hosts
    assert ring_s(8.0, 1024, 8, gpu("a100-80gb"), network("infiniband-8x200")) == pytest.approx(steps, rel=1e-6)


def test_one_rank_sends_nothing_and_an_all_reduce_goes_round_twice():
    a100, fast = gpu("a100-80gb"), network("infiniband-8x200")
    assert ring_s(1e9, 1, 8, a100, fast) == 0
    once, twice = (ring_s(1e12, 64, 8, a100, fast, passes=passes) for passes in (1, 2))
    assert twice == pytest.approx(2 * once, rel=1e-3)
