"""A service that fails in between gives the right rows late, or one line with the location and the way out; no hang."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faulty_service import FaultyService, faulty_service
from tiny_sources import write_sources

from ofa_ds.data.building.build import build_shards
from ofa_ds.data.remote import fetching
from ofa_ds.data.shards import Shards
from ofa_ds.storage import file_systems


@pytest.fixture
def service(s3_address: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyService]:
    """Before the service that has the shards, in BUCKET/set of the environment's address."""
    build_shards(tmp_path / "shards", text=write_sources(tmp_path)["text"], workers=1, rows_per_shard=4)
    for path in (path for path in (tmp_path / "shards").rglob("*") if path.is_file()):
        file_systems.upload(path, f"{bucket}/set/{path.relative_to(tmp_path / 'shards')}")
    monkeypatch.setattr(fetching, "FIRST_WAIT_S", 0.01)
    with faulty_service(s3_address) as service:
        monkeypatch.setenv("AWS_ENDPOINT_URL", service.address)
        yield service


def rows(shards: Shards) -> list[str]:
    return [repr(shards.row("text", i)) for i in range(shards.families["text"])]


def once_of(kind: str) -> Callable[[str, str], str | None]:
    """Each object's reads fail in this way at first, once more than the library itself tries."""
    left: dict[str, int] = {}

    def fault(method: str, path: str) -> str | None:
        if method != "GET" or "arrow" not in path:
            return None
        left[path] = left.get(path, 4) - 1
        return kind if left[path] >= 0 else None

    return fault


@pytest.mark.parametrize("kind", ["500", "slow down", "reset", "cut", "flip"])
def test_what_fails_for_a_while_gives_the_right_rows(
    kind: str, service: FaultyService, bucket: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fault = once_of(kind)
    if kind == "flip":  # wrong bytes are noticed at once: one bad answer is all that is passed over
        seen: set[str] = set()
        fault = lambda method, path: None if method != "GET" or path in seen or seen.add(path) else kind  # noqa: E731
        Shards(f"{bucket}/set")
        service.fault = lambda method, path: fault(method, path) if "arrow" in path else None
    else:
        service.fault = fault
    assert rows(Shards(f"{bucket}/set")) == rows(Shards(tmp_path / "shards"))
    told = capfd.readouterr().err
    assert f"{bucket}/set/text-00000.arrow" in told and ("came damaged" if kind == "flip" else "; try 2 in ") in told


@pytest.mark.parametrize(
    "kind, message",
    [
        ("500", "given up after . tries in . s: see whether the service is up and AWS_ENDPOINT_URL is right"),
        ("expired", "the service refuses these credentials, or they expired: see AWS_ACCESS_KEY_ID, AWS_SESSION_TOKEN"),
        ("forbidden", "the service refuses these credentials"),
        ("gone", "upload the shards again"),
        ("flip", "has checksum .*, want .*; it was changed or damaged there: upload the shards again"),
    ],
)
def test_what_does_not_heal_is_one_line_with_the_location_and_the_way_out(
    kind: str, message: str, service: FaultyService, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = Shards(f"{bucket}/set")
    monkeypatch.setattr(fetching, "READING_S", 0.01)
    service.fault = lambda method, path: kind if method == "GET" else None
    with pytest.raises((OSError, RuntimeError), match=f"{bucket}/set/text-00000.arrow.*{message}") as raised:
        shards.row("text", 0)
    assert str(raised.value).count("\n") == 0 and len(service.seen) < 30


@pytest.mark.parametrize(
    "kind, message",
    [
        ("500", "given up after"),
        ("expired", "HTTP status 400.*; the service refuses these credentials, or they expired: .*; or AWS_REGION is"),
        ("forbidden", "ACCESS_DENIED.*; the service refuses these credentials"),
    ],
)
def test_names_that_read_like_answers_are_not_taken_for_them(
    kind: str, message: str, service: FaultyService, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "OPENING_S", 0.01)
    service.fault = lambda method, path: kind if method == "HEAD" else None
    name = f"{bucket}/SIGNATURE NO_SUCH_KEY HTTP status 403 {'x' * 400}"
    with pytest.raises(OSError, match=message if kind == "500" else "the service refuses"):
        fetching.read_small(name)
    with pytest.raises(OSError, match=message):
        fetching.read_small(f"{bucket}/a")


def test_opening_gives_up_a_service_that_never_answers_as_reading_does(
    service: FaultyService, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "ATTEMPT_S", 0.3)
    monkeypatch.setattr(fetching, "OPENING_S", 0.01)
    service.fault = lambda method, path: "stall" if method == "GET" else None
    with pytest.raises(OSError, match=f"{bucket}/set/manifest.json: no answer in 0 s; given up after 1 tries"):
        Shards(f"{bucket}/set")


def test_a_full_disk_of_this_machine_is_not_tried_again(
    service: FaultyService, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    name = "text.index"
    with pytest.raises(RuntimeError, match="/dev/full: No space left on device; make room there, or name another dir"):
        fetching.download(f"{bucket}/set/{name}", Path("/dev/full"), (tmp_path / "shards" / name).stat().st_size)
    with pytest.raises(RuntimeError, match=f"{tmp_path}: Is a directory; make room there"):
        fetching.download(f"{bucket}/set/{name}", tmp_path, 1)
    monkeypatch.setenv("OFA_DS_CACHE", str(tmp_path / "cache"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(RuntimeError, match=f"{tmp_path}/cache/mirrors/.*manifest.json.*: File too large; make"):
            Shards(f"{bucket}/set")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "; try 2" not in capfd.readouterr().err


def test_a_slow_attempt_is_told(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "TELL_S", 0.1)
    with pytest.raises(OSError, match="s3://a/b: no answer in 1 s; given up after 1 tries"):
        fetching.persistent("s3://a/b", threading.Event().wait, 0.01, 0.6)
    assert "s3://a/b: slow; given up in 0 s" in capfd.readouterr().err


def test_a_service_that_never_answers_is_given_up(
    service: FaultyService, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = Shards(f"{bucket}/set")
    monkeypatch.setattr(fetching, "READING_S", 0.01)
    monkeypatch.setattr(fetching, "ATTEMPT_S", 0.3)
    service.fault = lambda method, path: "stall"
    with pytest.raises(
        OSError, match=f"{bucket}/set/text-00000.arrow, bytes 0 .*no answer in 0 s; given up after 1 tri"
    ):
        shards.row("text", 0)
    assert service.waiting.is_set()


@pytest.mark.usefixtures("service")
def test_a_file_that_was_written_anew_meanwhile_is_refused(
    s3_address: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_address)  # which takes uploads
    shards = Shards(f"{bucket}/set")
    name = shards.where("text", 5).split()[0]
    other = (tmp_path / "shards" / name).read_bytes()
    for data, message in ((other + b"more", "want .* bytes as in manifest.json, got "), (other[::-1], "has checksum")):
        (tmp_path / "changed").write_bytes(data)
        file_systems.upload(tmp_path / "changed", f"{bucket}/set/{name}")
        with pytest.raises(RuntimeError, match=f"{bucket}/set/{name}: .*{message}.*"):
            shards.row("text", 5)


def test_ctrl_c_ends_a_command_that_waits_for_the_service_and_what_it_reads_ahead(
    service: FaultyService, bucket: str
) -> None:
    program = (
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's `&` has it ignored
        "from ofa_ds.cli import main as command\nfrom ofa_ds.cli.main import leave\n"
        "from ofa_ds.data.shards import Shards\n"
        f"shards = Shards('{bucket}/set')\n"
        "def show(options):\n"
        "    shards.announce(('text', i) for i in range(12))\n"
        "    shards.row('text', 0)\n"
        "command.__globals__['_parser'] = lambda: None\n"
        "command.__globals__['parsed'] = lambda *_: type('', (), {'run': staticmethod(show)})\n"
        "leave(command([]))\n"
    )
    service.fault = lambda method, path: "stall" if method == "GET" and "arrow" in path else None
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    assert service.waiting.wait(60)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=15)  # a stalled request alone takes 60 s to end
    assert process.returncode == 130 and "stopped by Ctrl-C" in told, told
