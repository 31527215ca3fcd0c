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
        ("gpu54\ngpu56\n", ":1: 'gpu54': want 'HOST slots=N'"),
        ("node1:8\nnode2:8\n", ":1: 'node1:8': want 'HOST slots=N'"),
        ("node1 slots = 8\n", ":1: 'node1 slots = 8': want 'HOST slots=N'"),
        ("node1 slots=8\nnode2 lots=8\n", ":2: 'node2 lots=8': want 'HOST slots=N'"),
        ("n1 slots=4 max_slots=8\n", ":1: 'n1 slots=4 max_slots=8': want 'HOST slots=N'"),
        ("index,ip\njob-1,10.0.0.1\n", ":1: 'index,ip': want 'HOST slots=N'"),
        ("worker-[1-4] slots=8\n", ":1: 'worker-[1-4] slots=8': want 'HOST slots=N'"),
        ("fe80::1 slots=1\n[2001:db8::1] slots=1\n", ":2: '[2001:db8::1] slots=1': want 'HOST slots=N'"),
        (f"a slots={'9' * 5000}\n", f":1: 'a slots={'9' * 5000}': want 'HOST slots=N'"),
        ("a slots=8x\n", ":1: 'a slots=8x': want 'HOST slots=N'"),
        ("a slots=-1\n", ":1: 'a slots=-1': want 'HOST slots=N'"),
        ("a slots=8 b slots=8\n", ":1: 'a slots=8 b slots=8': want 'HOST slots=N'"),
        ("a,b slots=8\n", ":1: 'a,b slots=8': want 'HOST slots=N'"),
        ("-oProxyCommand=x slots=8\n", ":1: '-oProxyCommand=x slots=8': want 'HOST slots=N'"),
        ("-l@a slots=8\n", ":1: '-l@a slots=8': want 'HOST slots=N'"),
        ("u@ slots=8\n", ":1: 'u@ slots=8': want 'HOST slots=N'"),
        ("u@v@a slots=8\n", ":1: 'u@v@a slots=8': want 'HOST slots=N'"),
        ("u;id@a slots=8\n", ":1: 'u;id@a slots=8': want 'HOST slots=N'"),
        ("\na slots=0\n", ":2: 'a slots=0': want at least one slot, or no line for a"),
        ("a slots=2\n\na slots=4\n", ":3: 'a slots=4': a is on line 1 already; give each host one line"),
        ("u@a slots=2\nv@a slots=4\n", ":2: 'v@a slots=4': a is on line 1 already; give each host one line"),
        (
            "10.0.0.4 slots=4\n10.0.0.4 slots=4\n",
            ":2: '10.0.0.4 slots=4': 10.0.0.4 is on line 1 already; give each host one line",
        ),
        ("# nobody\n", ": names no host; write one 'HOST slots=N' a line"),
        ("", ": names no host; write one 'HOST slots=N' a line"),
    ],
)
def test_a_mistake_names_file_line_and_text(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "hosts", text)
    with pytest.raises(ValueError) as caught:
        parse_hostfile(file)
    assert str(caught.value) == f"{file}{message}"


def test_a_user_goes_before_the_host(tmp_path: Path) -> None:
    file = write(tmp_path / "hosts", "user1@192.0.2.10 slots=2\nroot@192.0.2.7 slots=1\n")
    assert parse_hostfile(file) == [Host("user1@192.0.2.10", 2), Host("root@192.0.2.7", 1)]


@pytest.mark.parametrize(
    "text, names",
    [
        ("node1 slots=8\r\nnode2 slots=8\r\n", ["node1", "node2"]),
        ("# 地址 slots   # c\n10.0.0.1 slots=1       # main\n10.0.0.2 slots=1", ["10.0.0.1", "10.0.0.2"]),
        ("10.0.0.1   slots=8\n10.0.0.2\tslots=8", ["10.0.0.1", "10.0.0.2"]),
        ("localhost slots=2\n127.0.0.1 slots=2\n", ["localhost", "127.0.0.1"]),
        ("Node1 slots=1\nnode1 slots=1\n", ["Node1", "node1"]),
    ],
)
def test_what_people_write_is_read(tmp_path: Path, text: str, names: list[str]) -> None:
    (tmp_path / "hosts").write_bytes(text.encode())
    assert [host.name for host in parse_hostfile(tmp_path / "hosts")] == names


LINE_ENDS_OF_UNICODE = "\v\f\r\x1c\x1d\x1e\x85\u2028\u2029"


@pytest.mark.parametrize("end", LINE_ENDS_OF_UNICODE, ids=ascii)
def test_only_a_line_feed_ends_a_line(tmp_path: Path, end: str) -> None:
    (tmp_path / "hosts").write_bytes(f"a slots=1 # main{end}b slots=1\nc slots=1\n".encode())
    assert [host.name for host in parse_hostfile(tmp_path / "hosts")] == ["a", "c"]
    (tmp_path / "hosts").write_bytes(f"c slots=1\na slots=1{end}b slots=1\n".encode())
    with pytest.raises(ValueError) as caught:
        parse_hostfile(tmp_path / "hosts")
    assert str(caught.value).startswith(f"{tmp_path}/hosts:2: 'a slots=1")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_named(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "hosts").write_bytes("node1 slots=8\r\n".encode(encoding))
    name = encoding.upper().removesuffix("-SIG")
    with pytest.raises(ValueError, match=rf"hosts:1: .*byte order mark of {name}; save it as UTF-8 without one$"):
        parse_hostfile(tmp_path / "hosts")


def test_a_missing_hostfile_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such hostfile; write one 'HOST slots=N' a line"):
        parse_hostfile(tmp_path / "hosts")


def test_a_file_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"\xff\xfe slots=1")
    with pytest.raises(ValueError, match="not a readable text file"):
        parse_hostfile(tmp_path / "hosts")


names = st.from_regex(r"([a-z0-9_][a-z0-9_.-]{0,5}@)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,11}", fullmatch=True)


@given(st.lists(st.tuples(names, st.integers(1, 64)), min_size=1, max_size=8, unique_by=lambda h: h[0].split("@")[-1]))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, hosts: list[tuple[str, int]]) -> None:
    file = write(tmp_path_factory.mktemp("h") / "hosts", "".join(f"{name} slots={n}\n" for name, n in hosts))
    assert parse_hostfile(file) == [Host(name, n) for name, n in hosts]


def test_the_example_is_right() -> None:
    example = Path(__file__).parents[2] / "launchers" / "hostfile.example"
    assert [host.slots for host in parse_hostfile(example)] == [8, 8, 8, 8]


def test_the_command_prints_hosts_and_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write(tmp_path / "hosts", "a slots=2\nb slots=3\n"))]) == 0
    assert capsys.readouterr().out == "2 5\n"
    assert main([str(tmp_path / "none")]) == 2
    assert "no such hostfile" in capsys.readouterr().err
