"""Pictures that are damaged under a run: two real ranks learn from others in their place, and stop where it is much."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import scenes_shards
from spoiled_shards import spoil
from two_ranks import TIMEOUT_S, finish, records, start

SPOILED = (3, 17)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = scenes_shards.build(tmp_path_factory.mktemp("scenes"), rows=32)
    for row in SPOILED:
        spoil(folder / "shards", "vision_language", row)
    return folder


def begin(data: Path, run_dir: Path, *overrides: str):
    return start("pretrain", "pretrain-nano", [
        f"run_dir={run_dir}", f"data.shards={data / 'shards'}", f"data.vocab={data / 'vocab'}", "data.workers=1",
        "batch.global_rows=24", "batch.micro_rows=12", "train.num_steps=4", "train.log_every=1", *overrides,
    ])  # fmt: skip


def test_two_ranks_go_on_with_other_rows_write_each_down_once_and_count_them(data, tmp_path):
    output = finish(begin(data, tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "corrupt_rows.jsonl").read_text().splitlines()]
    assert sorted(line["row"] for line in lines) == list(SPOILED), "64 of 32 rows: each came twice"
    assert output.count("is learnt from in its place") == 2
    assert sum(record["corrupt_rows"] for record in records(tmp_path)) == 4
    assert records(tmp_path)[-1]["epoch/vision_language"] == 2.0
    assert "step 3: vision_language is in epoch 2 of its 32 rows" in output
    finish(begin(data, tmp_path, "train.num_steps=6"))
    assert len((tmp_path / "corrupt_rows.jsonl").read_text().splitlines()) == 2


def test_where_none_may_be_corrupt_the_run_ends_with_the_list(data, tmp_path):
    process = begin(data, tmp_path, "data.max_corrupt=0")
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "more than data.max_corrupt 0 of 10000 allows; all are in" in output and "image: " in output
    assert (tmp_path / "corrupt_rows.jsonl").read_text()
