"""Shards: what goes in comes out, bad input leaves nothing behind, damage is found, bytes do not depend on workers."""

from __future__ import annotations

import base64
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tsv import IMAGE, SQUARE, caption, detection, grounding, image, qa

from ofa_ds.cli import main
from ofa_ds.data import shard_writer, tsv
from ofa_ds.data.building.build import build_shards
from ofa_ds.data.columns import SCHEMAS
from ofa_ds.data.manifest import read_manifest
from ofa_ds.data.shard_file import ShardFiles
from ofa_ds.data.shards import Shards
from ofa_ds.data.shards_verify import verify_shards
from ofa_ds.terms import PRETRAINING_FAMILIES

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "train"


def numbered(line: bytes, k: int) -> bytes:
    return b"%d\t%s" % (k, line.partition(b"\t")[2])


def write(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def sources(folder: Path, rows: int = 9) -> dict[str, list[Path]]:
    """A little of everything."""
    folder.mkdir(exist_ok=True)
    kinds = [caption(gt_objects=b"dog"), qa(), grounding()]
    vision = [numbered(kinds[k % 3], k) for k in range(rows)]
    label = b"1,2,30.5,40,3,a dog&&0,0,64,48,/m/1,cat, black"
    return {
        "vision_language": [write(folder / "vl.tsv", vision)],
        "text": [write(folder / "text.tsv", [b"%d\tSome Text %d" % (k, k) for k in range(rows)])],
        "image": [write(folder / "image.tsv", [numbered(image(), k) for k in range(rows)])],
        "detection": [write(folder / "detection.tsv", [numbered(detection(label), k) for k in range(rows)])],
    }


def negatives(folder: Path) -> Path:
    folder.mkdir()
    (folder / "all_captions.txt").write_text("  a man \n\na größer dog\nthree\n", encoding="utf-8")
    (folder / "object.txt").write_text("dog\ncat\n")
    (folder / "type2ans.json").write_text('{"how many": ["1", "2"], "other": ["red", "blue"]}')
    return folder


def plain(value: Any) -> Any:
    """A row without views and arrays, for comparing."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.tolist())
    return bytes(value) if isinstance(value, memoryview) else value


def parsed(family: str, path: Path) -> list[dict[str, Any]]:
    return [plain(tsv.parse(family, line)) for line in path.read_bytes().split(b"\n") if line]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Path]]]:
    """(shards of 4 rows a file, their sources)."""
    folder = tmp_path_factory.mktemp("small")
    given = sources(folder / "tsv")
    build_shards(folder / "out", **given, negatives=negatives(folder / "neg"), rows_per_shard=4, workers=1)
    return folder / "out", given


def test_every_row_comes_back_as_the_line_said(small: tuple) -> None:
    out, given = small
    shards = Shards(out)
    assert shards.families == dict.fromkeys(("vision_language", "text", "image", "detection"), 9)
    assert shards.types == {"caption": 3, "qa": 3, "visual_grounding": 3}
    for family, (path,) in given.items():
        assert [plain(shards.row(family, i)) for i in range(9)] == parsed(family, path)


def test_pictures_are_kept_byte_for_byte(small: tuple) -> None:
    assert bytes(Shards(small[0]).row("vision_language", 5)["image"]) == base64.b64decode(IMAGE)


def test_files_are_plain_arrow_without_nulls_or_compression(small: tuple) -> None:
    out, _ = small
    for family, schema in ((family, SCHEMAS[family]) for family in PRETRAINING_FAMILIES):
        with pa.ipc.open_file(str(out / f"{family}-00000.arrow")) as reader:
            assert reader.schema.equals(schema) and not any(field.nullable for field in reader.schema)
            table = reader.read_all()
        assert table.num_rows == 4 and all(column.null_count == 0 for column in table.columns)
    raw = (out / "image-00000.arrow").read_bytes()
    assert raw.count(base64.b64decode(SQUARE)) == 4


def test_negatives_are_stripped_and_reach_by_number(small: tuple) -> None:
    found = Shards(small[0]).negatives
    assert list(found.captions) == ["a man", "a größer dog", "three"]
    assert found.captions[-1] == "three" and len(found.captions) == 3
    assert pickle.loads(pickle.dumps(found)).captions[1] == "a größer dog"
    assert (found.objects, found.type2ans["other"]) == (["dog", "cat"], ["red", "blue"])
    with pytest.raises(IndexError):
        found.captions[3]


def test_rows_outside_and_absent_families_are_refused(small: tuple, tmp_path: Path) -> None:
    for i in (-1, 9):
        with pytest.raises(IndexError, match=rf"row {i} is outside .*has 9"):
            Shards(small[0]).row("text", i)
    build_shards(tmp_path / "one", text=small[1]["text"], workers=1)
    with pytest.raises(ValueError, match="no image rows, only text"):
        Shards(tmp_path / "one").row("image", 0)


@pytest.mark.parametrize("family", PRETRAINING_FAMILIES)
def test_any_family_alone_is_enough(family: str, small: tuple, tmp_path: Path) -> None:
    build_shards(tmp_path / "one", **{family: small[1][family]}, workers=1)
    shards = Shards(tmp_path / "one")
    assert shards.families == {family: 9} and verify_shards(tmp_path / "one", workers=1) == []
    assert len(shards.negatives.captions) == (family == "vision_language")


def test_without_negatives_they_come_from_the_rows(tmp_path: Path) -> None:
    lines = [caption(caption=b"a  dog", gt_objects=b"dog&&cat"), caption(caption=b"b"), caption(caption=b"b")]
    lines += [qa(refs=b"0.5|!+yes&&0.2|!+red"), qa(refs=b"1|!+12"), grounding()]
    build_shards(tmp_path / "out", vision_language=[write(tmp_path / "a.tsv", lines)], workers=1)
    found = Shards(tmp_path / "out").negatives
    assert (list(found.captions), found.objects) == (["a dog", "b"], ["dog", "cat"])
    assert found.type2ans == {"how many": ["12"], "yes/no": ["yes"], "other": ["red"]}


def test_several_files_follow_one_another(small: tuple, tmp_path: Path) -> None:
    more = write(tmp_path / "more.tsv", [b"m\tone more"])
    manifest = build_shards(tmp_path / "out", text=[*small[1]["text"], more], workers=1)
    shards = Shards(tmp_path / "out")
    assert shards.families == {"text": 10} and shards.row("text", 9)["text"] == "one more"
    assert [source.rows for source in manifest.families["text"].sources] == [9, 1]


def test_workers_do_not_change_a_byte(small: tuple, tmp_path: Path) -> None:
    given = negatives(tmp_path / "neg")
    build_shards(tmp_path / "out", **small[1], negatives=given, rows_per_shard=4, workers=3)
    assert files(tmp_path / "out") == files(small[0])


def test_the_fingerprint_is_of_the_rows_not_of_the_files(small: tuple, tmp_path: Path) -> None:
    given = negatives(tmp_path / "neg")
    whole = build_shards(tmp_path / "whole", **small[1], negatives=given, workers=1)
    halves = small[1]["text"][0].read_bytes().splitlines(keepends=True)
    parts = [tmp_path / "a.tsv", tmp_path / "b.tsv"]
    parts[0].write_bytes(b"".join(halves[:2]))
    parts[1].write_bytes(b"".join(halves[2:]))
    cut = build_shards(tmp_path / "cut", **small[1] | {"text": parts}, negatives=given, rows_per_shard=3, workers=1)
    assert whole.fingerprint == cut.fingerprint == Shards(small[0]).fingerprint
    swapped = build_shards(tmp_path / "swapped", **small[1] | {"text": parts[::-1]}, negatives=given, workers=1)
    (given / "object.txt").write_text("dog\ncow\n")
    others = build_shards(tmp_path / "others", **small[1], negatives=given, workers=1)
    assert len({whole.fingerprint, swapped.fingerprint, others.fingerprint}) == 3


def batch_rows(folder: Path, family: str, number: int) -> list[int]:
    file = ShardFiles(folder, read_manifest(folder), family)[number]
    return [len(file.rows_of(batch)) for batch in range(file.num_batches)]


def test_record_batches_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.tsv", [b"%d\t%s" % (k, b"x" * 1000) for k in range(600)])
    build_shards(tmp_path / "rows", text=[path], workers=1)
    assert batch_rows(tmp_path / "rows", "text", 0) == [256, 256, 88]
    monkeypatch.setattr(shard_writer, "MAX_BATCH_BYTES", 100_500)
    build_shards(tmp_path / "bytes", text=[path], workers=1)
    assert batch_rows(tmp_path / "bytes", "text", 0) == [100] * 6
    shards = Shards(tmp_path / "bytes")
    assert [shards.row("text", i)["id"] for i in (0, 99, 100, 101, 599)] == ["0", "99", "100", "101", "599"]


_texts = st.text(st.characters(exclude_characters="\n\r\t", exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: text.strip() and not text.startswith("\ufeff")
)


@given(texts=st.lists(_texts, min_size=1, max_size=30), per_shard=st.integers(1, 7), batch=st.integers(1, 5))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_text_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    texts: list[str],
    per_shard: int,
    batch: int,
) -> None:
    monkeypatch.setattr(shard_writer, "MAX_BATCH_ROWS", batch)
    folder = tmp_path_factory.mktemp("texts")
    path = write(folder / "a.tsv", [f"{k}\t{text}".encode() for k, text in enumerate(texts)])
    build_shards(folder / "out", text=[path], rows_per_shard=per_shard, workers=1)
    shards = Shards(folder / "out", verify=True)
    assert [shards.row("text", i)["text"] for i in range(len(texts))] == texts
    assert verify_shards(folder / "out", workers=1) == []


def test_it_travels_to_worker_processes_and_threads(small: tuple) -> None:
    shards = pickle.loads(pickle.dumps(Shards(small[0], verify=True)))
    expected = [plain(Shards(small[0]).row("vision_language", i)) for i in range(9)]
    found: list[list] = []
    read = [threading.Thread(target=lambda: found.append(_all(shards))) for _ in range(8)]
    for thread in read:
        thread.start()
    for thread in read:
        thread.join()
    assert found == [expected] * 8 and shards.verify


def _all(shards: Shards) -> list:
    return [plain(shards.row("vision_language", i)) for i in range(9)]


def test_opening_reads_the_manifest_alone(small: tuple, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes((small[0] / "manifest.json").read_bytes())
    shards = Shards(tmp_path)
    assert shards.families["text"] == 9
    with pytest.raises(FileNotFoundError, match=r"text.index"):
        shards.row("text", 0)
    (tmp_path / "text.index").write_bytes((small[0] / "text.index").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"text-00000.arrow"):
        shards.row("text", 0)


def damage(small: tuple, tmp_path: Path, name: str, change: Callable[[bytearray], None]) -> Path:
    for path, content in files(small[0]).items():
        (tmp_path / "out" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / path).write_bytes(content)
    content = bytearray((tmp_path / "out" / name).read_bytes())
    change(content)
    (tmp_path / "out" / name).write_bytes(content)
    return tmp_path / "out"


def flip(content: bytearray) -> None:
    content[content.index(b"\xff\xd8\xff") + 200] ^= 1


def test_one_flipped_bit_is_found(small: tuple, tmp_path: Path) -> None:
    out = damage(small, tmp_path, "detection-00000-001.arrow", flip)
    (problem,) = verify_shards(out, workers=1)
    assert "detection-00000-001.arrow: record batch 0 (rows 0 ... 3) has checksum" in problem
    with pytest.raises(RuntimeError, match=r"detection-00000-001.arrow: record batch 0 .*again"):
        Shards(out, verify=True).row("detection", 5)
    assert Shards(out, verify=True).row("detection", 0)["id"] == "0"


def test_every_problem_is_listed(small: tuple, tmp_path: Path) -> None:
    out = damage(small, tmp_path, "detection-00000-001.arrow", flip)
    (out / "image-00000.arrow").write_bytes((out / "image-00000.arrow").read_bytes()[:-1])
    (out / "text-00000-002.arrow").unlink()
    (out / "negative_sample" / "object.txt").write_text("changed\n")
    problems = verify_shards(out, workers=2)
    for name in ("text-00000-002", "image-00000", "detection-00000-001", "object.txt"):
        assert any(name in problem for problem in problems), name
    assert len(problems) == 4
    with pytest.raises(RuntimeError, match="want .* bytes"):
        Shards(out).row("image", 0)


def test_a_damaged_footer_is_found(small: tuple, tmp_path: Path) -> None:
    def change(content: bytearray) -> None:
        content[-20] ^= 255

    (problem,) = verify_shards(damage(small, tmp_path, "text-00000.arrow", change), workers=1)
    assert "the footer has checksum" in problem


def test_an_edited_manifest_is_found(small: tuple, tmp_path: Path) -> None:
    out = damage(small, tmp_path, "manifest.json", lambda content: None)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["families"]["text"]["digest"] += 8
    (out / "manifest.json").write_text(json.dumps(manifest))
    problems = " ".join(verify_shards(out, workers=1))
    assert "what it says of text" in problems and "fingerprint" in problems


@pytest.mark.parametrize(
    "content, message",
    [(None, "no shards there .*ofa-ds shards build"), ("{", "not JSON"), ('{"version": 0}', "want .*'version': 2")],
)
def test_what_is_no_shards_is_named(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Shards(tmp_path)
    assert len(verify_shards(tmp_path)) == 1


@pytest.mark.parametrize("command", ["predict", "evaluate", "frequencies", "verify"])
def test_where_no_shards_are_the_command_that_builds_those_of_the_task_is_named(command, tmp_path, capsys) -> None:
    arguments = {
        "predict": ["predict", "m", "--task", "rte", "--out", str(tmp_path / "out"), "--shards", str(tmp_path)],
        "evaluate": ["evaluate", "m", "--task", "rte", "--shards", str(tmp_path)],
        "frequencies": ["shards", "frequencies", str(tmp_path), "--out", str(tmp_path / "f.json")],
        "verify": ["shards", "verify", str(tmp_path)],
    }[command]
    rows = {"predict": "--task rte", "evaluate": "--task rte", "frequencies": "--task caption"}.get(command)
    assert main(arguments) == 1
    told = "".join(capsys.readouterr())
    expected = f"{rows} --out {tmp_path} TSV" if rows else f"--out {tmp_path} --vision-language TSV"
    assert f"build them with: ofa-ds shards build {expected}" in told


def test_command_line_builds_verifies_and_fails_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = sources(tmp_path / "tsv")
    build = ["shards", "build", "--out", str(tmp_path / "out"), "--workers", "1", "--text", str(given["text"][0])]
    assert main([*build, "--image", str(given["image"][0])]) == 0
    assert main(["shards", "verify", str(tmp_path / "out")]) == 0
    (tmp_path / "out" / "text-00000.arrow").write_bytes(b"")
    assert main(["shards", "verify", str(tmp_path / "out")]) == 1
    write(tmp_path / "bad.tsv", [b"1\ta", b"2"])
    capsys.readouterr()
    failing = ["shards", "build", "--out", str(tmp_path / "other"), "--text", str(tmp_path / "bad.tsv")]
    assert main(failing) == 1
    error = capsys.readouterr().err
    assert "bad.tsv:2: columns: want 2" in error and error.count("\n") == 1
    assert not (tmp_path / "other").exists()


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the photographs are not in {REAL}")
def test_real_photographs_build_and_verify(tmp_path: Path) -> None:
    given = {family: [REAL / f"{family}_examples.tsv"] for family in PRETRAINING_FAMILIES}
    manifest = build_shards(tmp_path / "out", **given, negatives=REAL / "negative_sample", rows_per_shard=1000)
    assert Shards(tmp_path / "out").families == {"vision_language": 1709, "text": 3655, "image": 332, "detection": 246}
    assert manifest.families["vision_language"].types == {"caption": 678, "qa": 526, "visual_grounding": 505}
    assert manifest.families["detection"].quarantined == 0
    assert verify_shards(tmp_path / "out") == []
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.arrow"))
    assert size < 0.78 * sum(path.stat().st_size for (path,) in given.values())
    negatives = Shards(tmp_path / "out").negatives
    assert (len(negatives.captions), len(negatives.objects)) == (3372, 125)
