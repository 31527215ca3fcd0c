"""A folder of pictures becomes shards: captions from files beside them or from metadata; the way that help teaches."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ofa_ds.cli.main import main
from ofa_ds.data.building.build import How
from ofa_ds.data.importing import folder as importing
from ofa_ds.data.importing import item_lines
from ofa_ds.data.importing.importing import import_shards
from ofa_ds.data.shards import Shards
from ofa_ds.data.shards_verify import verify_shards


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(out := io.BytesIO(), "JPEG")
    return out.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Nine pictures in two folders, each with a text; and what is no picture."""
    (folder := tmp_path / "pictures").joinpath("b", ".hidden").mkdir(parents=True)
    for k in range(9):
        path = folder / ("b" if k % 2 else "") / f"{k}.{'JPG' if k == 4 else 'jpg'}"
        path.write_bytes(picture(k))
        path.with_suffix(".txt").write_text(f" the cat {k}\non a mat\n")
    (folder / "notes.md").write_text("mine")
    (folder / "b/.hidden/x.jpg").write_bytes(b"")
    (folder / "._0.jpg").write_bytes(b"")
    return folder


def rows(out: Path) -> list[tuple[str, str, bytes]]:
    assert verify_shards(out, workers=1) == []
    shards = Shards(out)
    found = [shards.row("vision_language", i) for i in range(shards.families["vision_language"])]
    assert {(row["type"], row["dataset"]) for row in found} == {("caption", "folder")}
    return [(row["id"], row["caption"], row["image"]) for row in found]


def test_texts_beside_pictures_are_their_captions_in_order_of_name_for_any_workers(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (importing, item_lines):
        monkeypatch.setattr(module, "PIECE_ROWS", 4)
    import_shards(str(tmp_path / "out"), "folder", [str(pictures)], how=How(workers=1))
    names = ["0.jpg", "2.jpg", "4.JPG", "6.jpg", "8.jpg", "b/1.jpg", "b/3.jpg", "b/5.jpg", "b/7.jpg"]
    numbers = [int(re.findall(r"\d", name)[0]) for name in names]
    wanted = [(name, f"the cat {k} on a mat", picture(k)) for name, k in zip(names, numbers, strict=True)]
    assert rows(tmp_path / "out") == wanted
    import_shards(str(tmp_path / "two"), "folder", [str(pictures)], how=How(workers=2))
    assert [path.name for path in sorted((tmp_path / "two").glob("*.arrow"))] == [
        f"vision_language-{k:05d}.arrow" for k in range(3)
    ]
    for path in (tmp_path / "out").rglob("*"):
        assert (
            path.is_dir() or path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "out")).read_bytes()
        )


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_metadata_says_captions_and_may_say_several_of_one_picture(form: str, pictures: Path, tmp_path: Path) -> None:
    said = [("b/1.jpg", "one, of two"), ("0.jpg", "none"), ("b/1.jpg", 'another "one"')]
    with (pictures / f"metadata.{form}").open("w", newline="") as file:
        if form == "csv":
            csv.writer(file).writerows([("file_name", "text"), *said])
        else:
            file.writelines(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in said)
    import_shards(str(tmp_path / "out"), "folder", [str(pictures)], how=How(workers=1, on_error="quarantine"))
    names = ("b/1.jpg", "0.jpg", "b/1.jpg#2")
    wanted = [(name, said[k][1], picture(int(said[k][0][-5]))) for k, name in enumerate(names)]
    assert rows(tmp_path / "out") == wanted
    told = (tmp_path / "out/quarantine/pictures.log").read_text().splitlines()
    assert len(told) == 7 and all("caption: there is none; want a text in NAME.txt" in line for line in told)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metadata.jsonl", '{"file_name": "../x.jpg", "text": "a"}', r"metadata.jsonl:1: '../x.jpg' is no picture in"),
        (
            "metadata.jsonl",
            '\n{"file_name": "0.jpg"}',
            r"metadata.jsonl:2: has no text or caption; say --column caption=",
        ),
        ("metadata.jsonl", "[1]", "metadata.jsonl:1: want a table"),
        ("metadata.jsonl", "{", "metadata.jsonl:1: not JSON"),
        ("metadata.jsonl", '{"file_name": "0.jpg", "text": 5}', "metadata.jsonl:1: text: want a text, got 5"),
        ("metadata.csv", 'file_name,text\n0.jpg,"a', "metadata.csv:2: not CSV"),
        (
            "metadata.csv",
            "name,text\n0.jpg,a",
            r"metadata.csv:2: has no file_name or image or file; say --column image=",
        ),
        ("0.txt", "", r"pictures:0.jpg: caption: 0.txt is empty; want a text"),
        ("0.txt", b"\xff", r"pictures:0.jpg: caption: 0.txt is not UTF-8"),
        ("0.jpg", "x", r"pictures:0.jpg: image: undecodable"),
    ],
)
def test_what_is_wrong_is_one_line_with_its_place(
    name: str, content: str | bytes, message: str, pictures: Path, tmp_path: Path
) -> None:
    (pictures / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        import_shards(str(tmp_path / "out"), "folder", [str(pictures)], how=How(workers=1))
    assert not (tmp_path / "out").exists()


def test_each_folder_is_listed_once_and_one_that_cannot_be_is_told(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[str] = []
    scandir = os.scandir

    def listing(at: str) -> Iterator[os.DirEntry]:
        listed.append(os.path.relpath(at, pictures))
        if len(listed) > 2:
            raise PermissionError(errno.EACCES, "Permission denied", at)
        return scandir(at)

    monkeypatch.setattr(os, "scandir", listing)
    assert len(importing._listed(pictures)) == 9 and listed == [".", "b"]
    (pictures / "c").mkdir()
    listed.clear()
    with pytest.raises(PermissionError, match=f"Permission denied: '{pictures}/c/'"):
        importing._listed(pictures)


def test_folders_that_cannot_be_meant_are_refused(pictures: Path, tmp_path: Path) -> None:
    for name in ("metadata.csv", "metadata.jsonl"):
        (pictures / name).touch()
    (bare := tmp_path / "bare").mkdir()
    cases = {str(pictures): "has metadata.jsonl and metadata.csv; want one", str(bare): "has no picture"}
    cases |= {
        "s3://bucket/pictures": "want a folder of this machine",
        str(bare / "no"): "want a folder of this machine",
    }
    for given, message in cases.items():
        with pytest.raises(ValueError, match=message):
            import_shards(str(tmp_path / "out"), "folder", [given], how=How(workers=1))
    (bare / "a.jpg").write_bytes(picture(0))
    with pytest.raises(ValueError, match="none of its 1 pictures has a caption: want a text in NAME.txt"):
        import_shards(str(tmp_path / "out"), "folder", [str(bare)], how=How(workers=1))
    with pytest.raises(ValueError, match="rows of a folder are captions"):
        import_shards(str(tmp_path / "out"), "folder", [str(bare)], kind="text", how=How(workers=1))


def test_a_folder_that_changed_after_a_stop_is_read_anew(pictures: Path, tmp_path: Path) -> None:
    how = How(workers=1, shard_bytes=1500)
    (pictures / "b/7.txt").write_text("")
    with pytest.raises(ValueError, match="b/7.txt is empty"):
        import_shards(str(tmp_path / "out"), "folder", [str(pictures)], how=how)
    (pictures / "b/7.txt").write_text("seven")
    (pictures / "0.txt").write_text("nought")
    import_shards(str(tmp_path / "out"), "folder", [str(pictures)], how=how)
    found = {name: caption for name, caption, _ in rows(tmp_path / "out")}
    assert len(found) == 9 and (found["0.jpg"], found["b/7.jpg"]) == ("nought", "seven")


def test_the_way_that_the_help_teaches_leads_from_a_folder_to_verified_shards(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command of `ofa-ds shards --help`, word for word and in order."""
    (pictures / "bad.jpg").write_bytes(b"no picture")
    for k in range(10, 40):
        (pictures / f"{k}.jpg").write_bytes(picture(k))
        (pictures / f"{k}.txt").write_text(f"a dog {k} of many words")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["shards", "--help"])
    taught = re.findall(r"^ +(?:\d\. )?(ofa-ds .+)$", capsys.readouterr().out, flags=re.MULTILINE)
    assert [command.split()[1:3] for command in taught] == [
        ["shards", "import"], ["shards", "verify"], ["shards", "stats"], ["shards", "split"], ["vocab", "train"],
        ["shards", "show"],
    ]  # fmt: skip
    for command in taught:
        assert main(shlex.split(command)[1:]) == 0, command
    out = capsys.readouterr().out
    assert "data/mine: every checksum, row and picture is right" in out and os.path.getsize("stats.png")
    assert "bad.jpg: caption: there is none" in Path("data/mine/quarantine/pictures.log").read_text()
    parts = [Shards(f"data/split/{part}").families["vision_language"] for part in ("train", "heldout")]
    assert sum(parts) == 39 and min(parts) > 0
    with Image.open("seen.png") as seen:
        assert seen.size[0] > 100
