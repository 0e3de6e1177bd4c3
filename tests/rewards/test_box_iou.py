"""Boxes coincide where they are stated for the right time."""

import pytest

from longrl.rewards.box_iou import box_iou, box_iou_lenient, gold_boxes, intersection_over_union
from longrl.rewards.timed_boxes import TimedBox
from longrl.types import Completion, Row

TRACK = '[{"time": 1.0, "bbox_2d": [0, 0, 10, 10]}, {"time": 2.0, "bbox_2d": [10, 0, 20, 10]}]'


def score(answer: str, gold: str = TRACK, **metadata: object) -> float:
    row = Row("1", "Where?", gold, task="box_iou", metadata=metadata)
    return box_iou(Completion((), (), f"<answer>{answer}</answer>", "stop"), row)


def test_iou_by_hand():
    square = TimedBox(0, 0, 10, 10)
    assert intersection_over_union(square, square) == 1.0
    assert intersection_over_union(square, TimedBox(5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert intersection_over_union(square, TimedBox(10, 0, 20, 10)) == 0.0
    assert intersection_over_union(square, TimedBox(10, 10, 0, 0)) == 0.0  # corners the wrong way round


def test_the_same_track_is_right_and_half_of_it_half():
    assert score(TRACK) == 1.0
    assert score('{"1": [0, 0, 10, 10]}') == pytest.approx(1 / 2)
    assert score('{"1": [5, 0, 15, 10], "2": [10, 0, 20, 10]}') == pytest.approx((1 / 3 + 1) / 2)
    assert score("nothing") == 0.0


def test_a_box_counts_within_the_tolerance_of_its_time_only():
    late = '{"2.9": [0, 0, 10, 10]}'
    one = '{"time": 2.0, "bbox_2d": [0, 0, 10, 10]}'
    assert score(late, one) == 1.0
    assert score('{"3.1": [0, 0, 10, 10]}', one) == 0.0
    assert score(late, one, time_tolerance_s=0.5) == 0.0
    assert score("[0, 0, 10, 10]", one) == 0.0  # without a time


def test_naming_many_boxes_lowers_the_score():
    one = '{"time": 2.0, "bbox_2d": [0, 0, 10, 10]}'
    many = '{"2": [[0, 0, 10, 10], [0, 0, 9, 9], [1, 1, 9, 9], [0, 0, 99, 99]]}'
    assert score(many, one) == pytest.approx(1 / 4)


def test_of_several_boxes_at_one_time_those_that_coincide_are_partners():
    gold = '{"1": [[0, 0, 10, 10], [50, 50, 60, 60]]}'
    assert score('{"1": [[50, 50, 60, 60], [0, 0, 10, 10]]}', gold) == 1.0


def test_tracks_without_times_are_compared_in_their_order():
    gold = "[[0.0, 0.0, 0.1, 0.1], [0.1, 0.0, 0.2, 0.1]]"
    assert score(gold, gold) == 1.0
    assert score("[[0.1, 0.0, 0.2, 0.1], [0.0, 0.0, 0.1, 0.1]]", gold) == 0.0
    assert score("[[0.0, 0.0, 0.1, 0.1]]", gold) == pytest.approx(1 / 2)


def test_a_row_says_how_big_a_frame_is_in_the_units_of_answer_and_question():
    gold = '{"1": [0, 0, 640, 360]}'
    sizes = {"box_size": [1280, 720], "said_box_size": [1000, 1000]}
    assert score('{"1": [0, 0, 500, 500]}', gold, **sizes) == pytest.approx(1.0)
    assert score('{"1": [0, 0, 640, 360]}', gold, **sizes) < 0.6
    with pytest.raises(ValueError, match=r"said_box_size=\[1000, 1000\] but no box_size; add the width and height"):
        score('{"1": [0, 0, 5, 5]}', gold, said_box_size=[1000, 1000])


def test_lenient_reads_the_text_after_the_thinking():
    row = Row("1", "Where?", TRACK, task="box_iou")
    bare = Completion((), (), f"<think>[0, 0, 1, 1]</think>{TRACK}", "stop")
    assert (box_iou(bare, row), box_iou_lenient(bare, row)) == (0.0, 1.0)


@pytest.mark.parametrize(
    "answer", ["left", "[10, 10, 0, 0]", '[{"time": 1, "bbox_2d": [0, 0, 1, 1]}, {"bbox_2d": [0, 0, 1, 1]}]']
)
def test_a_row_without_proper_boxes_is_an_error_with_the_remedy(answer):
    with pytest.raises(ValueError, match=r"row '9'.*must hold boxes.*write each as"):
        gold_boxes(Row("9", "Where?", answer, task="box_iou"))
