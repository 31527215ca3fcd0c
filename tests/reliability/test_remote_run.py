"""Training from an object store is training from here: same losses and bytes, also killed and resumed; a real rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import scenes_shards
from two_ranks import finish, kill, records, start, tensors, wait_for

from ofa_ds.cli import main
from ofa_ds.storage import file_systems
from ofa_ds.train.report_attempt import read_attempts

pytestmark = pytest.mark.long


def begin(shards: Path | str, vocab: Path, run_dir: Path, *overrides: str):
    return start("pretrain", "pretrain-nano", [
        f"run_dir={run_dir}", f"data.shards={shards}", f"data.vocab={vocab}", "model.dropout=0.1",
        "train.num_steps=4", "train.log_every=1", "train.save_every=2", *overrides,
    ], ranks=1)  # fmt: skip


def test_a_run_from_s3_that_is_killed_and_resumed_has_the_losses_and_bytes_of_one_from_here(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = scenes_shards.build(tmp_path / "scenes", rows=64)
    for path in (path for path in (data / "shards").rglob("*") if path.is_file()):
        file_systems.upload(path, f"{bucket}/set/{path.relative_to(data / 'shards')}")
    here, there = tmp_path / "here", tmp_path / "there"
    finish(begin(data / "shards", data / "vocab", here, "data.workers=0"))
    process = begin(f"{bucket}/set", data / "vocab", there, "data.workers=1")
    wait_for(there / "step_00000002" / "manifest.json", process)
    kill(process)
    finish(begin(f"{bucket}/set", data / "vocab", there, "data.workers=1"))
    assert [each.first_step for each in read_attempts(there)] == [0, 2]
    assert records(there) == records(here) and len(records(here)) == 4
    assert tensors(there / "step_00000004") == tensors(here / "step_00000004")

    capsys.readouterr()
    scores = []
    for shards in (str(data / "shards"), f"{bucket}/set"):
        assert main(["evaluate", str(here / "step_00000004"), "--shards", shards, "--task", "caption", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        scores.append({key: value for key, value in found.items() if key not in ("shards", "seconds")})
    assert scores[0] == scores[1]
    for what in ("verify", "stats"):
        with pytest.raises(SystemExit) as end:
            main(["shards", what, f"{bucket}/set"])
        assert end.value.code == 2
        assert f"want a directory of this machine, got {bucket}/set; copy it here first" in capsys.readouterr().err
