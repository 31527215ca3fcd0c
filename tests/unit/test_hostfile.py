"""Hostfiles are read strictly: a mistake is an error with file and line, never a run on fewer hosts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ofa_ds.cluster.hostfile import Host, main, parse_hostfile


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_hosts_come_in_file_order_without_comments_and_blank_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "hosts", "# cluster\n\ngpu-2 slots=8\n10.0.0.1\tslots=4  # half\r\n  fe80::1   slots=1\n")
    assert parse_hostfile(file) == [Host("gpu-2", 8), Host("10.0.0.1", 4), Host("fe80::1", 1)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a slots=8\nb slot=8\n", ":2: 'b slot=8': want 'HOST slots=N'"),
        ("a\n", ":1: 'a': want 'HOST slots=N'"),
        ("a slots=8x\n", ":1: 'a slots=8x': want 'HOST slots=N'"),
        ("a slots=-1\n", ":1: 'a slots=-1': want 'HOST slots=N'"),
        ("a slots=8 b slots=8\n", ":1: 'a slots=8 b slots=8': want 'HOST slots=N'"),
        ("a,b slots=8\n", ":1: 'a,b slots=8': want 'HOST slots=N'"),
        ("-oProxyCommand=x slots=8\n", ":1: '-oProxyCommand=x slots=8': want 'HOST slots=N'"),
        ("\na slots=0\n", ":2: 'a slots=0': want at least one slot, or no line for a"),
        ("a slots=2\n\na slots=4\n", ":3: 'a slots=4': a is on line 1 already; give each host one line"),
        ("# nobody\n", ": names no host; write one 'HOST slots=N' a line"),
        ("", ": names no host; write one 'HOST slots=N' a line"),
    ],
)
def test_a_mistake_names_file_line_and_text(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "hosts", text)
    with pytest.raises(ValueError) as caught:
        parse_hostfile(file)
    assert str(caught.value) == f"{file}{message}"


def test_a_missing_hostfile_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such hostfile; write one 'HOST slots=N' a line"):
        parse_hostfile(tmp_path / "hosts")


def test_a_file_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"\xff\xfe slots=1")
    with pytest.raises(ValueError, match="not a readable text file"):
        parse_hostfile(tmp_path / "hosts")


names = st.text("abcXYZ019-._", min_size=1, max_size=12).filter(lambda name: name[0] not in "-.")


@given(st.dictionaries(names, st.integers(1, 64), min_size=1, max_size=8))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, hosts: dict[str, int]) -> None:
    file = write(tmp_path_factory.mktemp("h") / "hosts", "".join(f"{name} slots={n}\n" for name, n in hosts.items()))
    assert parse_hostfile(file) == [Host(name, n) for name, n in hosts.items()]


def test_the_example_is_right() -> None:
    example = Path(__file__).parents[2] / "launchers" / "hostfile.example"
    assert [host.slots for host in parse_hostfile(example)] == [8, 8, 8, 8]


def test_the_command_prints_hosts_and_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write(tmp_path / "hosts", "a slots=2\nb slots=3\n"))]) == 0
    assert capsys.readouterr().out == "2 5\n"
    assert main([str(tmp_path / "none")]) == 2
    assert "no such hostfile" in capsys.readouterr().err
