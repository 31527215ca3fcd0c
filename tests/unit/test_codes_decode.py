"""`ofa-ds codes decode`: the pictures of rows and of a line of numbers, and one line for what stands for none."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_vqgan import tiny_vqgan

from ofa_ds.cli.main import main
from ofa_ds.data.building.build import build_shards
from ofa_ds.data.scenes import write_scenes
from ofa_ds.data.shards import Shards
from ofa_ds.vision.coder import Coder, load_coder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_vqgan(tmp_path_factory.mktemp("model") / "vqgan")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_scenes(folder, rows=40, seed=1)
    build_shards(folder / "shards", image=[folder / "image_examples.tsv"], text=[folder / "text_examples.tsv"])
    return folder


@pytest.fixture(scope="module")
def coder(model: Path) -> Coder:
    return load_coder(model, code_image_size=32)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_every_row_of_shards_and_of_a_tsv_becomes_the_picture_of_its_codes(model, rows, coder, tmp_path) -> None:
    shards = Shards(rows / "shards")
    painted = coder.paint([shards.row("image", i)["codes"] for i in range(5)])
    for name in ("shards", "image_examples.tsv"):
        out = tmp_path / f"of_{name}"
        assert main(["codes", "decode", str(rows / name), "--model", str(model), "--out", str(out)]) == 0
        files = sorted(out.iterdir())
        assert [file.name for file in files] == [f"{k:06d}_train-1-{k}.png" for k in range(5)]
        assert all(np.array_equal(pixels(file), picture) for file, picture in zip(files, painted, strict=True))


def test_numbers_on_the_command_line_become_a_picture(model: Path, coder: Coder, tmp_path: Path) -> None:
    codes = np.arange(16)
    sheet = tmp_path / "a.png"
    given = " ".join(map(str, codes))
    assert main(["codes", "decode", "--codes", given, "--model", str(model), "--png", str(sheet)]) == 0
    assert np.array_equal(pixels(sheet), coder.paint([codes])[0])


def test_a_sheet_shows_the_first_rows_of_both_forms_of_text_to_image(model, coder, tmp_path) -> None:
    lines = {"three": "{id}\t{codes}\ta cat\n", "four": "{id}\tAAAA\ta cat\t{codes}\n"}
    codes = [np.full(16, k) for k in range(5)]
    for name, line in lines.items():
        texts = [line.format(id=k, codes=" ".join(map(str, each))) for k, each in enumerate(codes)]
        (tmp_path / f"{name}.tsv").write_text("".join(texts))
        command = f"codes decode {tmp_path}/{name}.tsv --task text_to_image --model {model} --rows 4"
        assert main([*command.split(), "--png", str(tmp_path / f"{name}.png")]) == 0
        sheet = pixels(tmp_path / f"{name}.png")
        assert sheet.shape == (66, 66, 3)
        assert np.array_equal(sheet[34:, 34:], coder.paint([codes[3]])[0])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--codes", "1 2 3"], "--codes: want as many codes as a square has, such as 64, 256 or 1024, got 3"),
        (["--codes", ""], "--codes: want as many codes as a square has"),
        (["--codes", "1 2 3 128"], "--codes: want 0 ... 127 of the codebook, got 128"),
        (["--codes", "1 2 3 -4"], "--codes: want whole numbers of at least 0 with blanks between, got '-4' at place 3"),
        (["TSV"], "bad.tsv:2: want as many codes as a square has, such as 64, 256 or 1024, got 2"),
        (["TSV", "--task", "text_to_image"], "bad.tsv:1: want whole numbers of at least 0"),
        (["SHARDS", "--task", "text_to_image"], "shards: has no rows of text_to_image, only text, image"),
    ],
)
def test_what_stands_for_no_picture_is_one_line_and_leaves_nothing(
    model, rows, tmp_path, capsys, options, message
) -> None:
    (tmp_path / "bad.tsv").write_text("a\tAAAA\t1 2 3 4\nb\tAAAA\t1 2\n")
    places = {"TSV": str(tmp_path / "bad.tsv"), "SHARDS": str(rows / "shards")}
    out = tmp_path / "out"
    given = [places.get(each, each) for each in options]
    assert main(["codes", "decode", *given, "--model", str(model), "--out", str(out)]) == 1
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said
    assert not out.exists() and [path.name for path in tmp_path.iterdir()] == ["bad.tsv"]


def test_a_row_and_numbers_or_neither_are_wrong_usage(model: Path, rows: Path, capsys) -> None:
    decode = ["codes", "decode", "--model", str(model)]
    assert main([*decode, "--png", "a.png"]) == 2
    assert main([*decode, str(rows / "shards"), "--codes", "1", "--png", "a.png"]) == 2
    assert main([*decode, "--codes", "1"]) == 2
    assert "want --png FILE or --out DIR" in capsys.readouterr().err


def test_a_picture_of_one_code_is_painted_and_encoded(model: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "a.png"
    assert main(["codes", "decode", "--codes", "7", "--model", str(model), "--png", str(sheet)]) == 0
    assert pixels(sheet).shape == (8, 8, 3)
    assert load_coder(model, code_image_size=8).encode([pixels(sheet)])[0].shape == (1, 1)


def test_a_sheet_that_could_not_be_written_leaves_the_one_before(model, tmp_path, capsys, monkeypatch) -> None:
    sheet = tmp_path / "a.png"
    sheet.write_bytes(b"the one before")

    def save(self, path, *_, **__):
        Path(path).write_bytes(b"PNG")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    assert main(["codes", "decode", "--codes", "1", "--model", str(model), "--png", str(sheet)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert sheet.read_bytes() == b"the one before" and list(tmp_path.iterdir()) == [sheet]
