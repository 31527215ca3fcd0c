"""OFA's TSV lines: what a good one becomes, and what is said of every kind of bad one."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ofa_ds.data import tsv
from ofa_ds.data.picture import MAX_PIXELS, check_image


def picture(width: int = 64, height: int = 48, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of side x side black pixels, a few bytes long: only its header is true."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


PICTURE = picture()
IMAGE = base64.b64encode(PICTURE)
SQUARE = base64.b64encode(picture(64, 64))
CODES = b" ".join(b"%d" % k for k in range(16))


def vl(**changes: bytes) -> bytes:
    columns = dict(
        uniq_id=b"7", image=IMAGE, caption=b"", question=b"", refs=b"", gt_objects=b"", dataset_name=b"coco", type=b""
    )
    return b"\t".join((columns | changes).values())


def caption(**changes: bytes) -> bytes:
    return vl(**{"caption": b"A dog & a cat", "type": b"caption"} | changes)


def qa(**changes: bytes) -> bytes:
    return vl(**{"question": b"What is it?", "refs": b"0.6|!+no&&0.3|!+Yes, it is", "type": b"qa"} | changes)


def grounding(**changes: bytes) -> bytes:
    return vl(**{"caption": b"the dog", "refs": b"1.5,2,40,30.25", "type": b"visual_grounding"} | changes)


def image(code: bytes = CODES, picture: bytes = SQUARE) -> bytes:
    return b"\t".join((b"7", picture, code))


def detection(label: bytes) -> bytes:
    return b"\t".join((b"7", IMAGE, label))


def test_caption_row_keeps_text_and_picture_as_they_are() -> None:
    row = tsv.parse("vision_language", caption(gt_objects="dog&&Katze größer".encode()))
    assert row == {
        "id": "7", "image": PICTURE, "width": 64, "height": 48, "caption": "A dog & a cat", "question": "",
        "answers": [], "box": None, "gt_objects": ["dog", "Katze größer"], "dataset": "coco", "type": "caption",
    }  # fmt: skip


def test_answers_keep_their_order_and_confidence() -> None:
    row = tsv.parse("vision_language", qa())
    assert row["answers"] == [("no", 0.6), ("Yes, it is", 0.3)] and row["question"] == "What is it?"


def test_grounding_box_is_in_pixels() -> None:
    assert tsv.parse("vision_language", grounding())["box"] == (1.5, 2.0, 40.0, 30.25)


def test_a_box_half_a_pixel_over_the_edge_is_cut_back() -> None:
    assert tsv.parse("vision_language", grounding(refs=b"-0.4,0,64.5,48.1"))["box"] == (0, 0, 64, 48)


def test_detection_names_may_have_commas() -> None:
    row = tsv.parse("detection", detection(b"0,0,10,10,3,traffic light, red&&1,2,64,48,/m/01,person"))
    assert row["boxes"].dtype == np.float32 and row["boxes"].tolist() == [[0, 0, 10, 10], [1, 2, 64, 48]]
    assert (row["cat_ids"], row["cat_names"]) == (["3", "/m/01"], ["traffic light, red", "person"])


def test_image_codes_cover_the_central_half() -> None:
    row = tsv.parse("image", image())
    assert row["codes"].dtype == np.int16 and row["codes"].tolist() == list(range(16))
    big = tsv.parse("image", image(b" ".join([b"8191"] * 256), base64.b64encode(picture(256, 256))))
    assert big["codes"].shape == (256,) and big["codes"].max() == 8191


def test_text_is_kept_as_it_is() -> None:
    assert tsv.parse("text", "a\t  Some Text – ünïcode ".encode()) == {"id": "a", "text": "  Some Text – ünïcode "}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_both_base64_alphabets_and_all_formats_are_read(kind: str) -> None:
    encoded = picture(64, 48, kind)
    for line in (caption(image=base64.b64encode(encoded)), caption(image=base64.urlsafe_b64encode(encoded))):
        assert tsv.parse("vision_language", line)["image"] == encoded


def test_url_safe_alphabet_was_really_tried() -> None:
    assert b"-" in base64.urlsafe_b64encode(PICTURE) and b"_" in base64.urlsafe_b64encode(PICTURE)


BAD = {
    "too few columns": ("vision_language", caption().rpartition(b"\t")[0], "columns: want 8 .* got 7"),
    "too many columns": ("text", b"1\ta\tb", "columns: want 2 .* got 3"),
    "blank line": ("text", b"", "columns: want 2 .* got 1"),
    "carriage return at the end": ("text", b"1\ta\r", "text: a carriage return"),
    "carriage return in a caption": ("vision_language", caption(caption=b"a\rb"), "caption: a carriage return"),
    "no id": ("text", b" \ta", "uniq_id: is empty"),
    "byte order mark": ("text", b"\xef\xbb\xbf1\ta", "uniq_id: .*byte order mark"),
    "invalid UTF-8": ("text", b"1\ta\xff\xfe", "text: invalid UTF-8: .* at byte 1"),
    "invalid UTF-8 in a question": ("vision_language", qa(question=b"\xc3("), "question: invalid UTF-8"),
    "invalid base64": ("vision_language", caption(image=b"!!notbase64!!"), "image: invalid base64"),
    "base64 without its padding": ("vision_language", caption(image=IMAGE.rstrip(b"=") + b"A" * 3), "image: "),
    "no image": ("vision_language", caption(image=b""), "image: is empty"),
    "not an image": ("vision_language", caption(image=base64.b64encode(b"hello")), "image: undecodable: 5 bytes"),
    "truncated JPEG": ("vision_language", caption(image=base64.b64encode(PICTURE[:-400])), "image: undecod.*trunc"),
    "truncated PNG": ("detection", b"1\t" + base64.b64encode(picture(kind="PNG")[:300]) + b"\t", "image: undecodable"),
    "decompression bomb": ("vision_language", caption(image=base64.b64encode(bomb(10_000))), "image: 10000 x 10000"),
    "huge bomb": ("vision_language", caption(image=base64.b64encode(bomb(2_000_000))), "image: .*too large"),
    "program in place of a picture": (
        "vision_language", caption(image=base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")),
        "image: undecodable",
    ),
    "unknown type": ("vision_language", caption(type=b"captions"), "type: want caption, qa, .* got 'captions'"),
    "empty caption": ("vision_language", caption(caption=b"  "), "caption: is empty"),
    "caption of punctuation": ("vision_language", caption(caption=b"..!"), "caption: is empty"),
    "empty question": ("vision_language", qa(question=b""), "question: is empty"),
    "empty expression": ("vision_language", grounding(caption=b""), "caption: is empty"),
    "empty text": ("text", b"1\t   ", "text: is empty"),
    "empty object word": ("vision_language", caption(gt_objects=b"dog&&"), "gt_objects: "),
    "no answers": ("vision_language", qa(refs=b""), "refs: want confidence"),
    "answer without confidence": ("vision_language", qa(refs=b"yes"), "refs: want confidence"),
    "confidence in words": ("vision_language", qa(refs=b"high|!+yes"), "refs: .* between 0 and 1, got 'high'"),
    "confidence over one": ("vision_language", qa(refs=b"1.01|!+yes"), "refs: .* between 0 and 1"),
    "confidence below zero": ("vision_language", qa(refs=b"-0.1|!+yes"), "refs: .* between 0 and 1"),
    "confidence not a number": ("vision_language", qa(refs=b"nan|!+yes"), "refs: .* between 0 and 1"),
    "empty answer": ("vision_language", qa(refs=b"0.5|!+no&&0.5|!+ "), "refs: the answer is empty"),
    "box of three": ("vision_language", grounding(refs=b"1,2,3"), "refs: want a box"),
    "box in words": ("vision_language", grounding(refs=b"1,2,3,x"), "refs: want a box .* got '1,2,3,x'"),
    "box not a number": ("vision_language", grounding(refs=b"nan,2,3,4"), "refs: want a box"),
    "box without end": ("vision_language", grounding(refs=b"0,0,inf,4"), "refs: want a box"),
    "inverted box": ("vision_language", grounding(refs=b"30,2,10,20"), "refs: .* inverted or empty"),
    "empty box": ("vision_language", grounding(refs=b"30,2,30,20"), "refs: .* inverted or empty"),
    "box to the right": ("vision_language", grounding(refs=b"1,1,65,20"), "refs: .* outside the picture of 64 x 48"),
    "box above": ("vision_language", grounding(refs=b"1,-5,60,20"), "refs: .* outside the picture"),
    "box far away": ("vision_language", grounding(refs=b"1000,1000,1100,1100"), "refs: .* outside the picture"),
    "sliver outside": ("vision_language", grounding(refs=b"64.1,0,64.4,9"), "refs: .* outside the picture"),
    "no objects": ("detection", detection(b""), "label: want x0,y0,x1,y1"),
    "object without a name": ("detection", detection(b"0,0,9,9,1"), "label: .* got '0,0,9,9,1' at place 0"),
    "object of empty name": ("detection", detection(b"0,0,9,9,1,dog&&0,0,9,9,1,"), "label: the name at place 1"),
    "object outside": ("detection", detection(b"0,0,9,9,1,dog&&0,0,9,99,1,cat"), "label: .* outside the picture"),
    "object inverted": ("detection", detection(b"9,0,0,9,1,dog"), "label: .* inverted"),
    "codes too few": ("image", image(b"1 2 3"), "code: want 16 codes for a picture of 64 x 64, got 3"),
    "codes too many": ("image", image(CODES + b" 1"), "code: want 16 codes .* got 17"),
    "code too large": ("image", image(CODES.replace(b"15", b"8192")), "code: .* got '8192' at place 15"),
    "code endless": ("image", image(CODES.replace(b"15", b"1" * 9999)), "code: .* got '1111"),
    "code below zero": ("image", image(CODES.replace(b"15", b"-1")), "code: .* got '-1'"),
    "code in words": ("image", image(CODES.replace(b"15", b"x")), "code: .* got 'x'"),
    "picture not square": ("image", image(CODES, IMAGE), "image: want a square .* got 64 x 48"),
    "square of odd side": ("image", image(CODES, base64.b64encode(picture(60, 60))), "image: want a square"),
}  # fmt: skip


@pytest.mark.parametrize("family, line, message", BAD.values(), ids=BAD)
def test_bad_line_says_column_and_reason(family: str, line: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}|^image: .*{message}") as raised:
        tsv.parse(family, line)
    assert len(str(raised.value)) < 250 and "\n" not in str(raised.value)


@given(line=st.binary(max_size=200), family=st.sampled_from(list(tsv.COLUMNS)))
def test_garbage_is_never_more_than_a_value_error(line: bytes, family: str) -> None:
    try:
        tsv.parse(family, line)
    except ValueError as error:
        assert str(error).partition(":")[0] in (*tsv.COLUMNS[family], "columns")


@given(
    cut=st.integers(0, len(PICTURE)), flips=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=4)
)
def test_damaged_pictures_are_never_more_than_a_value_error(cut: int, flips: list[tuple[int, int]]) -> None:
    damaged = bytearray(PICTURE[: len(PICTURE) - cut])
    for place, value in flips:
        if place < len(damaged):
            damaged[place] = value
    try:
        width, height = check_image(bytes(damaged))
    except ValueError as error:
        assert str(error).startswith("image: ")
    else:
        assert width * height <= MAX_PIXELS
