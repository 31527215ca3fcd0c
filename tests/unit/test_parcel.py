"""Directory, arguments and environment of a rank go through shells as one word, and come out byte for byte."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ofa_ds.cluster.parcel import OPTION, Parcel, main, pack, unpack

values = st.one_of(
    st.binary(max_size=20), st.text(max_size=20).map(lambda text: os.fsencode(text.encode("utf-8", "surrogatepass")))
)
values = values.map(lambda value: value.replace(b"\0", b""))
names = st.from_regex(rb"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
parcels = st.builds(
    Parcel,
    directory=values,
    arguments=st.lists(values, max_size=6).map(tuple),
    environment=st.dictionaries(names, values, max_size=4),
)
ATTACKS = (
    b"run_dir=/x;>/tmp/P",
    b"`id`",
    b"$(id)",
    b'["data"]',
    b"{a=1,b=2}",
    b"it's",
    b"%h %n %u",
    b"\n\r\t \x7f\xff",
    b"",
)


@given(parcels)
@example(Parcel(directory=b"/a b", arguments=ATTACKS, environment=dict.fromkeys((b"A", b"B"), b"".join(ATTACKS))))
def test_every_byte_comes_out_of_a_word_that_no_shell_reads(parcel: Parcel) -> None:
    word = pack(parcel)
    assert set(word) <= {*string.ascii_letters, *string.digits, "-", "_"}
    assert unpack(word) == parcel


@given(st.text(max_size=30))
@example("W10")  # []
@example("e30")  # {}
@example("eyJkaXJlY3RvcnkiOiAxfQ")  # {"directory": 1}
@example("8J-YgA")  # not JSON
def test_a_word_of_another_hand_is_refused_in_one_line(word: str) -> None:
    with pytest.raises(ValueError, match="not what ofa_ds.cluster.parcel prints") as caught:
        unpack(word)
    assert len(str(caught.value).splitlines()) == 1


def open_parcel(parcel: Parcel, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What `deepspeed.launcher.launch` starts as a rank, where it would."""
    command = [sys.executable, "-u", "-m", "ofa_ds.pretrain", "--local_rank=0", OPTION + pack(parcel)]
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, env={**os.environ, **env}, capture_output=True, text=True)


RECORDER = """
import json, os, sys
if sys.orig_argv[2:4] == ["-m", "ofa_ds.pretrain"] and "--local_rank=0" not in sys.orig_argv:
    record = {"cwd": os.getcwd(), "argv": sys.orig_argv, "env": dict(os.environ)}
    open(os.environ["OFA_RECORD"], "w").write(json.dumps(record))
    os._exit(0)
"""


def test_a_rank_starts_in_its_directory_with_its_arguments_and_environment(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(RECORDER)
    folder = tmp_path / "a b $(id)"
    folder.mkdir()
    environment = {
        b"PYTHONPATH": os.fsencode(tmp_path),
        b"OFA_RECORD": os.fsencode(tmp_path / "record"),
        b"UCX_A": b"\xff a'b",
        b"RANK": b"7",
        b"CUDA_VISIBLE_DEVICES": b"7",
    }
    arguments = (b"a.toml", *ATTACKS[:-2], b"\xff")
    parcel = Parcel(directory=os.fsencode(folder), arguments=arguments, environment=environment)
    result = open_parcel(parcel, {"RANK": "1", "CUDA_VISIBLE_DEVICES": "0,1", "PATH": "/usr/bin"})
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "record").read_text())
    assert record["cwd"] == str(folder)
    assert tuple(map(os.fsencode, record["argv"][4:])) == arguments
    assert os.fsencode(record["env"]["UCX_A"]) == b"\xff a'b"
    assert (record["env"]["RANK"], record["env"]["CUDA_VISIBLE_DEVICES"]) == ("1", "0,1"), "the launcher's count"
    assert record["env"]["PATH"] == f"{os.path.dirname(sys.executable)}:/usr/bin"


def test_a_host_without_the_directory_says_so_in_one_line(tmp_path: Path) -> None:
    result = open_parcel(Parcel(directory=os.fsencode(tmp_path / "gone"), arguments=(), environment={}), {})
    assert result.returncode == 1
    assert f"directory '{tmp_path}/gone': No such file or directory; every host needs the directory" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_command_prints_one_word_with_directory_arguments_and_forwarded_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NCCL_A", "it's; `id`")
    monkeypatch.setenv("MY_PASSWORD", "x")
    assert main(["pretrain-nano", "run_dir=a b"]) == 0
    (word,) = capsys.readouterr().out.split()
    parcel = unpack(word.removeprefix(OPTION))
    assert (parcel.directory, parcel.arguments) == (os.fsencode(tmp_path), (b"pretrain-nano", b"run_dir=a b"))
    assert parcel.environment[b"NCCL_A"] == b"it's; `id`" and b"MY_PASSWORD" not in parcel.environment


def test_what_a_shell_would_not_take_as_one_word_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain-nano", "run_dir=" + "x" * 100_000]) == 2
    assert "use a recipe file, or ofa-ds launch" in capsys.readouterr().err
