"""Reading shards that are cut, damaged or edited: one line that names file and key, never a crash."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shards import negatives, plain, sources

from ofa_ds.bench import rows as bench
from ofa_ds.data import shard_file
from ofa_ds.data.building.build import build_shards
from ofa_ds.data.manifest import MANIFEST, read_manifest
from ofa_ds.data.negative_files import Lines, positions_file
from ofa_ds.data.shards import Shards
from ofa_ds.data.shards_verify import verify_shards
from ofa_ds.terms import PRETRAINING_FAMILIES


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 4 rows a file."""
    folder = tmp_path_factory.mktemp("reading")
    given = sources(folder / "tsv")
    build_shards(folder / "out", **given, negatives=negatives(folder / "neg"), rows_per_shard=4, workers=1)
    return folder / "out"


@pytest.fixture
def copied(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "shards"))


CUT_WHILE_OPEN = """
import os, sys
from ofa_ds.data.shards import Shards
shards, family = Shards(sys.argv[1]), sys.argv[2]
shards.row(family, 0), shards.row(family, 3)
path = os.path.join(sys.argv[1], family + "-00000.arrow")
os.truncate(path, int(os.path.getsize(path) * float(sys.argv[3])))
try:
    shards.row(family, 3)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("family, left", [("vision_language", 0.3), ("text", 0.0), ("image", 0.5), ("detection", 0.0)])
def test_a_file_that_is_cut_under_its_reader_is_an_error_that_names_it(copied: Path, family: str, left: float) -> None:
    """In a process of its own: a mapped file ends it by SIGBUS here."""
    command = [sys.executable, "-c", CUT_WHILE_OPEN, str(copied), family, str(left)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    assert re.search(rf"{family}-00000.arrow: want \d+ bytes as in manifest.json, got \d+; copy or build", done.stdout)


@pytest.mark.parametrize("name", ["all_captions.txt", "all_captions.ends.npy"])
def test_negatives_that_are_cut_are_an_error_that_names_the_file(copied: Path, name: str) -> None:
    lines = Lines(copied / "negative_sample" / "all_captions.txt")
    assert lines[2] == "three"
    os.truncate(copied / "negative_sample" / name, 1)
    with pytest.raises(RuntimeError, match=rf"{name}: want .*got 1"):
        lines[2]
    with pytest.raises(RuntimeError, match=name):
        Lines(copied / "negative_sample" / "all_captions.txt")


def test_positions_that_are_no_array_are_named(copied: Path) -> None:
    positions_file(copied / "negative_sample" / "object.txt").write_bytes(b"x" * 300)
    with pytest.raises(RuntimeError, match=r"object.ends.npy: want one row of 64-bit integers"):
        Shards(copied).negatives  # noqa: B018


@pytest.mark.parametrize("content", ["[]", "{", '{"other": "red"}'])
def test_answers_of_another_shape_are_named(copied: Path, content: str) -> None:
    (copied / "negative_sample" / "type2ans.json").write_text(content)
    with pytest.raises(ValueError, match=r"type2ans.json:?.* want "):
        Shards(copied).negatives  # noqa: B018


@given(data=st.data(), family=st.sampled_from(PRETRAINING_FAMILIES))
@settings(max_examples=60, deadline=None)
def test_a_damaged_file_gives_a_row_or_an_error_that_names_it(good: Path, data: st.DataObject, family: str) -> None:
    """Anything but another kind of exception, or the end of the process. Its size is right; checksums are not asked."""
    name = f"{family}-00000.arrow"
    folder = good.parent / "damaged"
    folder.mkdir(exist_ok=True)
    for kept in (MANIFEST, f"{family}.index"):
        shutil.copy(good / kept, folder)
    content = bytearray((good / name).read_bytes())
    places = st.integers(0, min(len(content), 6000) - 1)  # schema, metadata and offsets are there
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        content[place] = data.draw(st.sampled_from([0, 1, 127, 128, 255]))
    (folder / name).write_bytes(content)
    shards = Shards(folder)
    for i in range(4):
        try:
            shards.row(family, i)
        except RuntimeError as error:
            assert name in str(error) and "\n" not in str(error)


def test_more_files_than_may_be_open_are_read(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_file, "MAX_OPEN", 2)
    before = len(os.listdir("/proc/self/fd"))
    shards = Shards(good)
    rows = [plain(shards.row("text", i % 9)) for i in range(90)]
    assert rows == 10 * [plain(Shards(good).row("text", i)) for i in range(9)]
    assert len(os.listdir("/proc/self/fd")) <= before + 2 + 1, "and the index"
    del shards
    assert len(os.listdir("/proc/self/fd")) == before


def test_rows_say_which_file_they_are_in(good: Path) -> None:
    assert Shards(good).where("text", 5) == f"{read_manifest(good).families['text'].shards[1].file} row 1"


# Manifest ---------------------------------------------------------------------------------------------------------


def text(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["families"]["text"]


def shard(manifest: dict[str, Any]) -> dict[str, Any]:
    return text(manifest)["shards"][1]


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "families missing": (lambda m: m.pop("families"), "families: is missing"),
    "no family": (lambda m: m.update(families={}), "families: "),
    "families a list": (lambda m: m.update(families=[1]), "families: "),
    "unknown family": (lambda m: m["families"].update(sound=text(m)), "families.sound: want vision_language"),
    "rows a string": (lambda m: text(m).update(rows="9"), "families.text.rows: .*got '9'"),
    "rows a fraction": (lambda m: text(m).update(rows=9.5), "families.text.rows: .*got 9.5"),
    "rows true": (lambda m: text(m).update(rows=True), "families.text.rows: "),
    "rows negative": (lambda m: shard(m).update(rows=-4), "families.text.shards.1.rows: .*got -4"),
    "shards missing": (lambda m: text(m).pop("shards"), "families.text.shards: is missing"),
    "shards empty": (lambda m: text(m).update(shards=[]), "families.text.shards: "),
    "a shard null": (lambda m: text(m).update(shards=[None]), "families.text.shards.0: "),
    "a way out": (lambda m: shard(m).update(file="../../etc/passwd"), "families.text.shards.1.file: "),
    "an absolute way": (lambda m: shard(m).update(file="/etc/passwd"), "families.text.shards.1.file: "),
    "the parent": (lambda m: shard(m).update(file=".."), "families.text.shards.1.file: "),
    "a file twice": (lambda m: shard(m).update(file="text-00000.arrow"), "families.text.shards: one file is there tw"),
    "types of text": (lambda m: text(m).update(types={"qa": 1}), "families.text.types: their sum is 1, want 0"),
    "no types": (lambda m: m["families"]["vision_language"].update(types={}), "families.vision_language.types: .*is 0"),
    "rows do not add up": (lambda m: text(m).update(rows=10), "families.text.rows: is 10, its shards have 9"),
    "a shard without batches": (lambda m: shard(m).update(batches=0), "families.text.shards.1.batches: .*got 0"),
    "an empty file": (lambda m: shard(m).update(num_bytes=0), "families.text.shards.1.num_bytes: .*got 0"),
    "rows without end": (lambda m: shard(m).update(rows=10**30), "families.text.shards.1.rows: "),
    "a checksum of other letters": (lambda m: shard(m).update(index_xxh3="x"), "families.text.shards.1.index_xxh3: "),
    "negatives a list": (lambda m: m.update(negatives=[]), "negatives: "),
    "a negative's way out": (lambda m: m.update(negatives={"../x": "0" * 16}), "negatives.*: "),
    "fingerprint a number": (lambda m: m.update(fingerprint=7), "fingerprint: .*got 7"),
    "another format": (lambda m: m.update(format="shards"), "want .*'ofa-ds shards'"),
    "a newer version": (lambda m: m.update(version=3), "want .*'version': 2"),
    "a version that is no number": (lambda m: m.update(version=True), "want .*'version': 2"),
}


@pytest.mark.parametrize("edit, message", EDITS.values(), ids=EDITS)
def test_a_wrong_manifest_is_one_line_with_file_and_key(
    copied: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    content = json.loads((copied / MANIFEST).read_text())
    edit(content)
    (copied / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{MANIFEST}: {message}") as raised:
        Shards(copied)
    assert "\n" not in str(raised.value) and len(str(raised.value).removeprefix(str(copied))) < 250
    assert verify_shards(copied, workers=1) == [str(raised.value)]


def test_a_manifest_without_end_is_refused_before_it_is_read(copied: Path) -> None:
    os.truncate(copied / MANIFEST, 1 << 40)
    with pytest.raises(ValueError, match=rf"{MANIFEST}: not JSON \({1 << 40} bytes are more than the"):
        Shards(copied)


def test_verify_compares_the_types_that_the_manifest_counts_with_the_rows(copied: Path) -> None:
    content = json.loads((copied / MANIFEST).read_text())
    part = content["families"]["vision_language"]
    part["types"] = {"caption": part["rows"]}
    (copied / MANIFEST).write_text(json.dumps(content))
    [problem] = verify_shards(copied, workers=1)
    assert re.search(rf"{MANIFEST}: families.vision_language.types is .*, its files hold ", problem)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=4,
)  # fmt: skip


@given(data=st.data(), value=_json)
@settings(max_examples=60, deadline=None)
def test_no_value_at_any_key_of_the_manifest_is_more_than_a_value_error(
    good: Path, data: st.DataObject, value: object
) -> None:
    content: Any = json.loads((good / MANIFEST).read_text())
    at = content
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.booleans()):
            break
        at = at[key]
    at[key] = value
    folder = good.parent / "edited"
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(content))
    try:
        read_manifest(folder)
    except ValueError as error:
        assert str(folder / MANIFEST) in str(error) and "\n" not in str(error)


def test_a_manifest_of_before_the_warnings_is_read(copied: Path) -> None:
    content = json.loads((copied / MANIFEST).read_text())
    for part in content["families"].values():
        for counted in (part, *part["sources"]):
            del counted["warnings"]
    (copied / MANIFEST).write_text(json.dumps(content))
    assert Shards(copied).fingerprint == content["fingerprint"] and verify_shards(copied, workers=1) == []


def test_the_bench_of_reading_names_every_way(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ROWS", 20)
    monkeypatch.setattr(bench, "SIDE", 32)
    result = bench.bench_rows(good, repeats=1)
    assert set(result) == set(PRETRAINING_FAMILIES)
    assert all(value > 0 for times in result.values() for value in times.values())
    assert "ours" in bench.table(result) and len(bench.table(result).splitlines()) == 6
