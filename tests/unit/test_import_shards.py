"""Foreign data sets become the rows that they say, boxes follow their pictures, and hostile files are one line."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ofa_ds.cli import main
from ofa_ds.data.building import piece_builder
from ofa_ds.data.building.build import How
from ofa_ds.data.importing.importing import import_shards
from ofa_ds.data.importing.item import Shrink
from ofa_ds.data.importing.tars import groups
from ofa_ds.data.manifest import read_manifest
from ofa_ds.data.picture import decode_rgb
from ofa_ds.data.shards import Shards
from ofa_ds.data.shards_verify import verify_shards


def picture(width: int = 64, height: int = 48, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(out := io.BytesIO(), "JPEG")
    return out.getvalue()


def tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> str:
    with tarfile.open(path, mode) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return str(path)


def imported(tmp_path: Path, form: str, sources: list[str], **options) -> list[dict]:
    """The rows, and whether they verify."""
    import_shards(str(tmp_path / "out"), form, sources, **options)
    assert verify_shards(tmp_path / "out", workers=1) == []
    shards = Shards(tmp_path / "out")
    return [shards.row(family, i) for family, count in shards.families.items() for i in range(count)]


@pytest.mark.parametrize("end, mode", [("tar", "w"), ("tar.gz", "w:gz"), ("tgz", "w:gz")])
def test_webdataset(end: str, mode: str, tmp_path: Path) -> None:
    members = []
    for k in range(5):
        members += [(f"a/{k:04}.jpg", picture(seed=k)), (f"a/{k:04}.txt", f"a cat {k}".encode())]
        members += [(f"a/{k:04}.json", json.dumps({"objects": ["cat", "mat"]}).encode())]
    rows = imported(tmp_path, "webdataset", [tar(tmp_path / f"x.{end}", members, mode)])
    assert [(row["id"], row["caption"], row["gt_objects"]) for row in rows] == [
        (f"a/{k:04}", f"a cat {k}", ["cat", "mat"]) for k in range(5)
    ]
    assert rows[3]["image"] == picture(seed=3) and rows[3]["dataset"] == "webdataset"


@pytest.mark.parametrize("form", ["struct", "bytes"])
def test_parquet_and_what_hugging_face_keeps_in_it(form: str, tmp_path: Path) -> None:
    images = [picture(seed=k) for k in range(7)]
    column = [{"bytes": image, "path": "x.jpg"} for image in images] if form == "struct" else images
    table = pa.table({"image": column, "text": [f"dog {k}" for k in range(7)], "id": list(range(7))})
    (folder := tmp_path / "data").mkdir()
    pq.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=3)
    rows = imported(tmp_path, "huggingface", [str(folder)])
    assert [(row["id"], row["caption"], row["image"]) for row in rows] == [
        (str(k), f"dog {k}", images[k]) for k in range(7)
    ]


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_files_of_save_to_disk(kind: str, tmp_path: Path) -> None:
    table = pa.table({"sentence": [f"line {k}" for k in range(300)]})
    (folder := tmp_path / "set" / "train").mkdir(parents=True)
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with new(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, 100)
    rows = imported(tmp_path, "huggingface", [str(tmp_path / "set")], kind="text", columns={"text": "sentence"})
    assert [row["text"] for row in rows] == [f"line {k}" for k in range(300)]
    assert len({row["id"] for row in rows}) == 300


def test_parquet_questions_count_how_many_people_gave_an_answer(tmp_path: Path) -> None:
    table = pa.table({"image": [picture()], "question": ["what is it?"], "answers": [["cat", "dog", "cat", "cat"]]})
    pq.write_table(table, tmp_path / "a.parquet")
    (row,) = imported(tmp_path, "parquet", [str(tmp_path / "a.parquet")], kind="qa")
    assert row["answers"] == [("cat", 0.75), ("dog", 0.25)] and row["type"] == "qa"


def coco(tmp_path: Path, **changed) -> tuple[str, str]:
    """(annotation file, folder of pictures) of two pictures with three annotations."""
    (folder := tmp_path / "pictures").mkdir(exist_ok=True)
    images = []
    for k in range(2):
        (folder / f"{k}.jpg").write_bytes(picture(seed=k))
        images.append({"id": k, "file_name": f"{k}.jpg", "width": 64, "height": 48})
    annotations = [
        {"id": 10 + k, "image_id": k % 2, "caption": f"a caption {k}", "bbox": [4, 6, 10 + k, 20], "category_id": 3,
         "iscrowd": 0} for k in range(3)
    ]  # fmt: skip
    found = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "cat"}]} | changed
    (path := tmp_path / "coco.json").write_text(json.dumps(found))
    return str(path), str(folder)


def test_coco_captions(tmp_path: Path) -> None:
    path, folder = coco(tmp_path)
    rows = imported(tmp_path, "coco-captions", [path], images=folder)
    found = [(row["id"], row["caption"], row["image"]) for row in rows]
    assert found == [(str(10 + k), f"a caption {k}", picture(seed=k % 2)) for k in range(3)]


def test_files_are_as_large_as_asked_for_wherever_their_pictures_come_from(tmp_path: Path) -> None:
    path, folder = coco(tmp_path)
    size = len(picture())
    rows = imported(tmp_path, "coco-captions", [path], images=folder, how=How(workers=1, shard_bytes=2 * size + 600))
    files = [shard.rows for shard in Shards(tmp_path / "out").manifest.families["vision_language"].shards]
    assert len(rows) > 2 and max(files) == 2 and len(files) == -(-len(rows) // 2)


def test_coco_instances_and_their_boxes_in_a_smaller_picture(tmp_path: Path) -> None:
    path, folder = coco(tmp_path)
    rows = imported(tmp_path, "coco-instances", [path], images=folder)
    assert [row["boxes"].tolist() for row in rows] == [[[4, 6, 14, 26], [4, 6, 16, 26]], [[4, 6, 15, 26]]]
    assert rows[0]["cat_names"] == ["cat", "cat"] and rows[0]["cat_ids"] == ["3", "3"]
    (tmp_path / "small").mkdir()
    rows = imported(tmp_path / "small", "coco-instances", [path], images=folder, shrink=Shrink(max_side=32, quality=80))
    assert (rows[0]["width"], rows[0]["height"]) == (32, 24)
    assert rows[0]["boxes"].tolist() == [[2, 3, 7, 13], [2, 3, 8, 13]]
    assert decode_rgb(rows[0]["image"]).shape == (24, 32, 3)


def test_vqa_v2(tmp_path: Path) -> None:
    (folder := tmp_path / "pictures").mkdir()
    (folder / "COCO_val2014_000000000007.jpg").write_bytes(picture())
    questions = {"data_subtype": "val2014", "questions": [{"question_id": 1, "image_id": 7, "question": "how many?"}]}
    given = [{"answer": text} for text in ["2"] * 6 + ["3"] * 2 + ["two", " "]]
    annotations = {"annotations": [{"question_id": 1, "answers": given}]}
    for name, content in (("q", questions), ("a", annotations)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files = [str(tmp_path / "a.json"), str(tmp_path / "q.json")]
    (row,) = imported(tmp_path, "vqa-v2", files, images=str(folder))
    assert (row["id"], row["question"]) == ("1", "how many?")
    assert row["answers"] == [("2", 1.0), ("3", 2 / 3), ("two", 1 / 3)]


def test_refcoco(tmp_path: Path) -> None:
    path, folder = coco(tmp_path)
    refs = [{"ann_id": 11, "sentences": [{"sent": "the left one", "sent_id": 5}, {"raw": "left  cat", "sent_id": 6}]}]
    (tmp_path / "refs.json").write_text(json.dumps(refs))
    rows = imported(tmp_path, "refcoco", [str(tmp_path / "refs.json"), path], images=folder)
    assert [(row["id"], row["caption"], row["box"]) for row in rows] == [
        ("5", "the left one", (4, 6, 15, 26)), ("6", "left cat", (4, 6, 15, 26))
    ]  # fmt: skip


def test_workers_change_no_byte_and_a_bad_record_goes_to_the_quarantine(tmp_path: Path) -> None:
    paths = []
    for number in range(3):
        members = [(f"{number}-{k}.{end}", data) for k in range(6) for end, data in
                   (("jpg", picture(seed=k) if k != 4 else b"no picture"), ("txt", b"words"))]  # fmt: skip
        paths.append(tar(tmp_path / f"{number}.tar", members))
    for workers in (1, 2):
        how = How(workers=workers, on_error="quarantine", shard_bytes=9000)
        manifest = import_shards(str(tmp_path / f"out{workers}"), "webdataset", paths, how=how)
        assert (manifest.families["vision_language"].rows, manifest.families["vision_language"].quarantined) == (15, 3)
    one, two = (content(tmp_path / f"out{workers}") for workers in (1, 2))
    assert one == two and b"0.tar:0-4: image: undecodable" in one["quarantine/0.tar.log"]
    with pytest.raises(ValueError, match=r"0.tar:0-4: image: undecodable"):
        import_shards(str(tmp_path / "out"), "webdataset", paths)


def test_bad_rows_without_number_do_not_fill_the_disk_with_reasons(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(piece_builder, "MAX_REASONS", 3)
    captions = [*[None] * 2, "a cat", *[None] * 8, "a dog"]
    pq.write_table(pa.table({"caption": captions, "image": [picture()] * 12}), tmp_path / "x.parquet")
    assert len(imported(tmp_path, "parquet", [str(tmp_path / "x.parquet")], how=How(on_error="quarantine"))) == 2
    assert read_manifest(tmp_path / "out").families["vision_language"].quarantined == 10
    *told, last = (tmp_path / "out/quarantine/x.parquet.log").read_text().splitlines()
    assert [each.split(": ")[0].rpartition(" ")[2] for each in told] == ["1", "2", "4"]
    assert last.endswith("row group 0 row 12: up to here 7 more bad records, which are not told one by one")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hostile(kind: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo({"up": "../x.jpg", "absolute": "/etc/x.jpg"}.get(kind, "x.jpg"))
    if kind in ("link", "hard link", "device"):
        info.type = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}[kind]
        info.linkname = "/etc/passwd"
    if kind == "huge":
        info.size = 1 << 40
    return info


@pytest.mark.parametrize(
    "kind, message",
    [("up", "leads out of the tar"), ("absolute", "leads out of the tar"), ("link", "want plain files"),
     ("hard link", "want plain files"), ("device", "want plain files"), ("huge", "at most 268435456 are read")],
)  # fmt: skip
def test_a_hostile_tar_is_one_line_and_nothing_is_read(kind: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.tar"
    path.write_bytes(hostile(kind).tobuf() + b"\0" * 10240)
    with pytest.raises(ValueError, match=message) as error:
        import_shards(str(tmp_path / "out"), "webdataset", [str(path)], how=How(on_error="quarantine"))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bad.tar"]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"images": [{"id": 0, "file_name": "../secret.jpg"}]}, "leads out of the folder"),
        ({"images": [{"id": 0, "file_name": "/etc/x.jpg"}]}, "leads out of the folder"),
        ({"images": [{"id": 0, "file_name": "0.jpg"}] * 2}, "images.1: the id 0 is there twice"),
        ({"images": "none"}, "images: want a list of tables"),
        ({"annotations": [{"image_id": 9, "caption": "x"}]}, "image_id 9 is not among the images"),
        ({"annotations": [{"image_id": 0, "caption": 5}]}, "caption: want a text, got 5"),
        ({"annotations": []}, "has no annotations"),
    ],
)
def test_annotations_that_contradict_themselves_are_one_line(changed: dict, message: str, tmp_path: Path) -> None:
    path, folder = coco(tmp_path, **changed)
    with pytest.raises(ValueError, match=message) as error:
        import_shards(str(tmp_path / "out"), "coco-captions", [path], images=folder)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("box", [[0, 0, 500, 5], [3, 3, 0, 5], [-9, 0, 5, 5]])
def test_boxes_that_cannot_be_are_bad_records(box: list, tmp_path: Path) -> None:
    path, folder = coco(tmp_path, annotations=[{"id": 1, "image_id": 0, "bbox": box, "category_id": 3}])
    with pytest.raises(ValueError, match="coco.json:0: (label|box): "):
        import_shards(str(tmp_path / "out"), "coco-instances", [path], images=folder)


def test_a_missing_picture_and_one_of_another_size_are_named(tmp_path: Path) -> None:
    path, folder = coco(tmp_path)
    (Path(folder) / "0.jpg").write_bytes(picture(10, 10))
    with pytest.raises(ValueError, match="coco.json:0: image: is 10 x 10, its boxes are of a picture of 64 x 48"):
        import_shards(str(tmp_path / "out"), "coco-instances", [path], images=folder)
    (Path(folder) / "0.jpg").unlink()
    with pytest.raises(ValueError, match="coco.json:10: image: .*0.jpg"):
        import_shards(str(tmp_path / "out"), "coco-captions", [path], images=folder)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not a table at all"])
def test_what_is_no_table_is_one_line(content: bytes, tmp_path: Path) -> None:
    (path := tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ValueError, match="a.parquet: neither Parquet nor Arrow"):
        import_shards(str(tmp_path / "out"), "parquet", [str(path)])


def test_columns_that_are_not_there_are_told_with_those_that_are(tmp_path: Path) -> None:
    pq.write_table(pa.table({"foto": [picture()], "bildtext": ["x"]}), path := tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="it has foto, bildtext; say which is which with --column"):
        import_shards(str(tmp_path / "out"), "parquet", [str(path)])
    (row,) = imported(tmp_path, "parquet", [str(path)], columns={"image": "foto", "caption": "bildtext"})
    assert row["caption"] == "x"
    with pytest.raises(ValueError, match="--column colour: want one of"):
        import_shards(str(tmp_path / "two"), "parquet", [str(path)], columns={"colour": "x"})


def test_the_command_line_imports_and_says_what_is_missing(tmp_path: Path, capsys) -> None:
    path, folder = coco(tmp_path)
    command = ["shards", "import", "coco-captions", path, "--out", str(tmp_path / "out")]
    assert main(command) != 0 and "want --images DIR" in capsys.readouterr().err
    assert main([*command, "--images", folder, "--max-side", "32"]) == 0
    assert "3 rows" in capsys.readouterr().out
    assert main(["shards", "verify", str(tmp_path / "out")]) == 0


def saved(folder: Path, name: str, caption: str) -> None:
    folder.mkdir(exist_ok=True)
    table = pa.table({"image": [picture()], "caption": [caption]})
    with pa.ipc.new_stream(folder / name, table.schema) as file:
        file.write_table(table)


@pytest.mark.parametrize("listed", [True, False])
def test_what_map_caches_beside_a_saved_data_set_is_no_part_of_it(listed: bool, tmp_path: Path) -> None:
    saved(tmp_path / "set", "data-00000-of-00001.arrow", "real")
    saved(tmp_path / "set", "cache-c4e3a7afbdcc2b57.arrow", "stale")
    if listed:
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (tmp_path / "set/state.json").write_text(json.dumps(state))
    rows = imported(tmp_path, "huggingface", [str(tmp_path / "set")])
    assert [row["caption"] for row in rows] == ["real"]


def test_a_state_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "secret.arrow", "secret")
    saved(tmp_path / "set", "data-00000-of-00001.arrow", "real")
    (tmp_path / "set/state.json").write_text(json.dumps({"_data_files": [{"filename": "../secret.arrow"}]}))
    with pytest.raises(ValueError, match="leads out of its folder"):
        import_shards(str(tmp_path / "out"), "huggingface", [str(tmp_path / "set")])


def test_splits_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    for split in ("train", "validation"):
        for k in range(2):
            table = pa.table({"image": [picture()], "caption": [f"{split} {k}"]})
            pq.write_table(table, tmp_path / f"hub/{split}-{k:05}-of-00002.parquet")
    with pytest.raises(ValueError, match=r"several splits \(train, validation\)"):
        import_shards(str(tmp_path / "out"), "huggingface", [str(tmp_path / "hub")])
    rows = imported(tmp_path, "huggingface", [str(tmp_path / "hub/train-*.parquet")])
    assert [row["caption"] for row in rows] == ["train 0", "train 1"]


def test_a_saved_dictionary_is_imported_split_by_split(tmp_path: Path) -> None:
    (folder := tmp_path / "set").mkdir()
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split in ("train", "test"):
        saved(folder / split, "data-00000-of-00001.arrow", split)
    with pytest.raises(ValueError, match=r"several splits \(test, train\)"):
        import_shards(str(tmp_path / "out"), "huggingface", [str(folder)])
    assert [row["caption"] for row in imported(tmp_path, "huggingface", [str(folder / "train")])] == ["train"]


def test_folders_that_are_no_splits_are_read_together(tmp_path: Path) -> None:
    for year in ("1", "2"):
        (folder := tmp_path / f"set/year={year}").mkdir(parents=True)
        pq.write_table(pa.table({"image": [picture()], "caption": [year]}), folder / "part-00000-of-00001.parquet")
    assert [row["caption"] for row in imported(tmp_path, "parquet", [str(tmp_path / "set")])] == ["1", "2"]


def bomb(path: Path, header: bytes, num_bytes: int) -> str:
    """A gzip of a header and so many bytes of its content, small on the disk."""
    with gzip.open(path, "wb", 1) as file:
        file.write(header)
        for _ in range(num_bytes >> 20):
            file.write(b"a" * (1 << 20))
        file.write(tarfile.TarInfo("x.jpg").tobuf() + bytes(10240))
    return str(path)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_that_unpacks_without_end_is_not_read(kind: bytes, tmp_path: Path) -> None:
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, 64 << 20
    path = bomb(tmp_path / "x.tar.gz", info.tobuf(), info.size)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="headers of a member have more than 1048576 bytes") as error:
            list(groups(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20 and len(str(error.value)) < 400


def test_headers_that_follow_each_other_without_end_are_one_line(tmp_path: Path) -> None:
    info = tarfile.TarInfo("header")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2
    (path := tmp_path / "x.tar").write_bytes((info.tobuf() + b"a".ljust(512, b"\0")) * 900 + bytes(10240))
    with pytest.raises(ValueError, match="x.tar: (a member has headers without end|not a whole tar)"):
        list(groups(str(path)))


def test_members_of_a_record_are_bounded_together(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ofa_ds.data.importing.tars.MAX_MEMBER_BYTES", 1000)
    path = tar(tmp_path / "x.tar", [("a.txt", bytes(900)), ("b.txt", bytes(900))])
    assert [key for key, _ in groups(path)] == ["a", "b"]
    path = tar(tmp_path / "y.tar", [("a.txt", bytes(900)), ("a.cls", bytes(900))])
    with pytest.raises(ValueError, match="the record a has more than 1000 bytes"):
        list(groups(path))


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"annotations": [{"id": [1], "image_id": 0, "bbox": [1, 1, 5, 5]}]},
            "annotations.0: id: want a whole number or",
        ),
        ({"annotations": [{"id": 1, "image_id": 0, "bbox": [k, 1, 5, 5]} for k in (1, 2)]}, "the id 1 is there twice"),
    ],
)
def test_an_annotation_that_could_be_two_is_not_guessed(changed: dict, message: str, tmp_path: Path) -> None:
    path, folder = coco(tmp_path, **changed)
    (tmp_path / "refs.json").write_text(json.dumps([{"ann_id": 1, "sentences": [{"sent": "it", "sent_id": 1}]}]))
    with pytest.raises(ValueError, match=message):
        import_shards(str(tmp_path / "out"), "refcoco", [str(tmp_path / "refs.json"), path], images=folder)


@pytest.mark.parametrize("category", [{}, [3], None])
def test_a_category_that_is_no_id_is_one_line(category, tmp_path: Path) -> None:
    annotations = [{"id": 1, "image_id": 0, "bbox": [1, 1, 5, 5], "category_id": category}]
    path, folder = coco(tmp_path, annotations=annotations)
    with pytest.raises(ValueError, match="annotations.0: category_id: want a whole number or a text"):
        import_shards(str(tmp_path / "out"), "coco-instances", [path], images=folder)


def test_a_question_that_is_there_twice_is_told(tmp_path: Path) -> None:
    question = {"question_id": 1, "image_id": 7, "question": "how many?"}
    (tmp_path / "q.json").write_text(json.dumps({"questions": [question, question]}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": [{"question_id": 1, "answers": [{"answer": "2"}]}]}))
    files = [str(tmp_path / f"{name}.json") for name in "qa"]
    with pytest.raises(ValueError, match="questions.1: the question_id 1 is there twice"):
        import_shards(str(tmp_path / "out"), "vqa-v2", files, images=str(tmp_path))
