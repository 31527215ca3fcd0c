"""Bad input: `stop` names file, line, column, reason and leaves nothing; `quarantine` keeps the line and counts it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_shards import files, negatives, sources, write
from test_tsv import BAD, caption, detection, image, picture

from ofa_ds.data.building.build import build_shards
from ofa_ds.data.manifest import Manifest
from ofa_ds.data.shards import Shards
from ofa_ds.data.shards_verify import verify_shards


def attempt(tmp_path: Path, family: str, lines: list[bytes], **options: Any) -> Callable[[], Manifest]:
    path = write(tmp_path / "bad.tsv", lines)
    return lambda: build_shards(tmp_path / "out", **{family: [path]}, workers=1, **options)


GOOD = {"vision_language": caption(), "text": b"1\tgood", "image": image(), "detection": detection(b"0,0,9,9,1,dog")}


@pytest.mark.parametrize("family, line, message", BAD.values(), ids=BAD)
def test_a_bad_line_stops_the_build_and_leaves_nothing(family: str, line: bytes, message: str, tmp_path: Path) -> None:
    build = attempt(tmp_path, family, [GOOD[family], line, GOOD[family]])
    with pytest.raises(ValueError, match=rf"bad.tsv:2: ({message}|image: .*{message})"):
        build()
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tsv"]


@pytest.mark.parametrize("family, line, message", BAD.values(), ids=BAD)
def test_a_bad_line_goes_to_quarantine_as_it_came(family: str, line: bytes, message: str, tmp_path: Path) -> None:
    manifest = attempt(tmp_path, family, [GOOD[family], line, GOOD[family]], on_error="quarantine")()
    part = manifest.families[family]
    assert (part.rows, part.quarantined) == (2, 1)
    assert [(source.file, source.rows, source.quarantined) for source in part.sources] == [("bad.tsv", 2, 1)]
    assert (tmp_path / "out" / "quarantine" / "bad.tsv").read_bytes() == line + b"\n"
    assert "bad.tsv:2: " in (tmp_path / "out" / "quarantine" / "bad.log").read_text()
    assert verify_shards(tmp_path / "out", workers=1) == [] and Shards(tmp_path / "out").families == {family: 2}


def test_the_first_bad_line_is_named_whatever_the_workers(tmp_path: Path) -> None:
    lines = [b"%d\tgood" % k for k in range(40)]
    lines[11], lines[38] = b"11\t", b"38"
    path = write(tmp_path / "bad.tsv", lines)
    for workers in (1, 3):
        with pytest.raises(ValueError, match="bad.tsv:12: text: is empty"):
            build_shards(tmp_path / "out", text=[path], rows_per_shard=4, workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tsv"]


def test_quarantine_gathers_the_lines_of_a_file_from_all_its_shards(tmp_path: Path) -> None:
    lines = [b"%d\tgood" % k if k % 5 else b"%d\t" % k for k in range(20)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "x.tsv", lines)
    given = [tmp_path / name / "x.tsv" for name in ("a", "b")]
    manifest = build_shards(tmp_path / "out", text=given, rows_per_shard=3, workers=2, on_error="quarantine")
    assert manifest.families["text"].quarantined == 8
    bad = b"".join(b"%d\t\n" % k for k in range(0, 20, 5))
    found = files(tmp_path / "out" / "quarantine")
    assert (found["x.tsv"], found["x-1.tsv"]) == (bad, bad) and len(found) == 4
    assert [Shards(tmp_path / "out").row("text", i)["id"] for i in (0, 3, 4, 16)] == ["1", "4", "6", "1"]


@pytest.mark.parametrize("on_error", ["stop", "quarantine"])
@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "the file is empty"),
        (b"1\ta\r\n2\tb\r\n", "CRLF"),
        (None, "no such file"),
        (b"x\ny\n", "none of 2|columns"),
    ],
    ids=["empty", "CRLF", "missing", "all bad"],
)
def test_a_file_that_is_wrong_as_a_whole_stops_the_build_either_way(
    content: bytes | None, message: str, on_error: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "bad.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.tsv.*({message})"):
        build_shards(tmp_path / "out", text=[tmp_path / "bad.tsv"], workers=1, on_error=on_error)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


def test_pictures_of_two_sizes_do_not_mix_in_the_image_family(tmp_path: Path) -> None:
    other = image(b"1 2 3 4", base64.b64encode(picture(32, 32)))
    with pytest.raises(ValueError, match="bad.tsv:3: 32 x 32: image: want .*bad.tsv:1: 64 x 64"):
        attempt(tmp_path, "image", [image(), image(), other])()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [({}, "want TSV files of vision_language, text"), ({"texts": ["a"]}, "got texts"), ({"text": []}, "got none")],
)
def test_no_or_unknown_sources_are_refused(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build_shards(tmp_path / "out", **options)


def test_an_occupied_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ValueError, match="not an empty directory"):
        build_shards(tmp_path / "out", **sources(tmp_path / "tsv"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("all_captions.txt", None, "all_captions.txt: no such file"),
        ("all_captions.txt", b"one\n\n one \n", "at least two different lines, got 1"),
        ("object.txt", b"a\n\xff\n", "object.txt: invalid UTF-8 at byte 2"),
        ("type2ans.json", b"{", "type2ans.json:1: want JSON"),
        ("type2ans.json", b"[" * 100_000, "type2ans.json: want JSON: nested too deeply"),
        ("type2ans.json", b'{"other": ["red"], "n": ' + b"9" * 5000 + b"}", "type2ans.json: want JSON"),
        ("type2ans.json", b'{"other": ["red"], "other": ["no"]}', "type2ans.json: want JSON: the key 'other' is th"),
        ("type2ans.json", b'{"color": ["red"]}', 'want {"answer type": .*"other"'),
        ("type2ans.json", b'{"other": ["red", 3]}', "for type 'other'"),
    ],
)
def test_wrong_negatives_are_named(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    given = negatives(tmp_path / "neg")
    (given / name).unlink()
    if content is not None:
        (given / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build_shards(tmp_path / "out", **sources(tmp_path / "tsv"), negatives=given, workers=1)
    assert not (tmp_path / "out").exists()
