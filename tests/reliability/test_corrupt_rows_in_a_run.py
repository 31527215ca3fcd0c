"""Pictures that are damaged under a run: two real ranks learn from others in their place, and stop where it is much.

The run draws from two sets, goes on with a mixture that changes later, and refuses one that would have changed before.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import scenes_shards
from spoiled_shards import spoil
from two_ranks import TIMEOUT_S, finish, records, start

from ofa_ds.data.building.build import build_shards

pytestmark = pytest.mark.long

SPOILED = (3, 17)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = scenes_shards.build(tmp_path_factory.mktemp("scenes"), rows=32)
    for row in SPOILED:
        spoil(folder / "shards", "vision_language", row)
    (folder / "more.tsv").write_text("".join(f"m{i}\tanother text of number {i}\n" for i in range(6)))
    build_shards(folder / "more", text=[folder / "more.tsv"], workers=1)
    return folder


def begin(data: Path, run_dir: Path, *overrides: str):
    return start("pretrain", "pretrain-nano", [
        f"run_dir={run_dir}", "data.shards=", f"data.sets.scenes.shards={data / 'shards'}",
        f"data.sets.more.shards={data / 'more'}", "data.sets.more.weight=3",
        f"data.vocab={data / 'vocab'}", "data.workers=1",
        "batch.global_rows=24", "batch.micro_rows=12", "train.num_steps=4", "train.log_every=1", *overrides,
    ])  # fmt: skip


def test_two_ranks_go_on_with_other_rows_write_each_down_once_and_count_them(data, tmp_path):
    output = finish(begin(data, tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "corrupt_rows.jsonl").read_text().splitlines()]
    assert sorted(line["row"] for line in lines) == list(SPOILED), "64 of 32 rows: each came twice"
    assert output.count("is learnt from in its place") == 2
    assert sum(record["corrupt_rows"] for record in records(tmp_path)) == 4
    assert records(tmp_path)[-1]["epoch/vision_language/scenes"] == 2.0
    assert records(tmp_path)[-1]["epoch/text/more"] == 2.0
    assert "step 3: vision_language of scenes is in epoch 2 of its 32 rows" in output
    later = begin(data, tmp_path, "train.num_steps=6", "data.mix_changes=[{step = 6, text = 9, vision_language = 1}]")
    assert "with data.mix_changes () (now ({'step': 6," in finish(later)
    assert len((tmp_path / "corrupt_rows.jsonl").read_text().splitlines()) == 2
    assert [record["epoch/text/more"] for record in records(tmp_path)][-2:] == [2.5, 4.66666667]
    earlier = begin(data, tmp_path, "train.num_steps=7", "data.mix_changes=[{step = 5, text = 9}]")
    output, _ = earlier.communicate(timeout=TIMEOUT_S)
    assert earlier.returncode == 1 and "was trained with other settings: data.mix_changes" in output


def test_where_none_may_be_corrupt_the_run_ends_with_the_list(data, tmp_path):
    process = begin(data, tmp_path, "data.max_corrupt=0")
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "more than data.max_corrupt 0 of 10000 allows; all are in" in output and "image: " in output
    assert (tmp_path / "corrupt_rows.jsonl").read_text()
