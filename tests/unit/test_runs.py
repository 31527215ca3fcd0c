"""What of a run directory a run may delete: only what it wrote, and never the last good checkpoints."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import state_of
from hypothesis import given, settings
from hypothesis import strategies as st

from ofa_ds.checkpoint.format import BEST, COUNTS, MANIFEST, RUN
from ofa_ds.checkpoint.from_state import write_checkpoint
from ofa_ds.checkpoint.manifest import FormatVersionError, read_manifest
from ofa_ds.checkpoint.reshard import reshard
from ofa_ds.checkpoint.runs import (
    find,
    latest,
    newest_good,
    own,
    prune,
    remove_leftovers,
    retire,
    set_aside,
    step_directories,
)
from ofa_ds.cli.main import main
from ofa_ds.storage.lease import LeaseError, held

OURS, OTHER = "a" * 16, "b" * 16


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """The files of a checkpoint; `put` makes others of them."""
    path = tmp_path_factory.mktemp("template") / "step_00000001"
    write_checkpoint(path, state_of({"a": torch.randn(5)}, kinds={"a": ("weight",)}), ranks=1, stage=3)
    return path


def put(
    template: Path, path: Path, step: int, *, run: str | None = OURS, counts: bool = True, best: int | None = None
) -> Path:
    from ofa_ds.checkpoint.manifest import write_document

    path.mkdir(parents=True)
    shutil.copy(template / "rank_00000.safetensors", path)
    document = json.loads((template / MANIFEST).read_text())
    del document["xxh3_128"]
    extra = ({RUN: run} if run else {}) | {COUNTS: counts}
    if best is not None:
        extra[BEST] = {"step": best, "metric": "accuracy", "value": 0.5}
    write_document(path / MANIFEST, {**document, "step": step, "extra": extra})
    return path


def of_version(path: Path, version: int) -> None:
    from ofa_ds.checkpoint.manifest import write_document

    document = json.loads((path / MANIFEST).read_text())
    del document["xxh3_128"]
    (path / MANIFEST).unlink()
    write_document(path / MANIFEST, {**document, "version": version})


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.iterdir() if not path.name.startswith(".lease"))


def tree(path: Path) -> dict[str, bytes | None]:
    found = {str(each.relative_to(path)): each.read_bytes() if each.is_file() else None for each in path.rglob("*")}
    return {"": None, **found}


def test_the_newest_of_this_run_stay_and_the_older_go(template, tmp_path):
    for step in (1, 2, 3, 4):
        put(template, tmp_path / f"step_{step:08d}", step)
    put(template, tmp_path / "step_00000004.old", 4)
    gone = retire(tmp_path, 4, 2, OURS)
    assert names(tmp_path) == ["step_00000003", "step_00000004"] and len(gone) == 3


def test_the_best_as_the_newest_says_stays_beside_the_newest_and_goes_when_another_is_best(template, tmp_path):
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
        put(template, tmp_path / f"step_{step:08d}", step, best=best)
    retire(tmp_path, 4, 1, OURS)
    assert names(tmp_path) == ["step_00000002", "step_00000004"]
    assert prune(tmp_path, 1) == []
    put(template, tmp_path / "step_00000005", 5, best=5)
    retire(tmp_path, 5, 1, OURS)
    assert names(tmp_path) == ["step_00000005"]


def test_the_pointer_best_is_a_name_of_the_checkpoint(template, tmp_path):
    for step in (1, 2):
        put(template, tmp_path / f"step_{step:08d}", step)
    (tmp_path / "best").write_text("step_00000001\n")
    assert find(tmp_path / "best") == tmp_path / "step_00000001" and find(tmp_path).name == "step_00000002"
    for wrong in ("step_00000009", "../elsewhere", ""):
        (tmp_path / "best").write_text(wrong)
        with pytest.raises(ValueError, match="which is no checkpoint beside it"):
            find(tmp_path / "best")


def foreign(template: Path, run_dir: Path, kind: str, step: int) -> Path:
    """Something with a checkpoint's name that this run did not write, or cannot be told to have written."""
    path = run_dir / f"step_{step:08d}"
    if kind in ("another run", "no run"):
        put(template, path, step, run=OTHER if kind == "another run" else None)
    elif kind == "another step":  # copied from one of this run's
        put(template, path, step + 1000)
    elif kind == "link":
        path.symlink_to(put(template, run_dir.parent / f"disk2_{step}", step))
    elif kind == "dangling link":
        path.symlink_to(run_dir / "not mounted")
    elif kind == "folder":
        (path / "notes").mkdir(parents=True)
        (path / "notes" / "a.txt").write_text("mine")
    elif kind == "file":
        path.write_text("mine")
    elif kind == "damaged manifest":
        (put(template, path, step) / MANIFEST).write_text("{")
    elif kind == "damaged file":
        with open(put(template, path, step) / "rank_00000.safetensors", "ab") as file:
            file.write(b"x")
    elif kind == "newer version":
        of_version(put(template, path, step), 3)
    return path


KINDS = (
    "another run", "no run", "another step", "link", "dangling link", "folder", "file", "damaged manifest",
    "damaged file", "newer version",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_run_did_not_write_or_cannot_read_is_never_deleted_and_never_counts(template, tmp_path, kind):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    strange = [foreign(template, run_dir, kind, step) for step in (2, 4)]
    before = [tree(path) for path in strange]
    for step in (1, 3, 5):
        put(template, run_dir / f"step_{step:08d}", step)
    assert [path.name for path in retire(run_dir, 5, 2, OURS)] == ["step_00000001"]
    assert [tree(path) for path in strange] == before and all(os.path.lexists(path) for path in strange)
    assert own(strange[0], OURS) is None


def test_files_of_a_user_in_a_checkpoint_survive_it(template, tmp_path, capsys):
    for step in (1, 2):
        put(template, tmp_path / f"step_{step:08d}", step)
    (tmp_path / "step_00000001" / "eval.json").write_text("42")
    (tmp_path / "step_00000001" / "plots").mkdir()
    (tmp_path / "elsewhere").write_text("x")
    (tmp_path / "step_00000001" / "rank_00001.safetensors").symlink_to(tmp_path / "elsewhere")
    retire(tmp_path, 2, 1, OURS)
    (rest,) = tmp_path.glob("step_00000001.rest_*")
    assert names(rest) == ["eval.json", "plots", "rank_00001.safetensors"] and (tmp_path / "elsewhere").exists()
    assert "step_00000001" in capsys.readouterr().err
    assert [step for step, _ in step_directories(tmp_path)] == [2], "what is left is no checkpoint to anyone"


@settings(max_examples=15, deadline=None)
@given(steps=st.lists(st.booleans(), min_size=1, max_size=8), keep=st.integers(1, 4))
def test_bad_stretches_never_push_a_good_checkpoint_out(template, tmp_path_factory, steps, keep):
    run_dir = tmp_path_factory.mktemp("run")
    for step, is_good in enumerate(steps, 1):
        put(template, run_dir / f"step_{step:08d}", step, counts=is_good)
        retire(run_dir, step, keep, OURS)
        good = [n for n, each in enumerate(steps[:step], 1) if each]
        bad = [n for n, each in enumerate(steps[:step], 1) if not each and n > max(good, default=0)]
        left = [n for n, _ in step_directories(run_dir)]
        assert left == sorted(good[-keep:] + bad[-keep:], reverse=True)
        newest = newest_good(run_dir)
        assert (newest.name if newest else None) == (f"step_{good[-1]:08d}" if good else None)
    shutil.rmtree(run_dir)


def test_what_killed_saves_left_goes_and_what_only_looks_like_it_stays(template, tmp_path):
    ours = (".partial_step_00000004_0123abcd", ".trash_step_00000001_0123abcd", ".trash_step_00000002.old_0123abcd")
    others = (
        ".partial_step_00000004_mine", ".partial_import", ".trash_1", ".trash-0", "step_00000003.aside", ".partial_x",
        "step_00000003.damaged", "partial_step_00000004_0123abcd", ".partial_vocab_0123456789abcdef",
    )  # fmt: skip
    for name in (*ours, *others):
        put(template, tmp_path / name, 4)
    (tmp_path / ".partial_step_00000009_0123abcd").symlink_to(tmp_path / others[0])
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*others, ".partial_step_00000009_0123abcd"])


def test_what_cannot_be_deleted_is_told_and_the_rest_is_done(template, tmp_path, capsys, monkeypatch):
    """A checkpoint on a disk that fails: the real call, refused by the system for one name."""
    for step in (1, 2, 3):
        put(template, tmp_path / f"step_{step:08d}", step)
    rename = os.rename

    def refuse(source, target):
        if "step_00000001" in str(source):
            raise OSError(5, "Input/output error", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    assert [path.name for path in retire(tmp_path, 3, 1, OURS)] == ["step_00000002"]
    assert "step_00000001 could not be deleted" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["damaged manifest", "damaged file", "folder", "file"])
def test_a_damaged_newest_is_skipped_with_a_word_and_kept(template, tmp_path, capsys, kind):
    put(template, tmp_path / "step_00000001", 1)
    foreign(template, tmp_path, kind, 2)
    before = tree(tmp_path)
    assert latest(tmp_path) == tmp_path / "step_00000001"
    assert "step_00000002" in (told := capsys.readouterr().err) and "skipped" in told
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["newer version", "dangling link"])
def test_a_version_or_a_disk_that_cannot_be_read_is_never_passed_over(template, tmp_path, kind):
    put(template, tmp_path / "step_00000001", 1)
    foreign(template, tmp_path, kind, 2)
    for ask in (latest, find, lambda path: prune(path, 1), lambda path: prune(path, 1, dry_run=True)):
        with pytest.raises((FormatVersionError, OSError), match="step_00000002"):
            ask(tmp_path)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_where_no_checkpoint_is_whole_each_is_named_with_its_reason(template, tmp_path):
    foreign(template, tmp_path, "damaged manifest", 1)
    foreign(template, tmp_path, "damaged file", 2)
    with pytest.raises(ValueError, match="step_00000002.* bytes.*step_00000001.*"):
        find(tmp_path)


def test_prune_leaves_links_and_what_has_no_manifest(template, tmp_path):
    run_dir = tmp_path / "run"
    for step in (1, 2, 3):
        put(template, run_dir / f"step_{step:08d}", step, run=None)
    foreign(template, run_dir, "link", 5)
    foreign(template, run_dir, "folder", 0)
    assert [path.name for path in prune(run_dir, 1)] == ["step_00000002", "step_00000001"]
    assert names(run_dir) == ["step_00000000", "step_00000003", "step_00000005"]


def test_prune_is_refused_where_a_job_is_at_work(template, tmp_path, capsys):
    for step in (1, 2):
        put(template, tmp_path / f"step_{step:08d}", step)
    with held(tmp_path):
        with pytest.raises(LeaseError, match=f"pid {os.getpid()}"):
            prune(tmp_path, 1)
        assert main(["checkpoint", "prune", str(tmp_path), "--keep", "1"]) == 1
        assert "another job is at work" in capsys.readouterr().err
        assert len(prune(tmp_path, 1, dry_run=True)) == 1
    assert len(prune(tmp_path, 1)) == 1


def test_a_copy_made_by_reshard_is_not_the_runs_to_delete(template, tmp_path):
    put(template, tmp_path / "step_00000001", 1)
    assert own(tmp_path / "step_00000001", OURS)
    reshard(tmp_path / "step_00000001", tmp_path / "b" / "step_00000001", ranks=2)
    assert read_manifest(tmp_path / "b" / "step_00000001").extra == {}
    assert own(tmp_path / "b" / "step_00000001", OURS) is None


def test_setting_aside_a_second_time_takes_another_name(tmp_path):
    for _ in range(3):
        (tmp_path / "step_00000001").mkdir()
        set_aside(tmp_path / "step_00000001", "aside")
    assert len(names(tmp_path)) == 3 and step_directories(tmp_path) == []


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), keep=st.integers(1, 3))
def test_in_any_mixture_only_this_runs_own_whole_checkpoints_go(template, tmp_path_factory, seed, keep):
    run_dir = tmp_path_factory.mktemp("mix") / "run"
    run_dir.mkdir()
    rng = random.Random(seed)
    mine = []
    for step in range(1, rng.randrange(2, 9)):
        kind = rng.choice((*KINDS, *["ours"] * 10))
        if kind == "ours":
            mine.append(put(template, run_dir / f"step_{step:08d}", step))
        else:
            foreign(template, run_dir, kind, step)
    before = tree(run_dir)
    gone = set(retire(run_dir, 100, keep, OURS))
    assert gone == set(mine[:-keep])
    gone_names = {path.name for path in gone}
    assert tree(run_dir) == {name: each for name, each in before.items() if name.split("/")[0] not in gone_names}
