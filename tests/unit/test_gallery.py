"""A gallery shows every picture under its caption, whatever their number, size or length."""

from __future__ import annotations

import numpy as np
import pytest

from ofa_ds.tasks.gallery import SIDE_PIXELS, Entry, draw_gallery

COLOURS = [(255, 0, 0), (0, 200, 0), (0, 0, 255), (250, 200, 0), (200, 0, 200), (0, 120, 120), (90, 60, 30)]


def flat(colour: tuple[int, int, int], height: int = 16, width: int = 16) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def counted(sheet: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((sheet == colour).all(-1).sum())


@pytest.mark.parametrize("captions, samples", [(1, 1), (1, 7), (2, 3), (7, 1), (5, 2)])
def test_every_picture_is_there_once_and_whole(captions: int, samples: int) -> None:
    pictures = [flat(colour) for colour in COLOURS[:samples]]
    sheet = np.asarray(draw_gallery([Entry(caption=f"caption {i}", pictures=pictures) for i in range(captions)]))
    for colour in COLOURS[:samples]:
        assert counted(sheet, colour) == captions * SIDE_PIXELS**2
    assert 1 / 4 < sheet.shape[0] / sheet.shape[1] < 4


def test_pictures_of_any_size_are_brought_to_one_and_keep_their_form() -> None:
    sizes = [(8, 8), (512, 512), (256, 128), (1, 100)]
    pictures = [flat(colour, *size) for colour, size in zip(COLOURS, sizes, strict=False)]
    sheet = np.asarray(draw_gallery([Entry(caption="sizes", pictures=pictures)]))
    areas = [counted(sheet, colour) for colour in COLOURS[:4]]
    assert areas == [SIDE_PIXELS**2, SIDE_PIXELS**2, SIDE_PIXELS**2 // 2, SIDE_PIXELS * 2]


def test_captions_and_notes_are_written_and_long_ones_are_cut() -> None:
    picture = [flat((255, 255, 255))]
    blank = np.asarray(draw_gallery([Entry(caption="", pictures=picture)]))
    written = np.asarray(draw_gallery([Entry(caption="a red circle", pictures=picture)]))
    noted = np.asarray(draw_gallery([Entry(caption="", pictures=picture, notes=["0.31"])]))
    long = np.asarray(draw_gallery([Entry(caption="word " * 10_000, pictures=picture)]))
    dark = [int((sheet.sum(-1) < 600).sum()) for sheet in (blank, written, noted, long)]
    assert dark[0] < dark[2] < dark[1] < dark[3]
    assert long.shape[0] < written.shape[0] + 100


def test_line_ends_and_tabs_of_a_caption_are_blanks() -> None:
    texts = ("a b c", "a b c\n", "a\nb\t c")
    plain, *others = [draw_gallery([Entry(caption=text, pictures=[flat((255, 0, 0))])]) for text in texts]
    assert all(np.array_equal(plain, other) for other in others)


def test_nothing_to_draw_and_wrong_notes_are_refused() -> None:
    for entries in ([], [Entry(caption="a", pictures=[])]):
        with pytest.raises(ValueError, match="want one picture or more of each caption"):
            draw_gallery(entries)
    with pytest.raises(ValueError, match="2 notes of 1 pictures of 'a'"):
        draw_gallery([Entry(caption="a", pictures=[flat((0, 0, 0))], notes=["1", "2"])])
