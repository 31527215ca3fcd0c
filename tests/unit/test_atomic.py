"""What appears does so whole, for one of those who make it; nothing of the others, killed or failed, stays behind."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofa_ds.checkpoint.runs import remove_leftovers
from ofa_ds.storage.atomic import PARTIAL, check_space, new_content, new_directory, new_file, replace_file
from ofa_ds.storage.sizes import size_text

MAKERS = {"directory": new_directory, "file": new_file}


def fill(partial: Path, text: str) -> None:
    (partial / "content" if partial.is_dir() else partial).write_text(text)


def content(destination: Path) -> str:
    return (destination / "content" if destination.is_dir() else destination).read_text()


@pytest.mark.parametrize("kind", MAKERS)
def test_of_two_that_make_the_same_the_first_to_end_has_it_and_the_other_is_told(tmp_path, kind):
    out = tmp_path / "sub" / "out"
    with pytest.raises(ValueError, match="out: appeared meanwhile") as caught, MAKERS[kind](out) as slow:
        fill(slow, "slow")
        with MAKERS[kind](out) as quick:
            assert quick != slow
            fill(quick, "quick")
    assert content(out) == "quick" and "\n" not in str(caught.value)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from ofa_ds.storage import atomic
with getattr(atomic, sys.argv[1])(Path(sys.argv[2])) as partial:
    print(partial, flush=True)
    if sys.argv[3] == "wait":
        sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", MAKERS)
def test_what_a_killed_process_left_goes_with_the_next_try_and_what_a_living_one_makes_stays(tmp_path, kind):
    out, other = tmp_path / "out", tmp_path / "out_2"
    command = [sys.executable, "-c", KILLED, MAKERS[kind].__name__]
    for destination in (out, other):
        done = subprocess.run([*command, str(destination), "die"], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    with subprocess.Popen([*command, str(out), "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as living:
        theirs = Path(living.stdout.readline().decode().strip())
        with MAKERS[kind](out) as partial:
            fill(partial, "new")
        hidden = theirs if kind == "directory" else theirs.parent
        assert hidden.exists() and len([path for path in tmp_path.iterdir() if path.name.startswith(".")]) == 2
        living.stdin.close()
    out.unlink() if kind == "file" else (out / "content").unlink()
    with MAKERS[kind](out) as partial:
        fill(partial, "again")
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert content(out) == "again" and len(left) == 1 and left[0].startswith(".new_out_2_"), "of another destination"


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("problem", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_and_a_stop_leave_nothing(tmp_path, kind, problem):
    with pytest.raises(type(problem)), MAKERS[kind](tmp_path / "out") as partial:
        fill(partial, "half")
        raise problem
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_there_is_never_replaced_nor_followed(tmp_path, kind):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "content").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name, target in (("link", "empty"), ("dangling", "nowhere"), ("to_file", "file")):
        (tmp_path / name).symlink_to(target)
    for name in ("full", "file", "link", "dangling", "to_file"):
        with pytest.raises(ValueError, match=f"{name}: is "), MAKERS[kind](tmp_path / name):
            pass
    assert content(tmp_path / "full") == content(tmp_path / "file") == "mine"
    assert not any((tmp_path / "empty").iterdir())


def test_an_empty_directory_may_wait_for_its_content(tmp_path):
    with new_directory(tmp_path) as partial:
        fill(partial, "new")
    assert content(tmp_path) == "new"


def test_through_a_linked_folder_it_appears_where_that_leads(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_directory(tmp_path / "link" / "out") as partial:
        fill(partial, "new")
    assert content(tmp_path / "real" / "out") == "new"


def test_a_run_that_clears_its_leftovers_leaves_what_others_make_there(tmp_path):
    (tmp_path / f"{PARTIAL}step_00000001_01234567").mkdir()
    with new_directory(tmp_path / "step_00000001") as partial:
        fill(partial, "new")
        remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


@given(st.integers(1, 10**18))
def test_a_size_is_near_what_it_says_and_never_nothing(num_bytes):
    number, unit = size_text(num_bytes).split()
    scale = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15}[unit]
    assert float(number) > 0 and abs(float(number) * scale - num_bytes) <= 0.006 * num_bytes


def test_a_small_lack_of_room_is_said_in_small_units(tmp_path, monkeypatch):
    class Full:
        f_bavail, f_frsize, f_files, f_favail = 10, 4096, 100, 50

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    with pytest.raises(OSError, match=r"41\.0 kB are free, 600 kB are needed"):
        check_space(tmp_path, 600_000, 1)


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    replace_file(pipe, "a line\n")
    reader.join(10)
    assert read == ["a line\n"] and stat.S_ISFIFO(pipe.stat().st_mode) and list(tmp_path.iterdir()) == [pipe]


def test_content_that_could_not_be_written_whole_leaves_what_was_there(tmp_path):
    (tmp_path / "picture.png").write_text("old")
    for name in ("picture.png", "other.png"):
        with pytest.raises(OSError, match="full"), new_content(tmp_path / name) as partial:
            assert partial.suffix == ".png"
            partial.write_text("ne")
            raise OSError("full")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    assert (tmp_path / "picture.png").read_text() == "old"


def test_new_content_goes_where_a_link_leads(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_text("old")
    (tmp_path / "link.txt").symlink_to("sub/file")
    replace_file(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "sub" / "file").read_text() == "new"
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["file"]
