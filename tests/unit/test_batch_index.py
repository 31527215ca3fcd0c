"""The index of record batches: older directories have none, and one that lies or is damaged never gives another row."""

from __future__ import annotations

import json
import re
import shutil
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shards import negatives, plain, sources

from ofa_ds.bench import scale
from ofa_ds.data import shard_file, shard_writer
from ofa_ds.data.announcing import CALLS_AFTER_A_FAULT, Faults
from ofa_ds.data.batch_index import entry_type, index_file
from ofa_ds.data.building.build import build_shards
from ofa_ds.data.columns import from_columns
from ofa_ds.data.manifest import MANIFEST, read_manifest
from ofa_ds.data.order import BLOCK, Permutation
from ofa_ds.data.shard_file import ShardFiles
from ofa_ds.data.shards import Shards
from ofa_ds.data.shards_verify import verify_shards
from ofa_ds.terms import PRETRAINING_FAMILIES

OLD = Path(__file__).parents[1] / "fixtures" / "checkpoint_0f884a0" / "shards"
"""Written by version 1."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Shards of 9 rows in record batches of 2."""
    folder = tmp_path_factory.mktemp("index")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "MAX_BATCH_ROWS", 2)
        build_shards(folder / "out", **sources(folder / "tsv"), negatives=negatives(folder / "neg"), workers=1)
    yield folder / "out"


@pytest.fixture
def copied(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "shards"))


def by_arrow(folder: Path, family: str) -> list[dict[str, Any]]:
    """Rows by the library alone."""
    rows = []
    for path in sorted(folder.glob(f"{family}-*.arrow")):
        with pa.ipc.open_file(str(path)) as reader:
            rows += [from_columns(family, row) for row in reader.read_all().to_pylist()]
    for row in rows:
        for name, dtype in (("codes", np.int16), ("boxes", np.float32)):
            if name in row:
                row[name] = np.array(row[name], dtype)
    return [{key: tuple(value) if key == "box" and value else value for key, value in row.items()} for row in rows]


@pytest.mark.parametrize("family", PRETRAINING_FAMILIES)
@pytest.mark.parametrize("old", [False, True], ids=["version 2", "version 1"])
def test_rows_are_those_that_arrow_reads(good: Path, family: str, old: bool) -> None:
    folder = OLD if old else good
    shards = Shards(folder, verify=True)
    found = [plain(shards.row(family, i)) for i in range(shards.families[family])]
    assert found == [plain(row) for row in by_arrow(folder, family)]


def test_a_directory_of_version_1_is_whole_and_keeps_its_fingerprint() -> None:
    content = json.loads((OLD / MANIFEST).read_text())
    assert content["version"] == 1 and not list(OLD.glob("*.index"))
    shards = Shards(OLD)
    assert shards.fingerprint == content["fingerprint"] and verify_shards(OLD, workers=1) == []
    counts = {family: part["rows"] for family, part in content["families"].items()}
    assert shards.families == counts and list(shards.rows_of_types("vision_language", ["qa"]))


OLD_EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "batches do not add up": (lambda shard: shard.update(batch_rows=[3]), "batch_rows: their sum is 3, rows is 6"),
    "an empty batch": (lambda shard: shard.update(batch_rows=[6, 0]), "batch_rows.1: .*got 0"),
    "too few ends": (lambda shard: shard.update(byte_ends=[9]), "byte_ends: want one for each"),
    "ends go back": (lambda shard: shard["byte_ends"].reverse(), "byte_ends: want each larger"),
    "too few checksums": (lambda shard: shard["xxh3"].pop(), "xxh3: want one for each"),
    "a checksum of other letters": (lambda shard: shard["xxh3"].insert(0, "x"), "xxh3.0: "),
}


@pytest.mark.parametrize("edit, message", OLD_EDITS.values(), ids=OLD_EDITS)
def test_a_wrong_manifest_of_version_1_is_one_line_with_file_and_key(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    content = json.loads((OLD / MANIFEST).read_text())
    edit(content["families"]["text"]["shards"][0])
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{MANIFEST}: families.text.shards.0.{message}") as raised:
        Shards(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_batch_of_version_1_with_another_number_of_rows_is_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OLD, tmp_path / "old"))
    content = json.loads((folder / MANIFEST).read_text())
    part = content["families"]["text"]
    part["rows"] = part["shards"][0]["rows"] = 7
    part["shards"][0]["batch_rows"] = [7]
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(RuntimeError, match=r"text-00000.arrow: record batch 0 has 6 rows, manifest.json says 7"):
        Shards(folder).row("text", 6)


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"\0", lambda content: b""])
def test_an_index_of_another_size_is_named(copied: Path, change: Callable[[bytes], bytes]) -> None:
    path = index_file(copied, "text")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(RuntimeError, match=r"text.index: want \d+ bytes as in manifest.json, got \d+") as raised:
        Shards(copied).row("text", 0)
    assert "\n" not in str(raised.value) and Shards(copied).row("image", 0)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_an_index_with_any_byte_changed_is_refused_before_a_row_is_read(good: Path, data: st.DataObject) -> None:
    folder = good.parent / "flipped"
    shutil.copytree(good, folder, dirs_exist_ok=True)
    path = index_file(folder, "detection")
    content = bytearray((good / path.name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"detection.index: .*detection-00000.arrow has another checksum"):
        Shards(folder).row("detection", data.draw(st.integers(0, 8)))


def lying(good: Path, family: str, edit: Callable[[np.ndarray], object]) -> Path:
    """A directory whose index was edited, and whose manifest goes with it."""
    folder = good.parent / "lying"
    shutil.copytree(good, folder, dirs_exist_ok=True)
    entries = np.fromfile(index_file(good, family), entry_type(family))
    edit(entries)
    entries.tofile(index_file(folder, family))
    content = json.loads((good / MANIFEST).read_text())
    content["families"][family]["shards"][0]["index_xxh3"] = xxhash.xxh3_64_hexdigest(entries.tobytes())
    (folder / MANIFEST).write_text(json.dumps(content))
    return folder


LIES: dict[str, tuple[Callable[[np.ndarray], object], str]] = {
    "rows go back": (lambda entries: entries["rows_end"].__setitem__(1, 1), "rows_end: want each larger"),
    "no rows at first": (lambda entries: entries["rows_end"].__setitem__(0, 0), "rows_end: want each larger"),
    "too many rows": (lambda entries: entries["rows_end"].__setitem__(-1, 2**63), "rows_end: the last is .* says 9 r"),
    "bytes go back": (lambda entries: entries["byte_end"].__setitem__(1, 8), "byte_end: want each larger"),
    "past the file": (lambda entries: entries["byte_end"].__setitem__(-1, 2**62), r"byte_end: the last is \d+ of \d+"),
    "odd bytes": (lambda entries: entries["byte_end"].__setitem__(0, 2001), "places: want multiples of 8"),
    "an odd place": (lambda entries: entries["places"].__setitem__((0, 0), 9), "places: want multiples of 8"),
    "a place elsewhere": (lambda entries: entries["places"].__setitem__((0, 0), 2**32 - 8), "places: one is outside"),
}


@pytest.mark.parametrize("edit, message", LIES.values(), ids=LIES)
def test_an_index_that_cannot_be_is_one_line(good: Path, edit: Callable[[np.ndarray], object], message: str) -> None:
    folder = lying(good, "vision_language", edit)
    with pytest.raises(RuntimeError, match=rf"vision_language.index: vision_language-00000.arrow: {message}") as raised:
        Shards(folder).row("vision_language", 0)
    assert "\n" not in str(raised.value)
    assert len(verify_shards(folder, workers=1)) == 1


@given(data=st.data(), family=st.sampled_from(PRETRAINING_FAMILIES))
@settings(max_examples=80, deadline=None)
def test_places_that_lie_within_bounds_give_a_row_or_an_error_that_names_the_file(
    good: Path, data: st.DataObject, family: str
) -> None:
    """And `verify` says so, though each file has the checksum that the manifest says."""

    def edit(entries: np.ndarray) -> None:
        for _ in range(data.draw(st.integers(1, 4))):
            batch = data.draw(st.integers(0, len(entries) - 1))
            size = int(entries["byte_end"][batch]) - (int(entries["byte_end"][batch - 1]) if batch else 0)
            place = data.draw(st.integers(0, entries["places"].shape[1] - 1))
            entries["places"][batch, place] = data.draw(st.integers(0, size // 8)) * 8

    folder = lying(good, family, edit)
    honest = index_file(folder, family).read_bytes() == index_file(good, family).read_bytes()
    problems = verify_shards(folder, workers=1)
    assert honest or any("its buffers are not where its index says" in problem for problem in problems)
    shards = Shards(folder)
    shards.announce((family, i) for i in range(9))
    for i in range(9):
        try:
            row = shards.row(family, i)
        except RuntimeError as error:
            assert f"{family}-00000.arrow" in str(error) and "\n" not in str(error)
        else:
            assert sum(len(value) for value in row.values() if isinstance(value, bytes | str)) < 100_000


def test_an_index_that_cuts_the_rows_otherwise_is_found_by_verify(good: Path) -> None:
    folder = lying(good, "text", lambda entries: entries["rows_end"].__setitem__(0, 1))
    [problem, *_] = verify_shards(folder, workers=1)
    assert "text-00000.arrow: record batch 0 (rows 0 ... 0): it has 2 rows, its index says 1" in problem


def test_a_text_that_points_past_its_batch_is_damage_not_the_next_batch(copied: Path) -> None:
    file = ShardFiles(copied, read_manifest(copied), "text")[0]
    end_of_first_id = int(file.entries["places"][1][0]) + file.bytes_of(1).start + 4
    content = bytearray(file.path.read_bytes())
    content[end_of_first_id : end_of_first_id + 4] = (len(file.bytes_of(1))).to_bytes(4, "little")
    file.path.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"text-00000.arrow: row 2: damaged: .*; copy or build it again"):
        Shards(copied).row("text", 2)
    assert Shards(copied).row("text", 4)["id"] == "4"


def test_announcing_changes_no_row_and_says_nothing_of_what_is_wrong(copied: Path) -> None:
    shards, before = Shards(copied), Shards(copied)
    rows = [(family, i) for family in PRETRAINING_FAMILIES for i in (8, 0, 3)]
    shards.announce([*rows, ("text", 99), ("sound", 0), ("text", -1)])
    assert [plain(shards.row(*row)) for row in rows] == [plain(before.row(*row)) for row in rows]
    (copied / "text-00000.arrow").unlink()
    Shards(copied).announce(rows)


def test_large_batches_are_announced_row_by_row(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr("ofa_ds.data.announcing.MAX_WHOLE_BYTES", 0)
    monkeypatch.setattr("ofa_ds.data.announcing._ask", lambda data, start, stop: asked.append((start, stop)))
    shards = Shards(good)
    shards.announce([("vision_language", 5)])
    content = (good / "vision_language-00000.arrow").read_bytes()
    [start, stop] = asked[-1]
    assert content[start:stop] == shards.row("vision_language", 5)["image"]
    batch = ShardFiles(good, read_manifest(good), "vision_language")[0].bytes_of(2)
    assert asked[0][0] == batch.start and asked[1][1] == batch.stop and asked[0][1] <= start < stop <= asked[1][0]


def test_what_is_in_memory_is_no_longer_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    faults, count = Faults(), [5]
    monkeypatch.setattr("resource.getrusage", lambda who: type("Usage", (), {"ru_majflt": count[0]}))
    assert [faults.are_due() for _ in range(CALLS_AFTER_A_FAULT + 2)] == [True] * CALLS_AFTER_A_FAULT + [False] * 2
    count[0] += 1
    assert faults.are_due()


def test_no_more_files_are_mapped_than_the_process_may_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (256, 256))
    assert 4 <= shard_file.MapPool()._most < 112


def test_ten_thousand_shards_open_at_once_and_cost_nothing_before_they_are_read(tmp_path: Path) -> None:
    folder = scale.make(tmp_path / "many", 10_000, rows=300)
    tracemalloc.start()
    began = time.perf_counter()
    shards = Shards(folder)
    seconds, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert shards.families == {"vision_language": 3_000_000}
    assert seconds < 20 and peak < 40 << 20, "a tenth of it and half of it where nothing else runs"
    files = shards._files["vision_language"]
    assert files.open == [None] * 10_000
    for i in (0, 299, 300, 1_234_567, 2_999_999):
        assert shards.row("vision_language", i)["id"] == str(i % 300)
    assert sum(file is not None for file in files.open) == 4
    with pytest.raises(IndexError, match="row 3000000 is outside .*, which has 3000000"):
        shards.row("vision_language", 3_000_000)


def test_processes_that_open_the_same_shards_share_their_index(tmp_path: Path) -> None:
    found = scale.opened(scale.make(tmp_path / "shared", 100, rows=300), workers=2)
    assert len(found) == 2 and all(each.private_MiB < 8 and each.row_us > 0 for each in found)


def test_the_bench_of_scale_says_what_a_billion_rows_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "PHOTOGRAPHS", 20)
    monkeypatch.setattr(scale, "FEWER", (5,))
    monkeypatch.setattr(scale, "PERMUTED", 1 << 18)
    result = scale.bench_scale(20, 2, 1, rows=300)
    assert len(result["large"]) == 2 and list(result["orders"]) == [
        "5 rows", "20 rows", "their pictures alone", "all but their pictures", "rows, decoded and resized",
    ]  # fmt: skip
    text = scale.table(result)
    assert re.search(r"permutation of 10\^9: \d+ M rows/s in [\d.]+ MiB", text) and len(text.splitlines()) == 12


def test_a_permutation_of_a_billion_keeps_no_array() -> None:
    order = Permutation(1_000_000_000, seed=1, epoch=0)
    tracemalloc.start()
    order.at(np.arange(BLOCK))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 1 << 20 < peak < 16 << 20


def test_a_checksum_of_the_index_in_the_manifest_is_needed(copied: Path) -> None:
    content = json.loads((copied / MANIFEST).read_text())
    del content["families"]["text"]["shards"][0]["index_xxh3"]
    (copied / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape("families.text.shards.0.index_xxh3: is missing")):
        Shards(copied)
