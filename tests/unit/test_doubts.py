"""Well-formed lines that look like a mistake: a warning with file and line, an error with --strict."""

from __future__ import annotations

import base64
import csv
import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_shards import REAL, files, numbered, write
from test_tsv import PICTURE, SQUARE, caption, detection, grounding, image, qa

from ofa_ds.cli.main import main
from ofa_ds.data import tsv
from ofa_ds.data.building.build import build_shards
from ofa_ds.data.doubts import MISSING, doubts
from ofa_ds.data.shards_verify import verify_shards


def found(family: str, line: bytes) -> list[str]:
    return doubts(family, line, tsv.parse(family, line))


def turned(turn: int, side: int = 64) -> bytes:
    exif = Image.Exif()
    exif[274] = turn
    out = io.BytesIO()
    Image.new("RGB", (side, side)).save(out, "JPEG", exif=exif)
    return base64.b64encode(out.getvalue())


UNPADDED = base64.b64encode(PICTURE + bytes(-len(PICTURE) % 3))
"""Of a length that needs no padding; what follows the end of a JPEG is not looked at."""

DOUBTFUL = {
    "caption in quotes": ("vision_language", caption(caption=b'"two words"'), "caption: stands in quotation"),
    "caption with doubled quotes": ("vision_language", caption(caption=b'"says ""STOP"""'), "caption: stands in quot"),
    "question in quotes": ("vision_language", qa(question=b'"is it ""big""?"'), "question: stands in quotation"),
    "dataset in quotes": ("vision_language", qa(dataset_name=b'"vqa"'), "dataset_name: stands in quotation"),
    "text with doubled quotes": ("text", b'1\t"the ""best"" one"', "text: stands in quotation"),
    "nan for a caption": ("vision_language", caption(caption=b"nan"), "caption: 'nan' is what programs write"),
    "None for a caption": ("vision_language", caption(caption=b" None "), "caption: 'None' is"),
    "nan for a question": ("vision_language", qa(question=b"NaN"), "question: 'NaN' is"),
    "null for an answer": ("vision_language", qa(refs=b"0.5|!+yes&&0.5|!+null"), "refs: 'null' is"),
    "nan for an object": ("vision_language", caption(gt_objects=b"dog&&nan"), "gt_objects: 'nan' is"),
    "None for text": ("text", b"1\tNone", "text: 'None' is"),
    "nan for a name": ("detection", detection(b"1,2,9,9,1,nan"), "label: 'nan' is"),
    "relative box": ("vision_language", grounding(refs=b"0.1,0.2,0.6,1.0"), "refs: all of it is within 0 ... 1"),
    "relative boxes": ("detection", detection(b"0,0,0.5,1,1,a&&0.2,0.3,0.4,0.5,2,b"), "label: all of it is within 0"),
    "turned, with a box": ("vision_language", grounding(image=turned(6)), "image: EXIF data turn it .*orientation 6"),
    "turned, of detection": ("detection", b"1\t" + turned(8) + b"\t1,2,9,9,1,dog", "image: EXIF data turn it"),
    "turned, with codes": ("image", image(picture=turned(3)), "image: EXIF data turn it"),
    "mirrored caption": ("vision_language", caption(image=turned(2)), "image: EXIF data turn it"),
    "surplus padding": ("vision_language", caption(image=UNPADDED + b"=="), "image: 2 characters of base64 padding"),
}  # fmt: skip

PLAIN = {
    "plain caption": ("vision_language", caption(gt_objects=b"dog&&cat")),
    "none as an answer": ("vision_language", qa(refs=b"1|!+none")),
    "a word of nan": ("vision_language", caption(caption=b"nan bread and naan")),
    "two quotations": ("vision_language", caption(caption=b'"stop" says the sign, not "go"')),
    "one quotation mark": ("vision_language", caption(caption=b'"')),
    "direct speech": ("text", b'1\t"I will," he said, and "so be it."'),
    "a line of speech": ("text", b'1\t"I will go."'),
    "a box at the first pixel": ("vision_language", grounding(refs=b"0,0,1,2")),
    "one small object among others": ("detection", detection(b"0,0,1,1,1,a&&0,0,9,9,2,b")),
    "codes": ("image", image(picture=SQUARE)),
    "not turned": ("vision_language", grounding(image=turned(1))),
    "text": ("text", b"1\tsome text"),
}  # fmt: skip


@pytest.mark.parametrize("family, line, message", DOUBTFUL.values(), ids=DOUBTFUL)
def test_a_doubtful_line_says_column_and_reason(family: str, line: bytes, message: str) -> None:
    (doubt,) = found(family, line)
    assert re.match(message, doubt) and "\n" not in doubt and len(doubt) < 250


@pytest.mark.parametrize("family, line", PLAIN.values(), ids=PLAIN)
def test_a_plain_line_raises_no_doubt(family: str, line: bytes) -> None:
    assert found(family, line) == []


_text = st.text(st.characters(exclude_characters="\n\r\t\x00\ufeff", exclude_categories=["Cs"]), min_size=1)


@given(_text)
def test_what_a_csv_writer_quotes_is_found_whatever_it_says_and_nothing_else_is(text: str) -> None:
    out = io.StringIO()
    csv.writer(out, delimiter="\t", quoting=csv.QUOTE_MINIMAL, lineterminator="").writerow([text])
    try:
        doubt = found("vision_language", caption(caption=out.getvalue().encode()))
    except ValueError:
        return  # nothing is left of it after cleaning
    assert any("quotation marks" in one for one in doubt) == ('"' in text)


@given(st.sampled_from(MISSING), st.sampled_from(["caption", "object", "answer", "text", "name"]))
def test_every_word_for_a_missing_value_is_found_wherever_text_stands(word: str, place: str) -> None:
    family, line = {
        "caption": ("vision_language", caption(caption=word.encode())),
        "object": ("vision_language", caption(gt_objects=b"dog&&" + word.encode())),
        "answer": ("vision_language", qa(refs=b"1|!+" + word.encode())),
        "text": ("text", b"1\t" + word.encode()),
        "name": ("detection", detection(b"1,2,9,9,1," + word.encode())),
    }[place]
    assert len(found(family, line)) == 1


def test_a_box_in_the_viewers_pixels_is_told_why_it_is_outside(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    out = io.BytesIO()
    Image.new("RGB", (64, 32)).save(out, "JPEG", exif=exif)
    line = grounding(image=base64.b64encode(out.getvalue()), refs=b"2,40,20,60")
    with pytest.raises(ValueError, match="outside the picture of 64 x 32 as stored; EXIF data turn it for viewers"):
        tsv.parse("vision_language", line)


# Building ---------------------------------------------------------------------------------------------------------


def doubtful_sources(folder: Path) -> dict[str, list[Path]]:
    vision = [caption(caption=b"a dog"), caption(caption=b"nan"), caption(caption=b"a cat"), qa(),
              grounding(refs=b"0.1,0.2,0.6,0.9"), caption(caption=b'"a ""cow"""')]  # fmt: skip
    return {
        "vision_language": [write(folder / "vl.tsv", [numbered(line, k) for k, line in enumerate(vision)])],
        "text": [write(folder / "text.tsv", [b"%d\t%s" % (k, b"null" if k % 4 else b"good") for k in range(20)])],
    }


def test_warnings_are_counted_listed_and_the_same_with_any_number_of_workers(tmp_path: Path) -> None:
    given = doubtful_sources(tmp_path)
    manifest = build_shards(tmp_path / "one", **given, rows_per_shard=3, workers=1)
    build_shards(tmp_path / "three", **given, rows_per_shard=3, workers=3)
    assert files(tmp_path / "one") == files(tmp_path / "three")
    assert {family: (part.rows, part.warnings) for family, part in manifest.families.items()} == {
        "vision_language": (6, 3), "text": (20, 15),
    }  # fmt: skip
    log = (tmp_path / "one" / "warnings" / "vl.log").read_text().splitlines()
    assert [line.split(": ")[0].rpartition("/")[2] for line in log] == ["vl.tsv:2", "vl.tsv:5", "vl.tsv:6"]
    assert len((tmp_path / "one" / "warnings" / "text.log").read_text().splitlines()) == 15
    assert verify_shards(tmp_path / "one", workers=1) == []


def test_strict_stops_at_the_first_doubtful_line_or_puts_it_into_quarantine(tmp_path: Path) -> None:
    given = doubtful_sources(tmp_path)
    with pytest.raises(ValueError, match=r"vl.tsv:2: caption: 'nan' is .* \(--strict\)"):
        build_shards(tmp_path / "out", **given, strict=True, workers=1)
    assert not (tmp_path / "out").exists()
    manifest = build_shards(tmp_path / "out", **given, strict=True, on_error="quarantine", workers=1)
    assert {name: (part.rows, part.quarantined, part.warnings) for name, part in manifest.families.items()} == {
        "vision_language": (3, 3, 0), "text": (5, 15, 0),
    }  # fmt: skip
    assert not (tmp_path / "out" / "warnings").exists()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "line, message",
    [
        (caption(), "lonely.tsv:1: caption: no negative caption can be made: all captions read 'a dog & a cat'"),
        (qa(refs=b"1|!+Yes"), "lonely.tsv:1: refs: no negative answer can be made: all answers read 'yes'"),
    ],
    ids=["caption", "answer"],
)
def test_data_that_cannot_make_a_negative_is_told(strict: bool, line: bytes, message: str, tmp_path: Path) -> None:
    source = write(tmp_path / "lonely.tsv", [numbered(line, k) for k in range(4)])
    if strict:
        with pytest.raises(ValueError, match=rf"{message}.*\(--strict\)"):
            build_shards(tmp_path / "out", vision_language=[source], workers=1, strict=True)
        return
    manifest = build_shards(tmp_path / "out", vision_language=[source], rows_per_shard=2, workers=1)
    assert manifest.families["vision_language"].warnings == 1
    assert message in (tmp_path / "out" / "warnings" / "lonely.log").read_text()


def test_grounding_alone_needs_no_negatives_and_gets_no_warning(tmp_path: Path) -> None:
    manifest = build_shards(tmp_path / "out", vision_language=[write(tmp_path / "a.tsv", [grounding()])], workers=1)
    assert manifest.families["vision_language"].warnings == 0 and not (tmp_path / "out" / "warnings").exists()


def test_the_console_shows_the_first_warnings_and_how_many_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = doubtful_sources(tmp_path)
    build = ["shards", "build", "--out", str(tmp_path / "out"), "--workers", "1", "--text", str(given["text"][0])]
    assert main(build) == 0
    shown = capsys.readouterr()
    warnings = [line for line in shown.err.splitlines() if line.startswith("warning: ")]
    assert "text.tsv:2: text: 'null' is" in warnings[0] and len(warnings) == 6
    assert warnings[-1] == f"warning: 10 more in {tmp_path / 'out' / 'warnings'}"
    assert "20 rows, warnings: 15" in shown.out
    assert main([*build[:3], str(tmp_path / "strict"), *build[4:], "--strict"]) == 1
    assert "text.tsv:2: text: 'null' is" in capsys.readouterr().err


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the photographs are not in {REAL}")
def test_clean_files_raise_no_doubt(tmp_path: Path) -> None:
    source = REAL / "text_examples.tsv"
    lines = source.read_bytes().splitlines()
    assert [doubt for line in lines for doubt in found("text", line)] == []
