"""Merged, divided and shuffled shards: the same rows, right by `shards verify`, the same bytes for any workers."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_shards import files, write
from test_task_rows import vqa
from test_tsv import CODES, image, picture
from tiny_sources import write_sources

from ofa_ds.cli.main import main
from ofa_ds.data.building.build import build_shards
from ofa_ds.data.shard_writer import row_digest
from ofa_ds.data.shards import Shards
from ofa_ds.data.shards_verify import verify_shards
from ofa_ds.data.tools import rewrite
from ofa_ds.data.tools.merge import merge_shards
from ofa_ds.data.tools.shuffle import shuffle_shards
from ofa_ds.data.tools.split import counts, hash_of, parse_shares, split_shards
from ofa_ds.data.tools.stats import shards_stats
from ofa_ds.data.tools.stats_report import as_json, table
from ofa_ds.tasks.task_shards import build_task_shards
from ofa_ds.tasks.texts import train_from_shards


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tools")
    build_shards(folder / "out", **write_sources(folder), workers=1, shard_bytes=4000)
    return folder / "out"


def digests(path: Path) -> dict[str, list[int]]:
    """Of every row, in order."""
    shards = Shards(path, verify=True)
    return {
        family: [row_digest(shards.row(family, i)) for i in range(count)] for family, count in shards.families.items()
    }


def halves(folder: Path) -> tuple[Path, Path, Path]:
    """Shards of the first and of the other lines of the tiny sources, and of all."""
    given = write_sources(folder)
    parts: list[dict[str, list[Path]]] = [{}, {}]
    for family, (path,) in given.items():
        lines = path.read_text().splitlines(keepends=True)
        for k, some in enumerate((lines[:3], lines[3:])):
            parts[k][family] = [folder / f"{family}-{k}.tsv"]
            parts[k][family][0].write_text("".join(some))
    for name, sources in (("a", parts[0]), ("b", parts[1]), ("all", given)):
        build_shards(folder / name, **sources, workers=1, shard_bytes=3000)
    return folder / "a", folder / "b", folder / "all"


def test_merged_shards_are_those_that_a_build_of_all_their_lines_gives(tmp_path: Path) -> None:
    a, b, together = halves(tmp_path)
    manifest = merge_shards([a, b], tmp_path / "merged", workers=1)
    assert verify_shards(tmp_path / "merged", workers=1) == []
    assert digests(tmp_path / "merged") == digests(together)
    assert manifest.fingerprint == Shards(together).fingerprint
    assert files(tmp_path / "merged" / "negative_sample") == files(together / "negative_sample")
    assert merge_shards([b, a], tmp_path / "other", workers=1).fingerprint != manifest.fingerprint


def test_what_does_not_belong_together_is_not_merged(built: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is given twice"):
        merge_shards([built, built], tmp_path / "out", workers=1)
    with pytest.raises(ValueError, match="which is read"):
        merge_shards([built], built / "out", workers=1)
    line = image(CODES + b" " + CODES + b" 1 2 3 4", base64.b64encode(picture(96, 96)))
    build_shards(tmp_path / "large", image=[write(tmp_path / "large.tsv", [line])], workers=1)
    with pytest.raises(ValueError, match="large: its square pictures have another size than those of"):
        merge_shards([built, tmp_path / "large"], tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_shuffled_shards_have_every_row_once_and_the_same_bytes_for_any_workers(built: Path, tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("three", 3)):
        shuffle_shards(built, tmp_path / name, seed=5, shard_bytes=3000, workers=workers)
    assert files(tmp_path / "one") == files(tmp_path / "three")
    assert verify_shards(tmp_path / "one", workers=1) == []
    before, after = digests(built), digests(tmp_path / "one")
    for family in before:
        assert Counter(before[family]) == Counter(after[family]) and before[family] != after[family], family
    assert Shards(tmp_path / "one").types == Shards(built).types
    other = shuffle_shards(built, tmp_path / "other", seed=6, workers=1)
    assert other.fingerprint != Shards(tmp_path / "one").fingerprint
    again = shuffle_shards(built, tmp_path / "large", seed=5, shard_bytes=1 << 30, workers=1)
    assert again.fingerprint == Shards(tmp_path / "one").fingerprint  # of the rows, not of how they are cut


@pytest.mark.parametrize("row_bytes", [200, 90_000])
def test_pages_are_let_go_of_in_time_where_two_megabytes_are_mapped_for_a_row(row_bytes: int, monkeypatch) -> None:
    mapped = [0, 0]

    class Source:
        def forget_pages(self) -> None:
            mapped.append(0)

    monkeypatch.setattr(rewrite._Pages, "_mapped", staticmethod(lambda: mapped[-1]))
    pages = rewrite._Pages(Source())
    for _ in range(1000):
        mapped.append(mapped[-1] + (2 << 20))
        pages.touched(row_bytes)
    assert max(mapped) <= rewrite.MAPPED_BYTES


@pytest.mark.parametrize("told", [True, False])
def test_pages_that_are_read_at_random_are_let_go_and_no_row_differs(
    told: bool, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shuffle_shards(built, tmp_path / "one", seed=5, workers=1)
    forgot: list[Shards] = []
    real = Shards.forget_pages
    monkeypatch.setattr(Shards, "forget_pages", lambda self: (forgot.append(self), real(self)))
    monkeypatch.setattr(rewrite, "MAPPED_BYTES", 0)
    if not told:  # as on systems without /proc
        monkeypatch.setattr(rewrite, "Path", lambda name: Path("/none" if name == "/proc/self/statm" else name))
    shuffle_shards(built, tmp_path / "two", seed=5, workers=1)
    assert files(tmp_path / "one") == files(tmp_path / "two") and len(forgot) > 10
    for family, count in (shards := forgot[0]).families.items():
        shards.row(family, count - 1)
        mapped = [file for file in shards._files[family].open if file and file._file]
        shards.forget_pages()
        assert mapped and not any(file._file for file in mapped)


def test_shards_are_read_and_written_anew_where_there_is_no_proc(built: Path, tmp_path: Path) -> None:
    shuffle_shards(built, tmp_path / "one", seed=5, workers=1)
    program = "import sys; from ofa_ds.cli.main import main; sys.exit(main(sys.argv[1:]))"
    hidden = ["unshare", "--mount", "--map-root-user", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    for words in (["shuffle", built, "--out", tmp_path / "two", "--seed", "5"], ["verify", tmp_path / "two"]):
        command = [*hidden, sys.executable, "-c", program, "shards", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_parts_have_their_share_of_each_family_share_no_row_and_keep_the_order(built: Path, tmp_path: Path) -> None:
    shares = parse_shares([("train", "rest"), ("heldout", "0.2"), ("probe", "1")])
    for name, workers in (("one", 1), ("two", 2)):
        split_shards(built, tmp_path / name, shares, seed=3, shard_bytes=2000, workers=workers)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    found = {share.name: digests(tmp_path / "one" / share.name) for share in shares}
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["heldout", "probe", "train"]
    for family, rows in digests(built).items():
        mine = {name: each.get(family, []) for name, each in found.items()}
        assert (len(mine["heldout"]), len(mine["probe"])) == (round(0.2 * len(rows)), 1)
        assert Counter(rows) == sum((Counter(each) for each in mine.values()), Counter())
        for each in mine.values():
            assert each == [digest for digest in rows if digest in set(each)]
    for name in found:
        assert verify_shards(tmp_path / "one" / name, workers=1) == []


def test_by_image_no_picture_is_in_two_parts(built: Path, tmp_path: Path) -> None:
    """The three families of the tiny sources have pictures in common, and so have rows of one family here."""
    merge = tmp_path / "twice"
    shuffle_shards(built, tmp_path / "copy", workers=1)
    merge_shards([built, tmp_path / "copy"], merge, workers=1)
    shares = parse_shares([("a", "0.5"), ("b", "rest")], by_image=True)
    split_shards(merge, tmp_path / "split", shares, by_image=True, workers=2)
    pictures: dict[str, set[int]] = {}
    total = 0
    for name in "ab":
        shards = Shards(tmp_path / "split" / name)
        assert verify_shards(tmp_path / "split" / name, workers=1) == []
        rows = [shards.row(family, i) for family, count in shards.families.items() for i in range(count)]
        pictures[name] = {hash_of(row) for row in rows}
        total += len(rows)
    assert not pictures["a"] & pictures["b"] and min(map(len, pictures.values())) > 5
    assert total == 2 * sum(Shards(built).families.values())


@pytest.mark.parametrize(
    "given, message",
    [
        (["a"], "want NAME=SHARE"),
        (["../a=0.5"], "want a name of letters"),
        (["a=0.6", "b=0.6"], "add up to 1.2"),
        (["a=rest", "b=rest"], "one part alone can be the rest"),
        (["a=0.5", "a=0.2"], "different names"),
        (["a=-1"], "want a fraction"),
        (["a=nan"], "want a fraction"),
        (["a=1000000"], "the parts want 1000000"),
        (["a=0.00001", "b=rest"], "part a would have no rows"),
    ],
)
def test_wrong_shares_are_one_line_and_leave_nothing(
    given: list[str], message: str, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for each in given for word in ("--part", each)]
    try:
        code = main(["shards", "split", str(built), *words, "--out", str(tmp_path / "out"), "--workers", "1"])
    except SystemExit as error:  # by argparse
        code = int(str(error.code))
    told = capsys.readouterr().err
    assert code and message in told
    assert list(tmp_path.iterdir()) == []


def test_counts_of_fractions_add_up_to_all_rows() -> None:
    shares = parse_shares([(f"p{k}", "0.1") for k in range(10)])
    for total in range(1, 200):
        assert sum(counts(shares, total, "x")) == total


@pytest.mark.parametrize("tool", ["merge", "split", "shuffle"])
def test_damaged_shards_are_refused_and_nothing_is_left(
    tool: str, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(built, tmp_path / "bad")
    path = next((tmp_path / "bad").glob("image-*.arrow"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    more = {"merge": [str(built)], "split": ["--part", "a=0.5"], "shuffle": []}[tool]
    out = ["--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(["shards", tool, str(tmp_path / "bad"), *more, *out]) == 1
    assert f"{path.name}: record batch 0 " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize("tool", ["merge", "split", "shuffle"])
def test_nothing_is_overwritten(tool: str, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    shutil.copytree(built, tmp_path / "b")
    more = {"merge": [str(tmp_path / "b")], "split": ["--part", "a=0.5"], "shuffle": []}[tool]
    assert main(["shards", tool, str(built), *more, "--out", str(tmp_path / "out"), "--workers", "1"]) == 1
    assert "is there already" in capsys.readouterr().err and (tmp_path / "out" / "mine").read_text() == "mine"


def test_rows_of_a_downstream_task_are_counted_again_and_keep_their_answers(tmp_path: Path) -> None:
    lines = [vqa(), vqa(answers=b"1.0|!+green"), vqa(answers=b"1.0|!+blue"), vqa()]
    path = write(tmp_path / "vqa.tsv", lines)
    (tmp_path / "answers.txt").write_text("red\ngreen\n")
    how: dict[str, Any] = {"answers": tmp_path / "answers.txt", "held_out": True, "workers": 1}
    build_task_shards(tmp_path / "out", "vqa", [path], **how)
    made = split_shards(tmp_path / "out", tmp_path / "split", parse_shares([("a", "3"), ("b", "rest")]), workers=1)
    parts = [manifest.families["downstream"] for manifest in made.values()]
    assert [part.rows for part in parts] == [3, 1] and sum(part.unlisted for part in parts) == 1
    assert [sum(part.types.values()) for part in parts] == [3, 1]
    assert Shards(tmp_path / "split" / "b").answers == ("red", "green")
    back = merge_shards([tmp_path / "split" / name for name in "ba"], tmp_path / "back", workers=1)
    assert (back.families["downstream"].rows, back.families["downstream"].unlisted) == (4, 1)
    assert verify_shards(tmp_path / "back", workers=1) == []
    (tmp_path / "answers.txt").write_text("green\nred\n")
    build_task_shards(tmp_path / "other", "vqa", [path], **how)
    with pytest.raises(ValueError, match="other: its list of answers is not that of"):
        merge_shards([tmp_path / "out", tmp_path / "other"], tmp_path / "never", workers=1)


def test_statistics_count_what_is_in_the_rows(built: Path, tmp_path: Path) -> None:
    shuffle_shards(built, tmp_path / "copy", workers=1)
    merge_shards([built, tmp_path / "copy"], tmp_path / "twice", workers=1)
    vocab = train_from_shards(built, size=300, out=tmp_path / "vocab")
    stats = shards_stats(tmp_path / "twice", vocab=tmp_path / "vocab", workers=1)
    found = as_json(stats)
    assert found == as_json(shards_stats(tmp_path / "twice", vocab=tmp_path / "vocab", workers=2))
    assert {kind: each["rows"] for kind, each in found["rows"].items()} == {
        "vision_language caption": 14, "vision_language qa": 14, "vision_language visual_grounding": 14, "text": 14,
        "image": 10, "detection": 10,
    }  # fmt: skip
    rows = [Shards(tmp_path / "twice").row("detection", i) for i in range(10)]
    assert found["rows"]["detection"]["picture_bytes"] == sum(len(row["image"]) for row in rows)
    pictures = {row["image"] for family in ("vision_language", "image", "detection") for row in read(built, family)}
    assert found["pictures"] == {"rows": 62, "different": len(pictures), "most": most_frequent(tmp_path / "twice")}
    assert found["values"]["vision_language caption"]["caption: words"]["counts"] == {"6": 14}
    assert found["values"]["detection"]["boxes a row"]["counts"] == {"2": 10}
    assert found["values"]["detection"]["box: % of picture"]["counts"] == {"11": 10, "48": 10}
    assert found["values"]["image"]["picture: width"]["counts"] == {"32": 10}
    assert found["values"]["vision_language qa"]["answers a row"]["counts"] == {"1": 14}
    assert found["vocabulary"]["unknown"] == 0 and found["vocabulary"]["size"] == vocab.mask
    assert 100 < found["vocabulary"]["tokens"] < found["vocabulary"]["characters"]
    assert f"{len(pictures)} different in 62 rows" in table(stats)


def read(path: Path, family: str) -> list[dict[str, Any]]:
    shards = Shards(path)
    return [shards.row(family, i) for i in range(shards.families[family])]


def most_frequent(path: Path) -> int:
    families = ("vision_language", "image", "detection")
    return max(Counter(row["image"] for family in families for row in read(path, family)).values())


def test_statistics_by_command_are_a_table_or_json_and_a_picture(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["shards", "stats", str(built), "--workers", "1"]
    assert main([*arguments, "--png", str(tmp_path / "stats.png")]) == 0
    told = capsys.readouterr().out
    assert "vision_language qa" in told and "answer: words" in told and Shards(built).fingerprint in told
    with Image.open(tmp_path / "stats.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert picture.format == "PNG" and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 5
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]["text"]["rows"] == 7


@pytest.mark.parametrize("command", [["verify"], ["stats"], ["shuffle", "--out", "here"]])
def test_what_works_on_this_machine_alone_says_so(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["shards", command[0], "s3://bucket/set", *command[1:]])
    assert "want a directory of this machine, got s3://bucket/set" in capsys.readouterr().err
