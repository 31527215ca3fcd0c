"""`ofa-ds codes encode`: every row gets the codes of its picture; a stopped command goes on; one line for bad input."""

from __future__ import annotations

import base64
import dataclasses
import errno
import io
import os
import pickle
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_vqgan import tiny_vqgan

from ofa_ds.cli.main import main
from ofa_ds.data.building.build import build_shards
from ofa_ds.data.image import decode
from ofa_ds.data.scenes import write_scenes
from ofa_ds.data.shards import Shards
from ofa_ds.data.shards_verify import verify_shards
from ofa_ds.vision.code_rows import INFILLING
from ofa_ds.vision.coder import Coder, load_coder
from ofa_ds.vision.config import VqganConfig
from ofa_ds.vision.encoding import encode as encode_module
from ofa_ds.vision.encoding import journal as journal_module
from ofa_ds.vision.encoding.sources import opened
from ofa_ds.vision.encoding.what import What
from ofa_ds.vision.files import CONFIG, WEIGHTS, save_vqgan
from ofa_ds.vision.vqgan import Vqgan

ROWS = 7


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_vqgan(tmp_path_factory.mktemp("model") / "vqgan")


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """All families of scenes as TSV files, and as shards."""
    folder = tmp_path_factory.mktemp("given")
    write_scenes(folder, rows=8 * ROWS, seed=1)
    families = ("vision_language", "text", "image", "detection")
    build_shards(folder / "shards", **{family: [folder / f"{family}_examples.tsv"] for family in families})
    return folder


@pytest.fixture(scope="module")
def coder(model: Path) -> Coder:
    return load_coder(model, code_image_size=32)


def encode(source: Path, out: Path, model: Path, *options: str) -> int:
    command = ["codes", "encode", str(source), "--out", str(out), "--model", str(model), "--workers", "1"]
    return main([*command, *options])


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    Image.fromarray(pixels).save(out := io.BytesIO(), "PNG")
    return out.getvalue()


def tsv_of(path: Path, *rows: tuple[bytes, ...]) -> Path:
    path.write_bytes(b"".join(b"\t".join(row) + b"\n" for row in rows))
    return path


def text(codes: np.ndarray) -> str:
    return " ".join(map(str, codes.ravel()))


def columns_of(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()]


def test_infilling_rows_get_the_codes_of_their_central_square(given, model, coder, tmp_path) -> None:
    assert encode(given / "image_examples.tsv", tmp_path / "new.tsv", model) == 0
    before, after = columns_of(given / "image_examples.tsv"), columns_of(tmp_path / "new.tsv")
    assert [row[:2] for row in after] == [row[:2] for row in before] and len(after) == ROWS
    middles = [decode(base64.b64decode(row[1]))[16:48, 16:48] for row in before]
    assert [row[2] for row in after] == [text(codes) for codes in coder.encode(middles)]
    assert [row[2] for row in after] != [row[2] for row in before]


def test_shards_become_shards_whose_other_rows_are_as_they_were(given, model, tmp_path) -> None:
    assert encode(given / "shards", tmp_path / "new", model) == 0
    assert encode(given / "image_examples.tsv", tmp_path / "new.tsv", model) == 0
    assert verify_shards(tmp_path / "new") == []
    before, after = Shards(given / "shards"), Shards(tmp_path / "new")
    assert after.families == before.families and list(after.negatives.captions) == list(before.negatives.captions)
    for family, count in before.families.items():
        for i in range(count):
            row, wanted = after.row(family, i), before.row(family, i)
            if family == "image":
                assert text(row.pop("codes")) == columns_of(tmp_path / "new.tsv")[i][2]
                wanted.pop("codes")
            np.testing.assert_equal(row, wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "new.tsv"]


def test_text_to_image_squeezes_the_whole_picture(model: Path, tmp_path: Path) -> None:
    wide = picture(96, 64)
    image = base64.b64encode(png(wide))
    source = tsv_of(tmp_path / "a.tsv", (b"a", image, b"a cat"), (b"b", image, b"a dog", b"1 2 3"))
    assert encode(source, tmp_path / "new.tsv", model, "--task", "text_to_image", "--side", "32") == 0
    squeezed = np.asarray(Image.fromarray(wide).resize((32, 32), Image.Resampling.LANCZOS))
    codes = text(load_coder(model, code_image_size=32).encode([squeezed])[0])
    kept = image.decode()
    assert columns_of(tmp_path / "new.tsv") == [["a", kept, "a cat", codes], ["b", kept, "a dog", codes]]


def test_what_is_written_for_text_to_image_builds_and_its_shards_can_be_encoded_again(model, tmp_path) -> None:
    rows = [(str(k).encode(), base64.b64encode(png(picture(32, 32, k))), b"a cat") for k in range(3)]
    how = ("--task", "text_to_image", "--side", "32")
    assert encode(tsv_of(tmp_path / "a.tsv", *rows), tmp_path / "new.tsv", model, *how) == 0
    build = ["shards", "build", "--task", "text_to_image", "--out", str(tmp_path / "shards"), str(tmp_path / "new.tsv")]
    assert main(build) == 0
    assert encode(tmp_path / "shards", tmp_path / "again", model, *how[:3], "16") == 0
    before, after = Shards(tmp_path / "shards"), Shards(tmp_path / "again")
    for k in range(3):
        row, wanted = after.row("downstream", k), before.row("downstream", k)
        assert wanted["answers"] == [(columns_of(tmp_path / "new.tsv")[k][3], 1.0)]
        small = np.asarray(Image.fromarray(picture(32, 32, k)).resize((16, 16), Image.Resampling.LANCZOS))
        assert row["answers"] == [(text(load_coder(model, code_image_size=16).encode([small])[0]), 1.0)]
        assert all(row[name] == wanted[name] for name in wanted if name != "answers")


def test_a_folder_of_pictures_becomes_rows_with_the_captions_beside_them(model, tmp_path, capsys) -> None:
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    for name in ("b.png", "a.png", "inner/c.png"):
        (folder / name).write_bytes(png(picture(40, 32)))
    (folder / "a.txt").write_text("a\n  cat\n")
    (folder / "inner/c.txt").write_text("a dog")
    assert encode(folder, tmp_path / "new.tsv", model, "--task", "text_to_image", "--side", "32") == 0
    rows = columns_of(tmp_path / "new.tsv")
    assert [(row[0], row[2]) for row in rows] == [("a.png", "a cat"), ("b.png", ""), ("inner/c.png", "a dog")]
    assert all(base64.b64decode(row[1]) == png(picture(40, 32)) and len(row[3].split()) == 16 for row in rows)
    assert "1 pictures have no caption" in capsys.readouterr().err


def test_side_makes_pictures_of_a_folder_into_rows_that_can_be_built(model, coder, tmp_path) -> None:
    (folder := tmp_path / "photos").mkdir()
    (folder / "a.png").write_bytes(png(picture(200, 100)))
    (folder / "b.png").write_bytes(png(picture(64, 64)))
    assert encode(folder, tmp_path / "new.tsv", model, "--side", "64") == 0
    build_shards(tmp_path / "shards", image=[tmp_path / "new.tsv"])
    rows = [Shards(tmp_path / "shards").row("image", i) for i in range(2)]
    middles = [decode(row["image"])[16:48, 16:48] for row in rows]
    assert [text(row["codes"]) for row in rows] == [text(codes) for codes in coder.encode(middles)]
    assert rows[1]["image"] == png(picture(64, 64))


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.mark.parametrize("first, stop", [(0, 7), (2, 3), (3, 7), (4, 6), (6, 7)])
def test_the_journal_gives_the_codes_of_any_run_of_rows(tmp_path: Path, first: int, stop: int) -> None:
    journal = journal_module.Journal(tmp_path, num_rows=7, chunk_rows=3)
    for number in range(3):
        journal.file(number).write_text("".join(f"{row}\n" for row in range(3 * number, min(3 * number + 3, 7))))
    assert list(journal.texts(first, stop)) == [str(row) for row in range(first, stop)]


def stop_after(monkeypatch: pytest.MonkeyPatch, pictures: int) -> list[int]:
    """Ctrl-C as the next one would be encoded; the list says how many were encoded."""
    counted = [0]
    coders = journal_module.Coders.encode

    def encode_some(self, images, *rest):
        if counted[0] == pictures:
            raise KeyboardInterrupt
        counted[0] += len(images)
        return coders(self, images, *rest)

    monkeypatch.setattr(journal_module.Coders, "encode", encode_some)
    return counted


@pytest.mark.parametrize("form", ["image_examples.tsv", "shards"])
def test_a_stopped_command_loses_no_picture_and_ends_with_the_same_bytes(
    given, model, tmp_path, monkeypatch, form
) -> None:
    assert encode(given / form, tmp_path / "whole", model) == 0
    counted = stop_after(monkeypatch, 3)
    assert encode(given / form, tmp_path / "again", model) == 130
    assert not (tmp_path / "again").exists() and counted == [3]
    part = tmp_path / ".building_again" / ".journal" / "items.codes-00000.txt"
    part.write_bytes(part.read_bytes() + b"1 2 ")  # as a kill in the middle of a line leaves it
    monkeypatch.undo()
    counted = stop_after(monkeypatch, ROWS)
    assert encode(given / form, tmp_path / "again", model) == 0
    assert counted == [ROWS - 3]
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    assert not (tmp_path / ".building_again").exists()


def test_codes_of_another_model_or_of_a_file_that_changed_are_not_taken(given, model, tmp_path, monkeypatch) -> None:
    source = tmp_path / "rows.tsv"
    source.write_bytes((given / "image_examples.tsv").read_bytes())
    stop_after(monkeypatch, 3)
    assert encode(source, tmp_path / "new.tsv", model) == 130
    monkeypatch.undo()
    os.utime(source, ns=(1, 1))
    counted = stop_after(monkeypatch, 4)
    assert encode(source, tmp_path / "new.tsv", model) == 130
    assert counted == [4]


def test_a_command_killed_when_all_was_written_ends_at_once(given, model, tmp_path, monkeypatch) -> None:
    for form, name in (("image_examples.tsv", "new.tsv"), ("shards", "new")):
        with monkeypatch.context() as patch:
            patch.setattr(encode_module.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            assert encode(given / form, tmp_path / name, model) == 130
        assert (tmp_path / name).exists()
        with monkeypatch.context() as patch:
            counted = stop_after(patch, 0)
            assert encode(given / form, tmp_path / name, model) == 0
            assert counted == [0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "new.tsv"]
    assert not (tmp_path / "new" / ".journal").exists()


@pytest.mark.parametrize(
    "rows, options, message",
    [
        ([(b"a", png(picture(4, 4)))], [], "line 1: image: 4 x 4 pixels are less than one code's, 8 x 8"),
        ([(b"a", png(picture(64, 64))), (b"b", png(picture(40, 64)))], [], "line 2: image: want a square whose"),
        ([(b"a", png(picture(40, 40)))], [], "line 1: image: want a square whose side is a multiple of 16, got 40 x"),
        ([(b"a", b"no picture")], [], "line 1: image: "),
        ([(b"a",)], [], "a.tsv:1: columns: want uniq_id image (code) with tabs between, got 1"),
        ([(b"a", png(picture(7, 70)), b"x")], ["--task", "text_to_image"], "line 1: image: 7 x 70 pixels are less"),
        ([(b"a", png(picture(9, 9)))], ["--task", "text_to_image"], "a.tsv:1: columns: want uniq_id image caption"),
    ],
)  # fmt: skip
def test_bad_rows_are_one_line_with_their_place(model, tmp_path, capsys, rows, options, message) -> None:
    encoded = [(row[0], *map(base64.b64encode, row[1:2]), *row[2:]) for row in rows]
    source = tsv_of(tmp_path / "a.tsv", *encoded)
    assert encode(source, tmp_path / "new.tsv", model, *options) == 1
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said
    assert not (tmp_path / "new.tsv").exists()


def test_what_cannot_be_is_refused_before_anything_is_encoded(given, model, tmp_path, capsys, monkeypatch) -> None:
    counted = stop_after(monkeypatch, 0)
    source = given / "image_examples.tsv"
    coarse = VqganConfig(n_embed=8, embed_dim=8, z_channels=8, resolution=16, ch=32, ch_mult=(1, 1), num_res_blocks=1)
    save_vqgan(Vqgan(coarse), tmp_path / "coarse")
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "taken_too").mkdir()
    (tmp_path / "taken_too" / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for call, message in [
        ((source, tmp_path / "new", tmp_path / "coarse"), "has a code for 2 x 2 pixels; rows have one for 8 x 8"),
        ((source, tmp_path / "new", tmp_path / "empty"), "empty: no VQGAN there"),
        ((source, tmp_path / "taken", model), "taken: is there already"),
        ((given / "shards", tmp_path / "taken_too", model), "taken_too exists and is not an empty directory"),
        ((given / "shards", tmp_path / "link", model), "link: is a symbolic link; remove it, or give the place"),
        ((given / "shards", given / "shards" / "new", model), "is in"),
        ((tmp_path / "empty", tmp_path / "new", model), "empty: no pictures there"),
        ((tmp_path / "nowhere", tmp_path / "new", model), "nowhere: no such folder or file"),
        ((given / "shards", tmp_path / "new", model, "--side", "64"), "--side: pictures of shards stay as they are"),
        ((given / "shards", tmp_path / "new", model, "--task", "text_to_image"), "has no rows of text_to_image"),
    ]:
        assert encode(*call) == 1, message
        said = capsys.readouterr().err.strip()
        assert message in said and "\n" not in said
    assert encode(source, tmp_path / "new", model, "--side", "40") == 2
    assert counted == [0] and (tmp_path / "taken").read_text() == "mine"


def test_one_of_several_ranks_is_refused_whoever_started_them(given, model, tmp_path, capsys, monkeypatch) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "2")
            assert encode(given / "image_examples.tsv", tmp_path / "new.tsv", model) == 1
            told = capsys.readouterr().err
            assert "codes encode was started as 2 ranks; start it once, with --workers" in told
            assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_weights_are_hashed_in_pieces(given, tmp_path: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes(bytes(16 << 20))
    what = What(task=INFILLING, side=0)
    job = encode_module._Job(given / "image_examples.tsv", tmp_path / "new.tsv", tmp_path, what, 1, "run")
    assert len(job.pictures) == ROWS
    tracemalloc.start()
    first, peak = job.key, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20
    (tmp_path / WEIGHTS).write_bytes(bytes(16 << 20) + b"1")
    assert dataclasses.replace(job).key != first


@pytest.mark.parametrize(
    "form, options",
    [
        ("image_examples.tsv", ()), ("image_examples.tsv", ("--side", "128")), ("shards", ()),
        ("photos", ("--side", "64")), ("photos", ("--task", "text_to_image", "--side", "64")),
    ],
)  # fmt: skip
def test_a_full_disk_is_told_before_anything_is_encoded_with_what_is_needed(
    given, model, tmp_path, capsys, monkeypatch, form, options
) -> None:
    source = given / form
    if form == "photos":
        (source := tmp_path / form).mkdir()
        for k in range(20):
            (source / f"{k}.png").write_bytes(png(picture(100 + k, 80, k)))
    asked, written = [], []
    fill = journal_module.Journal.fill

    def fill_and_weigh(self, *given, **how):
        fill(self, *given, **how)
        written.append(encode_module._bytes_in(self.folder))

    monkeypatch.setattr(encode_module, "check_space", lambda folder, num_bytes, _: asked.append(num_bytes))
    with monkeypatch.context() as patch:
        patch.setattr(journal_module.Journal, "fill", fill_and_weigh)
        assert encode(source, tmp_path / "new", model, *options) == 0
    written.append(weigh(tmp_path / "new"))
    assert sum(written) * 0.8 < asked[0] < sum(written) * 1.3, (asked, written)

    def full(folder, num_bytes, _):
        raise OSError(errno.ENOSPC, f"{num_bytes} are needed", str(folder))

    monkeypatch.setattr(encode_module, "check_space", full)
    counted = stop_after(monkeypatch, 0)
    assert encode(source, tmp_path / "other", model, *options) == 1
    told = capsys.readouterr().err
    assert "are needed" in told.splitlines()[-1] and counted == [0] and not list(tmp_path.glob("*other"))


def weigh(path: Path) -> int:
    return sum(len(content) for content in contents(path).values())


def test_a_part_of_the_pictures_goes_to_another_process_alone(given, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for k in range(9):
        (tmp_path / "photos" / f"{k}.png").write_bytes(png(picture(16, 16, k)))
    lines = (given / "image_examples.tsv").read_bytes().splitlines(keepends=True) * 1000
    (tmp_path / "rows.tsv").write_bytes(b"".join(lines))
    for path in (tmp_path / "photos", tmp_path / "rows.tsv", given / "shards"):
        pictures = opened(path, INFILLING)
        pickled = pickle.dumps(pictures.piece(2, 6).piece(1, 3))
        assert len(pickled) < 1000
        part = pickle.loads(pickled)
        wanted = [(pictures.name(i), pictures.encoded(i)) for i in (3, 4)]
        if path.is_file():  # what stands before its lines is nothing that it reads
            before = sum(map(len, lines[:3]))
            path.write_bytes(b"x" * before + b"".join(lines[3:]))
        assert len(part) == 2 and [(part.name(i), part.encoded(i)) for i in range(2)] == wanted


@pytest.mark.parametrize("form", ["image_examples.tsv", "shards"])
def test_what_changes_while_it_is_encoded_is_told_and_nothing_is_made_of_it(
    given, model, tmp_path, capsys, monkeypatch, form
) -> None:
    source = tmp_path / form
    shutil.copytree(given / form, source) if form == "shards" else shutil.copy(given / form, source)
    fill = journal_module.Journal.fill

    def touch(self, *given, **how):
        fill(self, *given, **how)
        os.utime(next(source.glob("image*.arrow"), source), ns=(1, 1))

    monkeypatch.setattr(journal_module.Journal, "fill", touch)
    assert encode(source, tmp_path / "new", model) == 1
    assert f"{source}: changed while it was encoded; begin again" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    assert encode(source, tmp_path / "new", model) == 0
