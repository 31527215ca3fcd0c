"""More and more GPUs: weak scaling against the smallest cluster, and what the network's speed would change."""

from __future__ import annotations

import pytest
from PIL import Image

from ofa_ds.model.config import preset
from ofa_ds.plan.hardware import gpu, network
from ofa_ds.plan.layout import Layout
from ofa_ds.plan.scaling import Scaling, as_json, draw, lines, scaling
from ofa_ds.plan.work import ExampleShape, ImageGroup, Work

LAYOUT = Layout(stage=3, hosts=1, ranks_per_host=8, precision="bf16", leaf_classes=("EncoderLayer", "DecoderLayer"))
WORK = Work(images=(ImageGroup(8, 384, 384),), examples=(ExampleShape("caption", 576, 8, 12, count=8),))


@pytest.fixture(scope="module")
def found() -> Scaling:
    return scaling(
        preset("large"), WORK, LAYOUT, accumulation=1, gpu=gpu("a100-80gb"), network=network("infiniband-8x200"),
        gpus=(16, 64, 256), factors=(0.1, 1.0, 2.0),
    )  # fmt: skip


def test_weak_scaling_is_of_the_smallest_cluster_and_falls(found):
    shares = [each.weak_scaling for each in found.named]
    assert [each.gpus for each in found.named] == [16, 64, 256]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True)
    assert found.named[2].step.tokens_per_s / 256 == pytest.approx(shares[2] * found.named[0].step.tokens_per_s / 16)


def test_a_faster_network_is_never_worse(found):
    for gpus in (16, 64, 256):
        mfu = [each.step.mfu for each in found.points if each.gpus == gpus]
        assert mfu == sorted(mfu) and len(mfu) == 3


def test_a_number_of_gpus_that_is_no_whole_number_of_hosts_is_told():
    with pytest.raises(ValueError, match="--gpus 12 is no multiple of the 8 GPUs of a host"):
        scaling(
            preset("tiny"), WORK, LAYOUT, accumulation=1, gpu=gpu("h100"), network=network("efa-32x100"), gpus=(12,)
        )


def test_it_is_printed_drawn_and_given_as_json(found, tmp_path):
    text = "\n".join(lines(found))
    assert "weak scaling" in text and "1,440 Gb/s (infiniband-8x200)" in text
    assert f"{found.named[1].step.mfu:.1%}" in text
    draw(found, tmp_path / "scaling.png")
    with Image.open(tmp_path / "scaling.png") as picture:
        assert picture.size == (900, 560)
        assert len(picture.convert("RGB").getcolors(1 << 16)) > 20
    assert [each["gpus"] for each in as_json(found)] == [16] * 3 + [64] * 3 + [256] * 3
