"""What a run was started with is kept for each attempt, whole or not at all, and read back whatever became of it."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from ofa_ds.train import report_attempt as kept
from ofa_ds.train.report_attempt import read_attempts, write_attempt

FILES = {
    kept.RECIPE: 'run_dir = "runs/a"\n',
    kept.DEEPSPEED: "{}",
    kept.RESOLVED: '{"zero_optimization": {"stage": 3}}',
    kept.ENVIRONMENT: json.dumps({"version": 1, "first_step": 40}),
    kept.DATA: json.dumps({"shards": {"fingerprint": "f"}}),
}


def test_each_attempt_has_a_number_of_its_own_and_no_older_one_is_touched(tmp_path: Path) -> None:
    first = write_attempt(tmp_path, FILES)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in first.iterdir()}
    second = write_attempt(tmp_path, {**FILES, kept.RECIPE: 'run_dir = "runs/b"\n'})
    assert [first.name, second.name] == ["0001", "0002"]
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in first.iterdir()}
    one, two = read_attempts(tmp_path)
    assert one.recipe != two.recipe and one.number == 1 and two.first_step == 40 and not one.problems
    assert two.resolved == {"zero_optimization": {"stage": 3}} and two.data == {"shards": {"fingerprint": "f"}}


def test_two_jobs_that_write_at_once_each_have_their_own(tmp_path: Path) -> None:
    ready, made = threading.Barrier(8), []

    def job(number: int) -> None:
        ready.wait()
        made.append(write_attempt(tmp_path, {kept.RECIPE: str(number)}))

    threads = [threading.Thread(target=job, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 8
    assert sorted((path / kept.RECIPE).read_text() for path in made) == [str(number) for number in range(8)]


def test_a_disk_that_is_full_leaves_no_half_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str, **options: str) -> int:
        if path.name == kept.ENVIRONMENT:
            raise OSError(28, "No space left on device", str(path))
        return real(path, text, **options)

    real = Path.write_text
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_attempt(tmp_path, FILES)
    assert os.listdir(tmp_path / kept.ATTEMPTS) == [] and read_attempts(tmp_path) == []


def test_a_run_directory_of_before_has_no_attempts_and_a_damaged_one_says_what_is_wrong(tmp_path: Path) -> None:
    assert read_attempts(tmp_path) == read_attempts(tmp_path / "nowhere") == []
    place = write_attempt(tmp_path, FILES)
    (place / kept.DATA).unlink()
    (place / kept.ENVIRONMENT).write_text("[1]")
    (place / kept.RESOLVED).write_text('{"zero')
    (tmp_path / kept.ATTEMPTS / "notes").mkdir()
    (tmp_path / kept.ATTEMPTS / "0007").write_text("a file")
    (found,) = read_attempts(tmp_path)
    assert found.data is found.environment is found.resolved is None and found.recipe and found.first_step == 0
    assert len(found.problems) == 3 and all(str(place) in problem for problem in found.problems)
    assert write_attempt(tmp_path, FILES).name == "0002"
