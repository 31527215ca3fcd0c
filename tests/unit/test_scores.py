"""What an answer is worth, checked on cases worked out by hand."""

import numpy as np
import pytest

from ofa_ds.tasks import judges as scores

BOX = (0.0, 0.0, 10.0, 10.0)
HALF = (0.0, 0.0, 5.0, 10.0)
QUARTER = (0.0, 0.0, 5.0, 5.0)


def test_iou_of_equal_half_apart_and_inverted_boxes() -> None:
    others = np.array([BOX, HALF, QUARTER, (20.0, 20.0, 30.0, 30.0), (10.0, 10.0, 0.0, 0.0)])
    assert scores.iou(np.array(BOX), others).tolist() == [1.0, 0.5, 0.25, 0.0, 0.0]


def test_two_empty_boxes_have_no_overlap() -> None:
    empty = np.array([3.0, 3.0, 3.0, 3.0])
    assert scores.iou(empty, empty) == 0


def test_a_box_is_found_from_one_half_on_and_no_box_is_not() -> None:
    assert scores.found([BOX] * 3, [HALF, QUARTER, None]) == [1.0, 0.0, 0.0]


def test_exact_match_ignores_case_and_spaces_only() -> None:
    assert scores.exact([" A red  circle", "two"], ["a red circle", "2"]) == [1.0, 0.0]


def test_f_measure_counts_each_expected_box_once() -> None:
    expected = [[(BOX, "red circle")]]
    twice = [[(BOX, "red circle"), (BOX, "red circle")]]
    assert scores.f_measure(expected, expected, named=True) == 1
    assert scores.f_measure(expected, twice, named=True) == pytest.approx(2 / 3)
    assert scores.f_measure(expected, [[]], named=False) == 0


def test_f_measure_can_ask_for_the_right_name() -> None:
    expected, given = (
        [[(BOX, "red circle"), ((20, 20, 30, 30), "cat")]],
        [[(BOX, "blue circle"), ((20, 20, 30, 30), "Cat")]],
    )
    assert scores.f_measure(expected, given, named=False) == 1
    assert scores.f_measure(expected, given, named=True) == 0.5


def test_nothing_expected_and_nothing_given_is_right() -> None:
    assert scores.f_measure([[]], [[]], named=True) == 1


def test_cider_prefers_the_expected_caption_and_shared_rare_words() -> None:
    pytest.importorskip("pycocoevalcap.cider.cider", reason="CIDEr needs the package pycocoevalcap")
    expected = ["a red circle above a blue square", "a green triangle", "a white square", "a purple circle"]
    same = scores.cider(expected, [text.upper() + "." for text in expected])
    near = scores.cider(expected, ["a red circle", "a green square", "a white square", "a purple square"])
    nothing = scores.cider(expected, ["zebra"] * 4)
    assert same > near > nothing == 0
    assert 4 < same <= 10


def test_cider_needs_two_captions() -> None:
    assert scores.cider(["a cat"], ["a cat"]) is None


def test_the_constant_answer_is_the_best_of_each_type() -> None:
    answers, types = ["yes", "yes", "no", "red", "blue", "blue"], ["is"] * 3 + ["what color"] * 3
    assert scores.constant_share(answers, types) == pytest.approx(4 / 6)
    assert scores.constant_share(answers) == pytest.approx(2 / 6)


def test_rare_question_types_are_merged_so_that_being_alone_is_not_being_right() -> None:
    types = ["what color"] * scores.RARE_TYPE + ["why is", "who was"]
    assert scores.merged_types(types) == ["what color"] * scores.RARE_TYPE + ["other", "other"]


def test_the_question_type_is_its_first_two_words() -> None:
    assert scores.question_type("  How MANY circles are there?") == "how many"


def test_the_constant_box_is_the_one_that_overlaps_most() -> None:
    assert scores.constant_box_share([BOX, HALF, (50, 50, 60, 60), (80, 80, 90, 90)]) == 0.5


def test_the_constant_sequence_is_the_best_token_of_each_place() -> None:
    assert scores.constant_sequence_share([[1, 2], [1, 3], [4, 3]]) == pytest.approx(4 / 6)
